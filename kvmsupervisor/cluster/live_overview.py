"""The cluster as its keys show it, kept in step with etcd: for a process that shows it for days. Reads only.

A change costs what it touches: the instances whose keys differ are put together anew, the others stay. Two watches do:
one of the wishes, one of all facts; a third one where the locks lie outside of both.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Iterator, Set
from dataclasses import replace

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import KeyValue, Store
from kvmsupervisor.aio import start_part
from kvmsupervisor.cluster.informer import Informer, Proof
from kvmsupervisor.cluster.overview import Cluster, Instance, LockFact, host_wishes, natural
from kvmsupervisor.domain import events
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.grouping import Entry, Flat, Groups
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.host_wish import HostProgress
from kvmsupervisor.domain.keys import InstanceId, Layout, parse_id
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import Placed
from kvmsupervisor.domain.status import Status

WHOLE = 1 << 21
"""Bytes of a fact that are kept: more than etcd takes in one request (1.5 MiB), so that a long one can be read."""

PAGE = 1000
"""Keys that a list asks for at once. Ten times as many need 3 MB more, which a process that shows a page for days would
keep."""

SLICE = 100
"""Instances that are put together before other tasks get their turn: some 10 ms."""


@frozen
class Differing:
    """What has changed since the last look.

    Attributes:
        instances: whose keys, status, lock, placement or events differ.
        hosts: whether sessions differ: what is shown of any instance may depend on them.
        drains: whether what people want of whole hosts differs, or how far these have come.
        anew: whether etcd has another history than before.
    """

    instances: frozenset[InstanceId]
    hosts: bool
    drains: bool
    anew: bool


class LiveOverview:
    """All instances and hosts that etcd knows of, the same as `overview.read_cluster` reads.

    Args:
        store: etcd.
        clock: the machine's.
        layout: of the keys.
        history: see `Informer`.
        rand: random numbers, 0 ≤ x < 1.

    Attributes:
        cluster: as of the last `look`.
        changed: set when there is something to look at.
        revision: of etcd, as of the last `look`: all keys are as of then or later, where they are in step.
    """

    def __init__(
        self, *, store: Store, clock: Clock, layout: Layout, history: Proof, rand: Callable[[], float] = random.random
    ) -> None:
        self.cluster = Cluster()
        self.changed = asyncio.Event()
        self.revision = 0
        self._layout = layout
        self._history = history
        self._era = history.era
        self._dirty: set[InstanceId] = set()
        self._dirty_hosts = False
        self._by_instance = (layout.statuses_prefix, layout.placements_prefix, layout.events_prefix)
        self._dirty_drains = False
        self._wishes = Groups(
            layout,
            kept=(layout.host_wishes_prefix.encode(), layout.images_prefix.encode()),
            on_apart=self.changed.set,
        )
        of_wishes = Informer(
            store=store,
            clock=clock,
            history=history,
            prefix=layout.wishes_prefix,
            table=self._wishes,
            on_change=self._note_wishes,
            rand=rand,
            page=PAGE,
        )
        self._all: list[Informer[InstanceId] | Informer[bytes]] = [of_wishes]
        self._facts: list[Flat] = []
        facts, locks = f"{layout.facts}/", layout.locks_prefix()
        for prefix in (facts, *((locks,) if locks is not None and not locks.startswith(facts) else ())):
            table = Flat(WHOLE)
            self._facts.append(table)
            self._all.append(
                Informer(
                    store=store,
                    clock=clock,
                    history=history,
                    prefix=prefix,
                    table=table,
                    on_change=self._note_facts,
                    rand=rand,
                    page=PAGE,
                )
            )

    async def run(self) -> None:
        """Follow the keys, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for informer in self._all:
                start_part(tasks, informer.run)

    async def wait_synced(self) -> None:
        """Return once everything was read: of an empty cluster nothing ever changes."""
        for informer in self._all:
            await informer.synced.wait()

    @property
    def in_step(self) -> bool:
        """Whether everything is in step with etcd, and of one history."""
        return all(informer.in_step and informer.era == self._history.era for informer in self._all)

    @property
    def problem(self) -> str:
        """What keeps it from being in step, for people; empty while it is in step."""
        if self.in_step:
            return ""
        # Of several prefixes that cannot be read, the first tells why.
        told = (informer.problem for informer in self._all)
        return next(filter(None, told), "etcd has another history than before: its keys are being read anew")

    def events_of(self, instance: InstanceId) -> tuple[events.Event, ...]:
        """Its last events, the newest last."""
        entry = self._fact(self._layout.events_key(instance))
        return () if entry is None else events.from_json(entry.value)

    def events_revision(self, instance: InstanceId) -> int:
        """`mod_revision` of the key of its events; 0 without one."""
        entry = self._fact(self._layout.events_key(instance))
        return 0 if entry is None else entry.mod_revision

    def histories(self, most: int) -> dict[InstanceId, tuple[events.Event, ...]]:
        """The last events of those instances, at most so many, to which something happened last."""
        prefix = self._layout.events_prefix.encode()
        found = (item for item in self._facts[0].entries.items() if item[0].startswith(prefix))
        newest = heapq.nlargest(most, found, key=lambda item: item[1].mod_revision)
        ids = ((parse_id(key[len(prefix) :].decode(errors="replace")), entry) for key, entry in newest)
        return {name: events.from_json(entry.value) for name, entry in ids if name is not None}

    async def look(self) -> Differing:
        """Bring `cluster` up to date; return what has changed."""
        self.changed.clear()
        dirty, self._dirty = self._dirty, set()
        hosts, self._dirty_hosts = self._dirty_hosts, False
        progress = self._progress() if self._dirty_drains else self.cluster.progress
        self._dirty_drains = False
        wishes = host_wishes(self._layout, self._apart(self._layout.host_wishes_prefix))
        drains = progress != self.cluster.progress or wishes != self.cluster.host_wishes
        instances = dict(self.cluster.instances)
        sessions = self._sessions() if hosts else self.cluster.sessions
        grown = False
        for number, name in enumerate(dirty):
            one = self._put_together(name)
            grown = grown or (one is not None and name not in instances)
            if one is None:
                instances.pop(name, None)
            else:
                instances[name] = one
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)  # what differs anew meanwhile is for the next look
        differing = Differing(frozenset(dirty), hosts, drains, self._history.era != self._era)
        if grown:
            instances = {name: instances[name] for name in sorted(instances, key=natural)}
        self.cluster = replace(
            self.cluster, instances=instances, sessions=sessions, host_wishes=wishes, progress=progress
        )
        self.revision = max(informer.revision for informer in self._all)
        self._era = self._history.era
        return differing

    def _put_together(self, name: InstanceId) -> Instance | None:
        """One instance as its keys are now; None when it has neither wish nor lock nor a status that can be read."""
        layout, keys = self._layout, self._wishes.keys_of(name)
        lock = self._wishes.lock_of(name) or self._fact(layout.lock_key(name))
        said = self._fact(layout.status_key(name))
        status = None if said is None else Status.from_json(said.value)
        if not keys and lock is None and status is None:
            return None
        placed = Placed.of(self._fact(layout.placement_key(name)))
        return Instance(
            id=name,
            keys=keys,
            wish=parse_wish(name, keys, placed),
            status=status,
            status_revision=0 if said is None else said.mod_revision,
            lock=None if lock is None else _lock_fact(layout.lock_key(name), lock),
        )

    def _sessions(self) -> dict[str, HostSession | None]:
        prefix = self._layout.hosts_prefix.encode()
        return {
            key[len(prefix) :].decode("utf-8", "backslashreplace"): HostSession.from_json(entry.value)
            for key, entry in sorted(self._facts[0].entries.items())
            if key.startswith(prefix)
        }

    def images(self) -> tuple[KeyValue, ...]:
        """The entries of the image library, as of now."""
        return tuple(sorted(self._apart(self._layout.images_prefix)))

    def _apart(self, prefix: str) -> Iterator[KeyValue]:
        for key, raw in self._wishes.apart(prefix.encode()).items():
            yield KeyValue(key, raw.value, raw.mod_revision, 0, 0)

    def _progress(self) -> dict[str, HostProgress]:
        prefix = self._layout.drains_prefix.encode()
        found = {
            key[len(prefix) :].decode("utf-8", "replace"): HostProgress.from_json(entry.value)
            for key, entry in self._facts[0].entries.items()
            if key.startswith(prefix)
        }
        return {host: said for host, said in found.items() if said is not None}

    def _fact(self, key: str) -> Entry | None:
        found = (table.get(key.encode()) for table in self._facts)
        return next((entry for entry in found if entry is not None), None)

    def _note_wishes(self, changed: Set[InstanceId], revision: int) -> None:
        self._dirty |= changed
        self.changed.set()

    def _note_facts(self, changed: Set[bytes], revision: int) -> None:
        for raw in changed:
            key = raw.decode(errors="replace")
            if key.startswith(self._layout.hosts_prefix):
                self._dirty_hosts = True
            elif key.startswith(self._layout.drains_prefix):
                self._dirty_drains = True
            elif (name := self._about(key)) is not None:
                self._dirty.add(name)
        self.changed.set()

    def _about(self, key: str) -> InstanceId | None:
        """The instance that a fact is about; None for one that nothing is shown of."""
        for prefix in self._by_instance:
            if key.startswith(prefix):
                return parse_id(key.removeprefix(prefix))
        return self._layout.id_of_lock(key)


def _lock_fact(key: str, entry: Entry) -> LockFact:
    kv = KeyValue(key.encode(), entry.value, entry.mod_revision, entry.create_revision, entry.lease)
    return LockFact(kv, Lock.from_json(entry.value))
