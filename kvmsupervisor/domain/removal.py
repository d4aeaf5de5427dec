"""The mass-removal hold: many machines of one host lose their keys at once, and a person shall say that it is meant.

A wrong prefix, an empty etcd or a slipped `etcdctl del --prefix` looks like an order to shut everything down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set

from kvmsupervisor.domain.keys import InstanceId

ALWAYS_ALLOWED = 2
"""So many removals within the window are never held, however few instances there are."""


class RemovalGuard:
    """Judges removals of one host's instances.

    Attributes:
        held: the instances whose removal waits for an operator's word.
    """

    def __init__(self, window_s: float) -> None:
        self.held: set[InstanceId] = set()
        self._window_s = window_s
        self._recent: deque[tuple[float, InstanceId]] = deque()

    def judge(self, removed: Set[InstanceId], present: Set[InstanceId], now: float) -> Set[InstanceId]:
        """Tell which of the instances that were just `removed` are to be held.

        Held are all of this batch, when it and what the window has seen before it make more than half of what the
        host had, and more than two.

        Args:
            removed: those whose `host` or all keys went in one batch.
            present: all instances of this host, those that are being shut down included.
            now: CLOCK_BOOTTIME.
        """
        while self._recent and self._recent[0][0] <= now - self._window_s:
            self._recent.popleft()
        self._recent.extend((now, instance) for instance in removed)
        gone = {instance for _, instance in self._recent}
        if len(gone) > ALWAYS_ALLOWED and 2 * len(gone) > len(gone | present):
            self.held |= removed
        return self.held & removed

    def release(self, instances: Set[InstanceId]) -> Set[InstanceId]:
        """Let these go; return those that were held. A removal that was confirmed, or taken back, is no news later."""
        freed = self.held & instances
        self.held -= freed
        self._recent = deque(entry for entry in self._recent if entry[1] not in freed)
        return freed
