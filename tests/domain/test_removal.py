"""The mass-removal hold: more than half and more than two, within the window, wait for a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.removal import ALWAYS_ALLOWED, MassRemovalHold

WINDOW_S = 10.0


def ids(*numbers: int) -> set[InstanceId]:
    return {InstanceId(str(number)) for number in numbers}


@pytest.mark.parametrize(
    ("removed", "of", "held"),
    [(1, 1, False), (2, 2, False), (3, 3, True), (3, 5, True), (3, 6, False), (4, 7, True), (50, 100, False)],
)
def test_more_than_half_and_more_than_two(removed: int, of: int, held: bool) -> None:
    """Law (§4): so many of so many, in one batch."""
    guard = MassRemovalHold(WINDOW_S)
    gone = ids(*range(removed))
    assert guard.judge(gone, ids(*range(of)), 0.0) == (gone if held else set())
    assert guard.held == (gone if held else set())


def test_one_by_one_within_the_window_counts_together() -> None:
    """Law: a slow loop over `etcdctl del` is noticed too; what went before it was noticed has gone."""
    guard = MassRemovalHold(WINDOW_S)
    assert guard.judge(ids(1), ids(1, 2, 3, 4, 5), 0.0) == set()
    assert guard.judge(ids(2), ids(1, 2, 3, 4, 5), 4.0) == set()
    assert guard.judge(ids(3), ids(2, 3, 4, 5), 9.9) == ids(3)


def test_the_window_forgets() -> None:
    """Law: what went longer ago than the window does not count."""
    guard = MassRemovalHold(WINDOW_S)
    assert guard.judge(ids(1), ids(1, 2, 3, 4, 5), 0.0) == set()
    assert guard.judge(ids(2), ids(2, 3, 4, 5), 1.0) == set()
    assert guard.judge(ids(3), ids(3, 4, 5), 10.0) == set()


def test_one_that_comes_and_goes_counts_once() -> None:
    """Law: three removals of the same instance are one."""
    guard = MassRemovalHold(WINDOW_S)
    for now in (0.0, 1.0, 2.0):
        assert guard.judge(ids(1), ids(1, 2), now) == set()


def test_a_word_or_a_return_ends_the_hold() -> None:
    """Law: what was confirmed, or taken back, is neither held nor held against the next removal."""
    guard = MassRemovalHold(WINDOW_S)
    guard.judge(ids(1, 2, 3), ids(1, 2, 3), 0.0)
    assert guard.release(ids(1, 2, 3, 4)) == ids(1, 2, 3)
    assert guard.held == set()
    assert guard.judge(ids(5), ids(5, 6), 1.0) == set()


@given(st.lists(st.tuples(st.sets(st.integers(0, 9), min_size=1), st.floats(0, 20)), max_size=12))
def test_at_most_half_or_two_ever_go_without_a_word(batches: list[tuple[set[int], float]]) -> None:
    """Law: within any window no more than two, or than half of what the host had, are let go unasked."""
    guard, now = MassRemovalHold(WINDOW_S), 0.0
    there = ids(*range(10))
    gone: list[tuple[float, InstanceId]] = []
    for numbers, later_s in batches:
        now += later_s
        removed = (ids(*numbers) & there) - guard.held
        if not removed:
            continue
        held = guard.judge(removed, there, now)
        assert held in (removed, set())
        had = {instance for at, instance in gone if at > now - WINDOW_S} | there
        let_go = removed - held
        there -= let_go
        gone += [(now, instance) for instance in let_go]
        recent = {instance for at, instance in gone if at > now - WINDOW_S}
        if let_go:
            assert len(recent) <= max(ALWAYS_ALLOWED, len(had) / 2)
