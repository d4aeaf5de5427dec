"""Which of root's capabilities a supervisor needs, and why.

Root in a container has the capabilities that its starter gives. A call that needs more fails in the middle of something
else: a QEMU that cannot be recognised looks like one that is gone. So missing ones are named before anything begins.

Sources: capabilities(7); include/uapi/linux/capability.h for the numbers. The needs were found by leaving out one
after the other: docs/container.md has the results, tests/container/test_least.py holds them.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmsupervisor.domain.frozen import frozen


@frozen(kw_only=True)
class Capability:
    """One capability.

    Attributes:
        number: its bit.
        name: as in `docker run --cap-add`; the kernel's begins with `CAP_`.
        why: what needs it.
    """

    number: int
    name: str
    why: str


NET_ADMIN = Capability(number=12, name="NET_ADMIN", why="taps are made, and plugged into bridges")

TO_BE_ANOTHER = (
    Capability(number=0, name="CHOWN", why="QEMU's group gets /dev/kvm; files of earlier QEMUs are taken back"),
    Capability(number=1, name="DAC_OVERRIDE", why="what belongs to QEMU's user is opened: its environment"),
    Capability(number=5, name="KILL", why="a QEMU that does not end, or has lost its lock, is killed"),
    Capability(number=6, name="SETGID", why="QEMU gets the groups of its user"),
    Capability(number=7, name="SETUID", why="QEMU becomes its user"),
    Capability(number=8, name="SETPCAP", why="QEMU's bounding set is emptied, so that it never gets any of these"),
    Capability(number=19, name="SYS_PTRACE", why="a QEMU that runs already is recognised by its environment"),
)
"""What root needs when QEMU runs as another user, from the first start to the adoption by the next supervisor."""


def lacking(effective: int, wanted: Iterable[Capability]) -> tuple[Capability, ...]:
    """Those of `wanted` that are not in the set `effective` (a number, as in /proc/<pid>/status)."""
    return tuple(one for one in wanted if not effective >> one.number & 1)


def what_is_lacking(missing: Iterable[Capability]) -> str:
    """For people: each capability with its reason, and how to give them to a container."""
    missing = tuple(missing)
    named = "; ".join(f"CAP_{one.name} ({one.why})" for one in missing)
    return f"{named}. Run the container with {' '.join(f'--cap-add={one.name}' for one in missing)}"
