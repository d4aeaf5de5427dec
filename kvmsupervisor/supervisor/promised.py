"""How much memory is promised to guests on each host of the cluster, by the keys of all instances.

An estimate: it keeps a host from being asked for what it cannot hold. Whether it takes a guest in is its own decision.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.admission import OVERHEAD_MIB
from kvmsupervisor.domain.spec import RawValue
from kvmsupervisor.domain.values import Unfit, ram_mib


class Promises:
    """Counted anew only when keys or placements have changed: that takes 5 µs for each instance of the cluster.

    Args:
        wishes: those of all hosts.
    """

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._seen: tuple[int, ...] = ()
        self._by_host: Mapping[str, int] = {}

    def by_host(self) -> Mapping[str, int]:
        """MiB by host; a host without instances is missing."""
        wishes = self._wishes
        seen = (wishes.era, wishes.revision, wishes.placements_revision)
        if seen != self._seen:
            counted: dict[str, int] = {}
            for name in wishes.ids():
                host = wishes.runs_on(name)
                if host is not None:
                    counted[host] = counted.get(host, 0) + _need_mib(wishes.keys_of(name))
            self._seen, self._by_host = seen, counted
        return self._by_host


def _need_mib(keys: Mapping[bytes, RawValue]) -> int:
    """As `admission.need_mib`, without parsing all of its keys."""
    power, ram, huge = (keys.get(name) for name in (b"power", b"ram", b"hugepages"))
    if ram is None or (power is not None and power.value.strip().startswith(b"off")):
        return 0
    if huge is not None and huge.value.strip() != b"off":
        return OVERHEAD_MIB
    try:
        return OVERHEAD_MIB + ram_mib(ram.value.decode().strip())
    except (Unfit, UnicodeDecodeError):
        return 0
