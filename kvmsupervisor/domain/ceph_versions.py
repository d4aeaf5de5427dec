"""Which versions the daemons of a Ceph cluster have, and whether a client's key is a wall there. Pure.

Source: Ceph's advisory GHSA-7q3q-3975-qw3q (CVE-2025-30156, August 2026).
"""

from __future__ import annotations

import json
import re
from typing import NewType

from kvmsupervisor.domain.records import Unfit
from kvmsupervisor.domain.values import some

Version = NewType("Version", tuple[int, int, int])

LEAST = {19: Version((19, 2, 6)), 20: Version((20, 2, 4)), 21: Version((21, 2, 0))}
"""The first version of each release in which tickets cannot be forged (keys of type aes256k)."""

SHOWN = 3

_VERSION = re.compile(r"ceph version ([0-9]+)\.([0-9]+)\.([0-9]+)")


def parse_versions(data: bytes) -> frozenset[Version]:
    """Read `ceph versions --format json`: those of all daemons.

    Raises:
        Unfit: it is no such answer.
    """
    try:
        found = json.loads(data)
        names = list(found["overall"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise Unfit(f"it has no versions ({error})") from error
    versions = (_VERSION.match(str(name)) for name in names)
    return frozenset(Version((int(one[1]), int(one[2]), int(one[3]))) for one in versions if one)


def too_old(versions: frozenset[Version]) -> str | None:
    """What to say of a cluster with daemons whose tickets can be forged; None where there are none."""
    newest = max(LEAST)
    old = sorted(one for one in versions if one < LEAST.get(one[0], LEAST[newest] if one[0] < newest else one))
    if not old:
        return None
    said = some([".".join(map(str, one)) for one in old], SHOWN)
    right = ", ".join(".".join(map(str, one)) for one in LEAST.values())
    return (
        f"Ceph has daemons of version {said}: who has any key of that cluster can make itself its administrator "
        f"(CVE-2025-30156). {right} and newer have key type aes256k: see docs/ceph.md#key-types-and-the-least-versions"
    )
