"""Instances that nobody looks after: a table of who may be gone."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.orphans import count_orphans
from kvmsupervisor.domain.placement import FAILOVER, NOT_PLACED, Placed, Placement
from kvmsupervisor.domain.spec import RawValue

ONE = InstanceId("1")
ALIVE = {"alpha", "beta", 'na"me'}


@dataclass
class Raw:
    value: bytes


@dataclass
class World:
    keys: dict[bytes, RawValue] = field(default_factory=dict)
    lock: Raw | None = None
    place: Placed = NOT_PLACED

    def ids(self) -> Set[InstanceId]:
        return {ONE}

    def keys_of(self, instance: InstanceId) -> Mapping[bytes, RawValue]:
        return self.keys

    def lock_of(self, instance: InstanceId) -> Raw | None:
        return self.lock

    def placed(self, instance: InstanceId) -> Placed:
        return self.place


def world(
    *, host: str | None = None, lock: str | None = None, placed: str | None = None, of: int = 5, **keys: str
) -> World:
    values = keys if host is None else {"host": host, **keys}
    made = World({name.encode(): RawValue(value.encode(), 5) for name, value in values.items()})
    if lock is not None:
        held = Lock(host=HostName(lock), boot_id="b", epoch=1, state=LockState.RUNNING, incarnation="i")
        made.lock = Raw(held.to_json())
    if placed is not None:
        made.place = Placed(7, Placement(host=HostName(placed), why=FAILOVER, since="", of=of))
    return made


@pytest.mark.parametrize(
    ("seen", "orphan"),
    [
        (world(host="alpha", lock="alpha"), False),
        (world(host="alpha"), False),
        (world(host=" alpha\n"), False),
        (world(host="gone", lock="gone"), True),
        (world(host="gone"), True),
        (world(host="gone", power="off"), False),
        (world(host="gone", power=" off "), False),
        (world(host="gone", power="off", lock="gone"), True),
        (world(host="gone", lock="alpha"), False),
        (world(host="alpha", lock="gone"), False),
        (world(host="gone", lock="gone", placed="alpha"), False),
        (world(host="gone", lock="gone", placed="alpha", of=4), True),
        (world(host="alpha", lock="gone", placed="lost"), True),
        (world(ram="1G"), False),
        (world(lock="gone"), True),
        (world(lock="alpha"), False),
        (world(lock='na"me'), False),
        (World({}, Raw(b'{"host": "alpha"}')), True),
    ],
    ids=["runs", "not started yet", "white space counts for nothing", "its host died", "its host was never there",
         "switched off", "in any writing", "switched off, but it may run", "a move to a host that is not there",
         "a takeover that waits", "failed over", "failed over and moved since", "placed where nobody is", "no host",
         "a lock that is left", "a removal under way", "a name that JSON escapes", "a lock that nobody can read"],
)  # fmt: skip
def test_who_looks_after_it(seen: World, orphan: bool) -> None:
    """Any host with a session that has its lock, or shall run it, does; switched off it needs nobody."""
    assert count_orphans(seen, ALIVE) == orphan
