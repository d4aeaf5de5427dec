"""Where the supervisor stands: on the host itself, or in a container, and how much of the host that sees."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvmsupervisor.adapters.cgroup.homes import PROC, cgroups_of

CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
"""What Docker and Podman leave in a container's root."""

FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The kernel's own, with a number that never changes (include/linux/proc_ns.h, PROC_PID_INIT_INO)."""


@dataclass(frozen=True, slots=True, kw_only=True)
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
    try:
        apart = (proc / "1/ns/mnt").readlink() != (proc / "self/ns/mnt").readlink()
    except OSError:
        # Not allowed to look: certainly not a privileged container.
        apart = False
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
