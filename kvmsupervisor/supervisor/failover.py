"""Failover, where the key `hosts` asks for it: the first live candidate with room takes an orphan's lock.

Wishes are people's: `host` stays as they wrote it, and a placement beside it says where it runs instead (law 10).

Nothing is done, and nothing asked, while every host has its session. What is decided is in `domain.failover`; fencing,
and the start, follow as for any takeover (law 4), by the instance's own loop, which finds the lock to be this host's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from typing import Protocol
from uuid import uuid4

import structlog

from kvmsupervisor.adapters.etcd import Compare, Delete, EtcdError, Op, Put, Target
from kvmsupervisor.cluster.fencing import NotFenced
from kvmsupervisor.cluster.lock import compares
from kvmsupervisor.domain.admission import need_mib
from kvmsupervisor.domain.argv import host_problems
from kvmsupervisor.domain.doubt import is_doubted
from kvmsupervisor.domain.events import PLACED, from_json, joined, made, to_json, to_line
from kvmsupervisor.domain.failover import STEP_S, place
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Change, Lock, Storage, take
from kvmsupervisor.domain.names import ANY_HOST
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import FAILOVER, Placed, Placement
from kvmsupervisor.domain.spec import RawValue, Spec, Wish
from kvmsupervisor.domain.status import Status
from kvmsupervisor.domain.storage import images_of, storage_of
from kvmsupervisor.failpoints import point
from kvmsupervisor.instance.context import InstanceContext
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

    def having(self, key: bytes) -> Set[InstanceId]:
        """The instances that have a key of that name."""
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


_Key = tuple[InstanceId, str, int]
"""An orphan: the instance, the incarnation whose lock it is, the lease of this host's session."""


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
        # The instances for which this host may be a candidate, by the text of their keys; None: to be looked for among
        # all. A large cluster has thousands of others, and they are passed over at each look.
        self._near: set[InstanceId] | None = None
        # When each was first seen to be an orphan, by the incarnation whose lock it is.
        self._since: dict[_Key, float] = {}
        # When its disks were last seen in use, by the same.
        self._used: dict[_Key, float] = {}
        # Those of which was said that a person is waited for.
        self._told: set[_Key] = set()

    def look(self) -> None:
        """Sessions have changed: look again soon."""
        self._changed.set()

    def heard(self, changed: Set[InstanceId]) -> None:
        """Keys, locks or placements of these instances have changed."""
        if self._near is None:
            return
        for name in changed:
            if self.may_take(name):
                self._near.add(name)
                self._changed.set()
            else:
                self._near.discard(name)

    def heard_anew(self) -> None:
        """All keys are another history's."""
        self._near = None
        self._changed.set()

    async def run(self, *first: Callable[[], Awaitable[object]]) -> None:
        """Take what is to be taken, for ever; once all is known, for what was not read yet looks like an orphan's."""
        for ready in first:
            await ready()
        clock = self._context.clock
        while True:
            self._changed.clear()
            orphans = list(self._orphans())
            known = {self._key(orphan) for orphan in orphans}
            self._since = {key: since for key, since in self._since.items() if key in known}
            self._used = {key: at for key, at in self._used.items() if key in known}
            self._told &= known
            for orphan in orphans:
                try:
                    await self._consider(orphan)
                except (NotFenced, EtcdError) as error:
                    log.warning("failover.waits", instance=orphan.id, reason=str(error))
            await clock.wait(self._changed, clock.now() + ASK_WATCHERS_EVERY_S if orphans else None)

    def _orphans(self) -> list[_Orphan]:
        context, found = self._context, []
        me, facts, has_session = context.me, context.layout.facts, context.host_has_session
        if self._near is None:
            self._near = {name for name in self._wishes.having(b"hosts") if self.may_take(name)}
        for name in self._near:
            keys = self._wishes.keys_of(name)
            # Keys may be those of another history by now, of which nothing was told yet.
            hosts, entry, placed = keys.get(b"hosts"), self._wishes.lock_of(name), self._wishes.placed(name)
            lock = None if entry is None else Lock.from_json(entry.value)
            if hosts is None or entry is None or lock is None or has_session(lock.host) is not False:
                # Nearly all, so their keys need not be parsed.
                continue
            wish = parse_wish(name, keys, placed)
            rank = place(wish, lock, me=me, facts=facts, has_session=has_session, everyone=context.sessions())
            if rank is None:
                continue
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

    def may_take(self, name: InstanceId) -> bool:
        """Whether this host may be a candidate for it. Cheap: the name may be a part of another one's."""
        mark, keys = self._context.me.encode(), self._wishes.keys_of(name)
        hosts, home = keys.get(b"hosts"), keys.get(b"host")
        if hosts is None or home is None:
            return False
        if ANY_HOST.encode() in hosts.value:
            return True
        return mark in hosts.value or (mark in home.value and self._wishes.placed(name).revision != 0)

    async def _consider(self, orphan: _Orphan) -> None:
        """Take it, if it is time, this host has room and may run it, and its disks are not in use, or for too long.

        Raises:
            NotFenced: storage does not tell whether they are in use.
            EtcdError: it was not written, or nobody knows.
        """
        context = self._context
        now = context.clock.now()
        key, turn_s = self._key(orphan), orphan.place * STEP_S
        # While storage was asked, for another one maybe, its host may have been back, and have gone once more.
        since = max(self._since.setdefault(key, now), context.host_gone_since(orphan.lock.host))
        is_closed = context.draining() or context.life.clearing(orphan.id).closed is not None
        if now < since + turn_s or is_closed or not context.session.held:
            return
        if context.era().keeps_waiting(storage_of(orphan.spec), now):
            # Another host may run it, and has not said so in the history that etcd has now.
            return
        has_room = context.admission.has_room(orphan.id, need_mib(orphan.spec))
        if not has_room or host_problems(orphan.spec, context.host_side):
            return
        doubted = is_doubted(
            context.era(),
            orphan.lock,
            lock_revision=orphan.lock_revision,
            spec=orphan.spec,
            wish_revision=orphan.wish.revision,
        )
        if doubted or orphan.lock.storage is Storage.RBD:
            watchers = await context.fencing.watchers(images_of(orphan.spec), orphan.lock)
            if context.host_gone_since(orphan.lock.host) > now:
                return
            if watchers and doubted:
                self._tell_doubted(orphan, watchers)
                return
            if watchers and now < since + turn_s + context.takeover_wait_s:
                self._used[key] = now
                return
            if not watchers and now < self._used.get(key, since) + turn_s:
                # All candidates have waited for this moment: it is the first one's.
                return
        await self._take(orphan, doubted=doubted)

    def _key(self, orphan: _Orphan) -> _Key:
        """What is counted from. In a later session of this host anew: the holder may have been back meanwhile."""
        return orphan.id, orphan.lock.incarnation, self._context.session.lease

    def _tell_doubted(self, orphan: _Orphan, watchers: Sequence[str]) -> None:
        """Say once that a person is waited for: no status tells it where the host of the instance is gone."""
        key = self._key(orphan)
        if key in self._told:
            return
        self._told.add(key)
        reason = (
            f"etcd has another history since {orphan.lock.host} held its lock, and its disks are in use: its guest "
            f"runs and is not fenced; if it does not: `kvmsupervisor break-lock {orphan.id}`"
        )
        log.warning("failover.doubted", instance=orphan.id, watchers=list(watchers), reason=reason)

    async def _take(self, orphan: _Orphan, *, doubted: bool) -> None:
        """The takeover's transaction (law 4), with the placement in it: nobody can have the one and not the other.

        Where the instance comes home by it, what goes with the lock is the placement's end. The status goes with it,
        too: a host that dies before its first word leaves none that speaks of the former one's QEMU.
        """
        context, layout = self._context, self._context.layout
        era = context.era()
        lock = take(
            orphan.lock,
            host=context.me,
            boot_id=context.boot_id,
            facts=layout.facts,
            incarnation=str(uuid4()),
            storage=storage_of(orphan.spec),
            epoch_floor=era.epoch_floor,
            doubted=doubted,
            mark=era.mark,
            machine=context.machine,
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
        status_key = layout.status_key(orphan.id)
        events_key = layout.events_key(orphan.id)
        found, history = (await context.store.read(status_key, events_key)).kvs
        told = None if found is None else Status.from_json(found.value)
        said: list[Op] = []
        line = b""
        if told is not None:
            reason = f"{orphan.lock.host} is gone; its lock is taken over"
            taken = told.taken_over(context.me, epoch=lock.epoch, since=context.clock.wall(), reason=reason)
            event = made(PLACED, taken, at=taken.since, reason=reason)
            events = joined(() if history is None else from_json(history.value), [event])
            line = to_line(event, orphan.id)
            said += [Put(status_key, taken.to_json()), Put(events_key, to_json(events)[0])]
        result = await context.store.txn(
            [
                *compared,
                Compare(status_key, Target.MOD_REVISION, 0 if found is None else found.mod_revision),
                # Where it is to run, there is nobody to run it; and this host is still among the candidates.
                Compare(layout.session_key(HostName(wish.runs_on or "")), Target.MOD_REVISION, 0),
                Compare(layout.wish_key(orphan.id, "hosts"), Target.MOD_REVISION, orphan.hosts_revision),
            ],
            [
                Put(layout.lock_key(orphan.id), lock.to_json()),
                Delete(placement_key) if wish.host == context.me else Put(placement_key, placed.to_json()),
                *said,
            ],
        )
        await point("placed and taken over")
        if result.succeeded:
            context.metrics.took_over()
            if line:
                context.event_files.append(orphan.id, line)
            log.warning(
                "failover.taken",
                instance=orphan.id,
                epoch=lock.epoch,
                previous=orphan.lock.host,
                in_place_of=wish.host if wish.host != context.me else None,
            )
