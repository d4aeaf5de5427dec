"""Cgroups of QEMU processes, outside the supervisor's container. `choose` finds the manager that this host can have."""

from kvmsupervisor.adapters.cgroup.choice import Chosen, Wanted, choose
from kvmsupervisor.adapters.cgroup.manager import Cgroup, CgroupFailed, CgroupManager, Impossible, NoCgroups, SameCgroup

__all__ = [
    "Cgroup",
    "CgroupFailed",
    "CgroupManager",
    "Chosen",
    "Impossible",
    "NoCgroups",
    "SameCgroup",
    "Wanted",
    "choose",
]
