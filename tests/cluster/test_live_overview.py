"""The cluster kept in step is the cluster as it is read: the same instances, the same hosts, at every moment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from kvmsupervisor.cluster.host_table import facts_of
from kvmsupervisor.cluster.live_overview import LiveOverview
from kvmsupervisor.cluster.overview import Cluster, as_object, read_cluster
from kvmsupervisor.cluster.read_history import ReadHistory
from kvmsupervisor.domain.events import Event, to_json
from kvmsupervisor.domain.host_wish import HostProgress, Mode
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd

NAMES = ("1", "2", "9", "10", "vm-a")
HOSTS = ("alpha", "beta", "gamma")


class Bench:
    def __init__(self, layout: Layout) -> None:
        self.clock = FakeClock()
        self.world = World(FakeEtcd(self.clock.now), layout)
        self.etcd = self.world.etcd.peer()
        self.overview = LiveOverview(
            store=self.etcd, clock=self.clock, layout=layout, history=ReadHistory(self.etcd), rand=lambda: 0.5
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.overview.run())
        await self.clock.advance(1)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def look(self) -> Cluster:
        await self.clock.advance(1)
        await self.overview.look()
        return self.overview.cluster

    async def read(self) -> Cluster:
        return await read_cluster(self.world.etcd, self.world.layout)


def objects(cluster: Cluster) -> object:
    """All that is shown of a cluster, in its order."""
    return (
        [(as_object(one, cluster), one.wish, one.status_revision, one.lock) for one in cluster.instances.values()],
        [fact.to_object() for fact in facts_of(cluster)],
        cluster.host_wishes,
    )


def progress(host: str, of: int) -> bytes:
    return HostProgress(host=host, mode=Mode.LIVE, of=of, since="2026-03-01T12:00:00Z", left=("1",)).to_json()


def do_something(world: World, chance: random.Random) -> None:
    """One write or deletion, of any kind that there is."""
    name, host = chance.choice(NAMES), chance.choice(HOSTS)
    layout, etcd = world.layout, world.etcd
    acts: list[Callable[[], object]] = [
        lambda: world.keys(name, host=host),
        lambda: world.keys(name, ram=chance.choice(["1G", "plenty"])),
        lambda: world.running(name, host),
        lambda: world.lock(name, host),
        lambda: world.host(host),
        lambda: world.status(name, host, chance.choice(list(Phase)), "x" * chance.choice([1, 100_000])),
        lambda: etcd.write(layout.status_key(InstanceId(name)), "no status"),
        lambda: etcd.write(layout.session_key(HostName(host)), "no session"),
        lambda: etcd.write(f"{layout.wishes_prefix}.images/one", "http://x"),
        lambda: etcd.write(f"{layout.wishes_prefix}no id/host", "alpha"),
        lambda: etcd.write(layout.drain_key(host), chance.choice(["live", "cold", "x"])),
        lambda: etcd.write(layout.return_key(host), "live"),
        lambda: etcd.write(layout.drain_fact_key(host), progress(host, chance.randint(1, 9))),
        lambda: etcd.erase(layout.drain_key(host), layout.return_key(host)),
        lambda: etcd.erase(layout.drain_fact_key(host)),
        lambda: etcd.write(
            layout.placement_key(InstanceId(name)),
            Placement(host=HostName(host), why="failover", since="", of=max(1, etcd.revision - 1)).to_json(),
        ),
        lambda: etcd.erase(*(key for key in etcd.data if f"/{name}/" in key)),
        lambda: etcd.erase(layout.status_key(InstanceId(name))),
        lambda: etcd.erase(layout.session_key(HostName(host))),
        lambda: etcd.erase(layout.lock_key(InstanceId(name))),
    ]
    chance.choice(acts)()


LAYOUTS = [Layout(), Layout(lock="/kvmsupervisor/locks/%i"), Layout(lock="/locks/%i/lock")]
"""Locks among the wishes, among the facts, and elsewhere."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=["wishes", "facts", "elsewhere"])
@pytest.mark.parametrize("seed", range(8))
async def test_it_is_what_is_read(layout: Layout, seed: int) -> None:
    """Law: the same set as `list` and `hosts` show, whatever was written, through losses and compactions."""
    chance, bench = random.Random(seed), Bench(layout)
    async with bench.running():
        for turn in range(60):
            for _ in range(chance.randint(1, 4)):
                do_something(bench.world, chance)
            if turn % 15 == 7:
                bench.etcd.away()
                do_something(bench.world, chance)
                if chance.random() < 0.5:
                    bench.world.etcd.compact()
                bench.etcd.back()
                await bench.clock.advance(60)
            assert objects(await bench.look()) == objects(await bench.read()), turn


async def test_a_change_touches_what_it_is_about() -> None:
    """What did not change stays the very same object."""
    bench = Bench(Layout())
    for name in NAMES:
        bench.world.running(name)
    async with bench.running():
        before = (await bench.look()).instances
        bench.world.status("2", "alpha", Phase.STOPPED)
        await bench.clock.advance(1)
        differing = await bench.overview.look()
        assert (set(differing.instances), differing.hosts, differing.anew) == ({InstanceId("2")}, False, False)
        after = bench.overview.cluster.instances
        assert [name for name in after if after[name] is not before[name]] == ["2"]
        assert not (await bench.overview.look()).instances


async def test_a_restored_etcd_is_read_anew() -> None:
    """Law 11: what a backup does not have is shown no more, also where its revisions are greater."""
    bench = Bench(Layout())
    bench.world.host("alpha")
    bench.world.running("1")
    backup = bench.world.etcd.backup()
    bench.world.running("2")
    async with bench.running():
        assert list((await bench.look()).instances) == ["1", "2"]
        bench.world.etcd.restore(backup)
        for _ in range(20):
            bench.world.keys("1", description="again")
        await bench.clock.advance(60)
        differing = await bench.overview.look()
        assert differing.anew
        assert list(bench.overview.cluster.instances) == ["1"]
        assert bench.overview.in_step


async def test_it_says_what_is_wrong() -> None:
    """Without etcd it is not in step, says why, and comes back by itself."""
    bench = Bench(Layout())
    bench.etcd.away()
    async with bench.running():
        assert not bench.overview.in_step
        assert "/kvm/ cannot be read" in bench.overview.problem
        bench.etcd.back()
        await bench.clock.advance(60)
        assert (bench.overview.in_step, bench.overview.problem) == (True, "")


async def test_events_are_read_when_asked_for() -> None:
    """Of one instance, or the newest of all."""
    bench = Bench(Layout())

    def event(number: int) -> Event:
        return Event(at=f"2026-03-01T12:00:{number:02}Z", host="alpha", event="instance.running", epoch=number)

    for number, name in enumerate(NAMES):
        bench.world.etcd.write(bench.world.layout.events_key(InstanceId(name)), to_json([event(number)])[0])
    async with bench.running():
        await bench.look()
        assert bench.overview.events_of(InstanceId("9")) == (event(2),)
        assert bench.overview.events_of(InstanceId("nobody")) == ()
        assert set(bench.overview.histories(2)) == {"10", "vm-a"}
        assert bench.overview.events_revision(InstanceId("9")) > 0
        assert bench.overview.events_revision(InstanceId("nobody")) == 0
