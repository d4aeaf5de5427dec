"""Named points between the steps of the laws, at which tests cut a supervisor off, freeze it or let a step fail.

Nothing is switched on in production: `reached` is None there, and a point costs a look at it (30 ns; an action that it
stands beside takes a millisecond).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

reached: Callable[[str], Awaitable[None] | None] | None = None
"""Told of each point that is reached; None in production. What it returns is awaited, where the point can wait."""


async def point(name: str) -> None:
    """A point at which a supervisor may be cut off, frozen, or get an error of etcd's."""
    if reached is not None:
        waits = reached(name)
        if waits is not None:
            await waits


def cut(name: str) -> None:
    """A point between two steps that nothing comes between: a supervisor may only be cut off there."""
    if reached is not None:
        reached(name)
