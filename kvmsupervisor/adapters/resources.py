"""Explains shortages of the host (disk space, open files, memory) to people; sets the limits of this and of each QEMU.

Limits belong to a process, and what it starts inherits them. To set one for a process of another user takes
CAP_SYS_RESOURCE, and a program in between that sets it takes a millisecond. So the supervisor has the limits of its
QEMUs itself: it needs less.

Sources: errno(3), statvfs(3), getrlimit(2), core(5), open(2): a new descriptor gets the lowest free number.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

from kvmsupervisor.domain.limits import TASKS

MOST_FILES = 1 << 17
"""The most files that a supervisor, and a QEMU, may have open. A supervisor needs five for each machine. librbd opens
one for each OSD and image (github.com/bloomberg/chef-bcpc/pull/1845): 16 disks in a cluster of 8,000 OSDs."""

RAISE_IT = "raise that limit (`ulimit -n`, LimitNOFILE= in its unit, `docker run --ulimit nofile=`)"


def raise_limit() -> int:
    """Raise our limit of open files to `MOST_FILES`, as far as we may, and no further; return the new limit.

    The programs that we start inherit it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    return wanted


def bound_guests() -> None:
    """Bound the processes that each user of a guest has, and take core files from all that we start.

    The kernel counts processes and threads by their user, and never those of root (clone(2), `INIT_USER`). So this is
    only for QEMUs that have users of their own.
    """
    for kind, most in ((resource.RLIMIT_NPROC, TASKS), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(kind, (wanted, wanted))


def lack_of_files(needed: int) -> str | None:
    """Why `needed` more files cannot be opened, for people; None when they can. Costs two system calls."""
    limit = _limit()
    try:
        lowest = os.dup(0)
    except OSError as error:
        if error.errno != errno.EMFILE:
            return None
        lowest = limit
    else:
        os.close(lowest)
    if lowest + needed <= limit:
        return None
    return f"of the {limit} files that this supervisor may have open, {lowest} are, and it needs {needed}: {RAISE_IT}"


def explain(error: OSError, path: Path) -> str:
    """What went wrong with `path`, or with the file that `error` names, and which limit was reached."""
    # Of two names, the second one is written to (shutil.copyfile, os.replace).
    named = error.filename2 or error.filename
    place = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else path
    said = f"{place}: {error.strerror or error}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{said}; {_room(place)}"
        case errno.EROFS:
            return f"{said}; mount it for writing, or have it checked: a kernel does this to a file system with errors"
        case errno.EIO:
            return f"{said}; its disk fails: see the kernel's log"
        case errno.EMFILE:
            return f"{said}: {_limit()} files are open; {RAISE_IT}"
        case errno.ENFILE:
            return f"{said}: all programs of this host together have met its limit, fs.file-max (sysctl); raise it"
        case errno.ENOMEM | errno.EAGAIN:
            return f"{said}; this host, or the container's cgroup, has no memory or no process left to give"
        case _:
            return said


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


def _room(path: Path) -> str:
    """How full the file system of `path` is; `path` need not exist."""
    there = next((one for one in (path, *path.parents) if one.exists()), Path("/"))
    try:
        found = os.statvfs(there)
    except OSError as error:
        return f"how full it is cannot be told: {error.strerror}"
    size_mib, free_kib = found.f_blocks * found.f_frsize >> 20, found.f_bavail * found.f_frsize >> 10
    # A file system without a fixed number of inodes (btrfs) reports 0.
    inodes = f" and {found.f_favail} of {found.f_files} inodes" if found.f_files else ""
    return f"of the {size_mib} MiB of its file system {free_kib} KiB{inodes} are free: make room there"
