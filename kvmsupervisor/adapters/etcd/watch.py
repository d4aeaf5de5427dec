"""A watch that survives its stream: one task reads, reconnects and resumes; one consumer iterates.

Why no event is lost and none is repeated:

- A new stream resumes at the revision after the last event that was delivered, and at no other. Progress replies may be
  ahead of events (etcd #15220, #17557), so they only show that a member is alive.
- A member that lags may send older events than requested (etcd #20221). These are dropped.
- By default etcd sends all events of a revision in one message. Here it is asked for fragments, which keeps messages
  below 2 MiB and so below the client's limit. The last revision of a fragment is held back until it is complete.
- A slow consumer stops the reader at `_BUFFER_BYTES`; etcd then keeps the events in its store.

Source: https://etcd.io/docs/v3.5/learning/api/#watch-api and .../api_guarantees/#watch-apis. Servers before
3.4.31 and 3.5.13 may lose events themselves (etcd #17529, #17555); no client can notice that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self

from kvmsupervisor.adapters.etcd.api import Batch, Compacted, Denied, Event, Rejected, Unavailable
from kvmsupervisor.adapters.etcd.auth import Metadata
from kvmsupervisor.adapters.etcd.caller import Caller
from kvmsupervisor.adapters.etcd.channel import Endpoint
from kvmsupervisor.adapters.etcd.errors import AttemptFailed, ReplyTooLarge, TokenRefused, judge, judge_text
from kvmsupervisor.adapters.etcd.messages import event, range_of
from kvmsupervisor.adapters.etcd.protocol import grpc, rpc

_SILENCE_S = 5.0
"""How long a stream may be silent before the member is asked for progress, unless the member has answered a call
meanwhile. Calls use the same connection, and a call that fails makes every watch leave the member. So a session's
renewals, each confirmed by a quorum, make such questions unnecessary in an idle cluster."""
_ANSWER_S = 4.0
"""How long the member may take to answer. Both limits together bound how long a dead stream is taken for a quiet
one."""

_PAUSES_S = (0.0, 0.1, 0.2, 0.4)
"""The pause before each try, by the number of failures in a row. So a cluster that is back is noticed within 0.4 s."""
_PROVEN_S = 1.0
"""A stream that lasted this long counts as a success. Arbitrary; it keeps streams that end at once from a busy loop."""

_BUFFER_BYTES = 8 << 20
_EVENT_BYTES = 256
"""Roughly the memory of an event beside its key and value."""


class EtcdWatch:
    """Implements `Watch`. An asynchronous context manager; leaving it ends the task and the stream."""

    def __init__(
        self,
        caller: Caller,
        prefix: str,
        start_revision: int,
        *,
        prove: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._caller = caller
        self._prove = prove
        self._prefix = prefix
        self._buffer = _Buffer(start_revision)
        self._connected = False
        self._cluster_id: int | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether a member has answered on this watch recently."""
        return self._connected

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._follow(), name=f"etcd watch {self._prefix}")
        self._task.add_done_callback(lambda _: self._buffer.end())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait((self._task,))
        if not self._task.cancelled():
            # The consumer has left and no longer needs the result. Asking for it keeps asyncio from reporting it.
            self._task.exception()

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        """Return the next batch.

        Raises:
            Compacted: the next events are gone; list again and watch from there.
            Denied: the user may not read the prefix, or may not log in.
            StopAsyncIteration: the client was closed.
        """
        assert self._task is not None, "a watch is iterated inside its `async with`"
        batch = await self._buffer.get()
        if batch is None:
            self._task.result()  # raises what ended it
            raise StopAsyncIteration
        return batch

    async def _follow(self) -> None:
        """Read one stream after the other, for ever, unless events were compacted or the user is denied."""
        loop = asyncio.get_running_loop()
        failures = 0
        denied_before = False
        while not self._caller.closed:
            await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            began = loop.time()
            endpoint = self._caller.endpoints.current
            metadata: Metadata = ()
            try:
                metadata = await self._caller.open(endpoint)
                await self._read_stream(endpoint, metadata)
            except AttemptFailed:
                self._caller.endpoints.leave(endpoint)
            except TokenRefused:
                self._caller.auth.forget(metadata)
                if failures:
                    # A fresh token was refused, too: this member lags.
                    self._caller.endpoints.leave(endpoint)
            except Denied:
                # Older members (3.4.0, for example) also say "permission denied" when a watch's token has expired.
                if denied_before or not self._caller.auth.renewable(metadata):
                    raise
                denied_before = True
                self._caller.auth.forget(metadata)
            finally:
                denied_before = denied_before and not self._connected
                self._connected = False
            failures = 0 if loop.time() - began > _PROVEN_S else failures + 1
            self._caller.up = False

    async def _read_stream(self, endpoint: Endpoint, metadata: Metadata) -> None:
        """Read one stream until it breaks; always ends with an exception."""
        self._buffer.begin_stream()
        loop = asyncio.get_running_loop()
        async with _Stream(self._caller, endpoint, metadata) as stream:
            await stream.write(self._create_request())
            asked = True  # the creation has to be answered, too
            while True:
                await self._buffer.room.wait()
                message = await stream.read(_ANSWER_S if asked else _SILENCE_S)
                if message is not None:
                    asked = False
                    self._caller.up = True
                    await self._take(message)
                elif asked:
                    raise AttemptFailed("the watch's member gives no sign of life", done_maybe=False)
                elif loop.time() - endpoint.answered_at > _SILENCE_S:
                    asked = True
                    await stream.write(rpc.WatchRequest(progress_request=rpc.WatchProgressRequest()))

    def _create_request(self) -> Any:
        return rpc.WatchRequest(
            create_request=rpc.WatchCreateRequest(
                **range_of(self._prefix, prefix=True), start_revision=self._buffer.next_revision, fragment=True
            )
        )

    async def _take(self, message: Any) -> None:
        # etcd refuses a watch by one message that is both "created" and canceled, so this comes first.
        if message.canceled:
            if message.compact_revision:
                raise Compacted(message.compact_revision)
            said = message.cancel_reason
            raise judge_text(said, f"watch {self._prefix}") or AttemptFailed(
                said or "the watch was canceled", done_maybe=False
            )
        if message.created:
            await self._check_history(message.header)
            self._connected = True
        if message.events:
            self._buffer.add([event(one) for one in message.events], unfinished=message.fragment)

    async def _check_history(self, header: Any) -> None:
        """Notice an etcd that was restored from a backup: it would wait silently until it reaches our revision.

        Calls `prove` (see `Store.watch`); without one, checks what the member says of itself.

        Raises:
            Compacted: the history that was watched is not this cluster's.
            AttemptFailed: this could not be found out now.
            EtcdError: from `prove`.
        """
        if self._prove is not None:
            try:
                await self._prove()
            except Unavailable as error:
                raise AttemptFailed(str(error), done_maybe=False) from error
            return
        if self._cluster_id is None:
            self._cluster_id = header.cluster_id
        if header.cluster_id != self._cluster_id:
            raise Compacted(0)
        seen = self._buffer.next_revision - 1
        # A member that only lags says the same, so a quorum is asked before the member is believed.
        if header.revision < seen and await self._caller.revision() < seen:
            raise Compacted(0)


class _Stream:
    """One gRPC stream of watch messages. It ends when its endpoint is left.

    Reads and writes run in tasks of their own: to cancel one of them ends the stream, and a time limit on reading must
    not end it.
    """

    def __init__(self, caller: Caller, endpoint: Endpoint, metadata: Metadata) -> None:
        self._call = endpoint.watch.Watch(metadata=metadata)
        self._reading: asyncio.Task[Any] | None = None
        self._writing: asyncio.Task[Any] | None = None
        self._stay = caller.endpoints.on_left(endpoint, self._give_up)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stay()
        if left := self._give_up():
            await asyncio.wait(left)
            for task in left:
                if not task.cancelled():
                    task.exception()  # nobody needs it any more

    def _give_up(self) -> list[asyncio.Task[Any]]:
        """End the stream; return its unfinished tasks, which are cancelled, too.

        When the stream is cancelled before it has begun, gRPC forgets a write that waits for its beginning
        (grpc/aio/_call.py: `_metadata_sent` is never set then). So the tasks are cancelled as well as the call.
        """
        self._call.cancel()
        left = [task for task in (self._reading, self._writing) if task is not None]
        for task in left:
            task.cancel()
        return left

    async def write(self, message: Any) -> None:
        """Send one message.

        Raises:
            AttemptFailed: the stream has ended, or is stuck.
        """
        self._writing = asyncio.create_task(self._call.write(message))
        done, _ = await asyncio.wait((self._writing,), timeout=_ANSWER_S)
        if not done:
            raise AttemptFailed("the watch's stream is stuck", done_maybe=False)
        writing, self._writing = self._writing, None
        _result(writing)

    async def read(self, timeout_s: float) -> Any:
        """Return the next message, or None after `timeout_s` seconds without one.

        Raises:
            AttemptFailed, TokenRefused, EtcdError: the stream ended; the class depends on its error.
        """
        if self._reading is None:
            self._reading = asyncio.create_task(self._call.read())
        done, _ = await asyncio.wait((self._reading,), timeout=timeout_s)
        if not done:
            return None
        reading, self._reading = self._reading, None
        message = _result(reading)
        if message is grpc.aio.EOF:
            raise AttemptFailed("the member ended the watch's stream", done_maybe=False)
        return message


def _result(task: asyncio.Task[Any]) -> Any:
    """Return the result of a finished read or write of a stream; translate its errors."""
    if task.cancelled():
        raise AttemptFailed("the watch's endpoint was left", done_maybe=False)
    try:
        return task.result()
    except asyncio.InvalidStateError as error:  # gRPC's answer to a write after the end
        raise AttemptFailed("the watch's stream is over", done_maybe=False) from error
    except grpc.aio.AioRpcError as error:
        failure = judge(error, "watch")
        if isinstance(failure, ReplyTooLarge):
            failure = Rejected(f"an event is larger than this client receives: {failure}")
        raise failure from error


class _Buffer:
    """The batches between the reader and the consumer, in revision order and of bounded size.

    Attributes:
        next_revision: where a new stream has to begin. Invariant: every event below it was put into a batch or is older
            than the watch; no event at or above it was.
        room: set while the reader may go on.
    """

    def __init__(self, start_revision: int) -> None:
        self.next_revision = start_revision
        self.room = asyncio.Event()
        self.room.set()
        self._batches: deque[tuple[Batch, int]] = deque()
        self._held: list[Event] = []
        self._bytes = 0
        self._ended = False
        self._news = asyncio.Event()  # set while there is a batch, and after the end

    def begin_stream(self) -> None:
        """Drop the revision that the last stream began and did not finish."""
        self._held.clear()

    def add(self, events: Sequence[Event], *, unfinished: bool) -> None:
        """Add the events of one message; with `unfinished`, more events of its last revision may follow."""
        self._held += [one for one in events if one.kv.mod_revision >= self.next_revision]
        if not self._held:
            return
        whole = len(self._held)
        if unfinished:
            last = self._held[-1].kv.mod_revision
            whole = next(index for index, one in enumerate(self._held) if one.kv.mod_revision == last)
        ready, self._held = self._held[:whole], self._held[whole:]
        if ready:
            self._append(Batch(ready, ready[-1].kv.mod_revision))

    def end(self) -> None:
        """No more events will be added."""
        self._ended = True
        self._news.set()

    async def get(self) -> Batch | None:
        """Return the next batch, or None after the last one."""
        await self._news.wait()
        if not self._batches:
            return None
        batch, size = self._batches.popleft()
        self._bytes -= size
        if self._bytes < _BUFFER_BYTES:
            self.room.set()
        if not self._batches and not self._ended:
            self._news.clear()
        return batch

    def _append(self, batch: Batch) -> None:
        size = sum(_EVENT_BYTES + len(one.kv.key) + len(one.kv.value) for one in batch.events)
        self.next_revision = batch.revision + 1
        self._batches.append((batch, size))
        self._bytes += size
        if self._bytes >= _BUFFER_BYTES:
            self.room.clear()
        self._news.set()
