"""All that ever was written into an instance's lock, held against the laws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Lock, LockState
from tests.support.cluster import Keys

FORWARD: Mapping[LockState, frozenset[LockState]] = {
    LockState.FENCING: frozenset({LockState.STARTING, LockState.BROKEN}),
    LockState.STARTING: frozenset({LockState.RUNNING, LockState.BROKEN}),
    LockState.RUNNING: frozenset({LockState.RUNNING, LockState.MIGRATING, LockState.BROKEN}),
    LockState.MIGRATING: frozenset({LockState.RUNNING, LockState.BROKEN}),
    LockState.GIVEN: frozenset({LockState.RUNNING, LockState.BROKEN}),
    LockState.BROKEN: frozenset(),
}
"""What may follow within one incarnation."""


def lock_values(keys: Keys, instance: str) -> list[Lock | None]:
    """Every value in order of etcd's revisions; None where the key was deleted."""
    values = []
    for change in keys.history(keys.layout.lock_key(InstanceId(instance))):
        lock = None if change.value is None else Lock.from_json(change.value)
        assert (lock is None) == (change.value is None), change
        values.append(lock)
    return values


def check_lock_history(keys: Keys, instance: str, *, takeovers: Sequence[str] = ()) -> list[Lock]:
    """Replay all that ever was written into the lock, and hold it against the laws; return it.

    Args:
        keys: of the cluster.
        instance: whose lock.
        takeovers: hosts that died, so that others may take their locks.
    """
    return check_lock_values(lock_values(keys, instance), takeovers=takeovers)


def check_lock_values(locks: Sequence[Lock | None], *, takeovers: Sequence[str] = ()) -> list[Lock]:
    """See `check_lock_history`."""
    epoch = 0
    for before, after in pairwise([None, *locks]):
        if after is None:
            assert before is not None
            continue
        if before is not None and before.incarnation == after.incarnation:
            assert (before.host, before.epoch) == (after.host, after.epoch)
            assert after.state in FORWARD[before.state], f"only forward: {before} {after}"
            assert after.state is not LockState.RUNNING or after.pid is not None
        elif after.state is LockState.GIVEN:
            # Law 13: the source gives it to the QEMU that it has put on record.
            assert before is not None
            assert before.to is not None
            assert (before.to.incarnation, before.to.host) == (after.incarnation, after.host), (before, after)
            assert after.epoch == before.epoch + 1
            assert {*before.clients, *before.fence} <= {*after.fence}
        else:
            # A new incarnation: the epoch grows, it has not run yet, and no address is lost that is to be fenced.
            assert after.epoch > epoch, (before, after)
            assert after.state in {LockState.FENCING, LockState.STARTING}, (before, after)
            if before is not None:
                is_free = before.host == after.host or before.state is LockState.BROKEN
                assert is_free or before.host in takeovers, (before, after)
                assert {*before.fence} <= {*after.fence}, (before, after)
                # All of them, or none: it has ended in order.
                assert {*before.clients} & {*after.fence} in ({*before.clients}, set()), (before, after)
        epoch = after.epoch
    return [lock for lock in locks if lock is not None]
