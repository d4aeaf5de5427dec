"""The decisions of a live move (`domain.move`), row by row; `test_move_model.py` searches what they come to together."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from kvmsupervisor.domain.decision import Row
from kvmsupervisor.domain.goal import goal
from kvmsupervisor.domain.handover import announced, arrived, called_off, given
from kvmsupervisor.domain.history import Era
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.live import Attempt
from kvmsupervisor.domain.lock import (
    MOVING_VERSION,
    Change,
    Claim,
    Destination,
    Lock,
    LockState,
    LockView,
    Storage,
    take,
)
from kvmsupervisor.domain.run_state import INCOMING, PAUSED, POSTMIGRATE
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.transfer import Course, Link, Stage
from kvmsupervisor.domain.view import Action, Process, Stopping, View
from tests.domain import test_lifecycle as cases
from tests.domain.test_lifecycle import BOOT, ME, OTHER, record, running, seen, view

# At the source: this host is `a`, the target `b`, whose QEMU is `q`.
TO = Destination(host=OTHER, boot_id="boot-2", incarnation="q", pid=7, starttime=8, clients=("192.0.2.2:0/2",))
HERE = replace(cases.locked(), storage=Storage.RBD, clients=("192.0.2.1:0/1",))
MOVING = announced(HERE, TO)
GOES = {"wish": cases.MOVED, "target": cases.THERE}
LIVE = Course(cold=None)
READY = replace(LIVE, ready=TO, link=Link.OPEN)
SENDS = replace(READY, link=Link.IN_USE)


def sending(stage: Stage, **changes: object) -> Process:
    state = {Stage.DONE: POSTMIGRATE, Stage.SWITCHOVER: "finish-migrate"}.get(stage, "running")
    return running(**{"stage": stage, "run_state": state, **changes})


def at_source(stage: Stage, course: Course = SENDS, **changes: object) -> View:
    return view(**{"process": sending(stage), "lock": seen(MOVING), "course": course, **GOES, **changes})


# At the target: this host is `a`, the source `b`.
COMES = Destination(host=ME, boot_id=BOOT, incarnation="x", pid=42, starttime=9, clients=("192.0.2.1:0/1",))
THEIRS = replace(cases.locked(host=OTHER, name="y"), storage=Storage.RBD, clients=("192.0.2.2:0/2",))
COMING_LOCK = announced(THEIRS, COMES)
GIVEN = given(COMING_LOCK, paused=False, mark="")
TAKES = Course(receives=True)
TOLD = replace(TAKES, offered=True, called=True, told=True, link=Link.OPEN)


def coming(**changes: object) -> Process:
    waits = replace(record(epoch=0), incoming=True)
    return replace(running(incarnation=waits, run_state=INCOMING, stage=Stage.IDLE), **changes)  # type: ignore[arg-type]


def at_target(held: Lock | None, process: Process | None = None, course: Course = TOLD, **changes: object) -> View:
    there = {"process": process, "lock": seen(held), "course": course, "holder_has_session": True}
    return view(**(there | changes))


HAS_ALL = coming(stage=Stage.DONE, run_state=PAUSED)

TABLE: list[tuple[str, Row, View, Phase, Action | None]] = [
    # The source.
    ("law 13: a new host moves it live where that can be", Row.MOVE_CALL, at_source(Stage.IDLE, LIVE, lock=seen(HERE)),
     Phase.MIGRATING, Action.CALL),
    ("law 13: not without etcd", Row.MOVE_CALL, at_source(Stage.IDLE, LIVE, lock=seen(HERE), etcd_at=102.0), Phase.WAITING, None),
    ("where it cannot, it is stopped, as it always was", Row.STOP_ASK, at_source(Stage.IDLE, Course(cold="c"), lock=seen(HERE)),
     Phase.STOPPING, Action.POWERDOWN),
    ("unless that is not wanted", Row.MOVE_REFUSED, at_source(Stage.IDLE, Course(cold="c", only_live=True), lock=seen(HERE)),
     Phase.RUNNING, None),
    ("a stop that has begun goes on", Row.STOP_ASK, at_source(Stage.IDLE, LIVE, lock=seen(HERE),
     process=sending(Stage.IDLE, stopping=Stopping(since=100.0))), Phase.STOPPING, Action.POWERDOWN),
    ("a guest that stands still for another reason is not sent", Row.STOP_ASK, at_source(Stage.IDLE, LIVE, lock=seen(HERE),
     process=sending(Stage.IDLE, run_state="io-error")), Phase.STOPPING, Action.POWERDOWN),
    ("who failed a moment ago waits", Row.MOVE_LATER, at_source(Stage.IDLE, replace(LIVE, again_at=102.0), lock=seen(HERE)),
     Phase.RUNNING, None),
    ("nor while it is not known what machine it is", Row.MOVE_UNSETTLED, at_source(Stage.IDLE, LIVE, lock=seen(HERE),
     process=sending(Stage.IDLE, incarnation=replace(record(), coming=("disk1",)))), Phase.RUNNING, Action.CHANGE),
    ("nor while its guest has time to let go of a disk", Row.MOVE_UNSETTLED, at_source(Stage.IDLE, LIVE, lock=seen(HERE),
     process=sending(Stage.IDLE, incarnation=replace(record(), going=("disk1",)), attempts={"disk1": Attempt(at=110.0, asked=True)})),
     Phase.RUNNING, None),
    ("whoever wants it moved", Row.MOVE_UNSETTLED, at_source(Stage.IDLE, LIVE, lock=seen(HERE), wish=cases.LIVE_ONLY,
     process=sending(Stage.IDLE, incarnation=replace(record(), coming=("disk1",)))), Phase.RUNNING, Action.CHANGE),
    ("but not for ever", Row.MOVE_CALL, at_source(Stage.IDLE, LIVE, lock=seen(HERE),
     process=sending(Stage.IDLE, incarnation=replace(record(), going=("disk1",)), attempts={"disk1": Attempt(at=inf)})),
     Phase.MIGRATING, Action.CALL),
    ("QEMU is asked first", Row.MOVE_PROBE, at_source(Stage.UNKNOWN, LIVE, lock=seen(HERE)), Phase.MIGRATING, Action.PROBE),
    ("and connected to", Row.MOVE_CONNECT, at_source(Stage.IDLE, process=sending(Stage.IDLE, connected=False)), Phase.MIGRATING,
     Action.CONNECT),
    ("law 3: what waits there is on record before anything is sent", Row.MOVE_ANNOUNCE, at_source(Stage.IDLE, READY, lock=seen(HERE)),
     Phase.MIGRATING, Action.ANNOUNCE),
    ("then it is sent", Row.MOVE_SEND, at_source(Stage.IDLE, READY), Phase.MIGRATING, Action.SEND),
    ("it is not sent twice over one connection", Row.MOVE_CALL_OFF, at_source(Stage.IDLE), Phase.MIGRATING, Action.CALL_OFF),
    ("a successor has no connection", Row.MOVE_CALL_OFF, at_source(Stage.IDLE, LIVE), Phase.MIGRATING, Action.CALL_OFF),
    ("without etcd it waits, and runs", Row.MOVE_CALL_OFF, at_source(Stage.IDLE, LIVE, session_held=False), Phase.WAITING, None),
    ("while it is sent, it is watched", Row.MOVE_WATCH, at_source(Stage.ACTIVE), Phase.MIGRATING, None),
    ("for a while", Row.MOVE_CANCEL, at_source(Stage.ACTIVE, replace(SENDS, give_up_at=100.0)), Phase.MIGRATING, Action.CANCEL),
    ("a successor cancels", Row.MOVE_CANCEL, at_source(Stage.ACTIVE, LIVE), Phase.MIGRATING, Action.CANCEL),
    ("host written back cancels", Row.MOVE_CANCEL, at_source(Stage.ACTIVE, wish=cases.WISH), Phase.MIGRATING, Action.CANCEL),
    ("so does power off", Row.MOVE_CANCEL, at_source(Stage.ACTIVE, wish=replace(cases.OFF, host=OTHER)), Phase.MIGRATING, Action.CANCEL),
    ("so does a target that is gone", Row.MOVE_CANCEL, at_source(Stage.ACTIVE, target=cases.ABSENT), Phase.MIGRATING, Action.CANCEL),
    ("so does who stops all guests of this host", Row.MOVE_CANCEL, at_source(Stage.ACTIVE, draining=True), Phase.MIGRATING,
     Action.CANCEL),
    ("a stopped guest goes on at once without its keys", Row.MOVE_CANCEL, at_source(Stage.SWITCHOVER, wish=None), Phase.MIGRATING,
     Action.CANCEL),
    ("and without etcd", Row.MOVE_CANCEL, at_source(Stage.SWITCHOVER, session_held=False), Phase.MIGRATING, Action.CANCEL),
    ("with etcd the rest is sent", Row.MOVE_SWITCH, at_source(Stage.SWITCHOVER), Phase.MIGRATING, Action.SWITCH),
    ("then nothing can be cancelled", Row.MOVE_WATCH, at_source(Stage.DEVICE, wish=cases.WISH), Phase.MIGRATING, None),
    ("but cut", Row.MOVE_CUT, at_source(Stage.DEVICE, replace(SENDS, give_up_at=100.0)), Phase.MIGRATING, Action.CUT),
    ("law 13: the source hands over, once all is sent", Row.MOVE_GIVE, at_source(Stage.DONE), Phase.MIGRATING, Action.GIVE),
    ("law 13: a successor does", Row.MOVE_GIVE, at_source(Stage.DONE, LIVE), Phase.MIGRATING, Action.GIVE),
    ("law 13: without etcd nobody knows, and nobody goes on", Row.MOVE_GIVE, at_source(Stage.DONE, session_held=False), Phase.WAITING,
     None),
    ("refused, it is called off", Row.MOVE_CALL_OFF, at_source(Stage.DONE, replace(SENDS, refused=True)), Phase.MIGRATING,
     Action.CALL_OFF),
    ("law 13: one that has come, of which QEMU still tells, is not handed on but sent", Row.MOVE_SEND,
     at_source(Stage.DONE, READY, process=sending(Stage.DONE, run_state="running")), Phase.MIGRATING, Action.SEND),
    ("law 13: also where a person has paused it", Row.MOVE_SEND,
     at_source(Stage.DONE, READY, process=sending(Stage.DONE, run_state=PAUSED)), Phase.MIGRATING, Action.SEND),
    ("so it is with host written back", Row.MOVE_CALL_OFF, at_source(Stage.DONE, wish=cases.WISH), Phase.MIGRATING, Action.CALL_OFF),
    ("law 13: and only then goes on here", Row.MOVE_BACK, at_source(Stage.DONE, lock=seen(called_off(MOVING))), Phase.MIGRATING,
     Action.GO_BACK),
    ("a guest that a person paused does not", Row.RUNS, at_source(Stage.DONE, lock=seen(called_off(MOVING)), wish=cases.WISH,
     process=sending(Stage.DONE, incarnation=replace(record(), paused=True))), Phase.RUNNING, None),
    ("law 11: nor one whose lock came with another history", Row.MOVE_LEFT, at_source(Stage.DONE, lock=seen(HERE), era=cases.RESTORED),
     Phase.RUNNING, None),
    ("law 13: what was handed over is ended", Row.LOCK_LOST, at_source(Stage.DONE, lock=seen(given(MOVING, paused=False, mark=""))),
     Phase.STOPPING, Action.KILL),
    ("before the lock was read, nothing is stopped for another host", Row.MOVE_UNREAD, at_source(Stage.IDLE, lock=LockView()),
     Phase.RUNNING, None),
    ("a newer release's lock is left alone", Row.LOCK_NEWER, view(process=running(), lock=LockView(known=True, data=b'{"version":3}',
     mod_revision=3, as_of=9), wish=cases.OFF_NOW), Phase.RUNNING, None),
    ("what is sent under a lock that names no target is cancelled", Row.MOVE_CANCEL, at_source(Stage.SWITCHOVER, lock=seen(HERE)),
     Phase.MIGRATING, Action.CANCEL),
    ("what cannot be, is waited for", Row.MOVE_WATCH, at_source(Stage.DEVICE, lock=seen(HERE), process=sending(Stage.DEVICE, probe_at=105.0)),
     Phase.MIGRATING, None),
    # The target.
    ("law 13: who is to have it says that it takes it", Row.OFFER, at_target(THEIRS, course=TAKES), Phase.WAITING, Action.OFFER),
    ("once", Row.OFFERED, at_target(THEIRS, course=replace(TAKES, offered=True)), Phase.WAITING, None),
    ("who does not, waits until it has stopped there", Row.HELD, at_target(THEIRS, course=Course()), Phase.WAITING, None),
    ("a guest that is on its way is not offered anything", Row.HELD, at_target(COMING_LOCK, course=TAKES), Phase.WAITING, None),
    ("told what comes, it makes ready", Row.RECEIVE, at_target(THEIRS, course=replace(TAKES, offered=True, called=True)),
     Phase.WAITING, Action.RECEIVE),
    ("a QEMU that waits is connected to", Row.COMING_CONNECT, at_target(THEIRS, coming(connected=False)), Phase.WAITING, Action.CONNECT),
    ("and told of", Row.COMING_TELL, at_target(THEIRS, coming(), replace(TOLD, told=False)), Phase.WAITING, Action.TELL),
    ("then it waits", Row.COMING_WAIT, at_target(THEIRS, coming()), Phase.WAITING, None),
    ("without a connection it is useless", Row.COMING_END, at_target(THEIRS, coming(), replace(TOLD, link=Link.NONE)), Phase.WAITING,
     Action.KILL),
    ("after a while, too", Row.COMING_END, at_target(THEIRS, coming(), replace(TOLD, give_up_at=100.0)), Phase.WAITING, Action.KILL),
    ("or with another host", Row.COMING_END, at_target(THEIRS, coming(), wish=cases.MOVED), Phase.WAITING, Action.KILL),
    ("on record, only the lock ends it", Row.COMING_WAIT, at_target(COMING_LOCK, HAS_ALL, Course(), wish=cases.MOVED), Phase.WAITING,
     None),
    ("law 4: or a source that is gone", Row.COMING_END, at_target(COMING_LOCK, HAS_ALL, holder_has_session=False), Phase.WAITING,
     Action.KILL),
    ("called off, it is ended", Row.COMING_END, at_target(called_off(COMING_LOCK), HAS_ALL, Course()), Phase.WAITING, Action.KILL),
    ("with a lock let go of, too", Row.COMING_END, at_target(None, HAS_ALL), Phase.WAITING, Action.KILL),
    ("what is not known ends nothing", Row.COMING_LOCKLESS, at_target(None, HAS_ALL, lock=LockView()), Phase.WAITING, None),
    ("law 13: given, and whole, it goes on", Row.ARRIVE, at_target(GIVEN, HAS_ALL, Course()), Phase.MIGRATING, Action.ARRIVE),
    ("law 13: whatever its keys say by now", Row.ARRIVE, at_target(GIVEN, HAS_ALL, Course(), wish=cases.GONE), Phase.MIGRATING,
     Action.ARRIVE),
    ("law 13: not before it is whole", Row.ARRIVING_PROBE, at_target(GIVEN, coming(stage=Stage.DEVICE)), Phase.MIGRATING, None),
    ("law 13: nor unasked", Row.ARRIVING_PROBE, at_target(GIVEN, coming(stage=Stage.UNKNOWN, probe_at=1e9)), Phase.MIGRATING,
     Action.PROBE),
    ("law 13: nor while QEMU does not answer", Row.ARRIVING_CONNECT, at_target(GIVEN, coming(connected=False, connect_at=105.0)),
     Phase.MIGRATING, None),
    ("then the lock is its own", Row.SETTLE, at_target(GIVEN, running()), Phase.MIGRATING, Action.SETTLE),
    ("one that came while its host's disk was full is its own by its lock", Row.ARRIVED, at_target(HERE, coming()), Phase.MIGRATING,
     Action.SETTLE),
    ("also of a guest that stays paused", Row.SETTLE, at_target(replace(GIVEN, paused=True), running(run_state=PAUSED)),
     Phase.MIGRATING, Action.SETTLE),
    ("and it runs as any", Row.RUNS, at_target(arrived(GIVEN), running(), Course()), Phase.RUNNING, None),
    ("law 4: given, and dead, it starts cold", Row.QUEUE, at_target(GIVEN, holder_has_session=True), Phase.WAITING, Action.QUEUE),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "case", "phase", "action"), [case[1:] for case in TABLE], ids=[case[0] for case in TABLE]
)
def test_row(row: Row, case: View, phase: Phase, action: Action | None) -> None:
    """Each row of a live move, and its neighbours."""
    decision = decide(case)
    assert (decision.row, decision.phase, decision.action) == (row, phase, action), decision.reason
    assert decision.reason
    if decision.action is None and decision.wake_at is not None:
        assert decision.wake_at > case.now


# --- the lock -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [MOVING, GIVEN])
def test_a_release_without_live_moves_does_not_read_the_lock_of_one(lock: Lock) -> None:
    """Law 13: during a move the value has a version of its own, which such a release leaves alone; before and after, not."""
    assert Lock.from_json(lock.to_json()) == lock
    assert lock.version == MOVING_VERSION
    for other in (HERE, called_off(MOVING), arrived(GIVEN), MOVING.broken(), take_from(MOVING), take_from(GIVEN)):
        assert other.version == 1
        assert Lock.from_json(other.to_json()) == other


def take_from(lock: Lock) -> Lock:
    return take(lock, host=HostName("c"), boot_id="boot-3", facts="/f", incarnation="z", storage=Storage.RBD)


@pytest.mark.parametrize(
    "changed",
    [
        replace(MOVING, version=1),
        replace(MOVING, to=None),
        replace(HERE, to=TO),
        replace(MOVING, to=replace(TO, incarnation="a/b")),
        replace(GIVEN, version=1),
    ],
)
def test_a_lock_that_cannot_be_is_not_read(changed: Lock) -> None:
    """Nobody acts on half of a move."""
    assert Lock.from_json(changed.to_json()) is None


def test_what_is_newer_is_told_from_what_is_damaged() -> None:
    """A person mends what is damaged, and waits for a release that reads what is newer."""
    claims = {
        data: view(lock=LockView(known=True, data=data, mod_revision=3, as_of=9)).claim
        for data in (b"?", b"{}", b'{"version":"3"}', b'{"version":2}', b'{"version":3,"state":"sold"}')
    }
    assert [*claims.values()] == [*(Claim.UNREADABLE,) * 3, Claim.NEWER, Claim.NEWER]


def test_who_takes_the_lock_of_a_move_fences_both_sides() -> None:
    """Law 4: the target's QEMU may have the disks open, too."""
    assert take_from(MOVING).fence == (*HERE.clients, *TO.clients)
    assert take_from(GIVEN).fence == (*THEIRS.clients, *COMES.clients)
    assert take_from(MOVING).state is LockState.FENCING
    closed = take(MOVING, host=ME, boot_id=BOOT, facts="/f", incarnation="z", storage=Storage.RBD, closed=True)
    assert closed.fence == TO.clients


def test_the_handover_is_of_the_target_and_of_a_later_epoch() -> None:
    """Law 13: the lock names the target's QEMU, and what is to be fenced of the source."""
    assert (GIVEN.host, GIVEN.incarnation, GIVEN.epoch) == (ME, "x", THEIRS.epoch + 1)
    assert GIVEN.fence == THEIRS.clients
    assert GIVEN.clients == COMES.clients
    assert Change.GIVE.allows(COMING_LOCK, GIVEN)
    assert not Change.GIVE.allows(THEIRS, GIVEN)
    assert not Change.ARRIVE.allows(COMING_LOCK, arrived(GIVEN))


def test_a_qemu_that_waits_takes_no_lock_for_an_older_one() -> None:
    """Laws 11 and 13: an earlier release that finds it here ends it; it does not write the lock anew."""
    found = replace(coming(), incarnation=replace(coming().incarnation, incoming=False))
    decision = decide(at_target(THEIRS, found))
    assert (decision.row, decision.action) == (Row.LOCK_LOST, Action.KILL)
    assert goal(at_target(THEIRS, found))[0].value == "run"


def test_both_rules_stand_in_one_place() -> None:
    """Law 13: `GO_BACK` and `ARRIVE` come from one row each, and `CONTINUE` never of a guest that came or was sent."""
    by_row = {decide(case).action: decide(case).row for _, _, case, *_ in TABLE}
    assert by_row[Action.GO_BACK] is Row.MOVE_BACK
    assert by_row[Action.ARRIVE] is Row.ARRIVE
    assert Action.CONTINUE not in by_row
    assert Era().has(None, 1)
