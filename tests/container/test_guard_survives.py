"""The guard outlives its supervisor's container, and serves the next one (law 7)."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.status import Phase
from tests.support.boxed import REPLACEABLE, Boxed, Boxes, begin
from tests.support.cluster import Keys, eventually
from tests.support.docker import Docker

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.timeout(1500)]


def wait_guarded(box: Boxed) -> None:
    box.wait_for("one", lambda status: status.phase is Phase.RUNNING and status.guarded is True)


def test_a_guard_and_its_container(docker: Docker, boxes: Boxes, keys: Keys, guest: Guest, tmp_path: Path) -> None:
    """Law 7: removed with force and replaced in time, nothing is killed, and the guard is the next supervisor's.

    Not replaced in time, the guard kills what cannot be fenced; the next supervisor says so.
    """
    # Not in the run directory, of which QEMUs see their own part only.
    options = (*REPLACEABLE, f"--volume={tmp_path}:{tmp_path}")
    box = boxes(options=options, KVM_UNFENCED="guard", KVM_SESSION_TTL="120").start()
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(65536))
    disk.chmod(0o666)
    flags = f"{guest.extra_flags(tag='one')} -drive file={disk},format=raw,if=none,id=d9"
    (qemu,) = begin(box, keys, {"one": flags}).values()
    wait_guarded(box)
    guard = box.wait_guard()
    assert "/kvmsupervisor/_guard@" in Path(f"/proc/{guard}/cgroup").read_text()
    assert box.metric("guard_memory_locked") == 1
    box.end("rm", "--force")
    assert box.guard == guard
    box.replace(docker.build_version("2"))
    box.adopted(1)
    wait_guarded(box)
    # The image differs, the program does not: `tests/guard/test_client.py` has guards of another release.
    assert box.events("guard.found")[-1]["pid"] == box.guard == guard
    assert box.qemus() == [qemu]
    box.end("stop", "--time=15")
    box.settings["KVM_SESSION_TTL"] = "5"
    box.start()
    wait_guarded(box)
    box.end("kill")
    eventually("the guard's work", lambda: not qemu.alive)
    box.start()
    status = box.wait_for("one", lambda status: status.phase is Phase.RUNNING and status.pid not in {None, qemu.pid})
    assert status.last_exit is not None
    assert "killed by its guard" in status.last_exit
