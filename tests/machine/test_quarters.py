"""Where a QEMU lives: it is the guest's user before it is QEMU, whatever way into its cgroup there is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kvmsupervisor.adapters.apart import HostView, raise_walls
from kvmsupervisor.adapters.cgroup.manager import Cgroup, SameCgroup
from kvmsupervisor.adapters.cgroup.scope import ScopeCgroup
from kvmsupervisor.adapters.cgroup.tree import TreeCgroup
from kvmsupervisor.adapters.users import qemu_users
from kvmsupervisor.aio import in_own_thread
from kvmsupervisor.domain.sight import Sight
from kvmsupervisor.machine.spawn import Quarters

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

OFFLINE = Sight(needs_network=False, listens=(), connects=False)


def lived_in(cgroup: Cgroup, *, lets_go: int = -1) -> dict[str, str]:
    """`/proc/self/status` of a program in such quarters; `lets_go` is what its shell waits on."""
    entry = raise_walls(HostView()).entry(OFFLINE)
    assert entry is not None
    quarters = Quarters(user=qemu_users(None, None).with_id(79995), entry=entry, cgroup=cgroup)

    def start() -> subprocess.Popen[str]:
        quarters.enter()
        words = quarters.wrap(("/usr/bin/cat", "/proc/self/status"))
        stdin = subprocess.DEVNULL if cgroup.stdin is None else cgroup.stdin
        return subprocess.Popen(words, cwd="/", env={}, stdin=stdin, stdout=subprocess.PIPE, text=True)

    try:
        process = in_own_thread(start)
        if lets_go >= 0:
            # The shell waits; nothing of it is root's any more.
            assert "Uid:\t79995\t79995\t79995\t79995\n" in Path(f"/proc/{process.pid}/status").read_text()
            os.write(lets_go, b"\n")
        told, _ = process.communicate(timeout=30)
    finally:
        entry.close()
        cgroup.close()
    assert process.returncode == 0
    return dict(line.split(":\t", 1) for line in told.splitlines() if ":\t" in line)


def unprivileged(status: dict[str, str]) -> bool:
    return status["Uid"].split() == ["79995"] * 4 and status["CapBnd"] == "0" * 16 and status["NoNewPrivs"] == "1"


def test_without_a_cgroup_or_in_one_of_the_old_kind() -> None:
    """Law: the thread that starts it is that user already."""
    assert unprivileged(lived_in(SameCgroup()))
    assert unprivileged(lived_in(TreeCgroup([], None)))


def test_in_a_scope_the_shell_that_waits_is_that_user() -> None:
    """Law: nothing waits as root for systemd."""
    cgroup = ScopeCgroup(lambda pid: None, "kvm-1.scope")
    assert unprivileged(lived_in(cgroup, lets_go=cgroup._gate))


def test_in_the_tree_of_the_new_kind_it_enters_first(tmp_path: Path) -> None:
    """Law: root writes to the cgroup's file, and becomes that user only then."""
    procs = tmp_path / "cgroup.procs"
    procs.touch(mode=0o600)
    cgroup = TreeCgroup([], procs)
    assert cgroup.enters_as_root
    assert unprivileged(lived_in(cgroup))
    assert procs.read_text() == "0\n"
