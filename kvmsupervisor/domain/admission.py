"""Admission: which instance may start its QEMU on this host now. Slots limit the starts at one time; memory must fit.

Memory is counted by what is promised to the guests, not by what they have touched so far: a host that runs out of it
lets its OOM killer end some guest, and which one cannot be foreseen.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import Spec

OVERHEAD_MIB = 64
"""What a QEMU needs beside its guest's memory. Arbitrary, between a tiny paused one (16 MiB were measured) and one that
serves disks and a display under load (some hundred); the reserve makes up for the rest."""


def need_mib(spec: Spec) -> int:
    """Of the host's ordinary memory: huge pages are set aside already."""
    return OVERHEAD_MIB + (spec.ram_mib if spec.hugepages is None else 0)


@frozen(kw_only=True)
class _Waiting:
    """One instance in the line."""

    need_mib: int
    priority: int
    notify: Callable[[], None]


class Admission:
    """`width` slots for starting, `memory_mib` for all guests together, and a line.

    The line is served by priority, then first come, first served. An instance that waits for memory lets
    those behind it pass whose memory fits.

    Invariant: while a slot is free, no instance in the line has memory that fits.

    Args:
        width: how many QEMUs may be starting at one time.
        memory_mib: what all guests together may have; None for no limit.
    """

    def __init__(self, width: int, memory_mib: int | None = None) -> None:
        self._width = width
        self._memory_mib = memory_mib
        self._holders: set[InstanceId] = set()
        self._line: dict[InstanceId, _Waiting] = {}
        self._promised: dict[InstanceId, int] = {}

    def state(self, instance: InstanceId) -> bool | None:
        """True: holds a slot; False: stands in line; None: neither."""
        if instance in self._holders:
            return True
        return False if instance in self._line else None

    def shortage(self, instance: InstanceId) -> str | None:
        """Why the memory of an instance in the line does not fit, for people; None when it waits for a slot only."""
        waiting = self._line.get(instance)
        if waiting is None or self._fits(instance, waiting.need_mib):
            return None
        others = [mib for name, mib in self._promised.items() if name != instance]
        return (
            f"it needs {waiting.need_mib} MiB, and of {self._memory_mib} MiB for guests {sum(others)} MiB are promised "
            f"to {len(others)} other{'' if len(others) == 1 else 's'}"
        )

    def has_room(self, instance: InstanceId, need_mib: int) -> bool:
        """Whether its memory fits beside what is promised to others."""
        return self._fits(instance, need_mib)

    def room(self) -> tuple[tuple[str, int], ...]:
        """Bytes by kind: `promised` to guests, and `for_guests`, where there is a limit."""
        promised = ("promised", sum(self._promised.values()) << 20)
        return (promised,) if self._memory_mib is None else (promised, ("for_guests", self._memory_mib << 20))

    def request(
        self, instance: InstanceId, notify: Callable[[], None], *, need_mib: int = 0, priority: int = 0
    ) -> None:
        """Take a free slot, or a place in the line; `notify` is called when the turn comes."""
        if instance in self._holders or instance in self._line:
            return
        if len(self._holders) < self._width and self._fits(instance, need_mib):
            self._grant(instance, need_mib)
            self._serve()
        else:
            self._line[instance] = _Waiting(need_mib=need_mib, priority=priority, notify=notify)

    def release(self, instance: InstanceId) -> None:
        """Give the slot, or the place in the line, away. Promised memory stays promised."""
        self._line.pop(instance, None)
        if instance in self._holders:
            self._holders.remove(instance)
            self._serve()

    def promise(self, instance: InstanceId, mib: int) -> None:
        """Count memory for a QEMU that lives, or is started now, whether it fits or not."""
        self._promised[instance] = mib
        self._serve()

    def take_back(self, instance: InstanceId) -> None:
        """Free the memory: the QEMU is gone and will not come back."""
        if self._promised.pop(instance, None) is not None:
            self._serve()

    def _fits(self, instance: InstanceId, need_mib: int) -> bool:
        if self._memory_mib is None:
            return True
        others = sum(self._promised.values()) - self._promised.get(instance, 0)
        return others + need_mib <= self._memory_mib

    def _grant(self, instance: InstanceId, need_mib: int) -> None:
        self._holders.add(instance)
        self._promised[instance] = need_mib

    def _serve(self) -> None:
        """Hand out what is free."""
        if len(self._holders) >= self._width:
            return
        for name, waiting in sorted(self._line.items(), key=lambda item: -item[1].priority):
            if self._fits(name, waiting.need_mib):
                del self._line[name]
                self._grant(name, waiting.need_mib)
                waiting.notify()
                # It may need less than it was promised before, so one that was passed over may fit now.
                self._serve()
                return
