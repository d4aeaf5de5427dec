"""The cluster as its keys show it, kept in step by watches: for `list --watch`. Nothing is read again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from kvmsupervisor.adapters.etcd.api import KeyValue, Store
from kvmsupervisor.cli.following import follow
from kvmsupervisor.cluster.overview import Cluster, assemble, list_all
from kvmsupervisor.domain.keys import Layout

LEAST_S = 0.5
"""How long changes are gathered. Arbitrary: a person reads no faster, and a start has five of them in a moment."""


async def clusters(
    store: Store, layout: Layout, *, again_s: float | None = None, gather_s: float = LEAST_S
) -> AsyncGenerator[Cluster]:
    """Yield the cluster, now and after changes, for ever; close it when leaving it.

    Args:
        store: etcd.
        layout: of the keys.
        again_s: yield it again after that time, with nothing read, for the sake of ages; None for never.
        gather_s: how long changes are gathered.
    """
    locks_prefix = layout.locks_prefix()
    prefixes = [layout.wishes_prefix, layout.placements_prefix, layout.statuses_prefix, layout.hosts_prefix]
    if locks_prefix is not None:
        prefixes.append(locks_prefix)
    tables: dict[str, dict[bytes, KeyValue]] = {}
    revisions: dict[str, int] = {}
    for prefix in prefixes:
        listing = await list_all(store, prefix)
        tables[prefix] = {kv.key: kv for kv in listing.kvs}
        revisions[prefix] = listing.revision
    changed = asyncio.Event()
    tasks = [
        asyncio.create_task(_keep_up(store, prefix, tables[prefix], revisions[prefix], changed.set))
        for prefix in prefixes
    ]
    try:
        while True:
            wishes = [kv for prefix in (layout.wishes_prefix, locks_prefix) if prefix for kv in tables[prefix].values()]
            yield assemble(
                layout,
                wishes=wishes,
                placements=tables[layout.placements_prefix].values(),
                statuses=tables[layout.statuses_prefix].values(),
                sessions=tables[layout.hosts_prefix].values(),
            )
            waiting = asyncio.create_task(changed.wait())
            try:
                await asyncio.wait({waiting, *tasks}, timeout=again_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            for task in tasks:
                if task.done():
                    task.result()
            if changed.is_set():
                await asyncio.sleep(gather_s)
                changed.clear()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _keep_up(
    store: Store, prefix: str, table: dict[bytes, KeyValue], revision: int, tell: Callable[[], None]
) -> None:
    async with aclosing(follow(store, prefix, list(table.values()), revision)) as changes:
        async for batch in changes:
            for event in batch:
                if event.deleted:
                    table.pop(event.kv.key, None)
                else:
                    table[event.kv.key] = event.kv
            tell()
