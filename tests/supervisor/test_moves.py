"""Where an instance runs, with several supervisors in virtual time: moves that need somebody to move to, placements."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvmsupervisor.adapters.clock import boot_id
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.supervisor.host import Host
from kvmsupervisor.supervisor.supervisor import Supervisor
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemu, FakeQemus
from tests.support.outside import outside

NBSP = "\u00a0"


class Site:
    """One etcd, and hosts that come and go."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.etcd = FakeEtcd(self.clock.now)
        self.qemus = FakeQemus(self.clock)
        self.hosts: dict[str, Node] = {}

    async def start(self, *names: str) -> list[Node]:
        nodes = [self.hosts.setdefault(name, Node(self, name)) for name in names]
        for node in nodes:
            await node.start()
        return nodes

    def put(self, name: str, **keys: str) -> None:
        for key, value in keys.items():
            self.etcd.write(f"/kvm/{name}/{key}", value)

    def drop(self, name: str) -> None:
        self.etcd.erase(*(key for key in self.etcd.data if key.startswith(f"/kvm/{name}/")))

    def placement(self, name: str = "1") -> Placement | None:
        data = self.etcd.data.get(f"/kvmsupervisor/placements/{name}")
        return None if data is None else Placement.from_json(data)

    def lock(self, name: str = "1") -> Lock | None:
        data = self.etcd.data.get(f"/kvm/{name}/lock")
        return None if data is None else Lock.from_json(data)

    def published(self, name: str = "1") -> Status | None:
        data = self.etcd.data.get(f"/kvmsupervisor/instances/{name}")
        return None if data is None else Status.from_json(data)

    def left(self) -> list[str]:
        """All keys but those of the hosts, and of the history."""
        others = ("/kvmsupervisor/hosts/", "/kvmsupervisor/history")
        return [key for key in self.etcd.data if not key.startswith(others)]

    async def close(self) -> None:
        for node in self.hosts.values():
            await node.crash()
            shutil.rmtree(node.path)


class Node:
    """One host."""

    def __init__(self, site: Site, name: str) -> None:
        self.site, self.name = site, name
        self.path = Path(tempfile.mkdtemp(prefix="kvs"))
        self.client = site.etcd.peer()
        self.supervisor: Supervisor
        self.host: Host
        self.more: dict[str, str] = {}
        self._task: asyncio.Task[bool] | None = None

    async def start(self) -> None:
        environ = {
            "ETCD_ENDPOINTS": "http://127.0.0.1:1",
            "KVM_HOSTNAME": self.name,
            "KVM_RUN_DIR": str(self.path),
            "KVM_LISTEN": "off",
            "KVM_ACCEL": "tcg",
            "KVM_CGROUP": "none",
            **self.more,
        }
        self.client = self.site.etcd.peer()
        settings = load_settings(environ, default_config=self.path / "none.toml")
        self.supervisor = Supervisor(settings, outside(self.site.qemus, lambda: self.client))
        self._task = asyncio.create_task(self.supervisor.run(self._started))
        await self.site.clock.advance(5.0)

    def _started(self, host: Host) -> None:
        self.host = host

    async def stop(self) -> None:
        """The supervisor ends in order; its guests run on."""
        task, self._task = self._task, None
        assert task is not None
        self.supervisor.stop()
        while not task.done():
            await self.site.clock.advance(1.0)
        await task

    async def crash(self) -> None:
        """Its supervisor is gone at once; its guests run on."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.site.qemus.forsake(self.path)

    async def die(self, *, guests: bool = True) -> None:
        """The host is gone, and its session some seconds later."""
        await self.crash()
        if guests:
            for qemu in list(self.guests.values()):
                qemu.crash()
        await self.site.clock.advance(20.0)
        self.site.etcd.tick()
        await self.site.clock.advance(2.0)

    def drain(self, *, on: bool) -> None:
        """What `stop --all --local`, and `start --all --local`, do on this host."""
        mark = RunDir(self.path)
        mark.mark_draining(boot_id()) if on else mark.unmark_draining()
        self.supervisor.heed_draining()

    @property
    def guests(self) -> dict[str, FakeQemu]:
        """Those that run here."""
        return {q.instance: q for q in self.site.qemus.running if q.is_in(self.path / q.instance)}

    async def runs(self, name: str = "1", limit_s: float = 60.0) -> FakeQemu:
        await self.site.clock.advance_until(lambda: name in self.guests, limit_s)
        await self.site.clock.advance(2.0)
        return self.guests[name]

    def status(self, name: str = "1") -> Status | None:
        return next((status for status in self.host.http_view.instances() if status.id == name), None)

    def metric(self, line: str) -> float | None:
        text = self.host.http_view.metrics("")[0].decode()
        rows = (row.rpartition(" ") for row in text.splitlines())
        return next((float(value) for key, _, value in rows if key == f"kvmsupervisor_{line}"), None)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    yield made
    await made.close()


# --- somebody to move to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["beta", f"beta{NBSP}", " beta\n"])
async def test_a_move_begins_when_somebody_is_there(site: Site, value: str) -> None:
    """Law 10: `host` names a host without a session: the guest runs on where it is, and moves when that host comes."""
    (alpha,) = await site.start("alpha")
    site.put("1", ram="64", host="alpha")
    guest = await alpha.runs()
    site.put("1", host=value)
    await site.clock.advance(3600.0)
    assert alpha.guests == {"1": guest}
    assert not guest.presses
    status = alpha.status()
    assert status is not None
    assert (status.phase, status.awaited_host) == (Phase.RUNNING, "beta")
    assert status.reason == "runs; its `host` is beta, which has no session: it stays here until beta is there"
    assert site.published() == status
    assert alpha.metric('instance_host_absent{host="alpha",instance="1"}') == 1
    (beta,) = await site.start("beta")
    await beta.runs()
    assert not guest.alive
    assert alpha.guests == {}
    assert alpha.status() is None
    lock = site.lock()
    assert lock is not None
    assert (lock.host, lock.epoch) == ("beta", 2)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("bteaworker", "betaworker"), ("betaworker.example.org", "betaworker"), ("Betaworker", "betaworker"), ("x", None)],
)
async def test_who_was_probably_meant(site: Site, typed: str, meant: str | None) -> None:
    """§4: the reason names the host with a session whose name comes close."""
    alpha, _ = await site.start("alpha", "betaworker")
    site.put("1", ram="64", host="alpha")
    await alpha.runs()
    site.put("1", host=typed)
    await site.clock.advance(5.0)
    status = alpha.status()
    assert status is not None
    said = "" if meant is None else f" (did you mean {meant}?)"
    assert f"its `host` is {typed}, which has no session{said}: it stays here until {typed} is there" in status.reason


async def test_only_a_clear_order_stops_a_guest_whose_host_is_nobody(site: Site) -> None:
    """§4: `power=off`, or no `host` at all; then it is gone from here, and nobody's."""
    (alpha,) = await site.start("alpha")
    for name in "12":
        site.put(name, ram="64", host="alpha")
    await alpha.runs("1")
    await alpha.runs("2")
    site.put("1", host="nowhere")
    site.put("2", host="nowhere")
    await site.clock.advance(60.0)
    assert alpha.guests.keys() == {"1", "2"}
    site.put("1", power="off")
    site.etcd.erase("/kvm/2/host")
    await site.clock.advance(60.0)
    assert alpha.guests == {}
    assert (site.lock("1"), site.lock("2")) == (None, None)


async def test_what_ends_meanwhile_is_started_where_it_was(site: Site) -> None:
    """§4: it stays here: that is where it is restarted, too, and what a successor of the supervisor adopts."""
    (alpha,) = await site.start("alpha")
    site.put("1", ram="64", host="alpha")
    guest = await alpha.runs()
    site.put("1", host="nowhere")
    await site.clock.advance(5.0)
    guest.crash()
    again = await alpha.runs()
    assert again is not guest
    await alpha.crash()
    await alpha.start()
    assert await alpha.runs() is again
    status = alpha.status()
    assert status is not None
    assert status.awaited_host == "nowhere"


async def test_a_removal_of_what_stays_is_held_like_any_other(site: Site) -> None:
    """§4: guests whose `host` is nobody count as this host's: losing them all at once is held."""
    (alpha,) = await site.start("alpha")
    names = "1234"
    for name in names:
        site.put(name, ram="64", host="alpha")
    for name in names:
        await alpha.runs(name)
        site.put(name, host="nowhere")
    await site.clock.advance(5.0)
    site.etcd.erase(*(key for key in site.etcd.data if key.startswith("/kvm/")))
    await site.clock.advance(60.0)
    assert alpha.guests.keys() == set(names)


async def test_hosts_that_name_each_other(site: Site) -> None:
    """§4: two guests change places: neither host waits for the other."""
    alpha, beta = await site.start("alpha", "beta")
    site.put("1", ram="64", host="alpha")
    site.put("2", ram="64", host="beta")
    await alpha.runs("1")
    await beta.runs("2")
    site.put("1", host="beta")
    site.put("2", host="alpha")
    await alpha.runs("2")
    await beta.runs("1")
    assert alpha.guests.keys() == {"2"}
    assert beta.guests.keys() == {"1"}


async def test_a_host_key_that_flaps_stops_nothing(site: Site) -> None:
    """§4: between hosts that are not there, however often."""
    (alpha,) = await site.start("alpha")
    site.put("1", ram="64", host="alpha")
    guest = await alpha.runs()
    for number in range(50):
        site.put("1", host=f"nowhere{number % 3}" if number % 2 else "alpha")
        await site.clock.advance(0.3)
    assert alpha.guests == {"1": guest}
    assert not guest.presses


async def test_a_target_that_goes_before_the_button_is_pressed(site: Site) -> None:
    """§4: a host that has no session any more when it is read is nobody to move to."""
    alpha, beta = await site.start("alpha", "beta")
    site.put("1", ram="64", host="alpha")
    guest = await alpha.runs()
    await beta.die()
    site.put("1", host="beta")
    await site.clock.advance(60.0)
    assert alpha.guests == {"1": guest}
    await beta.start()
    await beta.runs()
    assert not guest.alive


async def test_a_target_that_goes_while_it_shuts_down(site: Site) -> None:
    """§4: a deaf guest, asked to shut down, runs on when its target is gone before force was due."""
    alpha, beta = await site.start("alpha", "beta")
    site.put("1", ram="64", host="alpha")
    guest = await alpha.runs()
    guest.deaf = True
    site.put("1", host="beta")
    await site.clock.advance(10.0)
    assert guest.presses
    await beta.die()
    await site.clock.advance(600.0)
    assert alpha.guests == {"1": guest}
    status = alpha.status()
    assert status is not None
    assert status.phase is Phase.RUNNING


async def test_a_target_that_stops_all_its_guests(site: Site) -> None:
    """§4: a host that drains (`stop --all --local`) has a session, and runs nothing: it is nobody to move to."""
    alpha, beta = await site.start("alpha", "beta")
    site.put("1", ram="64", host="alpha")
    guest = await alpha.runs()
    beta.drain(on=True)
    await site.clock.advance(5.0)
    site.put("1", host="beta")
    await site.clock.advance(60.0)
    assert alpha.guests == {"1": guest}
    status = alpha.status()
    assert status is not None
    assert (
        "`host` is beta, which drains, or stops all its guests just now: it stays here until that ends" in status.reason
    )
    # Its next supervisor says so, too.
    await beta.stop()
    await beta.start()
    await site.clock.advance(60.0)
    assert alpha.guests == {"1": guest}
    beta.client.away()
    beta.drain(on=False)
    await site.clock.advance(3.0)
    assert alpha.guests == {"1": guest}
    beta.client.back()
    await beta.runs()
    assert not guest.alive


async def test_it_waits_while_this_host_cannot_hand_over(site: Site) -> None:
    """§4: without a session of its own, a host begins no move: the guest would be down until etcd is back."""
    alpha, beta = await site.start("alpha", "beta")
    site.put("1", ram="64", host="alpha")
    guest = await alpha.runs()
    alpha.client.away()
    await site.clock.advance(30.0)
    site.put("1", host="beta")
    await site.clock.advance(60.0)
    assert alpha.guests == {"1": guest}
    alpha.client.back()
    await beta.runs(limit_s=300.0)
    assert not guest.alive


# --- placements -------------------------------------------------------------------------------------------------


async def failed_over(site: Site, *names: str, hosts: str = "beta gamma") -> list[Node]:
    """A machine of alpha's that beta runs, as alpha is gone."""
    nodes = await site.start("alpha", *names)
    site.put("1", ram="64", host="alpha", hosts=hosts)
    await nodes[0].runs()
    await nodes[0].die()
    await nodes[1].runs()
    return nodes


async def test_failover_writes_no_wish(site: Site) -> None:
    """Law 10: `host` stays as people wrote it, down to its revision; a placement says where it runs, and why."""
    await site.start("alpha", "beta")
    site.put("1", ram="64", host="alpha", hosts="beta")
    await site.hosts["alpha"].runs()
    wishes = {key: value for key, value in site.etcd.data.items() if key.startswith("/kvm/") and "lock" not in key}
    of = (await site.etcd.get("/kvm/1/host")).mod_revision  # type: ignore[union-attr]
    await site.hosts["alpha"].die()
    beta = site.hosts["beta"]
    await beta.runs()
    data = site.etcd.data
    assert {key: value for key, value in data.items() if key.startswith("/kvm/") and "lock" not in key} == wishes
    placement = site.placement()
    assert placement is not None
    assert (placement.host, placement.why, placement.of) == ("beta", "failover", of)
    assert json.loads(data["/kvmsupervisor/placements/1"]).keys() == {
        "version",
        "host",
        "why",
        "since",
        "of",
        "only_live",
    }
    status = beta.status()
    assert status is not None
    assert (status.host, status.placed_for) == ("beta", "alpha")
    assert status.reason == f"runs in place of alpha, since {placement.since} (failover), until `host` is written again"
    assert beta.metric('instance_placed{home="alpha",host="beta",instance="1"}') == 1
    assert not [write for write in beta.client.writes if write.key.startswith("/kvm/") and write.key != "/kvm/1/lock"]


async def test_the_host_that_is_back_leaves_it_where_it_is(site: Site) -> None:
    """Law 10: alpha is back: nothing of it starts there, and nothing is written; beta's guest is not touched."""
    alpha, beta, _ = await failed_over(site, "beta", "gamma")
    guest = beta.guests["1"]
    await alpha.start()
    revision = site.etcd.revision
    await site.clock.advance(3600.0)
    assert (alpha.guests, beta.guests) == ({}, {"1": guest})
    assert alpha.status() is None
    assert site.lock() is not None
    assert site.etcd.revision == revision, "nothing is written while nothing changes"


async def test_the_guest_that_ran_on_is_killed_when_its_host_reads_the_lock(site: Site) -> None:
    """Laws 6 and 10: a host that had only lost etcd kills its own, and leaves the placed one alone."""
    alpha, beta = await site.start("alpha", "beta")
    site.put("1", ram="64", host="alpha", hosts="beta")
    old = await alpha.runs()
    await alpha.die(guests=False)
    new = await beta.runs()
    assert old.alive
    await alpha.start()
    await site.clock.advance(60.0)
    assert (old.alive, new.alive) == (False, True)
    assert (alpha.guests, beta.guests) == ({}, {"1": new})


@pytest.mark.parametrize("there", ["alpha", "beta"])
async def test_a_newer_host_ends_a_placement(site: Site, there: str) -> None:
    """Law 10: whoever writes `host` again says where it runs, also with the same value; and nothing is left of it."""
    alpha, beta, _ = await failed_over(site, "beta", "gamma")
    await alpha.start()
    guest = beta.guests["1"]
    site.put("1", host=there)
    node = site.hosts[there]
    if there == "alpha":
        await node.runs()
    await site.clock.advance(30.0)
    assert "1" in node.guests
    assert guest.alive == (there == "beta")
    assert site.placement() is None
    status = node.status()
    assert status is not None
    assert (status.placed_for, status.reason) == (None, "runs")


async def test_a_newer_host_that_is_not_there_moves_nothing(site: Site) -> None:
    """§4 and law 10: the guest stays where it was placed until somebody is there to move to."""
    _, beta, _ = await failed_over(site, "beta", "gamma")
    guest = beta.guests["1"]
    site.put("1", host="alpha")
    await site.clock.advance(600.0)
    assert beta.guests == {"1": guest}
    status = beta.status()
    assert status is not None
    assert status.awaited_host == "alpha"
    (alpha,) = await site.start("alpha")
    await alpha.runs()
    assert site.placement() is None


async def test_the_next_candidate_replaces_the_placement(site: Site) -> None:
    """Law 10: a placement on a host that is gone is an orphan's, too; it still stands in for the same `host`."""
    _, beta, gamma = await failed_over(site, "beta", "gamma")
    first = site.placement()
    assert first is not None
    await beta.die()
    await gamma.runs()
    second = site.placement()
    assert second is not None
    assert (second.host, second.of) == ("gamma", first.of)
    # And beta, back again, starts nothing.
    await beta.start()
    await site.clock.advance(600.0)
    assert beta.guests == {}
    assert gamma.guests.keys() == {"1"}


async def test_its_own_host_is_the_last_candidate(site: Site) -> None:
    """Law 10: where nobody else is left, it comes home, and the placement ends with that."""
    alpha, beta, gamma = await failed_over(site, "beta", "gamma")
    await gamma.die()
    await alpha.start()
    await beta.die()
    await alpha.runs()
    assert site.placement() is None
    status = alpha.status()
    assert status is not None
    assert status.placed_for is None


async def test_it_is_restarted_where_it_is_placed(site: Site) -> None:
    """Law 10: crash, stop and start, a supervisor's end, a host's reboot: it is beta's while the placement stands."""
    alpha, beta, _ = await failed_over(site, "beta", "gamma")
    await alpha.start()
    beta.guests["1"].crash()
    guest = await beta.runs()
    await beta.crash()
    await beta.start()
    assert beta.guests == {"1": guest}
    site.put("1", power="off")
    await site.clock.advance(30.0)
    assert site.lock() is None
    site.put("1", power="on")
    await beta.runs()
    assert alpha.guests == {}
    assert site.placement() is not None


async def test_a_removed_instance_leaves_no_placement(site: Site) -> None:
    """Law 10: running, or stopped and without a lock."""
    _, beta, _ = await failed_over(site, "beta", "gamma")
    site.drop("1")
    await site.clock.advance(60.0)
    assert beta.guests == {}
    assert site.left() == []


async def test_a_removed_instance_that_was_stopped_leaves_none_either(site: Site) -> None:
    """Law 10."""
    _, beta, _ = await failed_over(site, "beta", "gamma")
    site.put("1", power="off")
    await site.clock.advance(60.0)
    await beta.crash()
    site.drop("1")
    await beta.start()
    await site.clock.advance(60.0)
    assert site.left() == []


FOR_EVER = '{"version":1,"host":"gamma","why":"failover","since":"","of":9000000000000000000}'
NOWHERE = '{"version":1,"host":"../x","why":"failover","since":"","of":3}'


@pytest.mark.parametrize(
    "value", ["", "{", "[]", '{"version":2}', '{"host":"beta"}', "beta", "null", FOR_EVER, NOWHERE]
)
async def test_a_damaged_placement_starts_and_kills_nothing(site: Site, value: str) -> None:
    """Law 10: where it runs is not known then: what runs runs on, nothing starts, and it is said what to do."""
    alpha, beta, _ = await failed_over(site, "beta", "gamma")
    await alpha.start()
    guest = beta.guests["1"]
    site.etcd.write("/kvmsupervisor/placements/1", value)
    await site.clock.advance(60.0)
    assert (alpha.guests, beta.guests) == ({}, {"1": guest})
    status = beta.status()
    assert status is not None
    assert status.phase is Phase.RUNNING
    assert "delete that key" in status.problems[0]
    guest.crash()
    await site.clock.advance(60.0)
    assert (alpha.guests, beta.guests) == ({}, {})
    # Deleted, it is as `host` says.
    site.etcd.erase("/kvmsupervisor/placements/1")
    await alpha.runs()


async def test_a_placement_by_hand_moves_it(site: Site) -> None:
    """Law 10: a placement is where it runs, whoever wrote it; and the way back is to take it away."""
    alpha, beta = await site.start("alpha", "beta")
    site.put("1", ram="64", host="alpha")
    guest = await alpha.runs()
    host = await site.etcd.get("/kvm/1/host")
    assert host is not None
    value = json.dumps({"version": 1, "host": "beta", "why": "drain", "since": "now", "of": host.mod_revision})
    site.etcd.write("/kvmsupervisor/placements/1", value)
    await beta.runs()
    assert not guest.alive
    site.etcd.erase("/kvmsupervisor/placements/1")
    await alpha.runs()
    assert beta.guests == {}


async def test_a_takeover_by_an_older_release_ends_it(site: Site) -> None:
    """Mixed clusters: what an older supervisor writes on a failover is `host`, and that is newer than any placement."""
    _, beta, gamma = await failed_over(site, "beta", "gamma")
    await beta.die()
    await gamma.runs()
    site.put("1", host="gamma")
    await site.clock.advance(30.0)
    assert gamma.guests.keys() == {"1"}
    assert site.placement() is None
