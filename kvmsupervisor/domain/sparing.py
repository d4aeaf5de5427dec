"""Telling people of what happens over and over: the first few times at once, then how many more there were.

Rare things are told one by one. Of a flood is told that it began, and once a minute how much of it there was.
"""

from __future__ import annotations

EVERY_S = 60.0
"""How often a flood is told of. A person who follows the log reads one line a minute of it."""


class Sparing:
    """One kind of event of one instance.

    Args:
        burst: how many are told one by one in each `EVERY_S`.
    """

    def __init__(self, burst: int = 1) -> None:
        self._burst = burst
        self._until = 0.0
        self._told = 0
        self._untold = 0

    def note(self, now: float) -> int | None:
        """Count one. None: it is not told; otherwise it is, with the number of those before it that were not."""
        if now >= self._until:
            self._until, self._told = now + EVERY_S, 0
        if self._told >= self._burst:
            self._untold += 1
            return None
        self._told += 1
        untold, self._untold = self._untold, 0
        return untold

    def rest(self, now: float) -> int:
        """How many were not told, once it is time to tell of them although there are no more; 0 otherwise."""
        if now < self._until or not self._untold:
            return 0
        untold, self._untold = self._untold, 0
        return untold
