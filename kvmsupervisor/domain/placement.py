"""Where an instance runs instead of on its `host`, and why: a fact that supervisors write (law 10).

Wishes are people's, so a failover does not write `host`. It writes a placement, which stands in for the present write
of `host`. Any later write of `host`, with any value, ends it.
"""

from __future__ import annotations

from typing import Protocol

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.records import Unfit, compact, parse
from kvmsupervisor.domain.values import Unfit as UnfitValue
from kvmsupervisor.domain.values import host_name

VERSION = 1
"""Version of the value. A value of a newer release is not acted on."""

FAILOVER = "failover"
"""Its host was gone, and a candidate of the key `hosts` took it over."""

DRAIN = "drain"
"""Its host empties itself."""

RETURN = "return"
"""It goes back to its `host`, which deletes the placement once it runs there."""


@frozen(kw_only=True)
class Placement:
    """The value of `/kvmsupervisor/placements/<id>`.

    Attributes:
        host: where it runs.
        why: one word, for people (`failover`, `drain`, `return`).
        since: when it was placed there, RFC 3339 in UTC, for people (no decision uses it).
        of: `mod_revision` of the key `host` that it stands in for.
        only_live: whether its guest may not be stopped for it. One that ends by itself starts there.
    """

    host: HostName
    why: str
    since: str
    of: int
    only_live: bool = False
    version: int = VERSION

    def to_json(self) -> bytes:
        """The value of the key."""
        return compact(self)

    @classmethod
    def from_json(cls, data: bytes) -> Placement | None:
        """Read a placement's value; None when it is not one that this release understands."""
        try:
            found = parse(cls, data)
            host_name(found.host)
        except (Unfit, UnfitValue):
            return None
        return found if found.version == VERSION and found.of > 0 else None

    def stands(self, host_revision: int) -> bool:
        """Whether it still stands in for `host`, which has this `mod_revision` (0: there is no key `host`).

        Only a newer write of `host` ends it. Within one history of etcd no older write can be seen; in a restored or
        refilled etcd a smaller revision is no order to move.
        """
        return 0 < host_revision <= self.of


class Written(Protocol):
    """A key as etcd has it."""

    @property
    def value(self) -> bytes:
        """Its value."""

    @property
    def mod_revision(self) -> int:
        """The revision that wrote it."""


@frozen
class Placed:
    """The placement key of one instance as last seen.

    Attributes:
        revision: its `mod_revision`, 0 when it is absent: what a compare-and-swap compares with.
        placement: its value; None when it is absent, unreadable, or cannot be true.
    """

    revision: int = 0
    placement: Placement | None = None

    @property
    def is_damaged(self) -> bool:
        """Whether it cannot be used: then it is not known where the instance is to run."""
        return self.revision > 0 and self.placement is None

    @classmethod
    def read(cls, value: bytes, revision: int) -> Placed:
        """Read the key.

        A placement that stands in for a `host` written later than itself was not written in this history of etcd, and
        no write of `host` would end it: it counts as damaged.
        """
        placement = Placement.from_json(value)
        return cls(revision, placement if placement is not None and placement.of < revision else None)

    @classmethod
    def of(cls, key: Written | None) -> Placed:
        """Read the key as etcd has it; None when it is absent."""
        return NOT_PLACED if key is None else cls.read(key.value, key.mod_revision)


NOT_PLACED = Placed()


@frozen
class Ground:
    """The two keys that let a host run an instance, by their `mod_revision`.

    Attributes:
        host_revision: of the key `host`.
        placement_revision: of the placement, 0 when there is none.
    """

    host_revision: int
    placement_revision: int = 0

    @property
    def revision(self) -> int:
        """Since when they say so."""
        return max(self.host_revision, self.placement_revision)
