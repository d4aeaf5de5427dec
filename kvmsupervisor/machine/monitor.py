"""The conversation with one QEMU over QMP: whether it answers, what its run state is, when it is asked again.

It decides nothing, and knows of no record: `machine/machine.py` tells it where to connect and who is to answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.qmp import MonitorError, MonitorLost, MonitorRefused, MonitorSilent
from kvmsupervisor.domain.lifecycle import PROBE_EVERY_S
from kvmsupervisor.domain.run_state import PANICKED, RUNNING
from kvmsupervisor.domain.secrecy import cleaned, secrets_in
from kvmsupervisor.domain.timing import on_a_beat
from kvmsupervisor.machine.system import Connect, QmpConnection

ANSWER_S = 5.0
"""How long one QMP exchange may take. A healthy QEMU answers in milliseconds; a loaded host needs seconds."""

RECONNECT_S = 0.5
"""Pause between attempts to connect to a QEMU that lives and does not listen."""

PROBE_GAP_S = 1.0
"""The least pause between two questions that events raise, whatever a guest does: each costs 1 ms of processor."""

DRAIN_S = 1.0
"""How long the last QMP events may take to arrive after the process has ended."""

OnEvent = Callable[[str, Mapping[str, Any]], None]
"""Called with the name and the data of each QMP event, in the event loop."""


class Conversation:
    """With one QEMU after the other, at the same socket; `reset` comes between two of them.

    `notify` is called, in the event loop, when the connection was lost.

    Attributes:
        run_state: QMP's, as last told; None when never told to this supervisor.
        connect_at: when the next attempt to connect is due, CLOCK_BOOTTIME.
        probe_at: when QEMU is to be asked for its run state again.
        silent_since: since when it owes an answer, None when it answers.
        argv: its command line: a secret in it stands in no public word, whatever QEMU says back.
    """

    def __init__(
        self,
        *,
        connect: Connect,
        socket: Path,
        clock: Clock,
        on_event: OnEvent,
        notify: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._connect = connect
        self._socket = socket
        self._clock = clock
        self._on_event = on_event
        self._notify = notify
        self._log = log
        self._monitor: QmpConnection | None = None
        self.reset()

    def reset(self) -> None:
        """Another QEMU, or none: forget what was told. The connection was closed before."""
        self.run_state: str | None = None
        self.connect_at = 0.0
        self.probe_at = 0.0
        self._raised_at = -math.inf
        self.silent_since: float | None = None
        self.argv: Sequence[str] = ()
        self._answered = False

    @property
    def answered(self) -> bool:
        """Whether QEMU has answered a command on the present connection."""
        return self._monitor is not None and self._answered

    # --- the connection ---------------------------------------------------------------------------------------

    async def open(self, uuid: str | None) -> bool:
        """Connect, if there is no connection; False when that failed, and is to be tried again at `connect_at`.

        Args:
            uuid: of the machine that has to answer; None where that is certain.
        """
        if self._monitor is not None:
            return True
        self._answered = False
        try:
            self._monitor = await self._connect(
                str(self._socket), on_event=self._on_event, on_lost=self._on_lost, timeout_s=ANSWER_S
            )
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
        """Law 8: who answers at the socket of a process that was found is the machine that was started.

        Raises:
            MonitorLost: another machine does; the connection is closed.
        """
        answer = await self.command("query-uuid")
        if answer is not None and answer["UUID"] != expected:
            await self.close()
            raise MonitorLost(f"machine {answer['UUID']} answers on {self._socket}, this is {expected}")

    def retry(self) -> None:
        """Nothing was answered: try again after a pause."""
        self.connect_at = self._clock.now() + RECONNECT_S

    async def drained(self) -> None:
        """Wait until the last event of a QEMU that has ended was heard, at most `DRAIN_S`."""
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
        if answer is not None:
            self.run_state = str(answer["status"])
            self.probe_at = on_a_beat(self._clock.now() + PROBE_EVERY_S)

    async def command(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a QMP command; None when it was not done, which is on record then."""
        try:
            return await self.ask(command, arguments)
        except MonitorRefused as error:
            self._log.warning("qmp.refused", command=command, error=str(error))
            return None

    async def ask(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a QMP command; None when there was no answer, which is on record then.

        Raises:
            MonitorRefused: QEMU's answer is no.
        """
        monitor = self._monitor
        if monitor is None:
            return None
        try:
            answer = await monitor.execute(command, arguments, timeout_s=ANSWER_S)
        except MonitorSilent as error:
            self._fell_silent(error)
            return None
        except MonitorLost:
            # Not before its end was told: the loop would ask again at once, and starve whoever is to tell it.
            await monitor.drained(DRAIN_S)
            return None
        except MonitorRefused as error:
            self._heard()
            raise MonitorRefused(cleaned(str(error), secrets_in(self.argv))) from None
        self._heard()
        return answer

    # --- what is heard ----------------------------------------------------------------------------------------

    def hears(self, event: str, data: Mapping[str, Any]) -> bool:
        """Take note of what an event says of the run state; False when a decision does not depend on it."""
        match event:
            case "RESUME":
                self.run_state = RUNNING
            case "GUEST_PANICKED" if data.get("action") != "run":
                self.run_state = PANICKED
            case "STOP" if self.run_state == PANICKED:
                # It is ending. QEMU 7.2 has been seen to hang when it was asked for its state just then.
                return False
            case "STOP" | "SUSPEND" | "WAKEUP":
                self._raise_question()
            case _:
                return False
        return True

    def _raise_question(self) -> None:
        """Have QEMU asked at once, or, where it was just now, a little later."""
        now = self._clock.now()
        if now >= self._raised_at + PROBE_GAP_S:
            self._raised_at, self.probe_at = now, 0.0
        elif now >= self._raised_at:
            self._raised_at += PROBE_GAP_S
            self.probe_at = min(self.probe_at, self._raised_at)

    def _heard(self) -> None:
        self._answered = True
        self.silent_since = None

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
