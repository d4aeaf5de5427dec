"""`break-lock`: an operator confirms that no QEMU of a dead host writes any more, where Ceph cannot fence (law 7)."""

from __future__ import annotations

from dataclasses import replace

import click

from kvmsupervisor.adapters.etcd.api import Put, Store
from kvmsupervisor.cli.cluster import Instance, read_instance
from kvmsupervisor.cli.common import INSTANCE, Tools, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import note, printable
from kvmsupervisor.cli.write_commands import confirm, yes_option
from kvmsupervisor.cluster.lock import compares
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.lock import Change, Lock, LockState, Storage


@click.command("break-lock")
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.option(
    "--ceph-is-gone",
    is_flag=True,
    help="Break the lock although the disks are in Ceph: that Ceph cluster is gone for good, so nothing can be fenced.",
)
@yes_option
@pass_tools
def break_lock(tools: Tools, *, instance: InstanceId, ceph_is_gone: bool, yes: bool) -> None:
    """Release the lock of an instance whose host is gone, and whose disks Ceph cannot fence.

    With this command you confirm that no QEMU of the instance runs any more: first make sure that its host is off, or
    cannot reach the disks. The command shows what is at stake and asks; without a terminal, --yes is needed. Then the
    host that the key `host` names takes the lock. If the old host comes back, it kills its QEMU of the instance.
    """

    async def look(store: Store, settings: Settings) -> tuple[Instance, bool, bool]:
        found, cluster = await read_instance(store, settings.layout, instance)
        lock = None if found.lock is None else found.lock.lock
        if lock is None:
            return found, False, False
        session_key = _holders(settings.layout, lock).session_key(lock.host)
        alive = cluster.alive(lock.host) or await store.get(session_key) is not None
        return found, alive, not lock.is_seen_from(settings.layout.facts)

    found, alive, unseen = with_store(tools, look)
    lock = _breakable(found, alive=alive, unseen=unseen, ceph_is_gone=ceph_is_gone)
    click.echo(printable(_what_is_at_stake(found, lock)))
    confirm(f"Is every QEMU of {instance} on {lock.host} certainly gone?", yes=yes)

    async def work(store: Store, settings: Settings) -> bool:
        assert found.lock is not None
        return await write(store, settings.layout, found, lock.broken(forget_clients=ceph_is_gone))

    if not with_store(tools, work):
        raise Refused(f"nothing was written: the lock of {instance} has changed meanwhile, or {lock.host} is back")
    click.echo(f"the lock of {instance} is broken")
    if found.wish.runs_on == lock.host:
        note(f"the key `host` of {instance} still names {lock.host}: name another host in it")


async def write(store: Store, layout: Layout, found: Instance, broken: Lock) -> bool:
    """Write a broken lock in place of the one that was read, if its holder still has no session."""
    assert found.lock is not None
    assert found.lock.lock is not None
    compared = compares(
        Change.BREAK,
        layout=_holders(layout, found.lock.lock),
        instance=found.id,
        revision=found.lock.kv.mod_revision,
        holder=broken.host,
    )
    result = await store.txn(compared, [Put(layout.lock_key(found.id), broken.to_json())])
    return result.succeeded


def _holders(layout: Layout, lock: Lock) -> Layout:
    """Where the holder of a lock has its session: below the facts prefix that it had when it took the lock."""
    return layout if lock.facts is None else replace(layout, facts=lock.facts)


def _breakable(found: Instance, *, alive: bool, unseen: bool, ceph_is_gone: bool) -> Lock:
    """The lock, if only an operator can release it.

    Args:
        found: the instance.
        alive: whether the holder has a session.
        unseen: the holder had another `KVM_FACTS_PREFIX`, so no host takes the lock by itself.
        ceph_is_gone: what the operator says of the disks.

    Raises:
        Refused: no operator is needed; the message says what is right instead.
    """
    if found.lock is None:
        raise Refused(f"{found.id} has no lock: there is nothing to break")
    lock = found.lock.lock
    if lock is None:
        raise Refused(f"this release cannot read the lock of {found.id}; once no host runs {found.id}, delete the key")
    if alive:
        raise Refused(
            f"{lock.host}, which holds the lock of {found.id}, has a session: it stops {found.id} when the keys say so "
            "(`host`, `power`)"
        )
    if lock.state is LockState.BROKEN and not ceph_is_gone:
        raise Refused(f"the lock of {found.id} is broken already; the host that `host` names takes it")
    if unseen:
        return lock
    if lock.storage is Storage.NONE:
        raise Refused(f"{found.id} has no disk to lose: the host that `host` names takes its lock by itself")
    if lock.storage is Storage.RBD and not ceph_is_gone:
        raise Refused(
            f"the disks of {found.id} are in Ceph: the host that `host` names takes its lock by itself, and fences "
            "them. Only when that Ceph is gone for good: --ceph-is-gone"
        )
    return lock


def _what_is_at_stake(found: Instance, lock: Lock) -> str:
    pid = "" if lock.pid is None else f", process {lock.pid}"
    last = "" if found.status is None else f" Last seen there: {found.status.phase.value}, {found.status.reason}."
    return (
        f"{found.id} is held by {lock.host} (epoch {lock.epoch}, {lock.state.value}{pid}), which has no session.{last}"
        f"\n{_what_ends_it(found, lock)} If one does, two machines write to one disk and destroy it."
    )


def _what_ends_it(found: Instance, lock: Lock) -> str:
    """What would stop a QEMU that still runs there, as far as its status tells."""
    free = f"Nothing can keep a QEMU that still runs on {lock.host} from writing"
    status = found.status
    if status is None or status.incarnation != lock.incarnation or status.guarded is None:
        return f"{free}: it may have lost no more than its network."
    if not status.guarded:
        return f"{free}: a guard should have watched it there, but did not when its host last wrote its status."
    return (
        f"A guard watched it there, and kills it when the session of {lock.host} has run out. So it is dead by now, "
        f"unless the guard has ended or hangs, too; that cannot be seen from here. {free} otherwise."
    )
