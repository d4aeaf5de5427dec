"""What samples of a disk say of a machine's absence."""

from __future__ import annotations

import pytest

from tests.chaos.downtime import Sample, downtime


def looks(*told: tuple[float, str, int]) -> list[Sample]:
    return [Sample(seen=seen, owner=owner, sequence=sequence) for seen, owner, sequence in told]


STEADY = looks(*((float(second), "a", second) for second in range(1, 11)))


def test_a_machine_that_writes() -> None:
    """Law: the longest time without a new record is what lies between two looks that saw one."""
    found = downtime(STEADY, 2, 9)
    assert (found.away_s, found.restarts, found.blind_s) == (1.0, 0, 1.0)


def test_a_machine_that_was_away() -> None:
    """Law: looks that see nothing new are time away; another owner is a restart."""
    samples = looks((1, "a", 1), (2, "a", 2), (3, "a", 2), (4, "a", 2), (5, "b", 3), (6, "b", 4))
    found = downtime(samples, 0, 6)
    assert (found.away_s, found.began, found.restarts) == (3.0, 2.0, 1)
    assert found.within(2.0)
    assert not found.within(1.9)


def test_only_the_interval_counts() -> None:
    """Law: what was away at the edges of the interval counts as far as it lies within."""
    samples = looks((1, "a", 1), (9, "a", 1), (10, "a", 2))
    assert downtime(samples, 4, 7).away_s == 3.0
    assert downtime(samples, 8, 20).away_s == 10.0


def test_a_restart_at_the_edge() -> None:
    """Law: the owner before the interval is who was restarted in it; a first start is no restart."""
    samples = looks((1, "", 0), (2, "a", 1), (5, "b", 2))
    assert downtime(samples, 0, 3).restarts == 0
    assert downtime(samples, 3, 6).restarts == 1
    assert downtime(samples, 6, 9).restarts == 0


def test_nobody_looked() -> None:
    """Law: without a look the machine was away all the time, and that nobody looked is told: it fits any bound."""
    found = downtime([], 0, 5)
    assert (found.away_s, found.blind_s) == (5.0, 5.0)
    assert found.within(0)


@pytest.mark.parametrize("late", [0.0, 0.5, 3.0])
def test_a_late_look_is_not_the_machines(late: float) -> None:
    """Law: a look that comes late makes no absence longer than it was."""
    samples = looks((0, "a", 1), (1, "a", 2), (2 + late, "a", 3), (3 + late, "a", 4))
    assert downtime(samples, 0, 3 + late).within(1.0)
