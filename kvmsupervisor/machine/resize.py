"""Images that were grown under a running QEMU: when they are looked at, and how QEMU and its guest hear of it."""

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
    """Of one QEMU.

    Attributes:
        at: when its images are to be looked at again; never for a machine without.
    """

    def __init__(self, clock: Clock, command: Command) -> None:
        self.at = math.inf
        self._clock = clock
        self._command = command

    def look(self, spec: Spec | None, after_s: float) -> None:
        """Its images are to be looked at after some time; nothing for a machine without."""
        if spec is not None and growable(spec):
            self.at = self._clock.now() + after_s

    async def tell(self, sizes: Mapping[str, int]) -> None:
        """Tell QEMU, and through it the guest, of disks that are larger now: bytes by block node. None is made less."""
        for device in await self._command("query-block", None) or ():
            inserted = device.get("inserted") or {}
            node, known = inserted.get("node-name"), (inserted.get("image") or {}).get("virtual-size")
            size = sizes.get(str(node))
            if size is not None and known is not None and size > known:
                await self._command("block_resize", {"node-name": node, "size": size})
                log.info("disk.grown", disk=node, before=known, after=size)
