"""Arithmetic of waiting: backoff, the session's deadline, and how often a lasting trouble is logged.

All instants are seconds of `CLOCK_BOOTTIME`, handed in by the caller; all randomness too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from kvmsupervisor.domain.frozen import frozen

RESET_AFTER_S = 600.0
"""A machine that ran this long has recovered: its next restart is the first again."""

RESTART_FIRST_S = 1.0
RESTART_CAP_S = 300.0
"""The ceiling of the restart delay grows from 1 s to 5 min."""

BEAT_S = 5.0
"""What is due within so many seconds, and can be done a little sooner, is done together. A processor that is woken once
for ten guests does less than one that is woken ten times. Arbitrary: with a hundred guests eight fall together."""

RETRY_FIRST_S = 0.2
"""First delay before etcd is asked again. Arbitrary: well above a round trip, far below a session's TTL."""

RETRY_CAP_S = 5.0
"""Longest delay before etcd is asked again: how late its return is noticed. Arbitrary; cheap for etcd."""

RENEWALS_PER_TTL = 5
"""Law 1: four renewals may fail before the session is lost."""

REMIND_EVERY_S = 60.0
"""How often a lasting trouble is logged again. Arbitrary: it is in any log excerpt, and floods none."""


def on_a_beat(instant: float) -> float:
    """The last beat that is not behind `instant`: for what may be done sooner by `BEAT_S`. CLOCK_BOOTTIME, both."""
    return instant - instant % BEAT_S


def _ceiling(attempt: int, first_s: float, cap_s: float) -> float:
    # ldexp overflows near 2**1024, so the exponent stops growing long after the cap has been reached.
    return min(cap_s, math.ldexp(first_s, min(attempt - 1, 64)))


def restart_delay(attempt: int, random01: float) -> float:
    """Seconds to wait before a machine that ended by itself is started again.

    Full jitter: uniform below a ceiling that doubles, so that machines which died together do not
    come back together (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        attempt: restarts made since the machine last ran for `RESET_AFTER_S`; after 0 of them the delay is 0.
        random01: a random number, 0 ≤ x < 1.
    """
    return random01 * _ceiling(attempt, RESTART_FIRST_S, RESTART_CAP_S) if attempt > 0 else 0.0


def retry_delay(attempt: int, random01: float, cap_s: float = RETRY_CAP_S) -> float:
    """Seconds to wait before a failed request is sent again: between half a doubling ceiling and all of it.

    Never 0, unlike `restart_delay`: that would be a busy loop.

    Args:
        attempt: failures in a row, from 1.
        random01: a random number, 0 ≤ x < 1.
        cap_s: where the ceiling stops growing.
    """
    return (0.5 + random01 / 2) * _ceiling(max(attempt, 1), min(RETRY_FIRST_S, cap_s), cap_s)


@frozen(kw_only=True)
class SessionTimer:
    """How long a session is certainly held, as far as its own host can know.

    etcd counts the TTL from the instant when it handled the renewal. Counting from before the request
    left ends earlier, never later, however long the reply took or this process slept.

    Attributes:
        ttl_s: TTL of the lease after a renewal.
        confirmed_at: when the last confirmed renewal was *sent*; minus infinity when there is none.
    """

    ttl_s: float
    confirmed_at: float = -math.inf

    @property
    def deadline(self) -> float:
        """The instant from which the session counts as lost."""
        return self.confirmed_at + self.ttl_s

    def remaining(self, now: float) -> float:
        """Seconds for which the session is still held; 0 when it is not."""
        return max(0.0, self.deadline - now)

    def held(self, now: float) -> bool:
        """Whether the session is held at `now`."""
        return now < self.confirmed_at + self.ttl_s

    def next_renewal(self, now: float) -> float:
        """When to send the next renewal: a fifth of the TTL after the last one, or at once."""
        return max(now, self.confirmed_at + self.ttl_s / RENEWALS_PER_TTL)


@frozen
class Reminder:
    """Decides when a lasting trouble is logged: when its kind changes, and then once per `REMIND_EVERY_S`.

    Attributes:
        kind: of the trouble that was logged last; empty for none.
        told_at: when that was.
    """

    kind: str = ""
    told_at: float = -math.inf

    def tell(self, kind: str, now: float) -> Reminder | None:
        """The reminder to keep when `kind` is to be logged now, or None when it is not."""
        if kind == self.kind and now < self.told_at + REMIND_EVERY_S:
            return None
        return Reminder(kind, now)


@frozen(kw_only=True)
class Rival:
    """Observations of a session key that is not ours: is its holder alive?

    A dead holder's lease only ever runs down. A single rise proves nothing: etcd itself extends leases when
    its leader changes, and a renewal may have been on its way when the holder died. Two of them in one wait
    mean a living holder.

    Attributes:
        lease: of the key.
        mod_revision: of the key.
        ttl_s: remaining TTL of the lease, as etcd last said.
        due: when the key must be gone unless its holder renews it.
        signs: of life, so far.
    """

    lease: int
    mod_revision: int
    ttl_s: int
    due: float
    signs: int = 0

    SIGNS_WANTED: ClassVar[int] = 2
    GRACE_S: ClassVar[float] = 2.0
    """etcd answers in whole seconds and ends leases twice a second; the rest is for a busy server."""

    @classmethod
    def seen(cls, last: Rival | None, *, lease: int, mod_revision: int, ttl_s: int, now: float) -> Rival:
        """Add one observation, made at `now`, to what was seen before."""
        fresh = cls(lease=lease, mod_revision=mod_revision, ttl_s=ttl_s, due=now + max(ttl_s, 0) + cls.GRACE_S)
        if last is None:
            return fresh
        same = (lease, mod_revision) == (last.lease, last.mod_revision)
        if same and ttl_s <= last.ttl_s and now <= last.due:
            return replace(last, ttl_s=ttl_s)
        return replace(fresh, signs=last.signs + 1)

    @property
    def alive(self) -> bool:
        """Whether its holder certainly lives."""
        return self.signs >= self.SIGNS_WANTED
