"""A host that empties itself: while `/kvm/.hosts/<host>/drain` is there, it finds each of its instances another place.

Wishes are people's: `host` stays as they wrote it, and a placement says where an instance runs instead (law 10). How it
gets there is the instance's own loop's, as for any other move. What goes next is decided in `domain.evacuation`; all
that is remembered between two looks may be lost, but for what is in etcd: a supervisor that has just come goes on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import replace

import structlog

from kvmsupervisor.adapters.etcd import Compare, EtcdError, Target
from kvmsupervisor.cluster.hosts import Neighbours
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.admission import OVERHEAD_MIB, need_mib
from kvmsupervisor.domain.evacuation import Leaver, Plan, Room, Setback, named_hosts, plan, why_it_stays, why_kept
from kvmsupervisor.domain.host_wish import HostProgress, HostWish
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import DRAIN
from kvmsupervisor.domain.single import is_single
from kvmsupervisor.domain.spec import Power, Wish
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.instance.context import HostsLife, InstanceContext
from kvmsupervisor.instance.worker import Worker
from kvmsupervisor.supervisor.homecoming import Homecoming
from kvmsupervisor.supervisor.placing import Placing, with_moving
from kvmsupervisor.supervisor.promised import Promises

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 1.0
"""How often a host that drains looks how far its machines have come. Arbitrary: a move takes seconds."""

RETRY_S = 5.0
"""Pause after etcd did not do it."""

PATIENCE_S = 120.0
"""How long a machine may be placed elsewhere without being on its way, before another target is tried: the target may
have to copy its media, and others may be in front of it."""

WANTED = frozenset({Phase.WAITING, Phase.BACKOFF, Phase.STARTING})
"""Phases of an instance that is to run and does not."""


class Evacuation:
    """The drain of one host, and the return of what stands elsewhere for it.

    Args:
        context: what all instances of this host share.
        wishes: those of all hosts.
        neighbours: the sessions of all hosts.
        instances: those of this host; a live mapping.
        life: what the instances of this host are told.
        any_host: `KVM_DRAIN_ANY`.
        most: `KVM_MIGRATION_PARALLEL`.
        by_itself: whether what stands elsewhere comes back unasked (`KVM_RETURN`).
        notify_all: has every instance look again.
    """

    def __init__(
        self,
        context: InstanceContext,
        *,
        wishes: Wishes,
        neighbours: Neighbours,
        instances: Mapping[InstanceId, Worker],
        life: HostsLife,
        any_host: bool,
        most: int,
        by_itself: bool,
        notify_all: Callable[[], None],
    ) -> None:
        self._context = context
        self._wishes = wishes
        self._neighbours = neighbours
        self._instances = instances
        self._life = life
        self._any_host = any_host
        self._most = most
        self._notify_all = notify_all
        self._changed = asyncio.Event()
        self._placing = Placing(context, neighbours)
        self._promises = Promises(wishes)
        self._homecoming = Homecoming(
            context, wishes=wishes, neighbours=neighbours, placing=self._placing, most=most, by_itself=by_itself
        )
        self._era: int | None = None
        self._ordered = 0
        self._is_idle = False
        self._setbacks: dict[InstanceId, dict[str, Setback]] = {}
        # Since when a machine is placed on a host and not on its way to it, as far as it was looked at.
        self._idle_since: dict[tuple[InstanceId, str], float] = {}
        # Since when one has left that its target has not taken.
        self._left_since: dict[InstanceId, float] = {}

    # --- what it is told --------------------------------------------------------------------------------------

    def heed(self) -> None:
        """What people want of hosts may have changed. Before instances are told of anything else."""
        wish = self._wishes.host_wish(self._context.me)
        why = None
        if wish.drain is not None:
            why = f"{wish.title}: nothing is started here until that ends (`kvmsupervisor undrain {self._context.me}`)"
        if why != self._life.why_closed:
            self._life.why_closed = why
            self._life.evictions = {}
            self._life.remarks = {}
            log.info("host.closed" if why is not None else "host.open", drain=wish.drain)
        self._notify_all()
        self._changed.set()

    def look(self) -> None:
        """Hosts have changed: look again soon."""
        self._changed.set()

    def heard(self, changed: Set[InstanceId]) -> None:
        """Keys, locks or placements of these instances have changed. Cheap: asked for every key."""
        if not self._is_idle or any(self._wishes.placed(name).revision for name in changed):
            self._changed.set()

    @property
    def progress(self) -> HostProgress | None:
        """How far the drain of this host has come, as it was told last; None in service."""
        said = self._placing.said
        return said if said is not None and said.mode is not None else None

    # --- the loop ---------------------------------------------------------------------------------------------

    async def run(self, *first: Callable[[], Awaitable[object]]) -> None:
        """See to drains and returns, for ever; once all is known. Costs nothing while nobody wants any."""
        for ready in first:
            await ready()
        clock = self._context.clock
        while True:
            self._changed.clear()
            try:
                again_at = await self._look()
            except EtcdError as error:
                log.warning("drain.waits", reason=str(error))
                again_at = clock.now() + RETRY_S
                # It may have been written all the same: what this host has said is read again.
                self._era = None
            await clock.wait(self._changed, None if again_at == math.inf else again_at)
            if not self._is_idle:
                # Not at each of many changes.
                await clock.sleep(LOOK_EVERY_S / 4)

    async def _look(self) -> float:
        """See to all that is to be done now; return when to look again without news."""
        context, wish = self._context, self._wishes.host_wish(self._context.me)
        is_wanted = wish.drain is not None or self._placing.said is not None or self._homecoming.is_wanted(wish)
        if self._era is not None and not is_wanted:
            self._is_idle = True
            return math.inf
        self._is_idle = False
        if self._wishes.era != context.era().count or not context.session.held:
            return context.clock.now() + LOOK_EVERY_S
        if self._era != self._wishes.era:
            await self._placing.recall()
            self._era = self._wishes.era
        if wish.drain_revision != self._ordered:
            # People who give the order again have changed something.
            self._ordered, self._setbacks = wish.drain_revision, {}
        on_their_way = await self._withdraw_failed()
        arriving = await self._arriving()
        if wish.drain is not None:
            return await self._drain(wish, arriving)
        if on_their_way or arriving:
            # The drain is over, and what it has begun ends as it would.
            return context.clock.now() + LOOK_EVERY_S
        return await self._homecoming.look(wish)

    # --- the drain --------------------------------------------------------------------------------------------

    async def _drain(self, wish: HostWish, arriving: Mapping[str, str]) -> float:
        context, now = self._context, self._context.clock.now()
        rooms = self._rooms()
        told = self._progress(wish, arriving)
        leavers = self._leavers(wish, rooms)
        if not context.era().has("", wish.drain_revision):
            # Law 11: an order that came with another history waits for a person.
            notice = "etcd has another history since this drain was ordered: nothing goes until it is ordered again"
            await self._tell(wish, told, Plan(), notice=notice)
            return now + RETRY_S
        # While it stops all its guests, each ends where it is.
        found = Plan() if context.draining() else self._plan(leavers, rooms, wish, told)
        told = await self._tell(wish, told, found)
        if found.go:
            others = await self._placing.others()
            rooms = self._rooms(others.coming)
            found = self._plan(leavers, rooms, wish, told)
            for go in found.go:
                still = [Compare(context.layout.drain_key(context.me), Target.MOD_REVISION, wish.drain_revision)]
                worker = self._instances.get(go.id)
                if worker is None or worker.wish is None:
                    break
                told = with_moving(told, go.id, go.host)
                if not await self._placing.place(
                    worker.wish,
                    HostName(go.host),
                    why=DRAIN,
                    only_live=go.live,
                    told=told,
                    still=[*still, *others.unchanged],
                ):
                    break
        is_busy = bool(told.moving or found.waits or found.go)
        if told.drained is not None and not is_busy:
            return math.inf
        return min(found.again_at, now + (LOOK_EVERY_S if is_busy else RETRY_S))

    def _plan(self, leavers: list[Leaver], rooms: Mapping[str, Room], wish: HostWish, told: HostProgress) -> Plan:
        assert wish.drain is not None
        return plan(
            leavers,
            rooms,
            mode=wish.drain,
            any_host=self._any_host,
            leaving=len(told.moving),
            most=self._most,
            now=self._context.clock.now(),
        )

    def _progress(self, wish: HostWish, arriving: Mapping[str, str]) -> HostProgress:
        """What is seen of the drain now; what was said before of the same one is gone on with."""
        context, said = self._context, self._placing.said
        before = said if said is not None and said.mode is not None and said.of == wish.drain_revision else None
        left: list[str] = []
        moving = {**arriving}
        for name, worker in sorted(self._instances.items()):
            if worker.pid is None or worker.wish is None or self._is_coming(name):
                continue
            left.append(name)
            if worker.wish.is_elsewhere(context.me) and worker.report.status.awaited_host is None:
                moving[name] = str(worker.wish.runs_on)
        moved = {} if before is None else dict(before.moved)
        for gone, host in ({} if before is None else before.moving).items():
            if gone not in left and gone not in moving and self._wishes.runs_on(InstanceId(gone)) == host:
                moved[gone] = host
        # With the last one arrived: until then nobody can say where it is.
        is_empty = not moving and all(worker.pid is None for worker in self._instances.values())
        drained = None if before is None else before.drained
        return HostProgress(
            host=context.me,
            mode=wish.drain,
            of=wish.drain_revision,
            since=context.clock.wall() if before is None else before.since,
            left=tuple(left),
            moving=moving,
            moved=moved,
            refused={} if before is None else before.refused,
            drained=(drained or context.clock.wall()) if is_empty else None,
            notice=wish.odd,
        )

    def _is_coming(self, name: InstanceId) -> bool:
        """Whether what lives here of it is a QEMU that waits for another host's guest."""
        lock = self._lock_of(name)
        return lock is not None and lock.host != self._context.me

    def _lock_of(self, name: InstanceId) -> Lock | None:
        entry = self._wishes.lock_of(name)
        return None if entry is None else Lock.from_json(entry.value)

    async def _tell(self, wish: HostWish, told: HostProgress, found: Plan, *, notice: str = "") -> HostProgress:
        """Say how far it has come: in etcd, and to each instance that is still here."""
        refused: dict[str, str] = {str(name): why for name, why in found.refused.items() if name in told.left}
        for name in told.left:
            worker = self._instances.get(InstanceId(name))
            if name not in told.moving and worker is not None and worker.report.status.awaited_host is not None:
                # Somebody wants it on a host that is not there.
                refused[name] = f"it is to run on {worker.report.status.awaited_host}, which takes nobody in just now"
        told = replace(told, refused=refused, later=tuple(sorted(found.later)), notice=notice or told.notice)
        remarks = {InstanceId(name): f"{wish.title}, and it stays: {why}" for name, why in refused.items()}
        remarks |= {
            name: f"{wish.title}: it goes to {host} once others have gone"
            for name, host in found.waits.items()
            if name in told.left
        }
        life = self._life
        if wish.drain is not None and life.why_closed is not None:
            evicted = {name: f"{wish.title}, and nobody takes it in: {found.refused[name]}" for name in found.evicted}
            # One that was asked to shut down is not left halfway.
            evictions = {**evicted, **{name: why for name, why in life.evictions.items() if name in self._instances}}
            differ = {*_differing(life.remarks, remarks), *_differing(life.evictions, evictions)}
            life.remarks, life.evictions = remarks, evictions
            for name in differ & self._instances.keys():
                self._instances[name].notify()
        before = self._placing.said
        await self._placing.say(told)
        if told.drained is not None and (before is None or before.drained is None):
            log.info("host.drained", moved=len(told.moved))
        return told

    # --- what is seen -----------------------------------------------------------------------------------------

    def _rooms(self, coming: Mapping[str, int] | None = None) -> dict[str, Room]:
        """The other hosts that have a session."""
        mine: dict[str, int] = {}
        said = self._placing.said
        for host in ({} if said is None else said.moving).values():
            mine[host] = mine.get(host, 0) + 1
        promised = self._promises.by_host()
        rooms: dict[str, Room] = {}
        for name in self._neighbours.names():
            host = HostName(name)
            if host == self._context.me or is_single(host):
                continue
            session = self._neighbours.session_of(host)
            has_mib = 0 if session is None else session.guests_mib
            rooms[host] = Room(
                drains=session is None or self._context.host_drains(host),
                free_mib=has_mib - promised.get(host, 0) if has_mib else math.inf,
                coming=mine.get(host, 0) + (0 if coming is None else coming.get(host, 0)),
            )
        return rooms

    def _leavers(self, wish: HostWish, rooms: Mapping[str, Room]) -> list[Leaver]:
        """The instances that are to go and have no other place yet: those that run, and those that would be started."""
        found = []
        for name, worker in self._instances.items():
            its = worker.wish
            if its is None or its.keys == 0 or its.runs_on != self._context.me or self._is_coming(name):
                continue
            status, runs = worker.report.status, worker.pid is not None
            if not runs and (status.phase not in WANTED or its.power is not Power.ON or its.problems):
                continue
            found.append(self._leaver(name, worker, its, wish, rooms, runs=runs))
        self._setbacks = {name: known for name, known in self._setbacks.items() if name in self._instances}
        return found

    def _leaver(
        self, name: InstanceId, worker: Worker, its: Wish, wish: HostWish, rooms: Mapping[str, Room], *, runs: bool
    ) -> Leaver:
        named, home = named_hosts(its, self._context.me)
        running = worker.moves.running
        machine = running or its.spec
        not_live = {host: why for host in rooms if (why := worker.moves.why_cold(host)) is not None} if runs else {}
        held = worker.report.status.held
        return Leaver(
            id=name,
            named=named,
            home=home,
            priority=its.priority,
            need_mib=OVERHEAD_MIB if machine is None else need_mib(machine),
            runs=runs,
            stays=why_it_stays(its, running),
            kept=why_kept(its, me=self._context.me, drain_revision=wish.drain_revision, held=held),
            not_live=not_live,
            setbacks=self._setbacks.get(name, {}),
        )

    async def _arriving(self) -> Mapping[str, str]:
        """Those that have left here and that their target has not taken yet, each with the target.

        Nobody else looks after them: where the target is gone before it has taken the lock, another one is sought.
        """
        context, now, said = self._context, self._context.clock.now(), self._placing.said
        found = {}
        for text, target in ({} if said is None or said.mode is None else said.moving).items():
            name = InstanceId(text)
            worker = self._instances.get(name)
            if (worker is not None and worker.pid is not None) or self._wishes.runs_on(name) != target:
                continue
            wish = parse_wish(name, self._wishes.keys_of(name), self._wishes.placed(name))
            since = self._left_since.setdefault(name, now)
            is_taken = (await context.store.get(context.layout.lock_key(name))) is not None
            if is_taken or wish.power is not Power.ON or now - since > PATIENCE_S:
                # It runs there, or that host says why it does not.
                self._left_since.pop(name)
                continue
            if context.host_has_session(HostName(target)) is False and wish.placement is not None:
                why = "it has no session any more, and had not taken it yet"
                if await self._placing.withdraw(wish, context.me, why=DRAIN, reason=why):
                    self._left_since.pop(name)
                    continue
            found[text] = target
        return found

    # --- targets that do not get it -----------------------------------------------------------------------------

    async def _withdraw_failed(self) -> bool:
        """Have those stay that a drain has placed elsewhere and that did not get there: others may take them in.

        Returns:
            Whether some are still on their way.
        """
        context, now = self._context, self._context.clock.now()
        idle, on_their_way = {}, False
        for name, worker in list(self._instances.items()):
            wish = worker.wish
            if wish is None or wish.placement is None or not wish.is_elsewhere(context.me) or worker.pid is None:
                continue
            if wish.placement.why != DRAIN or self._is_coming(name) or worker.report.status.held:
                continue
            on_their_way, target = True, str(wish.runs_on)
            lock, phase = self._lock_of(name), worker.report.status.phase
            if lock is None or lock.to is not None or phase is Phase.STOPPING:
                continue
            since = idle[name, target] = self._idle_since.get((name, target), now)
            why = self._why_failed(worker, target, waited_s=now - since)
            if why is None:
                continue
            if await self._placing.withdraw(wish, context.me, why=DRAIN, reason=why):
                idle.pop((name, target))
                known = self._setbacks.setdefault(name, {})
                known[target] = Setback.after(known.get(target), why, now)
        self._idle_since = idle
        return on_their_way

    def _why_failed(self, worker: Worker, target: str, *, waited_s: float) -> str | None:
        if self._context.host_has_session(HostName(target)) is False:
            return "it has no session any more"
        if self._context.host_drains(HostName(target)):
            return "it drains, or stops all its guests"
        if (setback := worker.moves.setback(target)) is not None:
            return setback
        if waited_s > PATIENCE_S:
            return f"it did not come to that within {PATIENCE_S:g} s ({worker.report.status.reason})"
        return None


def _differing(before: Mapping[InstanceId, str], now: Mapping[InstanceId, str]) -> set[InstanceId]:
    return {name for name in {*before, *now} if before.get(name) != now.get(name)}
