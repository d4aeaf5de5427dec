"""The guard (law 7): what no storage can fence ends when its host's session has run out, whatever froze.

Real supervisors, a real etcd, QEMUs whose guests do nothing. What is waited for is the end of sessions.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, Qemu, eventually
from tests.support.etcd import PROGRAMS, EtcdServer

BRIEF_S = 3
"""Of sessions that are to run out: as short as a loaded machine renews in time."""

LONG_S = 30
"""Of sessions that are not: a supervisor may take that long to be replaced."""


@pytest.fixture
def a_disk(tmp_path: Path) -> str:
    """`extra_flags` that open a file for writing."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(65536))
    return f"-drive file={disk},format=raw,if=none,id=d9"


def settings(ttl_s: int, unfenced: str = "guard") -> dict[str, Any]:
    return {"KVM_SESSION_TTL": str(ttl_s), "KVM_SHUTDOWN_TIMEOUT": "0", "KVM_UNFENCED": unfenced}


def begin(keys: Keys, host: Host, flags: str) -> Qemu:
    """A machine that cannot be fenced, and runs under guard."""
    keys.machines(host.name, "1", ram=16, extra_flags=flags)
    wait_guarded(host)
    return host.qemu("1")


def wait_guarded(host: Host) -> None:
    host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.guarded is True)


def wait_new(host: Host, before: Qemu) -> Qemu:
    host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before.pid})
    return host.qemu("1")


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_supervisor_that_is_frozen_or_killed(keys: Keys, hosts: Hosts, tiny: str, a_disk: str) -> None:
    """Law 7: for longer than the session, and the guard kills what cannot be fenced, not before, and nothing else.

    The supervisor that goes on, and the next one, say who did it, and start the machine anew under its lock.
    """
    host = hosts(**settings(BRIEF_S)).start()
    keys.machines(host.name, "diskless", ram=16, extra_flags=tiny)
    first = begin(keys, host, f"{tiny} {a_disk}")
    harmless = host.wait_running("diskless")["diskless"]
    lock = keys.lock("1")
    assert lock is not None
    host.freeze()
    eventually("the guard's work", lambda: not first.alive)
    host.thaw()
    second = wait_new(host, first)
    asked = now()
    deadline = asked + host.metric("session_remaining_seconds")
    wait_guarded(host)
    host.kill9()
    eventually("the guard's work", lambda: not second.alive)
    assert now() >= deadline
    assert harmless.alive
    host.start()
    wait_new(host, second)
    status = host.status("1")
    assert status is not None
    assert status.last_exit is not None
    assert "killed by its guard at" in status.last_exit
    assert host.metric("instance_exits_total", instance="1", reason="guard") == 1
    ends = host.events("instance.ended", instance="1", level="warning")
    assert len(ends) == 2
    assert all("its host's session had run out" in end["reason"] for end in ends)
    assert "crashed" not in host.log
    assert host.wait_running("diskless") == {"diskless": harmless}
    new = keys.lock("1")
    assert new is not None
    assert (new.host, new.epoch) == (host.name, lock.epoch + 2)


def test_etcd_is_away(etcd_alone: EtcdServer, hosts: Hosts, tiny: str, a_disk: str) -> None:
    """Laws 6 and 7: without etcd for longer than the session, what cannot be fenced is killed; with `pin` it lives."""
    keys = Keys(etcd_alone)
    host = hosts("alpha", keys=keys, **settings(BRIEF_S)).start()
    pinned = hosts("beta", keys=keys, **settings(BRIEF_S, "pin")).start()
    flags = f"{tiny} {a_disk}"
    keys.machines("beta", "2", ram=16, extra_flags=flags.replace(",if=", ",file.locking=off,if="))
    lives = pinned.wait_running("2")["2"]
    killed = begin(keys, host, flags)
    etcd_alone.member.freeze()
    eventually("the guard's work", lambda: not killed.alive)
    status = host.wait_for("1", lambda s: s.pid is None and s.last_exit is not None)
    assert status.last_exit is not None
    assert "killed by its guard" in status.last_exit
    eventually("the session to be lost", lambda: pinned.events("session.lost"))
    assert lives.alive
    assert pinned.guard is None


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_etcd_without_space(program: str, hosts: Hosts, tiny: str, a_disk: str) -> None:
    """Law 1: it confirms the session all the same, to a successor, too, for many lengths of one: nothing is killed."""
    with EtcdServer(program=program, args=("--quota-backend-bytes", str(4 << 20))) as etcd:
        keys = Keys(etcd)
        host = hosts("alpha", keys=keys, **settings(LONG_S)).start()
        guest, lock = begin(keys, host, f"{tiny} {a_disk}"), keys.lock("1")
        with contextlib.suppress(AssertionError):
            for _ in range(100):
                keys.write("/fill", "x" * 100_000)
        assert "NOSPACE" in etcd.ctl("alarm", "list")
        full_at = now()
        eventually("a length of a session", lambda: now() > full_at + LONG_S)
        host.kill9()
        host.start()
        eventually("two more", lambda: now() > full_at + 3 * LONG_S)
        assert guest.alive
        assert host.metric("session_remaining_seconds") > 0
        wait_guarded(host)
        etcd.ctl("compact", str(keys.revision))
        etcd.ctl("defrag")
        etcd.ctl("alarm", "disarm")
        revision = keys.put("1", description="x")
        eventually("the host to follow", lambda: host.metric("watch_revision") >= revision)
        wait_guarded(host)
        assert host.wait_running("1") == {"1": guest}
        assert keys.lock("1") == lock
        assert not host.events("session.lost")
        assert len(host.events("session.created")) == 1


def test_what_comes_and_goes(keys: Keys, hosts: Hosts, tiny: str, a_disk: str) -> None:
    """Law 8: supervisors, guards and the setting change within the session's time, and the machine is the same.

    A supervisor stopped or killed, and there again: same guard. A guard killed or frozen: noticed and replaced. `pin`:
    the guard lets go. `guard` again: the machine is watched. A guard that nobody needs ends.
    """
    host = hosts(**settings(LONG_S)).start()
    qemu = begin(keys, host, f"{tiny} {a_disk}")
    guard = host.wait_guard()
    assert os.getsid(guard) == guard
    for end in (host.stop, host.kill9):
        end()
        host.start()
        wait_guarded(host)
    assert host.guard == guard
    assert len(host.events("guard.found")) == 2
    os.kill(guard, signal.SIGKILL)
    host.wait_guard(but=guard)
    wait_guarded(host)
    (lost,) = host.events("guard.lost")
    assert lost["pid"] == guard
    assert host.metric("instance_unguarded", instance="1") == 0
    assert host.metric("guard_memory_locked") == 1
    host.stop()
    host.settings["KVM_UNFENCED"] = "pin"
    host.start()
    assert host.guard is None
    assert host.status("1") is not None
    host.stop()
    host.settings["KVM_UNFENCED"] = "guard"
    host.start()
    wait_guarded(host)
    assert host.wait_running("1") == {"1": qemu}
    keys.put("1", power="off")
    host.wait_for("1", Phase.STOPPED)
    eventually("the guard, which nobody needs, to end", lambda: host.guard is None)
    assert len(host.events("guard.lost")) == 1
    assert not host.events("instance.ended", level="warning")
