"""What a host is short of, in words; and the limit of open files."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmsupervisor.adapters import resources
from kvmsupervisor.domain.limits import TASKS

LIMITS = """
import resource, sys
from kvmsupervisor.adapters import resources
soft, hard, needed = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(resources.raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))
print(resources.lack_of_files(needed))
"""


def told_of_files(soft: int, hard: int, needed: int) -> list[str]:
    """What a process with these limits says."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITS, str(soft), str(hard), str(needed)],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    """Nobody has to raise it by hand whom the host does not stop from it."""
    assert told_of_files(64, 512, 100) == ["512 (512, 512)", "None"]


BOUNDED = """
import os, resource, subprocess, sys
from kvmsupervisor.adapters import resources
if len(sys.argv) > 1:
    for kind in (resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        resource.setrlimit(kind, (int(sys.argv[1]), int(sys.argv[1])))
resources.raise_limit()
resources.bound_guests()
become = ("setpriv", "--reuid=79990", "--regid=79990", "--clear-groups", "--bounding-set=-all", "--no-new-privs")
subprocess.run([*become, "cat", "/proc/self/limits"], check=True)
# Root itself is never counted.
subprocess.run(["true"], check=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts programs as other users")
def test_a_guest_has_bounds_that_it_cannot_raise() -> None:
    """Law: soft and hard limits of what is started as another user are those that we say, and no core file is left."""
    done = subprocess.run([sys.executable, "-c", BOUNDED], check=True, capture_output=True, text=True)
    limits = {line[:26].strip(): line[26:].split()[:2] for line in done.stdout.splitlines()[1:]}
    tasks = min(TASKS, resource.getrlimit(resource.RLIMIT_NPROC)[1])
    assert limits["Max processes"] == [str(tasks)] * 2
    assert limits["Max core file size"] == ["0", "0"]
    soft, hard = map(int, limits["Max open files"])
    assert soft == hard <= resources.MOST_FILES


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts programs as other users")
def test_lower_limits_of_the_host_stay() -> None:
    """Law: nothing is raised above a hard limit, for which rights would be missing (kubevirt/kubevirt#17925)."""
    done = subprocess.run([sys.executable, "-c", BOUNDED, "200"], check=True, capture_output=True, text=True)
    limits = {line[:26].strip(): line[26:].split()[:2] for line in done.stdout.splitlines()[1:]}
    assert limits["Max processes"] == limits["Max open files"] == ["200", "200"]


def test_a_hard_limit_that_is_too_low_is_told_with_its_number() -> None:
    """How many there may be, how many there are, what would be right."""
    limit, lack = told_of_files(64, 64, 62)
    assert limit == "64 (64, 64)"
    assert lack.startswith("of the 64 files that this supervisor may have open, ")
    assert "needs 62: raise that limit (`ulimit -n`" in lack


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; of the "),
        (errno.EDQUOT, "Disk quota exceeded; of the "),
        (errno.EROFS, "Read-only file system; mount it for writing"),
        (errno.EIO, "Input/output error; its disk fails"),
        (errno.EMFILE, "Too many open files: "),
        (errno.ENFILE, "Too many open files in system: all programs of this host"),
        (errno.ENOMEM, "Cannot allocate memory; this host"),
        (errno.EACCES, "Permission denied"),
    ],
)
def test_each_shortage_names_the_path_and_what_to_do(tmp_path: Path, number: int, words: str) -> None:
    """Of an error with a path of its own that one is named, of another the given one, which need not exist."""
    assert resources.explain(OSError(number, os.strerror(number)), tmp_path / "x").startswith(f"{tmp_path}/x: {words}")
    named = OSError(number, os.strerror(number), str(tmp_path / "y"))
    assert resources.explain(named, tmp_path / "x").startswith(f"{tmp_path}/y: {words}")


def test_how_full_a_file_system_is(tmp_path: Path) -> None:
    """Size and free room of the one that the path is on, or would be."""
    said = resources.explain(OSError(errno.ENOSPC, "full"), tmp_path / "no" / "such" / "file")
    total = os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize >> 20
    assert f"of the {total} MiB of its file system " in said


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a tmpfs")
def test_a_supervisor_starts_on_a_full_or_read_only_run_directory(tmp_path: Path) -> None:
    """The pid in the lock file only tells people: the lock itself is had all the same, and keeps the next one out."""
    script = "from pathlib import Path\nfrom kvmsupervisor.adapters.rundir import *\nimport sys\n"
    script += "one = RunDir(Path(sys.argv[1])); one.acquire()\n"
    script += "try:\n    RunDir(Path(sys.argv[1])).acquire()\nexcept AlreadyRunning:\n    print('held')\n"
    run = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        with pytest.raises(OSError, match="No space"):
            (tmp_path / "ballast").write_bytes(bytes(1 << 20))
        assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "held\n"
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "held\n"
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
