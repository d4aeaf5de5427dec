"""A QEMU with its user's own options, on our own standard streams, as `machine.spawn.Launch` has it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvmsupervisor.machine.identity import ProcessIdentity
from kvmsupervisor.machine.spawn import Launch, SpawnRequest
from kvmsupervisor.machine.system import QemuProcess

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

    def spawn(request: SpawnRequest) -> QemuProcess:
        """Start it. Nothing is built for it, and it has no logs, user or cgroup but ours."""
        directory = request.directory
        directory.create()
        with directory.listen(directory.qmp_socket) as qmp:
            config = directory.path / "qmp.cfg"
            config.write_text(CONFIG.format(fd=qmp.fileno()))
            words = (program, "-readconfig", str(config), *(("-S",) if is_paused else ()), *options)
            # What its options chose is not known.
            record = replace(request.record, argv=words, accelerator="", machine=None)
            directory.write_incarnation(record)
            request.on_record(record)
            marks = {}
            if marked_as is not None:
                name, incarnation = record.instance, record.incarnation
                known = ProcessIdentity(prefix=request.prefix, instance=name, incarnation=incarnation, folder=marked_as)
                marks = known.environment()
            return request.processes.spawn_in_front(
                words, environment={**os.environ, **marks}, pass_fds=[qmp.fileno()], on_end=request.on_end
            )

    return Launch(spawn=spawn, paused=is_paused, furnished=False, waits=not WAITING.isdisjoint(options))
