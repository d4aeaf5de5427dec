"""What people want of whole hosts: that one empties itself, serves again, or does what it holds for confirmation."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from kvmsupervisor.adapters.etcd.api import Compare, Delete, Op, Put, Store, Target
from kvmsupervisor.cluster.acts.refused import Refused
from kvmsupervisor.cluster.overview import Cluster, Instance
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host_wish import Mode
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout


@frozen
class InService:
    """A host that serves again.

    Attributes:
        revision: of the write.
        drained: whether it had a drain.
    """

    revision: int
    drained: bool


def refuse_absent(cluster: Cluster, host: HostName) -> None:
    """Refuse to drain a host that is not there.

    Raises:
        Refused: it has no session; the message says which host was probably meant, and what --force does.
    """
    if not cluster.alive(host):
        raise Refused(f"{host} has no session{cluster.meant_by(host)}; --force drains it once it is there")


async def drain(store: Store, layout: Layout, host: HostName, mode: Mode) -> int:
    """Have a host empty itself, and take an earlier order to return away; return the revision.

    Written also when the host drains already: a new order asks the other hosts again.
    """
    done = await store.txn([], [Put(layout.drain_key(host), mode.value.encode()), Delete(layout.return_key(host))])
    return done.revision


async def undrain(store: Store, layout: Layout, host: HostName, back: Mode | None = None) -> InService:
    """Take a host into service again.

    Args:
        store: etcd.
        layout: where the keys lie.
        host: its name.
        back: how to take back what stands elsewhere for it, live or cold; None to leave it there.

    Raises:
        Refused: somebody else has changed the drain meanwhile.
    """
    key = layout.drain_key(host)
    found = await store.get(key)
    ops: list[Op] = [Delete(key)]
    if back is not None:
        ops.append(Put(layout.return_key(host), back.value.encode()))
    seen = Compare(key, Target.MOD_REVISION, 0 if found is None else found.mod_revision)
    done = await store.txn([seen], ops)
    if not done.succeeded:
        raise Refused(f"{key} has changed meanwhile: do it again")
    return InService(done.revision, found is not None)


def held_by(cluster: Cluster, host: HostName) -> list[Instance]:
    """The instances whose removal, move or power-off a host holds for confirmation."""
    return [one for one in cluster.instances.values() if one.status and one.status.host == host and one.status.held]


async def confirm(store: Store, layout: Layout, host: HostName, instances: Sequence[InstanceId]) -> int:
    """Confirm the held orders of exactly these instances; return the revision of the confirmation.

    The host acts on the key and deletes it.
    """
    return await store.put(layout.confirmation_key(host), json.dumps(list(instances)).encode())


def refuse_others(held: Collection[Instance], host: HostName, instances: Sequence[InstanceId]) -> None:
    """Refuse to confirm anything but what is held.

    Raises:
        Refused: the host holds no order of one of these.
    """
    if not held:
        raise Refused(f"host {host} holds no removal: there is nothing to confirm")
    others = sorted(set(instances) - {one.id for one in held})
    if others:
        raise Refused(f"host {host} holds no order of {', '.join(others)} any more: look again at what it holds")
