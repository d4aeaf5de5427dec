"""`drain` and `undrain`: have a host empty itself, see how far it has come, and take it into service again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping

import click

from kvmsupervisor.adapters.etcd.api import Compare, Delete, Op, Put, Store, Target, Unavailable
from kvmsupervisor.cli.common import HOST, Tools, pass_tools, wait_options, with_store
from kvmsupervisor.cli.errors import Refused, TimedOut
from kvmsupervisor.cli.output import printable
from kvmsupervisor.cli.progress import progress
from kvmsupervisor.cli.waiting import LOOK_AGAIN_S, Report, doorbell
from kvmsupervisor.cluster.overview import Cluster, Instance, read_cluster
from kvmsupervisor.domain.admission import OVERHEAD_MIB, need_mib
from kvmsupervisor.domain.evacuation import Leaver, Plan, Room, named_hosts, plan, why_it_stays, why_kept
from kvmsupervisor.domain.host_wish import HostProgress, Mode, named_moves, summary
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.move_checks import Guest, refusals
from kvmsupervisor.domain.single import is_single
from kvmsupervisor.domain.spec import Power, Spec
from kvmsupervisor.domain.values import Unfit, host_name

host_argument = click.argument("host", required=False, type=HOST, metavar="[HOST]")
force_option = click.option("--force", is_flag=True, help="Also for a host that has no session.")


def _need_mib(spec: Spec | None) -> int:
    """As a host counts it."""
    return OVERHEAD_MIB if spec is None else need_mib(spec)


def _rooms(cluster: Cluster, leaving: str) -> dict[str, Room]:
    promised: dict[str, int] = {}
    for one in cluster.instances.values():
        host = one.wish.runs_on
        if host is not None and one.wish.power is Power.ON:
            promised[host] = promised.get(host, 0) + _need_mib(one.wish.spec)
    return {
        host: Room(
            drains=session is None or session.draining or cluster.wish_of(host).drain is not None,
            free_mib=session.guests_mib - promised.get(host, 0) if session and session.guests_mib else math.inf,
        )
        for host, session in cluster.sessions.items()
        if host != leaving and not is_single(host)
    }


def _leaver(one: Instance, cluster: Cluster, host: str, rooms: Mapping[str, Room]) -> Leaver:
    status, wish, spec = one.status, one.wish, one.wish.spec
    assert status is not None
    here = cluster.sessions.get(host)
    not_live: dict[str, str] = {}
    if spec is not None:
        guest = Guest(spec=spec, machine=status.machine, accel=status.accelerator)
        for target in rooms:
            there = cluster.sessions.get(target)
            moves = (None if session is None else session.moves for session in (here, there))
            if found := refusals(guest, target, *moves):
                not_live[target] = "; ".join(map(str, found))
    named, home = named_hosts(wish, host)
    return Leaver(
        id=one.id,
        named=named,
        home=home,
        priority=wish.priority,
        need_mib=_need_mib(spec),
        stays=why_it_stays(wish, None),
        # The order would be newer than every `host`.
        kept=why_kept(wish, me=host, drain_revision=wish.host_revision, held=status.held),
        not_live=not_live,
    )


def foresee(cluster: Cluster, host: str, mode: Mode) -> Plan:
    """What a drain would do with each machine that runs there, as far as keys, statuses and sessions tell.

    What only the targets see is not known here: their ports, bridges and files.
    """
    session = cluster.sessions.get(host)
    rooms = _rooms(cluster, host)
    leavers = [
        _leaver(one, cluster, host, rooms)
        for one in cluster.instances.values()
        if one.status is not None and one.status.host == host and one.status.pid is not None and one.wish.keys
    ]
    any_host = session is not None and session.drain_any
    return plan(leavers, rooms, mode=mode, any_host=any_host, leaving=0, most=math.inf, now=0.0)


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
        return await read_cluster(store, layout)

    cluster = with_store(tools, lambda store, settings: look(store, settings.layout))
    if not cluster.alive(name) and not force:
        raise Refused(f"{name} has no session{cluster.meant_by(name)}; --force drains it once it is there")
    if dry_run:
        _print_plan(foresee(cluster, name, mode), mode)
        return
    revision = with_store(tools, lambda store, settings: _order(store, settings.layout, name, mode))
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


def _print_plan(found: Plan, mode: Mode) -> None:
    for go in found.go:
        how = "while it runs" if go.live else "while it runs if it can, else cold"
        click.echo(printable(f"{go.id}: goes to {go.host}, {how}"))
    for name, why in found.refused.items():
        does = "is shut down" if name in found.evicted else "stays"
        click.echo(printable(f"{name}: {does}: {why}"))
    if not found.go and not found.refused:
        click.echo("nothing runs there")
    if found.refused.keys() - found.evicted:
        raise SystemExit(1)


async def _order(store: Store, layout: Layout, host: HostName, mode: Mode) -> int:
    """Write the key, and take an earlier order to return away; return the revision."""
    done = await store.txn([], [Put(layout.drain_key(host), mode.value.encode()), Delete(layout.return_key(host))])
    return done.revision


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

    async def work(store: Store, layout: Layout) -> bool:
        key = layout.drain_key(name)
        found = await store.get(key)
        ops: list[Op] = [Delete(key)]
        if back:
            ops.append(Put(layout.return_key(name), b"cold" if cold else b"live"))
        seen = Compare(key, Target.MOD_REVISION, 0 if found is None else found.mod_revision)
        if not (await store.txn([seen], ops)).succeeded:
            raise Refused(f"{key} has changed meanwhile: run the command again")
        return found is not None

    drained = with_store(tools, lambda store, settings: work(store, settings.layout))
    said = f"{name} is in service" if drained else f"{name} did not drain"
    click.echo(printable(f"{said}, and takes back what stands elsewhere for it" if back else said))
