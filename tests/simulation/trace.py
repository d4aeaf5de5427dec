"""What happened, a line each: what two runs of one seed are compared by."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable

KEPT = 4000
"""Lines that are kept for people. All of them are hashed."""


class Trace:
    """The lines of one history.

    Args:
        time: the virtual time.
        steps: how many steps were taken; what lies between two lines is compared by it.
        hide: what is the same in each history but for its name, as the folder it was played in.
        keep: how many of the last lines are kept; None for all.
    """

    def __init__(
        self, time: Callable[[], float], *, steps: Callable[[], int], hide: str = "", keep: int | None = KEPT
    ) -> None:
        self.lines: deque[str] = deque(maxlen=keep)
        self.count = 0
        self._time = time
        self._steps = steps
        self._hide = hide
        self._hash = hashlib.sha256()

    def add(self, who: object, what: str) -> None:
        line = f"{self._time():10.3f} {who} {what}"
        if self._hide:
            line = line.replace(self._hide, "")
        self._hash.update(f"{self._steps()}{line}".encode())
        self.count += 1
        self.lines.append(line)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()
