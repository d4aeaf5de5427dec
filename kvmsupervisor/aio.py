"""Several things done at once, where the first failure is the failure of all, and nothing ends in silence.

`all_of` is no `asyncio.TaskGroup`: in Python 3.11.2, which Debian 12 has, a task that has seen a group fail takes its
next `asyncio.timeout` for a cancellation of its own, and ends. A command can live with that; an instance's loop would
stand still.

A group takes a part that was cancelled for one that was told to end. But libraries raise `CancelledError` by
themselves, too: gRPC does when it gives a stream up (`_raise_for_status` in grpc/aio/_call.py). So parts are started by
`start_part`.
"""

from __future__ import annotations

import _thread
import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

Part = Callable[[], Coroutine[Any, Any, object]]
"""One part of a group: called once, in a task of its own."""
One = TypeVar("One")
Other = TypeVar("Other")


class StrayCancellation(Exception):
    """What was awaited was cancelled, and nobody had cancelled who awaits it."""


@contextmanager
def no_stray_cancellation() -> Iterator[None]:
    """Let a cancellation through only if somebody asked the present task to end.

    Raises:
        StrayCancellation: nobody did.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise StrayCancellation("cancelled by nobody of ours") from error


def start_part(group: asyncio.TaskGroup, part: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
    """Start one part of a group; a cancellation that nobody asked for is its failure, `StrayCancellation`.

    `part` is called in the new task: a task that is cancelled before its first step leaves no coroutine without an
    `await`, of which Python would warn.
    """
    return group.create_task(_part(part))


async def _part(part: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with no_stray_cancellation():
        return await part()


async def all_of(steps: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all at once; return their results in order.

    When one fails, or this is cancelled, the others are cancelled and waited for; then the first error is raised.
    """
    tasks = [asyncio.ensure_future(step) for step in steps]
    if not tasks:
        return []
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            # When this is cancelled, `gather` has cancelled them all. A second time would cut short what they clean up.
            if not task.cancelling():
                task.cancel()
        await asyncio.wait(tasks)


async def both(one: Coroutine[Any, Any, One], other: Coroutine[Any, Any, Other]) -> tuple[One, Other]:
    """The same for two of different kinds."""
    steps: list[Coroutine[Any, Any, Any]] = [one, other]
    first, second = await all_of(steps)
    return first, second


async def until_one_ends(*steps: Coroutine[Any, Any, object]) -> None:
    """Do all at once until one ends; cancel the others and wait for them. Raise what that one raised, if it failed.

    Of several that end in one turn, the first one that failed is told of.
    """
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task in done:
                task.result()
    finally:
        await ended(*tasks)


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait for their ends, whatever they come to.

    `gather` would do, but returns at once for a task that has ended since Python 3.12, and one turn later before.
    """
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            # Looked at, so that nobody is warned of it.
            task.exception()


class Remembered(Generic[T]):
    """Answers that several ask for: asked once for all that wait, and remembered for a while where it went well.

    Args:
        keep_s: for how long, from when it was asked.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._asked: dict[Hashable, tuple[float, asyncio.Task[T]]] = {}

    async def get(self, key: Hashable, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The answer of that key; `ask` is called where there is none. It goes on when one of those that wait ends."""
        now = asyncio.get_running_loop().time()
        at, task = self._asked.get(key, (0.0, None))
        if task is None or now - at >= self._keep_s:
            task = asyncio.get_running_loop().create_task(ask())
            self._asked[key] = now, task
            task.add_done_callback(lambda task: self._look_at(key, task))
        return await asyncio.shield(task)

    def _look_at(self, key: Hashable, task: asyncio.Task[T]) -> None:
        if (task.cancelled() or task.exception() is not None) and self._asked.get(key, (0.0, None))[1] is task:
            self.forget(key)

    def forget(self, key: Hashable) -> None:
        """Have it asked anew by the next one."""
        self._asked.pop(key, None)


async def end_tool(tool: asyncio.subprocess.Process) -> None:
    """Kill a tool that still works, reap it, and read its pipes to their ends, so that they are closed, too."""
    if tool.returncode is None:
        # It may have ended at this very moment.
        with suppress(ProcessLookupError):
            tool.kill()
        await tool.communicate()


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors in a group, and in the groups within it."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


class _Outcome(Generic[T]):
    """What some work returned or raised; as a context manager it keeps what is raised inside."""

    def __init__(self) -> None:
        self.results: list[T] = []
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self.error = error
        return True


def in_own_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends afterwards, and wait for it; return what it returns, raise what it raises.

    For what Linux has for each thread, such as namespaces. By the lowest layer: `threading` wakes its caller twice.
    """
    outcome = _Outcome[T]()
    done = _thread.allocate_lock()
    done.acquire()

    def run() -> None:
        with outcome:
            outcome.results.append(work())
        done.release()

    _thread.start_new_thread(run, ())
    with done:
        pass
    if outcome.error is not None:
        raise outcome.error
    return outcome.results[0]
