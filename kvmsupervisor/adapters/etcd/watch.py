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
_PER_RENEWAL = 1.5
"""How many times the renewals' interval a stream may be silent at least: with a long session, too, they come first."""
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
        async with Stream(self._caller, endpoint, metadata) as stream:
            await stream.write(create_request(range_of(self._prefix, prefix=True), self._buffer.next_revision))
            await stream.read_all(self._take, room=self._buffer.room)

    async def _take(self, message: Any) -> None:
        self._caller.up = True
        # etcd refuses a watch by one message that is both "created" and canceled, so this comes first.
        if message.canceled:
            if message.compact_revision:
                raise Compacted(message.compact_revision)
            said = message.cancel_reason
            raise judge_text(said, f"watch {self._prefix}") or AttemptFailed(
                said or "the watch was canceled", done_maybe=False
            )
        if message.created:
            await self._created(message)
        if message.events:
            self._take_events([event(one) for one in message.events], unfinished=message.fragment)

    async def _created(self, message: Any) -> None:
        """The member watches what was asked for."""
        await self._check_history(message.header)
        self._connected = True

    def _take_events(self, events: Sequence[Event], *, unfinished: bool) -> None:
        self._buffer.add(events, unfinished=unfinished)

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


def create_request(bounds: dict[str, bytes], start_revision: int) -> Any:
    """The request to watch a range of keys from a revision on."""
    wanted = rpc.WatchCreateRequest(**bounds, start_revision=start_revision, fragment=True)
    return rpc.WatchRequest(create_request=wanted)


class Stream:
    """One gRPC stream of watch messages. It ends when its endpoint is left.

    Reading and writing run in tasks of their own: to cancel one of them ends the stream, and a time limit must not end
    it. One task reads all messages, because a task for each would cost more than the message.
    """

    def __init__(self, caller: Caller, endpoint: Endpoint, metadata: Metadata) -> None:
        self._call = endpoint.watch.Watch(metadata=metadata)
        self._endpoint = endpoint
        self._silence_s = max(_SILENCE_S, _PER_RENEWAL * caller.renewed_every_s)
        # Since when a message is waited for; None while the reader does something else.
        self._waits_since: float | None = None
        # Whether the member owes an answer (the creation has to be answered, too), and after how much silence to look.
        self._asked = True
        self._due_s = _ANSWER_S
        self._reading: asyncio.Task[Any] | None = None
        self._writing: asyncio.Task[Any] | None = None
        self._turn = asyncio.Lock()
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

    def expect(self) -> None:
        """What was just written has to be answered."""
        self._asked, self._due_s = True, self._silent_s() + _ANSWER_S

    async def write(self, message: Any) -> None:
        """Send one message.

        Raises:
            AttemptFailed: the stream has ended, or is stuck.
        """
        async with self._turn:
            self._writing = asyncio.create_task(self._call.write(message))
            done, _ = await asyncio.wait((self._writing,), timeout=_ANSWER_S)
            if not done:
                raise AttemptFailed("the watch's stream is stuck", done_maybe=False)
            writing, self._writing = self._writing, None
            _result(writing)

    async def read_all(self, take: Callable[[Any], Awaitable[None]], *, room: asyncio.Event) -> None:
        """Pass every message to `take`, while there is `room`; always ends with an exception.

        Raises:
            AttemptFailed, TokenRefused, EtcdError: the stream ended, or is silent for too long; or from `take`.
        """
        loop = asyncio.get_running_loop()
        reading = self._reading = asyncio.create_task(self._read_all(take, room))
        while True:
            await asyncio.wait((reading,), timeout=self._due_s - self._silent_s())
            if reading.done():
                _result(reading)
            silent_s = self._silent_s()
            if silent_s < self._due_s:
                continue
            if self._asked:
                raise AttemptFailed("the watch's member gives no sign of life", done_maybe=False)
            if loop.time() - self._endpoint.answered_at > self._silence_s:
                self._asked, self._due_s = True, silent_s + _ANSWER_S
                await self.write(rpc.WatchRequest(progress_request=rpc.WatchProgressRequest()))
            else:
                self._due_s = silent_s + self._silence_s

    async def _read_all(self, take: Callable[[Any], Awaitable[None]], room: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await room.wait()
            self._waits_since = loop.time()
            message = await self._call.read()
            self._waits_since = None
            if message is grpc.aio.EOF:
                raise AttemptFailed("the member ended the watch's stream", done_maybe=False)
            self._asked, self._due_s = False, self._silence_s
            await take(message)

    def _silent_s(self) -> float:
        """How long the member has said nothing, as far as somebody listens."""
        return 0.0 if self._waits_since is None else asyncio.get_running_loop().time() - self._waits_since


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
            self.append(Batch(ready, ready[-1].kv.mod_revision))

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

    def append(self, batch: Batch) -> None:
        """Add a batch as it is."""
        size = sum(_EVENT_BYTES + len(one.kv.key) + len(one.kv.value) for one in batch.events)
        self.next_revision = batch.revision + 1
        self._batches.append((batch, size))
        self._bytes += size
        if self._bytes >= _BUFFER_BYTES:
            self.room.clear()
        self._news.set()
