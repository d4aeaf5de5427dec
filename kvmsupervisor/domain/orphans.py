"""Orphaned instances: no host with a session has their lock, or is the host where they are to run. Pure.

Each live host counts those of the whole cluster, because the one that it would be up to is not there to tell.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Set
from typing import Protocol

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.placement import Placed
from kvmsupervisor.domain.spec import OFF_NOW, RawValue

_HOST = b'"host":"'
"""The text before the holder in a lock, as supervisors write it. Parsing each lock would cost twenty times as much."""


class Value(Protocol):
    """A key's value."""

    @property
    def value(self) -> bytes:
        """The value."""
        ...


class AllWishes(Protocol):
    """The keys, locks and placements of all instances, as `informer.Wishes` has them."""

    def ids(self) -> Set[InstanceId]:
        """Every instance."""
        ...

    def keys_of(self, instance: InstanceId) -> Mapping[bytes, RawValue]:
        """The keys of one."""
        ...

    def lock_of(self, instance: InstanceId) -> Value | None:
        """The lock of one."""
        ...

    def placed(self, instance: InstanceId) -> Placed:
        """The placement of one."""
        ...


def count_orphans(wishes: AllWishes, alive: Container[str]) -> int:
    """How many instances are orphans; 2 µs for each instance of the cluster.

    An instance without a lock is none while it is off, or has no `host`.

    Args:
        wishes: of all instances.
        alive: the hosts that have a session.
    """
    return sum(_is_orphan(name, wishes, alive) for name in wishes.ids())


def _is_orphan(name: InstanceId, wishes: AllWishes, alive: Container[str]) -> bool:
    keys, lock = wishes.keys_of(name), wishes.lock_of(name)
    if lock is not None and _holder(lock.value) in alive:
        return False
    host = keys.get(b"host")
    if host is not None:
        placement = wishes.placed(name).placement
        stands = placement is not None and placement.stands(host.mod_revision)
        if (placement.host if placement is not None and stands else _text(host)) in alive:
            return False
    if lock is not None:
        return True
    power = keys.get(b"power")
    return host is not None and (power is None or _text(power) not in {"off", OFF_NOW})


def _holder(value: bytes) -> str | None:
    """The host in a lock's value; None when it cannot be read. Cheap: asked of every instance."""
    begin = value.find(_HOST)
    if begin >= 0 and b"\\" not in value:
        begin += len(_HOST)
        return value[begin : value.find(b'"', begin)].decode(errors="replace")
    lock = Lock.from_json(value)
    return None if lock is None else lock.host


def _text(raw: RawValue) -> str:
    return raw.value.decode(errors="replace").strip()
