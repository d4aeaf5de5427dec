"""Waits for a descriptor, whatever its number: select() takes none beyond 1023."""

from __future__ import annotations

import select


def readable(descriptor: int, timeout_s: float | None = None) -> bool:
    """Wait until there is something to be read, or its other side is gone; False when there is nothing in time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
