"""Rate limit for repeated events in the log: the first few one by one, then how many more there were.

Rare events are logged one by one. A flood is logged when it begins, and once a minute with its count.
"""

from __future__ import annotations

EVERY_S = 60.0
"""How often a flood is logged. A person who follows the log reads one line a minute of it."""


class Sparing:
    """One kind of event of one instance.

    Args:
        burst: how many are logged one by one in each `EVERY_S`.
    """

    def __init__(self, burst: int = 1) -> None:
        self._burst = burst
        self._until = 0.0
        self._told = 0
        self._untold = 0

    def note(self, now: float) -> int | None:
        """Count one event. None: do not log it; else log it, with the number of those before that were not logged."""
        if now >= self._until:
            self._until, self._told = now + EVERY_S, 0
        if self._told >= self._burst:
            self._untold += 1
            return None
        self._told += 1
        untold, self._untold = self._untold, 0
        return untold

    def rest(self, now: float) -> int:
        """How many were not logged, once it is time to log their number although no more came; else 0."""
        if now < self._until or not self._untold:
            return 0
        untold, self._untold = self._untold, 0
        return untold
