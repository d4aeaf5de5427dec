"""The reason in the status of a running machine: everything that a person should know of it. Pure."""

from __future__ import annotations

from kvmsupervisor.domain.goal import Goal, why_it_stays
from kvmsupervisor.domain.lock import Claim
from kvmsupervisor.domain.run_state import why_not_running
from kvmsupervisor.domain.view import Process, View


def while_it_runs(view: View, process: Process, aim: Goal, why: str) -> str:
    """The reason for a machine that runs; `why` is the clause for its goal."""
    said = []
    placement = None if view.wish is None or view.stays else view.wish.placement
    if placement is not None and view.wish is not None:
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
    if beside := (*process.disk_trouble, *(() if view.shared is None else (view.shared,))):
        said = [*(said or ["runs"]), *beside]
    if view.stays:
        said = [*(said or ["runs"]), why_it_stays(view)]
    return "; ".join(said) or "runs"


def _why_it_stands(process: Process) -> list[str]:
    if process.full is not None:
        return [f"its guest does not run: {process.full}"]
    still = why_not_running(process.run_state)
    return [] if still is None else [still]
