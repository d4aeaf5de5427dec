"""The life of a container in single mode: what it is told, when it ends, and what it exits with."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import structlog

from kvmsupervisor.domain.decision import Decision
from kvmsupervisor.domain.exits import Exit, ExitClass, WaitStatus
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.view import IN_SERVICE, Clearing, Haste, View

log = structlog.get_logger(__name__)


class NotHere(Exception):
    """Nothing is run here. The message says why; whoever started the container may try again."""


def exit_status(status: WaitStatus) -> int:
    """As shells have it: the exit code, or 128 and the signal's number; 1 when nobody knows."""
    if status.signal is not None:
        return 128 + status.signal
    return 1 if status.code is None else status.code


class ContainersLife:
    """A container's life, which ends with its QEMU's. Implements `instance.context.Life`.

    Args:
        name: of the instance, for the log; None where there is none.
        on_decided: told what was seen and decided, at every turn.

    Attributes:
        left: set once the container is to end.
    """

    def __init__(
        self, name: str | None, on_decided: Callable[[View, Decision], None] = lambda view, decision: None
    ) -> None:
        self.left = asyncio.Event()
        self._name = name
        self._on_decided = on_decided
        self._why: str | None = None
        self._haste = Haste.NONE
        self._told: signal.Signals | None = None
        self._refused: str | None = None
        self._status: int | None = None
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the container is told to end, or to make haste."""
        self._listeners.append(listener)

    # --- what it is told --------------------------------------------------------------------------------------

    def signalled(self, number: signal.Signals) -> None:
        """Shut the guest down; a second signal ends QEMU without its guest's consent, a third kills it."""
        if self._told is not None:
            self._haste = Haste(min(self._haste + 1, Haste.KILL))
        self._told = self._told or number
        self.go(f"its container was told to stop ({number.name})")

    def refuse(self, why: str) -> None:
        """End, if no QEMU was there yet, and say why."""
        self._refused = self._refused or why
        self.go(why)

    def go(self, why: str) -> None:
        """Stop what runs, and let go of it."""
        if self._why is None:
            self._why = why
            log.info("single.leaving", **({} if self._name is None else {"instance": self._name}), reason=why)
        self.left.set()
        for listener in self._listeners:
            listener()

    # --- as instances see it ----------------------------------------------------------------------------------

    def leaving(self) -> str | None:
        """Why an instance is to be stopped and let go of; None when it is not."""
        return self._why

    def haste(self) -> Haste:
        """In what a hurry that is."""
        return self._haste

    def clearing(self, instance: InstanceId) -> Clearing:
        """A container is no host that drains."""
        return IN_SERVICE

    def decided(self, view: View, decision: Decision) -> None:
        """Be told what was seen and decided."""
        self._on_decided(view, decision)

    def ended(self, end: Exit, status: WaitStatus) -> None:
        """QEMU has ended, whether it was asked to or not: so does the container."""
        self._status = exit_status(status)
        if status == WaitStatus() and end.kind is ExitClass.FAILED:
            self._refused = f"QEMU {end.text}"
        self.go(f"its QEMU {end.text}")

    # --- the end ----------------------------------------------------------------------------------------------

    def outcome(self) -> int | None:
        """What to exit with: QEMU's status, or 128 and the signal that came before QEMU; None when nothing says so.

        Raises:
            NotHere: there was no QEMU, or it could not be started at all.
        """
        if self._status is not None and self._refused is None:
            return self._status
        if self._told is not None and self._refused is None:
            return 128 + self._told
        if self._refused is not None:
            raise NotHere(self._refused)
        return None
