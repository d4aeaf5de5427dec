"""A QEMU with its user's own options, on our own standard streams, as `machine.spawn.Launch` has it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kvmsupervisor.adapters.cgroup import Home
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.adapters.users import QemuUser
from kvmsupervisor.domain.argv import Channels, Provision
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.machine.guest_logs import MachineLogs
from kvmsupervisor.machine.identity import Marks
from kvmsupervisor.machine.spawn import Launch
from kvmsupervisor.machine.system import Processes, QemuProcess

CONFIG = """\
[chardev "kvmsupervisor"]
  backend = "socket"
  fd = "{fd}"
  server = "on"
  wait = "off"

[mon "kvmsupervisor"]
  mode = "control"
  chardev = "kvmsupervisor"
"""
"""A QMP monitor, in the syntax of -readconfig (qemu-system-x86_64(1)). The options -mon and -qmp would do the same, and
QEMU would leave out the monitor that it has by default."""

WAITING = frozenset({"-S", "--S", "-incoming", "--incoming"})
"""Options of a QEMU whose guest is not to run at once."""


def in_front(program: str, options: Sequence[str], *, marked_as: Path | None) -> Launch:
    """How such a QEMU is started.

    Args:
        program: QEMU.
        options: its user's, as they are.
        marked_as: under a lock, the folder that its environment names; it is paused then, too. None without a lock.
    """
    is_paused = marked_as is not None

    def spawn(
        directory: InstanceDir,
        record: Incarnation,
        build: Callable[[Channels], Provision],
        argv: Callable[[Provision], Sequence[str]],
        home: Home,
        *,
        processes: Processes,
        prefix: str,
        user: QemuUser | None,
        logs: MachineLogs,
        on_record: Callable[[Incarnation], None],
        on_end: Callable[[], None],
    ) -> QemuProcess:
        """Start it. Nothing is built for it, and it has no logs, user or home but ours."""
        directory.create()
        with directory.listen(directory.qmp_socket) as qmp:
            config = directory.path / "qmp.cfg"
            config.write_text(CONFIG.format(fd=qmp.fileno()))
            words = (program, "-readconfig", str(config), *(("-S",) if is_paused else ()), *options)
            # What its options chose is not known.
            whole = replace(record, argv=words, accelerator="", machine=None)
            directory.write_incarnation(whole)
            on_record(whole)
            marks = {}
            if marked_as is not None:
                name, incarnation = record.instance, record.incarnation
                marks = Marks(prefix=prefix, instance=name, incarnation=incarnation, folder=marked_as).environment()
            return processes.spawn_in_front(
                words, environment={**os.environ, **marks}, pass_fds=[qmp.fileno()], on_end=on_end
            )

    return Launch(spawn=spawn, paused=is_paused, furnished=False, waits=not WAITING.isdisjoint(options))
