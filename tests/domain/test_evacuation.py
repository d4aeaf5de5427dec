"""Which machine of a host that drains goes next, and where to: a pure table."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from kvmsupervisor.domain.evacuation import (
    LONGEST_PAUSE_S,
    PAUSE_S,
    Go,
    Leaver,
    Plan,
    Room,
    Setback,
    named_hosts,
    plan,
    why_it_stays,
    why_kept,
)
from kvmsupervisor.domain.host_wish import HostProgress, HostWish, Mode
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import Placed, Placement
from kvmsupervisor.domain.spec import RawValue

ONE, TWO, THREE = (InstanceId(name) for name in ("1", "2", "3"))
FREE = Room(free_mib=4096)
NOW = 100.0


def leaver(name: InstanceId = ONE, *named: str, **more: Any) -> Leaver:
    return Leaver(**{"id": name, "named": named or ("beta",), "need_mib": 1024, **more})


def planned(*leavers: Leaver, mode: Mode = Mode.LIVE, any_host: bool = False, leaving: int = 0, most: float = 1,
            **rooms: Room) -> Plan:  # fmt: skip
    return plan(leavers, rooms or {"beta": FREE}, mode=mode, any_host=any_host, leaving=leaving, most=most, now=NOW)


def target_of(one: Leaver, **more: Any) -> str | None:
    found = planned(one, **more)
    return found.go[0].host if found.go else None


# --- who goes -------------------------------------------------------------------------------------------------


def test_the_greatest_priority_goes_first_and_one_at_a_time() -> None:
    found = planned(leaver(ONE), leaver(TWO, priority=5), leaver(THREE, priority=1))
    assert found.go == (Go(id=TWO, host="beta", live=True),)
    assert found.waits == {ONE: "beta", THREE: "beta"}
    assert found.refused == {}


def test_nobody_begins_while_another_is_on_its_way_from_here() -> None:
    assert planned(leaver(), leaving=1).waits == {ONE: "beta"}


def test_nobody_is_sent_to_a_host_to_which_another_is_on_its_way() -> None:
    """From this host or from another one that drains: a target has one neck."""
    found = planned(leaver(), beta=replace(FREE, coming=1))
    assert (found.go, found.waits) == ((), {ONE: "beta"})


def test_who_waits_for_its_target_keeps_nobody_else_back() -> None:
    found = planned(leaver(ONE, "beta", priority=9), leaver(TWO, "gamma"), beta=replace(FREE, coming=1), gamma=FREE)
    assert found.go == (Go(id=TWO, host="gamma", live=True),)


def test_each_that_is_given_a_target_counts_there_before_the_next_is_looked_at() -> None:
    found = planned(*(leaver(name) for name in (ONE, TWO, THREE)), most=math.inf, beta=Room(free_mib=2048))
    assert [go.id for go in found.go] == [ONE, TWO]
    assert found.refused == {THREE: "beta has 0 MiB of memory free, and it needs 1024 MiB"}


# --- where to -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "rooms", "target"),
    [
        (leaver(ONE, "gamma", "beta"), {"beta": FREE, "gamma": FREE}, "gamma"),
        (leaver(ONE, "gone", "beta"), {"beta": FREE}, "beta"),
        (leaver(ONE, "beta", "gamma"), {"beta": replace(FREE, drains=True), "gamma": FREE}, "gamma"),
        (leaver(ONE, "beta", "gamma"), {"beta": Room(free_mib=512), "gamma": FREE}, "gamma"),
        (leaver(ONE, "beta", "*"), {"beta": FREE, "gamma": Room(free_mib=9999)}, "beta"),
        (leaver(ONE, "*"), {"beta": FREE, "gamma": Room(free_mib=9999)}, "gamma"),
        (leaver(ONE, "*"), {"beta": FREE, "gamma": Room(free_mib=9999, coming=1)}, "beta"),
        (leaver(ONE, "gamma", home="beta"), {"beta": FREE, "gamma": FREE}, "beta"),
        (leaver(ONE, "gamma", home="beta"), {"beta": replace(FREE, drains=True), "gamma": FREE}, "gamma"),
        (leaver(ONE, "beta", "gamma", not_live={"beta": "it is an Arm"}), {"beta": FREE, "gamma": FREE}, "gamma"),
        (leaver(ONE, "beta", "gamma", setbacks={"beta": Setback(why="no", until=101.0, pause_s=60)}),
         {"beta": FREE, "gamma": FREE}, "gamma"),
        (leaver(ONE, "beta", "gamma", setbacks={"beta": Setback(why="no", until=99.0, pause_s=60)}),
         {"beta": FREE, "gamma": FREE}, "beta"),
    ],
    ids=["their order", "a host that is gone", "a host that drains", "a host without room", "before any other",
         "the most room", "any other that is not busy", "home first", "but not to a home that drains",
         "who cannot have it live", "who did not get it a moment ago", "who did not get it long ago"],
)  # fmt: skip
def test_the_target(one: Leaver, rooms: dict[str, Any], target: str) -> None:
    assert target_of(one, **rooms) == target


def test_a_named_host_that_is_busy_is_waited_for() -> None:
    """People put it first; the second one is for when the first one cannot."""
    found = planned(leaver(ONE, "beta", "gamma"), beta=replace(FREE, coming=1), gamma=FREE)
    assert (found.go, found.waits) == ((), {ONE: "beta"})


def test_without_the_key_any_host_serves_only_where_that_is_set() -> None:
    one = replace(leaver(), named=())
    assert planned(one).refused == {
        ONE: "it has no key `hosts`, and KVM_DRAIN_ANY is not 1 here: nobody else may run it"
    }
    assert target_of(one, any_host=True) == "beta"
    assert target_of(replace(leaver(), named=("gamma",)), any_host=True, beta=FREE) is None


def test_many_hosts_do_not_all_choose_the_same_one() -> None:
    """Where all are alike, each machine has an order of its own."""
    rooms = dict.fromkeys(("beta", "gamma", "delta", "epsilon"), FREE)
    targets = {target_of(leaver(InstanceId(str(number)), "*"), **rooms) for number in range(40)}
    assert targets == {*rooms}


def test_two_hosts_that_drain_send_each_other_nothing() -> None:
    for other in ("alpha", "beta"):
        rooms: dict[str, Any] = {other: replace(FREE, drains=True)}
        found = planned(leaver(ONE, other), **rooms)
        assert found.go == ()
        assert "takes nobody in" in found.refused[ONE]


# --- what stays -----------------------------------------------------------------------------------------------


def test_live_stops_no_guest_and_the_others_do() -> None:
    one = leaver(not_live={"beta": "its CD-ROM drive"})
    assert planned(one).refused == {ONE: "beta cannot have it while its guest runs: its CD-ROM drive"}
    for mode in (Mode.COLD, Mode.STOP):
        assert planned(one, mode=mode).go == (Go(id=ONE, host="beta", live=False),)


def test_what_does_not_run_is_placed_in_every_mode() -> None:
    """There is no guest to stop."""
    assert planned(leaver(runs=False, not_live={"beta": "no"})).go == (Go(id=ONE, host="beta", live=False),)


def test_only_stop_stops_what_has_no_other_place() -> None:
    pinned, kept = leaver(ONE, stays="files"), leaver(TWO, kept="a person")
    for mode in (Mode.LIVE, Mode.COLD):
        assert planned(pinned, kept, mode=mode).evicted == frozenset()
    found = planned(pinned, kept, leaver(THREE, "gone"), mode=Mode.STOP)
    assert found.evicted == {ONE, THREE}
    assert found.refused == {ONE: "files", TWO: "a person", THREE: "gone has no session"}


def test_a_host_that_may_take_it_in_after_all_is_asked_before_it_is_stopped() -> None:
    one = leaver(setbacks={"beta": Setback(why="no", until=160.0, pause_s=60)})
    found = planned(one, mode=Mode.STOP)
    assert (found.evicted, found.again_at) == (frozenset(), 160.0)
    assert "asked again after a pause of 60 s: no" in found.refused[ONE]


def test_pauses_grow_to_a_limit() -> None:
    """No tight loop, and none for ever in silence: its reason is said."""
    one = Setback.after(None, "no", 0.0)
    assert (one.pause_s, one.until) == (PAUSE_S, PAUSE_S)
    for _ in range(9):
        one = Setback.after(one, "no", 1000.0)
    assert (one.pause_s, one.until) == (LONGEST_PAUSE_S, 1000.0 + LONGEST_PAUSE_S)


def wish(of: int = 5, placed: Placement | None = None, **keys: str) -> Any:
    told = {"ram": "64", **keys}
    raw = {name.replace("_", "/").encode(): RawValue(value.encode(), of) for name, value in told.items()}
    return parse_wish(ONE, raw, Placed() if placed is None else Placed(revision=9, placement=placed))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, None),
        ({"disk_1": "file:data.qcow2 size=1G"}, "disk/1 is file:data.qcow2"),
        ({"disk_1": "file:data.qcow2 ro"}, "disk/1 is file:data.qcow2"),
        ({"cdrom": "file:a.iso"}, "cdrom is file:a.iso"),
        ({"rbd": "vms/1"}, None),
        ({"cpus": "many"}, "its keys have problems"),
    ],
)
def test_what_goes_nowhere(keys: dict[str, Any], said: str | None) -> None:
    found = why_it_stays(wish(host="alpha", **keys), None)
    assert (found is None) if said is None else (found is not None and said in found)


def test_files_of_the_machine_that_runs_count_too() -> None:
    """Its keys may have changed since it was started."""
    running = wish(host="alpha", disk_1="file:data.qcow2 size=1G").spec
    assert why_it_stays(wish(host="alpha"), running) is not None


def test_a_newer_write_of_host_wants_it_here() -> None:
    """A drain fights no person; the order given again is the newer word."""
    its = wish(of=5, host="alpha")
    assert why_kept(its, me="alpha", drain_revision=6, held=False) is None
    assert "written after the drain began" in str(why_kept(its, me="alpha", drain_revision=4, held=False))
    assert why_kept(its, me="beta", drain_revision=4, held=False) is None
    assert "confirm-removal" in str(why_kept(its, me="alpha", drain_revision=6, held=True))


def test_whom_its_keys_name() -> None:
    assert named_hosts(wish(host="alpha", hosts="alpha beta *"), "alpha") == (("beta", "*"), None)
    here = Placement(host=HostName("alpha"), why="drain", since="", of=5)
    assert named_hosts(wish(host="home", hosts="alpha", placed=here), "alpha") == ((), "home")


# --- the keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "mode", "odd"),
    [(b"", Mode.LIVE, ""), (b" cold\n", Mode.COLD, ""), (b"stop", Mode.STOP, ""),
     (b"yes", Mode.LIVE, "its key `drain` holds 'yes', which counts as live; live, cold, stop would be right"),
     (b"\xff", Mode.LIVE, "not UTF-8")],
)  # fmt: skip
def test_the_key_of_a_drain(value: bytes, mode: Mode, odd: str) -> None:
    """Whoever writes it wants the host empty; what cannot be read stops no guest."""
    found = HostWish.of(RawValue(value, 7), None)
    assert (found.drain, found.drain_revision) == (mode, 7)
    assert odd in found.odd
    assert bool(odd) == bool(found.odd)


def test_the_key_of_a_return_stops_only_for_cold() -> None:
    assert HostWish.of(None, RawValue(b"cold", 7)).return_cold
    found = HostWish.of(None, RawValue(b"stop", 7))
    assert (found.return_revision, found.return_cold) == (7, False)
    assert "`return` holds 'stop'" in found.odd


def test_progress_is_read_as_it_was_written() -> None:
    said = HostProgress(
        host="alpha", mode=Mode.COLD, of=3, since="t", left=("1", "2"), moving={"1": "beta"}, moved={"3": "beta"},
        refused={"2": "files"}, drained=None,
    )  # fmt: skip
    assert HostProgress.from_json(said.to_json()) == said
    assert HostProgress.from_json(b"{}") is None
    assert HostProgress.from_json(said.to_json().replace(b'"version":1', b'"version":2')) is None


def test_when_only_people_can_go_on() -> None:
    said = HostProgress(host="alpha", mode=Mode.LIVE, of=3, since="t", left=("1", "2"), refused={"1": "a", "2": "b"})
    assert said.waits_for_people
    assert not replace(said, moving={"1": "beta"}).waits_for_people
    assert not replace(said, refused={"1": "a"}).waits_for_people
    assert not replace(said, left=()).waits_for_people
