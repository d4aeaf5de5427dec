"""etcd as it is over a network: answers late, answers lost, requests that arrive after their sender gave up.

The data is `tests.fakes.etcd`'s, which a contract suite holds to the real server. Here is what happens on the way. Each
call is carried out by the world, not by who asked: a supervisor that dies has sent what it has sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from kvmsupervisor.adapters.etcd import Ambiguous, Compare, EtcdError, Get, KeyValue, Op, TxnResult, Unavailable
from kvmsupervisor.adapters.etcd.api import Batch, Listing, Page, Reading
from kvmsupervisor.domain.durations import Durations
from tests.fakes.etcd import FakeEtcd, FakeKeysWatch, FakeWatch
from tests.simulation.loop import WORLD, context_of

T = TypeVar("T")

TIMEOUT_S = 5.0
"""As the adapter's own (`EtcdConfig.timeout_s`)."""

LATE_S = 30.0
"""The longest time a request is held up on its way."""

REFUSED_S = 0.05
"""How long a connection takes to be refused."""


@dataclass(slots=True)
class Weather:
    """What the way between one host and etcd is like.

    Attributes:
        slow_s: the longest time one way takes.
        loses_request: how likely a request never arrives; its sender waits until its deadline.
        loses_reply: how likely it is carried out, and the answer is lost.
        delays: how likely it is held up for some seconds on the way, beyond its deadline maybe.
        refuses: how likely the member says at once that it has no leader.
        repeats: how likely something on the way (a proxy, gRPC itself) sends a request again that was carried out, and
            the second answer is the one that comes back.
        cut: nothing passes.
    """

    slow_s: float = 0.02
    loses_request: float = 0.0
    loses_reply: float = 0.0
    delays: float = 0.0
    refuses: float = 0.0
    repeats: float = 0.0
    cut: bool = False

    def clear(self) -> None:
        self.slow_s = 0.02
        self.loses_request = self.loses_reply = self.delays = self.refuses = self.repeats = 0.0
        self.cut = False


class SimEtcd:
    """A `Store`: one client of the cluster's etcd.

    Attributes:
        data: the fake behind it.
        weather: of its host; whoever has it changes it.
    """

    def __init__(
        self,
        data: FakeEtcd,
        *,
        weather: Weather,
        quorum: asyncio.Event,
        chance: Random,
        tell: Callable[[str], None],
    ) -> None:
        self.data = data
        self.weather = weather
        self._quorum = quorum
        self._chance = chance
        self._tell = tell
        self._closed = False
        self.durations = Durations()
        self._up = False
        self._context = context_of(WORLD)
        # Watches are a connection of their own to the data: cut, they fall silent, and link again afterwards.
        self._watched = data.peer()
        if weather.cut:
            self._watched.away()

    # --- how a call goes --------------------------------------------------------------------------------------

    async def _call(
        self,
        what: str,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        writes: bool = False,
        timeout_s: float | None = None,
    ) -> T:
        limit_s = TIMEOUT_S if timeout_s is None else timeout_s
        loop: Any = asyncio.get_running_loop()
        weather = self._weather_of_call()
        failed = Ambiguous if writes else Unavailable
        answer: asyncio.Future[T] = loop.create_future()
        if self._closed or weather.refused:
            await asyncio.sleep(REFUSED_S)
            self._up = False
            self._tell(f"{what} refused")
            raise Unavailable("etcdserver: no leader" if not self._closed else "the client is closed")
        # The loop keeps it: it is nobody's to cancel.
        loop.create_task(self._carry(loop.pause, what, work, weather, answer), context=self._context)  # noqa: RUF006
        # Not `asyncio.timeout`, which costs as much as all the rest.
        limit = loop.call_later(limit_s, _give_up, answer)
        try:
            result = await answer
        except TimeoutError:
            self._up = False
            self._tell(f"{what} no answer within {limit_s:g} s")
            raise failed(f"no answer within {limit_s:g} s") from None
        finally:
            limit.cancel()
        self._up = True
        return result

    def _weather_of_call(self) -> _Passage:
        weather, draw = self.weather, self._chance.random
        there, back = draw() * weather.slow_s + 0.001, draw() * weather.slow_s + 0.001
        if weather.delays and draw() < weather.delays:
            there += draw() * LATE_S
        return _Passage(
            there_s=there,
            back_s=back,
            lost=weather.cut or (weather.loses_request > 0 and draw() < weather.loses_request),
            deaf=weather.loses_reply > 0 and draw() < weather.loses_reply,
            refused=weather.refuses > 0 and draw() < weather.refuses,
            twice=weather.repeats > 0 and draw() < weather.repeats,
        )

    async def _carry(
        self,
        pause: Callable[[float], Awaitable[None]],
        what: str,
        work: Callable[[], Coroutine[Any, Any, T]],
        passage: _Passage,
        answer: asyncio.Future[T],
    ) -> None:
        """What the network and the server do for one call."""
        await pause(passage.there_s)
        if passage.lost:
            self._tell(f"{what} lost on its way")
            return
        # A proposal waits for a quorum; its client may have given up by then.
        while not self._quorum.is_set():
            await self._quorum.wait()
        try:
            result = await work()
            if passage.twice:
                self._tell(f"{what} twice: -> {_short(result)}")
                result = await work()
        except EtcdError as error:
            self._tell(f"{what} -> {type(error).__name__}")
            await pause(passage.back_s)
            if not passage.deaf and not self.weather.cut and not answer.done():
                answer.set_exception(error)
            return
        self._tell(f"{what} -> {_short(result)}{' (answer lost)' if passage.deaf else ''}")
        await pause(passage.back_s)
        if not passage.deaf and not self.weather.cut and not answer.done():
            answer.set_result(result)

    # --- the Store --------------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        return self._up

    @property
    def endpoint(self) -> str:
        return "http://etcd:2379"

    @property
    def cluster(self) -> int:
        return self.data.cluster

    @property
    def members(self) -> int:
        return 1

    def leave(self) -> None:
        pass

    async def get(self, key: str, *, timeout_s: float | None = None) -> KeyValue | None:
        return await self._call(f"get {key}", lambda: self.data.get(key), timeout_s=timeout_s)

    async def get_at(self, key: str, revision: int) -> KeyValue | None:
        return await self._call(f"get {key}@{revision}", lambda: self.data.get_at(key, revision))

    async def read(self, *keys: str) -> Reading:
        return await self._call(f"read {' '.join(keys)}", lambda: self.data.read(*keys))

    async def list(self, prefix: str, *, page: int = 10_000) -> Listing:
        return await self._call(f"list {prefix}", lambda: self.data.list(prefix, page=page))

    async def pages(self, prefix: str, *, page: int = 10_000) -> AsyncGenerator[Page, None]:
        listing = await self.list(prefix, page=page)
        yield Page(listing.kvs, listing.revision)

    @asynccontextmanager
    async def watch(
        self, prefix: str, start_revision: int, *, prove: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[SimWatch]:
        async with self._watched.watch(prefix, start_revision, prove=prove) as inner:
            yield SimWatch(self, inner)

    @asynccontextmanager
    async def watch_keys(self, *, prove: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[SimKeysWatch]:
        async with self._watched.watch_keys(prove=prove) as inner:
            yield SimKeysWatch(self, inner)

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        return await self._call(f"put {key}", lambda: self.data.put(key, value, lease=lease), writes=True)

    async def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Op],
        failure: Sequence[Op] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        writes = any(not isinstance(op, Get) for op in (*success, *failure))
        what = "txn " + " ".join(f"{type(op).__name__.lower()}:{op.key}" for op in success)
        return await self._call(
            what, lambda: self.data.txn(compare, success, failure), writes=writes, timeout_s=timeout_s
        )

    async def grant(self, ttl_s: int) -> int:
        return await self._call("grant", lambda: self.data.grant(ttl_s), writes=True)

    async def keep_alive(self, lease: int, *, timeout_s: float | None = None) -> int:
        return await self._call(f"keep-alive {lease:x}", lambda: self.data.keep_alive(lease), timeout_s=timeout_s)

    async def time_to_live(self, lease: int) -> int:
        return await self._call(f"ttl {lease:x}", lambda: self.data.time_to_live(lease))

    async def revoke(self, lease: int) -> None:
        await self._call(f"revoke {lease:x}", lambda: self.data.revoke(lease), writes=True)

    async def close(self) -> None:
        self._closed = True
        await self._watched.close()

    def lose_watches(self) -> None:
        """Every watch falls silent, until `link`."""
        self._watched.away()

    def link(self) -> None:
        """Watches link again, where the way is open."""
        if not self.weather.cut:
            self._watched.back()

    # --- for its watches --------------------------------------------------------------------------------------

    async def pass_on(self) -> None:
        """The time that news takes on its way; longer in bad weather."""
        weather = self._weather_of_call()
        await asyncio.sleep(weather.back_s if not weather.deaf else 3.0 * self._chance.random())


@dataclass(slots=True, kw_only=True)
class _Passage:
    there_s: float
    back_s: float
    lost: bool
    deaf: bool
    refused: bool
    twice: bool


def _give_up(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


class SimWatch:
    """A watch whose news takes time. While the way is cut it says nothing; then it links again, with its proof."""

    def __init__(self, client: SimEtcd, inner: FakeWatch) -> None:
        self._client = client
        self._inner = inner

    @property
    def connected(self) -> bool:
        return self._inner.connected and not self._client.weather.cut

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        batch = await self._inner.__anext__()
        await self._client.pass_on()
        return batch


class SimKeysWatch(SimWatch):
    """The same of some keys."""

    def __init__(self, client: SimEtcd, inner: FakeKeysWatch) -> None:
        super().__init__(client, inner)
        self._inner_keys = inner

    def add(self, key: str, start_revision: int) -> None:
        self._inner_keys.add(key, start_revision)


def _short(result: object) -> str:
    match result:
        case TxnResult():
            return f"{'ok' if result.succeeded else 'no'} @{result.revision}"
        case KeyValue():
            return f"@{result.mod_revision}"
        case Listing() | Reading():
            return f"{len(result.kvs)} @{result.revision}"
        case _:
            return str(result)
