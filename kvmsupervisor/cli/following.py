"""What changes below a prefix of etcd, as it comes: for commands that stay (`--follow`, `--watch`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

from kvmsupervisor.adapters.etcd.api import Compacted, Event, KeyValue, Store
from kvmsupervisor.cluster.overview import list_all


async def follow(store: Store, prefix: str, known: Iterable[KeyValue], revision: int) -> AsyncGenerator[list[Event]]:
    """Yield the changes behind `revision`, for ever; close it when leaving it.

    After a compaction the keys are listed again, and what differs is a change: none is missed but the values between.

    Args:
        store: etcd.
        prefix: of the keys.
        known: the keys as they were at `revision`.
        revision: of that.
    """
    present = {kv.key: kv for kv in known}
    while True:
        try:
            async with store.watch(prefix, revision + 1) as watch:
                async for batch in watch:
                    revision = batch.revision
                    for event in batch.events:
                        if event.deleted:
                            present.pop(event.kv.key, None)
                        else:
                            present[event.kv.key] = event.kv
                    yield list(batch.events)
        except Compacted:
            listing = await list_all(store, prefix)
            now = {kv.key: kv for kv in listing.kvs}
            changed = [Event(kv, deleted=False) for key, kv in now.items() if present.get(key) != kv]
            gone = [Event(kv._replace(value=b""), deleted=True) for key, kv in present.items() if key not in now]
            present, revision = now, listing.revision
            if changed or gone:
                yield [*changed, *gone]
