"""Starts a QEMU process: makes its listening sockets, writes its record, starts the program as a `Launch` says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvmsupervisor.adapters.cgroup import Cgroup
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
class SpawnRequest:
    """One start of a QEMU process.

    Attributes:
        directory: the instance's folder in the run directory; made when it is missing.
        record: the record of the process to start, without pid, argv and log offset.
        build: makes the provision from the listening sockets.
        argv: makes the command line from the provision.
        cgroup: the cgroup that the process enters before it becomes QEMU; the caller waits until it has.
        processes: of this host.
        prefix: `KVM_PREFIX`, for the marks.
        user: the user that QEMU runs as; None for our own.
        logs: makes the memory that QEMU logs into.
        on_record: called with the whole record once it is written, before the process exists.
        on_end: called once when the process has ended.
    """

    directory: InstanceDir
    record: Incarnation
    build: Callable[[Channels], Provision]
    argv: Callable[[Provision], Sequence[str]]
    cgroup: Cgroup
    processes: Processes
    prefix: str
    user: QemuUser | None
    logs: MachineLogs
    on_record: Callable[[Incarnation], None]
    on_end: Callable[[], None]


def spawn(request: SpawnRequest) -> QemuProcess:
    """Write the record of the incarnation, then start QEMU.

    Raises:
        SpawnFailed: the program cannot be started. The record exists.
        OSError: the host lacks disk space, open files or memory. There is no record and no process.
    """
    directory, cgroup = request.directory, request.cgroup
    directory.create()
    with contextlib.ExitStack() as stack:

        def listen(name: str) -> int:
            return stack.enter_context(directory.listen(directory.path / name)).fileno()

        console_log, own_log = request.logs.begin()
        channels = Channels(
            qmp=listen(directory.qmp_socket.name),
            spare=listen(directory.spare_socket.name),
            console=listen(directory.console_socket.name),
            agent=listen(directory.agent_socket.name),
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
                cgroup.wrap(words if request.user is None else (*request.user.become(), *words)),
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
                stdin=cgroup.stdin,
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
