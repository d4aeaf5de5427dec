"""`drain` and `undrain`: have a host empty itself, see how far it has come, and take it into service again."""

from __future__ import annotations

import asyncio

import click

from kvmsupervisor.adapters.etcd.api import Store, Unavailable
from kvmsupervisor.cli.common import HOST, Tools, pass_tools, wait_options, with_store
from kvmsupervisor.cli.errors import Refused, TimedOut
from kvmsupervisor.cli.output import printable
from kvmsupervisor.cli.progress import progress
from kvmsupervisor.cli.waiting import LOOK_AGAIN_S, Report, doorbell
from kvmsupervisor.cluster.acts import hosts
from kvmsupervisor.cluster.acts.foresight import foresee_drain, told
from kvmsupervisor.cluster.overview import Cluster, read_cluster
from kvmsupervisor.domain.evacuation import Plan
from kvmsupervisor.domain.host_wish import HostProgress, Mode, named_moves, summary
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.values import Unfit, host_name

host_argument = click.argument("host", required=False, type=HOST, metavar="[HOST]")
force_option = click.option("--force", is_flag=True, help="Also for a host that has no session.")


@click.command()
@host_argument
@click.option("--cold", is_flag=True, help="Also stop a guest that cannot be moved while it runs, and start it there.")
@click.option("--stop", "stopping", is_flag=True, help="The same, and shut down what has no other place.")
@click.option("--dry-run", is_flag=True, help="Tell where each would go, or why it cannot; exit status 1: some cannot.")
@force_option
@wait_options
@pass_tools
def drain(
    tools: Tools,
    *,
    host: str | None,
    cold: bool,
    stopping: bool,
    dry_run: bool,
    force: bool,
    wait: bool,
    timeout_s: float,
) -> None:
    """Have a host empty itself: each of its machines moves to another host, and nothing starts there.

    Without HOST it is this host. No guest is stopped, unless --cold or --stop says so; what cannot go stays, and says
    why. It goes on until `undrain`, also through restarts and reboots of that host. Given again, it asks the others
    again at once. Exit status with --wait: 0 the host is empty, 1 some cannot go, 4 timed out.

    Example: kvmsupervisor drain alpha --wait
    """
    if cold and stopping:
        raise click.UsageError("--stop does what --cold does, and more: give one of them.")
    mode = Mode.STOP if stopping else Mode.COLD if cold else Mode.LIVE
    name = _name(tools, host)

    async def look(store: Store, layout: Layout) -> Cluster:
        cluster = await read_cluster(store, layout)
        if not force:
            hosts.refuse_absent(cluster, name)
        return cluster

    cluster = with_store(tools, lambda store, settings: look(store, settings.layout))
    if dry_run:
        _print_plan(foresee_drain(cluster, name, mode))
        return
    revision = with_store(tools, lambda store, settings: hosts.drain(store, settings.layout, name, mode))
    click.echo(printable(f"{name} drains ({mode})"))
    if wait:
        with progress() as report:
            said = with_store(
                tools,
                lambda store, settings: _until_empty(
                    store, settings.layout, name, revision, timeout_s=timeout_s, report=report
                ),
            )
        click.echo(printable(said))


def _name(tools: Tools, host: str | None) -> HostName:
    name = tools.settings().hostname if host is None else host
    try:
        return HostName(host_name(name))
    except Unfit as error:
        raise click.UsageError(f"{name!r} is no host: {error}") from error


def _print_plan(found: Plan) -> None:
    for line in told(found) or ["nothing runs there"]:
        click.echo(printable(line))
    if found.refused.keys() - found.evicted:
        raise SystemExit(1)


async def _until_empty(
    store: Store, layout: Layout, host: HostName, revision: int, *, timeout_s: float, report: Report
) -> str:
    """Follow the drain to its end. The time begins anew with each machine that has gone.

    Raises:
        Refused: some cannot go, or somebody has taken the key away.
        TimedOut: neither has come about.
    """
    keys = (layout.drain_fact_key(host), layout.drain_key(host))
    said, moved = "", -1
    try:
        async with asyncio.timeout(timeout_s) as limit, doorbell(store, keys, revision) as bell:
            while True:
                bell.clear()
                try:
                    told, wanted = (await store.read(*keys)).kvs
                except Unavailable as error:
                    report(host, "waiting", f"etcd does not answer: {error}")
                else:
                    if wanted is None:
                        raise Refused(f"the drain of {host} was taken away (`undrain`)")
                    found = None if told is None else HostProgress.from_json(told.value)
                    if found is not None and found.of >= revision:
                        if found.drained is not None:
                            return f"{host} is empty since {found.drained}; moved: {named_moves(found.moved)}"
                        if found.waits_for_people:
                            raise Refused(_what_stays(found))
                        if len(found.moved) > moved:
                            moved = len(found.moved)
                            limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
                    now = "its supervisor has not said anything yet" if found is None else summary(found)
                    if now != said:
                        said = now
                        report(host, "draining", now)
                await _rung(bell)
    except TimeoutError:
        raise TimedOut(f"{host} is not empty within {timeout_s:g} s: {said or 'nothing was seen'}") from None


async def _rung(bell: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(LOOK_AGAIN_S):
            await bell.wait()
    except TimeoutError:
        return


def _what_stays(found: HostProgress) -> str:
    lines = [f"{name} stays: {why}" for name, why in found.refused.items()]
    return "\n".join([f"{found.host} is not empty, and nothing goes on by itself:", *lines])


@click.command()
@host_argument
@click.option("--return", "back", is_flag=True, help="Also take back what stands elsewhere for that host.")
@click.option("--cold", is_flag=True, help="With --return: stop a guest that cannot be moved while it runs.")
@pass_tools
def undrain(tools: Tools, *, host: str | None, back: bool, cold: bool) -> None:
    """Take a host into service again. What is on its way goes on; nothing else leaves, and guests start there again.

    What a drain or a failover has placed elsewhere stays there, unless --return says otherwise: then it comes back one
    at a time, while it runs. `hosts` shows how far that has come.

    Example: kvmsupervisor undrain alpha --return
    """
    if cold and not back:
        raise click.UsageError("--cold is about --return.")
    name = _name(tools, host)

    how = None if not back else Mode.COLD if cold else Mode.LIVE
    drained = with_store(tools, lambda store, settings: hosts.undrain(store, settings.layout, name, how)).drained
    said = f"{name} is in service" if drained else f"{name} did not drain"
    click.echo(printable(f"{said}, and takes back what stands elsewhere for it" if back else said))
