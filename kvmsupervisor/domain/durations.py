"""How long many things of one kind took."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""From what etcd takes on the same machine to the time limit of a request."""


@dataclass(slots=True)
class Durations:
    """Counts by how long it took.

    Attributes:
        bounds: upper bounds of the counts, seconds.
        counts: how many took that long and longer than the bound before, and at last those beyond all.
        total_s: of all of them.
        failed: how many came to nothing; they are among the counts.
    """

    bounds: tuple[float, ...] = BOUNDS_S
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0
    failed: int = 0

    def took(self, seconds: float, *, failed: bool = False) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds
        self.failed += failed
