"""A watch of some keys, each by itself, on one stream: what happens to their neighbours costs neither side anything.

etcd finds the watches of a key by that key, so a key that nobody watches is passed over whatever the number of watches;
and a stream costs etcd more than all the watches on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvmsupervisor.adapters.etcd.api import Batch, Event
from kvmsupervisor.adapters.etcd.auth import Metadata
from kvmsupervisor.adapters.etcd.caller import Caller
from kvmsupervisor.adapters.etcd.channel import Endpoint
from kvmsupervisor.adapters.etcd.watch import EtcdWatch, Stream, create_request
from kvmsupervisor.aio import until_one_ends

_UNANSWERED = 100
"""The most requests that wait for an answer: more could fill both sides' buffers, while neither reads."""


class EtcdKeysWatch(EtcdWatch):
    """Implements `KeysWatch`."""

    def __init__(self, caller: Caller, *, prove: Callable[[], Awaitable[None]] | None = None) -> None:
        super().__init__(caller, "", 0, prove=prove)
        # Where a new stream has to begin for each key. Invariant: every event of it below that was delivered.
        self._next: dict[bytes, int] = {}
        self._unasked: dict[bytes, None] = {}
        self._unanswered = 0
        self._proven = False
        self._more = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether a member has answered recently, and watches every key."""
        return self._connected and not self._unasked and not self._unanswered

    def add(self, key: str, start_revision: int) -> None:
        """Watch this key, too; see `KeysWatch.add`."""
        raw = key.encode()
        self._next[raw] = start_revision
        self._unasked[raw] = None
        self._more.set()

    async def _read_stream(self, endpoint: Endpoint, metadata: Metadata) -> None:
        self._unasked = dict.fromkeys(self._next)
        self._unanswered = 0
        self._proven = False
        async with Stream(self._caller, endpoint, metadata) as stream:
            await until_one_ends(stream.read_all(self._take, room=self._buffer.room), self._ask(stream))

    async def _ask(self, stream: Stream) -> None:
        """Ask for a watch of each key that was added."""
        while True:
            self._more.clear()
            for key in list(self._unasked)[: _UNANSWERED - self._unanswered]:
                del self._unasked[key]
                self._unanswered += 1
                await stream.write(create_request({"key": key}, self._next[key]))
                stream.expect()
            await self._more.wait()

    async def _created(self, message: Any) -> None:
        if not self._proven:
            await self._check_history(message.header)
            self._proven = True
        self._unanswered = max(self._unanswered - 1, 0)
        if self._unasked:
            self._more.set()
        self._connected = True

    def _take_events(self, events: Sequence[Event], *, unfinished: bool) -> None:
        # A revision changes a key once, so each event is complete by itself.
        fresh = [one for one in events if one.kv.mod_revision >= self._next.get(one.kv.key, 0)]
        for one in fresh:
            self._next[one.kv.key] = one.kv.mod_revision + 1
        if fresh:
            self._buffer.append(Batch(fresh, fresh[-1].kv.mod_revision))
