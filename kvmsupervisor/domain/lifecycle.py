"""The life of an instance as one pure decision: what is observed → what to do next.

`decide` looks at a `View` and names the phase, the reason for people, and at most one `Action`. The instance's loop
(`instance/worker.py`) acts, observes again and decides again, so nothing is remembered between two decisions that
cannot be observed: a supervisor may be cut off between any two steps, or in the middle of one, and its successor goes
on.

The table, first match wins (`claim` is what the lock means to us, see `lock.Claim`):

    process   lock        goal        further                      action
    --------  ----------  ----------  ---------------------------  --------------------------
    left alone: what was left of it cannot be read                 Read, now and then, or none
    mismatch: the settings are others than those of what lives     Connect, Probe, Guard, Bury, or none (law 12)
    none      absent      run         others seek it elsewhere     none         (law 12)
    ended     any         any         keys not read yet            none
              any         any                                      Bury
    alive     stranger    any         another cluster's            as if it were ours, but never written (law 11)
              any other's any         older, never ran             Kill         (nothing to lose)
              any other's any         older, session held          Reassert     (law 11)
              any other's any         older                        as if it were ours
              stranger    any                                      Kill         (law 6)
              broken      any                                      Kill         (law 7)
              renamed     any         session held                 Rename       (law 12)
              absent      any         never ran, session held      Kill         (nothing to lose)
              absent      any         session held                 Reassert
              any         any         QMP not answering            Connect, or go down the ladder
              any         not run     guest never ran              Kill         (nothing to lose)
              mine        run         never ran, keys changed      Kill         (start again)
              mine        run         never ran, keys still moving wait until they are quiet
              any         run         never ran, another's image   Kill         (who waits holds nothing)
              mine        run         never ran, not on record     Record       (law 3)
              mine        run         never ran, not under guard   Guard        (law 7)
              mine        run         never ran, on record         Continue
              any         run         never answered in time       GiveUp
              any         any         powered itself off           Finish … Kill
              any         any         ran, not under guard         Guard, before all but the end (law 7)
              any         stop        ran                          Powerdown … Quit … Kill; at once: Quit … Kill
              any         run         ran, a new reset asked for   Reset
              mine        run         its placement has ended      Tidy         (law 10)
              any         run, keep   ran                          none, Probe, Plug, Grow, Room
    any       any         stop        the host drains: the goal is stop, whatever the keys say, read or not
    any       any         run         another host is named, and has no session: the goal is as if this one were
    none      mine/left   not run     earlier ones not fenced      Fence        (law 4)
              mine/left   not run                                  Release      (law 9)
              any         stop        its placement has ended      Tidy         (law 10)
              any         stop                                     Forget (not ours), or none
              absent      stop, keep  status not read yet          Look
              any         keep, rest                               none
              any         run         too early                    none: backoff
              mine/left   run         another's image, not fenced  Fence
              mine/left   run         another has its image        Release
              any         run         … and has it still           none: wait, or Ask
              any         run         something was missing        none: wait, or Look
              stranger    run         no session, nothing to lose  Take         (law 7)
              stranger    run         no session, RBD, not asked   Watch        (law 4)
              stranger    run         … disks in use, not too long none: wait   (law 4)
              stranger    run         … not in use, or too long    Take         (law 4)
              stranger    run                                      none: wait
              broken      run         its holder has no session    Take         (law 7)
              absent      run         another host says it runs it Look
              free/left   run         media not ready              Prepare
              free/left   run         no start slot yet            Queue
              free/left   run                                      Take
              mine        run         fence not done               Fence        (law 3)
              mine        run         media or slot given up       Prepare, Queue
              mine        run                                      Spawn
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from kvmsupervisor.domain.goal import Goal, goal, order
from kvmsupervisor.domain.hands_off import hands_off
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Claim, LockState, Storage
from kvmsupervisor.domain.ownership import LOCK_POLL_S, by_its_lock, for_other_hosts
from kvmsupervisor.domain.reasons import while_it_runs
from kvmsupervisor.domain.restart import pauses
from kvmsupervisor.domain.run_state import POWERED_OFF
from kvmsupervisor.domain.spec import Power, Request, Wish
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Action, Decision, Process, Stopping, View

POWERDOWN_EVERY_S = 5.0
"""A guest that has not yet loaded its power button's driver loses the press in silence: repeat it."""

QUIT_WAIT_S = 10.0
"""How long QEMU gets for its own `quit` (flushing disks) before SIGKILL. Arbitrary; ten times what was seen."""

PROBE_EVERY_S = 60.0
"""How often a running QEMU is asked whether it still answers. A frozen one is reported, never killed for it. Each time
costs 1 ms of processor: with a hundred machines this is most of what a resting supervisor uses."""

SLOT_S = 5.0
"""How long a QEMU that does not answer keeps others from starting. A hundred times what one needs on a quiet host
(docs/reliability.md); on a host so slow that all need longer, a few more are starting at once, which is no worse."""


def decide(view: View) -> Decision:
    """Decide what is next. Pure, total; the table is above."""
    if (untouched := hands_off(view)) is not None:
        return untouched
    if view.process is None:
        return _without_process(view)
    if view.process.exit is not None and view.wish is None:
        # What follows an end is the policy's to say, which is in the keys.
        reason = f"QEMU {view.process.exit.text}; its keys have not been read yet, since this supervisor started"
        return Decision(phase=Phase.WAITING, reason=reason)
    if view.process.exit is not None:
        return Decision(phase=Phase.STOPPING, reason=f"QEMU {view.process.exit.text}", action=Action.BURY)
    return _with_process(view, view.process)


def _with_process(view: View, process: Process) -> Decision:
    if (ruled := by_its_lock(view, process)) is not None:
        return ruled
    if process.never_ran:
        return _before_it_runs(view, process)
    return _under_guard(view, _while_it_runs(view, process))


def _before_it_runs(view: View, process: Process) -> Decision:
    """QEMU lives, its guest has never run: killing it costs nothing."""
    aim, why = goal(view)
    if (view.wish is None or view.held) and order(view) is None:
        return Decision(phase=Phase.STARTING, reason=f"QEMU is ready and paused; {why}")
    if aim is not Goal.RUN:
        return Decision(phase=Phase.STOPPING, reason=f"{why}; its guest has not run yet", action=Action.KILL)
    assert view.wish is not None  # without one there is no goal but to keep it, or to stop
    if process.spec != view.wish.spec or process.incarnation.restart_request != view.wish.restart_request:
        return Decision(
            phase=Phase.STARTING,
            reason="its keys changed before its guest ran: QEMU is started anew",
            action=Action.KILL,
        )
    if view.rival is not None:
        return Decision(phase=Phase.WAITING, reason=view.rival, action=Action.KILL, wake_at=view.now + LOCK_POLL_S)
    give_up_at = process.incarnation.spawned_at + view.start_timeout_s
    if not process.connected:
        if view.now >= give_up_at:
            return Decision(
                phase=Phase.STARTING,
                reason=f"QEMU has not answered on QMP for {view.start_timeout_s:g} s: it is killed",
                action=Action.GIVE_UP,
            )
        # Its own time goes on; others need not wait for one that is silent.
        slot_until = process.incarnation.spawned_at + SLOT_S
        slot = view.now < slot_until
        next_at = min(slot_until, give_up_at) if slot else give_up_at
        due = _when(view, process.connect_at, Action.CONNECT, Phase.STARTING, "QEMU is starting", or_at=next_at)
        return replace(due, slot=slot)
    lock = view.lock.lock
    if view.claim is not Claim.MINE or lock is None:
        return Decision(
            phase=Phase.WAITING,
            reason=f"QEMU is ready and paused; its lock {view.claim.value}: {_etcd_trouble(view)}",
            wake_at=view.now + LOCK_POLL_S,
        )
    if view.now < view.quiet_at:
        return Decision(
            phase=Phase.STARTING,
            reason="QEMU is ready; its keys may still be changing",
            wake_at=view.quiet_at,
        )
    if not (lock.state is LockState.RUNNING and lock.pid == process.incarnation.pid):
        return _with_etcd(view, Action.RECORD, Phase.STARTING, "QEMU is ready and paused until it is on record")
    if view.guarded is False:
        said = "QEMU is ready and paused until its guard watches it"
        if view.guard_trouble is None:
            return _when(view, view.guard_at, Action.GUARD, Phase.STARTING, said)
        return _when(view, view.guard_at, Action.GUARD, Phase.WAITING, f"{said}: {view.guard_trouble}")
    return Decision(phase=Phase.STARTING, reason="its guest is let run", action=Action.CONTINUE)


def _under_guard(view: View, decision: Decision) -> Decision:
    """`decision`, once a process that runs is under guard: nothing but its forced end goes before that."""
    if view.guarded is not False or decision.action in {Action.FINISH, Action.QUIT, Action.KILL}:
        return decision
    if view.now >= view.guard_at:
        return replace(decision, action=Action.GUARD, wake_at=None)
    if decision.action is not None:
        return decision
    return replace(decision, wake_at=min(view.guard_at, decision.wake_at or view.guard_at))


def _while_it_runs(view: View, process: Process) -> Decision:
    """The guest runs, or may have run."""
    if process.run_state == POWERED_OFF and (over := _power_off(view, process)) is not None:
        return over
    aim, why = goal(view)
    wish = view.wish
    restart = (
        aim is Goal.RUN
        and wish is not None
        and wish.restart_request is not None
        and wish.restart_request not in {process.incarnation.restart_request, view.memory.restart_seen}
    )
    if restart and wish is not None and wish.request is Request.RESET:
        restart = False
        if process.connected:
            return Decision(phase=Phase.RUNNING, reason="a reset was asked for", action=Action.RESET)
    if aim is Goal.STOP or restart:
        return _stop(view, process, "a restart was asked for" if restart else why)
    if not process.connected:
        reason = "runs, but QEMU does not answer on QMP" if process.silent_since else "runs; QMP is being connected"
        return _when(view, process.connect_at, Action.CONNECT, Phase.RUNNING, reason)
    if view.now >= process.probe_at:
        return Decision(phase=Phase.RUNNING, reason=while_it_runs(view, process, aim, why), action=Action.PROBE)
    tidy = _has_to_tidy(view, aim)
    if tidy and view.session_held and view.now >= view.etcd_at:
        return Decision(phase=Phase.RUNNING, reason=while_it_runs(view, process, aim, why), action=Action.TIDY)
    if view.now >= process.plug_at:
        return Decision(phase=Phase.RUNNING, reason=while_it_runs(view, process, aim, why), action=Action.PLUG)
    if view.now >= process.grow_at:
        return Decision(phase=Phase.RUNNING, reason=while_it_runs(view, process, aim, why), action=Action.GROW)
    if view.now >= process.room_at:
        return Decision(phase=Phase.RUNNING, reason=while_it_runs(view, process, aim, why), action=Action.ROOM)
    next_at = min(process.probe_at, process.grow_at, process.plug_at, process.room_at)
    again_at = min(next_at, view.etcd_at) if tidy or view.claim is Claim.ABSENT or view.is_outdated else next_at
    wake_at = again_at if again_at > view.now else next_at
    return Decision(phase=Phase.RUNNING, reason=while_it_runs(view, process, aim, why), wake_at=wake_at)


def _has_to_tidy(view: View, aim: Goal) -> bool:
    """Whether a placement is to be deleted that has ended, by the host that runs it now (law 10)."""
    wish = view.wish
    if wish is None or not wish.stale_placement or aim is not Goal.RUN:
        return False
    return view.claim is Claim.MINE and not view.stays


def _power_off(view: View, process: Process) -> Decision | None:
    """Its guest has powered itself off, and QEMU lives on (`-no-shutdown`): nothing is left of it to be kept.

    None while that cannot be told to QEMU: what is last known of one that does not answer may be over.
    """
    said = "its guest has powered itself off, but QEMU lives on (`-no-shutdown`)"
    stopping = process.stopping
    if stopping is not None and stopping.quit_at is not None:
        said += ": it was told to end"
        return _when(view, stopping.quit_at + QUIT_WAIT_S, Action.KILL, Phase.STOPPING, said)
    if not process.connected:
        return None
    return Decision(phase=Phase.STOPPING, reason=f"{said}: it is told to end", action=Action.FINISH)


def _stop(view: View, process: Process, why: str) -> Decision:
    """The ladder: power button, repeated; QEMU's own quit; SIGKILL. Each rung has its time."""
    stopping = process.stopping or Stopping(since=view.now)
    at_once = _needs_no_consent(view)
    force_at = stopping.since + (0.0 if at_once else view.shutdown_timeout_s)
    phase = Phase.STOPPING
    if stopping.quit_at is not None:
        kill_at = stopping.quit_at + QUIT_WAIT_S
        return _when(view, kill_at, Action.KILL, phase, f"{why}: QEMU was told to end")
    if view.now >= force_at:
        reason = (
            f"{why}, at once: QEMU is told to end"
            if at_once
            else f"{why}: its guest did not shut down within {view.shutdown_timeout_s:g} s, QEMU is told to end"
        )
        return Decision(phase=phase, reason=reason, action=Action.QUIT)
    left = f"{why}: its guest is asked to shut down, by force {view.shutdown_timeout_s:g} s after the first time"
    if not process.connected:
        return _when(view, process.connect_at, Action.CONNECT, phase, left, or_at=force_at)
    press_at = view.now if stopping.pressed_at is None else stopping.pressed_at + POWERDOWN_EVERY_S
    return _when(view, press_at, Action.POWERDOWN, phase, left, or_at=force_at)


def _needs_no_consent(view: View) -> bool:
    """Whether a person wants its end at once: by `power`, or by a request to restart it so."""
    wish = view.wish
    if wish is None or wish.keys == 0:
        return False
    if wish.power is Power.OFF:
        return wish.power_off_now
    return goal(view)[0] is Goal.RUN and wish.request is Request.RESTART_NOW


def _without_process(view: View) -> Decision:
    aim, why = goal(view)
    claim = view.claim
    if aim is not Goal.RUN:
        return _at_rest(view, aim, why, claim)
    if (not_yet := for_other_hosts(view) or _pause(view) or _share(view)) is not None:
        return not_yet
    match claim:
        case Claim.UNKNOWN:
            return Decision(phase=Phase.WAITING, reason=f"its lock has not been read yet: {_etcd_trouble(view)}")
        case Claim.UNREADABLE:
            return Decision(
                phase=Phase.WAITING,
                reason="its lock holds what this release cannot read, so it counts as held; "
                "once no host runs it, delete that key",
            )
        case Claim.STRANGER:
            return _held_elsewhere(view)
        case Claim.BROKEN:
            return _broken(view)
        case Claim.ABSENT if view.claimed_by is not None:
            return Decision(
                phase=Phase.WAITING,
                reason=f"its lock was deleted, but its status says that it runs on {view.claimed_by}; waits for "
                f"{view.claimed_by} to say otherwise (if that host is gone for good, delete the status key)",
                action=Action.LOOK if view.now >= view.etcd_at and view.session_held else None,
                wake_at=max(view.etcd_at, view.now + LOCK_POLL_S),
            )
        case Claim.ABSENT | Claim.LEFTOVER | Claim.RENAMED:
            return _take(view, Phase.STARTING, "its lock is being taken")
        case Claim.MINE:
            lock = view.lock.lock
            assert lock is not None
            if lock.state is LockState.FENCING:
                return _with_etcd(view, Action.FENCE, Phase.WAITING, "earlier incarnations are being fenced")
            ready = Decision(phase=Phase.STARTING, reason="QEMU is being started", action=Action.SPAWN)
            return _in_turn(view, ready)
        case _:
            assert_never(claim)


def _pause(view: View) -> Decision | None:
    """Wait after an end that nobody asked for."""
    if view.wish is None or not pauses(view.memory, view.wish, view.now):
        return None
    return Decision(
        phase=Phase.BACKOFF,
        reason=f"QEMU {view.memory.last_exit}; it is started again after a pause of {view.memory.pause_s:.1f} s",
        wake_at=view.memory.not_before,
    )


def _share(view: View) -> Decision | None:
    """Wait while another instance has an image of this one's, and hold nothing meanwhile; see `instance/sharing.py`."""
    if view.rival is None:
        return None
    lock = view.lock.lock
    if lock is not None and view.claim in {Claim.MINE, Claim.RENAMED, Claim.LEFTOVER}:
        return _with_etcd(view, Action.FENCE if lock.is_unfenced else Action.RELEASE, Phase.WAITING, view.rival)
    if view.claim is not Claim.ABSENT:
        return None
    due = _with_etcd(view, Action.ASK, Phase.WAITING, view.rival)
    if due.action is None or view.now >= view.ask_at:
        return due
    return _told(view, replace(due, action=None, wake_at=view.ask_at))


def _at_rest(view: View, aim: Goal, why: str, claim: Claim) -> Decision:
    """No process, and none wanted."""
    if view.wish is None:
        return Decision(phase=Phase.WAITING, reason=why)
    phase = Phase.INVALID if aim is Goal.KEEP and view.problems else Phase.STOPPED
    if claim is Claim.UNKNOWN:
        return Decision(phase=phase, reason=f"{why}; its lock has not been read yet")
    lock = view.lock.lock
    ours = claim in {Claim.MINE, Claim.RENAMED, Claim.LEFTOVER}
    if lock is not None and (ours or (claim is Claim.BROKEN and lock.host == view.me)):
        if lock.is_unfenced:
            # Deleted, the lock would take with it what there is to fence.
            return _with_etcd(view, Action.FENCE, phase, f"{why}; the earlier ones of its QEMUs are being fenced")
        return _with_etcd(view, Action.RELEASE, phase, why)
    if aim is Goal.STOP and view.wish.stale_placement and _is_placed_by_us(view.wish, view.me):
        return _with_etcd(view, Action.TIDY, phase, why)
    left = view.leaving is not None or view.wish.keys == 0 or view.wish.runs_on != view.me
    if left and (aim is Goal.STOP or view.wish.placed.is_damaged):
        return Decision(phase=Phase.STOPPED, reason=why, action=Action.FORGET)
    if claim is Claim.ABSENT and not view.looked:
        # What another host wrote there (up to which epoch it came, on which machine) is not to be written over.
        return _with_etcd(view, Action.LOOK, phase, why)
    return Decision(phase=phase, reason=why)


def _is_placed_by_us(wish: Wish, me: HostName) -> bool:
    """Whether a placement that has ended is this host's to delete: it was placed here, or nothing is left of it."""
    placement = wish.placed.placement
    return wish.keys == 0 or wish.runs_on == me or (placement is not None and placement.host == me)


def _held_elsewhere(view: View) -> Decision:
    """Another host's lock. From a host without session is taken what can be fenced, or has nothing to protect."""
    lock = view.lock.lock
    assert lock is not None
    assert view.wish is not None
    if view.holder_has_session is not False:
        return Decision(
            phase=Phase.WAITING,
            reason=f"{lock.host} holds its lock (epoch {lock.epoch}); waits until {lock.host} has stopped it",
        )
    if lock.storage is Storage.NONE:
        return _take(view, Phase.WAITING, f"{lock.host} is gone; its lock is taken over")
    held = f"{lock.host} holds its lock (epoch {lock.epoch}) and has no session"
    if lock.storage is Storage.UNFENCEABLE:
        return Decision(
            phase=Phase.WAITING,
            reason=f"{held}; what it may write to cannot be fenced, so it waits until {lock.host} is back, or until "
            f"somebody makes sure that it runs no more and says so: `kvmsupervisor break-lock {view.wish.instance}`",
        )
    deferral = view.deferral
    if deferral is not None and (view.now >= deferral.until or deferral.watchers == ()):
        return _take(view, Phase.WAITING, f"{lock.host} is gone; its lock is taken over")
    if deferral is not None and deferral.watchers:
        held += (
            f", but its disks are in use ({', '.join(deferral.watchers)}), so it probably runs and has lost etcd only; "
            f"it is taken over at {deferral.told} if that stays so"
        )
    else:
        held += "; Ceph is asked whether its disks are in use"
    due = _with_etcd(view, Action.WATCH, Phase.WAITING, held)
    if deferral is None or view.now >= deferral.ask_at or due.action is None:
        return due
    return replace(due, action=None, wake_at=min(deferral.ask_at, deferral.until))


def _broken(view: View) -> Decision:
    """An operator's word is there. A holder that lives after all lets go by itself, once it has read it."""
    lock = view.lock.lock
    assert lock is not None
    if lock.host != view.me and view.holder_has_session is not False:
        return Decision(
            phase=Phase.WAITING,
            reason=f"its lock was broken while {lock.host} held it, and {lock.host} has a session: waits until it has "
            "let go",
        )
    return _take(view, Phase.STARTING, "its lock was broken by an operator; it is being taken")


def _take(view: View, phase: Phase, reason: str) -> Decision:
    """Take the lock, once etcd is worth an attempt and this instance's turn has come."""
    ready = _with_etcd(view, Action.TAKE, phase, reason)
    return ready if ready.action is None else _in_turn(view, ready)


def _in_turn(view: View, ready: Decision) -> Decision:
    """`ready`, once all that takes its time was made ready, and this instance's turn has come."""
    if view.obstacle is not None:
        if view.now < view.start_at:
            return _told(view, Decision(phase=Phase.WAITING, reason=view.obstacle, wake_at=view.start_at))
        # Tried again in silence: a failure would only take back what was said and written of the attempt.
        again = _in_turn(replace(view, obstacle=None), ready)
        return again if again.action is None else replace(again, phase=Phase.WAITING, reason=view.obstacle)
    if not view.prepared:
        reason = "its disks are looked at, its boot media and UEFI variables made ready"
        return Decision(phase=Phase.STARTING, reason=reason, action=Action.PREPARE)
    if view.slot is None:
        return Decision(phase=Phase.WAITING, reason="waits for its turn to start", action=Action.QUEUE, slot=True)
    if not view.slot:
        if view.shortage is not None:
            reason = f"waits for memory of this host: {view.shortage}"
            return _told(view, Decision(phase=Phase.WAITING, reason=reason, slot=True))
        reason = "waits for its turn: others are starting on this host"
        return Decision(phase=Phase.WAITING, reason=reason, slot=True)
    return replace(ready, slot=True)


def _told(view: View, wait: Decision) -> Decision:
    """`wait`, which may be a long one: people shall find it in the status key, and that is read before it is ours."""
    if view.looked or view.claim is not Claim.ABSENT:
        return wait
    return replace(wait, action=Action.LOOK)


def _with_etcd(view: View, action: Action, phase: Phase, reason: str) -> Decision:
    """`action` needs etcd: do it when that is worth an attempt."""
    if not view.session_held:
        return Decision(
            phase=Phase.WAITING, reason=f"{reason}, but {_etcd_trouble(view)}", wake_at=view.now + LOCK_POLL_S
        )
    if view.now < view.etcd_at:
        said = reason if view.etcd_trouble is None else f"{reason}, but {_etcd_trouble(view)}"
        return Decision(phase=Phase.WAITING, reason=said, wake_at=view.etcd_at)
    return Decision(phase=phase, reason=reason, action=action)


def _when(
    view: View, due_at: float, action: Action, phase: Phase, reason: str, *, or_at: float | None = None
) -> Decision:
    """`action` once `due_at` has come; until then look again at `due_at` or `or_at`, whichever is first."""
    if view.now >= due_at:
        return Decision(phase=phase, reason=reason, action=action)
    return Decision(phase=phase, reason=reason, wake_at=due_at if or_at is None else min(due_at, or_at))


def _etcd_trouble(view: View) -> str:
    if view.etcd_trouble is not None:
        return view.etcd_trouble
    return "etcd is being asked" if view.session_held else "this host has no session with etcd"
