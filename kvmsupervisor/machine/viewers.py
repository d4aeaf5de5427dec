"""Viewers of a machine's display: connections that are handed to its QEMU, which then speaks VNC on them.

Once handed over, nothing of ours is between the two: whatever becomes of the supervisor, they go on.

Source: `getfd`, `add_client` and `closefd` in QEMU's QMP reference
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

from kvmsupervisor.adapters.qmp import MonitorRefused
from kvmsupervisor.domain.hardware import takes_viewers
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.spec import Display, spec_from_object
from kvmsupervisor.machine.monitor import Ask


class NotShown(Exception):
    """The display cannot be shown. The message says why, and what would be right."""


class Viewers:
    """Hands viewers to one QEMU after the other.

    Args:
        ask: QEMU.
        record: of it; None while there is none.
    """

    def __init__(self, ask: Ask, record: Callable[[], Incarnation | None]) -> None:
        self._ask = ask
        self._record = record
        self._numbers = itertools.count(1)

    async def show(self, fd: int) -> None:
        """Have QEMU serve the viewer at the other end of a connected socket; `fd` stays the caller's.

        Raises:
            NotShown: that cannot be.
        """
        record = self._record()
        if record is None:
            raise NotShown("its QEMU does not run")
        if not takes_viewers(record.argv):
            # Such a QEMU would answer that it has taken the viewer, and leave it alone.
            raise NotShown(_why_not(record))
        if record.incoming:
            raise NotShown("its guest is on its way from another host")
        name = f"viewer{next(self._numbers)}"
        try:
            if await self._ask("getfd", {"fdname": name}, fd=fd) is None:
                raise NotShown("its QEMU does not answer")
            try:
                answer = await self._ask("add_client", {"protocol": "vnc", "fdname": name, "skipauth": True})
            except MonitorRefused:
                with contextlib.suppress(MonitorRefused):
                    await self._ask("closefd", {"fdname": name})
                raise
        except MonitorRefused as error:
            raise NotShown(str(error)) from error
        if answer is None:
            raise NotShown("its QEMU does not answer")


def _why_not(record: Incarnation) -> str:
    spec = spec_from_object(record.spec)
    if spec is not None and spec.screen is not Display.NONE:
        return "its QEMU was started by an earlier release, which had no displays for browsers: restart it once"
    return "it has no display: set the key display to std, virtio or qxl, and restart it"
