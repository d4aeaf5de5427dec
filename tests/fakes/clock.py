"""Virtual time: a clock that stands still until a test moves it.

    clock = FakeClock()
    task = asyncio.create_task(something(clock))
    await clock.advance(3.0)                       # all that falls due meanwhile happens, in order
    await clock.advance_until(lambda: done, 60.0)  # the same, until it is so, at most 60 virtual seconds

Nothing sleeps in real time. Between two wake-ups the loop runs until no task is ready (`settle`), so
each sleeper sees the world as those before it left it, with `now()` at exactly its own instant. Only
tasks that wait for each other or for this clock are covered: what waits for a real socket, process,
thread or `asyncio.sleep(x > 0)` is not "ready" and is not waited for.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from kvmsupervisor.adapters.clock import Clock

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
SETTLE_LIMIT = 100_000


class Timer:
    """What `FakeClock.call_at` returns: `cancel` it when it is no longer wanted."""

    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeClock(Clock):
    """A `Clock` whose time is moved by `advance`."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._order = itertools.count()
        self._timers: list[tuple[float, int, Timer]] = []

    # What the program uses.

    def now(self) -> float:
        return self._now

    def wall(self) -> str:
        return (EPOCH + timedelta(seconds=self._now)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def wall_after(self, seconds: float) -> str:
        return (EPOCH + timedelta(seconds=self._now + seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")

    async def sleep_until(self, instant: float) -> None:
        if instant <= self._now:
            await asyncio.sleep(0)
            return
        await self.wait(asyncio.Event(), instant)

    async def wait(self, event: asyncio.Event, until: float | None = None) -> bool:
        if event.is_set():
            return True
        if until is None:
            return await event.wait()
        if until <= self._now:
            return False
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                timer = self.call_at(until, lambda: limit.reschedule(loop.time()))
                try:
                    return await event.wait()
                finally:
                    timer.cancel()
        except TimeoutError:
            return False

    # What tests and other fakes use.

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` when virtual time reaches `when` (for fakes, such as a lease that runs out)."""
        timer = Timer(when, callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Move time on by `seconds`, stopping at every timer on the way, in order."""
        target = self._now + seconds
        await settle()
        while self._step(target):
            await settle()
        self._now = target

    async def advance_until(self, true: Callable[[], object], limit_s: float) -> None:
        """Move time on, timer by timer, until `true()` holds; fail after `limit_s` virtual seconds."""
        target = self._now + limit_s
        await settle()
        while not true():
            if not self._step(target):
                raise AssertionError(f"still not so after {limit_s} virtual seconds")
            await settle()

    def jump(self, seconds: float) -> None:
        """Move time on at once, waking nobody: what a frozen process or a suspended machine sees.

        Timers that fell due meanwhile fire at the next `advance` (also `advance(0)`).
        """
        self._now += seconds

    def _step(self, target: float) -> bool:
        """Fire the next timer that is due by `target`; False when there is none."""
        while self._timers and self._timers[0][0] <= target:
            when, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                self._now = max(self._now, when)
                timer.callback()
                return True
        return False


async def settle() -> None:
    """Let the loop run until no task is ready."""
    loop: Any = asyncio.get_running_loop()
    for _ in range(SETTLE_LIMIT):
        await asyncio.sleep(0)
        # The queue of callbacks that will run in this or the next turn of the loop; this task itself
        # is not in it while it runs. asyncio offers no public way to ask.
        if not loop._ready:
            return
    raise AssertionError("the loop does not come to rest: something spins without waiting")
