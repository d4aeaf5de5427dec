"""Which host takes over an orphaned instance by itself, where the key `hosts` allows that."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, Storage
from kvmsupervisor.domain.names import ANY_HOST
from kvmsupervisor.domain.spec import Power, Wish

STEP_S = 5.0
"""How long each live candidate waits for each one before it, from the moment when the lock may be taken. Much longer
than the write of a takeover takes; a candidate without room, or one that drains, delays the next one by this."""


def place(
    wish: Wish,
    lock: Lock | None,
    *,
    me: HostName,
    facts: str,
    has_session: Callable[[HostName], bool | None],
    everyone: Collection[str] = (),
) -> int | None:
    """This host's place among the live candidates for an orphan, 0 being the first; None when it is not to take it.

    An instance is an orphan when two hosts are known to have no session: the holder of its lock, and the host where it
    is to run (`host`, or its placement). An instance with a free lock is none: it has ended, or never started.

    Args:
        wish: its keys.
        lock: as last seen, None when there is none that can be read.
        me: this host.
        facts: its `KVM_FACTS_PREFIX`. A holder whose session would be elsewhere is not known to have none.
        has_session: whether a host has one; None when that is not known.
        everyone: the names of those that have one.
    """
    if lock is None or wish.runs_on in {None, me}:
        return None
    if not lock.is_seen_from(facts):
        return None
    if wish.power is not Power.ON or wish.problems or lock.storage is Storage.UNFENCEABLE:
        return None
    if any(has_session(HostName(host)) is not False for host in {wish.runs_on, lock.host} if host is not None):
        return None
    live = [host for host in candidates(wish, everyone) if has_session(HostName(host))]
    return live.index(me) if me in live else None


def candidates(wish: Wish, everyone: Collection[str] = ()) -> tuple[str, ...]:
    """The hosts that may take it over, in order: those of `hosts`, then `host`, where a placement stands in for it.

    All that `*` stands for come in an order of the instance's own, so that many orphans are shared out among them.
    """
    named = [*wish.hosts]
    if ANY_HOST in named:
        at = named.index(ANY_HOST)
        named[at : at + 1] = sorted(set(everyone) - {*named}, key=lambda host: order_of_any(wish.instance, host))
    if wish.placement is None or wish.host is None or wish.host in named:
        return tuple(named)
    return (*named, wish.host)


def order_of_any(instance: InstanceId, host: str) -> bytes:
    """The same on every host, and another one for each instance."""
    return hashlib.sha256(f"{instance} {host}".encode()).digest()
