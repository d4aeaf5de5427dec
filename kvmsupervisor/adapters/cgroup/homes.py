"""What a home is: a cgroup outside the container's, for one QEMU process, which enters it before it execs.

Why before: memory that was charged elsewhere stays there, threads that were made elsewhere have to be moved too, and a
supervisor that is cut off between the two leaves a guest that dies with the container. Why not by `preexec_fn`: that is
Python between fork and exec, in a program with threads. A prefix of `/bin/sh` costs about a millisecond.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import Limits

PROC = Path("/proc")


class HomeFailed(Exception):
    """This home could not be made or entered: no start now, try again later. The message says what would help."""


class Impossible(Exception):
    """This kind of home cannot be had on this host as it is; the message says why, and what would change that."""


class Home(Protocol):
    """The home of one process to come. Whoever got it closes it, whether the process was spawned or not."""

    @property
    def stdin(self) -> int | None:
        """The descriptor that the child must get as its standard input; None: any will do. Stays the home's."""
        ...

    def wrap(self, argv: Sequence[str]) -> tuple[str, ...]:
        """The command line to be spawned: it enters the home, then becomes `argv`, with the same pid."""
        ...

    async def settle(self, pid: int) -> None:
        """See the spawned process into its home; it execs only after that.

        Raises:
            HomeFailed: it is not there. It will never exec, but end by itself: its end is to be awaited.
        """
        ...

    def close(self) -> None:
        """Let go of descriptors. A child that has not been let in ends. Closing twice is no error."""
        ...


class Homes(Protocol):
    """One way to give processes homes.

    Attributes:
        name: `systemd`, `cgroup` or `none`, as in the setting.
        survives_container: whether processes in such homes outlive the supervisor's container.
    """

    name: str
    survives_container: bool

    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Home:
        """Make a home for a new process of the instance.

        Args:
            instance: whose it is.
            incarnation: makes the home's name its own: that of the last process may not be gone yet.
            limits: what the process may use.

        Raises:
            HomeFailed: it cannot be made.
        """
        ...

    async def remove(self, instance: InstanceId) -> None:
        """Remove what is left of the instance's homes, once its process is proven gone. Never fails."""
        ...

    async def close(self) -> None:
        """Let go of what was held for all homes. Processes stay where they are."""
        ...


class Anywhere:
    """The home of a process that stays where its supervisor is."""

    stdin: int | None = None

    def wrap(self, argv: Sequence[str]) -> tuple[str, ...]:
        """As it is."""
        return tuple(argv)

    async def settle(self, pid: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class Nowhere:
    """No homes: `KVM_CGROUP=none`, or nothing else is possible.

    Args:
        survives_container: whether whoever ends the supervisor leaves the processes beside it alone.
    """

    name = "none"

    def __init__(self, *, survives_container: bool) -> None:
        self.survives_container = survives_container

    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Home:
        """Make nothing; refuse limits, which nobody would keep.

        Raises:
            HomeFailed: there are limits.
        """
        if limits != Limits():
            raise HomeFailed(
                "limits need a cgroup of their own, which cannot be had here (KVM_CGROUP is none); "
                "give the container the host's D-Bus socket or /sys/fs/cgroup, or remove the limits"
            )
        return Anywhere()

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
