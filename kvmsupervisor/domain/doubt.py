"""Law 11: in another history of etcd, storage tells whether another host runs a machine; no timer does.

A lock that came with the change of history, or one that is missing since, does not tell who runs the machine now: the
host that does may still be with another etcd, or not be back yet. Its QEMU has the images open, and Ceph names that.
While it does, nobody is fenced but by a person's word.

Pure.
"""

from __future__ import annotations

from dataclasses import replace

from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.history import Era
from kvmsupervisor.domain.lock import Claim, Lock
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.storage import images_of
from kvmsupervisor.domain.view import Action, View


def is_doubted(era: Era, lock: Lock | None, *, lock_revision: int, spec: Spec, wish_revision: int) -> bool:
    """Whether another host may run it, although its lock does not say so, and storage can tell.

    Args:
        era: the present history.
        lock: its lock; an absent one tells nothing of a machine whose keys came with the change.
        lock_revision: `mod_revision` of it.
        spec: the machine.
        wish_revision: of the newest of its keys.
    """
    if not era.has_changed or not images_of(spec):
        return False
    if lock is None:
        return bool(era.awaited) or wish_revision <= era.since
    return not era.has(lock.history, lock_revision)


def is_in_doubt(view: View) -> bool:
    """See `is_doubted`; the same holds where another machine took the lock under this host's name."""
    wish, seen = view.wish, view.lock
    if wish is None or wish.spec is None:
        return False
    if view.is_namesakes and images_of(wish.spec):
        # One of the two has a wrong name, which must not end a guest (law 12).
        return True
    return is_doubted(view.era, seen.lock, lock_revision=seen.mod_revision, spec=wish.spec, wish_revision=wish.revision)


def unless_it_runs(view: View) -> Decision | None:
    """Wait while Ceph names who has its disks open, and ask who does; None to go on."""
    if not is_in_doubt(view):
        return None
    deferral = view.deferral
    if deferral is None or deferral.watchers is None:
        return _ask(view, "Ceph is asked whether it runs on another host")
    if not deferral.watchers:
        return None
    due = _ask(view, _lives(view, deferral.watchers))
    if view.now >= deferral.ask_at:
        return due
    return replace(due, row=Row.DOUBTED, action=None, wake_at=deferral.ask_at)


def asked_just_now(view: View, ready: Decision) -> Decision:
    """`ready`, which takes the lock; first ask once more where Ceph was asked a while ago."""
    deferral = view.deferral
    if not is_in_doubt(view) or (deferral is not None and view.now < deferral.ask_at):
        return ready
    return replace(_ask(view, ready.reason), slot=ready.slot)


def _ask(view: View, reason: str) -> Decision:
    return Decision(row=Row.DOUBT, phase=Phase.WAITING, reason=reason, action=Action.ASK_WATCHERS)


def _lives(view: View, watchers: tuple[str, ...]) -> str:
    lock, wish = view.lock.lock, view.wish
    assert wish is not None
    if view.is_namesakes:
        return (
            f"another machine has taken its lock under the name {view.me}, and its disks are in use "
            f"({', '.join(watchers)}), so its guest probably runs there and is not fenced: give one of the two "
            f"machines another KVM_HOSTNAME (if nothing of it runs any more: `ceph osd blocklist add {watchers[0]}`)"
        )
    held = view.claim is Claim.STRANGER and lock is not None
    who = f"{lock.host} held its lock before that and has no session" if held and lock else "its lock tells nothing"
    back = lock.host if held and lock else "that host"
    say = f"kvmsupervisor break-lock {wish.instance}" if held else f"ceph osd blocklist add {watchers[0]}"
    return (
        f"etcd was restored, has lost its data, or is another one; {who}, but its disks are in use "
        f"({', '.join(watchers)}), so its guest probably runs and is not fenced: waits until that client is gone, or "
        f"{back} has said here what runs (if nothing of it runs any more: `{say}`)"
    )
