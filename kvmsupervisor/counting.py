"""What QEMU counted of its guest, asked for when it is asked for its state anyway; metrics show it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from kvmsupervisor.domain.counters import BALLOON, GuestCounts, disk_counts, memory_counts
from kvmsupervisor.domain.spec import Spec

Ask = Callable[[str, Mapping[str, object] | None], Awaitable[Any]]
"""Runs a QMP command; None when it was not done."""


async def count(ask: Ask, spec: Spec | None) -> GuestCounts:
    """Ask. A machine without disks is not asked for them: with a hundred machines each question counts."""
    disks = disk_counts(await ask("query-blockstats", None)) if spec is not None and spec.all_disks else ()
    told = await ask("qom-get", {"path": BALLOON, "property": "guest-stats"})
    return GuestCounts(disks=disks, memory=memory_counts(told))
