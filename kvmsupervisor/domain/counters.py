"""What QEMU counts of its guest: bytes of each disk, and the memory that the guest's balloon driver reports.

Parts of these QMP answers come from the guest, so the type of every part is checked.

Sources: `query-blockstats` and the property `guest-stats` of the balloon device
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, docs/interop/virtio-balloon-stats.rst).
"""

from __future__ import annotations

from collections.abc import Iterator

from kvmsupervisor.domain.frozen import frozen

UNKNOWN = 2**64 - 1
"""The balloon's value for a figure that its driver did not report."""

BALLOON = "/machine/peripheral/balloon0"

MEMORY_KINDS = {"total": "stat-total-memory", "free": "stat-free-memory", "available": "stat-available-memory"}
"""Figures that are kept, by the names that people use: `available` is what Linux calls MemAvailable."""


@frozen(kw_only=True)
class DiskCounts:
    """One disk since QEMU started. `name` is that of its block node, such as `disk0`."""

    name: str
    read_bytes: int
    written_bytes: int


@frozen(kw_only=True)
class Traffic:
    """Bytes of one NIC, as its guest sees them."""

    received_bytes: int
    sent_bytes: int


@frozen(kw_only=True)
class GuestCounts:
    """What was counted when QEMU was asked last.

    Attributes:
        disks: each of them.
        memory: bytes by kind (`MEMORY_KINDS`), empty while no balloon driver reports.
    """

    disks: tuple[DiskCounts, ...] = ()
    memory: tuple[tuple[str, int], ...] = ()


def disk_counts(answer: object) -> tuple[DiskCounts, ...]:
    """The disks in an answer to `query-blockstats`."""
    return tuple(_disks(answer)) if isinstance(answer, list) else ()


def _disks(answer: list[object]) -> Iterator[DiskCounts]:
    for entry in answer:
        if not isinstance(entry, dict):
            continue
        name, stats = entry.get("node-name"), entry.get("stats")
        if not isinstance(name, str) or not name.startswith("disk") or not isinstance(stats, dict):
            continue
        read, written = stats.get("rd_bytes"), stats.get("wr_bytes")
        if isinstance(read, int) and isinstance(written, int):
            yield DiskCounts(name=name, read_bytes=read, written_bytes=written)


def memory_counts(answer: object) -> tuple[tuple[str, int], ...]:
    """The figures in the balloon's `guest-stats`."""
    stats = answer.get("stats") if isinstance(answer, dict) else None
    if not isinstance(stats, dict):
        return ()
    found = ((kind, stats.get(name)) for kind, name in MEMORY_KINDS.items())
    return tuple((kind, value) for kind, value in found if isinstance(value, int) and 0 <= value < UNKNOWN)
