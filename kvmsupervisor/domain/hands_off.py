"""Decisions about an instance that must not be touched: its QEMU is watched and reported, nothing else. Pure."""

from __future__ import annotations

from dataclasses import replace

from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.goal import Goal, goal, order
from kvmsupervisor.domain.lock import Claim
from kvmsupervisor.domain.reasons import told
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Action, Holdover, LeftAlone, Process, View

HOLDOVER_POLL_S = 5.0
"""How often to look whether a QEMU without records still lives. Arbitrary: a person waits for it."""


def hands_off(view: View) -> Decision | None:
    """The decision where nothing may be touched; None where the usual rows decide."""
    if view.left_alone is not None:
        return _left_alone(view, view.left_alone)
    is_hidden = view.process is None and view.holdover is not None
    if is_hidden and view.claim in {Claim.LEFTOVER, Claim.BROKEN, Claim.STRANGER, Claim.ABSENT}:
        assert view.holdover is not None
        return _held_over(view, view.holdover)
    if view.mismatch is None and view.dissent is not None and view.process is None and view.claim is Claim.ABSENT:
        wait = Decision(row=Row.DISSENT, phase=Phase.WAITING, reason=view.dissent)
        return told(view, wait) if goal(view)[0] is Goal.RUN else None
    process = view.process
    if view.claim is Claim.NEWER and process is not None and process.exit is None:
        # It may be on its way to another host: nobody but that release knows what may be done to it.
        return _watched(
            view, process, f"its lock {view.claim.value}: it is left alone until that release is back", Row.LOCK_NEWER
        )
    if view.mismatch is None or order(view) is not None:
        return None
    if process is None:
        # The keys may belong to another cluster or host: take nothing, release nothing.
        runs = view.wish is None or goal(view)[0] is Goal.RUN
        phase = Phase.WAITING if runs else Phase.STOPPED
        return Decision(row=Row.MISMATCH, phase=phase, reason=view.mismatch)
    # An end is recorded as usual: it is a fact.
    return _watched(view, process, view.mismatch, Row.MISMATCH_QEMU) if process.exit is None else None


def _held_over(view: View, holdover: Holdover) -> Decision:
    """Its lock is ours, or was until somebody deleted it, and its process lives; there is no record of that here."""
    kept = "" if holdover.folder is None else f" (its record was kept in {holdover.folder})"
    return Decision(
        row=Row.HELD_OVER,
        phase=Phase.WAITING,
        reason=f"QEMU {holdover.pid} of this instance lives, but has no record in this run directory{kept}, so it "
        "cannot be adopted; start the supervisor with the KVM_RUN_DIR that has it, or end that process",
        wake_at=view.now + HOLDOVER_POLL_S,
    )


def _left_alone(view: View, left: LeftAlone) -> Decision:
    """Nothing is done that could be wrong, but it is reported, and read again."""
    phase = Phase.WAITING if left.pid is None else Phase.RUNNING
    said = Decision(row=Row.LEFT_ALONE, phase=phase, reason=left.reason)
    if view.now >= left.look_at:
        return replace(said, action=Action.READ)
    return told(view, replace(said, wake_at=left.look_at))


def _watched(view: View, process: Process, why: str, row: Row) -> Decision:
    """It is another release's, or was started under other settings (law 12). Its guard goes on watching it."""
    phase = Phase.STARTING if process.never_ran else Phase.RUNNING
    said = Decision(row=row, phase=phase, reason=f"QEMU lives, but {why}")
    guard_at = view.guard_at if view.guarded is False else None
    if guard_at is not None and view.now >= guard_at:
        return replace(said, action=Action.GUARD)
    due_at, action = (process.probe_at, Action.PROBE) if process.connected else (process.connect_at, Action.CONNECT)
    if view.now >= due_at:
        return replace(said, action=action)
    return replace(said, wake_at=due_at if guard_at is None else min(due_at, guard_at))
