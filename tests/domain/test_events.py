"""What happened: which facts are events, and that a history keeps its size and loses no cause."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain import events as ev
from kvmsupervisor.domain.events import MOST, MOST_BYTES, Event, changes, cut, fitted, from_json, joined, made, to_json
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase, Status

STATUS = Status(id="1", host="a", phase=Phase.RUNNING, reason="runs", since="t", pid=7, run_state="running", epoch=3)

TEXT = st.text(st.characters(exclude_categories=())) | st.sampled_from(["\x1b[2J\n" * 900, "\ud800" * 3000, "𝄞" * 9000])

EVENTS = st.builds(
    Event,
    at=st.integers(0, 99).map(lambda n: f"2026-01-01T00:00:{n:02}Z"),
    host=st.sampled_from(["a", "b" * 253]),
    event=st.sampled_from(["instance.ended", "instance.running", "x" * 253]),
    epoch=st.integers(0, 2**63 - 1),
    reason=TEXT,
    end=st.sampled_from(["", "crashed"]),
)


def at(n: int, event: str = "instance.ended", reason: str = "crashed (signal 9)", **more: object) -> Event:
    stamp = f"2026-01-01T{n // 3600:02}:{n // 60 % 60:02}:{n % 60:02}Z"
    return replace(Event(at=stamp, host="a", event=event, epoch=n, reason=reason), **more)  # type: ignore[arg-type]


@given(st.lists(EVENTS, max_size=40))
def test_a_key_is_never_larger_than_it_may_be(events: list[Event]) -> None:
    """Whatever QEMU or a key says; the newest event is always in it, and what is written can be read."""
    value, kept = to_json(events)
    assert len(value) <= MOST_BYTES
    read = from_json(value)
    assert len(read) == len(kept) <= MOST
    if events:
        assert (read[-1].at, read[-1].event) == (events[-1].at, events[-1].event)


@given(TEXT, st.integers(3, 400))
def test_a_text_is_cut_to_bytes_of_json(text: str, limit: int) -> None:
    """And what fits stays as it is."""
    found = cut(text, limit)
    size = len(json.dumps(found, ensure_ascii=False).encode(errors="backslashreplace")) - 2
    assert size <= limit
    assert found == text or (found.endswith("…") and text.startswith(found[:-1]))


def test_a_crash_loop_does_not_erase_what_came_before() -> None:
    """A thousand crashes: the takeover before them stays, and the first and the last crash, with their number."""
    history: tuple[Event, ...] = (at(0, "failover.taken", "b is gone"),)
    for turn in range(1, 1001):
        steps = ["instance.stopping", "instance.starting", "instance.waiting", "lock.fenced"]
        told = [
            *(at(turn * 3, step, step) for step in steps),
            at(turn * 3, reason=f"crashed (signal 9), pid {turn}"),
            at(turn * 3 + 1, "instance.backoff", f"it waits {turn} s"),
            at(turn * 3 + 2, "instance.running", f"pid {turn}"),
        ]
        _, history = to_json(joined(history, told))
    assert history[0].event == "failover.taken"
    ends = [one for one in history if one.event == "instance.ended"]
    assert ends[0].at == at(3).at
    assert ends[-1].at == at(3000).at
    assert sum(one.times for one in ends) == 1000
    assert len(history) <= MOST


def test_what_fits_is_left_as_it_is() -> None:
    """A timeline is worth more than a short list: nothing is counted together while there is room."""
    events = tuple(at(n) for n in range(MOST))
    assert fitted(events) == events
    assert len(fitted((*events, at(99)))) == MOST
    different = [at(n, reason="x" * n) for n in range(MOST + 2)]
    assert fitted(different) == tuple(different[2:])


def test_each_event_is_there_once() -> None:
    """Also one that was counted together with others, and one of which the key has less."""
    events = [at(n) for n in range(MOST + 5)]
    _, kept = to_json(events)
    assert joined(kept, events) == kept
    long = at(1, reason="because " * 100)
    short = from_json(to_json([long] * MOST)[0])
    assert len(short[0].reason) < len(long.reason)
    assert joined(short[:1], [long]) == short[:1]
    # A folded event does not swallow a later one of its last second.
    counted = at(9, times=3, since=at(1).at)
    assert joined([counted], [at(5)]) == (counted,)
    assert joined([counted], [replace(at(9), epoch=10)]) == (counted, replace(at(9), epoch=10))
    assert joined([at(1)], [at(1, reason="another")]) == (at(1), at(1, reason="another"))


def test_a_file_and_a_key_are_woven_in_the_order_in_which_it_happened() -> None:
    """Within one second, and by clocks that differ; what only one of them has is in its place, and nothing twice."""
    mine = [replace(at(5), event=name) for name in "abcd"]
    theirs = [replace(at(second), host="b", event=name) for second, name in ((2, "x"), (9, "y"))]
    assert ev.woven(mine, [mine[0], *theirs, mine[3]]) == (mine[0], theirs[0], mine[1], mine[2], theirs[1], mine[3])
    assert ev.woven([], theirs) == tuple(theirs)
    assert ev.woven(mine, []) == tuple(mine)
    assert ev.woven([at(1), at(7)], theirs) == (at(1), theirs[0], at(7), theirs[1])
    single = [at(n) for n in range(5)]
    counted = at(4, times=4, since=at(1).at)
    assert ev.woven(single, [single[0], theirs[0], counted, theirs[1]])[-1] == theirs[1]
    assert [one for one in ev.woven(single, [single[0], theirs[0], counted]) if one.host == "a"] == single


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"{}",
        b'[1, null, {"at": 1}]',
        b'[{"at":"%s","host":"a","event":"e"}]' % (b"x" * 99),
        b'[{"at":"t","host":"a","event":"e","times":0}]',
        b'[{"at":"t","host":"a","event":"e","epoch":%d}]' % 10**30,
    ],
)
def test_a_key_that_anybody_wrote_harms_nothing(data: bytes) -> None:
    """What is no event is left out."""
    assert from_json(data) == ()


def test_a_torn_line_costs_only_itself() -> None:
    """A host that lost power, a disk that was full."""
    lines = [ev.to_line(at(n), InstanceId("1")) for n in range(3)]
    assert ev.from_lines(lines[0] + lines[1][:20] + b"\n" + lines[2]) == (at(0), at(2))
    assert ev.from_lines(lines[0][9:] + lines[1]) == (at(1),)


def test_what_is_new_in_a_status() -> None:
    """Phases with their reasons; orders that are held; guests that stand still; keys that wait."""

    def told(now: Status, before: Status = STATUS) -> list[tuple[str, str]]:
        return list(changes(before, now))

    assert told(STATUS) == []
    assert told(replace(STATUS, reason="runs; 3 s")) == []
    assert told(replace(STATUS, phase=Phase.STOPPING, reason="power=off")) == [("instance.stopping", "power=off")]
    waiting = replace(STATUS, phase=Phase.WAITING, reason="fetching, 3 %")
    assert told(replace(waiting, reason="fetching, 40 %"), waiting) == []
    assert told(replace(waiting, reason="no bridge"), waiting) == [("instance.waiting", "no bridge")]
    held = replace(STATUS, held=True, reason="its removal is held")
    assert told(held) == [("instance.held", "its removal is held")]
    assert [name for name, _ in told(STATUS, held)] == ["instance.unheld"]
    halted = replace(STATUS, run_state="io-error", reason="its disk is full")
    assert told(halted) == [("instance.halted", "its disk is full")]
    assert [name for name, _ in told(STATUS, halted)] == ["instance.goes_on"]
    assert told(replace(STATUS, pending=("cpus",))) == [
        ("instance.pending", "these keys take effect at the next start: cpus")
    ]
    assert told(replace(STATUS, problems=("ram: bad",))) == [("instance.problems", "ram: bad")]


def test_which_lines_of_the_log_are_events() -> None:
    """And what they say."""
    assert ev.said("instance.spawned", {"pid": 1}) is None
    assert ev.said("lock.taken", {}) is None
    assert ev.said("lock.taken", {"reason": "of b"}) == "of b"
    assert ev.said("move.given", {"to": "b", "bytes": 3}) == "the guest was handed over (to b)"
    assert ev.said("instance.ended", {"reason": "crashed (signal 9)"}) == "crashed (signal 9)"


def test_why_a_lock_was_taken() -> None:
    """After a reboot, and from a host that is gone; a restart is no news."""
    lock = Lock(
        host=HostName("a"), boot_id="one", epoch=1, state=LockState.RUNNING, incarnation="i", storage=Storage.NONE
    )
    assert ev.why_taken(None, me="a", boot_id="one") is None
    assert ev.why_taken(lock, me="a", boot_id="one") is None
    assert "a has booted since" in str(ev.why_taken(lock, me="a", boot_id="two"))
    broken = replace(lock, state=LockState.BROKEN)
    assert "a person has broken" in str(ev.why_taken(broken, me="b", boot_id="one"))
    assert "the lock of a" in str(ev.why_taken(lock, me="b", boot_id="one"))


def test_an_event_says_who_where_when_and_which() -> None:
    """Of bounded length, with how many were left out before it."""
    event = made("instance.ended", STATUS, at="now", reason="x" * 9999, end="crashed", untold=2)
    assert (event.at, event.host, event.epoch, event.end) == ("now", "a", 3, "crashed")
    assert len(event.reason) <= ev.LINE_BYTES
    assert "(2 events before this one are left out)" in made("instance.ended", STATUS, at="now", untold=2).reason
