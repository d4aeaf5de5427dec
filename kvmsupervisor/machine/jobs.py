"""Work that takes minutes and that several may wait for: it is done once, in the background, and asked how far it is.

An instance's loop must go on meanwhile, so it never waits for such work: it asks, is told `Underway`, and asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from kvmsupervisor.machine.images import DiskTrouble

T = TypeVar("T")

Say = Callable[[str], None]
"""Is told how far a piece of work is, as a clause."""

ASK_AGAIN_S = 1.0
"""Pause before it is asked again how far work is that goes on: how late its end is noticed."""

FAILED_S = 10.0
"""How long a failure is the answer, before the work is begun anew. Arbitrary; who mends it should not wait long."""


class Hopeless(DiskTrouble):
    """It failed, and would fail again unless something is changed: it is not tried again for a while.

    Attributes:
        hold_s: for how long.
    """

    hold_s = 600.0


class Underway(DiskTrouble):
    """It is being done. The message says how far it is."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, ASK_AGAIN_S)


class _Job:
    """One piece of work.

    Attributes:
        said: how far it is; until it says anything, why it failed before: what people read must not change at each try.
    """

    def __init__(self, work: Callable[[Say], Awaitable[Any]], said: str) -> None:
        self.said = said
        self.ended_at = 0.0
        self.hearers: list[Say] = []
        self.task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(self._run(work))
        # Perhaps nobody asks for it any more: then its failure is told to nobody.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _run(self, work: Callable[[Say], Awaitable[Any]]) -> Any:
        try:
            return await work(self.say)
        finally:
            self.ended_at = asyncio.get_running_loop().time()

    @property
    def has_failed(self) -> bool:
        """Whether it ended, and came to nothing."""
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)

    def is_over(self, now: float) -> bool:
        """Whether it has failed so long ago that it is to be begun anew. What went well waits to be told, once."""
        if not self.has_failed:
            return False
        hold_s: float = FAILED_S if self.task.cancelled() else getattr(self.task.exception(), "hold_s", FAILED_S)
        return now >= self.ended_at + hold_s

    @property
    def trouble(self) -> str | None:
        """Why it failed, None where it did not, or was cancelled."""
        return str(self.task.exception()) if self.has_failed and not self.task.cancelled() else None

    def say(self, said: str) -> None:
        self.said = said
        for hearer in self.hearers:
            hearer(said)


class Jobs:
    """The work of one host, by name."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}

    def ask(self, name: str, work: Callable[[Say], Awaitable[T]]) -> T:
        """What the work of that name came to. It is begun where it is not being done, and forgotten once it is told.

        Raises:
            Underway: it is being done.
            DiskTrouble: it failed; also what else `work` raises.
        """
        job = self._job(name, work)
        if not job.task.done():
            raise Underway(job.said)
        if not job.has_failed:
            del self._jobs[name]
        result: T = job.task.result()
        return result

    def wait_for(self, name: str | None) -> None:
        """Wait for the work of that name, where it is being done.

        Raises:
            Underway: it is.
        """
        job = None if name is None else self._jobs.get(name)
        if job is not None and not job.task.done():
            raise Underway(job.said)

    def begin(self, name: str, work: Callable[[Say], Awaitable[None]]) -> None:
        """Begin work that nobody asks for, unless it is being done."""
        if name not in self._jobs:
            self._job(name, work).task.add_done_callback(lambda _: self._jobs.pop(name, None))

    async def join(self, name: str, work: Callable[[Say], Awaitable[T]], say: Say) -> T:
        """The same for work that is part of other work: waits for it, and passes on how far it is.

        Raises:
            DiskTrouble: it failed; also what else `work` raises.
        """
        job = self._job(name, work)
        job.hearers.append(say)
        try:
            # Others may wait for it, too: it goes on when this one is cancelled.
            result: T = await asyncio.shield(job.task)
        finally:
            job.hearers.remove(say)
        if self._jobs.get(name) is job:
            del self._jobs[name]
        return result

    def _job(self, name: str, work: Callable[[Say], Awaitable[Any]]) -> _Job:
        job = self._jobs.get(name)
        now = asyncio.get_running_loop().time()
        if job is None or job.is_over(now):
            before = None if job is None else job.trouble
            job = self._jobs[name] = _Job(work, before or "begins")
        return job

    async def close(self) -> None:
        """End all of it. What was half done is gone on with by a successor, or begun anew."""
        tasks = [job.task for job in self._jobs.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._jobs.clear()
