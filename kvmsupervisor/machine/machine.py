"""The QEMU process of one instance, from its first record to the end of it. The worker observes it and acts through it.

Joins three adapters (processes, QMP, run directory). Decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from structlog.typing import FilteringBoundLogger

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.process import SpawnFailed
from kvmsupervisor.adapters.qmp import MonitorRefused
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.aio import ended
from kvmsupervisor.domain import view
from kvmsupervisor.domain.argv import AGENT_PORT, Channels, Provision
from kvmsupervisor.domain.counters import GuestCounts
from kvmsupervisor.domain.exits import SHUTDOWN_REASONS, Exit, ExitClass, WaitStatus, classify
from kvmsupervisor.domain.identity import HostIdentity
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.qmp_answers import text_in
from kvmsupervisor.domain.run_state import INCOMING, IO_ERROR, NEVER_RAN, PAUSED, POSTMIGRATE, RUNNING
from kvmsupervisor.domain.secrecy import secrets_in
from kvmsupervisor.domain.spec import Spec, spec_from_object
from kvmsupervisor.domain.storage import pinning
from kvmsupervisor.domain.view import Stopping
from kvmsupervisor.failpoints import cut
from kvmsupervisor.machine import identity as process_identity
from kvmsupervisor.machine.agent_watch import AgentWatch
from kvmsupervisor.machine.cdrom import Drive
from kvmsupervisor.machine.changes import Changes
from kvmsupervisor.machine.guest_logs import MachineLogs
from kvmsupervisor.machine.guest_stats import count
from kvmsupervisor.machine.migration import Migration
from kvmsupervisor.machine.monitor import Conversation
from kvmsupervisor.machine.resize import Growth
from kvmsupervisor.machine.room import Room
from kvmsupervisor.machine.spawn import BEHIND, Launch, Quarters, SpawnRequest
from kvmsupervisor.machine.standstill import Standstill
from kvmsupervisor.machine.system import QemuProcess, System
from kvmsupervisor.machine.viewers import Viewers

KILL_S = 5.0
"""How long to wait for a killed process to end before the worker goes on (the process may hang in the kernel)."""


class Machine:
    """The instance's QEMU: none, living, or ended and still on record.

    `notify` is called, in the event loop, whenever something changed that a decision or the status may depend on. QEMU
    is started as `launch` says. `caught_up` returns once the guard has written down what it did.

    Attributes:
        directory: the instance's folder in the run directory.
        record: the record of the process; None when there is no process.
        agent: the guest's agent.
        spec: the spec that QEMU was started with; None without a process, or when this release cannot read it.
        counts: QEMU's counters of the guest, from the last query.
    """

    def __init__(
        self,
        *,
        system: System,
        prefix: str,
        directory: InstanceDir,
        clock: Clock,
        notify: Callable[[], None],
        on_reset: Callable[[], None],
        on_event: Callable[[], None] = lambda: None,
        on_connect: Callable[[], None] = lambda: None,
        logs: MachineLogs,
        log: FilteringBoundLogger,
        caught_up: Callable[[], Awaitable[None]] | None = None,
        launch: Launch = BEHIND,
    ) -> None:
        self.directory = directory
        self.record: Incarnation | None = None
        self.agent = AgentWatch(
            ask=system.ask_agent, socket=directory.agent_socket, clock=clock, notify=notify, log=log
        )
        self._processes = system.processes
        self._prefix = prefix
        self._clock = clock
        self._notify = notify
        self._on_reset = on_reset
        self._count_event = on_event
        self._logs = logs
        self._log = log
        self._caught_up = caught_up
        self._launch = launch
        self.spec: Spec | None = None
        self._process: QemuProcess | None = None
        self._talk = Conversation(
            connect=system.connect,
            socket=directory.qmp_socket,
            clock=clock,
            on_event=self._on_event,
            on_connect=on_connect,
            notify=notify,
            log=log,
        )
        self.viewers = Viewers(self._talk.ask, lambda: self.record)
        self._settling: asyncio.Task[None] | None = None
        self.standstill = Standstill(system, self._talk, self.agent, directory, clock=clock, note=self.note)
        self._clear()

    def _clear(self) -> None:
        self.counts = GuestCounts()
        self._exit: Exit | None = None
        self._verdict: Exit | None = None
        self._shutdown: str | None = None
        self.growth = Growth(self._clock, self._talk.ask)
        self.room = Room(self._clock, self._talk.command)
        self.migration = Migration(self._clock, self._talk)
        self.drive = Drive(self._clock, self._talk.ask)
        self.changes = Changes(self._clock, self._talk.ask)
        self._stopping: Stopping | None = None
        self._asked = False
        self._pressed = False
        # Whether its guest was let run, as far as that is ours to do.
        self._let_run = not self._launch.paused
        # Invariant: whether the file of the record holds `record` as it is here.
        self._kept = True
        self._talk.reset()
        self.agent.reset()

    # --- what is observed -------------------------------------------------------------------------------------

    def view(self) -> view.Process | None:
        """The process as `decide` sees it; None when there is none."""
        if self.record is None:
            return None
        return view.Process(
            incarnation=self.record,
            spec=self.spec,
            exit=self._exit,
            connected=self._talk.answered,
            run_state=self._state,
            stage=self._talk.stage,
            connect_at=self._talk.connect_at,
            probe_at=self._talk.probe_at,
            grow_at=self.growth.at,
            disk_trouble=self.growth.trouble,
            room_at=self.room.at if self._is_to_be_explained else math.inf,
            full=self.room.said if self._is_to_be_explained else None,
            medium_at=self.drive.at,
            medium_trouble=self.drive.trouble,
            attempts=self.changes.attempts,
            silent_since=self._talk.silent_since,
            stopping=self._stopping,
            asked=self._asked,
        )

    @property
    def _is_to_be_explained(self) -> bool:
        """Whether a disk's error has stopped the guest: a file system may be full, or its client shut out."""
        clients = () if self.record is None else self.record.clients
        return self._talk.run_state == IO_ERROR and self.spec is not None and bool(pinning(self.spec) or clients)

    @property
    def pid(self) -> int | None:
        """Of the living process."""
        return self._process.pid if self._process is not None and self._exit is None else None

    @property
    def pidfd(self) -> int | None:
        """Of the living process."""
        return self._process.pidfd if self._process is not None and self._process.pidfd >= 0 else None

    @property
    def run_state(self) -> str | None:
        """QMP's run state of the living process; None without a process, and while QEMU does not answer."""
        return self._state if self.pid is not None and self._talk.silent_since is None else None

    @property
    def _state(self) -> str | None:
        """The run state as a decision takes it: a guest that waits for its user has run once it is let go of."""
        told = self._talk.run_state
        if not self._launch.waits or told not in {NEVER_RAN, INCOMING}:
            return told
        return PAUSED if self._let_run else NEVER_RAN

    @property
    def wait_status(self) -> WaitStatus:
        """How the process ended, as the kernel says; both fields None when that is not known."""
        return WaitStatus() if self._process is None else self._process.status

    @property
    def never_ran(self) -> bool:
        """Whether the guest certainly never ran."""
        return self._state == NEVER_RAN or (self.record is not None and self.record.incoming)

    # --- beginnings -------------------------------------------------------------------------------------------

    def spawn(
        self,
        record: Incarnation,
        spec: Spec,
        build: Callable[[Channels], Provision],
        argv: Callable[[Provision], Sequence[str]],
        quarters: Quarters,
    ) -> None:
        """Write the record, start QEMU, then add its pid to it.

        `spec` is the machine of the record. The other arguments are those of `spawn.SpawnRequest`.

        Crash-safe: a successor finds a record without a process, or finds the process by its environment. A program
        that cannot be started is an end like any other.

        Raises:
            OSError: the host lacks disk space, open files or memory. There is no record and no process then.
        """
        self._clear()
        try:
            self._process = self._launch.spawn(
                SpawnRequest(
                    directory=self.directory,
                    record=record,
                    build=build,
                    argv=argv,
                    quarters=quarters,
                    processes=self._processes,
                    prefix=self._prefix,
                    logs=self._logs,
                    on_record=partial(self._begin, spec=spec),
                    on_end=self._on_end,
                )
            )
        except SpawnFailed as error:
            self._exit = Exit(ExitClass.FAILED, f"failed: {error}")
            return
        except OSError:
            self.record = self.spec = None
            raise
        assert self.record is not None
        self._talk.run_state = NEVER_RAN if self._launch.paused else None
        self._talk.receives = record.incoming
        cut("spawned, pid not on record")
        # A successor finds the process without the pid, too. The next `note`, before the guest runs, tries again.
        with contextlib.suppress(OSError):
            self.note(pid=self._process.pid, starttime=self._process.starttime)

    def _begin(self, record: Incarnation, spec: Spec | None) -> None:
        self.record, self.spec = record, spec
        self._talk.argv = record.argv

    def adopt(self, record: Incarnation, *, boot_id: str, under: HostIdentity | None = None) -> bool:
        """Adopt the process that an earlier supervisor started; return False when the process is gone.

        `identity.reopen` finds the process (laws 8 and 12). The worker asks QMP and the lock afterwards. A record of an
        earlier release does not say which identity QEMU was started under; then `under` is used.

        Raises:
            process.Hidden: a process with that pid lives, and its identity cannot be read. The record stays.
        """
        is_of_boot = record.boot_id == boot_id
        found = process_identity.reopen(self._processes, record, on_end=self._on_end) if is_of_boot else None
        self._clear()
        self._begin(record, spec_from_object(record.spec))
        self._process = found
        if found is not None:
            self._talk.run_state = PAUSED if record.paused else None
            # Cut off before its guest went on, it may be on record as one that has come.
            self._talk.receives = record.incoming or "-incoming" in record.argv
            self._logs.adopt(record.argv, pid=found.pid, pidfd=found.pidfd)
            with contextlib.suppress(OSError):
                self.note(pid=found.pid, starttime=found.starttime, under=record.under or under)
            return True
        if record.boot_id != boot_id:
            self._exit = Exit(ExitClass.UNKNOWN, "ended with the host's last boot")
        elif record.pid is None:
            self._exit = Exit(ExitClass.UNKNOWN, "was not started: its supervisor was cut off before")
        else:
            self._exit = self._classify(WaitStatus())
        self._asked = record.pid is None or record.boot_id != boot_id or self._exit.kind is ExitClass.GUARD
        return False

    async def connect(self) -> None:
        """Connect to QMP and ask for the run state. A failure shows in `view`: `connect_at`, `silent_since`."""
        assert self.record is not None
        if not await self._talk.open(process_identity.uuid_to_check(self.record, self._process)):
            return
        # QEMU greets before its devices exist: only an answered command means that it is up.
        await self.probe()
        # Its logs are open by then, and take nothing of its guest, whoever lets that run, until they are looked at.
        self._logs.look()
        if not self._talk.answered:
            self._talk.retry()
        elif self._launch.furnished and not self.never_ran:
            await self.agent.look(self._talk.command)

    # --- commands ---------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """Ask for the run state. A successor learns from the record that a person has paused the guest."""
        await self._talk.probe()
        self._note_paused()
        if self._launch.furnished and self._talk.run_state == RUNNING:
            # Only of a running guest: before that, QEMU has counted nothing.
            self.counts = await count(self._talk.command, self.spec)

    def _note_paused(self) -> None:
        """Note whether a person has paused the guest, where that is known: on record it goes with a live move."""
        if self._talk.run_state in {PAUSED, RUNNING} and self.record is not None and not self.record.incoming:
            with contextlib.suppress(OSError):
                self.note(paused=self._talk.run_state == PAUSED)

    async def resume(self) -> bool:
        """Let the guest run; return True when QEMU confirms it.

        Without an answer the guest may run; QEMU is asked for its state next. A QEMU that refuses is killed, as failed.
        """
        self._let_run = True
        if self._launch.waits:
            return True
        self._talk.run_state = None
        try:
            answer = await self._talk.ask("cont")
        except MonitorRefused as error:
            self._talk.run_state = NEVER_RAN
            await self.give_up(str(error))
            return False
        if answer is None:
            self._talk.probe_at = 0.0
            return False
        self._talk.run_state = RUNNING
        return True

    async def press_power_button(self) -> None:
        """Press the ACPI power button. Only the guest's end shows that the guest heeded it."""
        begun = self._stopping or Stopping(since=self._clock.now())
        self._asked = self._pressed = True
        await self._talk.command("system_powerdown")
        # The guest's time begins once QEMU has heard of it: a supervisor may be frozen before that.
        now = self._clock.now()
        self._stopping = replace(begun, asked_at=now if begun.asked_at is None else begun.asked_at, pressed_at=now)

    async def reset(self, request: str | None) -> None:
        """Reset the machine for this `restart_request`, at most once: the record tells a successor that it was done."""
        # When the record cannot be written, this supervisor knows it all the same.
        with contextlib.suppress(OSError):
            self.note(restart_request=request)
        await self._talk.command("system_reset")

    async def finish(self) -> None:
        """Stop a QEMU that lives on after its guest has powered off (`-no-shutdown`). Counts as the guest's own end."""
        kind = SHUTDOWN_REASONS.get(self._shutdown or "", ExitClass.GUEST_SHUTDOWN)
        self._verdict = Exit(kind, kind.value)
        await self._quit()

    async def quit(self) -> None:
        """Stop QEMU without its guest's consent; QEMU flushes its disks. By SIGTERM when QMP does not answer."""
        self._asked = True
        await self._quit()

    async def _quit(self) -> None:
        now = self._clock.now()
        self._stopping = replace(self._stopping or Stopping(since=now), quit_at=now)
        if await self._talk.command("quit") is None and self._process is not None:
            self._process.signal(signal.SIGTERM)

    async def kill(self, why: str) -> None:
        """Kill QEMU on purpose; return once it has ended, or after `KILL_S`. Before its guest ran, by SIGTERM first."""
        # A guest that has powered itself off was not stopped by us, even when QEMU has to be killed.
        self._asked |= self._verdict is None
        await self._kill(Exit(ExitClass.HOST_SIGNAL, f"killed by its supervisor: {why}"))

    async def give_up(self, why: str) -> None:
        """Kill a QEMU that never answered; it counts as failed."""
        await self._kill(Exit(ExitClass.FAILED, f"failed: {why}"))

    def stop_begins(self) -> None:
        """Note when the stop began; its deadline counts from then. Does nothing when the stop has begun."""
        if self._stopping is None:
            self._stopping = Stopping(since=self._clock.now())

    def stop_is_off(self) -> None:
        """Cancel the stop: a later one starts over, and an exit before it counts as unrequested.

        Unless the power button was already pressed: the guest may still heed it.
        """
        if self._stopping is not None:
            self._stopping = None
            self._asked = self._verdict is not None

    def note(self, **known: Any) -> None:
        """Add to the record what became known of the process: fields of `Incarnation`.

        Raises:
            OSError: the record cannot be written. The next call tries again.
        """
        assert self.record is not None
        before, self.record = self.record, replace(self.record, **known)
        if self._kept and self.record == before:
            return
        self._kept = False
        self.directory.write_incarnation(self.record)
        self._kept = True

    async def drop_record(self) -> None:
        """Delete the record of an ended process. The caller has recorded the exit."""
        await self.detach()
        cut("exit recorded, process still on record")
        self.directory.drop_incarnation()
        self.record = self.spec = None
        self._clear()

    async def detach(self) -> None:
        """Stop watching the process, which goes on: the next supervisor adopts it."""
        process, settling = self._process, self._settling
        self._process = self._settling = None
        if process is not None:
            # First: an end that is noticed while the rest is being closed would begin another task.
            process.close()
        if settling is not None:
            await ended(settling)
        self._logs.close()
        await self.agent.close()
        await self._talk.close()

    # --- inside -----------------------------------------------------------------------------------------------

    async def _kill(self, verdict: Exit) -> None:
        if self._process is None:
            return
        self._verdict = self._verdict or verdict
        if self.never_ran or self._talk.run_state == POSTMIGRATE:
            # Costs nothing before the guest ran, or once it was sent. A killed one would keep its disks open in Ceph
            # for another 30 s.
            await self._process.terminate()
        self._process.signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(KILL_S):
                await self._process.ended.wait()
                if self._settling is not None:
                    await asyncio.shield(self._settling)
        except TimeoutError:
            self._log.error("instance.unkillable", pid=self._process.pid)

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        self._count_event()
        match name:
            case "SHUTDOWN":
                self._shutdown = text_in(data, "reason")
            case "VSERPORT_CHANGE":
                if data.get("id") == AGENT_PORT:
                    self.agent.turn(is_open=bool(data.get("open")))
                return
            case "DEVICE_TRAY_MOVED" if self.drive.moved():
                pass
            case _ if self.changes.hears(name, data):
                pass
            case "RESET" if data.get("guest"):
                self._on_reset()
                return
            case _ if not self._talk.hears(name, data):
                return
            case "RESUME":
                self._note_paused()
        self._notify()

    def _on_end(self) -> None:
        self._settling = asyncio.get_running_loop().create_task(self._settle())

    async def _settle(self) -> None:
        """Classify the end, once the last QMP events have arrived."""
        assert self._process is not None
        self.agent.turn(is_open=False)
        await self._talk.drained()
        if self._caught_up is not None and self._verdict is None and self._process.status.code is None:
            # A guard kills first, and writes that down afterwards.
            await self._caught_up()
        self._exit = self._verdict or self._classify(self._process.status)
        self._asked |= (self._pressed and self._exit.is_clean) or self._exit.kind is ExitClass.GUARD
        self._notify()

    def _classify(self, status: WaitStatus) -> Exit:
        assert self.record is not None
        return classify(
            shutdown=self._shutdown,
            status=status,
            log_tail=self._logs.tail(self.record.log_offset),
            guard_killed_at=self.directory.guard_killed_at(self.record.incarnation),
            secrets=secrets_in(self.record.argv),
        )
