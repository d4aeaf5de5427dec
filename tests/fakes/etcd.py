"""An etcd in memory, with switches for everything that may happen to a client of the real one.

`FakeEtcd` implements `Store`. tests/adapters/etcd/test_contract.py holds it to what the real server does.

Several clients of one store (two hosts, of which one is cut off) are made with `peer()`: the data and the
leases are shared, the switches (`away`, `deny`, …) and the counters are each client's own.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from kvmsupervisor.adapters.etcd.api import (
    Ahead,
    Ambiguous,
    Batch,
    Compacted,
    Compare,
    Delete,
    Denied,
    EtcdError,
    Event,
    Get,
    KeyValue,
    LeaseGone,
    Listing,
    NoSpace,
    Op,
    Page,
    Put,
    Reading,
    Rejected,
    Target,
    TxnResult,
    Unavailable,
)
from kvmsupervisor.domain.durations import Durations


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    renewed: float
    keys: set[bytes] = field(default_factory=set)


class _Server:
    """The data that all clients of one fake share."""

    def __init__(self, clock: Callable[[], float] | None, cluster: int = 1) -> None:
        self.clock = clock
        self.cluster = cluster
        self.revision = 1
        self.compacted = 0
        self.keys: dict[bytes, KeyValue] = {}
        self.history: list[Event] = []
        self.leases: dict[int, _Lease] = {}
        # Another cluster's are other ones: etcd makes them of the member's id and the time.
        self.next_lease = (cluster - 1 << 32) + 0x1000
        self.full = False
        self.wakers: set[asyncio.Event] = set()
        # How often another history has taken the place of this one: each breaks every watch.
        self.born = 0

    def at(self, key: bytes, revision: int) -> KeyValue | None:
        """A key as it was at a revision."""
        if revision > self.revision:
            raise Ahead("etcdserver: mvcc: required revision is a future revision")
        if revision < self.compacted:
            raise Compacted(self.compacted)
        before = (event for event in reversed(self.history) if event.kv.mod_revision <= revision)
        last = next((event for event in before if event.kv.key == key), None)
        return None if last is None or last.deleted else last.kv

    def become(self, other: _Server) -> None:
        """Hold what `other` holds, from its first revision on."""
        self.revision, self.compacted = other.revision, other.compacted
        self.keys, self.history = dict(other.keys), list(other.history)
        self.leases = {
            lease_id: _Lease(lease.ttl_s, self.now(), set(lease.keys)) for lease_id, lease in other.leases.items()
        }
        self.next_lease = max(self.next_lease, other.next_lease)
        self.born += 1
        self.wake()

    def index_of(self, revision: int) -> int:
        """Where in the history the first event at or after `revision` is."""
        if not self.history or self.history[-1].kv.mod_revision < revision:
            # Mostly: who asks is up to date.
            return len(self.history)
        return bisect_left(self.history, revision, key=lambda event: event.kv.mod_revision)

    def now(self) -> float:
        return 0.0 if self.clock is None else self.clock()

    def wake(self) -> None:
        for waker in self.wakers:
            waker.set()

    def expire_due(self) -> None:
        if self.clock is None:
            return
        now = self.clock()
        for lease_id in [one for one, lease in self.leases.items() if now >= lease.renewed + lease.ttl_s]:
            self.end_lease(lease_id)

    def end_lease(self, lease_id: int) -> None:
        lease = self.leases.pop(lease_id)
        self.delete(sorted(lease.keys))

    def holds(self, compare: Compare) -> bool:
        found = self.keys.get(compare.key.encode())
        match compare.target:
            case Target.VALUE:
                return found is not None and found.value == compare.value
            case Target.MOD_REVISION:
                return (found.mod_revision if found else 0) == compare.value
            case Target.CREATE_REVISION:
                return (found.create_revision if found else 0) == compare.value
            case Target.LEASE:
                return (found.lease if found else 0) == compare.value

    def select(self, key: str, prefix: bool) -> list[KeyValue]:
        wanted = key.encode()
        if not prefix:
            return [self.keys[wanted]] if wanted in self.keys else []
        return [self.keys[found] for found in sorted(found for found in self.keys if found.startswith(wanted))]

    def check(self, ops: Iterable[Op]) -> None:
        """Refuse what the server refuses before it writes anything."""
        written: set[str] = set()
        for op in ops:
            if isinstance(op, Put):
                if not op.key:
                    raise Rejected("etcdserver: key is not provided")
                if op.key in written:
                    raise Rejected(f"etcdserver: duplicate key given in txn request ({op.key})")
                if op.lease and op.lease not in self.leases:
                    raise LeaseGone(f"etcdserver: requested lease not found ({op.lease:x})")
                written.add(op.key)

    def apply(self, ops: Iterable[Op]) -> list[list[KeyValue]]:
        """Run the operations in order, all writes in one revision; return what each `Get` found."""
        reads: list[list[KeyValue]] = []
        events: list[Event] = []
        revision = self.revision + 1
        for op in ops:
            match op:
                case Get():
                    reads.append(self.select(op.key, op.prefix))
                case Put():
                    events.append(self._put(op.key.encode(), op.value, op.lease, revision))
                case Delete():
                    events += [self._delete(kv, revision) for kv in self.select(op.key, op.prefix)]
        self._commit(revision, events)
        return reads

    def put(self, key: bytes, value: bytes) -> None:
        """Write any key, also one that is no text."""
        revision = self.revision + 1
        self._commit(revision, [self._put(key, value, 0, revision)])

    def delete(self, keys: Iterable[bytes]) -> None:
        """Delete keys, those that exist, in one revision."""
        revision = self.revision + 1
        self._commit(revision, [self._delete(self.keys[key], revision) for key in keys if key in self.keys])

    def _commit(self, revision: int, events: Sequence[Event]) -> None:
        if events:
            self.revision = revision
            self.history += events
            self.wake()

    def _put(self, key: bytes, value: bytes, lease: int, revision: int) -> Event:
        old = self.keys.get(key)
        if old is not None and old.lease in self.leases:
            self.leases[old.lease].keys.discard(key)
        if lease:
            self.leases[lease].keys.add(key)
        kv = KeyValue(key, value, revision, old.create_revision if old else revision, lease)
        self.keys[key] = kv
        return Event(kv, deleted=False)

    def _delete(self, kv: KeyValue, revision: int) -> Event:
        del self.keys[kv.key]
        if kv.lease in self.leases:
            self.leases[kv.lease].keys.discard(kv.key)
        return Event(KeyValue(kv.key, b"", revision, 0), deleted=True)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


class FakeEtcd:
    """A `Store` in memory, and the switches of one client.

    Args:
        clock: seconds, for leases; they expire when a call (or `tick`) finds them due. Without a clock
            leases live until `expire` or `revoke`.
        cluster: the id of the cluster. What is restored in its place has the same, as with `etcdctl snapshot restore`
            under the same name, URLs and token.

    Attributes:
        calls: how often each method was called, by name, failed calls included.
        writes: every write that was applied through this client, in order.
        hook: awaited with the method's name at the start of each call; may raise, block or interfere.
    """

    def __init__(
        self, clock: Callable[[], float] | None = None, *, server: _Server | None = None, cluster: int = 1
    ) -> None:
        self._server = server if server is not None else _Server(clock, cluster)
        self._away = False
        self._denied = False
        self._closed = False
        self._lose_reply = False
        self._lose_request = False
        self._failures: list[tuple[EtcdError, str | None]] = []
        self._up = False
        self.calls: Counter[str] = Counter()
        self.durations = Durations()
        self.writes: list[Put | Delete] = []
        self.hook: Callable[[str], Awaitable[None]] | None = None

    # The switches.

    def peer(self) -> FakeEtcd:
        """Another client of the same store."""
        return FakeEtcd(server=self._server)

    def away(self) -> None:
        """Cut this client off: every call raises `Unavailable`, watches fall silent."""
        self._away = True
        self._up = False
        self._server.wake()

    def back(self) -> None:
        """End `away`: watches go on where they were, or find their history compacted."""
        self._away = False
        self._server.wake()

    def deny(self) -> None:
        """Take this client's rights: calls raise `Denied`, and so does every watch."""
        self._denied = True
        self._server.wake()

    def allow(self) -> None:
        """End `deny`."""
        self._denied = False

    def fill(self) -> None:
        """Take all space, as in etcd 3.5.1: no client's transaction, write or new lease is taken any more."""
        self._server.full = True

    def make_space(self) -> None:
        """End `fill`."""
        self._server.full = False

    def lose_next_reply(self) -> None:
        """The next write is applied, its caller gets `Ambiguous`."""
        self._lose_reply = True

    def lose_next_request(self) -> None:
        """The next write is not applied, its caller gets `Ambiguous` all the same."""
        self._lose_request = True

    def fail_next(self, error: EtcdError, call: str | None = None) -> None:
        """Make the next call (of the method `call`, or any) raise `error` and do nothing."""
        self._failures.append((error, call))

    def expire(self, lease: int) -> None:
        """End a lease as its TTL would, keys included."""
        self._server.end_lease(lease)

    def tick(self) -> None:
        """Expire the leases that are due by the clock."""
        self._server.expire_due()

    def compact(self, revision: int | None = None) -> None:
        """Forget the history before `revision` (default: the present one)."""
        self._server.compacted = self.revision if revision is None else revision

    def write(self, key: str | bytes, value: str | bytes) -> None:
        """Put a key as a person with etcdctl would: not counted, whatever the switches say."""
        self._server.put(_bytes(key), _bytes(value))

    def erase(self, *keys: str | bytes) -> None:
        """Delete keys as a person with etcdctl would, in one revision."""
        self._server.delete(_bytes(key) for key in keys)

    def backup(self) -> FakeEtcd:
        """What `etcdctl snapshot save` would save now, leases included; for `restore`."""
        copy = _Server(self._server.clock)
        copy.become(self._server)
        return FakeEtcd(server=copy)

    def restore(self, backup: FakeEtcd) -> None:
        """Put another history, or a wholly other store, in the place of this one; every watch breaks."""
        self._server.become(backup._server)

    @property
    def revision(self) -> int:
        """The store's revision."""
        return self._server.revision

    @property
    def data(self) -> dict[str, bytes]:
        """All keys and values, for assertions."""
        return {key.decode(errors="backslashreplace"): kv.value for key, kv in sorted(self._server.keys.items())}

    @property
    def leases(self) -> dict[int, int]:
        """All leases that live, with their TTL."""
        return {lease_id: lease.ttl_s for lease_id, lease in self._server.leases.items()}

    # The Store.

    @property
    def up(self) -> bool:
        return self._up

    async def get(self, key: str, *, timeout_s: float | None = None) -> KeyValue | None:
        await self._arrive("get")
        found = self._server.select(key, prefix=False)
        return found[0] if found else None

    async def get_at(self, key: str, revision: int) -> KeyValue | None:
        await self._arrive("get_at")
        return self._server.at(key.encode(), revision)

    @property
    def endpoint(self) -> str:
        return "http://fake"

    @property
    def cluster(self) -> int:
        return self._server.cluster if any(self.calls.values()) else 0

    @property
    def members(self) -> int:
        return 1

    def leave(self) -> None:
        pass

    async def read(self, *keys: str) -> Reading:
        await self._arrive("read")
        return Reading([next(iter(self._server.select(key, prefix=False)), None) for key in keys], self.revision)

    async def list(self, prefix: str, *, page: int = 10_000) -> Listing:
        await self._arrive("list")
        return Listing(self._server.select(prefix, prefix=True), self.revision)

    async def pages(self, prefix: str, *, page: int = 10_000) -> AsyncGenerator[Page, None]:
        listing = await self.list(prefix, page=page)
        yield Page(listing.kvs, listing.revision)

    @asynccontextmanager
    async def watch(
        self, prefix: str, start_revision: int, *, prove: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[FakeWatch]:
        self.calls["watch"] += 1
        watch = FakeWatch(self, self._server, prefix, start_revision, prove)
        with self._waking(watch.waker):
            yield watch

    @asynccontextmanager
    async def watch_keys(self, *, prove: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[FakeKeysWatch]:
        watch = FakeKeysWatch(self, self._server, prove)
        with self._waking(watch.waker):
            yield watch

    @contextmanager
    def _waking(self, waker: asyncio.Event) -> Iterator[None]:
        self._server.wakers.add(waker)
        try:
            yield
        finally:
            self._server.wakers.discard(waker)

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        await self._arrive("put")
        return self._write((), (Put(key, value, lease),), ()).revision

    async def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Op],
        failure: Sequence[Op] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        self.begin_txn(compare, success)
        await self._arrive("txn")
        return self._write(compare, success, failure)

    def begin_txn(self, compare: Sequence[Compare], success: Sequence[Op]) -> None:
        """A transaction is about to be sent; a client of a test may interfere."""

    async def grant(self, ttl_s: int) -> int:
        await self._arrive("grant")
        server = self._server
        server.next_lease += 1
        server.leases[server.next_lease] = _Lease(ttl_s, server.now())
        return server.next_lease

    async def keep_alive(self, lease: int, *, timeout_s: float | None = None) -> int:
        await self._arrive("keep_alive")
        held = self._server.leases.get(lease)
        if held is None:
            return 0
        held.renewed = self._server.now()
        return held.ttl_s

    async def time_to_live(self, lease: int) -> int:
        await self._arrive("time_to_live")
        held = self._server.leases.get(lease)
        return -1 if held is None else int(held.renewed + held.ttl_s - self._server.now())

    async def revoke(self, lease: int) -> None:
        await self._arrive("revoke")
        if lease in self._server.leases:
            self._server.end_lease(lease)

    async def close(self) -> None:
        self._closed = True
        self._server.wake()

    # How a call goes.

    async def _arrive(self, call: str) -> None:
        self.calls[call] += 1
        if self.hook is not None:
            await self.hook(call)
        # A real call always takes at least one turn of the loop.
        await asyncio.sleep(0)
        if self._closed or self._away:
            self._up = False
            raise Unavailable("the client is closed" if self._closed else "the fake etcd is away")
        self._up = True
        for index, (error, wanted) in enumerate(self._failures):
            if wanted in (None, call):
                del self._failures[index]
                self._up = not isinstance(error, Unavailable)
                raise error
        if self._denied:
            raise Denied("etcdserver: permission denied")
        self._server.expire_due()
        if self._server.full and call in {"put", "txn", "grant"}:
            raise NoSpace("etcdserver: mvcc: database space exceeded")

    def _write(self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op]) -> TxnResult:
        if self._lose_request:
            self._lose_request = False
            raise Ambiguous("the fake etcd lost the request")
        server = self._server
        succeeded = all(server.holds(one) for one in compare)
        ops = success if succeeded else failure
        server.check(ops)
        reads = server.apply(ops)
        self.writes += [op for op in ops if not isinstance(op, Get)]
        if self._lose_reply and any(not isinstance(op, Get) for op in (*success, *failure)):
            self._lose_reply = False
            raise Ambiguous("the fake etcd lost the reply")
        return TxnResult(succeeded, server.revision, reads)


class FakeWatch:
    """A watch of the fake. History that was compacted away meanwhile shows when it (re)connects."""

    def __init__(
        self,
        client: FakeEtcd,
        server: _Server,
        prefix: str,
        start_revision: int,
        prove: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._prove = prove
        self._client = client
        self._server = server
        self._prefix = prefix.encode()
        self._next = start_revision
        # Up to where there is nothing below its prefix that was not delivered. A link begins at `_next` all the same.
        self._passed = start_revision
        self._linked = False
        self._born = server.born
        self.waker = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._linked and not (self._client._away or self._client._closed or self._client._denied)

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        while True:
            self.waker.clear()
            if self._client._closed:
                raise StopAsyncIteration
            if self._client._away or self._born != self._server.born:
                self._linked = False
                self._born, self._passed = self._server.born, self._next
            if not self._client._away:
                if not await self._link():
                    # Connected to nobody, and the proof cannot be had: tried again, as the real one does.
                    await asyncio.sleep(0)
                    continue
                if events := self._news():
                    return Batch(events, events[-1].kv.mod_revision)
            await self.waker.wait()

    @property
    def _from(self) -> int:
        """The oldest revision that is needed."""
        return self._next

    def _news(self) -> list[Event]:
        """The events that were not delivered yet; they are now."""
        news = self._server.history[self._server.index_of(self._passed) :]
        events = [event for event in news if event.kv.key.startswith(self._prefix)]
        if events:
            self._next = events[-1].kv.mod_revision + 1
        self._passed = max(self._next, self._server.revision + 1)
        return events

    async def _link(self) -> bool:
        """Connect, unless it is; False when the proof could not be had."""
        if self._client._denied:
            raise Denied("etcdserver: permission denied")
        if self._linked:
            return True
        if self._from < self._server.compacted:
            raise Compacted(self._server.compacted)
        if self._prove is not None:
            try:
                await self._prove()
            except Unavailable:
                return False
        if self._client._away or self._born != self._server.born:
            # Cut off, or restored, while that was asked: the connection is broken, whatever the answer was.
            return False
        self._linked = True
        self._client._up = True
        return True


class FakeKeysWatch(FakeWatch):
    """A watch of some keys. A key that is added to a watch which is linked needs its history, too."""

    def __init__(self, client: FakeEtcd, server: _Server, prove: Callable[[], Awaitable[None]] | None) -> None:
        super().__init__(client, server, "", 0, prove)
        self._keys: dict[bytes, int] = {}

    def add(self, key: str, start_revision: int) -> None:
        self._client.calls["watch"] += 1
        self._keys[key.encode()] = start_revision
        self._linked = self._linked and start_revision >= self._server.compacted
        self.waker.set()

    @property
    def _from(self) -> int:
        return min(self._keys.values(), default=self._server.revision + 1)

    def _news(self) -> list[Event]:
        news = self._server.history[self._server.index_of(self._from) :]
        events = [event for event in news if event.kv.mod_revision >= self._keys.get(event.kv.key, 1 << 62)]
        for event in events:
            self._keys[event.kv.key] = event.kv.mod_revision + 1
        return events
