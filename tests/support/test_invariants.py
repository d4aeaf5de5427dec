"""Each checker finds what it is for: a violation of each kind is planted once; what is right is let pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvmsupervisor.adapters.etcd.api import Batch, Event, KeyValue
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.status import Phase, Status
from tests.support.bounds import Terms
from tests.support.invariants import (
    Debts,
    Epochs,
    Fact,
    Followed,
    Lasting,
    Plight,
    Right,
    Tries,
    Wait,
    WatchLog,
    Writers,
    right_to_end,
    unexplained,
    unrecorded,
    untrue,
)

A, B = HostName("a"), HostName("b")
CLIENT = {name: f"192.0.2.1:0/{name}" for name in ("one", "two", "three", "four")}


def lock(name: str, epoch: int, host: HostName = A, *, fence: tuple[str, ...] = ()) -> Lock:
    """A lock of a QEMU that runs."""
    return Lock(
        host=host,
        boot_id="boot",
        epoch=epoch,
        state=LockState.RUNNING,
        incarnation=name,
        pid=1,
        clients=(CLIENT[name],),
        fence=fence,
    )


# --- storage ------------------------------------------------------------------------------------------------------


def test_one_writer_after_another() -> None:
    """Who was followed by another one writes no more, on that disk; which of two came first may be unknown."""
    writers = Writers()
    assert writers.wrote("x", "one", rank=1, at=1) is None
    assert writers.wrote("x", "two", rank=2, at=2) is None
    assert writers.wrote("x", "one", rank=1, at=2) is None
    assert writers.wrote("y", "one", rank=1, at=3) is None
    assert writers.wrote("x", "two", rank=2, at=3) is None
    assert writers.wrote("x", "one", rank=1, at=4) == "two"


def test_what_is_owed() -> None:
    """Addresses on record are owed by the next ones, until the lock is let go of."""
    debts = Debts()
    debts.saw(lock("one", 1))
    assert debts.before("one") == {}
    assert debts.before("two") == {CLIENT["one"]: "one"}
    debts.saw(None)
    assert debts.before("two") == {}


def test_an_address_that_the_next_lock_does_not_tell_of() -> None:
    """Who takes a lock takes over what is to be fenced."""
    debts = Debts()
    debts.saw(lock("one", 1))
    assert debts.lost_by(lock("two", 2, fence=(CLIENT["one"],))) == {}
    assert debts.lost_by(lock("two", 2)) == {CLIENT["one"]: "one"}
    debts.saw(replace(lock("one", 1), state=LockState.BROKEN, clients=()))
    assert debts.lost_by(lock("two", 2)) == {}


# --- epochs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("locks", "found"),
    [
        ([lock("one", 1), lock("two", 2)], ""),
        ([lock("one", 2), lock("two", 1)], "went back from epoch 2 to 1"),
        ([lock("one", 1), lock("two", 1)], "which was another's"),
        ([lock("one", 1), lock("one", 2)], "with epoch 1 and with epoch 2"),
        ([lock("one", 1), lock("two", 2), lock("one", 1)], "went back from epoch 2 to 1"),
    ],
)
def test_epochs(locks: Sequence[Lock], found: str) -> None:
    """Law 2: they grow, and each is one incarnation's."""
    epochs = Epochs()
    told = [what for one in locks for what in epochs.saw(one)]
    assert len(told) == bool(found)
    assert found in "".join(told)


def test_another_history_may_have_older_locks() -> None:
    """Law 11: an older lock is no way back there; who lives may need a greater epoch than a backup's lock, once."""
    epochs = Epochs()
    assert [*epochs.saw(lock("one", 1)), *epochs.saw(lock("two", 2))] == []
    epochs.begin_again()
    assert list(epochs.saw(lock("one", 1))) == []
    assert list(epochs.saw(lock("two", 3))) == []
    assert len(list(epochs.saw(lock("two", 4)))) == 1
    assert len(list(epochs.saw(lock("three", 2)))) == 1
    epochs.begin_again(from_one=True)
    assert list(epochs.saw(lock("four", 1))) == []


# --- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plight", "right"),
    [
        (Plight(), None),
        (Plight(ran=False), Right.NEVER_RAN),
        (Plight(stands=True), Right.STANDS),
        (Plight(lost=True), Right.LOST),
        (Plight(shut_out=True), Right.SHUT_OUT),
        (Plight(ordered=True), Right.ORDERED),
        (Plight(elsewhere=True), Right.ELSEWHERE),
    ],
)
def test_who_may_be_ended(plight: Plight, right: Right | None) -> None:
    """Nothing but its own end, an order, or a lock that is another's ends a guest."""
    assert right_to_end(plight) is right


def test_the_living_are_on_record() -> None:
    """A record that is gone while its QEMU lives is found."""
    assert unrecorded(["one", "two"], {"one"}) == ["two"]
    assert unrecorded(["one"], {"one", "two"}) == []


# --- statuses -----------------------------------------------------------------------------------------------------

RUNS = Status(
    id="vm", host="a", phase=Phase.RUNNING, reason="runs", since="", pid=1, epoch=2, revision=9, run_state="running"
)
SO = Fact(living=[1], running=[1], lock=lock("two", 2), newest=9, sessions={"a", "b"})


@pytest.mark.parametrize(
    ("status", "fact", "found"),
    [
        (RUNS, SO, None),
        (RUNS, replace(SO, living=[], running=[]), "QEMU 1 lives"),
        (RUNS, replace(SO, living=[7], running=[7]), "QEMU 1 lives"),
        (replace(RUNS, phase=Phase.WAITING, pid=None, run_state=None), SO, "no QEMU lives"),
        (RUNS, replace(SO, running=[]), "the guest of 1 runs"),
        (replace(RUNS, run_state="paused"), SO, "is paused"),
        (replace(RUNS, epoch=1), SO, "its epoch is 1"),
        (replace(RUNS, awaited_host="b"), SO, "b has no session"),
        (replace(RUNS, awaited_host="c"), SO, None),
        (replace(RUNS, revision=8), SO, "revision 8"),
        (replace(RUNS, epoch=1), replace(SO, lock=lock("two", 2, B)), None),
    ],
)
def test_what_a_status_claims(status: Status, fact: Fact, found: str | None) -> None:
    """Each claim is held against what is so."""
    told = untrue(status, fact)
    assert (told is None) == (found is None)
    assert (found or "") in (told or "")


def test_what_lasts_too_long() -> None:
    """Only the same untruth lasts; it is told once, and then counts anew."""
    lasting: Lasting[str] = Lasting()

    def seen(what: str | None, now: float) -> float | None:
        return lasting.see("vm", what, now=now, bound_s=10.0)

    assert [seen("runs", 0.0), seen("runs", 10.0), seen("runs", 11.0), seen("runs", 12.0)] == [None, None, 11.0, None]
    assert [seen("lives", 20.0), seen(None, 29.0), seen("lives", 31.0), seen("lives", 40.0)] == [None] * 4
    assert seen("lives", 42.0) == pytest.approx(11.0)


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (None, "no status"),
        (RUNS, "it runs on a"),
        (replace(RUNS, phase=Phase.WAITING, pid=None, run_state=None, reason=" "), "no reason"),
        (replace(RUNS, phase=Phase.WAITING, pid=None, run_state=None, reason="not looked at yet"), "no reason"),
        (replace(RUNS, phase=Phase.WAITING, pid=None, run_state=None, reason="Ceph does not answer"), None),
        (replace(RUNS, run_state="io-error", reason="its guest does not run"), None),
    ],
)
def test_what_does_not_run_says_why(status: Status | None, found: str | None) -> None:
    """A person who looks finds a reason."""
    told = unexplained(status)
    assert (told is None) == (found is None)
    assert (found or "") in (told or "")


# --- tries --------------------------------------------------------------------------------------------------------


def test_a_row_of_tries_is_told_of() -> None:
    """Three that fail, over longer than the bound, without a word, are told once; a word or a success ends it."""
    tries = Tries(60.0)
    for at in (0.0, 30.0, 60.0):
        for subject in ("silent", "told", "well"):
            tries.failed("a#1", subject, at=at)
    tries.told("a#1", "told")
    tries.went_well("a#1", "well")
    assert list(tries.silent()) == []
    for subject in ("silent", "told", "well"):
        tries.failed("a#1", subject, at=61.0)
    (found,) = tries.silent()
    assert "a#1 has tried silent 4 times in 61 s" in found
    assert list(tries.silent()) == []


def test_tries_far_apart_are_no_row() -> None:
    """Three that failed long ago, and one today."""
    tries = Tries(60.0)
    for at in (0.0, 1.0, 2.0, 100.0):
        tries.failed("a#1", "x", at=at)
    assert list(tries.silent()) == []


def test_the_dead_try_nothing() -> None:
    """What a supervisor tried is nobody's once it has ended."""
    tries = Tries(1.0)
    for at in (0.0, 1.0, 2.0):
        tries.failed("a#1", "x", at=at)
    tries.over("a#1")
    assert list(tries.silent()) == []


# --- watches ------------------------------------------------------------------------------------------------------


def put(key: str, revision: int, value: str = "1") -> Event:
    return Event(KeyValue(key.encode(), value.encode(), revision, revision), deleted=False)


def gone(key: str, revision: int) -> Event:
    return Event(KeyValue(key.encode(), b"", revision, 0), deleted=True)


def batch(*events: Event) -> Batch:
    return Batch(events, events[-1].kv.mod_revision)


TRUTH = [put("a", 2), put("a", 3), put("b", 3), gone("a", 5)]


@pytest.mark.parametrize(
    ("batches", "law"),
    [
        ([batch(TRUTH[0]), batch(*TRUTH[1:3]), batch(TRUTH[3])], None),
        ([batch(*TRUTH)], None),
        ([batch(TRUTH[0]), batch(*TRUTH[1:3]), batch(*TRUTH[1:3]), batch(TRUTH[3])], "unique"),
        ([batch(TRUTH[0], TRUTH[0]), batch(*TRUTH[1:])], "unique"),
        ([batch(TRUTH[0]), batch(TRUTH[1]), batch(TRUTH[2]), batch(TRUTH[3])], "atomic"),
        ([batch(*TRUTH[1:3]), batch(TRUTH[0]), batch(TRUTH[3])], "ordered"),
        ([batch(*reversed(TRUTH[:3])), batch(TRUTH[3])], "ordered"),
        ([batch(*TRUTH[:3]), batch(put("b", 5))], "resumable"),
        ([batch(TRUTH[0]), batch(TRUTH[3])], "resumable"),
        ([Batch(TRUTH[:3], 4), batch(TRUTH[3])], "bookmarkable"),
        ([Batch((), 2), batch(*TRUTH)], "empty"),
    ],
)
def test_what_a_watch_hands_on(batches: Sequence[Batch], law: str | None) -> None:
    """Each of etcd's guarantees is broken once."""
    log = WatchLog(1)
    found = [what for one in batches for what in log.handed(one)]
    found += log.lacks(TRUTH)
    assert bool(found) == (law is not None)
    assert any((law or "") in what for what in found) or law is None


def follow(*told: tuple[set[str], int, Sequence[Event], dict[str, tuple[str, int]]]) -> list[str]:
    """What is wrong with what an informer told, one thing after the other, the table being so each time."""
    follows: Followed[str] = Followed(lambda key: None if key == b"x" else key.decode())
    found = []
    for number, (changed, revision, events, table) in enumerate(told):
        held = {key.encode(): (value.encode(), at) for key, (value, at) in table.items()}
        found += follows.told(changed, revision, events=events, held=held.get, anew=number == 0)
    return found


FIRST: tuple[set[str], int, Sequence[Event], dict[str, tuple[str, int]]] = (
    {"a", "b"},
    3,
    TRUTH[:3],
    {"a": ("1", 3), "b": ("1", 3)},
)


def test_what_an_informer_tells() -> None:
    """All that differs, each once; of a key that belongs to nobody, nothing."""
    assert follow(FIRST, ({"a"}, 5, TRUTH[3:], {"b": ("1", 3)})) == []
    assert follow(FIRST, ({"a"}, 6, [*TRUTH[3:], put("x", 6)], {"b": ("1", 3)})) == []
    # What came and went within one batch.
    assert follow(({"a"}, 3, [put("a", 2), gone("a", 3)], {})) == []


@pytest.mark.parametrize(
    ("second", "law"),
    [
        (FIRST, "ordered"),
        (({"b"}, 6, [*TRUTH[3:], put("b", 6)], {"b": ("1", 6)}), "resumable"),
        (({"a", "b"}, 5, TRUTH[3:], {"b": ("1", 3)}), "unique"),
        (({"a"}, 5, TRUTH[3:], FIRST[3]), "whole"),
        (({"b"}, 7, [put("b", 6, "old"), put("b", 7)], {"b": ("old", 6)}), "whole"),
    ],
)
def test_what_an_informer_must_not_tell(
    second: tuple[set[str], int, Sequence[Event], dict[str, tuple[str, int]]], law: str
) -> None:
    """Twice, too little, too much, or while its table holds something else."""
    assert any(what.startswith(law) for what in follow(FIRST, second))


def test_an_informer_that_begins_anew() -> None:
    """Law 11: in another history it tells what differs from the former one, whatever the revisions are."""
    follows: Followed[str] = Followed(bytes.decode)
    held = {b"a": (b"1", 3), b"b": (b"1", 3)}
    assert follows.told({"a", "b"}, 3, events=TRUTH[:3], held=held.get, anew=True) == []
    other = {b"b": (b"1", 2)}
    events = [put("b", 2)]
    assert follows.told({"b"}, 2, events=events, held=other.get, anew=True)[0].startswith("resumable")
    assert follows.told({"a", "b"}, 2, events=events, held=other.get, anew=True) == []


# --- liveness -----------------------------------------------------------------------------------------------------


def test_what_comes_too_late() -> None:
    """The bounds of all causes add up, and each is named."""
    wait = Wait(causes={"its host": 10.0, "its start": 5.0})
    assert wait.late(15.0) is None
    assert wait.late(15.1) == "not within 15 s (its host 10 s, its start 5 s)"


def test_bounds_follow_the_settings() -> None:
    """A longer TTL, wait, or time to shut down makes longer what depends on it, and nothing else."""
    usual = Terms()
    for name, changed, bounds in (
        ("ttl_s", 20.0, {"host_s"}),
        ("takeover_wait_s", 70.0, {"takeover_s"}),
        ("shutdown_s", 200.0, {"leave_s"}),
        ("start_timeout_s", 90.0, {"silent_s"}),
    ):
        other = replace(usual, **{name: changed})
        names = ("host_s", "start_s", "leave_s", "forgotten_s", "takeover_s", "silent_s", "word_s")
        assert {one for one in names if getattr(other, one) != getattr(usual, one)} == bounds
        assert {getattr(other, one) - getattr(usual, one) for one in bounds} == {changed - getattr(usual, name)}
    assert [Terms.pause_s(ends) for ends in (0, 1, 3, 99)] == [0.0, 1.0, 4.0, 300.0]
