"""A host that is short of room or of open files: guests run on, starts wait and say for what, all mends itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor.domain.status import Phase
from tests.chaos.armed import FOLDER, FREEZE, Points
from tests.e2e.test_live_move import LISTEN
from tests.support.cluster import Host, Hosts, Keys, eventually

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")


@pytest.fixture
def small(hosts: Hosts) -> Iterator[Host]:
    """A host whose run directory and state directory are on file systems of their own, of a few MiB."""
    host = hosts()
    mounted = []
    try:
        for folder, size in ((host.run_dir, "2M"), (host.folder / "state", "1M")):
            folder.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", folder], check=True)
            mounted.append(folder)
        yield host
    finally:
        host.close()
        for folder in mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte free on its file system."""
    ballast = folder / "_ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def with_points(host: Host) -> Points:
    """Start a host that takes guests in, and whose supervisor has failpoints."""
    folder = host.folder / "points"
    folder.mkdir()
    host.settings |= {FOLDER: str(folder), **LISTEN}
    host.entry = "tests.chaos.armed"
    host.start()
    return Points(folder)


@needs_root
def test_a_full_run_directory_stops_nobody(small: Host, keys: Keys, tiny: str) -> None:
    """A running guest goes on, the next supervisor starts, adopts and serves; what is new waits, and then runs."""
    small.start()
    keys.machines(small.name, "old", ram=16, shutdown_timeout=0, extra_flags=tiny)
    before = small.wait_running("old")
    ballast = fill(small.run_dir)
    keys.machines(small.name, "new", ram=16, extra_flags=tiny)
    waiting = small.wait_for("new", lambda status: "No space left" in status.reason)
    assert waiting.phase is Phase.WAITING
    assert str(small.run_dir / "new") in waiting.reason
    assert "of the 2 MiB of its file system 0 KiB" in waiting.reason
    small.stop()
    small.start()
    small.wait_for("new", lambda status: "No space left" in status.reason)
    assert small.wait_running("old") == before
    assert small.metric("internal_errors_total", instance="old") == 0
    assert small.metric("internal_errors_total", instance="new") == 0
    assert small.metric("instance_exits_total", instance="new", reason="failed") == 0
    # An order for what runs needs no room either.
    keys.put("old", power="off")
    small.wait_for("old", lambda status: status.phase is Phase.STOPPED)
    ballast.unlink()
    small.wait_running("new")


@needs_root
def test_a_full_state_directory_is_named(small: Host, keys: Keys, tiny: str) -> None:
    """UEFI variables that cannot be made: the reason has the file and how full it is; there is room: it runs."""
    state = small.folder / "state"
    ballast = fill(state)
    small.settings |= {"KVM_OVMF_CODE": "/usr/share/OVMF/OVMF_CODE.fd", "KVM_OVMF_VARS": "/usr/share/OVMF/OVMF_VARS.fd"}
    small.start()
    keys.machines(small.name, "uefi", ram=32, firmware="uefi")
    waiting = small.wait_for("uefi", lambda status: "No space left" in status.reason)
    assert str(state / "uefi") in waiting.reason
    assert "of the 1 MiB of its file system 0 KiB" in waiting.reason
    assert small.metric("internal_errors_total", instance="uefi") == 0
    ballast.unlink()
    small.wait_running("uefi")


@needs_root
def test_a_full_state_directory_costs_events_only(small: Host, keys: Keys, tiny: str) -> None:
    """Guests start and go on, it is told once, etcd has what happened; there is room: the file goes on."""
    ballast = fill(small.folder / "state")
    small.start()
    keys.machines(small.name, "1", ram=16, extra_flags=tiny)
    for restarts in (1, 2):
        small.wait_running("1")["1"].signal(signal.SIGKILL)
        keys.wait_status("1", lambda status, wanted=restarts: status.restarts == wanted and status.up)  # type: ignore[misc]
    told = json.loads(small.cli("events", "1", "-o", "json").stdout)
    assert [one["event"] for one in told].count("instance.ended") == 2
    eventually("it to be told", lambda: small.events("events.unwritten"))
    ballast.unlink()
    small.wait_running("1")["1"].signal(signal.SIGKILL)
    file = small.folder / "state" / "_events" / "1.jsonl"
    eventually("the file to go on", lambda: file.exists() and "instance.ended" in file.read_text())
    assert len(small.events("events.unwritten")) == 1


def test_few_open_files_are_waited_for(hosts: Hosts, keys: Keys, tiny: str) -> None:
    """With a limit that is too low the start says so, no machine fails for it, and each one says what it waits for."""
    host = hosts()
    host.around = lambda *argv: ["prlimit", "--nofile=64:64", *argv]
    names = [str(number) for number in range(30)]
    keys.machines(host.name, *names, ram=16, extra_flags=tiny)
    host.start()

    def all_told() -> bool:
        found = host.instances()
        return len(found) == 30 and all(
            one.phase is Phase.RUNNING or "of the 64 files" in one.reason for one in found.values()
        )

    eventually("each machine to run or to say what it waits for", all_told)
    waiting = [one for one in host.instances().values() if one.phase is not Phase.RUNNING]
    assert waiting
    assert all(one.phase is Phase.WAITING and "ulimit -n" in one.reason for one in waiting)
    assert [(one["limit"], one["machines"]) for one in host.events("files.too_few")] == [(64, 30)]
    assert not host.events("instance.backoff")
    assert not host.events("instance.error")
    host.stop()
    # The soft limit alone is no limit: it is raised.
    host.around = lambda *argv: ["prlimit", "--nofile=64:4096", *argv]
    host.start()
    host.wait_running(*names)


@needs_root
def test_a_guest_arrives_in_a_full_run_directory(small: Host, hosts: Hosts, keys: Keys, tiny: str) -> None:
    """Law 13: it is this host's by its lock, so it goes on, though that cannot be put on record."""
    points = with_points(small)
    source = hosts("source", **LISTEN).start()
    keys.machines("source", "1", ram=16, extra_flags=tiny)
    source.wait_running("1")
    points.arm("arriving", FREEZE)
    keys.put("1", host=small.name)
    eventually("the arrival", lambda: points.was_met)
    ballast = fill(small.run_dir)
    small.thaw()
    came = small.wait_for("1", lambda status: status.run_state == "running")
    ballast.unlink()
    small.stop()
    small.start()
    assert small.wait_running("1")["1"].pid == came.pid
    eventually("the source's QEMU to end", lambda: not source.qemus())
