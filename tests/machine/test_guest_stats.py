"""What is asked of a QEMU for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvmsupervisor.domain.counters import OPERATIONS, DiskCounts, GuestCounts, Work
from kvmsupervisor.domain.spec import RbdDisk, Spec
from kvmsupervisor.machine.guest_stats import count

ANSWERS: dict[str, Any] = {
    "query-blockstats": [{"node-name": "disk0", "stats": {"rd_bytes": 1, "wr_bytes": 2}}],
    "qom-get": {"stats": {"stat-free-memory": 3}, "last-update": 1},
}


class Qemu:
    """Answers, or with `answers` empty does not."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def ask(self, command: str, arguments: Mapping[str, object] | None) -> Any:
        self.asked.append(command)
        return self.answers.get(command)


async def test_disks_and_memory() -> None:
    """Law: a machine with a disk is asked for it, and for what its balloon knows."""
    qemu = Qemu(ANSWERS)
    counts = await count(qemu.ask, Spec(ram_mib=64, rbd=RbdDisk("p", "i")))
    idle = tuple((operation, Work()) for operation in OPERATIONS)
    assert counts == GuestCounts(
        disks=(DiskCounts(name="disk0", read_bytes=1, written_bytes=2, work=idle),), memory=(("free", 3),)
    )


async def test_a_machine_without_disks_is_not_asked_for_them() -> None:
    """Law: with a hundred machines each question counts; one whose spec cannot be read has none either."""
    for spec in (Spec(ram_mib=64), None):
        qemu = Qemu(ANSWERS)
        assert (await count(qemu.ask, spec)).disks == ()
        assert qemu.asked == ["qom-get"]


async def test_silence() -> None:
    """Law: a QEMU that does not answer has counted nothing."""
    assert await count(Qemu({}).ask, Spec(ram_mib=64, rbd=RbdDisk("p", "i"))) == GuestCounts()
