"""Finds the instance to which a storage client belongs, in the locks: the client of another instance is not fenced."""

from __future__ import annotations

import json
from contextlib import aclosing

from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.cluster.informer import Wishes
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.single import name_of


def instance_of_client(wishes: Wishes, client: str) -> InstanceId | None:
    """The instance whose lock has a storage client on record."""
    mark = json.dumps(client).encode()
    for name in wishes.ids():
        entry = wishes.lock_of(name)
        # Looking for the text costs less than reading the JSON of every lock.
        lock = Lock.from_json(entry.value) if entry is not None and mark in entry.value else None
        if lock is not None and client in lock.clients:
            return name
    return None


async def other_of_client(store: Store, layout: Layout, client: str, *, own: str) -> InstanceId | None:
    """The same, read from etcd, for a caller that follows only the lock `own`; that lock is left out.

    This reads everything below the prefixes of locks, so it is for rare questions.

    Raises:
        EtcdError: etcd does not say.
    """
    mark = json.dumps(client).encode()
    # In single mode the own lock may lie anywhere. Locks of supervisors are where the settings say, or at the default.
    for prefix in {layout.wishes_prefix, layout.locks_prefix() or layout.wishes_prefix}:
        async with aclosing(store.pages(prefix)) as pages:
            async for page in pages:
                for raw, value, *_ in page.entries:
                    key = raw.decode(errors="replace")
                    lock = Lock.from_json(value) if mark in value and key != own else None
                    if lock is not None and client in lock.clients:
                        return InstanceId(name_of(key, prefix=layout.prefix))
    return None
