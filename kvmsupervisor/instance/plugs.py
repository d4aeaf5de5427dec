"""The NICs of one instance's QEMU: whether they are plugged in, and how one that is not gets its bridge back.

What a person has put into another bridge, or set down, is told and left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace

from kvmsupervisor.domain import view
from kvmsupervisor.domain.nics import ELSEWHERE, Attachment, Plug, look
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.machine.machine import Machine

AGAIN_S = 5.0
"""Pause between two attempts. The kernel tells of what it did within milliseconds; an administrator who allows a bridge
again tells nobody. Cheap: an ioctl, and a short file that is read."""


class Plugs:
    """Of one instance, whichever QEMU it has.

    Args:
        machine: its QEMU.
        context: what all instances share: the host's interfaces, and the bridge of a NIC that nothing else names.
        tell: logs an event of the instance.

    Attributes:
        seen: where each NIC is plugged in, as last looked at; nothing of those that are not to be seen from here.
    """

    def __init__(self, machine: Machine, *, context: InstanceContext, tell: Callable[..., None]) -> None:
        self.seen: Sequence[Plug] = ()
        self._machine = machine
        self._links = context.links
        self._network = context.system.network
        self._clock = context.clock
        self._bridge_if = context.host_side.bridge_if
        self._tell = tell
        self._at = 0.0
        self._trouble: str | None = None

    def attachments(self) -> Iterator[Attachment]:
        """How the NICs of its QEMU were attached to the host."""
        spec, record = self._machine.spec, self._machine.record
        if spec is None or record is None:
            return
        for place, (nic, tap) in enumerate(zip(spec.bridged_nics, record.taps, strict=False)):
            # An earlier release has kept no more than the tap's name.
            index = record.tap_indexes[place] if place < len(record.tap_indexes) else None
            bridge = record.bridges[place] if place < len(record.bridges) else nic.bridge or self._bridge_if
            yield Attachment(nic=f"nic{nic.number}", tap=tap, index=index, bridge=bridge)

    def concern(self, changed: Set[int]) -> bool:
        """Whether a change of these interfaces may be one of its NICs, of their bridges, or of one that is missing."""
        if any(plug.notice is not None for plug in self.seen):
            return True
        links = self._links.all or {}
        return any(
            one.index is None or one.index not in links or not changed.isdisjoint({one.index, links[one.index].master})
            for one in self.attachments()
            if one.index != ELSEWHERE
        )

    def look(self, process: view.Process) -> view.Process:
        """`process`, with what is to be said of its NICs now."""
        links = self._links.all
        if links is None or process.exit is not None:
            self.seen = ()
            return process
        found = (look(one, links) for one in self.attachments())
        self.seen = [plug for plug in found if plug is not None]
        if not self.seen:
            return process
        unplugged = any(plug.into is not None for plug in self.seen)
        notices = tuple(plug.notice for plug in self.seen if plug.notice is not None)
        if unplugged and self._trouble is not None:
            notices += (self._trouble,)
        return replace(process, unplugged=notices, plug_at=self._at if unplugged else math.inf)

    async def plug(self) -> None:
        """Plug in again what is no port of anything, where its bridge is there."""
        self._at = self._clock.now() + AGAIN_S
        self._trouble = None
        for plug in self.seen:
            if plug.into is None:
                continue
            index, bridge = plug.into
            try:
                if (denial := self._network.denial_of(bridge)) is not None:
                    self._trouble = f"{plug.nic} is not plugged in again: {denial}"
                    continue
                await self._links.plug(index, bridge)
            except OSError as error:
                self._trouble = f"{plug.nic} cannot be plugged in again: {error.strerror or error}"
                continue
            self._tell("instance.nic_plugged_in", nic=plug.nic, bridge=bridge)
