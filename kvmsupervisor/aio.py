"""Several things done at once, where the first failure is the failure of all, and nothing ends in silence.

`all_of` is no `asyncio.TaskGroup`: in Python 3.11.2, which Debian 12 has, a task that has seen a group fail takes its
next `asyncio.timeout` for a cancellation of its own, and ends. A command can live with that; an instance's loop would
stand still.

A group takes a part that was cancelled for one that was told to end. But libraries raise `CancelledError` by
themselves, too: gRPC does when it gives a stream up (`_raise_for_status` in grpc/aio/_call.py). So parts are started by
`start_part`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

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
