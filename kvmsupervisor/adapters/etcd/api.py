"""What the rest of the program knows of etcd: values, errors and one interface.

Errors are classes by what the caller does next, see `EtcdError`. Source of the semantics: the etcd v3 API
reference (https://etcd.io/docs/v3.5/learning/api/ and .../api_guarantees/).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import NamedTuple, Protocol

from kvmsupervisor.domain.frozen import frozen


class EtcdError(Exception):
    """Anything that etcd, or the way to it, did not do. Its subclasses say what to do next."""


class Unavailable(EtcdError):
    """No answer in time from any endpoint, or no quorum: wait and try again. Nothing was written."""


class Unreachable(Unavailable):
    """No endpoint can be connected to, and none ever answered this client, which does not wait for one.

    Attributes:
        causes: each endpoint's URL, and what is wrong with it.
    """

    def __init__(self, causes: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{url}: {cause}" for url, cause in causes.items()))
        self.causes = causes


class Ambiguous(Unavailable):
    """The request left, the reply was lost: a write may have happened. Read before judging."""


class Compacted(EtcdError):
    """The revision asked for is gone: list again, then watch from there.

    Attributes:
        revision: the oldest revision that still exists (0 when unknown).
    """

    def __init__(self, revision: int) -> None:
        super().__init__(f"etcd has compacted its history up to revision {revision}")
        self.revision = revision


class Ahead(EtcdError):
    """The revision asked for is greater than the store's own: whoever saw it, saw it in another store."""


class Denied(EtcdError):
    """Wrong user, password, certificate or role: tell the operator. Trying again will not help."""


class Rejected(EtcdError):
    """etcd refuses this very request (too large, malformed): change it or tell the operator."""


class NoSpace(Rejected):
    """etcd takes no writes until an operator has made space. Nothing was written; reads and leases go on."""


class LeaseGone(Rejected):
    """The lease that the request names does not exist, or no longer: get a new one. Nothing was written."""


class KeyValue(NamedTuple):
    """One key as etcd holds it. `lease` is 0 for a key without one."""

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
    """Some keys as they were at one `revision`, in the order asked for; None for one that did not exist."""

    kvs: Sequence[KeyValue | None]
    revision: int


@frozen
class Page:
    """Some of the keys below a prefix at one `revision`, in key order, each as the fields of a `KeyValue` in order.

    Plain tuples: a large cluster has 80,000, and they are looked at once.
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
    """Events in revision order, never half of a revision. `revision` is that of the last event."""

    events: Sequence[Event]
    revision: int


class Target(Enum):
    """What of a key a `Compare` looks at."""

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
    """What a transaction did.

    Attributes:
        succeeded: whether every compare held.
        revision: the store's revision after it; that of the writes, when it wrote.
        reads: for each `Get` of the branch that ran, in order, what it found.
    """

    succeeded: bool
    revision: int
    reads: Sequence[Sequence[KeyValue]]


class Watch(Protocol):
    """A running watch: iterate over it for batches.

    Iterating raises `Compacted` when history is gone and `Denied` when the user may not read; it
    never ends by itself otherwise.
    """

    @property
    def connected(self) -> bool:
        """Whether a member answered on this watch lately (within the liveness probe's limit)."""
        ...

    def __aiter__(self) -> AsyncIterator[Batch]:
        """Yield batches, for ever."""
        ...


class Store(Protocol):
    """etcd as this program uses it. Implemented by `client.Etcd`, and by a fake for tests.

    Every call ends by its deadline (`timeout_s`, default: the adapter's) with a result or an `EtcdError`.
    Cancelling a call is clean; a cancelled write may have happened.
    """

    @property
    def up(self) -> bool:
        """Whether etcd answered when it was last asked, by a call or by a watch (false before the first)."""
        ...

    async def get(self, key: str, *, timeout_s: float | None = None) -> KeyValue | None:
        """Read one key, linearizably."""
        ...

    async def read(self, *keys: str) -> Reading:
        """Read several keys at one revision, linearizably, also where etcd has no space left.

        A transaction that only reads would be one round trip, but etcd 3.5.0 to 3.5.6 refuse all transactions then
        (https://github.com/etcd-io/etcd/issues/14884).
        """
        ...

    async def list(self, prefix: str, *, page: int = 10_000) -> Listing:
        """Read all keys below `prefix` at one revision, page by page.

        Raises:
            Compacted: the revision went away between two pages: begin again.
        """
        ...

    def pages(self, prefix: str, *, page: int = 10_000) -> AsyncGenerator[Page]:
        """The same, a page at a time, all of one revision; the next one is on its way while one is looked at.

        Close it (`contextlib.aclosing`) when it is left before its end.
        """
        ...

    async def get_at(self, key: str, revision: int) -> KeyValue | None:
        """Read one key as it was at `revision`, None when it did not exist then; a quorum is asked.

        Raises:
            Compacted: what was then is gone.
            Ahead: the store has not come so far.
        """
        ...

    @property
    def endpoint(self) -> str:
        """URL of the member that is asked now: after an answer, of the one that gave it."""
        ...

    @property
    def members(self) -> int:
        """How many endpoints there are to ask."""
        ...

    def leave(self) -> None:
        """Ask another endpoint from now on, where there is one. Watches connect again."""
        ...

    def watch(
        self, prefix: str, start_revision: int, *, prove: Callable[[], Awaitable[None]] | None = None
    ) -> AbstractAsyncContextManager[Watch]:
        """Follow all changes below `prefix` from `start_revision` on, none lost, none repeated.

        Reconnects by itself, for ever, to any endpoint, and says so in its `connected` meanwhile.

        Args:
            prefix: of the keys.
            start_revision: the first revision that is told of.
            prove: awaited after each connection, the first one included, before anything that is heard on it is handed
                on. What it raises ends the watch; `Unavailable` only has it connect again.
        """
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
        """Run one transaction, never retried after it may have been sent (`Ambiguous`)."""
        ...

    async def grant(self, ttl_s: int) -> int:
        """Make a lease; return its id."""
        ...

    async def keep_alive(self, lease: int, *, timeout_s: float | None = None) -> int:
        """Renew a lease once; return its TTL in seconds, 0 when it no longer exists."""
        ...

    async def time_to_live(self, lease: int) -> int:
        """Seconds that the lease still has without renewal; 0 or less when it no longer exists."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and its keys; one that does not exist is not an error."""
        ...

    async def close(self) -> None:
        """Close every channel. Watches end."""
        ...
