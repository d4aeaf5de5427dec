"""Start slots: never more than the width, first come first served, none idle while somebody waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.keys import InstanceId

ONE, TWO, THREE, FOUR = (InstanceId(name) for name in "1234")


def nothing() -> None:
    """Nobody needs to be told."""


def test_first_come_first_served() -> None:
    """Law: the line keeps its order, and who gets a slot is told once."""
    slots, told = Admission(1), list[str]()
    for name in (ONE, TWO, THREE):
        slots.request(name, lambda name=name: told.append(name))  # type: ignore[misc]
    assert [slots.state(name) for name in (ONE, TWO, THREE, FOUR)] == [True, False, False, None]
    slots.release(ONE)
    slots.release(TWO)
    assert told == [TWO, THREE]
    assert slots.state(THREE) is True


def test_asking_again_changes_nothing() -> None:
    """Law: a second request neither takes a second slot nor loses the place in the line."""
    slots = Admission(2)
    for _ in range(3):
        slots.request(ONE, nothing)
    slots.request(TWO, nothing)
    slots.request(THREE, nothing)
    slots.request(FOUR, nothing)
    slots.request(THREE, nothing)
    slots.release(ONE)
    assert (slots.state(THREE), slots.state(FOUR)) == (True, False)


def test_leaving_the_line_gives_nobody_a_slot() -> None:
    """Law: who goes away while waiting is passed over."""
    slots = Admission(1)
    for name in (ONE, TWO, THREE):
        slots.request(name, nothing)
    slots.release(TWO)
    assert slots.state(ONE) is True
    slots.release(ONE)
    assert (slots.state(TWO), slots.state(THREE)) == (None, True)


@given(st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_no_sequence_breaks_the_invariant(width: int, steps: list[tuple[bool, int]]) -> None:
    """Law: at most `width` hold a slot, and nobody stands in the line while one is free."""
    slots, told = Admission(width), set[InstanceId]()
    names = [InstanceId(str(number)) for number in range(8)]
    for asks, number in steps:
        name = names[number]
        if asks:
            slots.request(name, lambda name=name: told.add(name))  # type: ignore[misc]
        else:
            slots.release(name)
        states = [slots.state(each) for each in names]
        assert states.count(True) <= width
        assert states.count(False) == 0 or states.count(True) == width
        assert all(slots.state(each) for each in told)
        told.clear()
