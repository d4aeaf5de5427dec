"""A guest that a disk's error has stopped: what is said of it, and how it goes on after a full file system.

QEMU keeps the request that failed, and tries it again when the guest goes on: nothing is lost
(qemu-system-x86_64(1), `werror=stop`). Only a guest that QEMU itself has stopped for that (`io-error`, every disk that
failed for want of room) is let go on: one that a person has paused is `paused`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.disk_files import FileTrouble
from kvmsupervisor.adapters.qmp import Command
from kvmsupervisor.domain.qmp_answers import object_in, objects_in, text_in
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.domain.storage import node_of, pinning

LOOK_EVERY_S = 5.0
"""How often it is looked whether there is room, and the least pause between two times that the guest is let go on."""

ENOUGH = 16 << 20
"""Bytes that make it worth going on. Arbitrary: a guest's kernel writes a megabyte at once, so less stops it again."""


class Room:
    """Of one QEMU.

    Attributes:
        at: when it is to be looked at, once the guest was stopped.
        said: what is said of it, for people; None where the error is not known.
    """

    def __init__(self, clock: Clock, command: Command) -> None:
        self.at = 0.0
        self.said: str | None = None
        self._clock = clock
        self._command = command

    async def look(self, spec: Spec, where: str, room: Callable[[], Awaitable[int]]) -> bool:
        """Look whether it lacks room, and whether there is some; True when the guest was told to go on.

        Args:
            spec: of the machine that runs.
            where: the folder of its files.
            room: tells how much is left there; raises FileTrouble.
        """
        self.at = self._clock.now() + LOOK_EVERY_S
        full = await self._full(spec)
        if not full:
            self.said = None
            return False
        keys = ", ".join(full)
        try:
            left = await room()
        except FileTrouble as error:
            self.said = f"{keys}: the file system of {where} was full, and how much room it has cannot be told: {error}"
            return False
        self.said = (
            f"{keys}: the file system of {where} is full ({left >> 20} MiB left), so its guest was stopped, and has "
            f"lost nothing; it goes on by itself once {ENOUGH >> 20} MiB are free: make room there"
        )
        return left >= ENOUGH and await self._command("cont", None) is not None

    def blame(self, said: str | None, *, again_s: float) -> None:
        """Take what somebody else has found out: `said`, for people, None for nothing; to be looked at again later."""
        self.said, self.at = said, self._clock.now() + again_s

    async def _full(self, spec: Spec) -> list[str]:
        """The keys of the disks that lack room; none where any disk has failed for another reason."""
        local = {node_of(disk): disk.key for disk, _ in spec.files if disk.key in pinning(spec)}
        full = []
        for device in objects_in(await self._command("query-block", None)):
            node = text_in(object_in(device, "inserted"), "node-name")
            match device.get("io-status"):
                case "nospace" if node in local:
                    full.append(local[node])
                case "ok" | None:
                    pass
                case _:
                    return []
        return full
