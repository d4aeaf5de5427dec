"""A guard in virtual time: what `instance/worker.py` sees of `guard.client.GuardClient`."""

from __future__ import annotations

import json
from pathlib import Path

from kvmsupervisor.guard.client import Unguarded
from tests.fakes.qemu import FakeQemu


class FakeGuard:
    """One guard.

    Attributes:
        trouble: why there is none now; None when there is.
        charges: by incarnation, the note that is to be written.
        released: incarnations that were let go of.
        caught_up_with: how often it was asked to have written down what it did.
    """

    def __init__(self) -> None:
        self.trouble: str | None = None
        self.charges: dict[str, Path] = {}
        self.released: list[str] = []
        self.caught_up_with = 0

    def holds(self, incarnation: str) -> bool:
        return self.trouble is None and incarnation in self.charges

    async def watch(self, incarnation: str, *, pidfd: int, note: Path) -> None:
        if self.trouble is not None:
            raise Unguarded(self.trouble)
        self.charges[incarnation] = note

    async def forget(self, incarnation: str) -> None:
        if self.trouble is not None:
            raise Unguarded(self.trouble)
        self.release(incarnation)

    def release(self, incarnation: str) -> None:
        self.charges.pop(incarnation, None)
        self.released.append(incarnation)

    async def caught_up(self) -> None:
        self.caught_up_with += 1

    def kill(self, qemu: FakeQemu) -> None:
        """As at the deadline: kill, then write."""
        incarnation = qemu.environment["KVMSUPERVISOR_INCARNATION"]
        qemu.crash()
        note = {"version": 1, "incarnation": incarnation, "at": "2026-01-01T00:00:00Z"}
        self.charges[incarnation].write_text(json.dumps(note))
