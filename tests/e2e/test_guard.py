"""The guard (law 7): a machine whose disk no storage can fence ends when its host's session has run out, whatever froze.

Real supervisors, a real etcd, QEMUs whose guests do nothing; KVM_SESSION_TTL is the shortest there is.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, Qemu, eventually
from tests.support.etcd import EtcdServer

TTL_S = 2
GUARDED = {"KVM_SESSION_TTL": str(TTL_S), "KVM_SHUTDOWN_TIMEOUT": "0", "KVM_UNFENCED": "guard"}
CLOCK_SLACK_S = 0.5
"""Between what a test sees of the clock and what the supervisor saw: an instant is never taken as exact."""


@pytest.fixture
def a_disk(tmp_path: Path) -> str:
    """`extra_flags` that open a file for writing."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(65536))
    return f"-drive file={disk},format=raw,if=none,id=d9"


@pytest.fixture
def host(hosts: Hosts) -> Host:
    return hosts(**GUARDED).start()


def begin(keys: Keys, host: Host, tiny: str, a_disk: str) -> Qemu:
    """A machine that cannot be fenced, and runs under guard."""
    keys.machines(host.name, "1", ram=16, extra_flags=f"{tiny} {a_disk}")
    status = host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.guarded is True)
    assert status.guarded
    return host.qemu("1")


def wait_new(host: Host, before: Qemu) -> Qemu:
    host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before.pid})
    return host.qemu("1")


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_killed_supervisor(keys: Keys, host: Host, tiny: str, a_disk: str) -> None:
    """Killed for longer than the session: the guard kills what cannot be fenced, not before, and nothing else.

    The next supervisor says who did it, and starts the machine anew under its lock.
    """
    keys.machines(host.name, "diskless", ram=16, extra_flags=tiny)
    old = begin(keys, host, tiny, a_disk)
    harmless = host.wait_running("diskless")["diskless"]
    lock = keys.lock("1")
    assert lock is not None
    host.kill9()
    killed = now()
    eventually("the guard's work", lambda: not old.alive)
    # The last renewal was at most a fifth of the TTL before.
    assert now() - killed > TTL_S * 4 / 5 - CLOCK_SLACK_S
    assert harmless.alive
    host.start()
    wait_new(host, old)
    status = host.status("1")
    assert status is not None
    assert status.last_exit is not None
    assert "killed by its guard at" in status.last_exit
    assert host.metric("instance_exits_total", instance="1", reason="guard") == 1
    (line,) = host.events("instance.ended", instance="1")
    assert "session had run out" in line["reason"]
    assert host.wait_running("diskless") == {"diskless": harmless}
    new = keys.lock("1")
    assert new is not None
    assert new.epoch == lock.epoch + 1


def test_a_frozen_supervisor(keys: Keys, host: Host, tiny: str, a_disk: str) -> None:
    """Frozen for longer than the session: the same; when it goes on it reads what was done, and says so."""
    old = begin(keys, host, tiny, a_disk)
    host.freeze()
    eventually("the guard's work", lambda: not old.alive)
    host.thaw()
    wait_new(host, old)
    (line,) = host.events("instance.ended", instance="1")
    assert "killed by its guard at" in line["reason"]
    assert "crashed" not in host.log


def test_a_supervisor_that_is_replaced(keys: Keys, host: Host, tiny: str, a_disk: str) -> None:
    """Law 8: stopped or killed, and there again within the session's time: same QEMU, same guard, nothing is killed."""
    qemu = begin(keys, host, tiny, a_disk)
    guard = host.wait_guard()
    for end in (host.stop, host.kill9):
        end()
        host.start()
        host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.guarded is True)
    deadline = now() + TTL_S
    eventually("what the former deadline was to pass", lambda: now() > deadline)
    assert host.wait_running("1") == {"1": qemu}
    assert host.guard == guard
    assert len(host.events("guard.found")) == 2


def test_etcd_is_away(etcd_alone: EtcdServer, hosts: Hosts, tiny: str, a_disk: str) -> None:
    """Laws 6 and 7: without etcd for longer than the session, what cannot be fenced is killed; with `pin` it lives."""
    keys = Keys(etcd_alone)
    host = hosts("alpha", keys=keys, **GUARDED).start()
    pinned = hosts("beta", keys=keys, **{**GUARDED, "KVM_UNFENCED": "pin"}).start()
    old = begin(keys, host, tiny, a_disk)
    keys.machines("beta", "2", ram=16, extra_flags=f"{tiny} {a_disk}".replace(",if", ",file.locking=off,if"))
    lives = pinned.wait_running("2")["2"]
    etcd_alone.member.freeze()
    try:
        eventually("the guard's work", lambda: not old.alive)
        status = host.wait_for("1", lambda s: s.pid is None and s.last_exit is not None)
        assert status.last_exit is not None
        assert "killed by its guard" in status.last_exit
        eventually("the session to be lost", lambda: pinned.events("session.lost"))
        assert lives.alive
    finally:
        etcd_alone.member.thaw()
    wait_new(host, old)
    assert pinned.wait_running("2") == {"2": lives}
    assert pinned.guard is None


def test_a_guard_that_ends(keys: Keys, host: Host, tiny: str, a_disk: str) -> None:
    """Killed or frozen, it is noticed and replaced, and its machines are none the wiser."""
    qemu = begin(keys, host, tiny, a_disk)
    before = host.wait_guard()
    for number in (signal.SIGKILL, signal.SIGSTOP):
        os.kill(before, number)
        after = host.wait_guard(but=before)
        host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.guarded is True)
        before = after
    assert len(host.events("guard.lost")) == 2
    assert host.metric("instance_unguarded", instance="1") == 0
    assert host.wait_running("1") == {"1": qemu}
    # It is a guard like the first.
    host.kill9()
    eventually("the guard's work", lambda: not qemu.alive)


def test_the_setting_changes(keys: Keys, host: Host, tiny: str, a_disk: str) -> None:
    """`pin` again: the guard is told to let go, and the machine outlives the session. `guard` again: it is watched."""
    qemu = begin(keys, host, tiny, a_disk)
    host.wait_guard()
    host.stop()
    host.settings["KVM_UNFENCED"] = "pin"
    host.start()
    eventually("the guard's end", lambda: host.guard is None)
    host.kill9()
    deadline = now() + 2 * TTL_S
    eventually("the session to run out", lambda: now() > deadline)
    assert qemu.alive
    host.settings["KVM_UNFENCED"] = "guard"
    host.start()
    host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.guarded is True)
    assert host.qemu("1") == qemu
    keys.put("1", power="off")
    host.wait_for("1", Phase.STOPPED)
    eventually("the guard, which nobody needs, to end", lambda: host.guard is None)
    assert not host.events("guard.lost")
