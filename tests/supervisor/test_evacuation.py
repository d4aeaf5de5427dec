"""A host that empties itself, and takes back what is its own: several supervisors in virtual time, without live moves.

That a guest goes on while it moves is seen with real QEMUs, in tests/e2e/test_drain.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvmsupervisor.domain.host_wish import HostProgress
from kvmsupervisor.domain.status import Phase
from tests.supervisor.test_history import written_past
from tests.supervisor.test_moves import Node, Site


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    yield made
    await made.close()


def drain(site: Site, host: str, mode: str = "cold") -> None:
    site.etcd.write(f"/kvm/.hosts/{host}/drain", mode)


def undrain(site: Site, host: str) -> None:
    site.etcd.erase(f"/kvm/.hosts/{host}/drain")


def said_by(site: Site, host: str = "alpha") -> HostProgress:
    found = told(site, host)
    assert found is not None
    return found


def told(site: Site, host: str = "alpha") -> HostProgress | None:
    data = site.etcd.data.get(f"/kvmsupervisor/drains/{host}")
    return None if data is None else HostProgress.from_json(data)


async def until_drained(site: Site, host: str = "alpha", limit_s: float = 600.0) -> HostProgress:
    await site.clock.advance_until(lambda: (said := told(site, host)) is not None and said.drained, limit_s)
    return said_by(site, host)


async def until_refused(site: Site, *names: str, host: str = "alpha") -> HostProgress:
    await site.clock.advance_until(
        lambda: (said := told(site, host)) is not None and {*names} <= said.refused.keys(), 60.0
    )
    return said_by(site, host)


async def machines(site: Site, node: Node, *names: str, **keys: str) -> None:
    for name in names:
        site.put(name, **{"ram": "64", "host": node.name, "hosts": "beta gamma", **keys})
    for name in names:
        await node.runs(name)


def wishes(site: Site) -> dict[str, bytes]:
    return {key: value for key, value in site.etcd.data.items() if key.startswith("/kvm/") and "lock" not in key}


# --- a drain --------------------------------------------------------------------------------------------------


async def test_a_host_empties_itself_one_at_a_time_and_writes_no_wish(site: Site) -> None:
    """§6: the greatest priority first; placements say where they run, `host` stays as it was; the fact tells all."""
    alpha, beta, _ = await site.start("alpha", "beta", "gamma")
    await machines(site, alpha, "1", "2", "3")
    site.put("2", priority="9")
    drain(site, "alpha")
    before = wishes(site)
    most = 0
    for _ in range(300):
        await site.clock.advance(0.5)
        said = told(site)
        most = max(most, 0 if said is None else len(said.moving))
        if said is not None and said.drained:
            break
    said = said_by(site)
    assert (said.left, said.moving, said.refused) == ((), {}, {})
    assert next(iter(said.moved.items())) == ("2", "beta")
    assert said.moved == {"1": "beta", "2": "beta", "3": "beta"}
    assert said.drained is not None
    assert most == 1
    assert wishes(site) == before
    for name in "123":
        await beta.runs(name)
        placement = site.placement(name)
        assert placement is not None
        assert (placement.host, placement.why) == ("beta", "drain")
    assert alpha.guests == {}


async def test_live_stops_no_guest(site: Site) -> None:
    """§6: the default. Where no live move can be, everything stays, runs, and says why; in both places."""
    alpha, _ = await site.start("alpha", "beta")
    await machines(site, alpha, "1")
    guest = alpha.guests["1"]
    drain(site, "alpha", "live")
    said = await until_refused(site, "1")
    assert "beta cannot have it while its guest runs" in said.refused["1"]
    assert "gamma has no session" in said.refused["1"]
    assert said.waits_for_people
    await site.clock.advance(3600.0)
    assert alpha.guests == {"1": guest}
    assert site.placement() is None
    status = alpha.status()
    assert status is not None
    assert status.phase is Phase.RUNNING
    assert "this host drains (live), and it stays: beta cannot have it" in status.reason


async def test_what_is_refused_is_no_busy_loop(site: Site) -> None:
    """A machine that cannot go costs no writes while nothing changes."""
    alpha, _ = await site.start("alpha", "beta")
    await machines(site, alpha, "1")
    drain(site, "alpha", "live")
    await until_refused(site, "1")
    await site.clock.advance(60.0)
    before = len(alpha.client.writes)
    await site.clock.advance(600.0)
    assert len(alpha.client.writes) == before


async def test_what_cannot_go_says_why_and_the_others_go(site: Site) -> None:
    """§6: whom its keys name is not there; its keys name nobody; a person wants it here."""
    alpha, _ = await site.start("alpha", "beta")
    await machines(site, alpha, "1")
    await machines(site, alpha, "2", hosts="nobody")
    site.put("3", ram="64", host="alpha")
    await alpha.runs("3")
    drain(site, "alpha")
    said = await until_refused(site, "2", "3")
    await site.clock.advance_until(lambda: "1" not in alpha.guests, 60.0)
    await site.clock.advance(5.0)
    said = said_by(site)
    assert said.refused == {
        "2": "nobody has no session",
        "3": "it has no key `hosts`, and KVM_DRAIN_ANY is not 1 here: nobody else may run it",
    }
    assert (said.left, said.moved, said.drained) == (("2", "3"), {"1": "beta"}, None)


async def test_any_host_serves_where_that_is_set(site: Site) -> None:
    """KVM_DRAIN_ANY: for machines without the key only."""
    site.hosts["alpha"] = Node(site, "alpha")
    site.hosts["alpha"].more["KVM_DRAIN_ANY"] = "1"
    alpha, beta = await site.start("alpha", "beta")
    site.put("1", ram="64", host="alpha")
    await alpha.runs()
    drain(site, "alpha")
    await until_drained(site)
    await beta.runs()


async def test_nothing_starts_on_a_host_that_drains(site: Site) -> None:
    """§6: neither what is new, nor what is switched on, nor what ends; it starts elsewhere, or waits and says so."""
    alpha, beta = await site.start("alpha", "beta")
    site.put("2", ram="64", host="alpha", power="off", hosts="beta")
    await site.clock.advance(5.0)
    drain(site, "alpha", "live")
    await site.clock.advance(5.0)
    site.put("1", ram="64", host="alpha", hosts="beta")
    await site.clock.advance(60.0)
    status = alpha.status()
    assert status is not None
    assert status.phase is Phase.WAITING
    assert "this host drains (live): nothing is started here" in status.reason
    assert beta.guests == {}, "who wrote that `host` has seen the drain"
    assert site.placement("2") is None, "what is switched off stays where it is"
    site.put("2", power="on")
    await beta.runs("2")
    assert alpha.guests == {}
    undrain(site, "alpha")
    await alpha.runs("1")


async def test_stop_stops_what_has_no_other_place_and_only_then(site: Site) -> None:
    """§6: told so, and only so, a drain stops guests; they start again once it is over."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1")
    await machines(site, alpha, "2", hosts="nobody")
    drain(site, "alpha")
    await site.clock.advance(600.0)
    assert [*alpha.guests] == ["2"]
    drain(site, "alpha", "stop")
    await until_drained(site)
    await beta.runs("1")
    status = alpha.status("2")
    assert status is not None
    assert "this host drains (stop), and nobody takes it in: nobody has no session" in status.reason
    undrain(site, "alpha")
    await alpha.runs("2")
    assert told(site) is None


async def test_a_drain_survives_its_supervisor_and_the_host(site: Site) -> None:
    """§6: the next supervisor goes on, also after a reboot; the host comes back empty, and says why."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1", "2")
    drain(site, "alpha")
    await site.clock.advance_until(lambda: site.placement("1") is not None, 30.0)
    await alpha.crash()
    await alpha.start()
    said = await until_drained(site)
    assert said.moved == {"1": "beta", "2": "beta"}
    since = said.drained
    await alpha.die()
    await alpha.start()
    await site.clock.advance(30.0)
    said = said_by(site)
    assert said.drained == since
    assert alpha.guests == {}
    assert {*beta.guests} == {"1", "2"}


async def test_undrained_what_is_placed_stays_placed_and_nothing_else_goes(site: Site) -> None:
    """§6: taking the key away is the return to service."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1", "2")
    drain(site, "alpha")
    await site.clock.advance_until(lambda: site.placement("1") is not None, 30.0)
    undrain(site, "alpha")
    await beta.runs("1")
    await site.clock.advance(120.0)
    assert ([*alpha.guests], [*beta.guests]) == (["2"], ["1"])
    assert told(site) is None


async def test_two_hosts_that_drain_each_other_keep_what_they_have(site: Site) -> None:
    """Nothing goes to and fro: a host that drains takes nobody in."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1")
    await machines(site, beta, "2", hosts="alpha")
    drain(site, "alpha")
    drain(site, "beta")
    await until_refused(site, "1")
    await until_refused(site, "2", host="beta")
    await site.clock.advance(600.0)
    assert ([*alpha.guests], [*beta.guests]) == (["1"], ["2"])
    assert site.placement("1") is None
    assert site.placement("2") is None


async def test_many_hosts_that_drain_send_a_target_one_at_a_time(site: Site) -> None:
    """§6: one incoming at a time counts those of all hosts: each compares what the others have said."""
    names = ("alpha", "delta", "epsilon")
    nodes = await site.start(*names, "beta")
    for index, node in enumerate(nodes[:3]):
        await machines(site, node, f"{index}a", f"{index}b", hosts="beta")
    for name in names:
        drain(site, name)
    most = 0
    for _ in range(600):
        await site.clock.advance(0.5)
        facts = [said for name in names if (said := told(site, name)) is not None]
        most = max(most, sum(len(said.moving) for said in facts))
        if len(facts) == len(names) and all(said.drained for said in facts):
            break
    assert len(nodes[3].guests) == 6
    assert most == 1


async def test_a_newer_host_is_a_persons_word(site: Site) -> None:
    """Law 10: `host` written again sends it back here; the drain does not send it away once more."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1")
    drain(site, "alpha")
    await beta.runs()
    site.put("1", host="alpha")
    await site.clock.advance(300.0)
    assert [*beta.guests] == ["1"], "it stays there: alpha takes nobody in"
    undrain(site, "alpha")
    await alpha.runs()
    drain(site, "alpha")
    await beta.runs()


async def test_a_target_that_dies_before_it_has_taken_it_gets_it_no_more(site: Site) -> None:
    """A placement that leads nowhere is taken back, and the next host is asked; nobody else looks after it."""
    alpha, beta, gamma = await site.start("alpha", "beta", "gamma")
    await machines(site, alpha, "1")
    beta.client.away()
    drain(site, "alpha")
    await site.clock.advance_until(lambda: site.lock() is None, 60.0)
    assert site.placement("1") is not None
    await beta.die()
    await gamma.runs(limit_s=600.0)
    placement = site.placement("1")
    assert placement is not None
    assert placement.host == "gamma"


async def test_without_etcd_a_drain_waits(site: Site) -> None:
    """Loss of etcd stops the drain, and hurts nobody."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1")
    alpha.client.away()
    drain(site, "alpha")
    await site.clock.advance(300.0)
    assert [*alpha.guests] == ["1"]
    alpha.client.back()
    await until_drained(site)
    await beta.runs()


async def test_failover_does_not_choose_a_host_that_drains(site: Site) -> None:
    """§6: nothing new starts there, orphans neither."""
    alpha, beta, gamma = await site.start("alpha", "beta", "gamma")
    await machines(site, alpha, "1")
    drain(site, "beta")
    await site.clock.advance(5.0)
    await alpha.die()
    await gamma.runs(limit_s=120.0)
    assert beta.guests == {}


async def test_a_drain_that_came_with_a_backup_waits_for_a_person(site: Site) -> None:
    """Law 11: nothing goes until it is ordered again; nothing starts meanwhile."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1")
    drain(site, "alpha")
    backup = site.etcd.backup()
    undrain(site, "alpha")
    site.put("1", hosts="nobody")
    await site.clock.advance(1.0)
    site.etcd.restore(written_past(site.etcd, backup))
    await site.clock.advance(300.0)
    assert ([*alpha.guests], [*beta.guests]) == (["1"], [])
    assert "nothing goes until it is ordered again" in said_by(site).notice
    drain(site, "alpha")
    await beta.runs()
    assert alpha.guests == {}


async def test_a_held_order_keeps_a_machine_where_it_is(site: Site) -> None:
    """Law 11: what waits for `confirm-removal` is neither moved nor stopped by a drain."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1", "2", "3")
    for name in "123":
        site.drop(name)
    await site.clock.advance(5.0)
    assert {*alpha.guests} == {"1", "2", "3"}
    drain(site, "alpha", "stop")
    await site.clock.advance(300.0)
    assert {*alpha.guests} == {"1", "2", "3"}
    assert beta.guests == {}


async def test_a_host_that_stops_all_its_guests_sends_none_away(site: Site) -> None:
    """`stop --all --local`, as at a shutdown, is the later word: they end, and start nowhere else."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1", "2")
    alpha.drain(on=True)
    drain(site, "alpha")
    await site.clock.advance(300.0)
    assert (alpha.guests, beta.guests) == ({}, {})
    assert site.placement("1") is None
    assert site.placement("2") is None


async def test_fifty_machines(site: Site) -> None:
    """§6: two cannot go, one ends meanwhile, one target dies meanwhile: each of the others runs, and once."""
    site.hosts["alpha"] = Node(site, "alpha")
    site.hosts["alpha"].more["KVM_MIGRATION_PARALLEL"] = "4"
    alpha, beta, gamma = await site.start("alpha", "beta", "gamma")
    names = [f"m{number}" for number in range(50)]
    for name in names:
        site.put(name, ram="64", host="alpha", hosts="beta gamma")
    site.put("m1", hosts="nobody")
    site.put("m2", **{"disk/1": "file:data.qcow2 size=1G", "power": "off"})
    site.put("m3", restart="never")
    await site.clock.advance_until(lambda: len(alpha.guests) == 49, 300.0)
    drain(site, "alpha")
    alpha.guests["m3"].crash()
    await site.clock.advance_until(lambda: len(said_by(site).moved) >= 10, 600.0)
    await beta.die()
    await site.clock.advance_until(
        lambda: [*alpha.guests] == ["m1"] and {*gamma.guests} >= {*names} - {"m1", "m2", "m3"}, 1800.0
    )
    await site.clock.advance(10.0)
    assert len(gamma.guests) == 47
    assert said_by(site).refused == {"m1": "nobody has no session"}
    assert said_by(site).left == ("m1",)


# --- a return -------------------------------------------------------------------------------------------------


def take_back(site: Site, host: str, how: str = "cold") -> None:
    site.etcd.write(f"/kvm/.hosts/{host}/return", how)


async def drained(site: Site, *names: str, more: dict[str, str] | None = None) -> tuple[Node, Node]:
    """Alpha's machines stand on beta, and alpha is in service again."""
    site.hosts["alpha"] = Node(site, "alpha")
    site.hosts["alpha"].more |= more or {}
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, *names)
    drain(site, "alpha")
    await until_drained(site)
    for name in names:
        await beta.runs(name)
    undrain(site, "alpha")
    await site.clock.advance(5.0)
    return alpha, beta


async def test_nothing_comes_back_unasked(site: Site) -> None:
    """KVM_RETURN=asked, the default."""
    alpha, beta = await drained(site, "1")
    await site.clock.advance(3600.0)
    assert ([*alpha.guests], [*beta.guests]) == ([], ["1"])


async def test_asked_for_all_come_back_one_at_a_time(site: Site) -> None:
    """§6: at the same pace; their placements are deleted, and no wish was written."""
    alpha, beta = await drained(site, "1", "2", "3")
    before = wishes(site)
    take_back(site, "alpha")
    most = 0
    for _ in range(400):
        await site.clock.advance(0.5)
        said = told(site)
        most = max(most, 0 if said is None else len(said.moving))
        if len(alpha.guests) == 3 and told(site) is None:
            break
    assert {*alpha.guests} == {"1", "2", "3"}
    assert beta.guests == {}
    assert most == 1
    assert [site.placement(name) for name in "123"] == [None] * 3
    assert told(site) is None
    assert {key: value for key, value in wishes(site).items() if ".hosts" not in key} == before


async def test_a_return_while_it_is_still_leaving(site: Site) -> None:
    """It goes on to where it was on its way to, and comes back from there; where it belongs is in `host`."""
    alpha, beta = await site.start("alpha", "beta")
    await machines(site, alpha, "1", "2")
    drain(site, "alpha")
    await site.clock.advance_until(lambda: site.placement("1") is not None, 30.0)
    undrain(site, "alpha")
    take_back(site, "alpha")
    await site.clock.advance(120.0)
    assert {*alpha.guests} == {"1", "2"}
    assert beta.guests == {}
    assert site.placement("1") is None


async def test_what_a_person_has_moved_since_is_not_taken_back(site: Site) -> None:
    """Law 10: a newer `host` is where it belongs now."""
    alpha, beta = await drained(site, "1", "2")
    (gamma,) = await site.start("gamma")
    site.put("1", host="gamma")
    await gamma.runs("1")
    take_back(site, "alpha")
    await alpha.runs("2")
    await site.clock.advance(120.0)
    assert ([*alpha.guests], [*beta.guests], [*gamma.guests]) == (["2"], [], ["1"])


async def test_a_return_stops_no_guest_unless_told(site: Site) -> None:
    """Without `cold` what cannot be moved live stays, and the fact says why."""
    alpha, beta = await drained(site, "1")
    guest = beta.guests["1"]
    take_back(site, "alpha", "live")
    said = await until_refused(site, "1")
    assert "alpha takes no guest live" in said.refused["1"]
    await site.clock.advance(3600.0)
    assert beta.guests == {"1": guest}
    assert alpha.guests == {}


async def test_a_return_is_about_what_stood_elsewhere_when_it_was_asked_for(site: Site) -> None:
    """The key stays; a later failover is not undone by it."""
    alpha, beta = await drained(site, "1")
    take_back(site, "alpha")
    await alpha.runs()
    await site.clock.advance(10.0)
    await alpha.die()
    await beta.runs(limit_s=120.0)
    await alpha.start()
    await site.clock.advance(600.0)
    assert ([*alpha.guests], [*beta.guests]) == ([], ["1"])


async def test_a_host_that_drains_takes_nothing_back(site: Site) -> None:
    """The two keys may stand beside each other."""
    alpha, beta = await drained(site, "1")
    drain(site, "alpha")
    await site.clock.advance(5.0)
    take_back(site, "alpha")
    await site.clock.advance(300.0)
    assert ([*alpha.guests], [*beta.guests]) == ([], ["1"])


async def test_auto_waits_until_the_host_has_been_there_for_a_while(site: Site) -> None:
    """KVM_RETURN=auto: a machine whose guest does not run starts at home; one that runs would have to be stopped."""
    alpha, beta = await drained(site, "1", more={"KVM_RETURN": "auto"})
    site.put("1", restart="never")
    await site.clock.advance(90.0)
    assert [*beta.guests] == ["1"]
    await asyncio.sleep(0)
    said = said_by(site)
    assert "takes no guest live" in said.refused["1"]
    assert alpha.guests == {}
