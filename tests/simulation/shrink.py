"""Takes away what a violation does not need, so that a person can read what is left."""

from __future__ import annotations

from collections.abc import Callable

Breaks = Callable[[frozenset[int]], bool]
"""Whether the violation is there when only these acts happen."""


def shrink(numbers: frozenset[int], breaks: Breaks) -> frozenset[int]:
    """A smallest set of acts that still breaks the law: no single one of them can be left out.

    By halves first, then one by one (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input").

    Args:
        numbers: of the acts that broke it.
        breaks: tells it of a part of them.
    """
    left = sorted(numbers)
    size = max(1, len(left) // 2)
    while True:
        shorter = False
        begin = 0
        while begin < len(left):
            tried = left[:begin] + left[begin + size :]
            if breaks(frozenset(tried)):
                left, shorter = tried, True
            else:
                begin += size
        if size == 1 and not shorter:
            return frozenset(left)
        size = max(1, size // 2)
