"""Faults of real members: calls and the watch come back while the fault lasts, and no event is lost.

How soon is not asserted, only that it does not take the end of the fault. The truth is a replay of history.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from kvmsupervisor.adapters.etcd import Compare, Etcd, Get, Put, Target, Unavailable
from tests.adapters.etcd.traffic import SOON_S, Traffic, client, follow, history
from tests.support.etcd import EtcdCluster, EtcdMember
from tests.support.proxy import PeerNetwork, Proxy


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[EtcdCluster]:
    """Three members for all tests of this module; starting them takes longer than most of these."""
    with EtcdCluster(3) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: EtcdCluster) -> Iterator[EtcdCluster]:
    """The three members, in health; what a test does to them is undone."""
    yield shared_cluster
    shared_cluster.repair()


def from_member(cluster: EtcdCluster, first: EtcdMember) -> tuple[str, ...]:
    """All endpoints, `first` first, which is the one that a new client uses."""
    return tuple(dict.fromkeys((first.endpoint, *cluster.endpoints)))


async def roles(cluster: EtcdCluster) -> tuple[EtcdMember, list[EtcdMember]]:
    leader = await asyncio.to_thread(cluster.leader)
    return leader, [member for member in cluster.members if member is not leader]


@pytest.mark.parametrize("victim", ["connected leader", "connected follower", "leader"])
async def test_a_member_is_killed(victim: str, cluster: EtcdCluster, etcd_prefix: str) -> None:
    """With one member dead, calls and the watch go on through the others; with it back, too."""
    leader, (follower, _) = await roles(cluster)
    killed = follower if victim == "connected follower" else leader
    connected = follower if victim == "leader" else killed
    async with client(from_member(cluster, connected)) as etcd, Traffic(etcd, etcd_prefix).running() as traffic:
        assert etcd.endpoint == connected.endpoint
        await asyncio.to_thread(killed.kill)
        await traffic.flows()
        killed.start()
        await asyncio.to_thread(killed.wait_ready)
        await traffic.flows()
        await traffic.verify(cluster.endpoints)


async def test_the_connected_leader_freezes(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """A frozen member, whose sockets live, is left; when it thaws, nothing is repeated."""
    leader, _ = await roles(cluster)
    async with client(from_member(cluster, leader)) as etcd, Traffic(etcd, etcd_prefix).running() as traffic:
        leader.freeze()
        await traffic.flows()
        assert etcd.endpoint != leader.endpoint
        leader.thaw()
        await traffic.flows()
        await traffic.verify(cluster.endpoints)


async def test_a_quiet_watch_leaves_a_frozen_member(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """Without any call that would time out, a watch finds out by itself that its member is frozen."""
    _, (frozen, other) = await roles(cluster)
    async with client(from_member(cluster, frozen)) as etcd, client([other.endpoint]) as writer:
        last = await writer.put(f"{etcd_prefix}/a", b"1")
        async with etcd.watch(etcd_prefix, last) as watch, asyncio.timeout(SOON_S):
            batches = aiter(watch)
            assert (await anext(batches)).revision == last
            frozen.freeze()
            last = await writer.put(f"{etcd_prefix}/a", b"2")
            assert (await anext(batches)).revision == last
            assert watch.connected
        assert etcd.endpoint != frozen.endpoint


async def test_all_members_restart(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """While all are down the watch says that it is not connected; when they are back it resumes."""
    async with client(cluster.endpoints) as etcd, Traffic(etcd, etcd_prefix).running() as traffic:
        async with etcd.watch(etcd_prefix, 1) as watch:
            await asyncio.to_thread(cluster.kill)
            with pytest.raises(Unavailable):
                await etcd.get("/a", timeout_s=0.5)
            assert not watch.connected
            assert not etcd.up
            cluster.start()
            await asyncio.to_thread(cluster.wait_ready)
            await traffic.flows()
            assert etcd.up
        await traffic.verify(cluster.endpoints)


CALLS: dict[str, Callable[[Etcd], Awaitable[object]]] = {
    "get": lambda etcd: etcd.get("/a"),
    "list": lambda etcd: etcd.list("/a"),
    "put": lambda etcd: etcd.put("/a", b"1"),
    "txn": lambda etcd: etcd.txn([], [Put("/a", b"1")]),
    "txn that reads": lambda etcd: etcd.txn([], [Get("/a")]),
    "txn that compares": lambda etcd: etcd.txn([Compare("/a", Target.MOD_REVISION, 0)], []),
    "grant": lambda etcd: etcd.grant(60),
    "keep_alive": lambda etcd: etcd.keep_alive(1),
    "time_to_live": lambda etcd: etcd.time_to_live(1),
    "revoke": lambda etcd: etcd.revoke(1),
}


async def test_without_quorum_every_call_ends(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """With one of three members left, every call ends as `Unavailable`, the ones that only read included."""
    _, (left, gone) = await roles(cluster)
    async with client(from_member(cluster, left), call_timeout_s=1.0) as etcd:
        await etcd.put("/a", b"1")
        for member in cluster.members:
            if member is not left:
                await asyncio.to_thread(member.kill)

        async def outcome(call: Callable[[Etcd], Awaitable[object]]) -> str:
            try:
                return f"returned {await call(etcd)}"
            except Unavailable:
                return "Unavailable"

        async with asyncio.timeout(SOON_S):
            outcomes = await asyncio.gather(*(outcome(call) for call in CALLS.values()))
        assert dict(zip(CALLS, outcomes, strict=True)) == dict.fromkeys(CALLS, "Unavailable")
        await asyncio.to_thread(gone.start)
        await asyncio.to_thread(gone.wait_ready)
        found = await etcd.get("/a", timeout_s=SOON_S)
        assert found is not None


async def test_the_leader_moves(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """Three changes of the leader, without a member being lost, are no error for reads and the watch."""
    async with client(cluster.endpoints) as etcd, Traffic(etcd, etcd_prefix).running() as traffic:

        async def read_on() -> None:
            while True:
                await etcd.get("/a")

        reading = asyncio.create_task(read_on())
        for _ in range(3):
            leader, (follower, _) = await roles(cluster)
            target = (await member_ids(cluster))[follower.name]
            await asyncio.to_thread(cluster.ctl, "move-leader", target, endpoint=leader.endpoint)
            await traffic.flows()
        assert not reading.done()
        reading.cancel()
        await traffic.verify(cluster.endpoints)


async def test_a_burst_arrives_whole(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """4,000 puts, a hundred in flight, arrive once each and in the order of their revisions."""
    async with client(cluster.endpoints) as etcd, client(cluster.endpoints) as writer:
        numbers = iter(range(4_000))
        revisions: list[int] = []

        async def write() -> None:
            for number in numbers:
                revision = await writer.put(f"{etcd_prefix}/{number % 1000}", str(number).encode())
                revisions.append(revision)

        first = await writer.put("/before", b"")
        watching = asyncio.create_task(follow(etcd, etcd_prefix, first, first + 4_000))
        await asyncio.gather(*(write() for _ in range(100)))
        seen = await watching
    assert [revision for *_, revision in seen] == sorted(revisions)
    assert {int(value) for _, value, *_ in seen} == set(range(4_000))


# With proxies between clients, members, or both.


async def member_ids(cluster: EtcdCluster) -> dict[str, str]:
    """Ids of the members, in hex, by name."""
    reply = json.loads(await asyncio.to_thread(cluster.ctl, "member", "list", "-w", "json"))
    return {member["name"]: f"{member['ID']:x}" for member in reply["members"]}


@asynccontextmanager
async def before(cluster: EtcdCluster) -> AsyncIterator[tuple[Proxy, ...]]:
    """A proxy before each member's port for clients."""
    async with AsyncExitStack() as stack:
        proxies = tuple([await stack.enter_async_context(Proxy().running()) for _ in cluster.members])
        for proxy, member in zip(proxies, cluster.members, strict=True):
            proxy.target = member.client_port
        yield proxies


def urls(proxies: Sequence[Proxy]) -> tuple[str, ...]:
    return tuple(f"http://127.0.0.1:{proxy.port}" for proxy in proxies)


async def test_packets_to_a_member_are_dropped(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """A member from which nothing comes back is left, and its late words are not taken for news."""
    async with (
        before(cluster) as proxies,
        client(urls(proxies)) as etcd,
        Traffic(etcd, etcd_prefix).running() as traffic,
    ):
        proxies[0].hole()
        await traffic.flows()
        assert etcd.endpoint == urls(proxies)[1]
        proxies[0].heal()
        proxies[1].hole()
        proxies[2].hole()
        await traffic.flows()
        proxies[1].heal()
        proxies[2].heal()
        await traffic.verify(cluster.endpoints)


async def test_the_connected_member_is_cut_off_from_its_peers(etcd_prefix: str) -> None:
    """A member that lives and answers, but knows no leader, is left."""
    async with PeerNetwork(3).running() as network:

        def prepare(members: Sequence[EtcdMember]) -> None:
            for proxy, member in zip(network.proxies, members, strict=True):
                proxy.target = member.peer_port
                member.advertised_peer_port = proxy.port

        cluster = EtcdCluster(3, prepare=prepare)
        await asyncio.to_thread(cluster.__enter__)
        try:
            ids = await member_ids(cluster)
            network.name({ids[member.name]: index for index, member in enumerate(cluster.members)})
            leader, (other, _) = await roles(cluster)
            async with (
                client(from_member(cluster, leader)) as etcd,
                Traffic(etcd, etcd_prefix).running() as traffic,
                client(from_member(cluster, leader)) as quiet,
                client([other.endpoint]) as writer,
                quiet.watch(f"{etcd_prefix}-quiet", await writer.put("/now", b"")) as watch,
            ):
                network.cut_off(cluster.members.index(leader))
                await traffic.flows()
                assert etcd.endpoint != leader.endpoint
                # A client that only watches is told by the member itself, which answers its pings.
                last = await writer.put(f"{etcd_prefix}-quiet", b"1")
                async with asyncio.timeout(SOON_S):
                    assert (await anext(aiter(watch))).revision == last
                network.heal()
                await traffic.flows()
                await traffic.verify(cluster.endpoints)
        finally:
            await asyncio.to_thread(cluster.close)


async def test_a_lease_is_kept_through_the_members_that_answer(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """With one endpoint holed a renewal succeeds by another; with all holed it fails in time to know."""
    async with before(cluster) as proxies, client(urls(proxies)) as etcd:
        lease = await etcd.grant(60)
        proxies[0].hole()
        assert await etcd.keep_alive(lease) == 60
        for proxy in proxies:
            proxy.hole()
        with pytest.raises(Unavailable):
            await etcd.keep_alive(lease, timeout_s=0.5)
        async with client(cluster.endpoints) as other:
            assert await other.time_to_live(lease) > 0


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_many_faults_in_a_row(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """Fifty random faults, a long freeze among them, and the events are still those of the history."""
    choice = random.Random(2)
    async with (
        before(cluster) as proxies,
        client(urls(proxies)) as etcd,
        Traffic(etcd, etcd_prefix).running() as traffic,
    ):
        for number in range(50):
            index = choice.randrange(len(cluster.members))
            member, proxy = cluster.members[index], proxies[index]
            match choice.choice(("kill", "freeze", "hole", "cut")):
                case "kill":
                    await asyncio.to_thread(member.kill)
                case "freeze":
                    member.freeze()
                case "hole":
                    proxy.hole()
                case "cut":
                    proxy.cut()
            await traffic.flows()
            if number == 25:
                await asyncio.sleep(45)  # longer than any time-out of etcd, gRPC or TCP's first ones
                await traffic.flows()
            proxy.heal()
            await asyncio.to_thread(cluster.repair)
            await traffic.flows()
        await traffic.verify(cluster.endpoints)


async def test_history_is_compared_with_itself(cluster: EtcdCluster, etcd_prefix: str) -> None:
    """The replay that these tests trust shows every put, in order."""
    async with client(cluster.endpoints) as etcd:
        revisions = [await etcd.put(f"{etcd_prefix}/a", str(number).encode()) for number in range(5)]
    assert [revision for *_, revision in await history(cluster.endpoints, etcd_prefix, revisions[-1])] == revisions
