"""What happens to a client of etcd on the way, and to etcd itself: the same for the simulation's and for a real one.

Nastier than the world the simulation must not be, nor kinder. `test_contract.py` has what every `Store` does on good
days.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import pytest

from kvmsupervisor.adapters.etcd import (
    Ambiguous,
    Compare,
    Delete,
    Get,
    LeaseGone,
    NoSpace,
    Put,
    Store,
    Target,
    Unavailable,
    Watch,
)
from kvmsupervisor.adapters.etcd.api import TxnResult
from tests.adapters.etcd.traffic import client
from tests.fakes.etcd import FakeEtcd
from tests.simulation import loop as sim
from tests.simulation.chance import Chance
from tests.simulation.etcd import SimEtcd, Weather
from tests.support.etcd import EtcdServer
from tests.support.proxy import Proxy

KEY = "/kvm/1/lock"
FREE = [Compare(KEY, Target.CREATE_REVISION, 0)]
QUOTA = 4 << 20
LIMIT_S = 60.0
LOOK_S = 0.1


class Site(Protocol):
    """One etcd, a client whose way there somebody may spoil, and another one whose way is good."""

    store: Store
    other: Store

    def lose_replies(self) -> None:
        """What is sent arrives, and nothing comes back."""
        ...

    def hold(self) -> None:
        """Nothing passes; what is sent waits on the way."""
        ...

    def lose_requests(self) -> None:
        """Nothing passes, and what is sent is lost."""
        ...

    def heal(self) -> None:
        """All passes, what was held included."""
        ...

    async def repeated(self, compare: list[Compare], put: Put) -> TxnResult:
        """Something on the way sends a transaction twice; the answer that comes back is the second one's."""
        ...

    async def revoke(self, lease: int) -> None:
        """A person revokes a lease, or a frozen leader that wakes."""
        ...

    async def fill(self) -> None:
        """Etcd has no space any more."""
        ...

    async def make_space(self) -> None:
        """It has some again."""
        ...

    async def back_up(self) -> None:
        """A backup is made."""
        ...

    async def restore(self) -> None:
        """It takes the place of what there is."""
        ...


class Simulated:
    """The simulation's."""

    def __init__(self, loop: sim.SimLoop) -> None:
        self._data = FakeEtcd(loop.time)
        self._weather = Weather()
        self._backup: FakeEtcd | None = None
        self._quorum = asyncio.Event()
        self._quorum.set()
        self.store: Store = self._client(self._weather)
        self.other: Store = self._client(Weather())

    def _client(self, weather: Weather) -> SimEtcd:
        chance = Chance(1).of("net")
        return SimEtcd(self._data.peer(), weather=weather, quorum=self._quorum, chance=chance, tell=lambda said: None)

    def lose_replies(self) -> None:
        self._weather.loses_reply = 1.0

    def hold(self) -> None:
        self._weather.delays = 1.0

    def lose_requests(self) -> None:
        self._weather.loses_request = 1.0

    def heal(self) -> None:
        self._weather.clear()

    async def repeated(self, compare: list[Compare], put: Put) -> TxnResult:
        self._weather.repeats = 1.0
        try:
            return await self.store.txn(compare, [put], [Get(put.key)])
        finally:
            self._weather.clear()

    async def revoke(self, lease: int) -> None:
        self._data.expire(lease)

    async def fill(self) -> None:
        self._data.fill()

    async def make_space(self) -> None:
        self._data.make_space()

    async def back_up(self) -> None:
        self._backup = self._data.backup()

    async def restore(self) -> None:
        assert self._backup is not None
        self._data.restore(self._backup)


class Real:
    """A real server, with a proxy on the way."""

    def __init__(self, server: EtcdServer, proxy: Proxy, store: Store, other: Store, folder: Path) -> None:
        self.store, self.other = store, other
        self._server = server
        self._proxy = proxy
        self._backup = folder / "backup.db"
        self._loses = False

    def lose_replies(self) -> None:
        self._proxy.lose_replies()

    def hold(self) -> None:
        self._proxy.hole()

    def lose_requests(self) -> None:
        self._loses = True
        self._proxy.hole()

    def heal(self) -> None:
        if self._loses:
            self._proxy.cut()
        self._loses = False
        self._proxy.heal()

    async def repeated(self, compare: list[Compare], put: Put) -> TxnResult:
        await self.other.txn(compare, [put], [Get(put.key)])
        return await self.store.txn(compare, [put], [Get(put.key)])

    async def revoke(self, lease: int) -> None:
        await asyncio.to_thread(self._server.ctl, "lease", "revoke", f"{lease:x}")

    async def fill(self) -> None:
        with contextlib.suppress(NoSpace):
            for _ in range(4 * QUOTA // 100_000):
                await self.other.put("/fill", bytes(100_000))
            pytest.fail("etcd takes more than it may")

    async def make_space(self) -> None:
        revision = (await self.other.read(KEY)).revision
        await asyncio.to_thread(self._server.ctl, "compact", str(revision))
        await asyncio.to_thread(self._server.ctl, "defrag")
        await asyncio.to_thread(self._server.ctl, "alarm", "disarm")

    async def back_up(self) -> None:
        await asyncio.to_thread(self._server.back_up, self._backup)

    async def restore(self) -> None:
        await asyncio.to_thread(self._server.restore, self._backup)
        await asyncio.to_thread(self._server.wait_ready)


async def comes(ask: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it is so."""
    async with asyncio.timeout(LIMIT_S):
        while not await ask():  # noqa: ASYNC110 - the other side has no events for us
            await asyncio.sleep(LOOK_S)


async def answers(site: Site) -> None:
    """Wait until the way is good again."""

    async def answered() -> bool:
        with contextlib.suppress(Unavailable):
            await site.store.get(KEY)
            return True
        return False

    await comes(answered)


# --- the stories ----------------------------------------------------------------------------------------------


async def the_cluster_has_one_id(site: Site) -> None:
    """It is known from the first answer on, and the same for everybody."""
    assert site.store.cluster == 0
    await site.store.get(KEY)
    await site.other.get(KEY)
    assert site.store.cluster == site.other.cluster != 0


async def a_reply_is_lost(site: Site) -> None:
    """The write is `Ambiguous` and was done, once; a read is `Unavailable`."""
    await site.store.get(KEY)
    site.lose_replies()
    with pytest.raises(Ambiguous):
        await site.store.txn(FREE, [Put(KEY, b"mine")])
    with pytest.raises(Unavailable) as caught:
        await site.store.get(KEY)
    assert not isinstance(caught.value, Ambiguous)
    site.heal()
    await answers(site)
    found = await site.store.get(KEY)
    assert found is not None
    assert (found.value, found.create_revision) == (b"mine", found.mod_revision)


async def a_request_is_lost(site: Site) -> None:
    """The write is `Ambiguous`, and never was done."""
    await site.store.get(KEY)
    site.lose_requests()
    with pytest.raises(Ambiguous):
        await site.store.txn(FREE, [Put(KEY, b"mine")])
    site.heal()
    await answers(site)
    assert await site.other.get(KEY) is None
    assert (await site.store.txn(FREE, [Put(KEY, b"again")])).succeeded


async def a_request_is_late(site: Site) -> None:
    """Its sender has given up; it may still be done, but not over what was written meanwhile, and not twice."""
    await site.store.get(KEY)
    site.hold()
    with contextlib.suppress(Ambiguous):
        await site.store.txn(FREE, [Put(KEY, b"late")])
    won = await site.other.txn(FREE, [Put(KEY, b"first")])
    site.heal()
    await answers(site)
    await asyncio.sleep(1.0)
    found = await site.other.get(KEY)
    assert found is not None
    assert found.value == (b"first" if won.succeeded else b"late")
    assert found.create_revision == found.mod_revision


async def a_request_comes_twice(site: Site) -> None:
    """A compare-and-swap that was done is refused the second time, and what it finds is its own value."""
    answer = await site.repeated(FREE, Put(KEY, b"mine"))
    assert not answer.succeeded
    assert [kv.value for kvs in answer.reads for kv in kvs] == [b"mine"]


async def a_lease_is_revoked(site: Site) -> None:
    """Its keys go in one revision, and whoever renews it, or writes under it, is told."""
    lease = await site.store.grant(60)
    await site.store.txn([], [Put("/kvm/a", b"1", lease), Put("/kvm/b", b"1", lease)])
    before = (await site.store.read("/kvm/a")).revision
    async with site.store.watch("/kvm/", before + 1) as watch:
        await site.revoke(lease)
        async with asyncio.timeout(LIMIT_S):
            batch = await anext(aiter(watch))
    assert [(event.kv.key, event.deleted) for event in batch.events] == [(b"/kvm/a", True), (b"/kvm/b", True)]
    assert batch.revision == before + 1
    assert await site.store.keep_alive(lease) == 0
    assert await site.store.time_to_live(lease) == -1
    with pytest.raises(LeaseGone):
        await site.store.put("/kvm/a", b"2", lease=lease)


async def there_is_no_space(site: Site) -> None:
    """Nothing is written and no lease granted; what only reads, renews or revokes goes on, and all does afterwards."""
    lease = await site.store.grant(60)
    await site.store.put(KEY, b"1")
    await site.fill()
    for refused in (site.store.put(KEY, b"2"), site.store.txn([], [Put(KEY, b"2")]), site.store.grant(60)):
        with pytest.raises(NoSpace):
            await refused
    found = await site.store.get(KEY)
    assert found is not None
    assert found.value == b"1"
    assert [kv.key.decode() for kv in (await site.store.list(KEY)).kvs] == [KEY]
    assert await site.store.keep_alive(lease) == 60
    await site.store.revoke(lease)
    await site.make_space()
    await site.store.put(KEY, b"3")


async def a_backup_is_restored(site: Site) -> None:
    """The revision goes back, leases and the id stay, and a watch asks for its proof before it tells of what is new."""
    lease = await site.store.grant(600)
    await site.store.put(KEY, b"1", lease=lease)
    await site.back_up()
    await site.store.put("/kvm/2/lock", b"1")
    last = await site.store.txn([], [Delete(KEY)])
    await site.store.get(KEY)
    cluster = site.store.cluster
    asked: list[str] = []

    async def prove() -> None:
        asked.append("proof")
        await site.store.get(KEY)

    async with site.store.watch("/kvm/", last.revision, prove=prove) as watch:
        async with asyncio.timeout(LIMIT_S):
            await anext(aiter(watch))
        assert asked == ["proof"]
        more = asyncio.ensure_future(_end_of(watch))
        await site.restore()
        await comes(lambda: _proven(asked))
        more.cancel()
        await asyncio.wait({more})
    await answers(site)
    assert (await site.store.read(KEY)).revision < last.revision
    assert site.store.cluster == cluster
    found = await site.store.get(KEY)
    assert found is not None
    assert (found.value, found.lease) == (b"1", lease)
    assert await site.store.get("/kvm/2/lock") is None
    assert await site.store.keep_alive(lease) == 600


async def _end_of(watch: Watch) -> None:
    async for _ in watch:
        pass


async def _proven(asked: list[str]) -> bool:
    return len(asked) > 1


STORIES = (
    the_cluster_has_one_id,
    a_reply_is_lost,
    a_request_is_lost,
    a_request_is_late,
    a_request_comes_twice,
    a_lease_is_revoked,
    there_is_no_space,
    a_backup_is_restored,
)

stories = pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__.replace("_", " "))


@stories
def test_the_simulations(story: Callable[[Site], Awaitable[None]]) -> None:
    """In virtual time."""

    async def play(loop: sim.SimLoop) -> None:
        await story(Simulated(loop))

    sim.run(play)


@stories
async def test_a_real_one(story: Callable[[Site], Awaitable[None]], tmp_path: Path) -> None:
    """Etcd 3.4.23, or what there is."""
    with EtcdServer(args=("--quota-backend-bytes", str(QUOTA))) as server:
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(Proxy().running())
            proxy.target = server.member.client_port
            store = await stack.enter_async_context(client([f"http://127.0.0.1:{proxy.port}"], call_timeout_s=2.0))
            other = await stack.enter_async_context(client(server.endpoints))
            await story(Real(server, proxy, store, other, tmp_path))
