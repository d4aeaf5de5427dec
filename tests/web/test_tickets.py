"""Tickets for consoles."""

from __future__ import annotations

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.web.tickets import GOOD_S, MOST, MOST_OF_ONE, Purpose, Tickets, TooMany

WANTED = Purpose("alice", "serial", InstanceId("web1"))


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_ticket_is_good_once_and_soon() -> None:
    """Law: one use, within ten seconds, by a clock that never goes back."""
    time = Time()
    tickets = Tickets(time)
    first, second, third = (tickets.give(WANTED) for _ in range(3))
    assert tickets.use(first, WANTED)
    assert not tickets.use(first, WANTED)
    time.now += GOOD_S - 0.001
    assert tickets.use(second, WANTED)
    time.now += 0.001
    assert not tickets.use(third, WANTED)
    assert not tickets.use("", WANTED)
    assert not tickets.use("\udcff", WANTED)


@pytest.mark.parametrize(
    "other",
    [
        Purpose("bob", "serial", InstanceId("web1")),
        Purpose("alice", "display", InstanceId("web1")),
        Purpose("alice", "serial", InstanceId("web2")),
    ],
)
def test_a_ticket_is_for_one_thing(other: Purpose) -> None:
    """Law: bound to person, console and instance; one wrong try has used it up."""
    tickets = Tickets(Time())
    ticket = tickets.give(WANTED)
    assert not tickets.use(ticket, other)
    assert not tickets.use(ticket, WANTED)


def test_nobody_guesses_one_and_none_is_kept() -> None:
    """Law: 192 bits, no two alike, and only digests are in memory."""
    asked: list[int] = []

    def make(size: int) -> str:
        asked.append(size)
        return f"t{len(asked)}"

    tickets = Tickets(Time(), make)
    given = {tickets.give(WANTED) for _ in range(3)}
    assert asked == [24, 24, 24]
    assert given == {"t1", "t2", "t3"}
    assert not any(ticket.encode() in key for ticket in given for key in tickets._open)
    assert len(Tickets(Time()).give(WANTED)) == 32


def test_their_number_is_bounded() -> None:
    """Law: of one person, and of all; those whose time has passed do not count."""
    time = Time()
    tickets = Tickets(time)
    for _ in range(MOST_OF_ONE):
        tickets.give(WANTED)
    with pytest.raises(TooMany):
        tickets.give(WANTED)
    for number in range(MOST - MOST_OF_ONE):
        tickets.give(Purpose(f"p{number // MOST_OF_ONE}", "serial", InstanceId("web1")))
    with pytest.raises(TooMany):
        tickets.give(Purpose("new", "serial", InstanceId("web1")))
    time.now += GOOD_S
    assert tickets.use(tickets.give(WANTED), WANTED)
