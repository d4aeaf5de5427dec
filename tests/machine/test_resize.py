"""Disks that grow under a running QEMU: never smaller, whatever key, Ceph and QEMU say of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from kvmsupervisor.domain.local_disk import FileDisk
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.machine.resize import Growth
from tests.fakes.clock import FakeClock

G = 1 << 30


class Qemu:
    """One disk as QEMU knows it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.resized: list[int] = []

    async def ask(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
        if command == "block_resize":
            assert arguments is not None
            self.resized.append(arguments["size"])
            return {}
        return [{"inserted": {"node-name": "disk0", "image": {"virtual-size": self.size}}}]


@pytest.mark.parametrize(
    ("wanted", "actual", "known", "resized", "trouble"),
    [
        (20 * G, 10 * G, 10 * G, [20 * G], False),
        (20 * G, 20 * G, 10 * G, [20 * G], False),
        # People have grown it beyond its key: QEMU hears of that, and nothing makes it smaller again.
        (20 * G, 30 * G, 10 * G, [30 * G], True),
        (20 * G, 30 * G, 30 * G, [], True),
        (None, 30 * G, 10 * G, [30 * G], False),
        # Its size is not known now: QEMU may have the former one.
        (20 * G, None, 10 * G, [], False),
    ],
)
async def test_an_image_in_ceph(
    wanted: int | None, actual: int | None, known: int, resized: list[int], *, trouble: bool
) -> None:
    """Law: an image becomes as large as its key says, or as it is in Ceph, and never smaller."""
    qemu = Qemu(known)
    growth = Growth(FakeClock(), qemu.ask)
    wishes = {} if wanted is None else {"disk0": ("rbd", RbdDisk("p", "i", size=wanted))}
    await growth.tell({} if actual is None else {"disk0": actual}, wishes)
    assert qemu.resized == resized
    assert bool(growth.trouble) is trouble


async def test_a_file() -> None:
    """Law: QEMU knows the size of a file, and alone makes it larger."""
    qemu = Qemu(G)
    growth = Growth(FakeClock(), qemu.ask)
    await growth.tell({}, {"disk0": ("disk/0", FileDisk("a.raw", size=2 * G))})
    await growth.tell({}, {"disk0": ("disk/0", FileDisk("a.raw", size=G // 2))})
    assert qemu.resized == [2 * G]
    assert growth.trouble[0].startswith("disk/0: size=512M is less than the 1G")
