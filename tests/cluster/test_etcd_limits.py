"""etcd's own limits, on each etcd that is supported: no space, a member defragmented or replaced, its leader moved.

A session outlives all of them (law 1), with a TTL as short as a loaded machine renews in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import Compare, Etcd, EtcdConfig, NoSpace, Put, Target
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import Layout
from tests.support.etcd import PROGRAMS, READY_S, EtcdCluster, EtcdMember, EtcdServer

TTL_S = 5
QUOTA = 4 << 20
ME = HostSession(host="a", version="1", url="http://a:9746", boot_id="boot-1", machine="machine-a")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=PROGRAMS)
def cluster(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with EtcdCluster(3, program=request.param, args=("--quota-backend-bytes", str(QUOTA))) as cluster:
        yield cluster


@pytest.fixture(params=PROGRAMS)
def alone(request: pytest.FixtureRequest) -> Iterator[EtcdServer]:
    with EtcdServer(program=request.param, args=("--quota-backend-bytes", str(QUOTA))) as server:
        yield server


class Held:
    """A session that is kept meanwhile."""

    def __init__(self, cluster: EtcdCluster, folder: Path) -> None:
        self.etcd = Etcd(EtcdConfig(endpoints=cluster.endpoints))
        self.folder = folder
        self._task: asyncio.Task[None] | None = None

    async def begin(self, value: HostSession = ME) -> None:
        self.session = Session(
            store=self.etcd, clock=Clock(), layout=Layout(), value=value, run_dir=self.folder, ttl_s=TTL_S
        )
        self._task = asyncio.create_task(self.session.run())
        await self.turned(held=True)

    async def turned(self, *, held: bool) -> None:
        turned = asyncio.Event()
        end = self.session.listen(turned.set)
        while self.session.held is not held:
            turned.clear()
            await turned.wait()
        end()

    async def renewed(self, times: int = 1) -> None:
        """Return once it was renewed so often."""
        told: asyncio.Queue[float] = asyncio.Queue()
        self.session.follow(told.put_nowait)
        for _ in range(times):
            await told.get()

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def check(self) -> None:
        assert self.session.held
        assert self.session.lost_count == 0


@contextlib.asynccontextmanager
async def held(cluster: EtcdCluster, folder: Path) -> AsyncIterator[Held]:
    one = Held(cluster, folder)
    await one.begin()
    try:
        yield one
    finally:
        await one.end()
        await one.etcd.close()


async def fill(etcd: Etcd) -> None:
    """Write until etcd takes no more."""
    with contextlib.suppress(NoSpace):
        for _ in range(4 * QUOTA // 100_000):
            await etcd.put("/fill", bytes(100_000))
        pytest.fail("etcd takes more than it may")


async def test_no_space(alone: EtcdServer, tmp_path: Path) -> None:
    """Law 1: without space the session is kept for several TTLs, and through a restart; then all goes on."""
    async with held(alone, tmp_path) as one:
        lock, status = "/kvm/1/lock", "/kvmsupervisor/instances/1"
        await one.etcd.put(lock, b"lock")
        await fill(one.etcd)
        assert "NOSPACE" in alone.ctl("alarm", "list")
        await one.renewed(8)
        one.check()
        reading = await one.etcd.read(lock, status)
        assert [None if kv is None else kv.value for kv in reading.kvs] == [b"lock", None]
        with pytest.raises(NoSpace):
            await one.etcd.txn([Compare(status, Target.MOD_REVISION, 0)], [Put(status, b"status")])
        await one.end()
        await one.begin(HostSession(host="a", version="2", url="", boot_id="boot-1", machine="machine-a"))
        await one.renewed(2)
        one.check()
        revision = (await one.etcd.read(lock)).revision
        await asyncio.to_thread(alone.ctl, "compact", str(revision))
        await asyncio.to_thread(alone.ctl, "defrag")
        await asyncio.to_thread(alone.ctl, "alarm", "disarm")
        await one.renewed(2)
        one.check()
        found = await one.etcd.get(one.session.key)
        assert found is not None
        assert b'"version":"2"' in found.value.replace(b" ", b"")
        await one.etcd.put(status, b"status")


async def test_the_leader_moves_and_a_member_is_defragmented_and_replaced(cluster: EtcdCluster, tmp_path: Path) -> None:
    """Law 1: each of them, one after the other, costs no session."""
    async with held(cluster, tmp_path) as one:
        for _ in range(2 * len(cluster.members)):
            leader = await asyncio.to_thread(cluster.leader)
            target = next(member for member in cluster.members if member is not leader)
            await asyncio.to_thread(
                cluster.ctl, "move-leader", member_id(cluster, target.name), endpoint=leader.endpoint
            )
            await one.renewed()
            one.check()
        for number in range(200):
            await one.etcd.put(f"/load/{number % 20}", bytes(5_000))
            if number % 50 == 0:
                member = cluster.members[number // 50 % len(cluster.members)]
                await asyncio.to_thread(cluster.ctl, "defrag", endpoint=member.endpoint)
        await one.renewed(2)
        one.check()
        await asyncio.to_thread(replace_first, cluster)
        await one.renewed(3)
        one.check()


def member_id(cluster: EtcdCluster, name: str) -> str:
    """The id of a member, in hexadecimal."""
    (line,) = [line for line in cluster.ctl("member", "list").splitlines() if f", {name}, " in line]
    return line.partition(",")[0]


def replace_first(cluster: EtcdCluster) -> None:
    """Take the first member away for good, and have one without data in its place."""
    member, survivor = cluster.members[0], cluster.members[1]
    gone = member_id(cluster, member.name)
    if member.leads:
        cluster.ctl("move-leader", member_id(cluster, survivor.name), endpoint=member.endpoint)
    cluster.ctl("member", "remove", gone, endpoint=survivor.endpoint)
    member.kill()
    add_again(cluster, member, survivor.endpoint)
    member.begin_anew()
    member.start()
    member.wait_ready()


def add_again(cluster: EtcdCluster, member: EtcdMember, endpoint: str) -> None:
    """Add a member to the others.

    Raft drops a change of members in silence while an earlier one is not applied everywhere, so it is asked for again.
    """
    until = time.monotonic() + READY_S
    while True:
        try:
            cluster.ctl("member", "add", member.name, f"--peer-urls={member.peer_url}", endpoint=endpoint)
        except AssertionError:
            if member.peer_url in cluster.ctl("member", "list", endpoint=endpoint):
                return
            if time.monotonic() > until:
                raise
        else:
            return
