"""Two supervisors on one etcd: a guest moves while it runs, by a new `host` (law 13)."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import LockState
from kvmsupervisor.domain.status import Phase
from tests.e2e.test_two_hosts import watched
from tests.support.ceph import Ceph
from tests.support.cluster import ROOT, Host, Hosts, Keys, eventually
from tests.support.farm import Farm
from tests.support.lock_history import check_lock_history

LISTEN: dict[str, Any] = {"KVM_MIGRATION_LISTEN": "127.0.0.1:0"}
SLOW = {"KVM_MIGRATION_BANDWIDTH": "1"}


def pair(hosts: Hosts, **settings: Any) -> tuple[Host, Host]:
    more: dict[str, Any] = {"KVM_SHUTDOWN_TIMEOUT": "1", **LISTEN, **settings}
    alpha, beta = (hosts(name, **more) for name in ("alpha", "beta"))
    return alpha.start(), beta.start()


def test_a_guest_moves_while_it_runs(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law 13: it goes on there in another process; here its QEMU is ended; there and back."""
    alpha, beta = pair(hosts)
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=16, extra_flags=tiny)
        before = alpha.wait_running("1")["1"]
        told = alpha.cli("move", "1", "beta", "--dry-run")
        assert (told.returncode, told.stdout) == (0, "1: live: it goes on running while it moves from alpha to beta\n")
        moved = alpha.cli("move", "1", "beta", "--wait")
        assert moved.returncode == 0, moved.stderr
        after = beta.wait_running("1")["1"]
        alpha.wait_forgotten("1")
        assert not before.alive
        assert "-incoming" in after.argv
        status = keys.wait_status("1", lambda s: s.phase is Phase.RUNNING and s.host == "beta")
        assert (status.pid, status.run_state) == (after.pid, "running")
        assert alpha.metric("migrations_total", result="completed") == 1
        (given,) = alpha.events("move.given")
        assert given["to"] == "beta"
        keys.put("1", host="alpha")
        alpha.wait_running("1")
        beta.wait_forgotten("1")
    locks = check_lock_history(keys, "1")
    assert [lock.state for lock in locks if lock.state is not LockState.STARTING] == [
        LockState.RUNNING, LockState.MIGRATING, LockState.GIVEN, LockState.RUNNING,
        LockState.MIGRATING, LockState.GIVEN, LockState.RUNNING,
    ]  # fmt: skip


def test_a_guest_that_has_come_moves_on_with_its_memory(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law 13: a QEMU tells of the transfer by which its guest came until it sends that on itself.

    Asked for its run state in between, its supervisor took the guest for one that was sent, and handed over nothing.
    """
    alpha, beta = pair(hosts)
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=16, extra_flags=tiny)
        alpha.wait_running("1")
        keys.put("1", host="beta")
        (before,) = beta.wait_running("1").values()
        alpha.wait_forgotten("1")
        alpha.freeze()
        keys.put("1", host="alpha")
        beta.wait_for("1", lambda s: "alpha" in s.reason)
        # A person's pause has it asked, while it waits for its target.
        beta.ask("1", "stop")
        beta.wait_for("1", lambda s: s.run_state == "paused")
        beta.ask("1", "cont")
        beta.wait_for("1", lambda s: s.run_state == "running")
        alpha.thaw()
        alpha.wait_running("1")
        alpha.wait_for("1", lambda s: s.run_state == "running")
        beta.wait_forgotten("1")
        assert not before.alive
    (given,) = beta.events("move.given")
    assert given["bytes"] > 0
    assert len(alpha.events("move.arrived")) == 1


def test_a_paused_guest_stays_paused(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law 13: who paused it lets it go on, wherever it is by then."""
    alpha, beta = pair(hosts)
    keys.machines("alpha", "1", ram=16, extra_flags=tiny)
    alpha.wait_running("1")
    alpha.ask("1", "stop")
    alpha.wait_for("1", lambda s: s.run_state == "paused")
    keys.put("1", host="beta")
    status = beta.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid is not None)
    assert status.run_state == "paused"
    beta.ask("1", "cont")
    beta.wait_for("1", lambda s: s.run_state == "running")
    assert len(alpha.events("move.given")) == 1


def slow_move(keys: Keys, hosts: Hosts, tiny: str) -> tuple[Host, Host]:
    """A guest on its way, which takes seven seconds: nine bytes for each page of its memory, which is empty."""
    alpha, beta = pair(hosts, **SLOW)
    keys.machines("alpha", "1", ram=3072, extra_flags=tiny)
    alpha.wait_running("1")
    keys.put("1", host="beta")
    eventually("the transfer", lambda: (lock := keys.lock("1")) and lock.state is LockState.MIGRATING)
    return alpha, beta


@pytest.mark.parametrize("who", ["host written back", "target's QEMU", "target", "source"])
def test_a_move_that_comes_to_nothing_leaves_it_running_at_the_source(
    keys: Keys, hosts: Hosts, tiny: str, who: str
) -> None:
    """Law 13: cancelled, with the target dead, or with a new supervisor at the source: it runs on in its process."""
    alpha, beta = slow_move(keys, hosts, tiny)
    (before,) = alpha.qemus()
    with watched(alpha, beta):
        match who:
            case "host written back":
                keys.put("1", host="alpha")
            case "target's QEMU":
                for qemu in beta.qemus():
                    qemu.kill()
            case "target":
                beta.kill9()
            case _:
                alpha.kill9()
                alpha.start()
        eventually("the end of it", lambda: (lock := keys.lock("1")) and lock.state is LockState.RUNNING)
        if keys.status("1") is not None and who == "host written back":
            beta.wait_forgotten("1")
            assert beta.qemus() == []
        assert before.alive or keys.lock("1").host == "beta"  # type: ignore[union-attr]
        keys.put("1", host="alpha")
        alpha.wait_running("1")
    check_lock_history(keys, "1")


def test_it_tells_how_far_it_is(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """§6: bytes, rate and what is left while it is sent, from where to where; at the end how long the guest stood."""
    alpha, beta = slow_move(keys, hosts, tiny)
    status = keys.wait_status("1", lambda s: s.move is not None and s.move.sent_bytes > 0)
    assert status.move is not None
    assert (status.phase, status.move.source, status.move.target) == (Phase.MIGRATING, "alpha", "beta")
    assert status.move.stopped_ms is None
    assert "alpha → beta" in beta.cli("list").stdout
    moved = alpha.cli("move", "1", "beta", "--wait", "--timeout", "80")
    assert moved.returncode == 0, moved.stderr
    assert " %: " in moved.stderr
    assert " MiB left, " in moved.stderr
    assert "its guest stood still for " in moved.stdout
    after = keys.wait_status("1", lambda s: s.host == "beta" and s.phase is Phase.RUNNING and s.move is not None)
    assert after.move is not None
    assert after.move.source == "alpha"
    assert after.move.stopped_ms is not None
    assert alpha.metric("migration_sent_bytes_total") > 1 << 20
    assert alpha.metric("migration_downtime_seconds_total") > 0


def test_ctrl_c_twice_calls_it_off(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """§6: once asks, twice writes `host` back: the guest runs on where it was."""
    alpha, beta = pair(hosts, **SLOW)
    keys.machines("alpha", "1", ram=3072, extra_flags=tiny)
    (before,) = alpha.wait_running("1").values()
    command = [sys.executable, "-m", "kvmsupervisor", "move", "1", "beta", "--wait"]
    with subprocess.Popen(
        command, cwd=ROOT, env=alpha.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as moving:
        assert moving.stderr is not None
        eventually("the transfer", lambda: (lock := keys.lock("1")) and lock.state is LockState.MIGRATING)
        moving.send_signal(signal.SIGINT)
        said = ""
        while "Ctrl-C again" not in said:
            said = moving.stderr.readline()
            assert said, "it has ended"
        moving.send_signal(signal.SIGINT)
        out, _ = moving.communicate(timeout=60)
    assert moving.returncode == 130
    assert "called off: `host` is alpha again" in out
    alpha.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.run_state == "running")
    beta.wait_forgotten("1")
    assert before.alive
    assert keys.get(f"{keys.layout.prefix}/1/host") == b"alpha"
    assert alpha.metric("migrations_total", result="cancelled") == 1


def test_an_offer_from_before_is_none(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """`host` written to and fro leaves an offer to whose key nobody answers: the next one is waited for."""
    alpha, beta = pair(hosts, KVM_SESSION_TTL="60")
    keys.machines("alpha", "1", ram=16, extra_flags=tiny)
    alpha.wait_running("1")
    alpha.freeze()
    keys.put("1", host="beta")
    eventually("the offer", lambda: keys.get(keys.layout.offer_key(InstanceId("1"))))
    keys.put("1", host="alpha")
    beta.wait_forgotten("1")
    beta.freeze()
    alpha.thaw()
    keys.put("1", host="beta")
    alpha.wait_for("1", lambda s: "waits until beta has said that it takes it" in s.reason)
    beta.thaw()
    beta.wait_running("1")
    assert alpha.events("move.failed") == []


def test_a_host_without_live_moves_gets_it_cold(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A mixed cluster moves cold, and says why."""
    alpha = hosts("alpha", KVM_SHUTDOWN_TIMEOUT="1", KVM_MIGRATION_LISTEN="127.0.0.1:0").start()
    beta = hosts("beta", KVM_SHUTDOWN_TIMEOUT="1").start()
    keys.machines("alpha", "1", ram=16, extra_flags=tiny)
    before = alpha.wait_running("1")["1"]
    told = alpha.cli("move", "1", "beta", "--dry-run")
    assert told.returncode == 1
    assert "beta takes no guest live" in told.stdout
    keys.put("1", host="beta")
    after = beta.wait_running("1")["1"]
    assert not before.alive
    assert "-incoming" not in after.argv
    assert any("beta takes no guest live" in str(event.get("reason")) for event in alpha.events("instance.stopping"))


def test_it_moves_on_ceph(farm: Farm) -> None:
    """Law 13: its disk's writes go on, none is lost, no second client writes, and nobody has to be shut out."""
    ceph: Ceph = farm.ceph
    alpha, beta = (farm.host(name, **LISTEN) for name in ("alpha", "beta"))
    with watched(alpha, beta):
        farm.machine("alpha", cpu="qemu64")
        alpha.wait_running("1")
        farm.writes()
        first = farm.address
        farm.keys.put("1", host="beta")
        beta.wait_running("1")
        alpha.wait_forgotten("1")
        farm.writes()
        lock = farm.lock()
        assert (lock.host, lock.state, lock.epoch) == ("beta", LockState.RUNNING, 2)
        assert lock.fence == (first,)
        assert lock.clients != (first,)
    assert first not in ceph.ceph("osd", "blocklist", "ls")
    assert len(alpha.events("move.given")) == 1
    check_lock_history(farm.keys, "1")


def test_a_source_that_hangs_is_shut_out(farm: Farm) -> None:
    """Law 13: a source's QEMU that does not let go of the disks after the hand-over keeps no guest waiting."""
    alpha, beta = (farm.host(name, **LISTEN) for name in ("alpha", "beta"))
    farm.machine("alpha", cpu="qemu64")
    (before,) = alpha.wait_running("1").values()
    farm.writes()
    farm.keys.put("1", host="beta")
    eventually(
        "the hand-over", lambda: farm.lock().state is LockState.GIVEN or farm.lock().host == "beta", poll_s=0.001
    )
    before.signal(signal.SIGSTOP)
    beta.wait_running("1")
    farm.writes()
    assert farm.lock().host == "beta"
