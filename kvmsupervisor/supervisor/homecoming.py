"""A host that takes back what stands elsewhere for it: where people ask for that, or `KVM_RETURN` says so.

The host places an instance on itself (`why`: `return`), as its guest may not be stopped for that, and deletes the
placement once the guest runs here. One that does not get here stays where it is, by a placement again.
"""

from __future__ import annotations

import math
from dataclasses import replace

import structlog

from kvmsupervisor.adapters.etcd import Compare, Target
from kvmsupervisor.cluster.hosts import Neighbours
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.admission import need_mib
from kvmsupervisor.domain.evacuation import Setback, why_it_stays
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host_wish import HostProgress, HostWish
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.move_checks import SWITCHES, Guest, refusals
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import DRAIN, RETURN
from kvmsupervisor.domain.spec import Wish
from kvmsupervisor.domain.status import Status
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.supervisor.placing import Placing, with_moving

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 1.0
"""How often to look how far those have come that are on their way."""

PATIENCE_S = 120.0
"""How long one may be placed here without being on its way; see `evacuation.PATIENCE_S`."""

QUIET_S = 60.0
"""How long this host has been there before it takes anything back unasked: one that comes and goes would have guests
follow it. Arbitrary: four times as long as a session outlives its host."""


@frozen(kw_only=True)
class _Away:
    """An instance of this host that is placed elsewhere, or on its way back."""

    wish: Wish
    revision: int
    lock: Lock | None
    lock_known: bool


class Homecoming:
    """The return of one host's instances.

    Args:
        context: what all instances of this host share.
        wishes: those of all hosts.
        neighbours: the sessions of all hosts.
        placing: writes.
        most: `KVM_MIGRATION_PARALLEL`.
        by_itself: `KVM_RETURN` is auto.
    """

    def __init__(
        self,
        context: InstanceContext,
        *,
        wishes: Wishes,
        neighbours: Neighbours,
        placing: Placing,
        most: int,
        by_itself: bool,
    ) -> None:
        self._context = context
        self._wishes = wishes
        self._neighbours = neighbours
        self._placing = placing
        self._most = most
        self._by_itself = by_itself
        self._from = context.clock.now() + QUIET_S
        # What the present order to return is about, and the order's revision.
        self._owed: tuple[int, set[InstanceId]] = 0, set()
        self._setbacks: dict[InstanceId, Setback] = {}
        self._idle_since: dict[InstanceId, float] = {}

    def is_wanted(self, wish: HostWish) -> bool:
        """Whether anything may have to be done."""
        return self._by_itself or wish.return_revision > 0 or any(self._is_back(one) for one in self._away())

    def _away(self) -> list[_Away]:
        """The instances of this host that have a placement which stands, greatest priority first."""
        found = []
        mark = self._context.me.encode()
        for name in sorted(self._wishes.placements()):
            keys = self._wishes.keys_of(name)
            host = keys.get(b"host")
            if host is None or mark not in host.value:
                continue
            placed = self._wishes.placed(name)
            wish = parse_wish(name, keys, placed)
            if wish.host != self._context.me or wish.placement is None:
                continue
            entry = self._wishes.lock_of(name)
            found.append(
                _Away(
                    wish=wish,
                    revision=placed.revision,
                    lock=None if entry is None else Lock.from_json(entry.value),
                    lock_known=self._wishes.lock_known_at(name) is not None,
                )
            )
        return sorted(found, key=lambda one: -one.wish.priority)

    def _is_back(self, one: _Away) -> bool:
        """Whether its placement on its own `host` says nothing any more."""
        assert one.wish.placement is not None
        if one.wish.placement.host != self._context.me or not one.lock_known:
            return False
        return one.lock is None or (one.lock.host == self._context.me and one.lock.state is LockState.RUNNING)

    async def look(self, wish: HostWish) -> float:
        """See to what is to be done now; return when to look again without news.

        Raises:
            EtcdError: etcd did not do it.
        """
        context, now = self._context, self._context.clock.now()
        away = self._away()
        await self._tidy([one for one in away if self._is_back(one)])
        coming = [one for one in away if one.wish.runs_on == context.me and not self._is_back(one)]
        coming = [one for one in coming if not await self._stays_there(one)]
        owed = self._take_note(wish, [one for one in away if one.wish.runs_on != context.me], now)
        if context.draining():
            # It stops all its guests, and takes none in.
            owed = []
        told = self._progress(wish, coming, owed)
        refused: dict[str, str] = {}
        for one in owed:
            name = one.wish.instance
            known = self._setbacks.get(name)
            if known is not None and known.until > now:
                refused[name] = f"{known.why}; that is tried again after a pause of {known.pause_s:g} s"
                continue
            if len(told.moving) >= self._most:
                continue
            status = await self._status(name)
            why = self._why_not(one, status, cold=wish.return_cold)
            if why is not None:
                self._setbacks[name] = Setback.after(known, why, now)
                refused[name] = why
                continue
            if not await self._fetch(one, wish, status, told):
                break
            told = self._placing.said or told
        told = replace(told, refused=refused)
        await self._placing.say(told if told.left or told.moving else None)
        if told.moving:
            return now + LOOK_EVERY_S
        waits = [known.until for name, known in self._setbacks.items() if name in refused]
        if len(refused) < len(told.left):
            # Others are on their way here because of another host.
            waits.append(now + LOOK_EVERY_S)
        if self._by_itself and now < self._from:
            waits.append(self._from)
        return min(waits, default=math.inf)

    def _take_note(self, wish: HostWish, elsewhere: list[_Away], now: float) -> list[_Away]:
        """Those that are to come back. An order is about what was placed elsewhere before it was given."""
        if wish.return_revision != self._owed[0]:
            self._owed = wish.return_revision, set()
            self._setbacks = {}
        revision, names = self._owed
        if self._context.era().has("", revision):
            names |= {one.wish.instance for one in elsewhere if one.revision < revision}
        if self._by_itself and now >= self._from:
            return elsewhere
        return [one for one in elsewhere if one.wish.instance in names]

    def _progress(self, wish: HostWish, coming: list[_Away], owed: list[_Away]) -> HostProgress:
        said = self._placing.said
        before = said if said is not None and said.mode is None and said.of == wish.return_revision else None
        return HostProgress(
            host=self._context.me,
            mode=None,
            of=wish.return_revision,
            since=self._context.clock.wall() if before is None else before.since,
            left=tuple(sorted(one.wish.instance for one in (*coming, *owed))),
            moving={one.wish.instance: str(self._context.me) for one in coming},
            notice=wish.odd,
        )

    async def _status(self, name: InstanceId) -> Status | None:
        found = await self._context.store.get(self._context.layout.status_key(name))
        return None if found is None else Status.from_json(found.value)

    def _why_not(self, one: _Away, status: Status | None, *, cold: bool) -> str | None:
        """Why it cannot come back now; None when it can."""
        context, spec, holder = self._context, one.wish.spec, HostName(str(one.wish.runs_on))
        if (stays := why_it_stays(one.wish, None)) is not None:
            return stays
        assert spec is not None
        if not context.admission.has_room(one.wish.instance, need_mib(spec)):
            return f"{context.me} has not {need_mib(spec)} MiB of memory free for it"
        if context.host_has_session(holder) is not True:
            return f"{holder}, where it is placed, has no session"
        if status is None or status.pid is None or cold:
            return None
        if context.moving is None:
            return f"{context.me} takes no guest live ({SWITCHES})"
        guest = Guest(spec=spec, machine=status.machine, accel=status.accelerator)
        there = self._neighbours.moves_of(holder)
        found = refusals(guest, context.me, there, context.moving.facts)
        return "; ".join(map(str, found)) or None

    async def _fetch(self, one: _Away, wish: HostWish, status: Status | None, told: HostProgress) -> bool:
        """Place it here; whether others may follow at this look."""
        context = self._context
        others = await self._placing.others()
        if len(told.moving) + others.coming.get(context.me, 0) >= self._most:
            return False
        runs = status is not None and status.pid is not None
        return await self._placing.place(
            one.wish,
            context.me,
            why=RETURN,
            only_live=runs and not wish.return_cold,
            told=with_moving(told, one.wish.instance, context.me),
            still=[
                Compare(context.layout.return_key(context.me), Target.MOD_REVISION, wish.return_revision),
                *others.unchanged,
            ],
        )

    async def _tidy(self, back: list[_Away]) -> None:
        """Delete placements on their own `host`: that alone says it from now on."""
        for one in back:
            if await self._placing.withdraw(one.wish, self._context.me, why=RETURN, reason="it is back on its `host`"):
                self._setbacks.pop(one.wish.instance, None)

    async def _stays_there(self, one: _Away) -> bool:
        """Whether one that is to come back was left where it runs, as it did not get here in time."""
        context, now, name, lock = self._context, self._context.clock.now(), one.wish.instance, one.lock
        if lock is None or lock.to is not None or lock.host == context.me:
            self._idle_since.pop(name, None)
            return False
        since = self._idle_since.setdefault(name, now)
        if now - since <= PATIENCE_S or context.host_has_session(lock.host) is not True:
            return False
        why = f"it did not come within {PATIENCE_S:g} s; `show {name}` says why"
        if not await self._placing.withdraw(one.wish, lock.host, why=DRAIN, reason=why):
            return False
        self._idle_since.pop(name)
        self._setbacks[name] = Setback.after(self._setbacks.get(name), why, now)
        return True
