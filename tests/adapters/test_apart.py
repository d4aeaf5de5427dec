"""The walls around one QEMU: what is inside, and that none is left out in silence. `tests/attack` tries the doors."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from kvmsupervisor.adapters.apart import LANDLOCK, NO_WALLS, VIEW, HostView, Walls, raise_walls
from kvmsupervisor.adapters.apart.room import Base
from kvmsupervisor.adapters.users import qemu_users
from kvmsupervisor.aio import in_own_thread
from kvmsupervisor.domain.sight import Sight

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root raises walls")

OFFLINE = Sight(needs_network=False, listens=(), connects=False)


def inside(walls: Walls, sight: Sight, script: str) -> str:
    """What a shell prints that lives within the walls, as a guest's user."""
    entry = walls.entry(sight)
    assert entry is not None
    words = [*qemu_users(None, None).with_id(79992).become(), "/bin/sh", "-c", script]

    def run() -> subprocess.CompletedProcess[str]:
        entry.enter()
        return subprocess.run(words, capture_output=True, text=True, check=False)

    try:
        return in_own_thread(run).stdout
    finally:
        entry.close()


def test_a_view_holds_what_is_named_and_nothing_else(tmp_path: Path) -> None:
    """Law: links lead where they lead outside, files behind closed folders are there, and no umask shuts the way."""
    tmp_path.chmod(0o700)
    (tmp_path / "file").write_text("content\n")
    (tmp_path / "hidden").write_text("hidden\n")
    (tmp_path / "link").symlink_to("file")
    before = os.umask(0o077)
    try:
        walls = raise_walls(HostView())
        seen = inside(
            walls,
            Sight(needs_network=False, files=(f"{tmp_path}/link",), writable=(f"{tmp_path}/nothing",)),
            f"cat {tmp_path}/link; ls {tmp_path}; ls /; echo x >/dev/null && echo null; echo >/etc/x || echo ro; umask",
        )
    finally:
        os.umask(before)
    words = seen.split()
    assert words[:2] == ["content", "link"]
    assert {"usr", "dev", "proc", "etc"} <= set(words)
    assert {"home", "var", "run", "root", "boot"}.isdisjoint(words)
    assert words[-3:] == ["null", "ro", "0077"]


def test_the_hosts_own_proc_stays_as_it_is() -> None:
    """Law: what /proc of a view hides is not hidden anywhere else."""
    own = Path("/proc/self/mountinfo").read_text()
    raise_walls(HostView())
    assert Path("/proc/self/mountinfo").read_text() == own
    nobody = [*qemu_users(None, None).with_id(79993).become(), "cat", "/proc/1/comm"]
    assert subprocess.run(nobody, capture_output=True, check=False).returncode == 0


def test_what_cannot_be_had_is_said() -> None:
    """Law: each missing wall is named with what it takes; what there is stands all the same."""

    def refused(further: Iterable[str]) -> Base:
        raise PermissionError(1, "Operation not permitted", "unshare")

    walls = raise_walls(HostView(), make_base=refused)
    assert walls.base is None
    assert walls.stand
    assert "(unshare: Operation not permitted); it takes CAP_SYS_ADMIN" in walls.lacking[VIEW]
    assert "denied" in inside(walls, OFFLINE, "cat /etc/passwd 2>/dev/null || echo denied")
    nothing = raise_walls(HostView(), make_base=refused, version=lambda: 0)
    assert nothing.lacking.keys() == NO_WALLS.lacking.keys() == {VIEW, LANDLOCK}
    assert nothing.entry(OFFLINE) is None


def test_folders_of_the_supervisor_are_never_shown(tmp_path: Path) -> None:
    """Law: no key shows a folder of the supervisor, a part of it, what contains it, or a way around."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "secret").touch()
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "shown").touch()
    view = HostView(hidden=(str(run),))
    paths = [f"{run}/secret", str(run), str(tmp_path), "/", f"{tmp_path}/link", f"{tmp_path}/shown/../run", "x"]
    assert [path for path in paths if view.shows(path)] == []
    assert view.shows(f"{tmp_path}/shown")
    assert view.shows(f"{run}2")
    walls = raise_walls(view)
    entry = walls.entry(Sight(writable=(f"{run}/secret", f"{tmp_path}/shown")))
    assert entry is not None
    assert entry.kept_out == (f"{run}/secret",)
    entry.close()


def test_everything_may_be_shown(tmp_path: Path) -> None:
    """Law: `/` in KVM_QEMU_SEES opens the view."""
    (tmp_path / "file").write_text("content\n")
    tmp_path.chmod(0o755)
    walls = raise_walls(HostView(seen=("/",)))
    assert walls.view.shows_all
    assert "root" in inside(walls, OFFLINE, "ls /")
