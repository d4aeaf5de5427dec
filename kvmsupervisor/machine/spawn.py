"""Starts a QEMU process: makes its listening sockets, writes its record, starts the program as a `Launch` says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from pathlib import Path

from kvmsupervisor.adapters.apart import Entry, become
from kvmsupervisor.adapters.cgroup import Cgroup, SameCgroup
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.adapters.users import QemuUser
from kvmsupervisor.domain.argv import Channels, Provision
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.failpoints import cut
from kvmsupervisor.machine import identity as process_identity
from kvmsupervisor.machine.guest_logs import MachineLogs
from kvmsupervisor.machine.system import Processes, QemuProcess


@frozen(kw_only=True)
class Quarters:
    """Where one QEMU lives: who it is, what it sees, and where it is counted.

    Attributes:
        user: the user that it runs as; None for our own.
        entry: the way into its walls; None without.
        cgroup: the cgroup that it enters before it becomes QEMU; the caller waits until it has.
    """

    user: QemuUser | None = None
    entry: Entry | None = None
    cgroup: Cgroup = field(default_factory=SameCgroup)

    @property
    def _in_thread(self) -> QemuUser | None:
        """The user that the thread becomes. Whoever is the same user could kill it, and so the supervisor (kill(2))."""
        return None if self.user is None or self.cgroup.enters_as_root or not self.user.is_alone else self.user

    def wrap(self, words: Sequence[str]) -> Sequence[str]:
        """The command line to be spawned, of QEMU's own."""
        later = self.user if self._in_thread is None else None
        return self.cgroup.wrap(words if later is None else (*later.become(), *words))

    def enter(self) -> None:
        """Move the thread in that starts the process.

        The cgroup comes first, whose files nobody sees inside; the user last, who may do nothing of this.

        Raises:
            OSError: it cannot be.
        """
        self.cgroup.enter()
        if self.entry is not None:
            self.entry.enter()
        if (user := self._in_thread) is not None:
            become(user.uid, user.gid, user.groups)


@frozen(kw_only=True)
class SpawnRequest:
    """One start of a QEMU process.

    Attributes:
        directory: the instance's folder in the run directory; made when it is missing.
        record: the record of the process to start, without pid, argv and log offset.
        build: makes the provision from the listening sockets.
        argv: makes the command line from the provision.
        quarters: where the process is to live.
        processes: of this host.
        prefix: `KVM_PREFIX`, for the marks.
        logs: makes the memory that QEMU logs into.
        on_record: called with the whole record once it is written, before the process exists.
        on_end: called once when the process has ended.
    """

    directory: InstanceDir
    record: Incarnation
    build: Callable[[Channels], Provision]
    argv: Callable[[Provision], Sequence[str]]
    quarters: Quarters
    processes: Processes
    prefix: str
    logs: MachineLogs
    on_record: Callable[[Incarnation], None]
    on_end: Callable[[], None]


def spawn(request: SpawnRequest) -> QemuProcess:
    """Write the record of the incarnation, then start QEMU.

    Raises:
        SpawnFailed: the program cannot be started. The record exists.
        OSError: the host lacks disk space, open files or memory. There is no record and no process.
    """
    directory, quarters = request.directory, request.quarters
    if not directory.create():
        directory.drop_secrets()
    with contextlib.ExitStack() as stack:

        def listen(path: Path) -> int:
            return stack.enter_context(directory.listen(path)).fileno()

        console_log, own_log = request.logs.begin()
        channels = Channels(
            qmp=listen(directory.qmp_socket),
            spare=listen(directory.spare_socket),
            console=listen(directory.console_socket),
            agent=listen(directory.agent_socket),
            console_log=console_log,
        )
        provision = request.build(channels)
        words = tuple(request.argv(provision))
        record = replace(request.record, argv=words, log_offset=directory.log_size())
        try:
            directory.write_incarnation(record)
            # Not before: when the record cannot be written (no space), nothing has begun.
            request.on_record(record)
            cut("on record, not spawned")
            return request.processes.spawn(
                quarters.wrap(words),
                environment=process_identity.environment_of(
                    process_identity.ProcessIdentity(
                        prefix=request.prefix,
                        instance=record.instance,
                        incarnation=record.incarnation,
                        folder=directory.path,
                    )
                ),
                log_fd=own_log,
                pass_fds=provision.descriptors,
                on_end=request.on_end,
                stdin=quarters.cgroup.stdin,
                enter=quarters.enter,
            )
        except OSError:
            directory.drop_incarnation()
            raise


@frozen(kw_only=True)
class Launch:
    """How a QEMU is started, and whose its guest's first step is.

    Attributes:
        spawn: starts it, as `spawn` does in the usual way.
        paused: whether it is started with `-S`: its guest certainly has not run before it is let run.
        furnished: whether it has what we put into every machine: balloon, agent's channel. It is not asked of others.
        waits: whether its user wants it paused, or to wait for a migration: then its guest is not ours to let run.
    """

    spawn: Callable[[SpawnRequest], QemuProcess]
    paused: bool
    furnished: bool
    waits: bool


BEHIND = Launch(spawn=spawn, paused=True, furnished=True, waits=False)
"""In the background, with logs and sockets of its own, its guest ours to let run."""
