"""Tells a running QEMU, and through it the guest, that an image has grown; and when to check the images again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.qmp import Command
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.domain.storage import growable

log = structlog.get_logger(__name__)


class Growth:
    """The growth of one QEMU's images.

    Attributes:
        at: when to check the images again, CLOCK_BOOTTIME; never for a machine without images that can grow.
    """

    def __init__(self, clock: Clock, command: Command) -> None:
        self.at = math.inf
        self._clock = clock
        self._command = command

    def look(self, spec: Spec | None, after_s: float) -> None:
        """Have the images checked after some seconds. Does nothing for a machine without images that can grow."""
        if spec is not None and growable(spec):
            self.at = self._clock.now() + after_s

    async def tell(self, sizes: Mapping[str, int]) -> None:
        """Resize the disks in QEMU whose images have grown. `sizes`: bytes by block node. No disk is made smaller."""
        for device in await self._command("query-block", None) or ():
            inserted = device.get("inserted") or {}
            node, known = inserted.get("node-name"), (inserted.get("image") or {}).get("virtual-size")
            size = sizes.get(str(node))
            if size is not None and known is not None and size > known:
                await self._command("block_resize", {"node-name": node, "size": size})
                log.info("disk.grown", disk=node, before=known, after=size)
