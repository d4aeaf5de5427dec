"""The numbers of users and groups that QEMUs run as: one of each for every instance, from one range.

A number is worked out from the instance's id, so it mostly stays the same over restarts and hosts, as that of a service
with `DynamicUser=` does (systemd.exec(5)). Where another instance has it, the next free one is taken.

The default range meets no other that is usual. Sources: systemd, docs/UIDS-GIDS.md (1000–60000 people, 60001–60577
homed and containers' people, 61184–65519 `DynamicUser=`, 65534 nobody, 65535 no number, 65536–524287 unused, from
524288 on nspawn); Debian Policy 9.2.2 (60000–64999 Debian's own, from 65536 on free); login.defs(5) and subuid(5)
(SUB_UID_MIN and SUB_GID_MIN 100000, from which useradd, Docker's userns-remap and rootless Podman take theirs); Incus
(from 1000000). kubelet alone starts at 65536, where pods have user namespaces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId

RESERVED = 2
"""How many of the first numbers are no instance's: the user of image tools, and the group of /dev/kvm."""

LEAST_SIZE = RESERVED + 16
"""The smallest range. Arbitrary; a smaller one is a slip."""

FIRST, LAST = 1000, (1 << 31) - 1
"""What a range may hold: no system users, and nothing that some programs take for negative (systemd's UIDS-GIDS)."""

NOT_A_USER = range(65534, 65536)
"""`nobody`, and -1 in sixteen bits."""


def trouble_with(first: int, last: int) -> str | None:
    """What would be right where this is no range for QEMUs; None when it is one."""
    if first < FIRST or last > LAST or not set(NOT_A_USER).isdisjoint(range(first, min(last, NOT_A_USER.stop) + 1)):
        return f"it lies between {FIRST} and {LAST}, and holds neither 65534 (nobody) nor 65535 (no user)"
    if last - first + 1 < LEAST_SIZE:
        return f"it has {LEAST_SIZE} numbers at least"
    return None


@frozen
class UidRange:
    """The numbers from `first` to `last`, both included; users and groups have the same ones."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def of_tools(self) -> int:
        """User and group of programs that read images from outside."""
        return self.first

    @property
    def of_kvm(self) -> int:
        """The group that gets /dev/kvm on a host without a group `kvm`."""
        return self.first + 1

    def for_instance(self, instance: InstanceId) -> Iterator[int]:
        """Every number that the instance may have, the preferred one first."""
        begin, size = self.first + RESERVED, self.last + 1 - self.first - RESERVED
        digest = hashlib.sha256(instance.encode()).digest()
        at = int.from_bytes(digest[:8], "big") % size
        for step in range(size):
            yield begin + (at + step) % size


DEFAULT_UIDS = UidRange(70000, 79999)
