"""A host that empties itself while its guests run: real supervisors, real QEMUs, one etcd (§6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain.host_wish import HostProgress
from kvmsupervisor.domain.lock import LockState
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.status import Phase
from tests.chaos.armed import FAIL, KILL
from tests.e2e.test_live_move_points import armed
from tests.e2e.test_two_hosts import watched
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.lock_history import check_lock_history

SETTINGS: dict[str, Any] = {"KVM_SHUTDOWN_TIMEOUT": "1", "KVM_MIGRATION_LISTEN": "127.0.0.1:0"}


def told(keys: Keys, host: str = "alpha") -> HostProgress | None:
    found = keys.get(keys.layout.drain_fact_key(host))
    return None if found is None else HostProgress.from_json(found)


def placed_on(keys: Keys, name: str) -> str | None:
    found = keys.get(f"{keys.layout.placements_prefix}{name}")
    placement = None if found is None else Placement.from_json(found)
    return None if placement is None else placement.host


def start(hosts: Hosts, *names: str, **settings: Any) -> list[Host]:
    return [hosts(name, **SETTINGS, **settings).start() for name in names]


def test_a_host_empties_itself_and_takes_them_back(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path) -> None:
    """§6: all that can go goes live; two cannot, and say why; one ends meanwhile; then home again, live too."""
    (disks := tmp_path / "disks").mkdir()
    (alpha,) = start(hosts, "alpha", KVM_DISK_DIR=str(disks))
    beta, gamma = start(hosts, "beta", "gamma")
    with watched(alpha, beta, gamma):
        go = ("1", "2", "3")
        keys.machines("alpha", *go, ram=16, extra_flags=tiny, hosts="beta")
        keys.machines("alpha", "lone", ram=16, extra_flags=tiny, hosts="nobody")
        disk = {"disk/1": "file:data.qcow2 size=1M"}
        keys.machines("alpha", "local", ram=16, extra_flags=tiny, hosts="beta", **disk)
        keys.machines("alpha", "ends", ram=16, extra_flags=tiny, restart="never", priority=-9)
        before = alpha.wait_running(*go, "lone", "local", "ends")
        foretold = alpha.cli("drain", "--dry-run")
        assert foretold.returncode == 1
        assert "1: goes to beta, while it runs" in foretold.stdout
        assert "lone: stays: nobody has no session" in foretold.stdout
        assert "local: stays: " in foretold.stdout
        ordered = alpha.cli("drain")
        assert ordered.returncode == 0, ordered.stderr
        before["ends"].kill()
        waited = alpha.cli("drain", "--wait")
        assert waited.returncode == 1, waited.stdout + waited.stderr
        stays = waited.stderr.partition("alpha is not empty")[2].splitlines()[1:]
        assert [line.partition(" stays: ")[0] for line in stays] == ["local", "lone"], waited.stderr
        after = beta.wait_running(*go)
        for name in go:
            assert "-incoming" in after[name].argv, f"{name} was started anew"
            assert not before[name].alive
            assert placed_on(keys, name) == "beta"
        assert before["lone"].alive
        assert before["local"].alive
        assert alpha.metric("migrations_total", result="completed") == 3
        status = alpha.wait_for("lone", lambda s: "this host drains (live), and it stays" in s.reason)
        assert status.phase is Phase.RUNNING
        assert gamma.qemus() == []
        listed = beta.cli("hosts")
        assert "drains (live): 2 left" in listed.stdout

        home = alpha.cli("undrain", "--return")
        assert home.returncode == 0, home.stderr
        back = alpha.wait_running(*go)
        for name in go:
            beta.wait_forgotten(name)
            assert "-incoming" in back[name].argv, f"{name} was started anew"
            assert not after[name].alive
        eventually("the end of it", lambda: told(keys) is None and not any(placed_on(keys, name) for name in go))
        assert beta.qemus() == []
    for name in go:
        states = [lock.state for lock in check_lock_history(keys, name) if lock.state is not LockState.STARTING]
        assert states.count(LockState.GIVEN) == 2


def test_a_target_that_dies_meanwhile(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A guest whose target dies while it is sent runs on, and goes to the next one; it is never stopped."""
    slow = {"KVM_MIGRATION_BANDWIDTH": "1", "KVM_SESSION_TTL": "2"}
    alpha, beta, gamma = start(hosts, "alpha", "beta", "gamma", **slow)
    with watched(alpha, gamma):
        keys.machines("alpha", "1", ram=3072, extra_flags=tiny, hosts="beta gamma")
        (before,) = alpha.wait_running("1").values()
        assert alpha.cli("drain").returncode == 0
        eventually("the transfer", lambda: (lock := keys.lock("1")) and lock.state is LockState.MIGRATING)
        assert placed_on(keys, "1") == "beta"
        beta.kill9()
        eventually("another target", lambda: placed_on(keys, "1") == "gamma")
        assert before.alive
        (after,) = gamma.wait_running("1").values()
        assert "-incoming" in after.argv
        eventually("the host to be empty", lambda: (said := told(keys)) and said.drained)
    check_lock_history(keys, "1")


def test_a_supervisor_that_is_killed_goes_on(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A drain survives its supervisor, also between a placement and its move; undrained, what has begun goes on."""
    alpha, beta = start(hosts, "alpha", "beta", KVM_MIGRATION_BANDWIDTH="1")
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=3072, extra_flags=tiny, hosts="beta")
        keys.machines("alpha", "2", ram=16, extra_flags=tiny, hosts="beta", priority=-1)
        before = alpha.wait_running("1", "2")
        assert alpha.cli("drain").returncode == 0
        eventually("the placement", lambda: placed_on(keys, "1"))
        alpha.kill9()
        alpha.start()
        eventually("the transfer", lambda: (lock := keys.lock("1")) and lock.state is LockState.MIGRATING)
        assert beta.cli("undrain", "alpha").returncode == 0
        (after,) = beta.wait_running("1").values()
        assert "-incoming" in after.argv
        alpha.wait_forgotten("1")
        eventually("the fact to go", lambda: told(keys) is None)
        assert before["2"].alive
        assert placed_on(keys, "2") is None
    check_lock_history(keys, "1")


@pytest.mark.parametrize("way", [KILL, FAIL])
@pytest.mark.parametrize("step", ["to be placed", "placed"])
def test_cut_off(keys: Keys, hosts: Hosts, tiny: str, step: str, way: str) -> None:
    """A supervisor is killed before its placement, and between that and the move, or etcd fails it there."""
    (alpha, points), (beta, _) = (armed(hosts, host) for host in ("alpha", "beta"))
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=16, extra_flags=tiny, hosts="beta")
        (before,) = alpha.wait_running("1").values()
        points.arm(step, way)
        assert beta.cli("drain", "alpha").returncode == 0
        eventually(f"{step} is come to", lambda: points.was_met)
        if way == KILL:
            eventually("its end", lambda: not alpha.running)
            assert before.alive
            alpha.start()
        (after,) = beta.wait_running("1").values()
        assert "-incoming" in after.argv, "it was stopped"
        eventually("the host to be empty", lambda: (said := told(keys)) and said.drained)
        assert told(keys).moved == {"1": "beta"}  # type: ignore[union-attr]
    check_lock_history(keys, "1")


def test_with_locks_outside_the_prefix(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """As config/etcd-roles has it: a host follows only the locks that concern it, and needs no others for a drain."""
    lock = {"LOCK": f"{keys.layout.facts}/locks/%i"}
    alpha, beta = start(hosts, "alpha", "beta", **lock)
    with watched(alpha, beta):
        keys.machines("alpha", "1", "2", ram=16, extra_flags=tiny, hosts="beta")
        alpha.wait_running("1", "2")
        waited = beta.cli("drain", "alpha", "--wait")
        assert waited.returncode == 0, waited.stderr
        assert "alpha is empty since " in waited.stdout
        for qemu in beta.wait_running("1", "2").values():
            assert "-incoming" in qemu.argv
        assert beta.cli("undrain", "alpha", "--return").returncode == 0
        for qemu in alpha.wait_running("1", "2").values():
            assert "-incoming" in qemu.argv
        eventually("the end of it", lambda: told(keys) is None and placed_on(keys, "1") is None)
