"""Orders that wait for a person to confirm them, because they may be a mistake.

A wrong prefix, an empty etcd or a mistyped `etcdctl del --prefix` looks like an order to shut everything down. An etcd
that was restored from a backup looks like an order to remove, move or switch off what has changed since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Set
from dataclasses import replace

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.incarnation import InstanceState
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.parse_keys import public_value
from kvmsupervisor.domain.spec import Power, RawValue, Wish

ALWAYS_ALLOWED = 2
"""This many removals within the window are never held, however few instances there are."""

SHOWN_CHARS = 200
"""How much of a value is kept for people. Arbitrary: a line or two."""


class MassRemovalHold:
    """Judges removals of one host's instances.

    Attributes:
        held: the instances with an order that waits for an operator's word.
    """

    def __init__(self, window_s: float) -> None:
        self.held: set[InstanceId] = set()
        self._window_s = window_s
        self._recent: deque[tuple[float, InstanceId]] = deque()

    def judge(self, removed: Set[InstanceId], running: Set[InstanceId], now: float) -> Set[InstanceId]:
        """Which of the running instances that were just `removed` are to be held.

        All of this batch are held when the removals in the window are more than half of what ran on the host, and more
        than two. An instance that does not run has no guest to lose.

        Args:
            removed: those whose `host` or all keys went in one batch, and whose QEMU lives.
            running: all instances of this host whose QEMU lives, including those that shut down.
            now: CLOCK_BOOTTIME.
        """
        while self._recent and self._recent[0][0] <= now - self._window_s:
            self._recent.popleft()
        self._recent.extend((now, instance) for instance in removed)
        gone = {instance for _, instance in self._recent}
        if len(gone) > ALWAYS_ALLOWED and 2 * len(gone) > len(gone | running):
            self.held |= removed
        return self.held & removed

    def release(self, instances: Set[InstanceId]) -> Set[InstanceId]:
        """Release these; return those that were held. A confirmed or cancelled removal does not count later."""
        freed = self.held & instances
        self.held -= freed
        self._recent = deque(entry for entry in self._recent if entry[1] not in freed)
        return freed


def names_no_host(wish: Wish) -> bool:
    """Whether its keys, or its `host`, are gone. Another or a bad `host`, or `power=off`, is no removal."""
    return wish.host is None and not any(problem.key == "host" for problem in wish.problems)


def ends_it(wish: Wish, me: str) -> bool:
    """Whether these keys would end the machine that runs on this host."""
    bad_host = wish.host is None and not names_no_host(wish)
    elsewhere = names_no_host(wish) or wish.is_elsewhere(HostName(me))
    return (elsewhere and not bad_host) or wish.power is Power.OFF


def order_of(wish: Wish) -> str:
    """An order's identity: a person who writes `host` or `power` again gives another order."""
    written = f"{wish.host_revision}:{wish.power_revision}:{wish.placed.revision}"
    return written if wish.host is not None else "removed"


def why_held(wish: Wish, way_out: str = "`kvmsupervisor confirm-removal` lets it go on") -> str:
    """Why an order that came with another history is held, for people, and what ends the hold."""
    what = "its removal" if wish.host is None else f"its move to {wish.runs_on}"
    if wish.host is not None and wish.power is Power.OFF:
        what = "`power=off`"
    return f"{what} came with another history of etcd (restored, or its data lost) and is held; {way_out}"


@frozen(kw_only=True)
class Hold:
    """An order that came with another history.

    Attributes:
        order: its identity, see `order_of`.
        why: the reason, for people.
        stood: the values that its keys had before, of those that differ; empty where they are not known.
    """

    order: str
    why: str
    stood: Mapping[str, str]


def noting(saved: InstanceState, wish: Wish, *, held: bool, hold: Hold | None) -> InstanceState:
    """The state with a held order in it, for a successor."""
    return replace(
        saved,
        held=held,
        held_as=None if hold is None else hold.order or None,
        held_why="" if hold is None else hold.why,
        stood=None if hold is None else hold.stood,
        restart_seen=saved.restart_seen if wish.restart_request == saved.restart_seen else None,
    )


def hold_of(saved: InstanceState) -> Hold | None:
    """The held order, as far as it is remembered; None for a mass removal."""
    if not saved.held or (saved.stood is None and saved.held_as is None):
        return None
    return Hold(order=saved.held_as or "", why=saved.held_why, stood=saved.stood or {})


def differing(before: Mapping[bytes, RawValue], now: Mapping[bytes, RawValue]) -> dict[str, str]:
    """The former values of the keys that are gone or differ now; cut to `SHOWN_CHARS`."""
    return {
        (key := name.decode(errors="replace")): (
            public_value(key, raw.value).decode(errors="replace").strip()[:SHOWN_CHARS]
        )
        for name, raw in sorted(before.items())
        if name not in now or now[name].value != raw.value
    }
