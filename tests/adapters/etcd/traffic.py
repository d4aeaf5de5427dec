"""Writes and a watch that go on while a test does harm, and the truth to hold them against."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kvmsupervisor.adapters.etcd import Batch, Etcd, EtcdConfig, Store, Unavailable
from tests.support.invariants import WatchLog

SOON_S = 40.0
"""Nothing here takes so long on any machine that is of use; a fault that never ends does."""

Change = tuple[bytes, bytes, bool, int]


def changes(batches: Sequence[Batch]) -> list[Change]:
    """Flatten batches: key, value, deleted, revision."""
    return [
        (event.kv.key, event.kv.value, event.deleted, event.kv.mod_revision)
        for batch in batches
        for event in batch.events
    ]


@asynccontextmanager
async def client(endpoints: Sequence[str], *, call_timeout_s: float = 10.0) -> AsyncIterator[Etcd]:
    """A client without TLS or user, closed at the end of the block."""
    etcd = Etcd(EtcdConfig(endpoints=tuple(endpoints), call_timeout_s=call_timeout_s))
    try:
        yield etcd
    finally:
        await etcd.close()


async def follow(store: Store, prefix: str, start: int, last: int) -> list[Change]:
    """Watch `prefix` from revision `start` on, until revision `last` has been seen."""
    seen, log, wrong = list[Batch](), WatchLog(start), list[str]()
    async with asyncio.timeout(SOON_S), store.watch(prefix, start) as watch:
        async for batch in watch:
            seen.append(batch)
            wrong += log.handed(batch)
            if batch.revision >= last:
                break
    assert wrong == []
    return changes(seen)


async def history(endpoints: Sequence[str], prefix: str, last: int) -> list[Change]:
    """Replay what really happened below `prefix`, up to revision `last`, with a client of its own."""
    async with client(endpoints) as replayer:
        return await follow(replayer, prefix, 1, last)


class Traffic:
    """One client that puts numbered values below a prefix, one after the other, and watches them."""

    def __init__(self, etcd: Etcd, prefix: str) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._begun = 0
        self._answered = 0
        self._batches: list[Batch] = []
        self._log = WatchLog(1)
        self._wrong: list[str] = []
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Traffic]:
        """Write and watch until the end of the block."""
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._watch())]
        try:
            await self.flows()
            yield self
        finally:
            await self._stop()

    async def flows(self) -> None:
        """Wait until a put that begins from now on is answered, and an event of such a put has come."""
        begun = self._begun
        async with asyncio.timeout(SOON_S), self._changed:
            await self._changed.wait_for(lambda: min(self._answered, self._seen()) > begun)

    async def verify(self, endpoints: Sequence[str]) -> None:
        """End the writing, wait for its last event, and compare all events with the truth."""
        writer, _ = self._tasks
        writer.cancel()
        await asyncio.wait((writer,))
        last = await self._etcd.put(f"{self._prefix}/last", b"0")
        async with asyncio.timeout(SOON_S), self._changed:
            await self._changed.wait_for(lambda: self._batches[-1].revision >= last)
        assert self._wrong == []
        # A put that was given up may still be on its way, and come behind the last one.
        seen, true = changes(self._batches), await history(endpoints, self._prefix, last)
        assert [one for one in seen if one[3] <= last] == [one for one in true if one[3] <= last]

    def _seen(self) -> int:
        return int(self._batches[-1].events[-1].kv.value) if self._batches else 0

    async def _write(self) -> None:
        while True:
            self._begun += 1
            try:
                await self._etcd.put(f"{self._prefix}/{self._begun % 10}", str(self._begun).encode())
            except Unavailable:
                continue
            async with self._changed:
                self._answered = self._begun
                self._changed.notify_all()
            await asyncio.sleep(0.005)  # a pace, not a wait

    async def _watch(self) -> None:
        async with self._etcd.watch(self._prefix, 1) as watch:
            async for batch in watch:
                async with self._changed:
                    self._batches.append(batch)
                    self._wrong += self._log.handed(batch)
                    self._changed.notify_all()

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for task in self._tasks:
            if not task.cancelled():
                task.result()
