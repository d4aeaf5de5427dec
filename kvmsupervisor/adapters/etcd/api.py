"""What the rest of the program sees of etcd: values, errors and one interface.

The classes of errors say what the caller does next, see `EtcdError`. Source of the semantics: the etcd v3 API
reference (https://etcd.io/docs/v3.5/learning/api/ and .../api_guarantees/).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import NamedTuple, Protocol

from kvmsupervisor.domain.durations import Durations
from kvmsupervisor.domain.frozen import frozen


class EtcdError(Exception):
    """A request to etcd failed. The subclasses say what to do next."""


class Unavailable(EtcdError):
    """No answer in time from any endpoint, or no quorum: wait and try again. Nothing was written."""


class Unreachable(Unavailable):
    """No endpoint can be connected to, and none has ever answered this client, which does not wait.

    Attributes:
        causes: what is wrong with each endpoint, by its URL.
    """

    def __init__(self, causes: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{url}: {cause}" for url, cause in causes.items()))
        self.causes = causes


class Ambiguous(Unavailable):
    """The request was sent and the reply was lost: a write may have happened. Read before deciding."""


class Compacted(EtcdError):
    """The requested revision is gone: list again, then watch from there.

    Attributes:
        revision: the oldest revision that still exists (0 when unknown).
    """

    def __init__(self, revision: int) -> None:
        super().__init__(f"etcd has compacted its history up to revision {revision}")
        self.revision = revision


class Ahead(EtcdError):
    """The requested revision is greater than the store's own: so it was seen in another store."""


class Denied(EtcdError):
    """Wrong user, password, certificate or role: tell the operator. Trying again will not help."""


class Rejected(EtcdError):
    """etcd refuses this request (too large, malformed): change the request, or tell the operator."""


class NoSpace(Rejected):
    """etcd accepts no writes until an operator has made space. Nothing was written; reads and leases still work."""


class LeaseGone(Rejected):
    """The lease in the request does not exist (any more): get a new one. Nothing was written."""


class KeyValue(NamedTuple):
    """One key in etcd. `lease` is 0 for a key without a lease."""

    key: bytes
    value: bytes
    mod_revision: int
    create_revision: int
    lease: int = 0


@frozen
class Listing:
    """All keys below a prefix at one `revision`, in key order."""

    kvs: Sequence[KeyValue]
    revision: int


@frozen
class Reading:
    """Some keys as they were at one `revision`, in the requested order; None for a key that did not exist."""

    kvs: Sequence[KeyValue | None]
    revision: int


@frozen
class Page:
    """Some of the keys below a prefix at one `revision`, in key order, each as the fields of a `KeyValue` in order.

    Plain tuples: a large cluster has 80,000, and each is used once.
    """

    entries: Sequence[tuple[bytes, bytes, int, int, int]]
    revision: int


@frozen
class Event:
    """One change. For a deletion `kv.value` is empty and `kv.mod_revision` the revision of the deletion."""

    kv: KeyValue
    deleted: bool


@frozen
class Batch:
    """Events in revision order; each revision is complete. `revision` is that of the last event."""

    events: Sequence[Event]
    revision: int


class Target(Enum):
    """The property of a key that a `Compare` checks."""

    MOD_REVISION = "mod"
    CREATE_REVISION = "create"
    VALUE = "value"
    LEASE = "lease"


@frozen
class Compare:
    """True when the key's `target` equals `value`. An absent key has revision and lease 0, and no value."""

    key: str
    target: Target
    value: int | bytes


@frozen
class Put:
    """Write a key, attached to `lease` unless that is 0."""

    key: str
    value: bytes
    lease: int = 0


@frozen
class Delete:
    """Delete one key, or with `prefix` every key that begins with it."""

    key: str
    prefix: bool = False


@frozen
class Get:
    """Read one key, or with `prefix` every key that begins with it (for small prefixes: not paged)."""

    key: str
    prefix: bool = False


Op = Put | Delete | Get


@frozen
class TxnResult:
    """The result of a transaction.

    Attributes:
        succeeded: whether every compare was true.
        revision: the store's revision after the transaction; the revision of the writes, if there were any.
        reads: the keys that each `Get` of the executed branch found, in order.
    """

    succeeded: bool
    revision: int
    reads: Sequence[Sequence[KeyValue]]


class Watch(Protocol):
    """A running watch: iterate over it for batches.

    Iterating raises `Compacted` when events are gone, and `Denied` when the user may not read. Otherwise it never ends
    by itself.
    """

    @property
    def connected(self) -> bool:
        """Whether a member has answered on this watch recently (within the limit of the liveness probe)."""
        ...

    def __aiter__(self) -> AsyncIterator[Batch]:
        """Yield batches, for ever."""
        ...


class KeysWatch(Watch, Protocol):
    """A running watch of some keys, each by itself.

    Events of one key come in the order of their revisions, each once; those of different keys in any order. So a
    batch's `revision` says nothing of keys that are not in it.
    """

    def add(self, key: str, start_revision: int) -> None:
        """Watch this key, too, from a revision on. Returns at once."""
        ...


class Store(Protocol):
    """etcd as this program uses it. Implemented by `client.Etcd`, and by a fake for tests.

    Every call ends by its deadline (`timeout_s`, default: the adapter's) with a result or an `EtcdError`.
    Cancelling a call is clean; a cancelled write may have happened.
    """

    @property
    def up(self) -> bool:
        """Whether etcd answered the last request, of a call or of a watch (false before the first)."""
        ...

    @property
    def durations(self) -> Durations:
        """How long requests took; watches are none."""
        ...

    async def get(self, key: str, *, timeout_s: float | None = None) -> KeyValue | None:
        """Read one key, linearizably."""
        ...

    async def read(self, *keys: str) -> Reading:
        """Read several keys at one revision, linearizably, even when etcd has no space left.

        One transaction of reads would be one round trip, but etcd 3.5.0 to 3.5.6 refuse all transactions then
        (https://github.com/etcd-io/etcd/issues/14884).
        """
        ...

    async def list(self, prefix: str, *, page: int = 10_000) -> Listing:
        """Read all keys below `prefix` at one revision, page by page.

        Raises:
            Compacted: the revision was compacted between two pages: begin again.
        """
        ...

    def pages(self, prefix: str, *, page: int = 10_000) -> AsyncGenerator[Page]:
        """The same, a page at a time, all of one revision. The next page is requested while the caller uses this one.

        Close it (`contextlib.aclosing`) when leaving it before its end.
        """
        ...

    async def get_at(self, key: str, revision: int) -> KeyValue | None:
        """Read one key as it was at `revision`, linearizably; None when it did not exist then.

        Raises:
            Compacted: that revision is gone.
            Ahead: the store has not reached that revision.
        """
        ...

    @property
    def endpoint(self) -> str:
        """URL of the member in use; after an answer, of the member that gave it."""
        ...

    @property
    def cluster(self) -> int:
        """The id of the cluster that answered the last read; 0 before the first answer."""
        ...

    @property
    def members(self) -> int:
        """How many endpoints there are."""
        ...

    def leave(self) -> None:
        """Use another endpoint from now on, if there is one. Watches reconnect."""
        ...

    def watch(
        self, prefix: str, start_revision: int, *, prove: Callable[[], Awaitable[None]] | None = None
    ) -> AbstractAsyncContextManager[Watch]:
        """Watch all changes below `prefix` from `start_revision` on: none is lost, none is repeated.

        The watch reconnects by itself, for ever, to any endpoint; `connected` is false meanwhile.

        Args:
            prefix: of the keys.
            start_revision: the first revision to deliver.
            prove: awaited after each connection, including the first, before any event from it is delivered. An
                exception ends the watch, but for `Unavailable`, which makes it reconnect.
        """
        ...

    def watch_keys(
        self, *, prove: Callable[[], Awaitable[None]] | None = None
    ) -> AbstractAsyncContextManager[KeysWatch]:
        """Watch the keys that are added to it, and no others; see `watch`."""
        ...

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write one key without a condition; return the revision."""
        ...

    async def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Op],
        failure: Sequence[Op] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        """Run one transaction. It is never repeated once it may have been sent (`Ambiguous`)."""
        ...

    async def grant(self, ttl_s: int) -> int:
        """Make a lease; return its id."""
        ...

    async def keep_alive(self, lease: int, *, timeout_s: float | None = None) -> int:
        """Renew a lease once; return its TTL in seconds, 0 when it no longer exists."""
        ...

    async def time_to_live(self, lease: int) -> int:
        """Seconds until the lease ends without renewal; 0 or less when it no longer exists."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease, and delete its keys. A lease that does not exist is not an error."""
        ...

    async def close(self) -> None:
        """Close every channel. Watches end."""
        ...
