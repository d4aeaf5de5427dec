"""The etcd v3 client: `Etcd` implements `Store`. Each method builds a request; `Caller` carries it out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from typing import Any

from kvmsupervisor.adapters.etcd.api import (
    Compacted,
    Compare,
    Get,
    KeysWatch,
    KeyValue,
    LeaseGone,
    Listing,
    Op,
    Page,
    Reading,
    Rejected,
    TxnResult,
    Unavailable,
    Watch,
)
from kvmsupervisor.adapters.etcd.auth import Metadata
from kvmsupervisor.adapters.etcd.caller import Caller
from kvmsupervisor.adapters.etcd.channel import Endpoint
from kvmsupervisor.adapters.etcd.config import EtcdConfig
from kvmsupervisor.adapters.etcd.errors import AttemptFailed, LeaseExists, ReplyTooLarge
from kvmsupervisor.adapters.etcd.messages import compare_message, entries, key_value, op_message, range_of
from kvmsupervisor.adapters.etcd.protocol import grpc, rpc
from kvmsupervisor.adapters.etcd.watch import EtcdWatch
from kvmsupervisor.adapters.etcd.watch_keys import EtcdKeysWatch
from kvmsupervisor.aio import all_of
from kvmsupervisor.domain.durations import Durations

_SHRINK = 8
"""By how much to divide the size of a page that is too large for one reply."""

_TURNS_TO_SEND = 3
"""How many turns of the event loop until a request has left: its task, gRPC's own, one more. Then etcd prepares the
next page while this program works on the present one."""

_PAGE = 10_000
"""The most keys of one page."""

_AHEAD_S = 10.0
"""How long a page that was requested ahead may be used. Arbitrary: a start takes less time, and needs fresh keys."""


class Etcd:
    """An etcd v3 store, reached through any of its members.

    Construct it inside the event loop that uses it, because gRPC binds to that loop. Nothing is sent before the first
    call.

    Raises:
        Denied: a certificate or key file cannot be read.
    """

    def __init__(self, config: EtcdConfig) -> None:
        self._caller = Caller(config)
        self._cluster = 0
        # Pages that were requested ahead, by prefix, and until when each may be used.
        self._ahead: dict[str, tuple[float, asyncio.Task[Any]]] = {}

    @property
    def up(self) -> bool:
        """Whether etcd answered the last request, of a call or of a watch (false before the first)."""
        return self._caller.up

    @property
    def durations(self) -> Durations:
        """How long requests took; watches are none."""
        return self._caller.durations

    @property
    def endpoint(self) -> str:
        """URL of the member in use."""
        return self._caller.endpoints.current.url

    async def get(self, key: str, *, timeout_s: float | None = None) -> KeyValue | None:
        """Read one key, linearizably; None when it does not exist."""
        request = rpc.RangeRequest(**range_of(key, prefix=False))
        reply = await self._range(f"get {key}", request, timeout_s)
        return key_value(reply.kvs[0]) if reply.kvs else None

    async def read(self, *keys: str) -> Reading:
        """Read several keys at one revision: the first read tells it, and the other reads ask for it.

        Raises:
            Unavailable: also when that revision was compacted meanwhile: ask again.
        """
        first, *rest = keys
        reply = await self._range(f"get {first}", rpc.RangeRequest(**range_of(first, prefix=False)), None)
        revision = int(reply.header.revision)

        async def then(key: str) -> Any:
            request = rpc.RangeRequest(**range_of(key, prefix=False), revision=revision)
            return await self._range(f"get {key}", request, None)

        try:
            replies = [reply, *await all_of(map(then, rest))]
        except Compacted as error:
            raise Unavailable(f"get {', '.join(keys)}: compacted between the first and the last; ask again") from error
        return Reading([key_value(one.kvs[0]) if one.kvs else None for one in replies], revision)

    async def get_at(self, key: str, revision: int) -> KeyValue | None:
        """Read one key as it was at `revision`; see `Store.get_at`."""
        request = rpc.RangeRequest(**range_of(key, prefix=False), revision=revision)
        reply = await self._range(f"get {key} at revision {revision}", request, None)
        return key_value(reply.kvs[0]) if reply.kvs else None

    @property
    def cluster(self) -> int:
        """The id of the cluster that answered the last read; 0 before the first answer."""
        return self._cluster

    @property
    def members(self) -> int:
        """How many endpoints there are."""
        return len(self._caller.endpoints)

    def leave(self) -> None:
        """Use another endpoint from now on, if there is one."""
        if self.members > 1:
            self._caller.endpoints.leave(self._caller.endpoints.current)

    def ask_ahead(self, prefix: str) -> asyncio.Task[Any]:
        """Ask now for what `pages` of this prefix will read soon. Returns at once; the reader hears of a failure.

        Returns:
            What is done once etcd has answered, or has not.
        """
        first = asyncio.create_task(self._page(prefix, range_of(prefix, prefix=True), 0, _PAGE))
        self._ahead[prefix] = (asyncio.get_running_loop().time() + _AHEAD_S, first)
        return first

    async def list(self, prefix: str, *, page: int = _PAGE) -> Listing:
        """Read all keys below `prefix` at one revision; the deadline is that of each page.

        Raises:
            Compacted: the revision went away between two pages: begin again.
        """
        kvs: list[KeyValue] = []
        revision = 0
        async with aclosing(self.pages(prefix, page=page)) as pages:
            async for one in pages:
                kvs += map(KeyValue._make, one.entries)
                revision = one.revision
        return Listing(kvs, revision)

    async def pages(self, prefix: str, *, page: int = _PAGE) -> AsyncGenerator[Page, None]:
        """Read all keys below `prefix` at one revision, a page at a time; see `list`."""
        bounds = range_of(prefix, prefix=True)
        revision = 0
        coming = await self._asked_ahead(prefix)
        try:
            while True:
                reply = await (coming or self._page(prefix, bounds, revision, page))
                revision = revision or reply.header.revision
                if reply.more:
                    bounds = {**bounds, "key": reply.kvs[-1].key + b"\0"}
                    coming = asyncio.create_task(self._page(prefix, bounds, revision, page))
                    for _ in range(_TURNS_TO_SEND):
                        await asyncio.sleep(0)
                yield Page(entries(reply.kvs), revision)
                if not reply.more:
                    return
        finally:
            if coming is not None:
                await _given_up(coming)

    async def _asked_ahead(self, prefix: str) -> asyncio.Task[Any] | None:
        """The first page, if it was requested ahead and is still fresh; once only."""
        until, task = self._ahead.pop(prefix, (0.0, None))
        if task is not None and asyncio.get_running_loop().time() > until:
            await _given_up(task)
            return None
        return task

    async def _page(self, prefix: str, bounds: Mapping[str, Any], revision: int, page: int) -> Any:
        """One page; with fewer keys when that many do not fit into one reply."""
        while True:
            request = rpc.RangeRequest(**bounds, limit=page, revision=revision)
            try:
                return await self._range(f"list {prefix}", request, None)
            except ReplyTooLarge as error:
                if page == 1:
                    raise Rejected(f"a value below {prefix} is larger than this client receives") from error
                page = max(page // _SHRINK, 1)

    def watch(
        self, prefix: str, start_revision: int, *, prove: Callable[[], Awaitable[None]] | None = None
    ) -> AbstractAsyncContextManager[Watch]:
        """Watch all changes below `prefix` from `start_revision` on; see `EtcdWatch`."""
        return EtcdWatch(self._caller, prefix, start_revision, prove=prove)

    def watch_keys(
        self, *, prove: Callable[[], Awaitable[None]] | None = None
    ) -> AbstractAsyncContextManager[KeysWatch]:
        """Watch the keys that are added to it; see `EtcdKeysWatch`."""
        return EtcdKeysWatch(self._caller, prove=prove)

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write one key without a condition; return the revision.

        Raises:
            LeaseGone: `lease` does not exist.
        """
        message = rpc.PutRequest(key=key.encode(), value=value, lease=lease)

        async def send(endpoint: Endpoint, metadata: Metadata, timeout_s: float) -> Any:
            return await endpoint.kv.Put(message, metadata=metadata, timeout=timeout_s)

        reply = await self._caller.call(f"put {key}", send, repeatable=False)
        return int(reply.header.revision)

    async def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Op],
        failure: Sequence[Op] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        """Run one transaction. A quorum confirms it, even when it only compares or reads.

        A transaction that cannot write is repeated like a read. Any other is never repeated once it may have been sent.

        Raises:
            Ambiguous: the transaction may have been carried out.
            LeaseGone: a `Put` names a lease that does not exist.
        """
        message = rpc.TxnRequest(
            compare=map(compare_message, compare),
            success=map(op_message, success),
            failure=map(op_message, failure),
        )
        if not (success or failure):
            # etcd answers a transaction without operations from one member's memory, without a quorum
            # (isTxnSerializable in its v3_server.go). With one read it asks the quorum.
            message.success.append(op_message(Get(compare[0].key if compare else "\0")))

        async def send(endpoint: Endpoint, metadata: Metadata, timeout_s: float) -> Any:
            return await endpoint.kv.Txn(message, metadata=metadata, timeout=timeout_s)

        what = f"transaction on {', '.join(dict.fromkeys(one.key for one in (*compare, *success, *failure)))}"
        reads_only = all(isinstance(op, Get) for op in (*success, *failure))
        try:
            reply = await self._caller.call(what, send, timeout_s=timeout_s, repeatable=reads_only)
        except ReplyTooLarge as error:
            raise Rejected(f"{what}: it reads more than this client receives at once") from error
        reads = [
            [key_value(kv) for kv in response.response_range.kvs]
            for response in reply.responses
            if response.HasField("response_range")
        ]
        return TxnResult(reply.succeeded, reply.header.revision, reads if success or failure else [])

    async def grant(self, ttl_s: int) -> int:
        """Make a lease; return its id.

        The id is chosen here, so that a request whose reply was lost can be repeated: at worst the lease exists
        already, since the first attempt.
        """
        import secrets  # noqa: PLC0415 - it imports hashing, and few clients need a lease

        message = rpc.LeaseGrantRequest(TTL=ttl_s, ID=secrets.randbelow(2**63 - 1) + 1)

        async def send(endpoint: Endpoint, metadata: Metadata, timeout_s: float) -> None:
            await endpoint.lease.LeaseGrant(message, metadata=metadata, timeout=timeout_s)

        # A lease that exists is ours, from an attempt whose reply was lost: 63 random bits are unique.
        with suppress(LeaseExists):
            await self._caller.call("grant a lease", send, repeatable=True)
        return int(message.ID)

    async def keep_alive(self, lease: int, *, timeout_s: float | None = None) -> int:
        """Renew a lease once; return its TTL in seconds, 0 when it no longer exists.

        The leader answers alone, without a quorum. A caller that needs certainty also reads a key.
        """

        async def send(endpoint: Endpoint, metadata: Metadata, timeout_s: float) -> int:
            # etcd offers a stream only: this one has one request and one reply. It is not closed before the reply is
            # there: etcd's gRPC proxy answers after half a second, and not at all to whoever has closed the stream.
            stream = endpoint.lease.LeaseKeepAlive(metadata=metadata, timeout=timeout_s)
            await stream.write(rpc.LeaseKeepAliveRequest(ID=lease))
            reply = await stream.read()
            if reply is grpc.aio.EOF:
                raise AttemptFailed("the stream ended without a reply", done_maybe=True)
            with suppress(grpc.aio.AioRpcError):
                # Left to itself the stream would be cancelled, and etcd counts that. The proxy ends each with an error.
                await stream.done_writing()
                await stream.read()
            return int(reply.TTL)

        return await self._caller.call(f"renew lease {lease:x}", send, timeout_s=timeout_s, repeatable=True)

    async def time_to_live(self, lease: int) -> int:
        """Seconds until the lease ends without renewal; 0 or less when it no longer exists."""

        async def send(endpoint: Endpoint, metadata: Metadata, timeout_s: float) -> int:
            message = rpc.LeaseTimeToLiveRequest(ID=lease)
            reply = await endpoint.lease.LeaseTimeToLive(message, metadata=metadata, timeout=timeout_s)
            return int(reply.TTL)

        return await self._caller.call(f"ask for lease {lease:x}", send, repeatable=True)

    async def revoke(self, lease: int) -> None:
        """End a lease, and delete its keys. A lease that does not exist is not an error."""

        async def send(endpoint: Endpoint, metadata: Metadata, timeout_s: float) -> None:
            message = rpc.LeaseRevokeRequest(ID=lease)
            await endpoint.lease.LeaseRevoke(message, metadata=metadata, timeout=timeout_s)

        with suppress(LeaseGone):
            await self._caller.call(f"revoke lease {lease:x}", send, repeatable=True)

    async def close(self) -> None:
        """Close every channel. Watches end; calls in flight raise `Unavailable`."""
        while self._ahead:
            await _given_up(self._ahead.popitem()[1][1])
        await self._caller.close()

    async def _range(self, what: str, message: Any, timeout_s: float | None) -> Any:
        async def send(endpoint: Endpoint, metadata: Metadata, timeout_s: float) -> Any:
            return await endpoint.kv.Range(message, metadata=metadata, timeout=timeout_s)

        reply = await self._caller.call(what, send, timeout_s=timeout_s, repeatable=True)
        self._cluster = int(reply.header.cluster_id)
        return reply


async def _given_up(task: asyncio.Task[Any]) -> None:
    """Cancel a request whose reply is no longer needed."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
