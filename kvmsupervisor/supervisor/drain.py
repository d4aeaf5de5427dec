"""All guests of this host, shut down on the host itself: `stop --all --local`, and what ends that.

Works without etcd, and without a supervisor. No wish is touched: the host runs its guests again after its next boot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.process import Hidden
from kvmsupervisor.adapters.rundir import AlreadyRunning, InstanceDir, RunDir
from kvmsupervisor.aio import ended
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState, Unreadable
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.restart import after
from kvmsupervisor.domain.view import Process, View
from kvmsupervisor.instance.alone import see_to_its_end
from kvmsupervisor.machine.guest_logs import GuestLogs
from kvmsupervisor.machine.identity import pid_of
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.system import System

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 0.2
"""How often it is looked whether the guests have gone; arbitrary, little beside a shutdown."""


class DrainMark:
    """What a supervisor knows of it: the mark in the run directory.

    Args:
        run_dir: `KVM_RUN_DIR`.
        boot_id: of this boot; a mark of another one means nothing.

    Attributes:
        on: whether this host stops all its guests.
    """

    def __init__(self, run_dir: RunDir, *, boot_id: str) -> None:
        self.on = False
        self._run_dir = run_dir
        self._boot_id = boot_id
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` whenever it came or went; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def heed(self) -> None:
        """Look whether the mark came or went."""
        on = self._run_dir.is_draining(self._boot_id)
        if on != self.on:
            self.on = on
            log.info("host.draining" if on else "host.drain_ended")
            for listener in self._listeners:
                listener()


class Drain:
    """Shuts down what runs on this host.

    Args:
        system: of this host.
        clock: the machine's.
        boot_id: of this boot.
        run_dir: of the supervisor.
        prefix: `KVM_PREFIX`.
        me: this host's name.
        shutdown_timeout_s: default between power button and force.
    """

    def __init__(
        self,
        *,
        system: System,
        clock: Clock,
        boot_id: str,
        run_dir: RunDir,
        prefix: str,
        me: HostName,
        shutdown_timeout_s: float,
    ) -> None:
        self._system = system
        self._clock = clock
        self._boot_id = boot_id
        self._run_dir = run_dir
        self._prefix = prefix
        self._me = me
        self._shutdown_timeout_s = shutdown_timeout_s
        self._logs = GuestLogs(clock=self._clock)

    def running(self) -> tuple[InstanceId, ...]:
        """The instances whose QEMU lives on this host."""
        return tuple(name for name in self._run_dir.instances() if self._lives(self._run_dir.instance(name)))

    async def begin(self, *, timeout_s: float, on_change: Callable[[tuple[InstanceId, ...]], None]) -> bool:
        """Shut all guests down, each within its own time, and keep the supervisor from starting any.

        Args:
            timeout_s: how long to wait for all of them.
            on_change: told which still run, whenever those are others than before.

        Returns:
            Whether all are gone. Those that are not go on shutting down only while a supervisor runs.

        Raises:
            OutOfReach: a supervisor runs where it cannot be told.
        """
        self._run_dir.mark_draining(self._boot_id)
        ours = asyncio.create_task(self._shut_down_ourselves()) if not self._run_dir.signal_supervisor() else None
        until = self._clock.now() + timeout_s
        told: tuple[InstanceId, ...] | None = None
        try:
            while (left := self.running()) or (ours is not None and not ours.done()):
                if left != told:
                    on_change(left)
                    told = left
                if self._clock.now() >= until:
                    return not left
                await self._clock.sleep(LOOK_EVERY_S)
            if ours is not None:
                await ours
        finally:
            if ours is not None:
                await ended(ours)
        return True

    def end(self) -> None:
        """Let the supervisor start what the keys ask for.

        Raises:
            OutOfReach: a supervisor runs where it cannot be told.
        """
        self._run_dir.unmark_draining()
        self._run_dir.signal_supervisor()

    def _lives(self, directory: InstanceDir) -> bool:
        record = _record_of(directory)
        if record is None or record.boot_id != self._boot_id:
            return False
        processes, pid = self._system.processes, record.pid
        found = pid_of(processes, record.instance, record.incarnation, pid=pid, starttime=record.starttime)
        return found is not None

    async def _shut_down_ourselves(self) -> None:
        """There is no supervisor: do its part for what it left behind, in its place."""
        try:
            self._run_dir.acquire()
        except AlreadyRunning:
            # One has started just now; it has seen the mark.
            return
        try:
            async with asyncio.TaskGroup() as group:
                for name in self._run_dir.instances():
                    directory = self._run_dir.instance(name)
                    record = _record_of(directory)
                    if record is not None:
                        group.create_task(self._shut_down(directory, record))
        finally:
            self._logs.close()
            self._run_dir.release()

    async def _shut_down(self, directory: InstanceDir, record: Incarnation) -> None:
        """Go down the ladder that the supervisor would: the same decision, of the one process."""
        wake = asyncio.Event()
        machine = Machine(
            system=self._system,
            prefix=self._prefix,
            directory=directory,
            clock=self._clock,
            notify=wake.set,
            on_reset=lambda: None,
            logs=self._logs.of(directory),
            log=log.bind(instance=record.instance),
        )
        saved = _saved_of(directory, self._boot_id)
        timeout_s = saved.shutdown_timeout_s
        try:
            try:
                machine.adopt(record, boot_id=self._boot_id)
            except Hidden as error:
                log.warning("instance.unreadable", instance=record.instance, reason=str(error))
                return

            def view(process: Process) -> View:
                return View(
                    now=self._clock.now(),
                    me=self._me,
                    facts="",  # no lock is looked at
                    boot_id=self._boot_id,
                    wish=None,
                    draining=True,
                    session_held=False,
                    process=process,
                    saved=saved,
                    shutdown_timeout_s=self._shutdown_timeout_s if timeout_s is None else timeout_s,
                )

            process = await see_to_its_end(
                machine, wake=wake, clock=self._clock, view=view, decided=lambda view, decision: None
            )
            if process is not None and process.exit is not None:
                ended = after(
                    saved,
                    process.exit,
                    None,
                    asked=True,
                    ran=not process.never_ran,
                    spawned_at=record.spawned_at,
                    now=self._clock.now(),
                    jitter=0.0,
                )
                try:
                    directory.write_state(ended)
                except OSError as error:
                    # A successor without the saved state knows less, and that is all. The other guests go on.
                    log.warning("instance.memory_unwritten", instance=record.instance, reason=str(error))
                await machine.drop_record()
        finally:
            await machine.detach()


def _record_of(directory: InstanceDir) -> Incarnation | None:
    """The record of its QEMU; None when there is none, or when only another release can read it."""
    try:
        return directory.read_incarnation()
    except Unreadable as error:
        log.warning("instance.unreadable", instance=directory.path.name, reason=str(error))
        return None


def _saved_of(directory: InstanceDir, boot: str) -> InstanceState:
    try:
        return directory.read_state(boot)
    except Unreadable:
        return InstanceState(boot_id=boot)
