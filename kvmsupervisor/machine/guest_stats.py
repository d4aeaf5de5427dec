"""Reads QEMU's counters of a guest, together with each `query-status`. Metrics show them."""

from __future__ import annotations

from kvmsupervisor.adapters.qmp import Command
from kvmsupervisor.domain.counters import BALLOON, GuestCounts, disk_counts, memory_counts
from kvmsupervisor.domain.spec import Spec


async def count(ask: Command, spec: Spec | None) -> GuestCounts:
    """Read the counters. A machine without disks is not asked for them: with a hundred machines each query counts."""
    disks = disk_counts(await ask("query-blockstats", None)) if spec is not None and spec.all_disks else ()
    told = await ask("qom-get", {"path": BALLOON, "property": "guest-stats"})
    return GuestCounts(disks=disks, memory=memory_counts(told))
