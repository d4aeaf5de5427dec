"""Where the supervisor runs: on the host itself or in a container, and how much of the host the container sees."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvmsupervisor.adapters.cgroup.manager import PROC, cgroups_of
from kvmsupervisor.domain.frozen import frozen

CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
"""The files that Docker and Podman make in a container's root."""

FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The first PID namespace; its number never changes (include/linux/proc_ns.h, PROC_PID_INIT_INO)."""


@frozen(kw_only=True)
class Place:
    """Where this process is.

    Attributes:
        contained: whether it is in a container.
        host_pids: whether it has the host's PID namespace. Without it, the end of the container's init ends all
            processes that were started there, in whatever cgroup they are (pid_namespaces(7)).
        host_cgroups: whether it has the host's cgroup namespace, so that the host's tree can be used, not only seen.
        service: the systemd service that this process is part of; None when it is part of none.
    """

    contained: bool
    host_pids: bool
    host_cgroups: bool
    service: str | None

    @property
    def ends_neighbours(self) -> bool:
        """Whether the end of the supervisor's container or service ends every process that stays in its cgroup."""
        return self.contained or self.service is not None


def look(proc: Path = PROC, marks: tuple[Path, ...] = CONTAINER_MARKS) -> Place:
    """Find out where this process is.

    In a container with the host's PID namespace, process 1 is the host's init, which has another mount namespace. In a
    container without it, process 1 is the container's init, which has the same mount namespace; then a mark in the root
    folder tells. In the first PID namespace such a mark only tells where the machine's root file system came from.
    """
    apart = _is_apart(proc)
    first = os.fspath((proc / "self/ns/pid").readlink()) == FIRST_PID_NAMESPACE
    marked = not first and any(mark.exists() for mark in marks)
    mine, inits = cgroups_of("self", proc), cgroups_of(1, proc)
    units = (mine.get(tree, "").rpartition("/")[2] for tree in ("", "name=systemd"))
    return Place(
        contained=apart or marked,
        host_pids=apart or not marked,
        # From inside a cgroup namespace of its own, paths outside of it begin with "/..".
        host_cgroups=not any(path.startswith("/..") for path in inits.values()),
        service=next((unit for unit in units if unit.endswith(".service")), None),
    )


def is_of_the_host(path: Path, proc: Path = PROC) -> bool:
    """Whether a folder of this container is one of the host's, which outlives the container.

    It is when it is below a mount whose device is mounted on the host, too, so that it is neither in the container's
    root nor in a tmpfs of the container's own. Needs the host's PID namespace, where process 1 is the host's init.
    """
    mine = [line.split(maxsplit=5) for line in (proc / "self/mountinfo").read_text(errors="replace").splitlines()]
    hosts = {line.split(maxsplit=3)[2] for line in (proc / "1/mountinfo").read_text(errors="replace").splitlines()}
    # Fields of proc_pid_mountinfo(5): the third is the device, the fifth the mount point.
    mounts = {unescaped(fields[4]): fields[2] for fields in mine}
    place = next(str(one) for one in (path.resolve(), *path.resolve().parents) if str(one) in mounts)
    # The root does not count: container runtimes mount a container's root where the host's init sees it.
    return place != "/" and mounts[place] in hosts


def unescaped(path: str) -> str:
    """A path from /proc, without its octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _is_apart(proc: Path) -> bool:
    """Whether process 1 has another mount namespace.

    To read the link that names the namespace takes all capabilities of process 1 (ptrace(2), access mode checking). A
    container that is not fully privileged rarely has them. Everybody may read the mounts of process 1, and mount ids
    are unique across namespaces (proc_pid_mountinfo(5)).
    """
    try:
        return (proc / "1/ns/mnt").readlink() != (proc / "self/ns/mnt").readlink()
    except OSError:
        inits, mine = (
            {line.split(maxsplit=1)[0] for line in (proc / who / "mountinfo").read_text(errors="replace").splitlines()}
            for who in ("1", "self")
        )
        return inits.isdisjoint(mine)
