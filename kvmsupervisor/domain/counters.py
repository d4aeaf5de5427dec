"""What is counted of a guest: by QEMU its disks and the memory that its balloon driver reports, by the host its NICs.

Parts of these QMP answers come from the guest, so the type of every part is checked.

Sources: `query-blockstats` and the property `guest-stats` of the balloon device
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, docs/interop/virtio-balloon-stats.rst).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmsupervisor.domain.frozen import frozen

UNKNOWN = 2**64 - 1
"""The balloon's value for a figure that its driver did not report."""

BALLOON = "/machine/peripheral/balloon0"

MEMORY_KINDS = {"total": "stat-total-memory", "free": "stat-free-memory", "available": "stat-available-memory"}
"""Figures that are kept, by the names that people use: `available` is what Linux calls MemAvailable."""


OPERATIONS = {"read": "rd", "write": "wr", "flush": "flush"}
"""Operations of a disk, by the names that people use; QEMU's words in `query-blockstats`."""


@frozen(kw_only=True)
class Work:
    """Operations of one kind on a disk.

    Attributes:
        done: how many came to their end.
        seconds: that they took, each by itself.
        failed: how many failed.
    """

    done: int = 0
    seconds: float = 0.0
    failed: int = 0


@frozen(kw_only=True)
class DiskCounts:
    """One disk since QEMU started. `name` is that of its block node, such as `disk0`; `work` is by `OPERATIONS`."""

    name: str
    read_bytes: int
    written_bytes: int
    work: tuple[tuple[str, Work], ...] = ()


@frozen(kw_only=True)
class Flow:
    """What went one way."""

    bytes: int = 0
    packets: int = 0
    errors: int = 0
    dropped: int = 0


@frozen(kw_only=True)
class Traffic:
    """What one NIC received and sent, as its guest sees it."""

    received: Flow
    sent: Flow


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
            work = tuple((operation, _work(stats, word)) for operation, word in OPERATIONS.items())
            yield DiskCounts(name=name, read_bytes=read, written_bytes=written, work=work)


def _work(stats: Mapping[str, object], word: str) -> Work:
    done, took_ns, failed = (
        value if isinstance(value := stats.get(name), int) and 0 <= value <= UNKNOWN else 0
        for name in (f"{word}_operations", f"{word}_total_time_ns", f"failed_{word}_operations")
    )
    return Work(done=done, seconds=took_ns / 1e9, failed=failed)


def memory_counts(answer: object) -> tuple[tuple[str, int], ...]:
    """The figures in the balloon's `guest-stats`."""
    stats = answer.get("stats") if isinstance(answer, dict) else None
    if not isinstance(stats, dict):
        return ()
    found = ((kind, stats.get(name)) for kind, name in MEMORY_KINDS.items())
    return tuple((kind, value) for kind, value in found if isinstance(value, int) and 0 <= value < UNKNOWN)
