"""`confirm-removal`: an operator confirms orders that a host holds, or that a host is gone for good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import click

from kvmsupervisor.adapters.etcd.api import Compare, Put, Store, Target
from kvmsupervisor.cli import waiting
from kvmsupervisor.cli.common import HOST, Tools, pass_tools, wait_options, with_store
from kvmsupervisor.cli.errors import Refused, TimedOut
from kvmsupervisor.cli.output import printable
from kvmsupervisor.cli.progress import progress
from kvmsupervisor.cli.write_commands import confirm, yes_option
from kvmsupervisor.cluster.acts import hosts
from kvmsupervisor.cluster.overview import Cluster, Instance, read_cluster
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.history import HistoryName
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.parse_keys import public_value
from kvmsupervisor.domain.removal import SHOWN_CHARS


@click.command("confirm-removal")
@click.argument("host", type=HOST, metavar="[HOST]", required=False)
@yes_option
@wait_options
@pass_tools
def confirm_removal(tools: Tools, host: str | None, yes: bool, wait: bool, timeout_s: float) -> None:
    """Confirm the orders that HOST holds (by default this host): removals, moves, power=off.

    When the keys tell a host to stop more than half of its running instances at once, the host keeps them running until
    a person confirms this. The same holds for each such order after etcd was restored from a backup, or emptied. The
    command shows the instances, with the former and present values of their keys, and asks; without a terminal, --yes
    is needed.

    When HOST has no session and other hosts wait for it since etcd was restored, the command confirms that HOST is gone
    for good.
    """

    async def look(store: Store, settings: Settings) -> tuple[HostName, Cluster]:
        name = HostName(host if host is not None else settings.hostname)
        return name, await read_cluster(store, settings.layout)

    name, cluster = with_store(tools, look)
    held = hosts.held_by(cluster, name)
    if not held and _is_awaited(cluster, name):
        _give_up_on(tools, name, yes=yes)
        return
    if not held:
        raise Refused(f"host {printable(name)} holds no removal: there is nothing to confirm")
    names = ", ".join(one.id for one in held)
    click.echo(f"host {printable(name)} holds the removal of {len(held)} instances: {names}")
    for line in (line for one in held for line in _what_differs(one)):
        click.echo(printable(line))
    confirm(f"Let host {printable(name)} shut these {len(held)} instances down, as their keys say now?", yes=yes)

    async def work(store: Store, settings: Settings) -> bool:
        revision = await hosts.confirm(store, settings.layout, name, [one.id for one in held])
        key = settings.layout.confirmation_key(name)
        if not wait:
            return True
        with progress() as report:
            report(name, "waiting", "for the host to take the confirmation")
            return await waiting.wait_until_deleted(store, key, revision, timeout_s=timeout_s)

    if not with_store(tools, work):
        raise TimedOut(f"host {printable(name)} has not taken the confirmation within {timeout_s:g} s")
    click.echo("confirmed" if not wait else "confirmed, and taken by the host")


def _what_differs(held: Instance) -> Iterator[str]:
    """The former and present values of its keys."""
    assert held.status is not None
    for key, before in (held.status.stood or {}).items():
        raw = held.keys.get(key.encode())
        if raw is None:
            now = "removed"
        else:
            shown = public_value(key, raw.value).decode(errors="replace").strip()[:SHOWN_CHARS]
            now = "differs" if shown == before else repr(shown)
        yield f"  {held.id}: {key} was {before!r}, now {now}"


def _is_awaited(cluster: Cluster, host: HostName) -> bool:
    """Whether other hosts wait for this one to say what runs there, since etcd has another history."""
    name = cluster.history
    return name is not None and host in name.hosts and host not in name.gone and not cluster.alive(host)


def _give_up_on(tools: Tools, host: HostName, *, yes: bool) -> None:
    click.echo(
        f"host {printable(host)} has no session, and has not said what runs there since etcd has another history; "
        "machines whose disks cannot be fenced wait for that"
    )
    confirm(f"Is every QEMU on {printable(host)} certainly gone?", yes=yes)

    async def work(store: Store, settings: Settings) -> bool:
        key = settings.layout.history_key
        found = await store.get(key)
        name = None if found is None else HistoryName.from_json(found.value)
        if found is None or name is None:
            return False
        gone = replace(name, gone=tuple(sorted({*name.gone, host})))
        unchanged = [
            Compare(key, Target.MOD_REVISION, found.mod_revision),
            Compare(settings.layout.session_key(host), Target.MOD_REVISION, 0),
        ]
        return (await store.txn(unchanged, [Put(key, gone.to_json())])).succeeded

    if not with_store(tools, work):
        raise Refused(f"nothing was written: {printable(host)} is back, or somebody has confirmed this meanwhile")
    click.echo(f"no host waits for {printable(host)} any more")
