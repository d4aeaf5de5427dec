"""What the lock decides about a living QEMU, and which hosts a start waits for after a change of history.

Pure.
"""

from __future__ import annotations

from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.lock import Claim, Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.storage import storage_of
from kvmsupervisor.domain.values import some
from kvmsupervisor.domain.view import Action, Process, View

SHOWN = 3
"""How many awaited hosts a reason names. Arbitrary: one line."""

LOCK_POLL_S = 5.0
"""How often to decide again in a wait that no watch ends."""


def by_its_lock(view: View, process: Process) -> Decision | None:
    """What the lock alone decides about a living QEMU; None when other rows decide.

    An older lock is never a takeover: epochs grow within one history, so it was restored, or written by hand.
    """
    lock = view.lock.lock
    match view.claim:
        case Claim.STRANGER if view.is_strange:
            return None
        case Claim.STRANGER | Claim.LEFTOVER | Claim.BROKEN if view.is_outdated:
            return _write_again(view, process, "is older than its QEMU, as in an etcd that was restored")
        case Claim.STRANGER | Claim.LEFTOVER:
            assert lock is not None
            why = f"its lock has gone to {lock.host}, epoch {lock.epoch}: QEMU here is killed"
            return _kill(Row.LOCK_LOST, Phase.STOPPING, view, why)
        case Claim.BROKEN:
            why = "its lock was broken by an operator (`break-lock`), so that another may run it: QEMU is killed"
            return _kill(Row.LOCK_BROKEN, Phase.STOPPING, view, why)
        case Claim.RENAMED if _is_able(view):
            assert lock is not None
            return Decision(
                row=Row.RENAME,
                phase=_phase(process),
                reason=f"its lock {_as_before(view, lock)}: it is written anew",
                action=Action.RENAME,
            )
        case Claim.ABSENT:
            return _write_again(view, process, "was deleted")
        case Claim.MINE if _is_to_be_vouched_for(view, process) and _is_able(view):
            reason = "an earlier release started it: its clients are repeated where only supervisors write"
            return Decision(row=Row.VOUCH, phase=Phase.RUNNING, reason=reason, action=Action.VOUCH)
        case _:
            return None


def _is_to_be_vouched_for(view: View, process: Process) -> bool:
    record = process.incarnation
    return view.locks_are_open and bool(record.clients) and not record.vouched and not process.never_ran


def _as_before(view: View, lock: Lock) -> str:
    if lock.host == view.me and lock.is_seen_from(view.facts):
        return "was written before etcd had another history"
    return f"names this host as it was before ({lock.host}, KVM_FACTS_PREFIX={lock.facts})"


def _write_again(view: View, process: Process, why: str) -> Decision | None:
    if not _is_able(view):
        return None
    if process.never_ran:
        # Another host may have had the lock meanwhile and released it: then this epoch is too low.
        said = f"its lock {why}, and its guest has not run yet: QEMU starts again"
        return _kill(Row.REWRITE_PAUSED, Phase.STARTING, view, said)
    reason = f"its lock {why}: it is written again"
    return Decision(row=Row.REWRITE, phase=_phase(process), reason=reason, action=Action.REASSERT)


def _kill(row: Row, phase: Phase, view: View, reason: str) -> Decision:
    return Decision(row=row, phase=phase, reason=reason, action=Action.KILL, wake_at=view.now + LOCK_POLL_S)


def _is_able(view: View) -> bool:
    """Whether etcd is worth an attempt."""
    return view.session_held and view.now >= view.etcd_at


def _phase(process: Process) -> Phase:
    return Phase.STARTING if process.never_ran else Phase.RUNNING


def for_other_hosts(view: View) -> Decision | None:
    """Wait when etcd has another history, and another host may run this but has not said so there yet.

    An instance that storage can fence waits for a limited time; then it is taken over as from a host that is gone.
    """
    era, wish, lock = view.era, view.wish, view.lock.lock
    if not era.awaited or wish is None or wish.spec is None:
        return None
    said_since = lock is not None and era.has(lock.history, view.lock.mod_revision)
    if said_since and lock is not None and (lock.host == view.me or lock.state is LockState.BROKEN):
        # Since then this host had it, or an operator broke it.
        return None
    storage = storage_of(wish.spec)
    if not era.keeps_waiting(storage, view.now):
        return None
    hosts, have = some(era.awaited, SHOWN), "have" if len(era.awaited) > 1 else "has"
    reason = (
        "etcd was restored, has lost its data, or is another one, and another host may run this; waits until "
        f"{hosts} {have} said there what runs"
    )
    if storage is Storage.UNFENCEABLE:
        reason += f" (if {era.awaited[0]} is gone for good: `kvmsupervisor confirm-removal {era.awaited[0]}`)"
        return Decision(row=Row.HISTORY, phase=Phase.WAITING, reason=reason, wake_at=view.now + LOCK_POLL_S)
    reason += ", at most as long as a takeover waits"
    return Decision(row=Row.HISTORY, phase=Phase.WAITING, reason=reason, wake_at=era.until)
