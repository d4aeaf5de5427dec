"""The QMP connection of one instance: whether QEMU answers, its run state, and when to ask again.

Decides nothing, and does not know the record: `machine/machine.py` says where to connect and which machine must answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from structlog.typing import FilteringBoundLogger

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.qmp import MonitorError, MonitorLost, MonitorRefused, MonitorSilent
from kvmsupervisor.domain.lifecycle import PROBE_EVERY_S
from kvmsupervisor.domain.qmp_answers import text_in
from kvmsupervisor.domain.run_state import NEVER_RAN, PANICKED, PAUSED, POSTMIGRATE, RUNNING
from kvmsupervisor.domain.secrecy import cleaned, secrets_in
from kvmsupervisor.domain.timing import on_a_beat
from kvmsupervisor.domain.transfer import Stage
from kvmsupervisor.machine.system import Connect, QmpConnection

ANSWER_S = 5.0
"""How long one QMP exchange may take. A healthy QEMU answers in milliseconds; a loaded host needs seconds."""

RECONNECT_S = 0.5
"""Pause between attempts to connect to a living QEMU that does not answer."""

PROBE_GAP_S = 1.0
"""The least pause between two queries because of events, whatever a guest does: each query costs 1 ms of CPU."""

DRAIN_S = 1.0
"""How long the last QMP events may take to arrive after the process has ended."""

OnEvent = Callable[[str, Mapping[str, Any]], None]
"""Called with the name and the data of each QMP event, in the event loop."""


class Ask(Protocol):
    """Runs a QMP command, as `Conversation.ask` does."""

    async def __call__(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None
    ) -> Any:
        """Its result, None when QEMU did not answer; raises MonitorRefused."""


class Conversation:
    """The conversation with one QEMU after the other at the same socket; `reset` comes between two of them.

    `notify` is called, in the event loop, when the connection is lost.

    Attributes:
        run_state: the last run state from QMP; None when QEMU has told this supervisor none.
        connect_at: when the next attempt to connect is due, CLOCK_BOOTTIME.
        probe_at: when to ask for the run state again, CLOCK_BOOTTIME.
        silent_since: since when an answer is missing, CLOCK_BOOTTIME; None while QEMU answers.
        stage: how far a live move has come; asked for when somebody wants to know, then QEMU tells.
        receives: whether QEMU waits for a guest, or for the word that lets a guest go on that has come.
        argv: QEMU's command line; a secret in it is hidden in every message that repeats QEMU's words.
    """

    def __init__(
        self,
        *,
        connect: Connect,
        socket: Path,
        clock: Clock,
        on_event: OnEvent,
        on_connect: Callable[[], None],
        notify: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._connect = connect
        self._socket = socket
        self._clock = clock
        self._on_event = on_event
        self._on_connect = on_connect
        self._notify = notify
        self._log = log
        self._monitor: QmpConnection | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything: there is another QEMU, or none. The connection was closed before."""
        self.run_state: str | None = None
        self.stage = Stage.UNKNOWN
        self.receives = False
        self.connect_at = 0.0
        self.probe_at = 0.0
        self._raised_at = -math.inf
        self.silent_since: float | None = None
        self.argv: Sequence[str] = ()
        self._answered = False

    @property
    def answered(self) -> bool:
        """Whether QEMU has answered a command on this connection."""
        return self._monitor is not None and self._answered

    # --- the connection ---------------------------------------------------------------------------------------

    async def open(self, uuid: str | None) -> bool:
        """Connect, unless connected; return False when that failed. The next attempt is due at `connect_at` then.

        Args:
            uuid: the uuid of the machine that must answer; None when the process is our child.
        """
        if self._monitor is not None:
            return True
        self._answered = False
        self.stage = Stage.UNKNOWN
        try:
            self._monitor = await self._connect(
                str(self._socket), on_event=self._on_event, on_lost=self._on_lost, timeout_s=ANSWER_S
            )
            self._on_connect()
            if uuid is not None:
                await self._check_identity(uuid)
        except MonitorLost as error:
            self._log.debug("qmp.lost", error=str(error))
        except MonitorError as error:
            self._fell_silent(error)
        else:
            return True
        self.retry()
        return False

    async def _check_identity(self, expected: str) -> None:
        """Check that the machine at the socket is the one on record (law 8).

        Raises:
            MonitorLost: another machine answers; the connection is closed.
        """
        answer = await self.command("query-uuid")
        if answer is not None and (found := text_in(answer, "UUID")) != expected:
            await self.close()
            raise MonitorLost(f"machine {found} answers on {self._socket}, but the record says {expected}")

    def retry(self) -> None:
        """Try again after a pause."""
        self.connect_at = self._clock.now() + RECONNECT_S

    async def drained(self) -> None:
        """Wait until the last event of an ended QEMU has arrived, at most `DRAIN_S`."""
        if self._monitor is not None:
            await self._monitor.drained(DRAIN_S)

    async def close(self) -> None:
        """End the connection, if there is one. QEMU goes on and takes the next client."""
        if self._monitor is not None:
            monitor, self._monitor = self._monitor, None
            await monitor.close()

    # --- what is asked ----------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """Ask for the run state."""
        answer = await self.command("query-status")
        if answer is None:
            return
        told = text_in(answer, "status")
        if told is None:
            self._fell_silent(MonitorSilent("QEMU's answer to query-status names no state"))
        else:
            # QEMU says so of every guest that is reset while it is stopped (`main_loop_should_exit` in its runstate.c).
            # A guest that ran, or was paused, just before: a person has paused it, and lets it go on.
            was_paused = told == NEVER_RAN and self.run_state in {RUNNING, PAUSED}
            self.run_state = PAUSED if was_paused else told
            if told == RUNNING:
                self.runs()
            self.probe_at = on_a_beat(self._clock.now() + PROBE_EVERY_S)

    async def command(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a QMP command; return None when QEMU refused it or did not answer, or the connection ended."""
        try:
            return await self.ask(command, arguments)
        except MonitorRefused as error:
            self._log.warning("qmp.refused", command=command, error=str(error))
            return None

    async def ask(self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None) -> Any:
        """Run a QMP command, `fd` with it; return None when QEMU did not answer, or the connection ended.

        Args:
            command: of QMP.
            arguments: likewise.
            fd: a descriptor of which QEMU gets a copy.

        Raises:
            MonitorRefused: QEMU refuses the command.
        """
        monitor = self._monitor
        if monitor is None:
            return None
        try:
            answer = await monitor.execute(command, arguments, timeout_s=ANSWER_S, fd=fd)
        except MonitorSilent as error:
            self._fell_silent(error)
            return None
        except MonitorLost:
            # Wait for `on_lost`: the worker would ask again at once, and the event loop would never come to call it.
            await monitor.drained(DRAIN_S)
            return None
        except MonitorRefused as error:
            self._heard()
            raise MonitorRefused(cleaned(str(error), secrets_in(self.argv))) from None
        self._heard()
        # QMP's commands return no null; of one that did, nobody must take it for no answer, and ask again at once.
        return {} if answer is None else answer

    # --- what is heard ----------------------------------------------------------------------------------------

    def hears(self, event: str, data: Mapping[str, Any]) -> bool:
        """Note what an event says about the run state; return False when no decision depends on the event."""
        match event:
            case "RESUME":
                self.runs()
            case "GUEST_PANICKED" if data.get("action") != "run":
                self.run_state = PANICKED
            case "STOP" if self.run_state == PANICKED:
                # QEMU is ending. QEMU 7.2 has been seen to hang on a `query-status` at that moment.
                return False
            case "MIGRATION":
                self.note_migration(str(data.get("status")))
                if self.stage is Stage.IDLE:
                    self._raise_question()
            case "STOP" | "SUSPEND" | "WAKEUP":
                self._raise_question()
            case _:
                return False
        return True

    def note_migration(self, status: str) -> None:
        """Note what QEMU says of its migration. A source whose migration has completed stands still for it."""
        if self.receives:
            self.stage = Stage.of_target(status)
            if self.stage is Stage.DONE and self.run_state != RUNNING:
                self.run_state = PAUSED
            return
        if status == "completed" and self.stage in {Stage.SWITCHOVER, Stage.DEVICE}:
            self.run_state = POSTMIGRATE
        self.stage = Stage.of_source(status, self.run_state)

    def runs(self) -> None:
        """Note that the guest runs: what it was to receive has come, and what QEMU tells of that is past."""
        self.run_state, self.receives = RUNNING, False

    def _raise_question(self) -> None:
        """Ask for the run state at once, or a little later when it was asked just now."""
        now = self._clock.now()
        if now >= self._raised_at + PROBE_GAP_S:
            self._raised_at, self.probe_at = now, 0.0
        elif now >= self._raised_at:
            self._raised_at += PROBE_GAP_S
            self.probe_at = min(self.probe_at, self._raised_at)

    def _heard(self) -> None:
        self._answered = True
        if self.silent_since is not None:
            # It may have been asked for its run state while it was silent.
            self.silent_since = None
            self._raise_question()

    def _fell_silent(self, error: MonitorError) -> None:
        now = self._clock.now()
        self.probe_at = now + PROBE_EVERY_S
        if self.silent_since is None:
            self.silent_since = now - ANSWER_S
            self._log.warning("qmp.silent", error=str(error))

    def _on_lost(self) -> None:
        self._monitor = None
        self.connect_at = self._clock.now()
        self._notify()
