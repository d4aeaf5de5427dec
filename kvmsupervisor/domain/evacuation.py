"""Which machine of a host that empties itself goes next, and where to; or why it cannot. Pure.

Asked by the host at each look, and by `drain --dry-run` beforehand. A host decides for its own machines only. Two hosts
agree by what is in etcd: a target is never a host that drains, and how many come to it counts those of all hosts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field

from kvmsupervisor.domain.admission import OVERHEAD_MIB
from kvmsupervisor.domain.failover import order_of_any
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host_wish import Mode
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.names import ANY_HOST
from kvmsupervisor.domain.spec import Spec, Wish
from kvmsupervisor.domain.values import some

PAUSE_S, LONGEST_PAUSE_S = 60.0, 1800.0
"""How long a target is not asked for a machine again that it did not get; each further time twice as long. A move tries
the same target again after 5 s; a drain has others to see to, and people read its words."""

NAMED = 5
"""How many hosts, each with its reason, a sentence names. Arbitrary: a line or two."""


@frozen(kw_only=True)
class Room:
    """A host that machines may go to: it has a session, and is not the one that they leave.

    Attributes:
        drains: whether it drains, or stops all its guests.
        free_mib: memory that is promised to no guest; infinite where its session does not say.
        coming: how many machines are on their way to it, from all hosts.
    """

    drains: bool = False
    free_mib: float = math.inf
    coming: int = 0


@frozen(kw_only=True)
class Setback:
    """A target did not get a machine.

    Attributes:
        why: as it was told.
        until: when it is asked again, CLOCK_BOOTTIME.
        pause_s: how long that is.
    """

    why: str
    until: float
    pause_s: float

    @classmethod
    def after(cls, before: Setback | None, why: str, now: float) -> Setback:
        """The next one, for the same machine and target."""
        pause_s = PAUSE_S if before is None else min(2 * before.pause_s, LONGEST_PAUSE_S)
        return cls(why=why, until=now + pause_s, pause_s=pause_s)


@frozen(kw_only=True)
class Leaver:
    """A machine that is to go.

    Attributes:
        id: which.
        named: the hosts that may run it, in order, `*` among them; empty where nobody is named.
        home: its `host`, where that is not the host that it leaves; it goes there before all others.
        priority: the greatest goes first.
        need_mib: the memory that it needs there.
        runs: whether its guest runs, so that it would be stopped where it cannot be moved live.
        stays: why it goes nowhere, whatever the target; None for no reason.
        kept: why a person wants it here, so that it is not even stopped; None for no reason.
        not_live: why it cannot go to a host while its guest runs, by host.
        setbacks: by host.
    """

    id: InstanceId
    named: tuple[str, ...] = ()
    home: str | None = None
    priority: int = 0
    need_mib: int = OVERHEAD_MIB
    runs: bool = True
    stays: str | None = None
    kept: str | None = None
    not_live: Mapping[str, str] = field(default_factory=dict)
    setbacks: Mapping[str, Setback] = field(default_factory=dict)


@frozen(kw_only=True)
class Go:
    """A machine goes now.

    Attributes:
        id: which.
        host: where to.
        live: whether its guest may not be stopped for it.
    """

    id: InstanceId
    host: str
    live: bool


@frozen(kw_only=True)
class Plan:
    """What is to be done about all that are left.

    Attributes:
        go: those that go now, in order.
        waits: those that will go once others have, by id, each with the host that it waits for.
        refused: those that cannot go, by id, each with the reason.
        evicted: those of them that are to be stopped, where the mode says so: nobody will take them in.
        later: those of them for which a target is asked again after a pause.
        again_at: when a target is asked again that did not get one of them, CLOCK_BOOTTIME.
    """

    go: tuple[Go, ...] = ()
    waits: Mapping[InstanceId, str] = field(default_factory=dict)
    refused: Mapping[InstanceId, str] = field(default_factory=dict)
    evicted: frozenset[InstanceId] = frozenset()
    later: frozenset[InstanceId] = frozenset()
    again_at: float = math.inf


def plan(
    leavers: Collection[Leaver],
    rooms: Mapping[str, Room],
    *,
    mode: Mode,
    any_host: bool,
    leaving: int,
    most: float,
    now: float,
) -> Plan:
    """Decide for all that are left, in the order in which they go.

    Each that is given a target counts there before the next one is looked at.

    Args:
        leavers: those that are left and not on their way.
        rooms: the other hosts that have a session, by name.
        mode: of the drain.
        any_host: whether any host may run those that name nobody (`KVM_DRAIN_ANY`).
        leaving: how many are on their way from here.
        most: how many may be, from here, and to each target; infinite to look further than one may go.
        now: CLOCK_BOOTTIME.
    """
    rooms = dict(rooms)
    go: list[Go] = []
    waits: dict[InstanceId, str] = {}
    refused: dict[InstanceId, str] = {}
    again = [setback.until for one in leavers for setback in one.setbacks.values() if setback.until > now]
    for one in sorted(leavers, key=lambda one: (-one.priority, one.id)):
        if one.kept is not None or one.stays is not None:
            refused[one.id] = one.kept or one.stays or ""
            continue
        target, why = _target(one, rooms, mode=mode, any_host=any_host, most=most, now=now)
        if target is None:
            refused[one.id] = why
        elif leaving + len(go) >= most or rooms[target].coming >= most:
            waits[one.id] = target
        else:
            room = rooms[target]
            live = one.runs and not mode.stops_guests
            go.append(Go(id=one.id, host=target, live=live))
            rooms[target] = Room(free_mib=room.free_mib - one.need_mib, coming=room.coming + 1)
    evicted = {one.id for one in leavers if one.id in refused and one.runs and one.kept is None}
    # A host that may take it in after all is asked first.
    later = {one.id for one in leavers if any(setback.until > now for setback in one.setbacks.values())}
    evicted -= later
    return Plan(
        go=tuple(go),
        waits=waits,
        refused=refused,
        later=frozenset(later & refused.keys()),
        evicted=frozenset(evicted) if mode is Mode.STOP else frozenset(),
        again_at=min(again, default=math.inf),
    )


def _target(
    one: Leaver, rooms: Mapping[str, Room], *, mode: Mode, any_host: bool, most: float, now: float
) -> tuple[str | None, str]:
    """The first host that can take it, also where it has to wait for its turn there; or why none can."""
    named = one.named or ((ANY_HOST,) if any_host else ())
    if not named and one.home is None:
        return None, "it has no key `hosts`, and KVM_DRAIN_ANY is not 1 here: nobody else may run it"
    why: dict[str, str] = {}
    for host in _in_order(one, named, rooms, most):
        trouble = _trouble(one, host, rooms.get(host), mode=mode, now=now)
        if trouble is None:
            return host, ""
        why[host] = trouble
    if not why:
        return None, "there is no other host that has a session"
    return None, some([f"{host} {trouble}" for host, trouble in why.items()], NAMED)


def _in_order(one: Leaver, named: Sequence[str], rooms: Mapping[str, Room], most: float) -> list[str]:
    """Its home, then the hosts of its key in their order; of all that `*` stands for, first those that have room.

    A named host that is busy is waited for, as people put it first. Nobody put the others into an order.
    """
    others = sorted(
        rooms.keys() - {*named},
        key=lambda host: (rooms[host].coming >= most, -rooms[host].free_mib, order_of_any(one.id, host)),
    )
    order = [] if one.home is None else [one.home]
    for host in named:
        order += others if host == ANY_HOST else [host]
    return list(dict.fromkeys(order))


def _trouble(one: Leaver, host: str, room: Room | None, *, mode: Mode, now: float) -> str | None:
    if room is None:
        return "has no session"
    if room.drains:
        return "takes nobody in: it drains, or stops all its guests"
    if one.need_mib > room.free_mib:
        return f"has {max(room.free_mib, 0):g} MiB of memory free, and it needs {one.need_mib} MiB"
    if (setback := one.setbacks.get(host)) is not None and setback.until > now:
        return f"did not get it, and is asked again after a pause of {setback.pause_s:g} s: {setback.why}"
    if one.runs and not mode.stops_guests and (why := one.not_live.get(host)) is not None:
        return f"cannot have it while its guest runs: {why}"
    return None


def why_kept(wish: Wish, *, me: str, drain_revision: int, held: bool) -> str | None:
    """Why a person wants a machine on the host that it is to leave; None for no reason.

    Args:
        wish: its keys.
        me: that host.
        drain_revision: `mod_revision` of the key that has the host drain.
        held: whether an order in its keys waits for an operator's word.
    """
    if held:
        return "an order in its keys waits for `kvmsupervisor confirm-removal`"
    if wish.host == me and wish.host_revision > drain_revision:
        return "its `host` was written after the drain began: who wrote that wants it here (`drain` again overrules it)"
    return None


def why_it_stays(wish: Wish, running: Spec | None) -> str | None:
    """Why a machine goes nowhere, whatever the target; None for no reason.

    Args:
        wish: its keys.
        running: the machine that was started; None where none runs.
    """
    if wish.problems or wish.spec is None:
        return "its keys have problems, so no other host would run it: see `kvmsupervisor check`"
    for spec in (wish.spec, running):
        if spec is None:
            continue
        names = [f"{disk.key} is {file.title}" for disk, file in spec.files]
        if spec.cdrom is not None and spec.cdrom.file is not None:
            names.append(f"cdrom is {spec.cdrom.title}")
        if names:
            return f"it has files of this host: {some(names, NAMED)} (move their contents into Ceph)"
    return None


def named_hosts(wish: Wish, me: str) -> tuple[tuple[str, ...], str | None]:
    """The hosts that its keys allow but `me`, and its home where that is another one."""
    home = wish.host if wish.host != me else None
    return tuple(host for host in wish.hosts if host != me), home
