"""A watch that survives its stream: one task that reads, reconnects and resumes, one consumer that iterates.

What makes "none lost, none repeated":

- The stream is resumed from the revision behind the last event that was handed on, and from nothing else.
  Progress replies may be ahead of events (etcd #15220, #17557), so they tell that a member lives, no more.
- A member that lags behind may send events older than asked for (etcd #20221): those are dropped.
- etcd sends the events of a revision in one message unless it is asked for fragments, as here, which keeps
  messages below 2 MiB and so below what a client receives; the revision that a fragment ends in is held back
  until it is complete.
- A consumer that is slow stops the reading, at `_BUFFER_BYTES`; etcd then keeps the events in its store.

Source: https://etcd.io/docs/v3.5/learning/api/#watch-api and .../api_guarantees/#watch-apis. Servers before
3.4.31 and 3.5.13 may lose events themselves (etcd #17529, #17555); no client can see that.
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
"""After so much silence the member is asked for a sign of life, unless it has answered a call meanwhile. Calls go over
the same connection, and one that fails makes every watch leave the member; a session's renewals, each confirmed by a
quorum, so spare a resting cluster all probes …"""
_ANSWER_S = 4.0
"""… which it has so long to give. Together they bound how long a dead stream is taken for a quiet one."""

_PAUSES_S = (0.0, 0.1, 0.2, 0.4)
"""Before each try, by how many have failed in a row: a cluster that is back is found within 0.4 s."""
_PROVEN_S = 1.0
"""A stream that lived so long was no failure. Arbitrary; it keeps one that dies at once from spinning."""

_BUFFER_BYTES = 8 << 20
_EVENT_BYTES = 256
"""What an event costs beside its key and value, roughly."""


class EtcdWatch:
    """Implements `Watch`; an asynchronous context manager, whose end ends the task and the stream."""

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
        """Whether a member answered on this watch lately."""
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
            # How it ended was for the consumer to see, who has left; asking keeps asyncio from reporting it.
            self._task.exception()

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        """Return the next batch.

        Raises:
            Compacted: the events that come next are gone; list again and watch from there.
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
        """Read streams, one after the other, until history is gone, the user is denied, or for ever."""
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
                    # A fresh token was refused as well: this member lags.
                    self._caller.endpoints.leave(endpoint)
            except Denied:
                # To a watch whose token has expired, older members (3.4.0 is one) say "permission denied" too.
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
        """Read one stream until it breaks; it always ends with an exception."""
        self._buffer.begin_stream()
        loop = asyncio.get_running_loop()
        async with _Stream(self._caller, endpoint, metadata) as stream:
            await stream.write(self._create_request())
            asked = True  # the creation is a question as well
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
        # A refused watch is "created" and canceled in one message, so this comes first.
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
        """Notice an etcd that was restored from a backup: it would wait in silence for our revision.

        Without somebody who can prove more (`Store.watch`), by what the member says of itself.

        Raises:
            Compacted: what was watched is not this cluster's history.
            AttemptFailed: that could not be found out now.
            EtcdError: what the proof says.
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
        # A member that merely lags says the same, so a quorum is asked before it is believed.
        if header.revision < seen and await self._caller.revision() < seen:
            raise Compacted(0)


class _Stream:
    """One gRPC stream of watch messages; gives up when its endpoint is left.

    Reads and writes run in tasks of their own: cancelling one of them would end the stream, and a time limit
    on reading must not.
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
                    task.exception()  # nobody's any more

    def _give_up(self) -> list[asyncio.Task[Any]]:
        """End the stream; return what was going on in it, which ends, too.

        gRPC forgets a write that waits for the stream's beginning when the stream is cancelled before that
        (grpc/aio/_call.py: nobody sets `_metadata_sent` any more), so tasks are cancelled as well as the call.
        """
        self._call.cancel()
        left = [task for task in (self._reading, self._writing) if task is not None]
        for task in left:
            task.cancel()
        return left

    async def write(self, message: Any) -> None:
        """Send one message.

        Raises:
            AttemptFailed: the stream is over, or stuck.
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
            AttemptFailed, TokenRefused, EtcdError: the stream ended, by what it says.
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
    """Return what a finished read or write of a stream gave, its errors translated."""
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
    """Between the reader and the consumer: batches in revision order, of bounded size.

    Attributes:
        next_revision: where a new stream has to begin. Invariant: every event below it was put into a batch
            or is older than the watch; none at or above it was.
        room: set while the reader may read on.
    """

    def __init__(self, start_revision: int) -> None:
        self.next_revision = start_revision
        self.room = asyncio.Event()
        self.room.set()
        self._batches: deque[tuple[Batch, int]] = deque()
        self._held: list[Event] = []
        self._bytes = 0
        self._ended = False
        self._news = asyncio.Event()  # set while there is a batch, or the end

    def begin_stream(self) -> None:
        """Forget a revision that the last stream began and did not finish."""
        self._held.clear()

    def add(self, events: Sequence[Event], *, unfinished: bool) -> None:
        """Take one message's events; with `unfinished`, more of its last revision may follow."""
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
        """Nothing will be added any more."""
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
