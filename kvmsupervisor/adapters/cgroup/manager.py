"""What a cgroup manager does: it gives each QEMU process a cgroup outside the container's, entered before the exec.

Why before the exec: memory stays charged to the cgroup where it was allocated, threads that already exist have to be
moved too, and a supervisor that is cut off between exec and move leaves a guest that dies with the container. Why not
`preexec_fn`: that is Python between fork and exec, in a program with threads. A prefix of `/bin/sh` costs about a
millisecond.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import Limits

PROC = Path("/proc")


class CgroupFailed(Exception):
    """The cgroup could not be made or entered: no start now, try again later. The message says what would help."""


class Impossible(Exception):
    """This cgroup manager cannot be had on this host as it is. The message says why, and what would change that."""


class Cgroup(Protocol):
    """The cgroup of one process to come. The caller closes it, whether the process was spawned or not."""

    @property
    def stdin(self) -> int | None:
        """The descriptor that the child must get as its standard input; None: any will do. This object closes it."""
        ...

    @property
    def enters_as_root(self) -> bool:
        """Whether the spawned process needs our privileges to enter, and becomes another user only then."""
        ...

    def enter(self) -> None:
        """Called before the spawn, in a thread that starts the process and ends afterwards.

        Raises:
            OSError: the cgroup cannot be entered.
        """
        ...

    def wrap(self, argv: Sequence[str]) -> tuple[str, ...]:
        """The command line to be spawned: it enters the cgroup, then becomes `argv`, with the same pid."""
        ...

    async def settle(self, pid: int) -> None:
        """Wait until the spawned process is in its cgroup; the process execs only after that.

        Raises:
            CgroupFailed: the process is not in it. It will never exec, but end by itself: wait for its end.
        """
        ...

    def close(self) -> None:
        """Close the descriptors. A child that still waits to enter ends. Closing twice is no error."""
        ...


class CgroupManager(Protocol):
    """One way to give processes cgroups of their own.

    Attributes:
        name: `systemd`, `cgroup` or `none`, as in the setting.
        survives_container: whether processes in such cgroups outlive the supervisor's container.
    """

    name: str
    survives_container: bool

    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Cgroup:
        """Make a cgroup for a new process of the instance.

        Args:
            instance: the instance's id.
            incarnation: makes the name of the cgroup unique: the cgroup of the last process may not be gone yet.
            limits: what the process may use.

        Raises:
            CgroupFailed: it cannot be made.
        """
        ...

    async def remove(self, instance: InstanceId) -> None:
        """Remove what is left of the instance's cgroups, once its process is proven gone. Never fails."""
        ...

    async def close(self) -> None:
        """Release what this manager holds open. Processes stay where they are."""
        ...


class SameCgroup:
    """No cgroup of its own: the process stays in its supervisor's."""

    stdin: int | None = None
    enters_as_root = False

    def enter(self) -> None:
        """Nothing to do."""

    def wrap(self, argv: Sequence[str]) -> tuple[str, ...]:
        """As it is."""
        return tuple(argv)

    async def settle(self, pid: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class NoCgroups:
    """Gives no cgroups: `KVM_CGROUP=none`, or nothing else is possible.

    Args:
        survives_container: whether the processes outlive the supervisor's container or service all the same.
    """

    name = "none"

    def __init__(self, *, survives_container: bool) -> None:
        self.survives_container = survives_container

    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Cgroup:
        """Make nothing. Refuse limits, because nothing would enforce them.

        Raises:
            CgroupFailed: there are limits.
        """
        if limits != Limits():
            raise CgroupFailed(
                "limits need a cgroup of their own, which cannot be had here (KVM_CGROUP is none); "
                "give the container the host's D-Bus socket or /sys/fs/cgroup, or remove the limits"
            )
        return SameCgroup()

    async def remove(self, instance: InstanceId) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""


def cgroups_of(pid: int | str, proc: Path = PROC) -> dict[str, str]:
    """The cgroups of a process, by the controllers of their hierarchy, as in proc_pid_cgroup(5); `""` is v2's.

    Raises:
        OSError: there is no such process.
    """
    lines = (line.split(":", 2) for line in os.fsdecode((proc / str(pid) / "cgroup").read_bytes()).splitlines())
    return {controllers: path for _, controllers, path in lines}
