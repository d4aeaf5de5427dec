"""Two instances that name one image, on a real Ceph and two hosts: one of them writes, and both say so.

What etcd has on record of both locks tells who may have written, at every moment.
"""

from __future__ import annotations

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, eventually
from tests.support.farm import Farm


def never_two(farm: Farm) -> None:
    """At no revision of etcd both locks said that their guests may run."""
    running: dict[str, bool] = {}
    for change in farm.keys.history(farm.keys.layout.wishes_prefix):
        if change.key.endswith("/lock"):
            lock = None if change.value is None else Lock.from_json(change.value)
            running[change.key] = lock is not None and lock.state is LockState.RUNNING
            assert sum(running.values()) <= 1, change


def settled(farm: Farm, winner: Host, wins: str, loser: Host, waits: str) -> None:
    """One writes; the other has neither a lock nor a QEMU; each names the other one."""
    winner.wait_for(wins, lambda s: s.phase is Phase.RUNNING and f"by the keys of {waits}, too" in s.reason)
    loser.wait_for(waits, lambda s: s.phase is Phase.WAITING and f"instance {wins}'s" in s.reason)
    eventually("the lock to be let go of", lambda: farm.keys.lock(waits) is None)
    assert [qemu.instance for qemu in (*winner.qemus(), *loser.qemus())] == [wins]
    lock = farm.lock(wins)
    assert farm.ceph.watchers(farm.image.name) == {*lock.clients}
    farm.writes()


def test_two_instances_of_one_image(farm: Farm) -> None:
    """FAULTS A8: a clone that kept its original's `rbd`, and its original that is killed; two at the same instant."""
    alpha, beta = farm.pair(wait_s=60)
    hosts = {"1": alpha, "2": beta}
    farm.machine("alpha")
    alpha.wait_running("1")
    clone = {
        farm.keys.layout.wish_key(InstanceId("2"), name): farm.keys.get(
            farm.keys.layout.wish_key(InstanceId("1"), name)
        )
        for name in ("ram", "rbd")
    }
    farm.keys.together(
        {key: value or b"" for key, value in clone.items()}
        | {farm.keys.layout.wish_key(InstanceId("2"), "host"): b"beta"}
    )
    settled(farm, alpha, "1", beta, "2")
    for _ in range(2):
        killed = alpha.qemu("1")
        killed.kill()
        alpha.wait_for("1", lambda s, killed=killed: s.phase is Phase.RUNNING and s.pid not in {None, killed.pid})  # type: ignore[misc]
        settled(farm, alpha, "1", beta, "2")
    # The waiting one has never had anything.
    assert farm.keys.history(farm.keys.layout.lock_key(InstanceId("2"))) == []
    for one in hosts:
        farm.keys.put(one, power="off")
    alpha.wait_for("1", Phase.STOPPED)
    beta.wait_for("2", Phase.STOPPED)
    farm.keys.together({farm.keys.layout.wish_key(InstanceId(one), "power"): b"on" for one in hosts})
    wins = eventually(
        "one of them to run",
        lambda: next((one for one, host in hosts.items() if (s := host.status(one)) and s.reason[:4] == "runs"), None),
    )
    waits = next(one for one in hosts if one != wins)
    settled(farm, hosts[wins], wins, hosts[waits], waits)
    hosts[wins].qemu(wins).kill()
    eventually("it to be back", lambda: [q.instance for host in hosts.values() for q in host.qemus()] == [wins])
    settled(farm, hosts[wins], wins, hosts[waits], waits)
    never_two(farm)
