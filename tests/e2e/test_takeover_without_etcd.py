"""etcd goes away under machines on Ceph: they write on, nobody takes them, nothing is killed (law 6)."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from tests.support.ceph import Ceph
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.etcd import EtcdCluster
from tests.support.farm import TTL_S, Farm, writer_image
from tests.support.proxy import Line


class Pair:
    """Two hosts, each with a machine that the other may take over, and a line of its own to each of etcd's members."""

    def __init__(self, farm: Farm, lines: dict[str, Line], ttl_s: int) -> None:
        self.farm, self.lines = farm, lines
        self.hosts = {
            name: farm.host(
                name,
                KVM_TAKEOVER_WAIT="600",
                KVM_SESSION_TTL=f"{ttl_s}",
                ETCD_ENDPOINTS=",".join(f"http://127.0.0.1:{port}" for port in line.ports),
            )
            for name, line in lines.items()
        }
        farm.machine("alpha", "1", hosts="alpha beta")
        farm.machine("beta", "2", hosts="beta alpha")
        self.before = {
            **self.hosts["alpha"].wait_running("1"),
            **self.hosts["beta"].wait_running("2"),
        }
        self.locks = {one: farm.lock(one) for one in ("1", "2")}

    def check_in_the_middle(self) -> None:
        """What runs is what ran, and its guests write."""
        for one, qemu in self.before.items():
            assert qemu.alive
            self.farm.writes(one)

    def check(self) -> None:
        """All is as it was: the same processes, the same locks, nobody has taken anything or lost any machine."""
        for host in self.hosts.values():
            host.wait_ready()
        self.check_in_the_middle()
        assert self.hosts["alpha"].wait_running("1") | self.hosts["beta"].wait_running("2") == self.before
        assert {one: self.farm.lock(one) for one in self.locks} == self.locks
        for name, one in (("alpha", "1"), ("beta", "2")):
            host, keys = self.hosts[name], self.farm.keys
            host.wait_for(one, lambda status: status.reason == "runs")
            assert len(host.qemus()) == 1
            assert keys.get(keys.layout.wish_key(InstanceId(one), "host")) == name.encode()
            assert host.metric("takeovers_total") == host.metric("fences_total") == 0
            assert not host.events("instance.ended")
            assert not host.events("lock.taken", level="warning")
        assert self.farm.ceph.blocklist().isdisjoint(
            address for lock in self.locks.values() for address in lock.clients
        )

    def lost(self, name: str) -> int:
        """How often that host has lost its session."""
        return len(self.hosts[name].events("session.lost"))


@pytest.fixture
def two(etcd_cluster: EtcdCluster, hosts: Hosts, brisk_ceph: Ceph, ceph_image: str, tmp_path: Path) -> Farm:
    """Images for two machines, and hosts of a cluster whose etcd has three members."""
    images = [writer_image(brisk_ceph, f"{ceph_image}-{one}", tmp_path) for one in ("1", "2")]
    return Farm(Keys(etcd_cluster), hosts, brisk_ceph, *images)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("away_s", "ttl_s"), [(3 * TTL_S + 0.5, TTL_S), pytest.param(180, 15, marks=pytest.mark.soak)])
def test_outages_of_etcd(two: Farm, etcd_cluster: EtcdCluster, away_s: float, ttl_s: int) -> None:
    """Law 6: one host cut off, all cut off, no quorum: machines write on, none is taken, all locks are right again."""
    farm = two
    ports = [member.client_port for member in etcd_cluster.members]
    with contextlib.ExitStack() as stack:
        pair = Pair(farm, {name: stack.enter_context(Line(ports)) for name in ("alpha", "beta")}, ttl_s)

        # One host: its session is over, and the other may take what it runs, but for the disks in use (law 4).
        begin = time.monotonic()
        pair.lines["beta"].cut()
        gone = farm.keys.layout.session_key(HostName("beta"))
        eventually("the end of its session", lambda: farm.keys.get(gone) is None)
        eventually("beta to notice", lambda: pair.lost("beta"))
        _rest(begin, away_s)
        pair.check_in_the_middle()
        assert farm.lock("2") == pair.locks["2"]
        pair.lines["beta"].heal()
        pair.check()

        # All of them.
        begin, before = time.monotonic(), {name: pair.lost(name) for name in pair.hosts}
        for line in pair.lines.values():
            line.cut()
        eventually("all to notice", lambda: all(pair.lost(name) > lost for name, lost in before.items()))
        _rest(begin, away_s)
        pair.check_in_the_middle()
        for line in pair.lines.values():
            line.heal()
        pair.check()

        # etcd itself, for want of a quorum.
        begin, before = time.monotonic(), {name: pair.lost(name) for name in pair.hosts}
        for member in etcd_cluster.members[:2]:
            member.freeze()
        eventually("all to notice", lambda: all(pair.lost(name) > lost for name, lost in before.items()))
        _rest(begin, away_s)
        pair.check_in_the_middle()
        for member in etcd_cluster.members[:2]:
            member.thaw()
        etcd_cluster.wait_ready()
        pair.check()


def _rest(begin: float, away_s: float) -> None:
    """Let the outage last: it is the time itself that is tried here."""
    time.sleep(max(0.0, begin + away_s - time.monotonic()))
