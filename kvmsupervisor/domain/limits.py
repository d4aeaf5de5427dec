"""What a guest's process may use of its host, in the terms of cgroups v1 and v2."""

from __future__ import annotations

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.spec import Spec

SHARES_DEFAULT, WEIGHT_DEFAULT = 1024, 100
"""Defaults of a cgroup: `cpu.shares` of v1, `cpu.weight` of v2."""

WEIGHT_MIN, WEIGHT_MAX = 1, 10_000
"""Bounds of `cpu.weight` (kernel, Documentation/admin-guide/cgroup-v2)."""

TASKS = 4096
"""The most threads and processes of one QEMU. With 16 disks in Ceph, 64 threads for files and 256 virtual processors it
has less than a thousand. A whole host may have only 32,000 (`kernel.pid_max`)."""


@frozen(kw_only=True)
class Limits:
    """Limits of one QEMU process, None where there is none.

    Attributes:
        cpu_shares: its share of a busy processor, where others have 1024 (2 to 262144, as in v1).
        memory_limit: bytes, QEMU's own memory included.
    """

    cpu_shares: int | None = None
    memory_limit: int | None = None


def limits_of(spec: Spec) -> Limits:
    """Those of a machine's QEMU."""
    memory = None if spec.memory_limit_mib is None else spec.memory_limit_mib << 20
    return Limits(cpu_shares=spec.cpu_shares, memory_limit=memory)


def cpu_weight(shares: int) -> int:
    """v1's shares as v2's weight, as systemd converts `CPUShares=`: in proportion, the default to the default.

    The other formula in use, that of the OCI runtimes (1 to 10000 laid over 2 to 262144), turns the default 1024 into
    39: a guest with default shares would get less than its neighbours without any.
    """
    return min(max(shares * WEIGHT_DEFAULT // SHARES_DEFAULT, WEIGHT_MIN), WEIGHT_MAX)
