"""When a running machine is changed, and what is said of that. Pure: part of `lifecycle.decide` and `reasons`.

Which steps there are says `live.py`.
"""

from __future__ import annotations

import math

from kvmsupervisor.domain.goal import Goal
from kvmsupervisor.domain.lock import Claim, LockState
from kvmsupervisor.domain.run_state import RUNNING
from kvmsupervisor.domain.view import Process, View


def due(view: View, process: Process, aim: Goal) -> float:
    """When the next step to what the keys want is due; never where there is none, or while it cannot be made.

    A disk is given under a lock that has its client on record (law 3), and a guest that stands still lets go of
    nothing. Keys that are being written one after the other are waited for, as before a start.
    """
    lock = view.lock.lock
    if aim is not Goal.RUN or lock is None or view.claim is not Claim.MINE or lock.state is not LockState.RUNNING:
        return math.inf
    if not process.connected or process.run_state != RUNNING or view.guarded is False or not view.session_held:
        return math.inf
    devices = process.changes(None if view.wish is None else view.wish.spec, takes=view.takes)
    return max(process.change_due(devices), view.quiet_at, view.etcd_at) if devices else math.inf


def unsettled(view: View, process: Process) -> float | None:
    """When to look what became of a change that has begun, before its guest is moved: QEMU has to be as is known.

    None where nothing has begun, or nothing more comes of it by itself.
    """
    known = process.incarnation
    begun = (*known.coming, *known.going)
    if not begun or process.run_state != RUNNING:
        return None
    at = process.change_due(begun)
    return None if at == math.inf else at


def underway(view: View, process: Process) -> tuple[str, ...]:
    """The keys of which something is being done, or will be at once: not what was tried in vain."""
    if not process.connected or process.run_state != RUNNING:
        return ()
    devices = process.changes(None if view.wish is None else view.wish.spec, takes=view.takes)
    return tuple(sorted(key for device, key in devices.items() if process.attempt(device).at != math.inf))


def told(view: View, process: Process) -> list[str]:
    """What keeps the machine from what its keys want, as far as that was tried."""
    wanted = None if view.wish is None else view.wish.spec
    attempts = (process.attempt(device) for device in process.changes(wanted, takes=view.takes))
    return [attempt.said for attempt in attempts if attempt.said is not None]
