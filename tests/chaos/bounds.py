"""What is promised for each fault: for how long a machine may be away, and whether it may be started again. Pure.

The promises are those of docs/reliability.md, "What is promised". What a machine may be started again for is exact;
time is not, on a machine that does other things too, and gets half as much again and some seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.chaos.faults import Fault, Kind, Terms, Way
from tests.support.bounds import WATCH_S

FACTOR = 1.5
SLACK_S = 5.0
"""A promise in seconds is no promise of milliseconds; arbitrary, and longer than what was seen without any fault."""

TOOLS = 3
"""How many calls of `ceph` follow one another before a start: who is there, shut out, is it so."""

LAUNCH_S = 10.0
"""How long a supervisor may take from its start until it holds its session, for a fault to count as one that a
successor was in time for. It takes one second; ten on a machine that is busy."""

SITE_S = 20.0
"""How long etcd, Ceph and the supervisors of a whole site may take, one after the other, until all serve again."""

EARLY = 0.75
"""What part of its TTL a session has left at least when its host goes silent: it is renewed every fifth."""

PING_S = 15.0
"""What a watch has left at least when its client goes silent, of `WATCH_S`: it is renewed every ten seconds or so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a machine may feel of a fault.

    Attributes:
        away_s: for how long it may not write, without the time that its guest takes to boot.
        boots: how many boots of the guest come on top.
        restarts: how often it may be started again; None for any number, where faults mix.
        least: how often it must be started again.
    """

    away_s: float = 0.0
    boots: int = 0
    restarts: int | None = 0
    least: int = 0

    def bound_s(self, boot_s: float, tool_s: float = 0.0) -> float:
        """The longest time that is no violation.

        Args:
            boot_s: from a machine's keys to its first record, as it was measured in the same run.
            tool_s: what one call of `ceph` took, measured just now: a second of processor time where there is one.
        """
        return FACTOR * (self.away_s + self.boots * (boot_s + TOOLS * tool_s)) + SLACK_S


NOTHING = Promise()

OPEN = Promise(away_s=LAUNCH_S, boots=1, restarts=None)
"""What a machine under guard may feel of others' faults, where its host is too busy to renew its session."""


def promise(fault: Fault, terms: Terms, *, pause_s: float = 1.0) -> Promise:  # noqa: C901, PLR0912 - a table
    """What is promised to the machines that a fault hits.

    Args:
        fault: which.
        terms: of the world.
        pause_s: the longest pause before the next restart of a machine that crashed some times already.
    """
    duration = fault.duration_s
    # A takeover of a machine whose disks are in use, at the earliest.
    patience = EARLY * terms.ttl_s + terms.wait_s
    fenced = Promise(away_s=5.0, boots=1, restarts=1)
    dead = Promise(away_s=terms.dead_s, boots=1, restarts=1)
    # When a host is silent towards Ceph too, and not yet taken for dead.
    unnoticed = duration < EARLY * terms.ttl_s + min(terms.wait_s, PING_S)
    match fault.kind:
        case Kind.SUPERVISOR_KILL | Kind.NAME:
            return NOTHING if duration + LAUNCH_S < patience else fenced
        case Kind.SUPERVISOR_FREEZE | Kind.ETCD_CUT:
            return NOTHING if duration < patience else fenced
        case Kind.QEMU_KILL:
            return Promise(away_s=pause_s, boots=1, restarts=1)
        case Kind.FAILPOINT:
            # Its start is cut off: it goes on afterwards, or elsewhere once the host counts as dead.
            return Promise(away_s=pause_s + max(duration + LAUNCH_S, terms.dead_s), boots=2, restarts=2)
        case Kind.QEMU_FREEZE:
            return Promise(away_s=duration)
        case Kind.HOST_CRASH:
            return dead
        case Kind.HOST_REBOOT:
            return Promise(away_s=LAUNCH_S + 1.0, boots=1, restarts=1)
        case Kind.HOST_FREEZE:
            return Promise(away_s=duration) if unnoticed else dead
        case Kind.STRAY_FENCE:
            return dead
        case Kind.BOTH_CUT:
            # What goes one way only still keeps up a watch, as long as TCP has room for what is not acknowledged.
            taken = dead if fault.way is Way.BOTH else Promise(away_s=terms.limit_s, boots=1, restarts=1)
            return _outage(duration) if unnoticed else _or(taken, _outage(duration))
        case Kind.CEPH_CUT:
            return _outage(duration)
        case Kind.CEPH_FREEZE:
            return Promise(away_s=duration)
        case Kind.MOVE:
            return Promise(away_s=LAUNCH_S, boots=1, restarts=1)
        case Kind.GUARD_KILL:
            return NOTHING
        case Kind.SITE_POWER:
            return Promise(away_s=duration + SITE_S + terms.dead_s, boots=1, restarts=1)
        case Kind.LEADER_FREEZE | Kind.LEADER_KILL | Kind.QUORUM_LOSS | Kind.MON_FREEZE | Kind.GARBAGE:
            return NOTHING
        case Kind.HISTORY | Kind.STORE | Kind.RUN_DIR | Kind.FLOOD:
            return NOTHING


def guarded(fault: Fault, terms: Terms, *, pause_s: float = 1.0) -> Promise:
    """What is promised to the machine that cannot be fenced: nobody takes it, and a guard kills it without a session.

    How often it is started again is open: a host that is too busy may lose its session, and that is what it is for.
    """
    usual = promise(fault, terms, pause_s=pause_s)
    if fault.kind is Kind.GUARD_KILL:
        return usual
    silent = fault.kind in {Kind.SUPERVISOR_KILL, Kind.SUPERVISOR_FREEZE, Kind.ETCD_CUT, Kind.QUORUM_LOSS}
    lost = silent and fault.duration_s > 2 * terms.ttl_s
    away_s = max(usual.away_s, fault.duration_s) + LAUNCH_S
    return Promise(away_s=away_s, boots=1, restarts=None, least=1 if lost else 0)


def _outage(duration: float) -> Promise:
    """A network that was away is noticed late: TCP doubles its pauses, so the next try comes after as much again."""
    return Promise(away_s=2 * duration)


def _or(one: Promise, other: Promise) -> Promise:
    """Whichever of the two it comes to."""
    restarts = None if None in {one.restarts, other.restarts} else max(one.restarts or 0, other.restarts or 0)
    return Promise(away_s=max(one.away_s, other.away_s), boots=max(one.boots, other.boots), restarts=restarts)


def together(faults: Iterable[tuple[Fault, Promise]], terms: Terms) -> Promise:
    """What is promised when several come at once: time adds up, a taker that dies costs a TTL, the rest is open."""
    several = list(faults)
    if len(several) <= 1:
        return several[0][1] if several else NOTHING
    # The next taker waits for the taker's session to end, and for what its QEMU left in Ceph.
    away_s = sum(promised.away_s + fault.duration_s for fault, promised in several) + terms.ttl_s + WATCH_S
    return Promise(away_s=away_s, boots=len(several), restarts=None)
