"""Finds the instance to which a storage client belongs, in the locks: the client of another instance is not fenced."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import Protocol

from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.lock import Lock, clients_from_json
from kvmsupervisor.domain.single import name_of


class Owners(Protocol):
    """Says whose storage clients are."""

    async def __call__(
        self, clients: Collection[str], *, besides: InstanceId, proven: bool = False, everywhere: bool = True
    ) -> Mapping[str, InstanceId]:
        """For each of these clients another instance whose lock has it on record as a living QEMU's, if there is one.

        Args:
            clients: addresses in storage.
            besides: the instance that asks; its own lock does not count.
            proven: where people may write locks, only what a supervisor has recorded of that other instance counts,
                too. Otherwise who writes a lock could keep anybody from being shut out.
            everywhere: whether locks count that this host does not follow, which etcd is asked for.

        Raises:
            EtcdError: etcd does not say.
        """
        ...


class LockOwners:
    """By all locks, for a supervisor. Implements `Owners`.

    Args:
        wishes: what it follows.
        store: etcd.
        layout: of the keys.
    """

    def __init__(self, wishes: Wishes, store: Store, layout: Layout) -> None:
        self._wishes = wishes
        self._store = store
        self._layout = layout
        self._reading = asyncio.Lock()
        self._waiting: list[_Question] = []

    async def recorded_for(
        self, clients: Collection[str], *, besides: InstanceId, proven: bool = False, everywhere: bool = True
    ) -> Mapping[str, InstanceId]:
        """See `Owners`."""
        found: dict[str, list[InstanceId]] = {client: [] for client in clients}
        for name in self._wishes.ids() if found else ():
            entry = self._wishes.lock_of(name)
            for client in () if entry is None else _living_in(entry.value, found):
                found[client].append(name)
        if self._wishes.locks_apart and everywhere and clients:
            for client, names in (await self._elsewhere(clients)).items():
                found[client] += names
        if proven and self._layout.locks_are_open:
            return await _proven(self._store, self._layout, found, besides)
        return _first(found, besides)

    async def _elsewhere(self, clients: Collection[str]) -> Mapping[str, Iterable[InstanceId]]:
        """Look through all locks, of which this host follows some only.

        When a host is gone, many ask at once: those who ask while etcd is being read share the next reading.
        """
        question = _Question(clients)
        self._waiting.append(question)
        async with self._reading:
            if question.answer is None:
                together, self._waiting = self._waiting, []
                asked = {client for one in together for client in one.clients}
                prefix = self._layout.locks_prefix()
                assert prefix is not None
                found: Mapping[str, Iterable[InstanceId]] | None = None
                try:
                    found = await _below(self._store, self._layout, prefix, asked)
                finally:
                    if found is None:
                        # The others ask by themselves.
                        self._waiting += (one for one in together if one is not question)
                for one in together:
                    one.answer = found
        assert question.answer is not None
        return {client: question.answer.get(client, ()) for client in clients}


class _Question:
    """Of one who waits; `answer` says of these clients and of others who has them."""

    def __init__(self, clients: Collection[str]) -> None:
        self.clients = clients
        self.answer: Mapping[str, Iterable[InstanceId]] | None = None


class OwnersInEtcd:
    """The same, read from etcd, for a caller that follows only its own lock. Implements `Owners`.

    This reads everything below the prefixes of locks, so it is for rare questions.

    Args:
        store: etcd.
        layout: of the keys.
        own: the key of that lock, which is left out; in single mode it may lie anywhere.
    """

    def __init__(self, store: Store, layout: Layout, *, own: str) -> None:
        self._store = store
        self._layout = layout
        self._own = own

    async def recorded_for(
        self, clients: Collection[str], *, besides: InstanceId, proven: bool = False, everywhere: bool = True
    ) -> Mapping[str, InstanceId]:
        """See `Owners`."""
        layout, found = self._layout, dict[str, list[InstanceId]]()
        if not clients or not everywhere:
            return {}
        # Locks of supervisors are where the settings say, or at the default.
        for prefix in {layout.wishes_prefix, layout.locks_prefix() or layout.wishes_prefix}:
            below = await _below(self._store, layout, prefix, clients, own=self._own)
            if proven and prefix == layout.wishes_prefix:
                below = {
                    client: [name] for client, name in (await _proven(self._store, layout, below, besides)).items()
                }
            for client, names in below.items():
                found.setdefault(client, []).extend(names)
        return _first(found, besides)


def _living_in(value: bytes, clients: Iterable[str]) -> Iterator[str]:
    """Those of the clients that this lock has on record as a living QEMU's."""
    # Looking for the text costs less than reading the JSON of every lock.
    if named := [client for client in clients if json.dumps(client).encode() in value]:
        lock = Lock.from_json(value)
        yield from () if lock is None else (client for client in named if client in lock.living)


async def _below(
    store: Store, layout: Layout, prefix: str, clients: Collection[str], *, own: str = ""
) -> dict[str, list[InstanceId]]:
    """The same for all locks below a prefix, but for the key `own`."""
    found: dict[str, list[InstanceId]] = {}
    async with aclosing(store.pages(prefix)) as pages:
        async for page in pages:
            for raw, value, *_ in page.entries:
                key = raw.decode(errors="replace")
                if key != own:
                    for client in _living_in(value, clients):
                        name = layout.id_of_lock(key) or InstanceId(name_of(key, prefix=layout.prefix))
                        found.setdefault(client, []).append(name)
    return found


async def _proven(
    store: Store, layout: Layout, found: Mapping[str, Iterable[InstanceId]], besides: InstanceId
) -> Mapping[str, InstanceId]:
    """Those whose client a supervisor has recorded, too."""
    proven = {}
    for client, names in found.items():
        for name in names:
            said = None if name == besides else await store.get(layout.clients_key(name))
            if said is not None and client in clients_from_json(said.value):
                proven[client] = name
    return proven


def _first(found: Mapping[str, Iterable[InstanceId]], besides: InstanceId) -> Mapping[str, InstanceId]:
    others = {client: min((name for name in names if name != besides), default=None) for client, names in found.items()}
    return {client: other for client, other in others.items() if other is not None}
