"""An etcd for thousands of hosts: it counts what it is asked, and takes the time that a real one takes.

The data is `tests.fakes.etcd`'s. Unlike there, an event costs only what the watchers that it concerns cost, and a
list is not sorted anew: what this fake does must not decide what is measured. One queue stands for etcd's processors:
each request and each event of each watcher takes its turn in it, so that a storm shows as time.

Sizes are those of etcd's messages: `Sizes` computes what protobuf would, without making the messages.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from kvmsupervisor.adapters.etcd import (
    Ambiguous,
    Batch,
    Compacted,
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Op,
    Put,
    TxnResult,
    Unavailable,
)
from kvmsupervisor.adapters.etcd.api import Listing, Page, Reading
from kvmsupervisor.domain.durations import Durations
from tests.fakes.etcd import FakeEtcd, _Server

T = TypeVar("T")

REQUEST_S = 120e-6
"""A request that reads or writes one key: 8,500 a second on two cores, with their answers."""

KEY_S = 2.5e-6
"""Each key of a list: 80,000 in 0.2 s."""

EVENT_S = 100e-6
"""Each event for each watcher of its prefix, measured with 20 supervisors; see docs/scale.md."""

WAY_S = 0.0005
"""One way through the network."""

TIMEOUT_S = 5.0
"""As the adapter's own (`EtcdConfig.call_timeout_s`)."""

HEADER = 26
"""Bytes of a response's header, with ids of 64 random bits and a revision of three bytes."""


def _varint(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


def _field(length: int) -> int:
    """A field of so many bytes, with its tag and its length."""
    return 1 + _varint(length) + length


def size_of(kv: KeyValue) -> int:
    """Bytes of an `mvccpb.KeyValue`; its version is taken for a small number."""
    numbers = 2 + sum(1 + _varint(one) for one in (kv.create_revision, kv.mod_revision) if one)
    lease = 1 + _varint(kv.lease) if kv.lease else 0
    value = _field(len(kv.value)) if kv.value else 0
    return _field(len(kv.key)) + value + numbers + lease


def size_of_event(event: Event) -> int:
    """Bytes of an event in a `WatchResponse`."""
    return _field(_field(size_of(event.kv)) + (2 if event.deleted else 0))


@dataclass(slots=True)
class Asked:
    """What etcd was asked.

    Attributes:
        requests: by gRPC method, as etcd counts received messages.
        sent: bytes of its answers, by method.
        events: events that were sent to watchers, by the first words of their keys.
        busy_s: how long it worked.
    """

    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    busy_s: float = 0.0

    def since(self, before: Asked) -> Asked:
        """What was asked since."""
        return Asked(
            self.requests - before.requests,
            self.sent - before.sent,
            self.events - before.events,
            self.busy_s - before.busy_s,
        )

    def copy(self) -> Asked:
        return Asked(Counter(self.requests), Counter(self.sent), Counter(self.events), self.busy_s)


class _Channel:
    """What happens to one range of keys, and who watches it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.events: list[Event] = []
        self.watchers: dict[ScaleWatch, None] = {}

    def from_revision(self, revision: int) -> int:
        return bisect_left(self.events, revision, key=lambda event: event.kv.mod_revision)


class ScaleServer(_Server):
    """The data, its watchers, and the queue for its processors.

    Args:
        clock: the loop's time.
        cores: that work for it.

    Attributes:
        asked: so far.
        up: whether it answers.
    """

    def __init__(self, clock: Callable[[], float], *, cores: float = 2.0) -> None:
        super().__init__(clock)
        self.asked = Asked()
        self.up = True
        self.watches: set[ScaleWatch] = set()
        self._cores = cores
        self._free_at = 0.0
        self._order: list[bytes] = []
        self._ranges: dict[bytes, _Channel] = {}
        self._single: dict[bytes, _Channel] = {}
        # By key: what was listed last, and its size. All hosts list the same.
        self._sizes: dict[bytes, tuple[KeyValue, int]] = {}

    def size_of_page(self, kvs: Iterable[KeyValue]) -> int:
        """Bytes of these in a `RangeResponse`."""
        size, sizes = 0, self._sizes
        for kv in kvs:
            known = sizes.get(kv.key)
            if known is None or known[0] is not kv:
                known = sizes[kv.key] = kv, _field(size_of(kv))
            size += known[1]
        return size

    def work(self, seconds: float) -> float:
        """Take a turn; return when it is over."""
        self.asked.busy_s += seconds
        self._free_at = max(self._free_at, self.now()) + seconds / self._cores
        return self._free_at

    def channel(self, key: bytes, *, prefix: bool) -> _Channel:
        """The range, and what happened to it from now on."""
        known = self._ranges if prefix else self._single
        if key not in known:
            known[key] = made = _Channel(kind_of(key))
            belongs = key.__eq__ if not prefix else lambda one: one.startswith(key)
            made.events = [event for event in self.history if belongs(event.kv.key)]
        return known[key]

    # Faster than the fake's.

    def expire_due(self) -> None:
        """Leases end by `tick`, twice a second, as etcd's do."""

    def tick(self) -> None:
        if self.up:
            super().expire_due()

    def come_back(self) -> None:
        """Answer again. A new leader gives each lease its whole TTL anew; watches have to be made again."""
        self.up = True
        for lease in self.leases.values():
            lease.renewed = self.now()
        for watch in tuple(self.watches):
            watch.break_off()

    def select(self, key: str, prefix: bool) -> list[KeyValue]:
        if not prefix:
            return super().select(key, prefix)
        wanted, begin = key.encode(), bisect_left(self._order, key.encode())
        end = bisect_left(self._order, wanted + b"\xff", lo=begin)
        return [self.keys[one] for one in self._order[begin:end]]

    def _put(self, key: bytes, value: bytes, lease: int, revision: int) -> Event:
        if key not in self.keys:
            insort(self._order, key)
        return super()._put(key, value, lease, revision)

    def _delete(self, kv: KeyValue, revision: int) -> Event:
        del self._order[bisect_left(self._order, kv.key)]
        return super()._delete(kv, revision)

    def _commit(self, revision: int, events: Sequence[Event]) -> None:
        if not events:
            return
        self.revision = revision
        self.history += events
        for event in events:
            key = event.kv.key
            concerned = [one for prefix, one in self._ranges.items() if key.startswith(prefix)]
            if (single := self._single.get(key)) is not None:
                concerned.append(single)
            for channel in concerned:
                channel.events.append(event)
                if number := len(channel.watchers):
                    due = self.work(EVENT_S * number)
                    self.asked.events[kind_of(key)] += number
                    for watch in channel.watchers:
                        watch.tell(due)


def kind_of(key: bytes) -> str:
    """What a key is, for people: such as `locks`, `hosts` or `wishes`."""
    words = key.decode(errors="replace").strip("/").split("/")
    if words[0] == "kvm":
        return "locks" if words[-1] == "lock" else "wishes"
    return words[1] if len(words) > 1 else words[0]


class ScaleEtcd:
    """A `Store`: one host's client.

    Attributes:
        cut: nothing passes.
        heard: events that reached this client.
    """

    def __init__(self, data: FakeEtcd, server: ScaleServer) -> None:
        self.cut = False
        self.heard = 0
        self.watches: set[ScaleWatch] = set()
        self._data = data
        self._server = server
        self.durations = Durations()
        self._up = False
        self._closed = False

    # --- how a call goes --------------------------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        work: Callable[[], Awaitable[T]],
        *,
        size: Callable[[T], int] = lambda _: HEADER,
        cost_s: Callable[[T], float] = lambda _: 0.0,
        writes: bool = False,
        timeout_s: float | None = None,
        requests: int = 1,
    ) -> T:
        server, loop = self._server, asyncio.get_running_loop()
        deadline = loop.time() + (TIMEOUT_S if timeout_s is None else timeout_s)
        await asyncio.sleep(WAY_S)
        while self._closed or self.cut or not server.up:
            self._up = False
            if self._closed or loop.time() >= deadline:
                raise Unavailable("the client is closed" if self._closed else f"{method}: no answer in time")
            # The adapter tries again that often, and connects at the latest so long after etcd is back.
            await asyncio.sleep(min(0.4, max(deadline - loop.time(), 0.001)))
        server.asked.requests[method] += requests
        # Served in its turn; what it reads is as of then.
        await _until(server.work(REQUEST_S * requests))
        result = await work()
        server.asked.sent[method] += size(result)
        await _until(server.work(cost_s(result)))
        await asyncio.sleep(WAY_S)
        if loop.time() > deadline:
            self._up = False
            raise (Ambiguous if writes else Unavailable)(f"{method}: no answer in time")
        self._up = True
        return result

    # --- the Store --------------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        return self._up

    @property
    def endpoint(self) -> str:
        return "http://etcd:2379"

    @property
    def cluster(self) -> int:
        return self._data.cluster

    @property
    def members(self) -> int:
        return 1

    def leave(self) -> None:
        pass

    async def get(self, key: str, *, timeout_s: float | None = None) -> KeyValue | None:
        return await self._call("Range", lambda: self._data.get(key), size=_size_of_one, timeout_s=timeout_s)

    async def get_at(self, key: str, revision: int) -> KeyValue | None:
        return await self._call("Range", lambda: self._data.get_at(key, revision), size=_size_of_one)

    async def read(self, *keys: str) -> Reading:
        return await self._call(
            "Range",
            lambda: self._data.read(*keys),
            size=lambda reading: sum(map(_size_of_one, reading.kvs)),
            requests=len(keys),
        )

    async def list(self, prefix: str, *, page: int = 10_000) -> Listing:
        kvs: list[KeyValue] = []
        revision = 0
        async for one in self.pages(prefix, page=page):
            kvs += map(KeyValue._make, one.entries)
            revision = one.revision
        return Listing(kvs, revision)

    async def pages(self, prefix: str, *, page: int = 10_000) -> AsyncGenerator[Page, None]:
        found = await self._call("Range", lambda: self._data.list(prefix), size=lambda _: 0)
        # All pages are of the revision of the first. Each is requested while its user works on the one before.
        for begin in range(0, max(len(found.kvs), 1), page):
            kvs = found.kvs[begin : begin + page]
            cost_s = KEY_S * len(kvs)
            if begin:
                await self._call("Range", _nothing, size=lambda _: 0, cost_s=lambda _, cost_s=cost_s: cost_s)  # type: ignore[misc]
            else:
                await _until(self._server.work(cost_s))
            self._server.asked.sent["Range"] += HEADER + self._server.size_of_page(kvs)
            yield Page(kvs, found.revision)

    @asynccontextmanager
    async def watch(
        self, prefix: str, start_revision: int, *, prove: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[ScaleWatch]:
        watch = ScaleWatch(self, self._server, prove)
        watch.cover(prefix.encode(), start_revision, prefix=True)
        try:
            yield watch
        finally:
            watch.end()

    @asynccontextmanager
    async def watch_keys(self, *, prove: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[ScaleWatch]:
        watch = ScaleWatch(self, self._server, prove)
        try:
            yield watch
        finally:
            watch.end()

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        return await self._call("Put", lambda: self._data.put(key, value, lease=lease), writes=True)

    async def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Op],
        failure: Sequence[Op] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        ops = (*success, *failure)
        return await self._call(
            "Txn",
            lambda: self._data.txn(compare, success, failure),
            size=lambda result: _size_of_txn(result, success if result.succeeded else failure),
            cost_s=lambda _: REQUEST_S * 0.1 * len(ops),
            writes=any(not isinstance(op, Get) for op in ops),
            timeout_s=timeout_s,
        )

    async def grant(self, ttl_s: int) -> int:
        return await self._call("LeaseGrant", lambda: self._data.grant(ttl_s), writes=True)

    async def keep_alive(self, lease: int, *, timeout_s: float | None = None) -> int:
        return await self._call("LeaseKeepAlive", lambda: self._data.keep_alive(lease), timeout_s=timeout_s)

    async def time_to_live(self, lease: int) -> int:
        return await self._call("LeaseTimeToLive", lambda: self._data.time_to_live(lease))

    async def revoke(self, lease: int) -> None:
        await self._call("LeaseRevoke", lambda: self._data.revoke(lease), writes=True)

    async def close(self) -> None:
        self._closed = True

    def die(self) -> None:
        """Its host is gone, and so are its connections."""
        self.cut = self._closed = True
        for watch in tuple(self.watches):
            watch.end()


class ScaleWatch:
    """A watch of one range or of several; see `Store.watch`."""

    def __init__(self, client: ScaleEtcd, server: ScaleServer, prove: Callable[[], Awaitable[None]] | None) -> None:
        self._client = client
        self._server = server
        self._prove = prove
        self._covered: dict[_Channel, int] = {}
        self._asked: dict[_Channel, int] = {}
        self._linked = False
        self._news = asyncio.Event()
        self._due = 0.0
        client.watches.add(self)
        server.watches.add(self)

    @property
    def connected(self) -> bool:
        return self._linked and self._server.up and not self._client.cut

    def cover(self, key: bytes, start_revision: int, *, prefix: bool) -> None:
        """Watch this range, too."""
        self._asked[self._server.channel(key, prefix=prefix)] = start_revision
        self._news.set()

    def add(self, key: str, start_revision: int) -> None:
        """See `KeysWatch.add`."""
        self.cover(key.encode(), start_revision, prefix=False)

    def end(self) -> None:
        self._client.watches.discard(self)
        self._server.watches.discard(self)
        for channel in self._covered:
            channel.watchers.pop(self, None)

    def break_off(self) -> None:
        """Its stream has ended: it has to be made again."""
        self._linked = False
        self._news.set()

    def tell(self, due: float) -> None:
        """There is an event; it leaves etcd at `due`."""
        self._due = due
        self._news.set()

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        while True:
            self._news.clear()
            if not self.connected:
                await self._link()
            self._create()
            for channel, at in self._covered.items():
                if at < len(channel.events):
                    return await self._deliver(channel, at)
            await self._news.wait()

    async def _link(self) -> None:
        while True:
            if self._client.cut or not self._server.up:
                await asyncio.sleep(0.4)
                continue
            try:
                if self._prove is not None:
                    await self._prove()
            except Unavailable:
                continue
            break
        for channel, at in self._covered.items():
            seen = channel.events[at - 1].kv.mod_revision + 1 if at else 0
            self._asked.setdefault(channel, seen)
            channel.watchers.pop(self, None)
        self._linked = True

    def _create(self) -> None:
        while self._asked:
            channel, revision = self._asked.popitem()
            if revision < self._server.compacted:
                raise Compacted(self._server.compacted)
            self._server.asked.requests["Watch"] += 1
            self._due = self._server.work(REQUEST_S)
            channel.watchers[self] = None
            self._covered[channel] = channel.from_revision(revision)

    async def _deliver(self, channel: _Channel, at: int) -> Batch:
        # What happens on its way is in the next one.
        await _until(max(self._due, self._server.now()) + WAY_S)
        events = channel.events[at:]
        self._covered[channel] = len(channel.events)
        self._client.heard += len(events)
        self._server.asked.sent["Watch"] += HEADER + 6 + sum(map(size_of_event, events))
        return Batch(events, events[-1].kv.mod_revision)


async def _nothing() -> None:
    return None


async def _until(when: float) -> None:
    loop = asyncio.get_running_loop()
    if when > loop.time():
        await asyncio.sleep(when - loop.time())


def _size_of_one(kv: KeyValue | None) -> int:
    return HEADER + (0 if kv is None else _field(size_of(kv)) + 2)


def _size_of_txn(result: TxnResult, ops: Iterable[Op]) -> int:
    reads = iter(result.reads)
    size = HEADER + 2
    for op in ops:
        match op:
            case Get():
                size += _field(_field(HEADER + sum(_field(size_of(kv)) for kv in next(reads))))
            case Put() | Delete():
                size += 10
    return size
