"""`delete` of an instance without keys: deletes its status and lock, when no host will.

A supervisor deletes the status and the lock of a machine that it has shut down. A host that is gone for good does not,
and a mistyped host never existed. A lock that protects something stays: each write here compares that nothing has
changed since it was read, and that the host in question still has no session.
"""

from __future__ import annotations

from kvmsupervisor.adapters.etcd.api import Compare, Delete, Op, Store, Target
from kvmsupervisor.cluster.acts.refused import Refused
from kvmsupervisor.cluster.overview import Cluster, Instance
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase

UNDER_WAY = frozenset({Phase.STARTING, Phase.RUNNING, Phase.STOPPING, Phase.MIGRATING})
"""Phases in which a living host still has work to do, and deletes the status itself at its end."""


async def take_away(store: Store, layout: Layout, found: Instance, cluster: Cluster) -> int:
    """Delete what is left of an instance without keys; return the revision.

    Raises:
        Refused: a host does that itself, or the lock protects a disk; the message says what is right instead.
    """
    status, lock = found.status, found.lock
    compares = [Compare(layout.wish_key(found.id, "host"), Target.MOD_REVISION, 0)]
    ops: list[Op] = []
    if lock is None:
        compares.append(Compare(layout.lock_key(found.id), Target.MOD_REVISION, 0))
        if status is not None and cluster.alive(status.host) and status.phase in UNDER_WAY:
            raise Refused(f"{found.id} has no keys any more; host {status.host} says {status.phase.value}")
        if status is not None and status.tells_of_a_process:
            raise Refused(
                f"{found.id} has no keys and no lock any more, but its status says that QEMU {status.pid} runs on "
                f"{status.host}: that host shuts it down; if it is gone for good, delete the key "
                f"{layout.status_key(found.id)} with etcdctl"
            )
    else:
        compares += _lock_is_worthless(layout, found, lock.lock, cluster)
        ops.append(Delete(layout.lock_key(found.id)))
    if status is not None:
        compares.append(Compare(layout.status_key(found.id), Target.MOD_REVISION, found.status_revision))
        ops.append(Delete(layout.status_key(found.id)))
    ops.append(Delete(layout.events_key(found.id)))
    ops.append(Delete(layout.placement_key(found.id)))
    result = await store.txn(compares, ops)
    if not result.succeeded:
        raise Refused(f"nothing was deleted: the keys of {found.id} changed meanwhile; look with `show {found.id}`")
    return result.revision


def _lock_is_worthless(layout: Layout, found: Instance, lock: Lock | None, cluster: Cluster) -> list[Compare]:
    """The conditions under which the lock protects nothing.

    Raises:
        Refused: the lock protects something.
    """
    assert found.lock is not None
    key = layout.lock_key(found.id)
    if lock is None:
        raise Refused(
            f"this release cannot read the lock of {found.id}: delete {key} with etcdctl once no host runs it"
        )
    if cluster.alive(lock.host):
        raise Refused(
            f"{found.id} has no keys any more; {lock.host}, which holds its lock, shuts it down and deletes it"
        )
    if lock.state is not LockState.BROKEN and lock.storage is not Storage.NONE:
        way = (
            f"give it keys again with `host` naming a host that has a session ({cluster.who_has_sessions()}): that "
            "takes the lock over, fences its disks and runs it; then delete it"
            if lock.storage is Storage.RBD
            else f"confirm with `break-lock {found.id}` that no QEMU of it runs there any more; then delete it"
        )
        raise Refused(
            f"{found.id} is held by {lock.host}, which has no session, and may still write to its disks: {way}"
        )
    if lock.is_unfenced:
        raise Refused(f"the lock of {found.id} names clients of Ceph that are not fenced yet: it stays until they are")
    return [
        Compare(key, Target.MOD_REVISION, found.lock.kv.mod_revision),
        Compare(layout.session_key(HostName(lock.host)), Target.MOD_REVISION, 0),
    ]


async def sweep(store: Store, layout: Layout, found: Instance, cluster: Cluster) -> bool:
    """Delete the status of an instance whose keys were just deleted, if no host will; return whether it did.

    No host will when the status was written by a host that is gone, or by a host that runs nothing of the instance and
    was not named in `host` any more.
    """
    status = found.status
    if status is None or status.tells_of_a_process or found.lock is not None:
        return False
    if cluster.alive(status.host) and found.wish.runs_on == status.host:
        return False
    result = await store.txn(
        [
            Compare(layout.lock_key(found.id), Target.MOD_REVISION, 0),
            Compare(layout.wish_key(found.id, "host"), Target.MOD_REVISION, 0),
            Compare(layout.status_key(found.id), Target.MOD_REVISION, found.status_revision),
        ],
        [Delete(layout.status_key(found.id)), Delete(layout.events_key(found.id))],
    )
    return result.succeeded
