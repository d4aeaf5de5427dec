"""The arithmetic of waiting."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.timing import (
    BEAT_S,
    REMIND_EVERY_S,
    RESTART_CAP_S,
    RETRY_CAP_S,
    Reminder,
    Rival,
    SessionTimer,
    on_a_beat,
    restart_delay,
    retry_delay,
)

BELOW_ONE = math.nextafter(1.0, 0.0)


@pytest.mark.parametrize(
    ("attempt", "ceiling"), [(0, 0), (1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (11, 300), (10**9, 300)]
)
def test_restart_ceiling_doubles_from_one_second_to_five_minutes(attempt: int, ceiling: float) -> None:
    """The first restart is immediate; then full jitter below 1 s, 2 s, 4 s … 300 s."""
    assert restart_delay(attempt, 0.0) == 0.0
    assert restart_delay(attempt, 0.5) == ceiling / 2
    assert restart_delay(attempt, BELOW_ONE) <= ceiling


@given(st.integers(min_value=-5, max_value=10**6), st.floats(0, BELOW_ONE))
def test_delays_stay_within_their_bounds(attempt: int, random01: float) -> None:
    """No number of failures makes a delay overflow; a retry never comes at once."""
    assert 0 <= restart_delay(attempt, random01) <= RESTART_CAP_S
    assert 0.1 <= retry_delay(attempt, random01) <= RETRY_CAP_S
    assert 0.05 <= retry_delay(attempt, random01, cap_s=0.1) <= 0.1


def test_session_counts_from_when_the_renewal_was_sent() -> None:
    """Law 1: held until sent + TTL, that instant excluded; renewed a fifth of the TTL after."""
    timer = SessionTimer(ttl_s=15, confirmed_at=100.0)
    assert timer.deadline == 115.0
    assert timer.held(114.999)
    assert not timer.held(115.0)
    assert timer.remaining(105.0) == 10.0
    assert timer.remaining(200.0) == 0.0
    assert timer.next_renewal(100.5) == 103.0
    assert timer.next_renewal(110.0) == 110.0


def test_a_session_never_confirmed_is_not_held() -> None:
    """Without a confirmation nothing is held, and a renewal is due at once."""
    timer = SessionTimer(ttl_s=15)
    assert not timer.held(0.0)
    assert timer.remaining(0.0) == 0.0
    assert timer.next_renewal(7.0) == 7.0


def test_a_lasting_trouble_is_told_once_a_minute() -> None:
    """Told when it is new or another one, then once per minute."""
    first = Reminder().tell("away", 0.0)
    assert first is not None
    assert first.tell("away", REMIND_EVERY_S - 0.1) is None
    assert first.tell("away", REMIND_EVERY_S) is not None
    assert first.tell("denied", 0.1) == Reminder("denied", 0.1)


def observe(*seen: tuple[float, int, int, int]) -> Rival:
    rival: Rival | None = None
    for now, lease, mod_revision, ttl_s in seen:
        rival = Rival.seen(rival, lease=lease, mod_revision=mod_revision, ttl_s=ttl_s, now=now)
    assert rival is not None
    return rival


def test_a_lease_that_runs_down_shows_no_life() -> None:
    """A dead holder is never taken for a living one, nor after one extension by a new etcd leader."""
    assert observe(*((float(t), 7, 50, 14 - t) for t in range(15))).signs == 0
    extended = observe((0, 7, 50, 9), (1, 7, 50, 8), (2, 7, 50, 15), *((2.0 + t, 7, 50, 15 - t) for t in range(16)))
    assert extended.signs == 1
    assert not extended.alive


def test_a_lease_that_rises_twice_is_alive() -> None:
    """Renewals give a living holder away."""
    assert observe((0, 7, 50, 12), (1, 7, 50, 14), (2, 7, 50, 13), (3, 7, 50, 12), (4, 7, 50, 14)).alive


def test_a_lease_looked_at_just_after_each_renewal_is_alive_too() -> None:
    """A TTL that never falls between looks cannot hide that the lease outlives what it had."""
    assert observe(*((3.0 * t, 7, 50, 14) for t in range(15))).alive


def test_a_key_rewritten_or_on_another_lease_is_a_sign_of_life() -> None:
    """Somebody must have done that."""
    assert observe((0, 7, 50, 14), (1, 7, 51, 13), (2, 8, 52, 12)).alive


@given(st.floats(0, 1e9))
def test_a_beat_is_sooner_and_not_by_much(instant: float) -> None:
    """What is done on a beat is never late, and what is due within one beat falls together."""
    beat = on_a_beat(instant)
    assert instant - BEAT_S < beat <= instant
    assert on_a_beat(beat) == beat
    assert {on_a_beat(number * BEAT_S + BEAT_S / 2) for number in (7, 8)} == {7 * BEAT_S, 8 * BEAT_S}
