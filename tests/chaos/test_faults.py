"""What a seed comes to, and what is promised for each fault."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.chaos.acts import Act, felt_by
from tests.chaos.bounds import Promise, guarded, promise, together
from tests.chaos.faults import RIDERS, Fault, Kind, Reach, Terms, Way, by_hand, schedule
from tests.support.bounds import WATCH_S

TERMS = Terms(machines=3, hosts=3, ttl_s=5, wait_s=40)
KINDS = [kind for kind in Kind if kind is not Kind.GUARD_KILL]
CUTS = {Kind.ETCD_CUT, Kind.CEPH_CUT, Kind.BOTH_CUT}


def many() -> list[Fault]:
    return [fault for seed in range(30) for fault in schedule(seed, 30, TERMS)]


def a_fault(kind: Kind, duration_s: float = 0.0) -> Fault:
    return Fault(number=1, kind=kind, machine=0, other=0, start_s=1.0, duration_s=duration_s)


def test_a_seed_replays() -> None:
    """Law: one seed, one schedule, word for word; another seed, another one."""
    for seed in (0, 1, 2**31 - 1):
        first, again = schedule(seed, 10, TERMS), schedule(seed, 10, TERMS)
        assert first == again
        assert [*map(str, first)] == [*map(str, again)]
    assert schedule(1, 10, TERMS) != schedule(2, 10, TERMS)


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    """Law: what was found in a long run is found by a run that ends there."""
    short, long = schedule(7, 4, TERMS), schedule(7, 30, TERMS)
    assert long[: len(short)] == short
    assert len(long) > len(short)


def test_each_kind_comes_before_any_comes_again() -> None:
    """Law: chance decides the order, not what is left out."""
    for seed in range(20):
        drawn = [fault.kind for fault in schedule(seed, 30, TERMS) if not fault.rides]
        for begin in range(0, len(drawn) - len(KINDS) + 1, len(KINDS)):
            assert sorted(drawn[begin : begin + len(KINDS)]) == sorted(KINDS)


def test_the_order_of_time() -> None:
    """Law: faults come one after the other, within the minutes; what rides begins after what it rides on."""
    for seed in range(20):
        faults = schedule(seed, 10, TERMS)
        assert not faults[0].rides
        assert [fault.number for fault in faults] == [*range(1, len(faults) + 1)]
        starts = [fault.start_s for fault in faults]
        assert starts == sorted(starts)
        assert max(fault.start_s for fault in faults if not fault.rides) < 600
        assert {fault.kind for fault in faults if fault.rides} <= {*RIDERS}


@pytest.mark.parametrize("kind", [Kind.ETCD_CUT, Kind.SUPERVISOR_FREEZE, Kind.HOST_FREEZE, Kind.QEMU_FREEZE])
def test_durations_lie_on_both_sides(kind: Kind) -> None:
    """Law: shorter and longer than the TTL, than what Ceph remembers, and than a takeover's patience."""
    durations = [fault.duration_s for fault in many() if fault.kind is kind and not fault.rides]
    for mark in (TERMS.ttl_s, WATCH_S, TERMS.limit_s):
        assert any(0.4 * mark <= duration < mark for duration in durations), mark
        assert any(mark < duration <= 1.4 * mark for duration in durations), mark


def test_links_are_cut_each_way() -> None:
    """Law: what comes in, what goes out, and both; nothing else has a way."""
    faults = many()
    assert {(fault.kind, fault.way) for fault in faults if fault.kind in CUTS} == {
        (kind, way) for kind in CUTS for way in Way
    }
    assert all(fault.way is Way.BOTH for fault in faults if fault.kind not in CUTS)


def test_all_are_hit() -> None:
    """Law: each machine, by each kind that has a target."""
    found = {(fault.kind, fault.machine) for fault in many() if fault.reach is not Reach.ALL}
    kinds = {kind for kind in KINDS if a_fault(kind).reach is not Reach.ALL}
    assert found == {(kind, machine) for kind in kinds for machine in range(3)}


def test_guards_are_hit_where_there_are_some() -> None:
    """Law: a world without the guard of law 7 draws no fault on it, one with it does."""
    assert Kind.GUARD_KILL not in {fault.kind for fault in many()}
    drawn = schedule(1, 60, replace(TERMS, guarded=True))
    assert Kind.GUARD_KILL in {fault.kind for fault in drawn}


def test_what_cannot_be_fenced_is_killed() -> None:
    """Law 7: without a session its guard must have killed it, and it comes back on its own host; nothing else must."""
    for kind in (Kind.SUPERVISOR_KILL, Kind.SUPERVISOR_FREEZE, Kind.ETCD_CUT, Kind.QUORUM_LOSS):
        assert guarded(a_fault(kind, 30), TERMS).least == 1
        assert guarded(a_fault(kind, 4), TERMS).least == 0
    assert guarded(a_fault(Kind.HOST_CRASH, 50), TERMS).away_s > 50
    assert guarded(a_fault(Kind.GUARD_KILL), TERMS) == Promise()


def test_by_hand() -> None:
    """Law: what is written by hand is played as written, and what cannot be read is refused."""
    first, second = by_hand("cut-etcd:12.5:1:0:in,+qemu-kill")
    assert (first.kind, first.duration_s, first.machine, first.way) == (Kind.ETCD_CUT, 12.5, 1, Way.IN)
    assert (second.kind, second.rides, second.duration_s) == (Kind.QEMU_KILL, True, 0.0)
    for text in ("", "earthquake", "cut-etcd:long", "cut-etcd:1:0:0:up"):
        with pytest.raises((ValueError, KeyError)):
            by_hand(text)


@pytest.mark.parametrize(
    ("kind", "durations"),
    [
        (Kind.SUPERVISOR_KILL, (0.5, 6, 30)),
        (Kind.SUPERVISOR_FREEZE, (0.5, 6, 35)),
        (Kind.ETCD_CUT, (0.5, 6, 35)),
        (Kind.LEADER_FREEZE, (0.5, 6, 60)),
        (Kind.LEADER_KILL, (0.5, 60)),
        (Kind.QUORUM_LOSS, (0.5, 6, 60)),
        (Kind.MON_FREEZE, (0.5, 60)),
        (Kind.GARBAGE, (0.5, 60)),
    ],
)
def test_what_is_not_to_be_felt(kind: Kind, durations: tuple[float, ...]) -> None:
    """Law: the table's zeros: no restart, and no time away but what a busy machine takes anyway."""
    for duration in durations:
        assert promise(a_fault(kind, duration), TERMS) == Promise(), duration


@pytest.mark.parametrize("kind", [Kind.CEPH_CUT, Kind.CEPH_FREEZE, Kind.QEMU_FREEZE])
def test_what_stops_a_machine_and_does_not_start_it_again(kind: Kind) -> None:
    """Law: without Ceph, and frozen, it is away for as long, or till TCP notices; it is the same QEMU afterwards."""
    promised = promise(a_fault(kind, 50), TERMS)
    assert promised.restarts == 0
    assert 50 <= promised.away_s <= 100


def test_a_dead_host_costs_35_seconds() -> None:
    """Law: with a TTL of 5 s: what Ceph remembers, and the TTL; then one boot."""
    for kind in (Kind.HOST_CRASH, Kind.STRAY_FENCE):
        assert promise(a_fault(kind, 60), TERMS) == Promise(away_s=35, boots=1, restarts=1)
    assert promise(a_fault(Kind.HOST_FREEZE, 60), TERMS) == Promise(away_s=35, boots=1, restarts=1)
    assert promise(a_fault(Kind.HOST_FREEZE, 4), TERMS) == Promise(away_s=4, boots=0, restarts=0)


def test_one_way_costs_more() -> None:
    """Law: what a host sends, or what is sent to it, may keep its watch in Ceph up; patience ends all the same."""
    for way in (Way.IN, Way.OUT):
        one = promise(replace(a_fault(Kind.BOTH_CUT, 20), way=way), TERMS)
        assert (one.away_s, one.restarts) == (TERMS.limit_s, 1)
    assert promise(a_fault(Kind.BOTH_CUT, 20), TERMS).away_s == max(TERMS.dead_s, 40)


def test_patience_ends() -> None:
    """Law: a host that etcd does not hear for longer than a takeover waits loses its machines: one start."""
    for kind in (Kind.ETCD_CUT, Kind.SUPERVISOR_FREEZE, Kind.SUPERVISOR_KILL):
        promised = promise(a_fault(kind, 60), TERMS)
        assert (promised.restarts, promised.boots) == (1, 1)
        assert promised.away_s < TERMS.dead_s


def test_several_at_once() -> None:
    """Law: alone a fault is judged by its own promise; with others, time adds up, and restarts are not counted."""
    one, other = a_fault(Kind.HOST_CRASH, 10), a_fault(Kind.LEADER_FREEZE, 6)
    alone = promise(one, TERMS)
    assert together([(one, alone)], TERMS) == alone
    both = together([(one, alone), (other, promise(other, TERMS))], TERMS)
    assert both.restarts is None
    assert both.away_s > alone.away_s


def test_a_bound_has_room_for_a_busy_machine() -> None:
    """Law: half as much again and some seconds, and the guest's boot as it was measured."""
    assert Promise().bound_s(boot_s=3) == 5
    assert Promise(away_s=35, boots=1).bound_s(boot_s=2) == 1.5 * 37 + 5


def test_what_lasted_longer_is_judged_by_that() -> None:
    """Law: a fault that was ended late has the promises of its real length; one without a length keeps none."""
    late = a_fault(Kind.SUPERVISOR_FREEZE, 5.0).lasting(60.0)
    assert promise(late, TERMS) == promise(a_fault(Kind.SUPERVISOR_FREEZE, 60.0), TERMS) != Promise()
    assert a_fault(Kind.SUPERVISOR_FREEZE, 5.0).lasting(4.9).duration_s == 5.0
    assert a_fault(Kind.QEMU_KILL).lasting(60.0).duration_s == 0.0


def test_what_hit_nothing_makes_no_others_feel_it() -> None:
    """Seed 8107: a second freeze found its host frozen already. A guest elsewhere was to be killed for the first."""
    freeze = by_hand("supervisor-freeze:25")[0]
    hit = Act(fault=freeze, whom="h0", machines=frozenset({"vm1"}))
    void = Act(fault=freeze, whom="h0", machines=frozenset(), void=True)
    assert felt_by("vm1", [hit, void]) == [hit]
    assert felt_by("guarded", [hit, void]) == []
    other = Act(fault=freeze, whom="h1", machines=frozenset({"vm2"}))
    assert felt_by("guarded", [hit, other, void]) == [hit, other]
