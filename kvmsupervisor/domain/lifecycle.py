"""The life of an instance as one pure decision: what is observed → what to do next.

`decide` looks at a `View` and names the phase, the reason for people, and at most one `Action`. The instance's loop
(`instance/worker.py`) acts, observes again and decides again. All that a decision needs can be observed: a supervisor
may be cut off between any two steps, or in the middle of one, and its successor goes on.

The decision table is `decision.Row`; each `Decision` names the row that it came from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from kvmsupervisor.domain import changes, errands, move
from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.doubt import asked_just_now, is_in_doubt, unless_it_runs
from kvmsupervisor.domain.goal import Goal, goal, order
from kvmsupervisor.domain.hands_off import hands_off
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Claim, LockState, Storage
from kvmsupervisor.domain.ownership import LOCK_POLL_S, by_its_lock, for_other_hosts
from kvmsupervisor.domain.reasons import told, while_it_runs
from kvmsupervisor.domain.restart import pauses
from kvmsupervisor.domain.run_state import POWERED_OFF
from kvmsupervisor.domain.spec import Request, Wish
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.stopping import power_off, stop
from kvmsupervisor.domain.storage import images_of
from kvmsupervisor.domain.view import Action, Process, View
from kvmsupervisor.domain.waiting import etcd_trouble, when, with_etcd

PROBE_EVERY_S = 60.0
"""How often to ask a running QEMU whether it still answers. A frozen one is reported, never killed for it. Each
question costs 1 ms of processor: with a hundred machines this is most of what an idle supervisor uses."""

SLOT_S = 5.0
"""How long a QEMU that does not answer keeps its start slot. A hundred times what it needs on a quiet host
(docs/reliability.md); on a host so slow that all need longer, a few more start at once, which is no worse."""


def decide(view: View) -> Decision:
    """Decide what is next. Pure and total; the table is `decision.Row`."""
    if (untouched := hands_off(view)) is not None:
        return untouched
    if view.process is None:
        return _without_process(view)
    if view.process.exit is not None and view.wish is None:
        # The policy, which is in the keys, says what follows an end.
        reason = f"QEMU {view.process.exit.text}; its keys have not been read yet, since this supervisor started"
        return Decision(row=Row.END_UNREAD, phase=Phase.WAITING, reason=reason)
    if view.process.exit is not None:
        reason = f"QEMU {view.process.exit.text}"
        return Decision(row=Row.END, phase=Phase.STOPPING, reason=reason, action=Action.RECORD_EXIT)
    return _with_process(view, view.process)


def _with_process(view: View, process: Process) -> Decision:
    if move.is_targets(view, process):
        return move.target(view, process)
    if (left := move.stranded(view, process)) is not None:
        return left
    if (ruled := by_its_lock(view, process)) is not None:
        return ruled
    if process.never_ran:
        return _before_it_runs(view, process)
    return _under_guard(view, move.source(view, process) or _while_it_runs(view, process))


def _before_it_runs(view: View, process: Process) -> Decision:
    """QEMU lives, its guest has never run: killing it costs nothing."""
    aim, why = goal(view)
    if (view.wish is None or view.held) and order(view) is None:
        return Decision(row=Row.PAUSED_KEEP, phase=Phase.STARTING, reason=f"QEMU is ready and paused; {why}")
    if aim is not Goal.RUN:
        return Decision(
            row=Row.PAUSED_UNWANTED,
            phase=Phase.STOPPING,
            reason=f"{why}; its guest has not run yet",
            action=Action.KILL,
        )
    assert view.wish is not None  # without a wish the goal is to keep it, or to stop it
    if process.spec != view.wish.spec or process.incarnation.restart_request != view.wish.restart_request:
        return Decision(
            row=Row.PAUSED_CHANGED,
            phase=Phase.STARTING,
            reason="its keys changed before its guest ran: QEMU starts again",
            action=Action.KILL,
        )
    if view.rival is not None:
        return Decision(
            row=Row.PAUSED_RIVAL,
            phase=Phase.WAITING,
            reason=view.rival,
            action=Action.KILL,
            wake_at=view.now + LOCK_POLL_S,
        )
    give_up_at = process.incarnation.spawned_at + view.start_timeout_s
    if not process.connected:
        if view.now >= give_up_at:
            return Decision(
                row=Row.PAUSED_SILENT,
                phase=Phase.STARTING,
                reason=f"QEMU has not answered on QMP for {view.start_timeout_s:g} s: it is killed",
                action=Action.GIVE_UP,
            )
        # Its own time limit goes on; others need not wait for a silent QEMU.
        slot_until = process.incarnation.spawned_at + SLOT_S
        slot = view.now < slot_until
        next_at = min(slot_until, give_up_at) if slot else give_up_at
        said, at = "QEMU is starting", process.connect_at
        due = when(view, Row.PAUSED_CONNECT, Action.CONNECT, Phase.STARTING, said, at=at, or_at=next_at)
        return replace(due, slot=slot)
    lock = view.lock.lock
    if view.claim is not Claim.MINE or lock is None:
        return Decision(
            row=Row.PAUSED_LOCKLESS,
            phase=Phase.WAITING,
            reason=f"QEMU is ready and paused; its lock {view.claim.value}: {etcd_trouble(view)}",
            wake_at=view.now + LOCK_POLL_S,
        )
    if view.now < view.quiet_at:
        return Decision(
            row=Row.PAUSED_UNQUIET,
            phase=Phase.STARTING,
            reason="QEMU is ready; its keys may still be changing",
            wake_at=view.quiet_at,
        )
    is_there = lock.state is LockState.RUNNING and lock.pid == process.incarnation.pid
    # The lock of one that did not answer may have been written again as that of a guest that runs: without its clients.
    has_images = process.spec is not None and bool(images_of(process.spec))
    if not is_there or (has_images and not lock.clients):
        said = "QEMU is ready and paused until it is on record"
        return with_etcd(view, Row.RECORD, Action.RECORD, Phase.STARTING, said)
    if view.guarded is False:
        said, phase = "QEMU is ready and paused until its guard watches it", Phase.STARTING
        if view.guard_trouble is not None:
            said, phase = f"{said}: {view.guard_trouble}", Phase.WAITING
        return when(view, Row.PAUSED_GUARD, Action.GUARD, phase, said, at=view.guard_at)
    return Decision(row=Row.CONTINUE, phase=Phase.STARTING, reason="its guest starts to run", action=Action.CONTINUE)


def _under_guard(view: View, decision: Decision) -> Decision:
    """`decision`, once the guard watches a process that runs: only a forced end goes first."""
    if view.guarded is not False or decision.action in {Action.FINISH, Action.QUIT, Action.KILL}:
        return decision
    if view.now >= view.guard_at:
        return replace(decision, row=Row.RUNS_GUARD, action=Action.GUARD, wake_at=None)
    if decision.action is not None:
        return decision
    return replace(decision, wake_at=min(view.guard_at, decision.wake_at or view.guard_at))


def _while_it_runs(view: View, process: Process) -> Decision:
    """The guest runs, or may have run."""
    if process.run_state == POWERED_OFF and (over := power_off(view, process)) is not None:
        return over
    aim, why = goal(view)
    wish = view.wish
    restart = _asks_for_restart(view, process, aim)
    if restart and wish is not None and wish.request is Request.RESET:
        restart = False
        if process.connected:
            reason = "a reset was asked for"
            return Decision(row=Row.RESET, phase=Phase.RUNNING, reason=reason, action=Action.RESET)
    if aim is Goal.STOP or restart:
        return stop(view, process, "a restart was asked for" if restart else move.and_why_cold(view, why))
    if not process.connected:
        reason = "runs, but QEMU does not answer on QMP" if process.silent_since else "runs; QMP is being connected"
        return when(view, Row.RUNS_CONNECT, Action.CONNECT, Phase.RUNNING, reason, at=process.connect_at)
    tidy = _has_to_tidy(view, aim)
    reason = while_it_runs(view, process, aim, why)
    if view.now >= process.probe_at:
        return Decision(row=Row.RUNS_PROBE, phase=Phase.RUNNING, reason=reason, action=Action.PROBE)
    if tidy and view.session_held and view.now >= view.etcd_at:
        return Decision(row=Row.RUNS_TIDY, phase=Phase.RUNNING, reason=reason, action=Action.TIDY)
    chores = (
        (Row.RUNS_PLUG, Action.PLUG, process.plug_at),
        (Row.RUNS_MEDIUM, Action.MEDIUM, process.medium_due(wish if aim is Goal.RUN else None)),
        (Row.RUNS_CHANGE, Action.CHANGE, changes.due(view, process, aim)),
        (Row.RUNS_SNAPSHOT, Action.SNAPSHOT, errands.due_at(view, process, aim)),
        (Row.RUNS_GROW, Action.GROW, process.grow_at),
        (Row.RUNS_ROOM, Action.ROOM, process.room_at),
    )
    for row, action, at in chores:
        if view.now >= at:
            return Decision(row=row, phase=Phase.RUNNING, reason=reason, action=action)
    next_at = min(process.probe_at, *(at for *_, at in chores))
    again_at = min(next_at, view.etcd_at) if tidy or view.claim is Claim.ABSENT or view.is_outdated else next_at
    wake_at = again_at if again_at > view.now else next_at
    return Decision(row=Row.RUNS, phase=Phase.RUNNING, reason=reason, wake_at=wake_at)


def _asks_for_restart(view: View, process: Process, aim: Goal) -> bool:
    """Whether its keys ask for a restart, or a reset, that it has not had."""
    if aim is not Goal.RUN or view.wish is None or view.wish.restart_request is None:
        return False
    return view.wish.restart_request not in {process.incarnation.restart_request, view.saved.restart_seen}


def _has_to_tidy(view: View, aim: Goal) -> bool:
    """Whether this host, which runs it, has to delete a placement that has ended (law 10)."""
    wish = view.wish
    if wish is None or not wish.stale_placement or aim is not Goal.RUN:
        return False
    return view.claim is Claim.MINE and not view.stays


def _without_process(view: View) -> Decision:
    aim, why = goal(view)
    claim = view.claim
    if (errand := errands.at_rest(view, aim, why)) is not None:
        return errand
    if aim is not Goal.RUN:
        return _at_rest(view, aim, why, claim)
    if (held_up := _closed(view) or _in_time(view) or _share(view)) is not None:
        return held_up
    match claim:
        case Claim.UNKNOWN:
            reason = f"its lock has not been read yet: {etcd_trouble(view)}"
            return Decision(row=Row.UNKNOWN, phase=Phase.WAITING, reason=reason)
        case Claim.UNREADABLE | Claim.NEWER:
            return _unreadable(claim)
        case Claim.STRANGER:
            return _held_elsewhere(view)
        case Claim.BROKEN:
            return _broken(view)
        case Claim.ABSENT if view.claimed_by is not None:
            return Decision(
                row=Row.CLAIMED,
                phase=Phase.WAITING,
                reason=f"its lock was deleted, but its status says that it runs on {view.claimed_by}; waits for "
                f"{view.claimed_by} to say otherwise (if that host is gone for good, delete the status key)",
                action=Action.LOOK if view.now >= view.etcd_at and view.session_held else None,
                wake_at=max(view.etcd_at, view.now + LOCK_POLL_S),
            )
        case Claim.ABSENT | Claim.LEFTOVER | Claim.RENAMED:
            return _take(view, Row.TAKE, Phase.STARTING, "its lock is being taken")
        case Claim.MINE:
            lock = view.lock.lock
            assert lock is not None
            if lock.state is LockState.FENCING:
                said = "earlier incarnations are being fenced"
                return with_etcd(view, Row.FENCE, Action.FENCE, Phase.WAITING, said)
            ready = Decision(row=Row.SPAWN, phase=Phase.STARTING, reason="QEMU is being started", action=Action.SPAWN)
            return _in_turn(view, ready)
        case _:
            assert_never(claim)


def _unreadable(claim: Claim) -> Decision:
    said = "holds what this release cannot read, so it" if claim is Claim.UNREADABLE else f"{claim.value}, which"
    reason = f"its lock {said} counts as held; once no host runs it, delete that key"
    return Decision(row=Row.UNREADABLE, phase=Phase.WAITING, reason=reason)


def _in_time(view: View) -> Decision | None:
    """Wait for other hosts, or after an end."""
    long = for_other_hosts(view) or _pause(view)
    return None if long is None else told(view, long)


def _pause(view: View) -> Decision | None:
    """Wait after an unrequested end."""
    if view.wish is None or not pauses(view.saved, view.wish, view.now):
        return None
    return Decision(
        row=Row.BACKOFF,
        phase=Phase.BACKOFF,
        reason=f"QEMU {view.saved.last_exit}; it is started again after a pause of {view.saved.pause_s:.1f} s",
        wake_at=view.saved.not_before,
    )


def _share(view: View) -> Decision | None:
    """Wait while another instance has one of its images, and hold no lock meanwhile; see `instance/sharing.py`."""
    if view.rival is None:
        return None
    lock = view.lock.lock
    if lock is not None and view.claim in {Claim.MINE, Claim.RENAMED, Claim.LEFTOVER}:
        if lock.is_unfenced:
            return with_etcd(view, Row.SHARE_FENCE, Action.FENCE, Phase.WAITING, view.rival)
        return with_etcd(view, Row.SHARE_RELEASE, Action.RELEASE, Phase.WAITING, view.rival)
    if view.claim is not Claim.ABSENT:
        return None
    due = with_etcd(view, Row.SHARE_ASK, Action.ASK, Phase.WAITING, view.rival)
    if due.action is None or view.now >= view.ask_at:
        return due
    return told(view, replace(due, action=None, wake_at=view.ask_at))


def _closed(view: View) -> Decision | None:
    """Start nothing on a host that drains, and hold no lock meanwhile: another host may start it."""
    lock, why = view.lock.lock, view.clearing.closed
    if why is None:
        return None
    if lock is not None and view.claim in {Claim.MINE, Claim.RENAMED, Claim.LEFTOVER}:
        if lock.is_unfenced:
            return with_etcd(view, Row.CLOSED_FENCE, Action.FENCE, Phase.WAITING, why)
        return with_etcd(view, Row.CLOSED_RELEASE, Action.RELEASE, Phase.WAITING, why)
    return told(view, Decision(row=Row.CLOSED, phase=Phase.WAITING, reason=why))


def _at_rest(view: View, aim: Goal, why: str, claim: Claim) -> Decision:
    """No process, and none wanted."""
    if view.wish is None:
        return Decision(row=Row.REST_UNREAD, phase=Phase.WAITING, reason=why)
    phase = Phase.INVALID if aim is Goal.KEEP and view.problems else Phase.STOPPED
    if claim is Claim.UNKNOWN:
        return Decision(row=Row.REST_UNKNOWN, phase=phase, reason=f"{why}; its lock has not been read yet")
    lock = view.lock.lock
    ours = claim in {Claim.MINE, Claim.RENAMED, Claim.LEFTOVER}
    if lock is not None and (ours or (claim is Claim.BROKEN and lock.host == view.me)):
        if lock.is_unfenced:
            # Releasing the lock would lose the addresses that are to be fenced.
            said = f"{why}; its earlier QEMUs are being fenced"
            return with_etcd(view, Row.REST_FENCE, Action.FENCE, phase, said)
        return with_etcd(view, Row.REST_RELEASE, Action.RELEASE, phase, why)
    is_theirs = claim is Claim.STRANGER and view.is_namesakes
    if is_theirs:
        # Its QEMU may live there, and its status has this name.
        why += f"; another machine under the name {view.me} has taken its lock, which is left alone"
    if aim is Goal.STOP and view.wish.stale_placement and _is_placed_by_us(view.wish, view.me):
        return with_etcd(view, Row.REST_TIDY, Action.TIDY, phase, why)
    left = view.leaving is not None or view.wish.keys == 0 or view.wish.runs_on != view.me
    if left and not is_theirs and (aim is Goal.STOP or view.wish.placed.is_damaged):
        return Decision(row=Row.FORGET, phase=Phase.STOPPED, reason=why, action=Action.FORGET)
    if claim is Claim.ABSENT and not view.looked:
        # Keep what another host wrote there: its last epoch, its machine type.
        return with_etcd(view, Row.REST_LOOK, Action.LOOK, phase, why)
    return errands.with_trouble(view, Decision(row=Row.REST, phase=phase, reason=why))


def _is_placed_by_us(wish: Wish, me: HostName) -> bool:
    """Whether this host has to delete a placement that has ended: it was placed here, or its keys are gone."""
    placement = wish.placed.placement
    return wish.keys == 0 or wish.runs_on == me or (placement is not None and placement.host == me)


def _held_elsewhere(view: View) -> Decision:
    """Another host's lock. If that host has no session, take over what can be fenced, or has nothing to protect."""
    lock = view.lock.lock
    assert lock is not None
    assert view.wish is not None
    if not lock.is_seen_from(view.facts):
        return Decision(
            row=Row.HELD_UNSEEN,
            phase=Phase.WAITING,
            reason=f"{lock.host} took its lock (epoch {lock.epoch}) with KVM_FACTS_PREFIX={lock.facts}; this host has "
            f"{view.facts}, so it cannot see whether {lock.host} lives: give both the same; if {lock.host} is gone for "
            f"good, say so by `kvmsupervisor break-lock {view.wish.instance}`",
        )
    if view.holder_has_session is not False:
        if (coming := move.offer(view)) is not None:
            return coming
        return Decision(
            row=Row.HELD,
            phase=Phase.WAITING,
            reason=f"{lock.host} holds its lock (epoch {lock.epoch}); waits until {lock.host} has stopped it",
        )
    holder = f"another machine under the name {lock.host}" if view.is_namesakes else lock.host
    if lock.storage is Storage.NONE:
        return _take(view, Row.TAKE_HARMLESS, Phase.WAITING, f"{holder} is gone; its lock is taken over")
    held = f"{holder} holds its lock (epoch {lock.epoch}) and has no session"
    if lock.storage is Storage.UNFENCEABLE:
        return Decision(
            row=Row.UNFENCEABLE,
            phase=Phase.WAITING,
            reason=f"{held}; what it may write to cannot be fenced, so it waits until {holder} is back, or until "
            f"a person makes sure that it runs no more and says so: `kvmsupervisor break-lock {view.wish.instance}`",
        )
    deferral = view.deferral
    is_over = deferral is not None and (view.now >= deferral.until or deferral.watchers == ())
    if is_over or is_in_doubt(view):
        return _take(view, Row.TAKE_OVER, Phase.WAITING, f"{holder} is gone; its lock is taken over")
    if deferral is not None and deferral.watchers:
        held += (
            f", but its disks are in use ({', '.join(deferral.watchers)}), so it probably runs and has lost etcd only; "
            f"it is taken over at {deferral.told} if that stays so"
        )
    else:
        held += "; Ceph is asked whether its disks are in use"
    due = with_etcd(view, Row.ASK_WATCHERS, Action.ASK_WATCHERS, Phase.WAITING, held)
    if deferral is None or view.now >= deferral.ask_at or due.action is None:
        return due
    return replace(due, action=None, wake_at=min(deferral.ask_at, deferral.until))


def _broken(view: View) -> Decision:
    """An operator broke the lock. A holder that lives after all lets go, once it has read that."""
    lock = view.lock.lock
    assert lock is not None
    if lock.host != view.me and view.holder_has_session is not False:
        return Decision(
            row=Row.BROKEN_HELD,
            phase=Phase.WAITING,
            reason=f"its lock was broken while {lock.host} held it, and {lock.host} has a session: waits until it has "
            "let go",
        )
    said = "its lock was broken by an operator; it is being taken"
    return _take(view, Row.TAKE_BROKEN, Phase.STARTING, said)


def _take(view: View, row: Row, phase: Phase, reason: str) -> Decision:
    """Take the lock, once etcd is worth an attempt and it is this instance's turn."""
    ready = with_etcd(view, row, Action.TAKE, phase, reason)
    if ready.action is None:
        return ready
    if (doubted := unless_it_runs(view)) is not None:
        return doubted if doubted.action is not None else told(view, doubted)
    due = _in_turn(view, ready)
    return asked_just_now(view, due) if due.action is Action.TAKE else due


def _in_turn(view: View, ready: Decision) -> Decision:
    """`ready`, once disks and media are prepared and it is this instance's turn."""
    if view.obstacle is not None:
        if view.now < view.start_at:
            wait = Decision(row=Row.OBSTACLE, phase=Phase.WAITING, reason=view.obstacle, wake_at=view.start_at)
            return told(view, wait)
        # Try again without a word: otherwise a failure would take back a status that was just written.
        again = _in_turn(replace(view, obstacle=None), ready)
        return again if again.action is None else replace(again, phase=Phase.WAITING, reason=view.obstacle)
    if view.etcd_trouble is not None:
        again = _in_turn(replace(view, etcd_trouble=None), ready)
        return again if again.action is None else replace(again, phase=ready.phase, reason=ready.reason)
    if not view.prepared:
        reason = "its disks are checked, its boot media and UEFI variables prepared"
        return Decision(row=Row.PREPARE, phase=Phase.STARTING, reason=reason, action=Action.PREPARE)
    if view.slot is None:
        reason = "waits for its turn to start"
        return Decision(row=Row.QUEUE, phase=Phase.WAITING, reason=reason, action=Action.QUEUE, slot=True)
    if not view.slot:
        if view.shortage is not None:
            reason = f"waits for memory of this host: {view.shortage}"
            return told(view, Decision(row=Row.MEMORY, phase=Phase.WAITING, reason=reason, slot=True))
        reason = "waits for its turn: others are starting on this host"
        return Decision(row=Row.TURN, phase=Phase.WAITING, reason=reason, slot=True)
    return replace(ready, slot=True)
