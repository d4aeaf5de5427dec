"""Who may start: never more than the width at a time, never more memory than there is, and nobody waits in vain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.keys import InstanceId

ONE, TWO, THREE, FOUR, FIVE = (InstanceId(name) for name in "12345")


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


def test_priority_comes_before_order() -> None:
    """Law: who has the greater priority is served first; among equals, who came first."""
    slots, told = Admission(1), list[str]()
    slots.request(ONE, nothing)
    for name, priority in ((TWO, -5), (THREE, 0), (FOUR, 7), (FIVE, 7)):
        slots.request(name, lambda name=name: told.append(name), priority=priority)  # type: ignore[misc]
    for name in (ONE, FOUR, FIVE, THREE):
        slots.release(name)
    assert told == [FOUR, FIVE, THREE, TWO]


# --- memory ---------------------------------------------------------------------------------------------------


def test_who_does_not_fit_is_passed_over() -> None:
    """Law: one that waits for memory keeps its place and holds up nobody whose memory fits; then its turn comes."""
    slots, told = Admission(8, 1000), list[str]()
    slots.promise(ONE, 600)
    slots.request(TWO, lambda: told.append(TWO), need_mib=500, priority=9)
    slots.request(THREE, nothing, need_mib=300)
    assert (slots.state(TWO), slots.state(THREE)) == (False, True)
    slots.release(THREE)
    slots.take_back(THREE)
    assert slots.state(TWO) is False
    slots.take_back(ONE)
    assert told == [TWO]


def test_a_start_that_is_over_keeps_its_memory() -> None:
    """Law: what was promised is counted until it is taken back, slot or not."""
    slots = Admission(8, 1000)
    slots.request(ONE, nothing, need_mib=1000)
    slots.release(ONE)
    slots.request(TWO, nothing, need_mib=1)
    assert (slots.state(ONE), slots.state(TWO)) == (None, False)
    slots.take_back(ONE)
    assert slots.state(TWO) is True


def test_a_restart_needs_its_memory_only_once() -> None:
    """Law: what is promised to an instance already does not stand in its own way."""
    slots = Admission(1, 1000)
    slots.promise(ONE, 1000)
    slots.request(ONE, nothing, need_mib=900)
    assert slots.state(ONE) is True


def test_what_lives_is_counted_even_where_it_does_not_fit() -> None:
    """Law: QEMUs that an earlier supervisor started count in full; new ones wait."""
    slots = Admission(8, 1000)
    slots.promise(ONE, 5000)
    slots.request(TWO, nothing)
    assert slots.state(TWO) is False
    slots.take_back(ONE)
    assert slots.state(TWO) is True


def test_without_a_limit_nobody_waits_for_memory() -> None:
    """Law: no limit, no shortage."""
    slots = Admission(8)
    slots.promise(ONE, 1 << 40)
    slots.request(TWO, nothing, need_mib=1 << 40)
    assert slots.state(TWO) is True


def test_the_shortage_is_told() -> None:
    """Law: who waits for memory is told how much it needs, how much there is, and who has it; others nothing."""
    slots = Admission(2, 1000)
    slots.promise(ONE, 600)
    slots.request(TWO, nothing, need_mib=500)
    assert slots.shortage(TWO) == ("it needs 500 MiB, and of 1000 MiB for guests 600 MiB are promised to 1 other")
    slots.promise(THREE, 50)
    slots.promise(TWO, 400)
    assert slots.shortage(TWO) == ("it needs 500 MiB, and of 1000 MiB for guests 650 MiB are promised to 2 others")
    assert slots.shortage(ONE) is None
    slots.take_back(ONE)
    assert slots.shortage(TWO) is None


def test_who_waits_for_a_slot_lacks_no_memory() -> None:
    """Law: a line for slots is no shortage of memory."""
    slots = Admission(1, 1000)
    slots.request(ONE, nothing, need_mib=100)
    slots.request(TWO, nothing, need_mib=100)
    assert slots.state(TWO) is False
    assert slots.shortage(TWO) is None


# --- whatever happens -----------------------------------------------------------------------------------------

LIMIT_MIB = 10
Verb = Literal["request", "release", "promise", "take back"]


@dataclass(slots=True)
class _Model:
    """What is known from outside: what each asked for when it last asked, and what is promised."""

    needs: dict[InstanceId, int] = field(default_factory=dict)
    promised: dict[InstanceId, int] = field(default_factory=dict)

    def fits(self, name: InstanceId) -> bool:
        others = sum(mib for other, mib in self.promised.items() if other != name)
        return others + self.needs[name] <= LIMIT_MIB


_steps = st.tuples(
    st.sampled_from(["request", "request", "release", "promise", "take back"]),
    st.integers(0, 5),
    st.integers(0, 12),
    st.integers(-1, 1),
)


@given(st.integers(1, 3), st.lists(_steps, max_size=60))
def test_no_sequence_breaks_the_invariant(width: int, steps: list[tuple[Verb, int, int, int]]) -> None:
    """Law: at most `width` hold a slot; nobody whose memory fits stands in the line while one is free.

    And whoever is granted a slot fitted, and is told, once.
    """
    slots, told, model = Admission(width, LIMIT_MIB), list[InstanceId](), _Model()
    names = [InstanceId(str(number)) for number in range(6)]

    def granted(name: InstanceId) -> None:
        told.append(name)
        assert model.fits(name)
        model.promised[name] = model.needs[name]

    for verb, number, mib, priority in steps:
        name = names[number]
        before = {each: slots.state(each) for each in names}
        match verb:
            case "request":
                at_once = False
                if before[name] is None:
                    model.needs[name] = mib
                    at_once = list(before.values()).count(True) < width and model.fits(name)
                if at_once:
                    # A grant that replaces a larger promise may bring others their turn, too.
                    model.promised[name] = mib
                slots.request(name, lambda name=name: granted(name), need_mib=mib, priority=priority)  # type: ignore[misc]
                assert before[name] is not None or bool(slots.state(name)) == at_once
            case "release":
                slots.release(name)
            case "promise":
                model.promised[name] = mib
                slots.promise(name, mib)
            case "take back":
                model.promised.pop(name, None)
                slots.take_back(name)
        states = {each: slots.state(each) for each in names}
        assert list(states.values()).count(True) <= width
        free = list(states.values()).count(True) < width
        for each, state in states.items():
            if state is False:
                assert not (free and model.fits(each))
                assert (slots.shortage(each) is None) == model.fits(each)
        moved = [each for each in names if before[each] is False and states[each] is True]
        assert sorted(told) == sorted(moved)
        told.clear()
