"""Heartbeats of booted guests, as they reach the console's log: when each came, and how long the pauses were.

A guest that was frozen, or ended, pauses; one that was started again counts from one. Both are seen from outside, by
the test's clock, and inside, by the guest's own uptime, which each heartbeat tells.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

LINE = re.compile(rb"HB (\d+) (\d+\.\d+)\r?\n")
LOOK_S = 0.01


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat: its number, the guest's uptime in it, and when it was seen (CLOCK_MONOTONIC)."""

    number: int
    uptime: float
    seen: float


@dataclass(slots=True)
class _Tail:
    path: Path
    beats: list[Beat]
    offset: int = 0
    rest: bytes = b""

    def read(self, now: float) -> None:
        """Read what has come. The log is the host's file: it is there before, between and after supervisors."""
        try:
            if self.path.stat().st_size <= self.offset:
                return
            with self.path.open("rb") as log:
                log.seek(self.offset)
                data = log.read()
        except FileNotFoundError:
            return
        self.offset += len(data)
        whole, end, self.rest = (self.rest + data).rpartition(b"\n")
        self.beats += [Beat(int(n), float(uptime), now) for n, uptime in LINE.findall(whole + end)]


class Heartbeats:
    """Listens in a thread of its own while it is entered.

    Args:
        logs: console logs by instance; they need not be there yet.
    """

    def __init__(self, logs: Mapping[str, Path]) -> None:
        self._tails = {instance: _Tail(path, []) for instance, path in logs.items()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="heartbeats")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._ended.wait(LOOK_S):
            for tail in self._tails.values():
                tail.read(time.monotonic())

    def beats(self, instance: str) -> list[Beat]:
        """All that this guest has sent."""
        return list(self._tails[instance].beats)

    def all_beat(self, since: float) -> bool:
        """Whether every guest has been heard after `since`."""
        return all(tail.beats and tail.beats[-1].seen > since for tail in self._tails.values())

    def gap(self, since: float, until: float) -> float:
        """The longest time between two heartbeats of one guest, as far as it lies between the two times.

        A guest that is silent at the end has the rest counted, too.
        """
        longest = 0.0
        for instance in self._tails:
            seen = [since, *(beat.seen for beat in self.beats(instance) if since < beat.seen < until), until]
            longest = max(longest, *(later - earlier for earlier, later in pairwise(seen)))
        return longest

    def uptime_gap(self, since: float, until: float) -> float:
        """The same by the guests' own clocks: without the delays of this test, and of whoever wrote the log."""
        longest = 0.0
        for instance in self._tails:
            told = [beat.uptime for beat in self.beats(instance) if since < beat.seen < until]
            longest = max([longest, *(later - earlier for earlier, later in pairwise(told))])
        return longest

    def assert_unbroken(self) -> None:
        """No heartbeat is missing, and no guest began anew."""
        for instance in self._tails:
            numbers = [beat.number for beat in self.beats(instance)]
            assert numbers == list(range(1, len(numbers) + 1)), (instance, numbers)
