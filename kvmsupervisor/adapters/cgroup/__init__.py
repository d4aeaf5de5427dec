"""Homes of QEMU processes: cgroups outside the supervisor's container. `choose` says which can be had."""

from kvmsupervisor.adapters.cgroup.choice import Chosen, Wanted, choose
from kvmsupervisor.adapters.cgroup.homes import Anywhere, Home, HomeFailed, Homes, Impossible, Nowhere

__all__ = ["Anywhere", "Chosen", "Home", "HomeFailed", "Homes", "Impossible", "Nowhere", "Wanted", "choose"]
