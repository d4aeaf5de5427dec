"""The environment of a QEMU process: what it inherits, and the marks by which a successor knows it (law 8)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvmsupervisor.domain.incarnation import Incarnation

KEPT_ENVIRONMENT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "CEPH_CONF",
    "CEPH_ARGS",
)
"""What QEMU inherits. Nothing else: the supervisor's environment may name secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The environment variables by which a QEMU process is known to be one certain incarnation (law 8)."""

    prefix: str
    instance: str
    incarnation: str

    @classmethod
    def of(cls, record: Incarnation, prefix: str) -> Marks:
        """Those of an incarnation below `prefix`."""
        return cls(prefix=prefix, instance=record.instance, incarnation=record.incarnation)

    def environment(self) -> dict[str, str]:
        """As variables."""
        return {
            "KVMSUPERVISOR_PREFIX": self.prefix,
            "KVMSUPERVISOR_INSTANCE": self.instance,
            "KVMSUPERVISOR_INCARNATION": self.incarnation,
        }


def environment_of(marks: Marks) -> dict[str, str]:
    """All of a QEMU's environment."""
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    return kept | marks.environment()
