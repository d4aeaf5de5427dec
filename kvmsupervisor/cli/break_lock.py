"""`break-lock`: an operator confirms that no QEMU of a dead host writes any more, where Ceph cannot fence (law 7)."""

from __future__ import annotations

from dataclasses import replace

import click

from kvmsupervisor.adapters.etcd.api import KeyValue, Put, Store
from kvmsupervisor.cli.common import INSTANCE, Tools, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import note, printable
from kvmsupervisor.cli.write_commands import confirm, yes_option
from kvmsupervisor.cluster.lock import compares
from kvmsupervisor.cluster.overview import Instance, read_instance
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.history import HistoryName
from kvmsupervisor.domain.host import HostSession
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
    """Release the lock of an instance whose host is gone, and whose disks Ceph cannot fence, or must not by itself.

    With this command you confirm that no QEMU of the instance runs any more: first make sure that its host is off, or
    cannot reach the disks. The command shows what is at stake and asks; without a terminal, --yes is needed. Then the
    host that the key `host` names takes the lock. If the old host comes back, it kills its QEMU of the instance.
    """

    async def look(store: Store, settings: Settings) -> tuple[Instance, bool, int, bool, str]:
        found, cluster = await read_instance(store, settings.layout, instance)
        lock = None if found.lock is None else found.lock.lock
        if lock is None:
            return found, False, 0, False, ""
        session = await store.get(_holders(settings.layout, lock).session_key(lock.host))
        namesake = _namesake(lock, session)
        alive = not namesake and (cluster.alive(lock.host) or session is not None)
        unseen = not lock.is_seen_from(settings.layout.facts)
        return found, alive, namesake, unseen, await _history(store, settings.layout)

    found, alive, namesake, unseen, mark = with_store(tools, look)
    lock = _breakable(found, alive=alive, unseen=unseen, ceph_is_gone=ceph_is_gone, mark=mark)
    click.echo(printable(_what_is_at_stake(found, lock, ceph_is_gone=ceph_is_gone)))
    confirm(f"Is every QEMU of {instance} on {lock.host} certainly gone?", yes=yes)

    async def work(store: Store, settings: Settings) -> bool:
        assert found.lock is not None
        return await write(store, settings.layout, found, lock.broken(forget_clients=ceph_is_gone, mark=mark), namesake)

    if not with_store(tools, work):
        raise Refused(f"nothing was written: the lock of {instance} has changed meanwhile, or {lock.host} is back")
    click.echo(f"the lock of {instance} is broken")
    if found.wish.runs_on == lock.host:
        note(f"the key `host` of {instance} still names {lock.host}: name another host in it")


def _namesake(lock: Lock, session: KeyValue | None) -> int:
    """`mod_revision` of the session under the holder's name, where another machine has that name now; otherwise 0."""
    other = None if session is None else HostSession.from_json(session.value)
    if session is None or other is None:
        return 0
    return session.mod_revision if lock.is_namesakes(lock.host, boot_id=other.boot_id, machine=other.machine) else 0


async def write(store: Store, layout: Layout, found: Instance, broken: Lock, namesake: int = 0) -> bool:
    """Write a broken lock in place of the one that was read, if its holder still has no session."""
    assert found.lock is not None
    assert found.lock.lock is not None
    compared = compares(
        Change.BREAK,
        layout=_holders(layout, found.lock.lock),
        instance=found.id,
        revision=found.lock.kv.mod_revision,
        holder=broken.host,
        namesake=namesake,
    )
    result = await store.txn(compared, [Put(layout.lock_key(found.id), broken.to_json())])
    return result.succeeded


def _holders(layout: Layout, lock: Lock) -> Layout:
    """Where the holder of a lock has its session: below the facts prefix that it had when it took the lock."""
    return layout if lock.facts is None else replace(layout, facts=lock.facts)


async def _history(store: Store, layout: Layout) -> str:
    """The name of the present history of etcd; empty for a cluster's first one."""
    found = await store.get(layout.history_key)
    name = None if found is None else HistoryName.from_json(found.value)
    return name.id if name is not None and name.number else ""


def _breakable(found: Instance, *, alive: bool, unseen: bool, ceph_is_gone: bool, mark: str) -> Lock:
    """The lock, if only an operator can release it.

    Args:
        found: the instance.
        alive: whether the holder has a session.
        unseen: the holder had another `KVM_FACTS_PREFIX`, so no host takes the lock by itself.
        ceph_is_gone: what the operator says of the disks.
        mark: the name of the present history of etcd, where it is not the first one.

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
    is_older = bool(mark) and lock.history != mark
    if lock.state is LockState.BROKEN and not ceph_is_gone and not is_older:
        raise Refused(f"the lock of {found.id} is broken already; the host that `host` names takes it")
    if unseen or (is_older and lock.storage is Storage.RBD):
        # From before a change of history: the host where it is to run takes it by itself only if nobody has its disks
        # open (law 11).
        return lock
    if lock.storage is Storage.NONE:
        raise Refused(f"{found.id} has no disk to lose: the host that `host` names takes its lock by itself")
    if lock.storage is Storage.RBD and not ceph_is_gone:
        raise Refused(
            f"the disks of {found.id} are in Ceph: the host that `host` names takes its lock by itself, and fences "
            "them. Only when that Ceph is gone for good: --ceph-is-gone"
        )
    return lock


def _what_is_at_stake(found: Instance, lock: Lock, *, ceph_is_gone: bool) -> str:
    pid = "" if lock.pid is None else f", process {lock.pid}"
    last = "" if found.status is None else f" Last seen there: {found.status.phase.value}, {found.status.reason}."
    held = (
        f"{found.id} is held by {lock.host} (epoch {lock.epoch}, {lock.state.value}{pid}), which has no session.{last}"
    )
    if lock.storage is Storage.RBD and not ceph_is_gone:
        return (
            f"{held}\nIts disks are in Ceph: whoever has them open is fenced there, so that a guest that still runs on "
            f"{lock.host} ends, and loses what it has not written."
        )
    return f"{held}\n{_what_ends_it(found, lock)} If one does, two machines write to one disk and destroy it."


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
