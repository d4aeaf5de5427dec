"""For how long a machine did not write, and how often it was started again, as its disk shows it.

A look may come late itself, on a machine that does other things too. So each figure says for how long nobody looked:
what a machine did then is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at a disk.

    Attributes:
        seen: when, seconds of the test's CLOCK_BOOTTIME.
        owner: of the newest record; empty while there was none.
        sequence: of that record; 0 while there was none.
    """

    seen: float
    owner: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Downtime:
    """What an interval was like for one machine.

    Attributes:
        away_s: the longest time in which no new record came, as far as it lies in the interval.
        began: when that began.
        restarts: how often another owner went on. A machine's first start is none.
        blind_s: the longest time in which nobody looked. `away_s` may be too long by that, not more.
    """

    away_s: float
    began: float
    restarts: int
    blind_s: float

    def within(self, bound_s: float) -> bool:
        """Whether the machine may have been away for no longer than `bound_s`."""
        return self.away_s - self.blind_s <= bound_s


def downtime(samples: Iterable[Sample], since: float, until: float) -> Downtime:
    """What the samples tell of the time between two instants.

    A machine that wrote nothing at all was away from the beginning to the end.
    """
    looks = sorted(samples, key=lambda sample: sample.seen)
    inside = [look for look in looks if since <= look.seen <= until]
    times = [since, *(look.seen for look in _advances(looks) if since < look.seen < until), until]
    away_s, began = max(((later - earlier, earlier) for earlier, later in pairwise(times)), default=(0.0, since))
    blind = pairwise([since, *(look.seen for look in inside), until])
    return Downtime(
        away_s=away_s,
        began=began,
        restarts=sum(later.owner != earlier.owner for earlier, later in pairwise(_writing(looks, since, until))),
        blind_s=max((later - earlier for earlier, later in blind), default=0.0),
    )


def _advances(looks: Sequence[Sample]) -> list[Sample]:
    """Those that saw a new record."""
    return [later for earlier, later in pairwise(looks) if later.sequence > earlier.sequence]


def _writing(looks: Sequence[Sample], since: float, until: float) -> list[Sample]:
    """The looks of the interval at a disk on which there is a record, and the one before them."""
    before = [look for look in looks if look.seen < since and look.sequence][-1:]
    return [*before, *(look for look in looks if since <= look.seen <= until and look.sequence)]
