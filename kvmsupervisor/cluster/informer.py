"""Informer: keeps the keys below a prefix in step with etcd by list and watch, and lists again after a compaction.

No change is lost and none is applied twice: the watch begins right behind the list, and after a compaction the new list
is compared with the table, which yields exactly the changes that the watch could not tell.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Set
from contextlib import aclosing
from operator import itemgetter
from typing import Generic, Never, Protocol, TypeVar

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import (
    Compacted,
    Denied,
    EtcdError,
    Event,
    Store,
    Unavailable,
    Watch,
)
from kvmsupervisor.aio import start_part
from kvmsupervisor.domain.grouping import Entry, Flat, Groups, Stage, Table
from kvmsupervisor.domain.history import KEPT
from kvmsupervisor.domain.keys import InstanceId, Layout, parse_id
from kvmsupervisor.domain.placement import Placed
from kvmsupervisor.domain.spec import RawValue
from kvmsupervisor.domain.timing import RETRY_CAP_S, retry_delay

log = structlog.get_logger(__name__)

LabelT = TypeVar("LabelT", bound=Hashable)

SLICE = 1000
"""Keys that are applied before other tasks get their turn: at most 2 ms of work."""


_BY_REVISION = itemgetter(2)


class Proof(Protocol):
    """What an informer needs of `history.History`."""

    @property
    def era(self) -> int:
        """A number that differs in another history."""
        ...

    async def prove(self) -> None:
        """Prove that etcd has the history that this host acted on, or begin another era."""
        ...

    def saw(self, key: bytes, revision: int, value: bytes | None) -> None:
        """A key was observed: written, or deleted (None)."""
        ...


class AnotherHistory(EtcdError):
    """The list belongs to a history that etcd no longer has: list again."""


class Informer(Generic[LabelT]):
    """Keeps `table` in step with the keys below `prefix`.

    Args:
        store: etcd.
        clock: the machine's.
        prefix: of the keys.
        history: asked before anything is applied that came over a new connection.
        table: holds the keys; changes are told by its labels (`grouping.Flat`: the keys).
        on_change: called with the labels that differ and the revision, once per batch that changed
            anything, after the whole batch is in the table. It runs in the informer's own task: it must
            neither block nor raise. It is called after the first list of another era, too, whatever differs.
        rand: random numbers, 0 ≤ x < 1.

    Attributes:
        era: the history's era to which the table belongs.
        synced: set once the first list is in the table and `on_change` was told of it.
        revision: of etcd; the table holds all changes below the prefix up to it. 0 before the first list.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        history: Proof,
        prefix: str,
        table: Table[LabelT],
        on_change: Callable[[Set[LabelT], int], None],
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.synced = asyncio.Event()
        self.revision = 0
        self.era = history.era
        self._history = history
        self._store = store
        self._clock = clock
        self._prefix = prefix
        self._table = table
        self._on_change = on_change
        self._rand = rand
        self._listed = False
        self._watch: Watch | None = None
        self._trouble: tuple[type[EtcdError], str] | None = None

    @property
    def in_step(self) -> bool:
        """Whether the table is in step with etcd: listed, and the watch is connected."""
        return self._listed and self._watch is not None and self._watch.connected

    @property
    def problem(self) -> str:
        """What keeps the table from being in step, for people; empty while it is in step."""
        if self.in_step:
            return ""
        if self._trouble is not None:
            return self._trouble[1]
        step = "the watch on" if self._listed else "the first list of"
        return f"{step} {self._prefix} is not answered yet"

    async def run(self) -> Never:
        """Follow the keys, for ever."""
        failures = 0
        while True:
            began = self._clock.now()
            try:
                if not self._listed:
                    await self._list()
                await self._follow()
            except EtcdError as error:
                # A connection that lasted resets the backoff.
                failures = 1 if self._clock.now() - began > RETRY_CAP_S else failures + 1
                self._note(error)
                if not isinstance(error, Compacted | AnotherHistory) or failures > 1:
                    await self._clock.sleep(retry_delay(failures, self._rand()))

    async def _list(self) -> None:
        stage = self._table.begin(fresh=True)
        revision = 0
        newest: list[tuple[bytes, bytes, int, int, int]] = []
        async with aclosing(self._store.pages(self._prefix)) as pages:
            async for page in pages:
                for begin in range(0, len(page.entries), SLICE):
                    entries = page.entries[begin : begin + SLICE]
                    stage.put_all(entries)
                    if len(newest) < KEPT or max(map(_BY_REVISION, entries)) > _BY_REVISION(newest[-1]):
                        newest = heapq.nlargest(KEPT, [*newest, *entries], key=_BY_REVISION)
                    await asyncio.sleep(0)
                revision = page.revision
        # After the list: the proof then asks the member that answered the list, not an earlier one.
        await self._history.prove()
        self._listed = True
        self._well()
        for key, value, mod_revision, _, _ in newest:
            self._history.saw(key, mod_revision, value)
        self._commit(stage, revision, era=self._history.era)
        self.synced.set()

    async def _follow(self) -> Never:
        async with self._store.watch(self._prefix, self.revision + 1, prove=self._prove) as watch:
            self._watch = watch
            try:
                async for batch in watch:
                    stage = self._table.begin(fresh=False)
                    await _fill(stage, batch.events)
                    self._well()
                    if self._history.era != self.era:
                        # This came over an older connection than the proof that found another history.
                        raise AnotherHistory("etcd has another history")
                    # Of one transaction, too: any of its keys may be what a restored backup contradicts.
                    for event in batch.events[-KEPT:]:
                        self._history.saw(
                            event.kv.key, event.kv.mod_revision, None if event.deleted else event.kv.value
                        )
                    self._commit(stage, batch.revision, era=self.era)
            finally:
                self._watch = None
        raise Unavailable(f"the watch on {self._prefix} has ended")

    async def _prove(self) -> None:
        """Prove the history before anything is applied that comes over a new connection.

        Raises:
            AnotherHistory: the table belongs to another history than this connection.
        """
        await self._history.prove()
        if self._history.era != self.era:
            raise AnotherHistory("etcd has another history")

    def _commit(self, stage: Stage[LabelT], revision: int, *, era: int) -> None:
        changed = stage.commit()
        anew, self.era = era != self.era, era
        self.revision = revision
        if changed or anew:
            self._on_change(changed, revision)

    def _note(self, error: EtcdError) -> None:
        """Remember what is wrong; log it when it differs from what was wrong before."""
        before, self._trouble = self._trouble, (type(error), f"{self._prefix} cannot be read: {error}")
        match error:
            case Compacted():
                self._listed = False
                log.info("mirror.compacted", prefix=self._prefix, since=self.revision, oldest=error.revision)
            case AnotherHistory():
                self._listed = False
            case _ if before is not None and before[0] is type(error):
                pass
            case Denied():
                log.error("mirror.denied", prefix=self._prefix, error=str(error))
            case _:
                log.warning("mirror.away", prefix=self._prefix, error=str(error))

    def _well(self) -> None:
        if self._trouble is not None:
            log.info("mirror.back", prefix=self._prefix)
            self._trouble = None


async def _fill(stage: Stage[LabelT], events: Iterable[Event]) -> None:
    """Fill a stage slice by slice, so that other tasks get their turn during a large list."""
    for index, event in enumerate(events, start=1):
        if event.deleted:
            stage.delete(event.kv.key)
        else:
            stage.put(*event.kv)
        if index % SLICE == 0:
            await asyncio.sleep(0)


class Wishes:
    """Every instance's wish keys, lock and placement, in step with etcd.

    A placement is a fact, but it says where an instance runs, as `host` does: so placements are read before anything is
    decided. When `LOCK` puts the locks outside the wishes' prefix, a further informer follows the locks.

    Args:
        store: etcd.
        clock: the machine's.
        layout: of the keys.
        history: see `Informer`.
        on_change: called with the ids whose keys or lock differ, and the revision; see `Informer`.
        on_anew: called instead once everything belongs to another era: do not compare with what was known before.
        rand: random numbers, 0 ≤ x < 1.

    Attributes:
        era: of all tables.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        layout: Layout,
        history: Proof,
        on_change: Callable[[Set[InstanceId], int], None],
        on_anew: Callable[[], None],
        rand: Callable[[], float] = random.random,
    ) -> None:
        def follow(prefix: str, table: Groups) -> Informer[InstanceId]:
            return Informer(
                store=store,
                clock=clock,
                history=history,
                prefix=prefix,
                table=table,
                on_change=self._changed,
                rand=rand,
            )

        self.era = history.era
        self._on_change = on_change
        self._on_anew = on_anew
        self._keys = Groups(layout)
        self._informers = [follow(layout.wishes_prefix, self._keys)]
        self._locks = self._keys
        locks_prefix = layout.locks_prefix()
        if locks_prefix is not None:
            self._locks = Groups(layout, locks_only=True)
            self._informers.append(follow(locks_prefix, self._locks))
        self._of_locks = self._informers[-1]
        self._layout = layout
        self._placements = Flat()
        self._of_placements = Informer(
            store=store,
            clock=clock,
            history=history,
            prefix=layout.placements_prefix,
            table=self._placements,
            on_change=lambda keys, revision: self._changed(self._ids_of_placements(keys), revision),
            rand=rand,
        )

    async def run(self) -> None:
        """Follow the keys, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for informer in self._all:
                start_part(tasks, informer.run)

    def _changed(self, changed: Set[InstanceId], revision: int) -> None:
        eras = {informer.era for informer in self._all}
        if eras == {self.era}:
            self._on_change(changed, revision)
        elif len(eras) == 1:
            (self.era,) = eras
            self._on_anew()
        # Half of the tables belongs to another history: tell nothing until the other half does, too.

    @property
    def _all(self) -> tuple[Informer[InstanceId] | Informer[bytes], ...]:
        return (*self._informers, self._of_placements)

    async def wait_synced(self) -> None:
        """Return once everything was listed for the first time."""
        for informer in self._all:
            await informer.synced.wait()

    @property
    def synced(self) -> bool:
        """Whether everything was listed for the first time: until then an absent key means nothing."""
        return all(informer.synced.is_set() for informer in self._all)

    @property
    def in_step(self) -> bool:
        """Whether wishes and locks are in step with etcd."""
        return all(informer.in_step for informer in self._all)

    @property
    def problem(self) -> str:
        """What keeps the tables from being in step, for people; empty while they are in step."""
        return "; ".join(informer.problem for informer in self._all if informer.problem)

    @property
    def revision(self) -> int:
        """The etcd revision up to which all wishes are known."""
        return self._informers[0].revision

    @property
    def locks_revision(self) -> int:
        """The etcd revision up to which all locks are known."""
        return self._of_locks.revision

    @property
    def placements_revision(self) -> int:
        """The etcd revision up to which all placements are known."""
        return self._of_placements.revision

    def ids(self) -> Set[InstanceId]:
        """Every instance that has a wish key or a lock (`keys_of` may be empty)."""
        return self._keys.ids() if self._locks is self._keys else self._keys.ids() | self._locks.ids()

    def naming(self, host: bytes) -> Set[InstanceId]:
        """The instances whose `host` is this name, or whose lock or placement contains it, maybe in a longer name."""
        found = self._keys.naming(host)
        placed = self._ids_of_placements(key for key, entry in self._placements.entries.items() if host in entry.value)
        return found | placed if self._locks is self._keys else found | placed | self._locks.naming(host)

    def placed(self, instance: InstanceId) -> Placed:
        """The placement of one instance (law 10). Cheap for the many instances that have none."""
        entries = self._placements.entries
        entry = entries.get(self._layout.placement_key(instance).encode()) if entries else None
        return Placed.of(entry)

    def _ids_of_placements(self, keys: Iterable[bytes]) -> Set[InstanceId]:
        length = len(self._layout.placements_prefix.encode())
        found = (parse_id(key[length:].decode(errors="replace")) for key in keys)
        return {instance for instance in found if instance is not None}

    def keys_of(self, instance: InstanceId) -> Mapping[bytes, RawValue]:
        """The wish keys of one instance, by the part behind `/kvm/<id>/`. A later change makes a new mapping."""
        return self._keys.keys_of(instance)

    def lock_of(self, instance: InstanceId) -> Entry | None:
        """The lock of one instance, None when it is absent."""
        return self._locks.lock_of(instance)

    def foreign(self) -> Mapping[bytes, str]:
        """Keys below the wishes' prefix that belong to no instance, with the reason."""
        return self._keys.foreign()
