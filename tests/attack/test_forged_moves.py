"""Who may write a lock forges a live move in it: whom the next supervisor shuts out in a real Ceph for that. Nobody."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import MOVING_VERSION, Destination, LockState
from kvmsupervisor.domain.status import Phase
from tests.attack.test_etcd_attack import as_root
from tests.e2e.test_live_move import pair
from tests.support.ceph import CLIENT_CAPS, Ceph
from tests.support.cluster import Host, Hosts, Keys, eventually

ONE = InstanceId("1")
VICTIM, ANOTHER = "192.0.2.77:0/4242", "192.0.2.77:0/4243"


@pytest.fixture
def beta(keys: Keys, hosts: Hosts, ceph: Ceph, tiny: str) -> Host:
    """A host to which a guest has come from another one while it ran."""
    ceph.new_client("vm", CLIENT_CAPS)
    alpha, beta = pair(hosts, **as_root(ceph), CEPH_ID="vm")
    keys.machines("alpha", "1", ram=16, extra_flags=tiny)
    alpha.wait_running("1")
    keys.put("1", host="beta")
    beta.wait_running("1")
    assert len(beta.events("move.arrived")) == 1
    return beta


def forge(keys: Keys, **changes: Any) -> None:
    lock = keys.lock("1")
    assert lock is not None
    forged = replace(lock, version=MOVING_VERSION, **changes)
    keys.write(keys.layout.lock_key(ONE), forged.to_json().decode())


def is_settled(keys: Keys) -> bool:
    lock = keys.lock("1")
    return lock is not None and lock.state is LockState.RUNNING


def test_a_forged_move_shuts_nobody_out(keys: Keys, beta: Host, ceph: Ceph) -> None:
    """B9, law 13: as `given` to a guest that runs, and as `migrating` to nobody. What is named stays on record."""
    forge(keys, state=LockState.GIVEN, taken_from="gone", fence=(VICTIM,))
    eventually("a lock", lambda: is_settled(keys))
    there = Destination(host=HostName("b"), boot_id="b", incarnation="i", pid=9, starttime=9, clients=(ANOTHER,))
    forge(keys, state=LockState.MIGRATING, to=there)
    eventually("a lock", lambda: is_settled(keys))
    # A person decides before its next start.
    beta.qemu("1").kill()
    waits = beta.wait_for("1", lambda status: ANOTHER in status.reason)
    assert (waits.phase, VICTIM in waits.reason) == (Phase.WAITING, True)
    assert not {VICTIM, ANOTHER} & ceph.blocklist()


@pytest.mark.soak  # QEMU is asked once a minute whether its guest has come
def test_a_forged_second_arrival_shuts_nobody_out(keys: Keys, beta: Host, ceph: Ceph) -> None:
    """B9, law 13: `given` to a guest that stands still: it goes on, and what the lock names would go before that."""
    beta.ask("1", "stop")
    beta.wait_for("1", lambda status: "paused" in status.reason)
    forge(keys, state=LockState.GIVEN, taken_from="gone", fence=(VICTIM,))
    eventually("its second arrival", lambda: len(beta.events("move.arrived")) == 2)
    eventually("a lock", lambda: is_settled(keys))
    assert VICTIM not in ceph.blocklist()
