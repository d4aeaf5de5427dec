"""Where the supervisor stands: on the host itself, or in a container, and how much of the host that sees."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvmsupervisor.adapters.cgroup.homes import PROC, cgroups_of
from kvmsupervisor.domain.frozen import frozen

CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
"""What Docker and Podman leave in a container's root."""

FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The kernel's own, with a number that never changes (include/linux/proc_ns.h, PROC_PID_INIT_INO)."""


@frozen(kw_only=True)
class Place:
    """Where this process is.

    Attributes:
        contained: in a container.
        host_pids: with the host's PID namespace, so that the end of the container's init does not end all processes
            that were started there, wherever they moved (pid_namespaces(7)).
        host_cgroups: with the host's cgroup namespace, so that the host's tree can be used, not only seen.
        service: the systemd service that this process is part of, None when it is part of none.
    """

    contained: bool
    host_pids: bool
    host_cgroups: bool
    service: str | None

    @property
    def ends_neighbours(self) -> bool:
        """Whether the end of the supervisor's container or service ends what stays in its cgroup."""
        return self.contained or self.service is not None


def look(proc: Path = PROC, marks: tuple[Path, ...] = CONTAINER_MARKS) -> Place:
    """Find out where this process is.

    With the host's PID namespace, process 1 is the host's init, whose mount namespace is another one. Without it,
    process 1 is the container's own init, which shares ours; then the mark in the root tells. In the kernel's first
    PID namespace that mark says no more than where the machine's root file system came from.
    """
    apart = _is_apart(proc)
    first = os.fspath((proc / "self/ns/pid").readlink()) == FIRST_PID_NAMESPACE
    marked = not first and any(mark.exists() for mark in marks)
    mine, inits = cgroups_of("self", proc), cgroups_of(1, proc)
    units = (mine.get(tree, "").rpartition("/")[2] for tree in ("", "name=systemd"))
    return Place(
        contained=apart or marked,
        host_pids=apart or not marked,
        # Seen from a namespace below it, the root of the tree is at "/..".
        host_cgroups=not any(path.startswith("/..") for path in inits.values()),
        service=next((unit for unit in units if unit.endswith(".service")), None),
    )


def is_of_the_host(path: Path, proc: Path = PROC) -> bool:
    """Whether a folder of this container is one of the host's, which outlives it.

    It is below a mount, and what is mounted there is mounted on the host, too: neither the container's root nor a
    tmpfs of its own. Wants the host's PID namespace, where process 1 is the host's init.
    """
    mine = [line.split(maxsplit=5) for line in (proc / "self/mountinfo").read_text(errors="replace").splitlines()]
    hosts = {line.split(maxsplit=3)[2] for line in (proc / "1/mountinfo").read_text(errors="replace").splitlines()}
    # The fields are described in proc_pid_mountinfo(5): the third is the device, the fifth the place.
    mounts = {unescaped(fields[4]): fields[2] for fields in mine}
    place = next(str(one) for one in (path.resolve(), *path.resolve().parents) if str(one) in mounts)
    # Container runtimes mount the root where the host's init sees it.
    return place != "/" and mounts[place] in hosts


def unescaped(path: str) -> str:
    """A path as /proc has it, with octal numbers for some characters, as it is."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _is_apart(proc: Path) -> bool:
    """Whether process 1 has another mount namespace.

    The link that names it may be read only with all of that process's capabilities (ptrace(2), access mode checking),
    which a container rarely has that is not fully privileged. Its mounts may be read by all, and the number of a mount
    is that of no other, in whatever namespace (proc_pid_mountinfo(5)).
    """
    try:
        return (proc / "1/ns/mnt").readlink() != (proc / "self/ns/mnt").readlink()
    except OSError:
        inits, mine = (
            {line.split(maxsplit=1)[0] for line in (proc / who / "mountinfo").read_text(errors="replace").splitlines()}
            for who in ("1", "self")
        )
        return inits.isdisjoint(mine)
