"""The locks that concern this host, where `LOCK` puts them outside the prefix of the wishes.

Each of those is watched by itself, all on one stream: what happens to any other lock costs this host nothing, and etcd
no more with a thousand hosts than with one. (A watch of all locks costs both for each change of each lock.)

A lock concerns this host when its instance's keys say so, when an instance of that id is here, or when the lock names
this host. The last is found by reading all locks once: afterwards only this host itself writes its name into a lock,
which it does for instances that concern it already. A live move's hand-over is no exception: the keys name its target.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Set
from contextlib import aclosing
from typing import Never

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import KeysWatch, Store, Unavailable
from kvmsupervisor.aio import until_one_ends
from kvmsupervisor.cluster.informer import SLICE, AnotherHistory, Following, Proof
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.grouping import Entry
from kvmsupervisor.domain.history import KEPT
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.parse_keys import VALUE_LIMIT

READ_AT_ONCE = 32
"""How many locks are read together. Arbitrary: all of one host's, mostly."""

SPARE = 64
"""How many locks may be watched that concern this host no more, beside as many as do. Arbitrary: they cost little."""


@frozen
class Seen:
    """A lock, None when it is absent, as etcd held it at revision `as_of`."""

    entry: Entry | None
    as_of: int


class Locks(Following):
    """Keeps the locks that concern this host in step with etcd; see `Following`.

    Args:
        layout: of the keys; `locks_prefix` is not None.
        me: this host.
        concerns: whether a lock concerns this host by what is known beside the lock. Asked of each id that `heed` is
            told, and of all that are followed now and then.
        on_change: called with the ids whose locks differ, or are known by now, and the revision; see `Informer`.
        first: awaited before the first list: by then `heed` was told of all keys.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        history: Proof,
        layout: Layout,
        me: HostName,
        concerns: Callable[[InstanceId], bool],
        on_change: Callable[[Set[InstanceId], int], None],
        first: Iterable[asyncio.Event] = (),
        rand: Callable[[], float] = random.random,
    ) -> None:
        prefix = layout.locks_prefix()
        assert prefix is not None
        super().__init__(store=store, clock=clock, history=history, prefix=prefix, rand=rand)
        self._layout = layout
        self._mark = me.encode()
        self._concerns = concerns
        self._on_change = on_change
        self._first = tuple(first)
        self._seen: dict[InstanceId, Seen] = {}
        # Followed from now on, and to be read before that.
        self._unread: dict[InstanceId, None] = {}
        self._news = asyncio.Event()
        self._most = SPARE

    # --- what is asked ----------------------------------------------------------------------------------------

    @property
    def in_step(self) -> bool:
        """Whether every lock that concerns this host is known, and watched."""
        return super().in_step and not self._unread

    def ids(self) -> Set[InstanceId]:
        """The instances whose lock is followed, and there."""
        return {name for name, seen in self._seen.items() if seen.entry is not None}

    def lock_of(self, instance: InstanceId) -> Entry | None:
        """The lock of one instance; None when it is absent, or not followed."""
        seen = self._seen.get(instance)
        return None if seen is None else seen.entry

    def known_at(self, instance: InstanceId) -> int | None:
        """The revision of which `lock_of` tells; None when the lock is not known."""
        seen = self._seen.get(instance)
        return None if seen is None else seen.as_of

    def naming(self, host: bytes) -> Set[InstanceId]:
        """The instances whose lock contains this name, maybe in a longer one."""
        return {name for name, seen in self._seen.items() if seen.entry is not None and host in seen.entry.value}

    def heed(self, changed: Iterable[InstanceId]) -> None:
        """What is known of these instances has changed: follow the locks of those that concern this host now."""
        for name in changed:
            if name not in self._seen and name not in self._unread and self._concerns(name):
                self._unread[name] = None
                self._news.set()

    # --- following --------------------------------------------------------------------------------------------

    async def _list(self) -> None:
        for ready in self._first:
            await ready.wait()
        found: dict[InstanceId, Entry] = {}
        wanted, era = self._seen.keys() | self._unread.keys(), self._history.era
        async with aclosing(self._store.pages(self._prefix)) as pages:
            async for page in pages:
                for begin in range(0, len(page.entries), SLICE):
                    for key, value, mod_revision, create_revision, lease in page.entries[begin : begin + SLICE]:
                        name = self._layout.id_of_lock(key.decode(errors="replace"))
                        if name is not None and (name in wanted or self._mark in value):
                            found[name] = Entry(value[: VALUE_LIMIT + 1], mod_revision, create_revision, lease)
                    await asyncio.sleep(0)
                revision = page.revision
        await self._prove_list(era)
        self._well()
        self._listed = True
        self.era = era
        self._seen = {name: Seen(found.get(name), revision) for name in wanted | found.keys()}
        for name in wanted:
            self._unread.pop(name, None)
        for name, entry in sorted(found.items(), key=lambda one: one[1].mod_revision)[-KEPT:]:
            self._history.saw(self._key(name), entry.mod_revision, entry.value)
        self.revision = revision
        self._on_change(self._seen.keys(), revision)
        self.synced.set()

    async def _follow(self) -> Never:
        while True:
            async with self._store.watch_keys(prove=self._prove) as watch:
                # No lock has this key. A stream without a watch would never say that its member lives.
                watch.add(self._prefix, self.revision + 1)
                for name, seen in self._seen.items():
                    if name not in self._unread:
                        watch.add(self._layout.lock_key(name), seen.as_of + 1)
                self._watch = watch
                try:
                    # Until too much is watched.
                    await until_one_ends(self._hear(watch), self._read(watch))
                finally:
                    self._watch = None

    async def _hear(self, watch: KeysWatch) -> Never:
        async for batch in watch:
            self._well()
            self._check_era()
            changed = set()
            for event in batch.events[-KEPT:]:
                self._history.saw(event.kv.key, event.kv.mod_revision, None if event.deleted else event.kv.value)
            for event in batch.events:
                name = self._layout.id_of_lock(event.kv.key.decode(errors="replace"))
                if name is not None and name in self._seen:
                    kv = event.kv
                    entry = Entry(kv.value[: VALUE_LIMIT + 1], kv.mod_revision, kv.create_revision, kv.lease)
                    self._seen[name] = Seen(None if event.deleted else entry, kv.mod_revision)
                    changed.add(name)
            self.revision = max(self.revision, batch.revision)
            if changed:
                self._on_change(changed, self.revision)
        raise Unavailable(f"the watch on locks below {self._prefix} has ended")

    async def _read(self, watch: KeysWatch) -> None:
        while True:
            while self._unread:
                names = list(self._unread)[:READ_AT_ONCE]
                reading = await self._store.read(*map(self._layout.lock_key, names))
                # As after a list: these reads may have gone to another member than the watch.
                await self._prove()
                for name, kv in zip(names, reading.kvs, strict=True):
                    self._unread.pop(name, None)
                    entry = None
                    if kv is not None:
                        entry = Entry(kv.value[: VALUE_LIMIT + 1], kv.mod_revision, kv.create_revision, kv.lease)
                    self._seen[name] = Seen(entry, reading.revision)
                    watch.add(self._layout.lock_key(name), reading.revision + 1)
                self.revision = max(self.revision, reading.revision)
                self._on_change(set(names), self.revision)
            if len(self._seen) > self._most and self._let_go():
                return
            self._news.clear()
            await self._news.wait()

    def _let_go(self) -> bool:
        """Forget the locks that concern this host no more; whether they are worth another stream."""
        kept = {
            name: seen
            for name, seen in self._seen.items()
            if self._concerns(name) or (seen.entry is not None and self._mark in seen.entry.value)
        }
        self._most = 2 * len(kept) + SPARE
        gone = len(kept) < len(self._seen)
        self._seen = kept
        return gone

    def _check_era(self) -> None:
        if self._history.era != self.era:
            raise AnotherHistory("etcd has another history")

    def _lag(self) -> None:
        # Compacted: these few are read again, instead of the locks of all.
        self._unread = {**dict.fromkeys(self._seen), **self._unread}

    def _key(self, name: InstanceId) -> bytes:
        return self._layout.lock_key(name).encode()
