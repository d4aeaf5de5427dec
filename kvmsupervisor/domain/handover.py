"""The values of the lock in a live move (law 13): announced, called off, handed over, arrived. Pure.

Each is a row of the lock's table (`lock.Change`): `ANNOUNCE`, `CALL_OFF`, `GIVE`, `ARRIVE`. `domain/move.py` says when
which of them is written.
"""

from __future__ import annotations

from dataclasses import replace

from kvmsupervisor.domain.lock import MOVING_VERSION, VERSION, Destination, Lock, LockState


def announced(lock: Lock, to: Destination) -> Lock:
    """The lock under which the guest is transferred: the QEMU that waits for it is on record (law 3)."""
    return replace(lock, state=LockState.MIGRATING, to=to, version=MOVING_VERSION)


def called_off(lock: Lock) -> Lock:
    """The lock after a transfer that came to nothing. The other QEMU may live yet: its addresses stay on record."""
    assert lock.to is not None
    fence = tuple(dict.fromkeys((*lock.fence, *lock.to.clients)))
    return replace(lock, state=LockState.RUNNING, to=None, fence=fence, version=VERSION)


def given(lock: Lock, *, paused: bool, mark: str, stopped_ms: int | None = None) -> Lock:
    """The lock that hands the guest to the QEMU at the target, which has all of it; the epoch grows.

    Args:
        lock: while it is `migrating`.
        paused: whether a person had paused the guest.
        mark: the history in which it is handed over, as `Era.mark`.
        stopped_ms: how long it was stopped, for people.
    """
    to = lock.to
    assert to is not None
    return Lock(
        host=to.host,
        boot_id=to.boot_id,
        epoch=lock.epoch + 1,
        state=LockState.GIVEN,
        incarnation=to.incarnation,
        pid=to.pid,
        starttime=to.starttime,
        clients=to.clients,
        images=lock.images,
        fence=tuple(dict.fromkeys((*lock.fence, *lock.clients))),
        storage=lock.storage,
        taken_from=lock.host,
        facts=to.facts,
        history=mark or None,
        machine=to.machine,
        paused=paused,
        stopped_ms=stopped_ms,
        version=MOVING_VERSION,
    )


def arrived(lock: Lock) -> Lock:
    """The lock of a guest that goes on at the target. What is in `fence` stays on record there: it costs nothing."""
    return replace(lock, state=LockState.RUNNING, taken_from=None, paused=False, stopped_ms=None, version=VERSION)
