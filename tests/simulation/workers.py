"""Histories played by several processes. One that dies takes no other history with it, and is told of.

`concurrent.futures` gives up all that is left when one of its processes dies, and does not say at what.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

from tests.simulation.run import Played

Plays = Callable[[int], Played]
"""Plays the history of one seed."""

Pipe: TypeAlias = "Connection[Any, Any]"

_FORK = multiprocessing.get_context("fork")
"""What is planted in this process is planted in those that play, too."""

FRESH_AFTER = 1000
"""Histories after which a process is replaced. Arbitrary: whatever they leave behind does not become much."""


@dataclass(frozen=True)
class Lost:
    """A history that was not played to its end.

    Attributes:
        how: what became of it: how its processes ended, or what it raised.
    """

    how: str


class _Worker:
    """One process that plays, a seed at a time.

    Args:
        plays: plays one.
        others: this end of the pipes to those that there are. It must not hold them: they would never hear their ends.
        alone: whether it plays one seed only.

    Attributes:
        seed: that it plays now; None when it waits for one.
        played: those that it has played.
        peak_mib: the most memory that it has had.
    """

    def __init__(self, plays: Plays, others: Collection[Pipe] = (), *, alone: bool = False) -> None:
        self.pipe, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=_work, args=(plays, theirs, (self.pipe, *others)), daemon=True)
        self._process.start()
        theirs.close()
        self.alone = alone
        self.seed: int | None = None
        self.played: list[int] = []
        self.peak_mib = 0

    def give(self, seed: int) -> None:
        self.seed = seed
        self.pipe.send(seed)

    def take(self) -> Played | Lost | None:
        """What came of its seed; None when it has died at that."""
        try:
            self.peak_mib, came = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None
        assert self.seed is not None
        self.played.append(self.seed)
        self.seed = None
        return came  # type: ignore[no-any-return]

    def end(self) -> str:
        """End it; how it has ended, for people."""
        self.pipe.close()
        self._process.join()
        code = self._process.exitcode or 0
        before = f"{len(self.played)} histories before" + (f" (seeds {self.played[0]} …)" if self.played else "")
        said = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        return f"{said}; {before}, {self.peak_mib} MiB at most"


def _work(plays: Plays, pipe: Pipe, others: Collection[Pipe]) -> None:
    for other in others:
        other.close()
    # It is the parent that is interrupted, and then closes its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            seed = pipe.recv()
            try:
                came: Played | Lost = plays(seed)
            except Exception:  # noqa: BLE001 - whatever it is, it is told with its seed
                came = Lost(traceback.format_exc())
            pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, came))
    except (EOFError, ConnectionError):
        # Nothing of what an interpreter does at its end: it would be the parent's.
        os._exit(0)


class _Players:
    """All processes, and what is left for them."""

    def __init__(self, plays: Plays, seeds: Sequence[int], *, tell: Callable[[str], None], fresh_after: int) -> None:
        self.working: list[_Worker] = []
        self.came: dict[int, Played | Lost] = {}
        self._plays = plays
        self._tell = tell
        self._fresh_after = fresh_after
        self._left = list(reversed(seeds))
        # Seeds at which a process died: those that are to be played again, and how it ended.
        self._again: list[int] = []
        self._died: dict[int, str] = {}

    def _start(self, seed: int, *, alone: bool = False) -> None:
        worker = _Worker(self._plays, [one.pipe for one in self.working], alone=alone)
        worker.give(seed)
        self.working.append(worker)

    def give(self, number: int) -> None:
        """Give each of so many processes something to do."""
        for worker in [one for one in self.working if one.seed is None]:
            if worker.alone or len(worker.played) >= self._fresh_after or not self._left:
                self.working.remove(worker)
                worker.end()
            else:
                worker.give(self._left.pop())
        while self._again:
            self._start(self._again.pop(), alone=True)
        while self._left and len(self.working) < number:
            self._start(self._left.pop())

    def take(self) -> None:
        """Wait until one has played, or died."""
        ready = wait([worker.pipe for worker in self.working])
        for worker in [one for one in self.working if one.pipe in ready]:
            seed = worker.seed
            assert seed is not None
            came = worker.take()
            if came is not None:
                self.came[seed] = came
                continue
            self.working.remove(worker)
            how = worker.end()
            self._tell(f"the process that played seed {seed} died: {how}")
            if seed in self._died:
                self.came[seed] = Lost(f"two processes died at it: {self._died[seed]}; and alone: {how}")
            else:
                self._died[seed] = how
                self._again.append(seed)


def play_all(
    plays: Plays,
    seeds: Sequence[int],
    *,
    workers: int,
    tell: Callable[[str], None],
    fresh_after: int = FRESH_AFTER,
) -> Iterator[tuple[int, Played | Lost]]:
    """What came of each seed, in their order.

    A seed at which a process dies is played once more, in a process of its own.

    Args:
        plays: plays one.
        seeds: each once.
        workers: how many processes.
        tell: told of each process that died.
        fresh_after: histories after which a process is replaced.
    """
    players = _Players(plays, seeds, tell=tell, fresh_after=fresh_after)
    try:
        for seed in seeds:
            while seed not in players.came:
                players.give(workers)
                players.take()
            yield seed, players.came.pop(seed)
    finally:
        for worker in players.working:
            worker.end()
