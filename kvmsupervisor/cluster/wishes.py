"""What supervisors read of all instances: wishes, locks and placements, in step with etcd."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Set

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.aio import start_part
from kvmsupervisor.cluster.informer import Following, Informer, Proof
from kvmsupervisor.cluster.locks import Locks
from kvmsupervisor.domain.grouping import Entry, Flat, Groups
from kvmsupervisor.domain.host_wish import IN_SERVICE, HostWish
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout, parse_id
from kvmsupervisor.domain.placement import NOT_PLACED, Placed
from kvmsupervisor.domain.spec import RawValue


class Wishes:
    """Every instance's wish keys, lock and placement, and what people want of whole hosts, in step with etcd.

    A placement is a fact, but it says where an instance runs, as `host` does: so placements are read before anything is
    decided. Where `LOCK` puts the locks outside the wishes' prefix, only those that concern this host are followed
    (`Locks`).

    Args:
        store: etcd.
        clock: the machine's.
        layout: of the keys.
        history: see `Informer`.
        me: this host.
        concerns: see `Locks`.
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
        me: HostName,
        concerns: Callable[[InstanceId], bool],
        on_change: Callable[[Set[InstanceId], int], None],
        on_anew: Callable[[], None],
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.era = history.era
        self._on_change = on_change
        self._on_anew = on_anew
        self._keys = Groups(layout)
        self._of_keys = Informer(
            store=store,
            clock=clock,
            history=history,
            prefix=layout.wishes_prefix,
            table=self._keys,
            on_change=self._changed,
            rand=rand,
        )
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
        self._host_keys = Flat()
        self._of_hosts = Informer(
            store=store,
            clock=clock,
            history=history,
            prefix=layout.host_wishes_prefix,
            table=self._host_keys,
            on_change=lambda keys, revision: self._changed(frozenset(), revision),
            rand=rand,
        )
        self._locks: Locks | None = None
        if layout.locks_prefix() is not None:
            self._locks = Locks(
                store=store,
                clock=clock,
                history=history,
                layout=layout,
                me=me,
                concerns=concerns,
                on_change=self._changed,
                first=(self._of_keys.synced, self._of_placements.synced),
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
    def _all(self) -> tuple[Following, ...]:
        locks = () if self._locks is None else (self._locks,)
        return (self._of_keys, *locks, self._of_placements, self._of_hosts)

    @property
    def locks_apart(self) -> bool:
        """Whether the locks lie outside the wishes' prefix, so that most are not known here."""
        return self._locks is not None

    def heed(self, changed: Iterable[InstanceId]) -> None:
        """What makes locks concern this host has changed for these instances; see `Locks.heed`."""
        if self._locks is not None:
            self._locks.heed(changed)

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
        return self._of_keys.revision

    @property
    def locks_revision(self) -> int:
        """The etcd revision up to which locks are known, as far as they are followed."""
        return self._of_keys.revision if self._locks is None else self._locks.revision

    def lock_known_at(self, instance: InstanceId) -> int | None:
        """The etcd revision of which `lock_of` tells; None when that lock is not known (yet)."""
        return self._of_keys.revision if self._locks is None else self._locks.known_at(instance)

    @property
    def placements_revision(self) -> int:
        """The etcd revision up to which all placements are known."""
        return self._of_placements.revision

    def ids(self) -> Set[InstanceId]:
        """Every instance that has a wish key, or a lock that is followed (`keys_of` may be empty)."""
        return self._keys.ids() if self._locks is None else self._keys.ids() | self._locks.ids()

    def naming(self, host: bytes) -> Set[InstanceId]:
        """The instances whose `host` is this name, or whose lock or placement contains it, maybe in a longer name."""
        found = self._keys.naming(host)
        placed = self._ids_of_placements(key for key, entry in self._placements.entries.items() if host in entry.value)
        return found | placed if self._locks is None else found | placed | self._locks.naming(host)

    def having(self, key: bytes) -> Set[InstanceId]:
        """The instances that have a wish key of that name."""
        return self._keys.having(key)

    def placed(self, instance: InstanceId) -> Placed:
        """The placement of one instance (law 10). Cheap for the many instances that have none."""
        entries = self._placements.entries
        return Placed.of(entries.get(self._layout.placement_key(instance).encode())) if entries else NOT_PLACED

    def placements(self) -> Set[InstanceId]:
        """Every instance that has a placement."""
        return self._ids_of_placements(self._placements.entries)

    def host_wish(self, host: str) -> HostWish:
        """What people want of a whole host. Cheap where they want nothing of any."""
        entries = self._host_keys.entries
        if not entries:
            return IN_SERVICE
        drain, back = (
            entries.get(key.encode()) for key in (self._layout.drain_key(host), self._layout.return_key(host))
        )
        return HostWish.of(drain, back)

    def runs_on(self, instance: InstanceId) -> str | None:
        """Where an instance is to run, by `host` or its placement. Cheap: nothing else of it is parsed."""
        host, placement = self.keys_of(instance).get(b"host"), self.placed(instance).placement
        if host is None:
            return None
        if placement is not None and placement.stands(host.mod_revision):
            return placement.host
        return host.value.decode(errors="replace").strip()

    def _ids_of_placements(self, keys: Iterable[bytes]) -> Set[InstanceId]:
        length = len(self._layout.placements_prefix.encode())
        found = (parse_id(key[length:].decode(errors="replace")) for key in keys)
        return {instance for instance in found if instance is not None}

    def keys_of(self, instance: InstanceId) -> Mapping[bytes, RawValue]:
        """The wish keys of one instance, by the part behind `/kvm/<id>/`. A later change makes a new mapping."""
        return self._keys.keys_of(instance)

    def lock_of(self, instance: InstanceId) -> Entry | None:
        """The lock of one instance; None when it is absent, or not followed."""
        return (self._keys if self._locks is None else self._locks).lock_of(instance)

    def foreign(self) -> Mapping[bytes, str]:
        """Keys below the wishes' prefix that belong to no instance, with the reason."""
        return self._keys.foreign()
