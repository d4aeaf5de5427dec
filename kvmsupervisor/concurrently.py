"""Several things done at once, where the first failure is the failure of all.

Not `asyncio.TaskGroup`: in Python 3.11.2, which Debian 12 has, a task that has seen a group fail takes its next
`asyncio.timeout` for a cancellation of its own, and ends. A command can live with that; an instance's loop would stand
still.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
One = TypeVar("One")
Other = TypeVar("Other")


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
            task.cancel()
        await asyncio.wait(tasks)


async def both(one: Coroutine[Any, Any, One], other: Coroutine[Any, Any, Other]) -> tuple[One, Other]:
    """The same for two of different kinds."""
    steps: list[Coroutine[Any, Any, Any]] = [one, other]
    first, second = await all_of(steps)
    return first, second
