"""What `ping` says, counted: which requests were answered, and how long there was no answer. Pure, but for `Pinger`."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

EVERY_S = 0.2
"""Between two requests: short enough for a live move to be seen."""

GRACE = 5
"""So many newest requests are not called lost: their answers may be under way. A second; one takes a millisecond."""

_ANSWER = re.compile(r"\d+ bytes from .*icmp_seq=(\d+)")
_NO_ANSWER = re.compile(r"(?:no answer yet for|From .*) icmp_seq=(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The requests of one scene.

    Attributes:
        sent: how many, without those whose answer may be under way.
        lost: how many of them were never answered.
        gap_s: the longest time between two answers, in seconds; one that lasts counts.
    """

    sent: int
    lost: int
    gap_s: float


class Pings:
    """All that `ping` has said, from the first answer on: what went before is no loss."""

    def __init__(self) -> None:
        self._answers: list[tuple[float, int]] = []
        self._answered: set[int] = set()
        self._first = 0
        self._last = 0

    def hear(self, line: str, at: float) -> None:
        """Take a line.

        Args:
            line: as `ping -O` prints it.
            at: when, in seconds of a clock that only goes on.
        """
        if found := _ANSWER.match(line):
            seq = int(found[1])
            self._first = self._first or seq
            if seq not in self._answered:  # a duplicate is no second answer
                self._answered.add(seq)
                self._answers.append((at, seq))
        elif found := _NO_ANSWER.match(line):
            seq = int(found[1])
        else:
            return
        self._last = max(self._last, seq)

    @property
    def answers(self) -> int:
        """How many requests were answered."""
        return len(self._answered)

    @property
    def newest(self) -> int:
        """The number of the newest request that is known of."""
        return self._last

    def answered_since(self, seq: int) -> bool:
        """Whether a request behind the one with this number was answered."""
        return bool(self._answers) and self._answers[-1][1] > seq

    def silent_s(self, now: float) -> float:
        """Since the last answer; 0 before the first."""
        return now - self._answers[-1][0] if self._answers else 0.0

    def marks(self, most: int) -> str:
        """The last requests, at most so many: `|` was answered, `x` was not, `.` is not answered yet."""
        if not self._first:
            return ""
        seqs = range(max(self._first, self._last - most + 1), self._last + 1)
        return "".join(self._mark(seq) for seq in seqs)

    def _mark(self, seq: int) -> str:
        if seq in self._answered:
            return "|"
        return "." if seq > self._last - GRACE else "x"

    def tally(self, now: float, *, since: int = 0) -> Tally:
        """Count the requests behind the one with this number."""
        if not self._first:
            return Tally(sent=0, lost=0, gap_s=0.0)
        settled = range(max(self._first, since + 1), self._last - GRACE + 1)
        newest = range(max(settled.start, settled.stop), self._last + 1)
        lost = sum(seq not in self._answered for seq in settled)
        # What was answered among the newest counts as sent, too.
        sent = len(settled) + sum(seq in self._answered for seq in newest)
        silent = self._last > since and self._last not in self._answered
        return Tally(sent=sent, lost=lost, gap_s=self._gap(since, now if silent else None))

    def _gap(self, since: int, now: float | None) -> float:
        """The longest pause that ends behind that request; one that lasts until `now` counts where there is one."""
        first = next((index for index, (_, seq) in enumerate(self._answers) if seq > since), len(self._answers))
        times = [at for at, _ in self._answers[max(0, first - 1) :]]
        if now is not None:
            times.append(now)
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


class Pinger:
    """`ping` as it runs; `pinging` makes it."""

    def __init__(self) -> None:
        self.pings = Pings()
        self.ended = False

    def read(self, process: subprocess.Popen[str]) -> None:
        """Take its lines until it ends."""
        assert process.stdout is not None
        for line in process.stdout:
            self.pings.hear(line, time.monotonic())
        self.ended = True


@contextmanager
def pinging(address: str, around: Sequence[str] = ()) -> Iterator[Pinger]:
    """Ping an address, until the end.

    Args:
        address: IPv4.
        around: words before the command, to run it in another network.
    """
    argv = [*around, "ping", "-n", "-O", "-i", f"{EVERY_S:g}", address]
    pinger = Pinger()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        reader = threading.Thread(target=pinger.read, args=(process,), daemon=True)
        reader.start()
        try:
            yield pinger
        finally:
            process.kill()
            reader.join(1.0)
