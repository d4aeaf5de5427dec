"""Start slots: how many QEMUs of one host may be starting at once, first come, first served."""

from __future__ import annotations

from collections.abc import Callable

from kvmsupervisor.domain.keys import InstanceId


class Slots:
    """`width` slots and a line behind them.

    Invariant: nobody stands in the line while a slot is free.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._holders: set[InstanceId] = set()
        self._line: dict[InstanceId, Callable[[], None]] = {}

    def state(self, instance: InstanceId) -> bool | None:
        """True: holds a slot; False: stands in line; None: neither."""
        if instance in self._holders:
            return True
        return False if instance in self._line else None

    def request(self, instance: InstanceId, notify: Callable[[], None]) -> None:
        """Take a free slot, or the last place in the line; `notify` is called when the turn comes."""
        if instance in self._holders or instance in self._line:
            return
        if len(self._holders) < self._width:
            self._holders.add(instance)
        else:
            self._line[instance] = notify

    def release(self, instance: InstanceId) -> None:
        """Give the slot, or the place in the line, away."""
        self._line.pop(instance, None)
        if instance not in self._holders:
            return
        self._holders.remove(instance)
        if self._line:
            following = next(iter(self._line))
            notify = self._line.pop(following)
            self._holders.add(following)
            notify()
