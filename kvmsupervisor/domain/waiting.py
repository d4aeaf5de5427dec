"""Decisions that wait: for etcd, or for a time. Pure."""

from __future__ import annotations

from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.ownership import LOCK_POLL_S
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Action, View


def with_etcd(view: View, row: Row, action: Action, phase: Phase, reason: str) -> Decision:
    """`action`, which needs etcd, once etcd is worth an attempt. After a failure it is tried again without a word."""
    if not view.session_held:
        said = f"{reason}, but {etcd_trouble(view)}"
        return Decision(row=row, phase=Phase.WAITING, reason=said, wake_at=view.now + LOCK_POLL_S)
    said = reason if view.etcd_trouble is None else f"{reason}, but {etcd_trouble(view)}"
    if view.now < view.etcd_at:
        return Decision(row=row, phase=Phase.WAITING, reason=said, wake_at=view.etcd_at)
    return Decision(row=row, phase=phase if view.etcd_trouble is None else Phase.WAITING, reason=said, action=action)


def when(
    view: View, row: Row, action: Action, phase: Phase, reason: str, *, at: float, or_at: float | None = None
) -> Decision:
    """`action` from `at` on; until then decide again at `at` or `or_at`, whichever is first."""
    if view.now >= at:
        return Decision(row=row, phase=phase, reason=reason, action=action)
    return Decision(row=row, phase=phase, reason=reason, wake_at=at if or_at is None else min(at, or_at))


def etcd_trouble(view: View) -> str:
    """Why etcd does not help now."""
    if view.etcd_trouble is not None:
        return view.etcd_trouble
    return "etcd is being asked" if view.session_held else "this host has no session with etcd"
