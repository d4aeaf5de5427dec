"""A host at rest asks etcd for nothing but its session, and writes nothing, however many machines it has."""

from __future__ import annotations

import re
import urllib.request
from collections import Counter

from tests.support.cluster import Hosts, Keys, eventually
from tests.support.etcd import EtcdServer


def requests(etcd: EtcdServer) -> Counter[str]:
    """How often each RPC was called since etcd's start, and how many messages streams have received."""
    url = f"http://127.0.0.1:{etcd.member.metrics_port}/metrics"
    counted: Counter[str] = Counter()
    with urllib.request.urlopen(url, timeout=30) as reply:
        for line in reply.read().decode().splitlines():
            found = re.fullmatch(r'grpc_server_(?:started|msg_received)_total{.*grpc_method="(\w+)".*} (\S+)', line)
            if found is not None:
                counted[found[1]] += int(float(found[2]))
    return counted


def test_idle(etcd_alone: EtcdServer, hosts: Hosts, tiny: str) -> None:
    """Over several renewals: the store's revision stays, and only keepalives and their confirmations come in.

    Their number is that of the renewals, with one machine as with ten.
    """
    keys = Keys(etcd_alone)
    host = hosts(keys=keys, KVM_SESSION_TTL="2").start()
    per_renewal = []
    for machines in (["0"], [str(number) for number in range(1, 10)]):
        keys.machines(host.name, *machines, ram=16, extra_flags=tiny)
        host.wait_running(*machines)
        for one in machines:
            eventually(f"the status of {one}", lambda one=one: keys.status(one) == host.status(one))  # type: ignore[misc]
        before, revision = requests(etcd_alone), keys.revision
        eventually(
            "sixteen renewals, longer than a watch may be silent unprobed",
            lambda before=before: requests(etcd_alone)["LeaseKeepAlive"] >= before["LeaseKeepAlive"] + 32,  # type: ignore[misc]
        )
        assert keys.revision == revision
        asked = requests(etcd_alone) - before
        # Ours, by etcdctl: the revision, twice.
        asked["Range"] -= 4
        assert set(+asked) <= {"LeaseKeepAlive", "Range"}
        per_renewal.append(asked["Range"] / asked["LeaseKeepAlive"])
    one_machine, ten_machines = per_renewal
    assert 0.5 < one_machine < 1.5
    assert 0.5 < ten_machines < 1.5
