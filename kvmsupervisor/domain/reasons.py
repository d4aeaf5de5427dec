"""What the status tells people: everything that they should know of a running machine, and that one waits. Pure."""

from __future__ import annotations

from dataclasses import replace

from kvmsupervisor.domain import changes
from kvmsupervisor.domain.decision import Decision
from kvmsupervisor.domain.goal import Goal, why_it_stays, why_it_waits
from kvmsupervisor.domain.lock import Claim
from kvmsupervisor.domain.run_state import why_not_running
from kvmsupervisor.domain.view import Action, Process, View


def while_it_runs(view: View, process: Process, aim: Goal, why: str) -> str:
    """The reason for a machine that runs; `why` is the clause for its goal."""
    said = []
    placement = None if view.wish is None else view.wish.placement
    if placement is not None and view.wish is not None and placement.host == view.me != view.wish.host:
        since = f"since {placement.since} ({placement.why})"
        said.append(f"runs in place of {view.wish.host}, {since}, until `host` is written again")
    said += _why_it_stands(process)
    if process.silent_since is not None:
        said.append("QEMU does not answer on QMP")
    said += process.unplugged
    if aim is Goal.KEEP:
        said.append(f"it runs on as it was: {why}")
    if view.claim is Claim.STRANGER and view.is_strange:
        said.append("etcd is now another cluster's, where its lock belongs to another machine and is not touched")
    if view.claim is Claim.UNREADABLE:
        said.append("its lock holds what this release cannot read; delete that key, and it is written again")
    if view.guarded is False:
        said.append(f"no guard watches it{'' if view.guard_trouble is None else f': {view.guard_trouble}'}")
    if not view.session_held and view.wish is not None:
        what = "its guard kills it once the time of this host's session is up" if view.guarded else "it runs on"
        said.append(f"etcd is away; {what}")
    if beside := (
        *process.disk_trouble,
        *_of_the_drive(view, process),
        *changes.told(view, process),
        *(() if view.shared is None else (view.shared,)),
        *(() if view.errand_trouble is None else (view.errand_trouble,)),
    ):
        said = [*(said or ["runs"]), *beside]
    if view.stays or view.goes_only_live:
        said = [*(said or ["runs"]), why_it_stays(view) if view.stays else why_it_waits(view)]
    if view.clearing.remark is not None:
        said = [*(said or ["runs"]), view.clearing.remark]
    return "; ".join(said) or "runs"


def _of_the_drive(view: View, process: Process) -> list[str]:
    """What keeps its CD-ROM drive from the medium of its key."""
    told = process.medium_trouble
    is_wanted = told is not None and process.holds_another(None if view.wish is None else view.wish.spec)
    return [told] if told is not None and is_wanted else []


def _why_it_stands(process: Process) -> list[str]:
    if process.full is not None:
        return [f"its guest does not run: {process.full}"]
    still = why_not_running(process.run_state)
    return [] if still is None else [still]


def told(view: View, wait: Decision) -> Decision:
    """`wait`, which may be long. People look into the status key, which has to be read before this host writes it.

    When the supervisor starts it reads all status keys at once, and each instance is told (`statuses_known`).
    """
    if view.looked or view.claim is not Claim.ABSENT or not view.session_held or not view.statuses_known:
        return wait
    if view.now < view.etcd_at:
        return replace(wait, wake_at=view.etcd_at if wait.wake_at is None else min(view.etcd_at, wait.wake_at))
    return replace(wait, action=Action.LOOK)
