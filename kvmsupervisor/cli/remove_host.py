"""`remove-host`: deletes what a host that is gone for good has left in etcd, or says what has to be decided first.

A session ends by itself, with its lease. Statuses, placements and confirmations stay: nobody else can know that the
host never comes back. What a person has wished, and locks, which may protect a disk, are named and left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from kvmsupervisor.adapters.etcd.api import Compare, Delete, Op, Store, Target
from kvmsupervisor.cli.common import HOST, Tools, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import note, printable
from kvmsupervisor.cli.write_commands import confirm, yes_option
from kvmsupervisor.cluster.overview import Cluster, Instance, read_cluster
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.lock import LockState


@click.command("remove-host")
@click.argument("host", type=HOST)
@yes_option
@pass_tools
def remove_host(tools: Tools, *, host: str, yes: bool) -> None:
    """Delete what a host that is gone for good has left in etcd.

    Refused while the host has a session, and while instances still need it: each is named with its way out. Disks on
    the host itself are not touched. The command asks first; without a terminal, --yes is needed.
    """
    gone = HostName(host)

    async def look(store: Store, settings: Settings) -> Cluster:
        return await read_cluster(store, settings.layout)

    cluster = with_store(tools, look)
    if cluster.alive(gone):
        raise Refused(f"{gone} has a session: stop its supervisor first, and its guests if they shall not run on")
    needed = [line for instance in cluster.instances.values() for line in _needs(instance, gone)]
    if needed:
        raise Refused("\n".join([f"{gone} is still needed, so nothing was deleted:", *map(printable, needed)]))
    left = [instance.id for instance in cluster.instances.values() if _is_told_by(instance, gone)]
    wanted = f"its last word about {', '.join(left)}" if left else "what it left"
    confirm(f"Is {gone} gone for good? Delete {wanted}?", yes=yes)

    async def work(store: Store, settings: Settings) -> Removed:
        return await remove(store, settings.layout, gone)

    removed = with_store(tools, work)
    for key in removed.keys:
        click.echo(f"deleted {printable(key)}")
    if removed.kept:
        raise Refused(f"changed meanwhile, and left as they are: {', '.join(removed.kept)}; run the command again")
    click.echo(f"nothing of {gone} is left in etcd" if removed.keys else f"{gone} has left nothing in etcd")
    if named := [instance.id for instance in cluster.instances.values() if gone in instance.wish.hosts]:
        note(f"the key `hosts` still names {gone} as a candidate for: {', '.join(named)}")


@frozen
class Removed:
    """The keys that were deleted, and those that stay because something changed meanwhile."""

    keys: tuple[str, ...]
    kept: tuple[str, ...]


async def remove(store: Store, layout: Layout, gone: HostName) -> Removed:
    """Delete the facts of a host. Each transaction compares that the host still has no session."""
    cluster = await read_cluster(store, layout)
    wanted: dict[str, tuple[list[Compare], list[Op]]] = {}
    for instance in cluster.instances.values():
        if _is_told_by(instance, gone):
            key = layout.status_key(instance.id)
            compares = [
                Compare(key, Target.MOD_REVISION, instance.status_revision),
                Compare(layout.lock_key(instance.id), Target.MOD_REVISION, _lock_revision(instance)),
            ]
            # What happened to an instance that people still wish for is told on: another host may take it.
            wanted[key] = compares, [] if instance.keys else [Delete(layout.events_key(instance.id))]
    of_host = (layout.drain_fact_key, layout.drain_key, layout.return_key, layout.confirmation_key)
    for key in (key_of(gone) for key_of in of_host):
        if await store.get(key) is not None:
            wanted[key] = [], []
    absent = Compare(layout.session_key(gone), Target.MOD_REVISION, 0)
    done = {
        key: (await store.txn([*compares, absent], [Delete(key), *more])).succeeded
        for key, (compares, more) in wanted.items()
    }
    return Removed(tuple(key for key in done if done[key]), tuple(key for key in done if not done[key]))


def _lock_revision(instance: Instance) -> int:
    return 0 if instance.lock is None else instance.lock.kv.mod_revision


def _is_told_by(instance: Instance, gone: HostName) -> bool:
    """Whether its status is the last word of that host, and nothing that only this status tells is lost with it."""
    return instance.status is not None and instance.status.host == gone and not list(_needs(instance, gone))


def _needs(instance: Instance, gone: HostName) -> Iterator[str]:
    """Why an instance still needs the host, a line each, with the way out."""
    name, wish, status = instance.id, instance.wish, instance.status
    lock = None if instance.lock is None else instance.lock.lock
    if wish.host == gone:
        yield f"  {name}: its key `host` names it: `set {name} host=OTHER`, or `delete {name}`"
    elif wish.placement is not None and wish.placement.host == gone:
        yield f"  {name}: it was placed there for {wish.host}: `set {name} host=OTHER` (or {wish.host} again)"
    if lock is not None and lock.host == gone and lock.state is not LockState.BROKEN:
        way = f"break-lock {name}" if wish.keys else f"delete {name}"
        yield f"  {name}: it holds the lock, and may have a QEMU that writes: `{way}` says what to do"
    elif not wish.keys and status is not None and status.host == gone and status.tells_of_a_process:
        yield f"  {name}: it has no keys, and was last seen running there: `delete {name}` says what to do"
