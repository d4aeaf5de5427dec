"""What is done to a machine's disks beside running it: row by row, and never beside anything else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.domain.decision import Row
from kvmsupervisor.domain.history import Era
from kvmsupervisor.domain.incarnation import InstanceState
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.lock import LockState, LockView, Storage
from kvmsupervisor.domain.snapshots import Errand, Kind
from kvmsupervisor.domain.spec import RestartPolicy
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Action, View
from tests.domain import test_lifecycle as cases
from tests.domain.test_lifecycle import CLOSED, OFF, OTHER, WISH, locked, running, seen, view

TAKE = Errand(kind=Kind.TAKE, name="s")
ROLL = Errand(kind=Kind.ROLL_BACK, name="s", request="s:1")
BEGUN = replace(ROLL, begun=True)
LATER = replace(TAKE, at=105.0)
OURS = replace(locked(state=LockState.STARTING, pid=None), storage=Storage.RBD)
ALONE = replace(OURS, storage=Storage.UNFENCEABLE)
FENCING = replace(OURS, state=LockState.FENCING)
RENAMED = replace(locked(host=OTHER), storage=Storage.RBD)
RESTS = {
    "wish": replace(WISH, restart=RestartPolicy.NEVER),
    "saved": InstanceState(boot_id=cases.BOOT, ended=cases.ENDED),
}

TABLE: list[tuple[str, Row, View, Phase, Action | None]] = [
    ("a snapshot is taken while it runs", Row.RUNS_SNAPSHOT, view(process=running(), lock=seen(locked()), errand=TAKE), Phase.RUNNING,
     Action.SNAPSHOT),
    ("of a guest that a person has paused, too", Row.RUNS_SNAPSHOT, view(process=running(run_state="paused"), lock=seen(locked()),
     errand=TAKE), Phase.RUNNING, Action.SNAPSHOT),
    ("not of one that a disk's error has stopped", Row.RUNS, view(process=running(run_state="io-error"), lock=seen(locked()),
     errand=TAKE), Phase.RUNNING, None),
    ("not again at once", Row.RUNS, view(process=running(), lock=seen(locked()), errand=LATER), Phase.RUNNING, None),
    ("not while etcd is away: nobody knows whose it is", Row.RUNS, view(process=running(), lock=seen(locked()), errand=TAKE,
     session_held=False), Phase.RUNNING, None),
    ("a stop goes first", Row.STOP_ASK, view(process=running(), lock=seen(locked()), errand=TAKE, wish=OFF), Phase.STOPPING,
     Action.POWERDOWN),
    ("a guest that was left standing goes on whatever its keys say", Row.RUNS_SNAPSHOT, view(process=running(run_state="paused"),
     lock=seen(locked()), errand=Errand(kind=Kind.RELEASE), wish=cases.BAD, problems=cases.BAD.problems), Phase.RUNNING, Action.SNAPSHOT),
    ("law 2: a machine that is off gets its lock taken for it", Row.ERRAND_TAKE, view(wish=OFF, errand=TAKE), Phase.STOPPED, Action.TAKE),
    ("once etcd is there", Row.ERRAND_TAKE, view(wish=OFF, errand=TAKE, etcd_at=102.0), Phase.WAITING, None),
    ("so does one that has ended by itself", Row.ERRAND_TAKE, view(**RESTS, errand=TAKE), Phase.STOPPED, Action.TAKE),
    ("a lock of before is taken anew", Row.ERRAND_TAKE, view(wish=OFF, errand=TAKE, lock=seen(locked(name="y"))), Phase.STOPPED,
     Action.TAKE),
    ("under whatever name", Row.ERRAND_TAKE, view(wish=OFF, errand=TAKE, lock=seen(RENAMED), last_ended="x", planned="x"), Phase.STOPPED,
     Action.TAKE),
    ("law 4: what it may have left is fenced first", Row.ERRAND_FENCE, view(wish=OFF, errand=TAKE, lock=seen(FENCING), planned="x"),
     Phase.STOPPED, Action.FENCE),
    ("once etcd is there again", Row.ERRAND_FENCE, view(wish=OFF, errand=TAKE, lock=seen(FENCING), planned="x", etcd_at=102.0),
     Phase.WAITING, None),
    ("also of one that rests", Row.ERRAND_FENCE, view(**RESTS, errand=TAKE, lock=seen(FENCING), planned="x"), Phase.STOPPED,
     Action.FENCE),
    ("then it is done", Row.ERRAND, view(wish=OFF, errand=TAKE, lock=seen(OURS), planned="x"), Phase.STOPPED, Action.SNAPSHOT),
    ("not while etcd is away", Row.ERRAND, view(wish=OFF, errand=TAKE, lock=seen(OURS), planned="x", session_held=False), Phase.WAITING,
     None),
    ("also for one that rests", Row.ERRAND, view(**RESTS, errand=TAKE, lock=seen(OURS), planned="x"), Phase.STOPPED, Action.SNAPSHOT),
    ("law 7: a rollback needs a lock that nobody takes over", Row.ERRAND_TAKE, view(wish=OFF, errand=ROLL, lock=seen(OURS), planned="x"),
     Phase.STOPPED, Action.TAKE),
    ("with it, it is rolled back", Row.ERRAND, view(wish=OFF, errand=ROLL, lock=seen(ALONE), planned="x"), Phase.STOPPED, Action.SNAPSHOT),
    ("once nothing is to be done the lock is released", Row.REST_RELEASE, view(wish=OFF, lock=seen(ALONE), planned="x"), Phase.STOPPED,
     Action.RELEASE),
    ("after a failure, too", Row.REST_RELEASE, view(wish=OFF, errand=LATER, errand_trouble="t", lock=seen(OURS), planned="x"),
     Phase.STOPPED, Action.RELEASE),
    ("and then it is waited", Row.REST, view(wish=OFF, errand=LATER, errand_trouble="t"), Phase.STOPPED, None),
    ("a rollback that was begun is finished before a start", Row.ERRAND_TAKE, view(errand=BEGUN, slot=True), Phase.STOPPED, Action.TAKE),
    ("fences first", Row.ERRAND_FENCE, view(errand=BEGUN, planned="x", lock=seen(replace(ALONE, state=LockState.FENCING))),
     Phase.STOPPED, Action.FENCE),
    ("and goes on", Row.ERRAND, view(errand=BEGUN, planned="x", lock=seen(ALONE), slot=True), Phase.STOPPED, Action.SNAPSHOT),
    ("nothing starts meanwhile", Row.ERRAND_LATER, view(errand=replace(BEGUN, at=105.0), errand_trouble="t", slot=True), Phase.WAITING,
     None),
    ("whoever else holds it is not disturbed", Row.REST, view(wish=OFF, errand=TAKE, lock=seen(locked(host=OTHER, name="y"))),
     Phase.STOPPED, None),
    ("a machine whose status is another host's is looked at first", Row.REST_LOOK, view(wish=OFF, errand=TAKE, looked=False),
     Phase.STOPPED, Action.LOOK),
    ("a host that drains takes no lock for it", Row.REST, view(wish=OFF, errand=TAKE, clearing=CLOSED), Phase.STOPPED, None),
    ("law 11: nor does one that waits for others", Row.REST, view(wish=OFF, errand=TAKE, era=Era(number=1, awaited=(OTHER,))),
     Phase.STOPPED, None),
    ("an order of another kind goes first", Row.REST, view(wish=OFF, errand=TAKE, draining=True), Phase.STOPPED, None),
    ("a machine of another host is not touched", Row.FORGET, view(wish=replace(OFF, host=OTHER), errand=TAKE), Phase.STOPPED,
     Action.FORGET),
    ("a lock that was not read yet is waited for", Row.REST_UNKNOWN, view(wish=OFF, errand=TAKE, lock=LockView()), Phase.STOPPED, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "seen_now", "phase", "action"), [case[1:] for case in TABLE], ids=[case[0] for case in TABLE]
)
def test_row(row: Row, seen_now: View, phase: Phase, action: Action | None) -> None:
    decision = decide(seen_now)
    assert (decision.row, decision.phase, decision.action) == (row, phase, action)


def test_what_failed_is_told_and_tried_again() -> None:
    """Also where the machine is off, and nobody would look again by itself."""
    decision = decide(view(wish=OFF, errand=LATER, errand_trouble="Ceph is full"))
    assert decision.reason == "`power` is off; Ceph is full"
    assert decision.wake_at == LATER.at
    assert decide(view(process=running(), lock=seen(locked()), errand=LATER, errand_trouble="t")).wake_at == LATER.at
    assert "t" in decide(view(process=running(), lock=seen(locked()), errand=LATER, errand_trouble="t")).reason


def test_law_7_nobody_takes_over_in_the_midst_of_a_rollback() -> None:
    """Its tool is a storage client on no record, so a person has to say that it is gone."""
    theirs = replace(ALONE, host=OTHER, boot_id="boot-2", incarnation="y")
    decision = decide(view(wish=WISH, lock=seen(theirs), holder_has_session=False, slot=True))
    assert decision.row is Row.UNFENCEABLE
    assert "break-lock" in decision.reason
