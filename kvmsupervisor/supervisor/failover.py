"""Failover, where the key `hosts` asks for it: the first live candidate with room takes an orphan's lock.

Wishes are people's: `host` stays as they wrote it, and a placement beside it says where it runs instead (law 10).

Nothing is done, and nothing asked, while every host has its session. What is decided is in `domain.failover`; fencing,
and the start, follow as for any takeover (law 4), by the instance's own loop, which finds the lock to be this host's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Set
from typing import Protocol
from uuid import uuid4

import structlog

from kvmsupervisor.adapters.etcd import Compare, Delete, EtcdError, Put, Target
from kvmsupervisor.cluster.fencing import NotFenced
from kvmsupervisor.cluster.lock import compares
from kvmsupervisor.domain.argv import host_problems
from kvmsupervisor.domain.failover import STEP_S, place
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Change, Lock, Storage, take
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import FAILOVER, Placed, Placement
from kvmsupervisor.domain.spec import RawValue, Spec, Wish
from kvmsupervisor.domain.storage import images_of, storage_of
from kvmsupervisor.failpoints import point
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.start import need_mib
from kvmsupervisor.instance.takeover_wait import ASK_WATCHERS_EVERY_S

log = structlog.get_logger(__name__)


class LockEntry(Protocol):
    """A lock's value as etcd holds it, and the revision that wrote it."""

    @property
    def value(self) -> bytes:
        """The value."""
        ...

    @property
    def mod_revision(self) -> int:
        """The revision."""
        ...


class AllWishes(Protocol):
    """The keys and locks of all instances, as `informer.Wishes` has them."""

    def ids(self) -> Set[InstanceId]:
        """Every instance."""
        ...

    def keys_of(self, instance: InstanceId) -> Mapping[bytes, RawValue]:
        """The keys of one."""
        ...

    def lock_of(self, instance: InstanceId) -> LockEntry | None:
        """The lock of one."""
        ...

    def placed(self, instance: InstanceId) -> Placed:
        """The placement of one."""
        ...


@frozen(kw_only=True)
class _Orphan:
    """An instance that this host may take."""

    id: InstanceId
    wish: Wish
    spec: Spec
    lock: Lock
    lock_revision: int
    hosts_revision: int
    place: int


class Failover:
    """The orphans of one host's cluster for which it is a candidate.

    Args:
        context: what all instances of this host share.
        wishes: those of all hosts.
    """

    def __init__(self, context: InstanceContext, wishes: AllWishes) -> None:
        self._context = context
        self._wishes = wishes
        self._changed = asyncio.Event()
        # When each was first seen to be an orphan, by the incarnation whose lock it is.
        self._since: dict[tuple[InstanceId, str], float] = {}

    def look(self) -> None:
        """Sessions, keys or locks have changed: look again soon."""
        self._changed.set()

    async def run(self, *first: Callable[[], Awaitable[object]]) -> None:
        """Take what is to be taken, for ever; once all is known, for what was not read yet looks like an orphan's."""
        for ready in first:
            await ready()
        clock = self._context.clock
        while True:
            self._changed.clear()
            orphans = list(self._orphans())
            known = {(orphan.id, orphan.lock.incarnation) for orphan in orphans}
            self._since = {key: since for key, since in self._since.items() if key in known}
            for orphan in orphans:
                try:
                    await self._consider(orphan)
                except (NotFenced, EtcdError) as error:
                    log.warning("failover.waits", instance=orphan.id, reason=str(error))
            await clock.wait(self._changed, clock.now() + ASK_WATCHERS_EVERY_S if orphans else None)

    def _orphans(self) -> list[_Orphan]:
        me, facts, found = self._context.me, self._context.layout.facts, []
        mark = me.encode()
        for name in self._wishes.ids():
            keys = self._wishes.keys_of(name)
            hosts, home = keys.get(b"hosts"), keys.get(b"host")
            entry, placed = self._wishes.lock_of(name), self._wishes.placed(name)
            # Cheap for the many that this host is no candidate for.
            if hosts is None or home is None or entry is None:
                continue
            if mark not in hosts.value and not (placed.revision and mark in home.value):
                continue
            wish, lock = parse_wish(name, keys, placed), Lock.from_json(entry.value)
            rank = place(wish, lock, me=me, facts=facts, has_session=self._context.host_has_session)
            if rank is None:
                continue
            assert lock is not None
            assert wish.spec is not None
            found.append(
                _Orphan(
                    id=name,
                    wish=wish,
                    spec=wish.spec,
                    lock=lock,
                    lock_revision=entry.mod_revision,
                    hosts_revision=hosts.mod_revision,
                    place=rank,
                )
            )
        return sorted(found, key=lambda orphan: orphan.id)

    async def _consider(self, orphan: _Orphan) -> None:
        """Take it, if it is time, this host has room and may run it, and its disks are not in use, or for too long.

        Raises:
            NotFenced: storage does not tell whether they are in use.
            EtcdError: it was not written, or nobody knows.
        """
        context = self._context
        now = context.clock.now()
        since = self._since.setdefault((orphan.id, orphan.lock.incarnation), now) + orphan.place * STEP_S
        if now < since or context.draining() or not context.session.held:
            return
        if context.era().keeps_waiting(storage_of(orphan.spec), now):
            # Another host may run it, and has not said so in the history that etcd has now.
            return
        has_room = context.admission.has_room(orphan.id, need_mib(orphan.spec))
        if not has_room or host_problems(orphan.spec, context.host_side):
            return
        if orphan.lock.storage is Storage.RBD:
            watchers = await context.fencing.watchers(images_of(orphan.spec))
            if watchers and now < since + context.takeover_wait_s:
                return
        await self._take(orphan)

    async def _take(self, orphan: _Orphan) -> None:
        """The takeover's transaction (law 4), with the placement in it: nobody can have the one and not the other.

        Where the instance comes home by it, what goes with the lock is the placement's end.
        """
        context, layout = self._context, self._context.layout
        lock = take(
            orphan.lock,
            host=context.me,
            boot_id=context.boot_id,
            facts=layout.facts,
            incarnation=str(uuid4()),
            storage=storage_of(orphan.spec),
            epoch_floor=context.era().epoch_floor,
        )
        wish = orphan.wish
        placement_key = layout.placement_key(orphan.id)
        placed = Placement(host=context.me, why=FAILOVER, since=context.clock.wall(), of=wish.host_revision)
        compared = compares(
            Change.TAKE_OVER,
            layout=layout,
            instance=orphan.id,
            revision=orphan.lock_revision,
            session=context.session.compare(),
            ground=wish.ground,
            holder=orphan.lock.host,
        )
        result = await context.store.txn(
            [
                *compared,
                # Where it is to run, there is nobody to run it; and this host is still among the candidates.
                Compare(layout.session_key(HostName(wish.runs_on or "")), Target.MOD_REVISION, 0),
                Compare(layout.wish_key(orphan.id, "hosts"), Target.MOD_REVISION, orphan.hosts_revision),
            ],
            [
                Put(layout.lock_key(orphan.id), lock.to_json()),
                Delete(placement_key) if wish.host == context.me else Put(placement_key, placed.to_json()),
            ],
        )
        await point("placed and taken over")
        if result.succeeded:
            context.metrics.took_over()
            log.warning(
                "failover.taken",
                instance=orphan.id,
                epoch=lock.epoch,
                previous=orphan.lock.host,
                in_place_of=wish.host if wish.host != context.me else None,
            )
