"""What a supervisor takes over from its predecessor, and what it keeps its hands off (law 8)."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, Storage
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, Qemu, eventually
from tests.support.processes import starttime_of


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with all this."""
    process = subprocess.Popen(["sleep", "3600"])
    yield process
    process.kill()
    process.wait()


def wait_replaced(host: Host, before: Qemu) -> Qemu:
    """Wait for another QEMU than `before` to run, and be the only one."""
    host.wait_for(before.instance, lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before.pid})
    return host.qemu(before.instance)


def test_a_recycled_pid(keys: Keys, hosts: Hosts, tiny: str, stranger: subprocess.Popen[bytes]) -> None:
    """A record whose pid is a stranger's by now: the stranger is not touched, the instance starts anew.

    A start time that happens to agree is more than chance gives: what lives there may be its QEMU, so nothing is done
    until somebody has looked (law 12).
    """
    host = hosts().start()
    keys.machines(host.name, "1", "2", "3", ram=16, extra_flags=tiny)
    before = host.wait_running("1", "2", "3")
    host.kill9()
    for qemu in before.values():
        qemu.kill()
    host.rewrite("1", pid=stranger.pid)
    host.rewrite("2", pid=stranger.pid, starttime=starttime_of(stranger.pid))
    host.rewrite("3", pid=stranger.pid, starttime=starttime_of(stranger.pid), boot_id="another")
    host.start()
    wait_replaced(host, before["1"])
    wait_replaced(host, before["3"])
    assert stranger.poll() is None
    (line,) = host.events("instance.unreadable", instance="2")
    assert f"process {stranger.pid} lives with the start time on record" in line["reason"]
    assert [qemu.instance for qemu in host.qemus() if qemu.instance == "2"] == []
    assert host.metric("adopted_total") == 0
    last = host.status("3")
    assert last is not None
    assert last.last_exit == "ended with the host's last boot"
    assert last.restarts == 0


def test_cut_off_around_the_spawn(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A record without a pid: the process is found by its environment, or was never started."""
    host = hosts().start()
    keys.machines(host.name, "spawned", "not", ram=16, extra_flags=tiny)
    before = host.wait_running("spawned", "not")
    host.kill9()
    before["not"].kill()
    for one in before:
        host.rewrite(one, pid=None, starttime=None)
    host.start()
    wait_replaced(host, before["not"])
    assert host.wait_running("spawned") == {"spawned": before["spawned"]}
    eventually("the adoption", lambda: host.metric("adopted_total") == 1)


def test_a_lost_lock(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A QEMU whose lock another host has taken meanwhile is killed as soon as that is read, and only then."""
    host = hosts().start()
    keys.machines(host.name, "1", "2", ram=16, extra_flags=tiny)
    before = host.wait_running("1", "2")
    host.kill9()
    lock = keys.lock("1")
    assert lock is not None
    taken = replace(lock, host=HostName("beta"), epoch=lock.epoch + 1, incarnation="other", storage=Storage.UNFENCEABLE)
    keys.write(keys.layout.lock_key(InstanceId("1")), taken.to_json().decode())
    host.start()
    status = host.wait_for("1", lambda s: s.phase is Phase.WAITING and s.pid is None)
    assert not before["1"].alive
    assert "beta holds its lock" in status.reason
    assert keys.lock("1") == taken
    assert host.wait_running("2") == {"2": before["2"]}
    # Whoever gives it back ends the wait.
    keys.delete("1", "lock")
    wait_replaced(host, before["1"])
    lock = keys.lock("1")
    assert lock is not None
    assert lock.host == host.name


def test_the_run_directory_is_wiped(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A QEMU that lives and cannot be adopted is in the way, with a reason; there is never a second one."""
    host = hosts(KVM_SESSION_TTL="2").start()
    keys.machines(host.name, "1", ram=16, extra_flags=tiny)
    before = host.wait_running("1")["1"]
    host.kill9()
    shutil.rmtree(host.run_dir)
    host.start()
    status = host.wait_for("1", lambda s: s.phase is Phase.WAITING and str(before.pid) in s.reason)
    assert "run directory" in status.reason
    assert host.qemus() == [before]
    # Nor when somebody deletes the lock that names it.
    keys.delete("1", "lock")
    heard = keys.put("1", description="it lives")
    assert str(before.pid) in host.wait_for("1", lambda status: status.revision >= heard).reason
    assert host.qemus() == [before]
    before.kill()
    wait_replaced(host, before)


def test_a_record_of_a_newer_release(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """What cannot be read is left alone with its QEMU; the others go on."""
    host = hosts().start()
    keys.machines(host.name, "1", "2", ram=16, extra_flags=tiny)
    before = host.wait_running("1", "2")
    host.stop()
    host.rewrite("1", version=2)
    host.start()
    assert host.wait_running("2") == {"2": before["2"]}
    (line,) = host.events("instance.unreadable", instance="1")
    assert "incarnation.json" in line["reason"]
    assert before["1"].alive
    assert len(host.qemus()) == 2
    # The release that wrote it takes it over.
    host.stop()
    host.rewrite("1", version=1)
    host.start()
    assert host.wait_running("1", "2") == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have QEMU run as another user")
def test_a_successor_that_may_too_little(keys: Keys, hosts: Hosts) -> None:
    """A QEMU that cannot be recognised for want of rights is neither taken for gone, nor forgotten, nor killed.

    Where rights are missing for QEMU's user the start is refused; where that user was given up, the record stays.
    """
    host = hosts(KVM_QEMU_USER="nobody")
    firmware = host.folder / "hlt.bin"
    firmware.write_bytes(b"\xf4" * 65536)
    host.start()
    keys.machines(host.name, "1", ram=16, extra_flags=f"-bios {firmware}")
    before = host.wait_running("1")
    plain = host.around
    host.kill9()
    # Linux 6.14 and newer show environments to these two, too (kernel/fork.c, may_access_mm).
    less = "--bounding-set=-sys_ptrace,-perfmon,-sys_admin"
    host.around = lambda *argv: ["setpriv", less, "--inh-caps=-all", "--", *plain(*argv)]
    host.launch()
    assert host.wait_ended() == 1
    assert "CAP_SYS_PTRACE (a QEMU that runs already is recognised by its environment)" in host.log
    host.settings["KVM_QEMU_USER"] = ""
    host.start()
    (line,) = host.events("instance.unreadable", instance="1")
    assert f"process {before['1'].pid} lives where its QEMU was" in line["reason"]
    host.stop()
    host.around = plain
    host.settings["KVM_QEMU_USER"] = "nobody"
    host.start()
    assert host.wait_running("1") == before
    status = host.status("1")
    assert status is not None
    assert (status.epoch, status.restarts) == (1, 0)


@pytest.mark.parametrize("rounds", [8, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_cut_off_anywhere(keys: Keys, hosts: Hosts, tiny: str, rounds: int) -> None:
    """However often, and wherever, a supervisor is cut off while it starts machines: each runs once, never twice."""
    chance = random.Random(20)
    host = hosts()
    ids = [str(number) for number in range(6)]
    keys.machines(host.name, *ids, ram=16, extra_flags=tiny)
    highest: Counter[str] = Counter()
    for _ in range(rounds):
        host.start(ready=False)
        time.sleep(chance.random() / 2)
        host.kill9()
        counted = Counter(qemu.instance for qemu in host.qemus())
        assert not counted or max(counted.values()) == 1, counted
        for one in ids:
            lock = keys.lock(one)
            epoch = 0 if lock is None else lock.epoch
            assert epoch >= highest[one]
            highest[one] = epoch
        for qemu in host.qemus():
            if chance.random() < 0.5:
                qemu.kill()
    host.start()
    # So many ends in a row make long pauses; new keys end them.
    keys.machines(host.name, *ids, ram=16, extra_flags=tiny, description="a change")
    running = host.wait_running(*ids)
    assert len(host.qemus()) == len(ids)
    for one, qemu in running.items():
        lock = keys.lock(one)
        assert isinstance(lock, Lock)
        assert (lock.pid, lock.incarnation) == (qemu.pid, qemu.incarnation)
        assert host.run_state(qemu) == "running"
