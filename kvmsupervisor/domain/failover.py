"""Who takes over by itself what a dead host ran, where people have said that somebody may: the key `hosts`."""

from __future__ import annotations

from collections.abc import Callable

from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, Storage
from kvmsupervisor.domain.spec import Power, Wish

STEP_S = 5.0
"""How long each live candidate gives those before it, from the moment when the lock may be taken. Long beside the time
that a takeover takes to be written; a host without room, or that drains, costs the next one this much."""


def place(wish: Wish, lock: Lock | None, *, me: HostName, has_session: Callable[[HostName], bool | None]) -> int | None:
    """This host's place among the live candidates for an orphan, 0 being the first; None when it is not to take it.

    An orphan is an instance whose lock is held by a host that is known to have no session, and which shall run on one
    (`host`, or its placement) that has none either. A lock that is free is nobody's loss: its machine has ended, or was
    never started.

    Args:
        wish: its keys.
        lock: as last seen, None when there is none that can be read.
        me: this host.
        has_session: whether a host has one; None when that is not known.
    """
    if lock is None or wish.runs_on in {None, me}:
        return None
    if wish.power is not Power.ON or wish.problems or lock.storage is Storage.UNFENCEABLE:
        return None
    if any(has_session(HostName(host)) is not False for host in {wish.runs_on, lock.host} if host is not None):
        return None
    live = [host for host in candidates(wish) if has_session(HostName(host))]
    return live.index(me) if me in live else None


def candidates(wish: Wish) -> tuple[str, ...]:
    """Who may take it over, in order: those of `hosts`, and last its own host, where it runs in the place of that."""
    if wish.placement is None or wish.host is None or wish.host in wish.hosts:
        return wish.hosts
    return (*wish.hosts, wish.host)
