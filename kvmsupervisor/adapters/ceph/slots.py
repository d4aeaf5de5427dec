"""What Ceph's tools of one host share: how many of them work at once, and whether Ceph answered.

Each takes 40 to 60 ms of processor and 40 MB. Fifty machines that start at once would ask two hundred questions in one
instant: with two processors the last answer comes after seconds, and on a host that is busy besides after the deadline
of a call, so that all are asked once more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

HOLD_S = 2.0
"""How long a tool keeps its slot at most. One that works longer waits for the cluster, which costs this host nothing:
while Ceph is away, nobody's question waits for long behind the others."""

LEAST = 4


class Slots:
    """Places for tools of one host.

    Args:
        number: of places; None for two for each processor.
        hold_s: how long one is kept at most.

    Attributes:
        answered: whether Ceph answered the last tool, be it with a refusal; None before the first.
    """

    def __init__(self, number: int | None = None, *, hold_s: float = HOLD_S) -> None:
        self._number = max(LEAST, 2 * len(os.sched_getaffinity(0))) if number is None else number
        self._hold_s = hold_s
        self.answered: bool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._free = asyncio.Semaphore(self._number)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Wait for a place, and have it for the time of the context, or `hold_s`."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # Made before there was a loop, perhaps; and a semaphore is of one loop.
            self._loop, self._free = loop, asyncio.Semaphore(self._number)
        free = self._free
        await free.acquire()
        early = loop.call_later(self._hold_s, free.release)
        try:
            yield
        finally:
            if early.when() > loop.time():
                early.cancel()
                free.release()
