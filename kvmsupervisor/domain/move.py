"""A live move (law 13) as decisions: what the source and the target do next, by the lock and their own QEMU. Pure.

Source and target never ask each other who has the guest: the lock says so, and only its holder writes it.

| lock | QEMU at the source | QEMU at the target | the source | the target |
| --- | --- | --- | --- | --- |
| running, source's | runs | none | asks for a QEMU there | offers, receives |
| running, source's | runs | waits | announces it in the lock | tells of it; ends it once it is useless |
| migrating | runs, nothing sent | waits | sends | waits |
| migrating | sends | waits | watches; cancels | waits |
| migrating | pre-switchover: stopped | waits | asks etcd, then goes on; else cancels at once | waits |
| migrating | device | any | waits; cuts after a while | waits |
| migrating | completed | any | hands over; calls off where that is refused | waits |
| migrating | failed, cancelled: runs by itself | any | calls off | ends it once the lock says so |
| migrating | dead | any | takes its lock anew, or lets go of it | ends it once the lock says so |
| migrating, source's host gone | any | any | – | ends it, then takes over cold (law 4) |
| running, source's | sends | any | cancels |  – |
| running, source's | stands still after all that | any | lets it go on | ends it |
| given to the target | stands still | has all of it | ends it | lets it go on |
| given to the target | any | dead | ends it | starts it cold, fences first |

Two rules keep a guest from running twice, each in one place here. The source lets its guest go on only under a lock
that is `running` and its own (`MOVE_BACK`): so it was called off, and no late hand-over can come. The target lets it go
on only under a lock that is `given` to that very QEMU (`ARRIVE`). Steps may be cut anywhere: each is decided again from
what is observed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from kvmsupervisor.domain.changes import unsettled
from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.goal import Goal, goal, order, where_else
from kvmsupervisor.domain.lock import Claim, Destination, Lock, LockState
from kvmsupervisor.domain.ownership import LOCK_POLL_S, by_its_lock
from kvmsupervisor.domain.run_state import PAUSED, POSTMIGRATE, RUNNING
from kvmsupervisor.domain.spec import Power
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.transfer import Link, Stage
from kvmsupervisor.domain.view import Action, Haste, Process, View
from kvmsupervisor.domain.waiting import when, with_etcd

# --- at the source --------------------------------------------------------------------------------------------


def source(view: View, process: Process) -> Decision | None:
    """What a live move asks of the host that has the guest; None where other rows decide."""
    lock = view.lock.lock
    if view.claim is Claim.UNKNOWN and _is_to_go(view):
        # It may be under way: an earlier supervisor has begun it.
        reason = f"{_where(view)}; its lock has not been read yet"
        return Decision(row=Row.MOVE_UNREAD, phase=Phase.RUNNING, reason=reason)
    if lock is None or view.claim not in {Claim.MINE, Claim.RENAMED}:
        return None
    if process.stage is Stage.DONE and process.run_state != POSTMIGRATE:
        # That is how its guest came here. QEMU tells of it until it sends that on.
        process = replace(process, stage=Stage.IDLE)
    if lock.to is not None:
        return _under_way(view, process, lock.to)
    if view.claim is Claim.RENAMED or lock.state is not LockState.RUNNING:
        return None
    if process.stage in {Stage.ACTIVE, Stage.SWITCHOVER}:
        # Its reply was lost: the move is called off, and was begun all the same.
        return _cancel(view, "its guest is being sent, and its lock names no target: that is cancelled")
    if process.stage is Stage.DEVICE:
        reason = "the rest of its guest is being sent, and its lock names no target"
        return Decision(row=Row.MOVE_WATCH, phase=Phase.MIGRATING, reason=reason, wake_at=process.probe_at)
    if process.run_state == POSTMIGRATE and not process.incarnation.paused:
        return _back(view, process)
    return _begin(view, process)


def _under_way(view: View, process: Process, to: Destination) -> Decision:
    """The lock says `migrating`, and is ours."""
    course, phase = view.course, Phase.MIGRATING
    why_not = _why_not(view, to)
    said = f"it moves to {to.host}" if why_not is None else f"its move to {to.host} is called off: {why_not}"
    if (asked := _ask(view, process, said)) is not None:
        return asked
    goes_on = why_not is None and view.claim is Claim.MINE
    match process.stage:
        case Stage.IDLE if goes_on and course.link is Link.OPEN:
            reason = f"{said}: its memory is about to be transferred"
            return Decision(row=Row.MOVE_SEND, phase=phase, reason=reason, action=Action.SEND)
        case Stage.ACTIVE | Stage.SWITCHOVER if not goes_on or course.link is not Link.IN_USE:
            return _cancel(
                view, said if why_not else f"{said}, but {course.trouble or _LOST}: the transfer is cancelled"
            )
        case Stage.ACTIVE if view.now >= course.give_up_at:
            return _cancel(view, f"{said}, but {course.why_give_up}: the transfer is cancelled")
        case Stage.SWITCHOVER if not view.session_held:
            return _cancel(view, f"{said}, but etcd is away: the transfer is cancelled")
        case Stage.SWITCHOVER:
            reason = f"{said}: its guest is stopped for the rest of the transfer"
            return Decision(row=Row.MOVE_SWITCH, phase=phase, reason=reason, action=Action.SWITCH)
        case Stage.DEVICE if course.link is Link.IN_USE and view.now >= course.give_up_at:
            reason = f"{said}, but {course.why_give_up}: the connection is cut, and the guest goes on here"
            return Decision(row=Row.MOVE_CUT, phase=phase, reason=reason, action=Action.CUT)
        case Stage.ACTIVE | Stage.DEVICE:
            wake_at = min(course.give_up_at, process.probe_at) if course.link is Link.IN_USE else process.probe_at
            return Decision(row=Row.MOVE_WATCH, phase=phase, reason=said, wake_at=wake_at)
        case Stage.DONE if goes_on and not course.refused:
            return with_etcd(view, Row.MOVE_GIVE, Action.GIVE, phase, f"{said}: it is handed over")
        case Stage.DONE | Stage.IDLE:
            failed = "etcd has refused the hand-over" if course.refused else course.trouble or _LOST
            reason = said if why_not else f"its move to {to.host} came to nothing: {failed}; it goes on here"
            return with_etcd(view, Row.MOVE_CALL_OFF, Action.CALL_OFF, phase, reason)
        case Stage.UNKNOWN:
            raise AssertionError("it is asked before")
        case _:
            assert_never(process.stage)


_LOST = "the connection to the target was lost"


def _cancel(view: View, reason: str) -> Decision:
    return Decision(row=Row.MOVE_CANCEL, phase=Phase.MIGRATING, reason=reason, action=Action.CANCEL)


def _why_not(view: View, to: Destination) -> str | None:
    """Why a move that is under way is not to go on; None while it is."""
    wish = view.wish
    if (ordered := order(view)) is not None:
        return ordered
    if wish is None or view.held:
        return goal(view)[1]
    if wish.runs_on != to.host:
        return "its keys were removed" if wish.keys == 0 else f"its `host` is {wish.runs_on or 'gone'}"
    if wish.power is not Power.ON:
        return "`power` is off"
    if not view.target.receives:
        return f"{to.host} has no session any more" if not view.target.drains else f"{to.host} takes nobody in any more"
    return None


def stranded(view: View, process: Process) -> Decision | None:
    """Wait for a person where a guest was sent, and its lock is older than the history that etcd has now.

    It may have been handed over in the history that is lost: then it runs elsewhere, and the lock does not tell.
    """
    lock = view.lock.lock
    if lock is None or process.run_state != POSTMIGRATE or process.incarnation.paused:
        return None
    if view.claim not in {Claim.MINE, Claim.RENAMED} or view.era.has(lock.history, view.lock.mod_revision):
        return None
    reason = (
        "its guest was sent to another host, and etcd has another history since: whether it was handed over is not "
        "known, so it does not go on here; once nothing of it runs elsewhere, restart it"
    )
    return Decision(row=Row.MOVE_LEFT, phase=Phase.RUNNING, reason=reason)


def _back(view: View, process: Process) -> Decision:
    """Its guest was sent, and not handed over: the lock is `running`, and ours."""
    reason = "its guest was not handed over: it goes on here"
    if (asked := _ask(view, process, reason)) is not None:
        return asked
    # The source's rule.
    return Decision(row=Row.MOVE_BACK, phase=Phase.MIGRATING, reason=reason, action=Action.GO_BACK)


def _is_to_go(view: View) -> bool:
    """Whether its keys want it on another host, which is there, and nobody wants it stopped."""
    wish = view.wish
    if wish is None or view.held or order(view) is not None or view.haste is not Haste.NONE:
        return False
    elsewhere = wish.host is not None and wish.is_elsewhere(view.me) and view.target.receives
    return elsewhere and wish.power is Power.ON and view.course.cold != ""


def and_why_cold(view: View, why: str) -> str:
    """`why` a guest is stopped; and, where it goes to another host, why it could not be moved live."""
    return (
        f"{why}, and it cannot be moved while it runs: {view.course.cold}"
        if _is_to_go(view) and view.course.cold
        else why
    )


def _where(view: View) -> str:
    assert view.wish is not None
    return where_else(view.wish)


def _begin(view: View, process: Process) -> Decision | None:
    """Its guest runs here, under a lock that is ours and tells of no move."""
    course = view.course
    if not _is_to_go(view) or process.stopping is not None or process.run_state not in {RUNNING, PAUSED}:
        return None
    if course.cold is not None and not course.only_live:
        return None
    where = _where(view)
    # What is tried again and again is said once.
    waits = None if course.trouble is None or course.ready is not None else f"{where}; {course.trouble}"
    phase = Phase.MIGRATING if waits is None else Phase.RUNNING
    if (asked := _ask(view, process, waits or where, phase)) is not None:
        return asked
    if course.cold is not None:
        reason = f"{where}, but it cannot be moved while it runs: {course.cold}; it stays here (KVM_MIGRATION=live)"
        return Decision(row=Row.MOVE_REFUSED, phase=Phase.RUNNING, reason=reason, wake_at=process.probe_at)
    if view.session_held and (at := unsettled(view, process)) is not None:
        reason, at = f"{where}, once the change of its machine has come to its end", max(at, view.etcd_at)
        return when(view, Row.MOVE_UNSETTLED, Action.CHANGE, Phase.RUNNING, reason, at=at)
    if view.now < course.again_at:
        reason = waits or f"{where}; that is tried again in a moment"
        wake_at = min(course.again_at, process.probe_at)
        return Decision(row=Row.MOVE_LATER, phase=Phase.RUNNING, reason=reason, wake_at=wake_at)
    if course.ready is not None and course.link is Link.OPEN:
        reason = f"it moves to {course.ready.host}: the QEMU there is ready"
        return with_etcd(view, Row.MOVE_ANNOUNCE, Action.ANNOUNCE, Phase.MIGRATING, reason)
    reason = waits or f"{where}: that host makes ready for it"
    return with_etcd(view, Row.MOVE_CALL, Action.CALL, phase, reason)


def _ask(view: View, process: Process, reason: str, phase: Phase = Phase.MIGRATING) -> Decision | None:
    """Connect to QEMU, and ask it how far it has come, where that is due; None where it is known."""
    if not process.connected:
        said = f"{reason}; QEMU does not answer" if process.silent_since is not None else reason
        return when(view, Row.MOVE_CONNECT, Action.CONNECT, phase, said, at=process.connect_at)
    if process.stage is Stage.UNKNOWN or view.now >= process.probe_at:
        return Decision(row=Row.MOVE_PROBE, phase=phase, reason=reason, action=Action.PROBE)
    return None


# --- at the target --------------------------------------------------------------------------------------------


def offer(view: View) -> Decision | None:
    """What the host where the guest is to run does while another one holds its lock; None: it waits."""
    lock, course = view.lock.lock, view.course
    if lock is None or lock.state is not LockState.RUNNING or not course.receives:
        return None
    reason = f"{lock.host} holds its lock (epoch {lock.epoch}) and moves it here"
    if course.called and view.now >= course.again_at:
        return Decision(row=Row.RECEIVE, phase=Phase.WAITING, reason=reason, action=Action.RECEIVE)
    if course.offered or view.now < course.again_at:
        said = reason if course.trouble is None else f"{reason}; {course.trouble}"
        wake_at = course.again_at if view.now < course.again_at else None
        return Decision(row=Row.OFFERED, phase=Phase.WAITING, reason=said, wake_at=wake_at)
    return with_etcd(view, Row.OFFER, Action.OFFER, Phase.WAITING, reason)


def is_targets(view: View, process: Process) -> bool:
    """Whether a QEMU came here for another host's guest, and is not this host's own yet."""
    lock = view.lock.lock
    given = lock is not None and lock.state is LockState.GIVEN and view.claim is Claim.MINE
    return process.incarnation.incoming or given


def target(view: View, process: Process) -> Decision:
    """What a live move asks of the host whose QEMU waits for the guest, or has it and has not gone on with it."""
    lock, claim = view.lock.lock, view.claim
    if claim is Claim.RENAMED and (ruled := by_its_lock(view, process)) is not None:
        return ruled
    if claim is Claim.MINE and lock is not None and lock.state in {LockState.GIVEN, LockState.RUNNING}:
        return _arriving(view, process, lock)
    if claim in {Claim.UNKNOWN, Claim.UNREADABLE, Claim.RENAMED}:
        reason = f"QEMU waits here for its guest; its lock {claim.value}"
        return Decision(row=Row.COMING_LOCKLESS, phase=Phase.WAITING, reason=reason, wake_at=view.now + LOCK_POLL_S)
    own = process.incarnation.incarnation
    is_announced = lock is not None and lock.to is not None and lock.to.incarnation == own
    why = _why_useless(view, lock, is_announced=is_announced)
    if why is not None:
        reason = f"the QEMU that waits here for its guest is ended: {why}"
        return Decision(
            row=Row.COMING_END,
            phase=Phase.WAITING,
            reason=reason,
            action=Action.KILL,
            wake_at=view.now + LOCK_POLL_S,
        )
    assert lock is not None
    said = f"it comes from {lock.host}"
    if not process.connected:
        return when(view, Row.COMING_CONNECT, Action.CONNECT, Phase.WAITING, said, at=process.connect_at)
    if not is_announced and not view.course.told:
        return with_etcd(view, Row.COMING_TELL, Action.TELL, Phase.WAITING, said)
    wake_at = None if is_announced else min(view.course.give_up_at, view.now + LOCK_POLL_S)
    return Decision(row=Row.COMING_WAIT, phase=Phase.WAITING, reason=said, wake_at=wake_at)


def _why_useless(view: View, lock: Lock | None, *, is_announced: bool) -> str | None:
    """Why the guest that a QEMU waits for will not come; None while it may."""
    if lock is None or view.claim is not Claim.STRANGER:
        return "its lock was let go of, or is another's"
    if view.holder_has_session is False:
        return f"{lock.host}, which had the guest, is gone"
    if is_announced:
        # The source has written it, and takes it back, or hands over.
        return None
    if lock.state is not LockState.RUNNING:
        return "its lock names another one, or none"
    if view.wish is not None and view.wish.is_elsewhere(view.me):
        return where_else(view.wish)
    aim, why = goal(view)
    if aim is not Goal.RUN:
        return why
    if view.course.link is Link.NONE:
        return view.course.trouble or f"{lock.host} has hung up"
    return view.course.why_give_up if view.now >= view.course.give_up_at else None


def _arriving(view: View, process: Process, lock: Lock) -> Decision:
    """The lock gives the guest to this very QEMU."""
    if lock.state is LockState.RUNNING:
        reason = "it has come, and is on record as one that waits for its guest"
        return Decision(row=Row.ARRIVED, phase=Phase.MIGRATING, reason=reason, action=Action.SETTLE)
    said, phase = f"it has come from {lock.taken_from}", Phase.MIGRATING
    if not process.connected:
        return when(view, Row.ARRIVING_CONNECT, Action.CONNECT, phase, said, at=process.connect_at)
    stays_paused = lock.paused and not process.incarnation.incoming and process.run_state == PAUSED
    if process.run_state == RUNNING or stays_paused:
        return with_etcd(view, Row.SETTLE, Action.SETTLE, phase, said)
    if process.stage is Stage.DONE:
        # The target's rule.
        return Decision(row=Row.ARRIVE, phase=phase, reason=f"{said} and goes on here", action=Action.ARRIVE)
    # A supervisor that has just come has not asked yet, and its guest may stand still for that.
    is_new = process.stage is Stage.UNKNOWN and process.silent_since is None
    at = view.now if is_new else process.probe_at
    return when(view, Row.ARRIVING_PROBE, Action.PROBE, phase, f"{said}; QEMU is loading the rest", at=at)
