"""Tells a running QEMU, and through it the guest, that a disk has grown; and when to check the disks again.

People grow an image in Ceph, or QEMU does where its key says so. QEMU itself grows a file, because it knows the format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.qmp import Command, MonitorRefused
from kvmsupervisor.domain.local_disk import FileDisk, size_text, too_small
from kvmsupervisor.domain.qmp_answers import number_in, object_in, objects_in, text_in
from kvmsupervisor.domain.spec import RbdDisk, Spec
from kvmsupervisor.domain.storage import growable, pinning

log = structlog.get_logger(__name__)


class Growth:
    """The growth of one QEMU's images.

    Attributes:
        at: when to check the disks again, CLOCK_BOOTTIME; never for a machine without disks that can grow.
        trouble: what keeps a disk from the size of its key, for people.
    """

    def __init__(self, clock: Clock, ask: Command) -> None:
        self.at = math.inf
        self.trouble: tuple[str, ...] = ()
        self._clock = clock
        self._ask = ask

    def look(self, spec: Spec | None, after_s: float) -> None:
        """Have the disks checked after some seconds. Does nothing for a machine without disks that can grow."""
        if spec is not None and (growable(spec) or pinning(spec)):
            self.at = self._clock.now() + after_s

    async def tell(self, sizes: Mapping[str, int], wanted: Mapping[str, tuple[str, FileDisk | RbdDisk]]) -> None:
        """Resize the disks in QEMU that have grown, or are to grow. No disk is made smaller.

        Args:
            sizes: bytes of images in Ceph, by block node.
            wanted: disks whose keys have a size, by block node: the key, and the disk as it is wanted.
        """
        trouble = []
        for device in objects_in(await self._asked("query-block")):
            inserted = object_in(device, "inserted")
            node, known = text_in(inserted, "node-name") or "", number_in(object_in(inserted, "image"), "virtual-size")
            key, disk = wanted.get(node, ("", None))
            # An image may have grown since QEMU looked: where its size is not known, nothing is done to it.
            actual = known if isinstance(disk, FileDisk) else sizes.get(node)
            if actual is None or known is None:
                continue
            if disk is not None and (said := too_small(key, disk, actual)) is not None:
                trouble.append(said)
            size = max(actual, 0 if disk is None or disk.size is None else disk.size)
            if size <= known:
                continue
            try:
                await self._ask("block_resize", {"node-name": node, "size": size})
            except MonitorRefused as error:
                trouble.append(f"{key or node}: it could not be grown to {size_text(size)}: {error}")
                log.warning("disk.not_grown", disk=node, before=known, after=size, error=str(error))
            else:
                log.info("disk.grown", disk=node, before=known, after=size)
        self.trouble = tuple(trouble)

    async def _asked(self, command: str) -> Any:
        try:
            return await self._ask(command, None)
        except MonitorRefused:
            return None
