"""A line about one instance, for people: what a list of a thousand of them shows of each. Pure."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.cluster.overview import UNKNOWN, Cluster, Instance, Shown, shown
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.names import FREE_KEY
from kvmsupervisor.domain.parse_keys import public_value
from kvmsupervisor.domain.records import shallow
from kvmsupervisor.domain.status import Phase

MOST = 8
"""Problems, pending keys or addresses of one instance in a list. Arbitrary; its own page has all of them."""

DESCRIPTION_LENGTH = 120
"""Characters of a description in a list. Arbitrary: a value may have 64 KiB."""


class Rank(IntEnum):
    """How much an instance needs a person: the least first."""

    PROBLEM = 0
    UNDER_WAY = 1
    NOTICE = 2
    RUNNING = 3
    STOPPED = 4


@frozen(kw_only=True)
class Row:
    """One instance in the list. Every text is cut, and has visible characters only.

    Attributes:
        id: the instance.
        rank: a `Rank`.
        host: where it runs or has to run, None for nowhere.
        placed_for: its own host, where another one runs it; else None.
        phase: a `Phase`, or `unknown`.
        halted: the run state of a guest that does not run although its QEMU lives; else None.
        since: when the phase began, RFC 3339; None when that is not known.
        reason: one sentence.
        last_exit: why the last QEMU ended, or None.
        notice: what else people should know, or None.
        problems: of its keys, the first of them.
        pending: names of keys that take effect at the next restart, the first of them.
        restarts: since it came to its host.
        epoch: of its lock.
        ram_mib: its memory, by its keys; None where these are not valid.
        addresses: of the guest, the first of them.
        description: the key for people.
        acted_on: the newest etcd revision of its wishes that its host has taken into account; 0 for none.
        revision: the newest etcd revision of what is known of it. Only a status or a session makes another row without.
    """

    id: str
    rank: int
    host: str | None
    placed_for: str | None
    phase: str
    halted: str | None
    since: str | None
    reason: str
    last_exit: str | None
    notice: str | None
    problems: tuple[str, ...]
    pending: tuple[str, ...]
    restarts: int
    epoch: int
    ram_mib: int | None
    addresses: tuple[str, ...]
    description: str
    acted_on: int
    revision: int

    def to_object(self) -> dict[str, Any]:
        """As a JSON object."""
        return shallow(self)

    @property
    def text(self) -> str:
        """What a filter looks at, in small letters."""
        parts = (self.id, self.host, self.phase, self.halted, self.reason, self.description, *self.addresses)
        return " ".join(filter(None, parts)).casefold()


def row_of(instance: Instance, cluster: Cluster, events_revision: int = 0) -> Row:
    """The line about one instance.

    Args:
        instance: the one.
        cluster: all of them.
        events_revision: `mod_revision` of the key of its events; 0 without one.
    """
    view, status, wish = shown(instance, cluster), instance.status, instance.wish
    lock = instance.lock
    agent = None if status is None else status.agent
    description = instance.keys.get(FREE_KEY.encode())
    notices = () if status is None else (status.notice, *status.unplugged)
    return Row(
        id=instance.id,
        rank=_rank(instance, cluster, view),
        host=_optional(view.host),
        placed_for=_optional(wish.host) if wish.placement is not None and wish.placement.host == view.host else None,
        phase=view.phase,
        halted=_optional(view.halted),
        since=None if status is None or not status.since else visible(status.since, 40),
        reason=visible(view.reason),
        last_exit=None if status is None else _optional(status.last_exit),
        notice=_optional("; ".join(filter(None, notices)) or None),
        problems=_some(instance.problems),
        pending=() if status is None else _some(status.pending),
        restarts=0 if status is None else status.restarts,
        epoch=0 if status is None else status.epoch,
        ram_mib=None if wish.spec is None else wish.spec.ram_mib,
        addresses=() if agent is None else _some(tuple(dict.fromkeys(one.address for one in agent.addresses))),
        description="" if description is None else _description(description.value),
        acted_on=0 if status is None else status.revision,
        revision=max(
            wish.revision,
            instance.status_revision,
            wish.placed.revision,
            events_revision,
            0 if lock is None else lock.kv.mod_revision,
        ),
    )


def _rank(instance: Instance, cluster: Cluster, view: Shown) -> Rank:
    status = instance.status
    if view.phase in {UNKNOWN, Phase.INVALID, Phase.BACKOFF, Phase.WAITING} or view.halted or instance.problems:
        # A wait that is over in a moment is a problem for a moment.
        return Rank.PROBLEM
    if status is not None and (status.held or status.guarded is False or status.unplugged):
        return Rank.PROBLEM
    if view.phase in {Phase.STARTING, Phase.STOPPING, Phase.MIGRATING}:
        return Rank.UNDER_WAY
    if status is not None and (status.pending or status.notice):
        return Rank.NOTICE
    return Rank.RUNNING if view.phase == Phase.RUNNING else Rank.STOPPED


def _description(value: bytes) -> str:
    return visible(public_value(FREE_KEY, value.strip()).decode(errors="replace"), DESCRIPTION_LENGTH)


def _optional(text: str | None) -> str | None:
    return None if text is None else visible(text)


def _some(texts: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(map(visible, texts[:MOST]))
    return (*found, f"and {len(texts) - MOST} more") if len(texts) > MOST else found
