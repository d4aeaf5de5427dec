"""What is done to a machine's disks beside running it: snapshots taken, taken away, rolled back to. Pure.

While its QEMU lives that is done under the lock that it runs under. For a machine that is off the lock is taken, as for
a start, and released afterwards. A rollback writes to the disks by a storage client that is on no record, so its lock
says that nothing can fence it (law 7): whoever finds it orphaned waits for a person.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.doubt import unless_it_runs
from kvmsupervisor.domain.goal import Goal, order
from kvmsupervisor.domain.lock import Claim, Lock, LockState, Storage
from kvmsupervisor.domain.reasons import told
from kvmsupervisor.domain.run_state import PAUSED, RUNNING
from kvmsupervisor.domain.snapshots import Errand, Kind
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Action, Process, View
from kvmsupervisor.domain.waiting import with_etcd


def due_at(view: View, process: Process, aim: Goal) -> float:
    """When the next errand of a machine that runs is due; never without one."""
    errand = view.errand
    if errand is None or view.claim is not Claim.MINE or not view.session_held:
        return math.inf
    if errand.kind is Kind.RELEASE:
        return errand.at
    return errand.at if aim is Goal.RUN and process.run_state in {RUNNING, PAUSED} else math.inf


def at_rest(view: View, aim: Goal, why: str) -> Decision | None:
    """The errand of a machine without a process, once it is due; None where other rows decide."""
    errand, lock = view.errand, view.lock.lock
    if errand is None or not _may_be_done(view, aim, errand):
        return None
    if view.now < errand.at:
        if aim is not Goal.RUN:
            return None
        # A machine does not start with some of its disks rolled back.
        said = f"waits, as {errand.said}: {view.errand_trouble}"
        return Decision(row=Row.ERRAND_LATER, phase=Phase.WAITING, reason=said, wake_at=errand.at)
    said = f"{why}; {errand.said}"
    match view.claim:
        case Claim.MINE if lock is not None and _suffices(lock, errand):
            if lock.state is LockState.FENCING:
                return with_etcd(view, Row.ERRAND_FENCE, Action.FENCE, Phase.STOPPED, said)
            return with_etcd(view, Row.ERRAND, Action.SNAPSHOT, Phase.STOPPED, said)
        case Claim.MINE | Claim.LEFTOVER | Claim.RENAMED:
            pass
        case Claim.ABSENT if view.looked and view.claimed_by is None:
            pass
        case _:
            return None
    if (doubted := unless_it_runs(view)) is not None:
        return doubted if doubted.action is not None else told(view, doubted)
    return with_etcd(view, Row.ERRAND_TAKE, Action.TAKE, Phase.STOPPED, said)


def with_trouble(view: View, rest: Decision) -> Decision:
    """`rest`, with what keeps an errand of a machine that is off from being done, until it is tried again."""
    if view.errand_trouble is None:
        return rest
    again_at = None if view.errand is None or view.now >= view.errand.at else view.errand.at
    return replace(rest, reason=f"{rest.reason}; {view.errand_trouble}", wake_at=again_at)


def _may_be_done(view: View, aim: Goal, errand: Errand) -> bool:
    """Whether a machine that is off stays so meanwhile, on this host, and nobody orders anything else."""
    wish = view.wish
    if wish is None or wish.spec is None or view.problems or wish.runs_on != view.me or view.held:
        return False
    if order(view) is not None or view.clearing.closed is not None or view.era.awaited or not view.looked:
        return False
    return errand.begun or (aim in {Goal.STOP, Goal.REST} and wish.power is not None)


def _suffices(lock: Lock, errand: Errand) -> bool:
    """Whether a lock of ours is enough for it: nobody else may take over in the midst of a rollback."""
    return errand.kind is not Kind.ROLL_BACK or lock.storage is Storage.UNFENCEABLE
