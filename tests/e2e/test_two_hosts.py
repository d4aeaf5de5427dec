"""Two supervisors on one etcd: a machine moves, and never runs on both."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, Qemu, eventually
from tests.support.lock_history import check_lock_history


@contextmanager
def watched(*hosts: Host) -> Iterator[None]:
    """Look all the time at which guests run; fail if there ever were two of one instance."""
    twice: list[tuple[Qemu, Qemu]] = []
    done = threading.Event()

    def look() -> None:
        living = [(host, qemu) for host in hosts for qemu in host.qemus()]
        for index, (host, one) in enumerate(living):
            for other_host, other in living[index + 1 :]:
                if one.instance == other.instance and _runs(host, one) and _runs(other_host, other) and one.alive:
                    # The first was asked, then the second, and the first still lives: they overlapped.
                    twice.append((one, other))

    def keep_looking() -> None:
        while not done.wait(0.02):
            look()

    thread = threading.Thread(target=keep_looking)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not twice, twice


A_DISK = "-blockdev driver=null-co,node-name=disk"
"""Of a machine that writes to what cannot be fenced."""


STILL = {None, "prelaunch", "inmigrate", "finish-migrate", "postmigrate", "paused"}
"""Run states of QMP in which a guest stands still: it has not begun, or it is on its way."""


def _runs(host: Host, qemu: Qemu) -> bool:
    """Whether the guest runs, or has ended by itself."""
    return host.run_state(qemu) not in STILL


def test_a_host_that_looks_for_locks_elsewhere(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law 12: an empty host with a wrong LOCK takes nothing over: it would not see the lock of what runs elsewhere."""
    alpha = hosts("alpha").start()
    keys.put("1", ram=16, extra_flags=f"{tiny} {A_DISK}", host="alpha", shutdown_timeout=3)
    first = alpha.wait_running("1")["1"]
    beta = hosts("beta", LOCK="/elsewhere/%i/lock").start()
    with watched(alpha, beta):
        keys.put("2", ram=16, extra_flags=tiny, host="beta")
        said = beta.wait_for("2", lambda status: status.phase is Phase.WAITING and "LOCK is" in status.reason)
        assert said.reason.startswith(
            "LOCK is /elsewhere/%i/lock here, and another one on every other host "
            f"(alpha: {keys.layout.lock}), which may run it under that"
        )
        # Who has a lock goes on, also through a crash: nobody doubts that one.
        os.kill(first.pid, signal.SIGKILL)
        alpha.wait_for("1", lambda status: status.phase is Phase.RUNNING and status.pid not in {None, first.pid})
        # It is shut down there, which takes its time. Only a lock that beta does not see tells of that.
        keys.put("1", host="beta")
        beta.wait_for("1", lambda status: status.phase is Phase.WAITING and "LOCK is" in status.reason)
        beta.stop()
        del beta.settings["LOCK"]
        beta.start()
        beta.wait_running("1", "2")
    check_lock_history(keys, "1")


def test_moving(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A new `host` moves the machine: stopped there, started here, its identity kept, its lock released between."""
    alpha = hosts("alpha", KVM_SHUTDOWN_TIMEOUT="1").start()
    beta = hosts("beta", KVM_SHUTDOWN_TIMEOUT="1").start()
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=16, extra_flags=tiny)
        before = alpha.wait_running("1")["1"]
        keys.put("1", host="beta")
        after = beta.wait_running("1")["1"]
        assert not before.alive
        assert after.argv[after.argv.index("-uuid") + 1] == before.argv[before.argv.index("-uuid") + 1]
        alpha.wait_forgotten("1")
        assert not alpha.record("1").exists()
        status = keys.wait_status("1", lambda s: s.phase is Phase.RUNNING)
        assert (status.host, status.pid) == ("beta", after.pid)
        keys.put("1", host="alpha")
        alpha.wait_running("1")
    locks = check_lock_history(keys, "1")
    assert [lock.host for lock in locks if lock.state is LockState.RUNNING] == ["alpha", "beta", "alpha"]


def test_a_move_to_nobody(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """§4: a `host` that has no session (a typo, a host that is down) stops nothing; everybody says so.

    It moves when that host is there, and not before.
    """
    alpha = hosts("alpha", KVM_SHUTDOWN_TIMEOUT="1").start()
    beta = hosts("beta", KVM_SHUTDOWN_TIMEOUT="1")
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=16, extra_flags=tiny)
        before = alpha.wait_running("1")["1"]
        keys.put("1", host="apha")
        status = alpha.wait_for("1", lambda s: s.awaited_host == "apha")
        assert status.phase is Phase.RUNNING
        assert "`host` is apha, which has no session (did you mean alpha?)" in status.reason
        assert alpha.metric("instance_host_absent", instance="1") == 1
        keys.wait_status("1", lambda s: s.awaited_host == "apha")
        assert "did you mean alpha?" in alpha.cli("list").stdout
        found = alpha.cli("check", "1")
        assert found.returncode == 1
        assert "apha" in found.stdout
        keys.put("1", host="beta")
        alpha.wait_for("1", lambda s: s.awaited_host == "beta")
        # A supervisor that starts meanwhile adopts it, and leaves it running, too.
        alpha.kill9()
        alpha.start()
        alpha.wait_for("1", lambda s: s.awaited_host == "beta" and s.phase is Phase.RUNNING)
        assert before.alive
        beta.start()
        beta.wait_running("1")
        assert not before.alive
        alpha.wait_forgotten("1")
    check_lock_history(keys, "1")


def test_failover_by_a_placement(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law 10: who takes over by itself writes no wish, says in whose place it runs, and is left by a new `host`."""
    alpha, beta = (hosts(name, KVM_SESSION_TTL="2", KVM_SHUTDOWN_TIMEOUT="1").start() for name in ("alpha", "beta"))
    keys.machines("alpha", "1", ram=16, extra_flags=tiny, hosts="alpha beta")
    alpha.wait_running("1")
    alpha.kill9()
    for qemu in alpha.qemus():
        qemu.kill()
    placed = beta.wait_running("1")["1"]
    host_key = keys.layout.wish_key(InstanceId("1"), "host")
    assert keys.get(host_key) == b"alpha"
    assert beta.wait_for("1", lambda s: s.placed_for == "alpha").host == "beta"
    assert beta.metric("instance_placed", instance="1", home="alpha") == 1
    keys.wait_status("1", lambda status: status.up and status.placed_for == "alpha")
    listed = beta.cli("list").stdout
    assert "beta (for alpha)" in listed
    assert "runs in place of alpha" in listed
    assert '"placed_for": "alpha"' in beta.cli("list", "-o", "json").stdout
    # Back again, alpha starts nothing; on both, all is as it should be.
    alpha.start()
    assert beta.cli("check", "1").returncode == 0
    assert alpha.qemus() == []
    assert beta.wait_running("1")["1"] == placed
    keys.put("1", host="alpha")
    alpha.wait_running("1")
    assert not placed.alive
    assert keys.get(keys.layout.placement_key(InstanceId("1"))) is None
    check_lock_history(keys, "1", takeovers=["alpha"])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rounds", [10, pytest.param(150, marks=pytest.mark.soak)])
def test_moving_while_supervisors_die(keys: Keys, hosts: Hosts, tiny: str, rounds: int) -> None:
    """Moves back and forth, either supervisor killed, frozen or stopped at any instant: never two that run.

    The machines have a disk that cannot be fenced, so nobody may take them from a host that seems to be gone.
    """
    chance = random.Random(30)
    pair = {name: hosts(name, KVM_SHUTDOWN_TIMEOUT="0", KVM_SESSION_TTL="2").start() for name in ("alpha", "beta")}
    ids = ["1", "2", "3"]
    keys.machines("alpha", *ids, ram=16, extra_flags=f"{tiny} -blockdev driver=null-co,node-name=disk")
    with watched(*pair.values()):
        for _ in range(rounds):
            for one in ids:
                if chance.random() < 0.7:
                    keys.put(one, host=chance.choice(list(pair)))
            victim = pair[chance.choice(list(pair))]
            time.sleep(chance.random() / 2)
            match chance.choice(["kill", "freeze", "stop", "qemu"]):
                case "kill":
                    victim.kill9()
                case "freeze":
                    victim.freeze()
                    # Beyond its session's TTL in some rounds, so that it wakes up as one that counts as dead.
                    time.sleep(chance.choice([0.2, 3]))
                    victim.thaw()
                case "stop":
                    victim.stop()
                case _:
                    for qemu in victim.qemus():
                        qemu.kill()
            if not victim.running:
                time.sleep(chance.choice([0, 0, 3]))
                victim.start(ready=False)
        for one in ids:
            keys.put(one, host="beta")
        pair["beta"].wait_running(*ids)
        eventually("alpha to be left", lambda: not pair["alpha"].qemus())
    for one in ids:
        assert {lock.host for lock in check_lock_history(keys, one)} == {"alpha", "beta"}


def test_a_dead_host(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """What a dead host held: a machine without disks is taken over; one that writes to a disk waits, and says why."""
    alpha, beta = (hosts(name, KVM_SESSION_TTL="2", KVM_SHUTDOWN_TIMEOUT="1") for name in ("alpha", "beta"))
    alpha.start()
    beta.start()
    keys.machines("beta", "diskless", ram=16, extra_flags=tiny)
    keys.machines("beta", "disk", ram=16, extra_flags=f"{tiny} {A_DISK}")
    beta.wait_running("diskless")
    beta.wait_running("disk")
    keys.machines("alpha", "diskless", "disk", ram=16)
    # While beta lives, it has to let go first: it does.
    alpha.wait_running("diskless", "disk")
    keys.machines("beta", "diskless", "disk", ram=16)
    beta.wait_running("diskless", "disk")

    beta.kill9()
    for qemu in beta.qemus():
        qemu.kill()
    epoch = _lock(keys, "diskless").epoch
    keys.machines("alpha", "diskless", "disk", ram=16)
    alpha.wait_running("diskless")
    assert _lock(keys, "diskless").host == "alpha"
    assert _lock(keys, "diskless").epoch == epoch + 1
    assert alpha.metric("takeovers_total") == 1
    status = alpha.wait_for("disk", lambda s: "no session" in s.reason)
    assert status.phase is Phase.WAITING
    assert "beta holds its lock" in status.reason
    assert _lock(keys, "disk").host == "beta"
    keys.wait_status("disk", lambda s: s.host == "alpha" and "no session" in s.reason)
    found = alpha.cli("check", "disk")
    assert found.returncode == 1
    assert "beta" in found.stdout

    # When it is back it gives way at once, by itself.
    beta.start()
    eventually("alpha to get the lock", lambda: _lock(keys, "disk").host == "alpha")
    check_lock_history(keys, "diskless", takeovers=["beta"])
    check_lock_history(keys, "disk")


def test_a_broken_lock(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law 7: what cannot be fenced is taken on a person's word; the old QEMU is killed when its host reads the lock."""
    alpha, beta = (hosts(name, KVM_SESSION_TTL="2").start() for name in ("alpha", "beta"))
    keys.machines("beta", "1", ram=16, extra_flags=f"{tiny} {A_DISK}")
    old = beta.wait_running("1")["1"]
    assert alpha.cli("break-lock", "1", "--yes").returncode == 1
    beta.freeze()
    keys.put("1", host="alpha")
    alpha.wait_for("1", lambda s: "kvmsupervisor break-lock 1" in s.reason)
    assert _lock(keys, "1").host == "beta"
    broken = alpha.cli("break-lock", "1", "--yes")
    assert broken.returncode == 0, broken.stderr
    new = alpha.wait_running("1")["1"]
    assert _lock(keys, "1").host == "alpha"
    beta.thaw()
    eventually("the old one to be killed", lambda: not old.alive)
    beta.wait_forgotten("1")
    assert alpha.wait_running("1") == {"1": new}


def _lock(keys: Keys, instance: str) -> Lock:
    lock = eventually(f"a lock of {instance}", lambda: keys.lock(instance))
    assert isinstance(lock, Lock)
    return lock


def test_a_frozen_host_wakes_up(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A machine without disks was taken over meanwhile: the old QEMU is killed when its supervisor reads the lock."""
    alpha, beta = hosts("alpha", KVM_SESSION_TTL="2").start(), hosts("beta", KVM_SESSION_TTL="2").start()
    keys.machines("beta", "1", ram=16, extra_flags=tiny)
    old = beta.wait_running("1")["1"]
    beta.freeze()
    keys.put("1", host="alpha")
    new = alpha.wait_running("1")["1"]
    beta.thaw()
    eventually("the old one to be killed", lambda: not old.alive)
    beta.wait_forgotten("1")
    assert alpha.wait_running("1") == {"1": new}
    assert _lock(keys, "1").incarnation == new.incarnation
    check_lock_history(keys, "1", takeovers=["beta"])


def test_one_supervisor_per_run_directory(hosts: Hosts) -> None:
    """A second one is refused, and told who has it."""
    first = hosts("alpha").start()
    second = hosts("beta", run_dir=first.run_dir)
    second.launch()
    assert second.wait_ended() == 1
    assert f"held by process {first.pid}" in second.log
    assert "Traceback" not in second.log
    assert first.running


def test_one_supervisor_per_host_name(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A second one, elsewhere, under the same name is refused, and told who has it; the first loses nothing."""
    first = hosts("alpha", KVM_SESSION_TTL="2").start()
    keys.machines("alpha", "1", ram=16, extra_flags=tiny)
    before = first.wait_running("1")
    second = hosts("alpha", KVM_SESSION_TTL="2")
    second.launch()
    assert second.wait_ended() == 1
    assert first.url in second.log
    assert "KVM_HOSTNAME" in second.log
    assert "Traceback" not in second.log
    assert second.qemus() == []
    assert first.wait_running("1") == before
    assert not first.events("session.lost")
