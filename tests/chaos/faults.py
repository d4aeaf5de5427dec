"""Which faults, on whom, when and for how long: drawn from a seed, the same for the same seed. Pure.

A schedule is a list of faults, one after the other, each of which waits until everything writes again. Some *ride*:
they begin while the one before is still felt, at a random instant, so that a taker dies in the middle of a takeover, or
etcd changes its leader in the middle of a start. Durations are drawn around what decides: the session's TTL, the 30 s
after which Ceph forgets a watcher, and the instant from which a takeover no longer waits for disks that are in use.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum

from tests.support.bounds import WATCH_S

RIDER_SHARE = 0.25
"""How many faults are made worse by another one."""


class Kind(StrEnum):
    """What goes wrong. What is meant by a host is: all of it, its supervisor and its QEMUs."""

    SUPERVISOR_KILL = "supervisor-kill"
    """SIGKILL; another one is started after the fault's duration."""
    SUPERVISOR_FREEZE = "supervisor-freeze"
    QEMU_KILL = "qemu-kill"
    QEMU_FREEZE = "qemu-freeze"
    HOST_CRASH = "host-crash"
    """SIGKILL for the supervisor and its QEMUs; a supervisor is started after the fault's duration."""
    HOST_REBOOT = "host-reboot"
    """The same, and the kernel has another boot id afterwards."""
    HOST_FREEZE = "host-freeze"
    STRAY_FENCE = "host-freeze-stray-fence"
    """A frozen host whose clients somebody shuts out for a short time, which ends before it wakes up: what people do by
    `ceph osd blocklist add` without a time, and librbd for an hour."""
    ETCD_CUT = "cut-etcd"
    CEPH_CUT = "cut-ceph"
    BOTH_CUT = "cut-both"
    LEADER_FREEZE = "etcd-leader-freeze"
    LEADER_KILL = "etcd-leader-kill"
    """SIGKILL; it is started again after the fault's duration."""
    QUORUM_LOSS = "etcd-no-quorum"
    """All members but one are frozen."""
    CEPH_FREEZE = "ceph-freeze"
    """Monitor and OSD."""
    MON_FREEZE = "ceph-mon-freeze"
    MOVE = "host-edit"
    """Somebody writes another `host`."""
    GARBAGE = "key-garbage"
    """Somebody writes nonsense: into an instance's keys, and beside them. Mended after the fault's duration."""
    GUARD_KILL = "guard-kill"
    """SIGKILL for the guard of law 7, on the host of the machine that it watches; drawn where there is one."""
    HISTORY = "another-history"
    """etcd's data is an older backup's: of the run's beginning, or of the end of the last such fault. A person writes
    `host` again as it was, after the fault's duration."""
    STORE = "another-store"
    """etcd's data is gone. A person writes all keys again, after the fault's duration."""
    NAME = "another-name"
    """The supervisor is killed, runs as `KVM_HOSTNAME` for the fault's duration, and then under its own name again."""
    RUN_DIR = "run-dir-full"
    """No byte is free in the run directory, and the supervisor is killed and started again meanwhile."""
    FLOOD = "log-flood"
    """One more machine on the host writes to its serial port without end."""
    FAILPOINT = "failpoint"
    """The supervisor is killed, frozen, or gets an error of etcd's at a named point of the program, and the QEMU of one
    of its machines is killed, so that it comes by."""
    SITE_POWER = "site-power"
    """All hosts, etcd and Ceph lose their power, and come back in an order of chance."""


class Way(Enum):
    """Which way packets are lost, seen from the host that is cut off."""

    BOTH = "both ways"
    IN = "nothing comes in"
    OUT = "nothing goes out"


class Part(Enum):
    """What a fault has hold of until it ends.

    Two faults never have hold of the same part of the same host or machine: whoever ended first would mend the other,
    and nobody could say what was promised. Faults of different parts may meet: that is what riders are for.
    """

    SUPERVISOR = "the supervisor"
    QEMU = "its QEMU"
    LINKS = "the links"
    FILES = "the run directory"
    MEMBERS = "etcd's members"
    CEPH = "Ceph"
    KEYS = "keys"


class Reach(Enum):
    """Whom a kind of fault concerns."""

    HOST = "one host, and what it runs"
    MACHINE = "one machine"
    ALL = "everybody"


_REACH = {
    Kind.QEMU_KILL: Reach.MACHINE,
    Kind.QEMU_FREEZE: Reach.MACHINE,
    Kind.MOVE: Reach.MACHINE,
    Kind.GUARD_KILL: Reach.MACHINE,
    Kind.LEADER_FREEZE: Reach.ALL,
    Kind.LEADER_KILL: Reach.ALL,
    Kind.QUORUM_LOSS: Reach.ALL,
    Kind.CEPH_FREEZE: Reach.ALL,
    Kind.MON_FREEZE: Reach.ALL,
    Kind.GARBAGE: Reach.ALL,
    Kind.HISTORY: Reach.ALL,
    Kind.STORE: Reach.ALL,
    Kind.SITE_POWER: Reach.ALL,
}

_HOST = frozenset({Part.SUPERVISOR, Part.QEMU})

PARTS: dict[Kind, frozenset[Part]] = {
    Kind.SUPERVISOR_KILL: frozenset({Part.SUPERVISOR}),
    Kind.SUPERVISOR_FREEZE: frozenset({Part.SUPERVISOR}),
    Kind.QEMU_KILL: frozenset({Part.QEMU}),
    Kind.QEMU_FREEZE: frozenset({Part.QEMU}),
    Kind.HOST_CRASH: _HOST,
    Kind.HOST_REBOOT: _HOST,
    Kind.HOST_FREEZE: _HOST,
    Kind.STRAY_FENCE: _HOST,
    Kind.ETCD_CUT: frozenset({Part.LINKS}),
    Kind.CEPH_CUT: frozenset({Part.LINKS}),
    Kind.BOTH_CUT: frozenset({Part.LINKS}),
    Kind.LEADER_FREEZE: frozenset({Part.MEMBERS}),
    Kind.LEADER_KILL: frozenset({Part.MEMBERS}),
    Kind.QUORUM_LOSS: frozenset({Part.MEMBERS}),
    Kind.CEPH_FREEZE: frozenset({Part.CEPH}),
    Kind.MON_FREEZE: frozenset({Part.CEPH}),
    # One write, which is over at once: it may meet anything.
    Kind.MOVE: frozenset(),
    Kind.GARBAGE: frozenset({Part.KEYS}),
    Kind.GUARD_KILL: frozenset(),
    # People who restore a store, or bring a site back, write no nonsense just then.
    Kind.HISTORY: frozenset({Part.MEMBERS, Part.KEYS}),
    Kind.STORE: frozenset({Part.MEMBERS, Part.KEYS}),
    Kind.NAME: frozenset({Part.SUPERVISOR}),
    Kind.RUN_DIR: frozenset({Part.SUPERVISOR, Part.FILES}),
    Kind.FLOOD: frozenset({Part.FILES}),
    Kind.FAILPOINT: _HOST,
    Kind.SITE_POWER: frozenset(Part),
}
"""What each kind has hold of: of one host, one machine, or all, as its reach says."""

_DEATHS = frozenset({Kind.HOST_CRASH, Kind.HOST_FREEZE, Kind.BOTH_CUT})
"""What makes a host look dead, if it lasts: half of them do."""

_INSTANT = frozenset({Kind.QEMU_KILL, Kind.HOST_REBOOT, Kind.MOVE, Kind.GUARD_KILL})
_CUTS = frozenset({Kind.ETCD_CUT, Kind.CEPH_CUT, Kind.BOTH_CUT})

RIDERS = (
    Kind.SUPERVISOR_KILL,
    Kind.SUPERVISOR_FREEZE,
    Kind.LEADER_FREEZE,
    Kind.LEADER_KILL,
    Kind.MON_FREEZE,
    Kind.MOVE,
    Kind.GARBAGE,
)
"""What may come on top of another fault: short, and on any host, the taker's too."""

LONG = frozenset({Kind.STRAY_FENCE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a world's supervisors are set to, and who there is.

    Attributes:
        machines: how many whose disks storage can fence.
        hosts: how many.
        ttl_s: `KVM_SESSION_TTL`.
        wait_s: `KVM_TAKEOVER_WAIT`.
        settle_s: what a schedule reckons until everything writes again after a fault; the run itself waits for it.
        guarded: whether there is one more, which counts as one that storage cannot fence, so that a guard watches it
            (law 7).
    """

    machines: int
    hosts: int
    ttl_s: float
    wait_s: float
    settle_s: float = 12.0
    guarded: bool = False

    @property
    def targets(self) -> int:
        """How many machines there are in all."""
        return self.machines + self.guarded

    @property
    def limit_s(self) -> float:
        """From when on a host that cannot renew its session may lose machines that still write."""
        return self.ttl_s + self.wait_s

    @property
    def dead_s(self) -> float:
        """By when a host that is silent towards etcd and Ceph has been noticed."""
        return self.ttl_s + min(WATCH_S, self.wait_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        number: its place in the schedule, from 1.
        kind: what happens.
        machine: which is hit, from 0, or whose host; where all are concerned, it says nothing.
        other: a second number, for what a kind has to choose: the new host, the kind of nonsense.
        start_s: when, counted from the beginning; later if what was before is still felt.
        duration_s: for how long; 0 for what has no end, such as a kill.
        way: which way packets are lost, for cuts.
        rides: whether it comes on top of the one before.
    """

    number: int
    kind: Kind
    machine: int
    other: int
    start_s: float
    duration_s: float
    way: Way = Way.BOTH
    rides: bool = False

    @property
    def reach(self) -> Reach:
        """Whom it concerns."""
        return _REACH.get(self.kind, Reach.HOST)

    def lasting(self, seconds: float) -> Fault:
        """The same, if it was longer than planned; what is over at once stays so."""
        return replace(self, duration_s=seconds) if seconds > self.duration_s > 0 else self

    def __str__(self) -> str:
        """A line for people."""
        whom = {
            Reach.HOST: f"the host of machine {self.machine}",
            Reach.MACHINE: f"machine {self.machine}",
            Reach.ALL: "all",
        }[self.reach]
        way = f", {self.way.value}" if self.kind in _CUTS and self.way is not Way.BOTH else ""
        lasting = f" for {self.duration_s:.1f} s" if self.duration_s else ""
        mark = "  + " if self.rides else f"{self.number:3} "
        return f"{mark}{self.start_s:7.1f} s  {self.kind} on {whom}{lasting}{way}"


def schedule(seed: int, minutes: float, terms: Terms, kinds: Sequence[Kind] = ()) -> tuple[Fault, ...]:
    """The faults of a run: at least one of each kind before any comes again, if the time allows it.

    Args:
        seed: decides everything.
        minutes: how long the run shall last, about.
        terms: of the world.
        kinds: those to draw from; by default all that the world has.
    """
    rng = random.Random(seed)
    pool = list(kinds) or [kind for kind in Kind if terms.guarded or kind is not Kind.GUARD_KILL]
    bag: list[Kind] = []
    faults: list[Fault] = []
    at = rng.uniform(1, 3)
    while not faults or at < minutes * 60:
        if not bag:
            bag = rng.sample(pool, len(pool))
        main = _draw(rng, bag.pop(), len(faults) + 1, at, terms)
        faults.append(main)
        felt = max(main.duration_s, _reckoned(main.kind, terms))
        if rng.random() < RIDER_SHARE:
            riders = [kind for kind in RIDERS if kind in pool]
            kind = rng.choice(riders or pool)
            when = at + rng.uniform(0.2, max(felt, 4.0))
            rider = _draw(rng, kind, len(faults) + 1, when, terms, rides=True)
            faults.append(rider)
            felt = max(felt, rider.start_s - at + rider.duration_s)
        at += felt + terms.settle_s + rng.uniform(0, 5)
    return tuple(faults)


def by_hand(text: str) -> tuple[Fault, ...]:
    """A schedule that was written: `KIND[:SECONDS[:MACHINE[:OTHER[:WAY]]]]`, with commas between; a `+` before rides.

    Each begins a second after the one before is no longer felt, or after it has begun where it rides.

    Raises:
        ValueError: that is not what was written.
    """
    found: list[Fault] = []
    for word in text.split(","):
        kind, duration, machine, other, way = (*word.lstrip("+").split(":"), "", "", "", "")[:5]
        found.append(
            Fault(
                number=len(found) + 1,
                kind=Kind(kind),
                machine=int(machine or 0),
                other=int(other or 0),
                start_s=len(found) + 1.0,
                duration_s=float(duration or 0),
                way=Way[way.upper() or "BOTH"],
                rides=word.startswith("+"),
            )
        )
    return tuple(found)


def _draw(rng: random.Random, kind: Kind, number: int, at: float, terms: Terms, *, rides: bool = False) -> Fault:
    """One fault. As many numbers are drawn for each kind, so that a kind more or less moves nothing else."""
    shares = (0.25, 0.25, 0.5) if kind in _DEATHS else (0.5, 0.3, 0.2)
    mark = rng.choices((terms.ttl_s, WATCH_S, terms.limit_s), shares)[0]
    spread, machine, other = rng.uniform(0.4, 1.4), rng.randrange(terms.targets), rng.randrange(1 << 16)
    way = rng.choices(tuple(Way), (0.5, 0.25, 0.25))[0]
    if rides:
        mark = terms.ttl_s
    if kind in LONG:
        mark, spread = terms.dead_s + 10, max(spread, 1.0)
    duration = 0.0 if kind in _INSTANT else round(mark * spread, 1)
    return Fault(
        number=number,
        kind=kind,
        machine=machine,
        other=other,
        start_s=round(at, 1),
        duration_s=duration,
        way=way if kind in _CUTS else Way.BOTH,
        rides=rides,
    )


def _reckoned(kind: Kind, terms: Terms) -> float:
    """For how long a fault is felt however short it is."""
    return terms.dead_s if kind in {Kind.HOST_CRASH, Kind.SITE_POWER} else 0.0
