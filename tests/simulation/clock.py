"""One host's clock in virtual time: the production clock, on the loop's time."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from kvmsupervisor.adapters.clock import Clock

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class SimClock(Clock):
    """`CLOCK_BOOTTIME` of a host that booted `since_s` before the loop's time 0.

    Everything that waits is production's: it waits by asyncio, whose time is virtual.

    Attributes:
        skew_s: how wrong the time of day is.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, since_s: float = 0.0, hardware: contextvars.Context | None = None
    ) -> None:
        self._loop = loop
        self._since_s = since_s
        self._hardware = hardware
        self.skew_s = 0.0

    def now(self) -> float:
        return self._loop.time() + self._since_s

    def wall(self) -> str:
        return self.wall_after(0.0)

    def wall_after(self, seconds: float) -> str:
        elapsed = self._loop.time() + self.skew_s + seconds
        return (EPOCH + timedelta(seconds=elapsed)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def call_at(self, when: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """What the host's hardware does at an instant, whatever becomes of who asked for it."""
        return self._loop.call_at(when - self._since_s, callback, context=self._hardware)
