"""The cluster as its keys show it: reads wishes, status keys, sessions and locks, and puts them together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import Any

from kvmsupervisor.adapters.etcd.api import Compacted, KeyValue, Listing, Store, Unavailable
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.goal import where_else
from kvmsupervisor.domain.history import HistoryName
from kvmsupervisor.domain.host import HostSession, resembling
from kvmsupervisor.domain.host_wish import IN_SERVICE, HostProgress, HostWish
from kvmsupervisor.domain.keys import InstanceId, Layout, parse_id
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.parse_keys import VALUE_LIMIT, parse_wish
from kvmsupervisor.domain.placement import NOT_PLACED, Placed
from kvmsupervisor.domain.single import is_in_container, is_same_host, is_single
from kvmsupervisor.domain.spec import RawValue, Wish
from kvmsupervisor.domain.status import Phase, Status

UNKNOWN = "unknown"
"""Shown instead of the phase when the host has no session: the phase is not known then."""

LIST_ATTEMPTS = 3
"""How often a listing may begin again after a compaction between two pages. Two in a row were never seen."""


@frozen
class LockFact:
    """A lock key, and the lock in it if it can be read."""

    kv: KeyValue
    lock: Lock | None


@frozen(kw_only=True)
class Instance:
    """One instance as its keys show it.

    Attributes:
        id: its id.
        keys: its wishes: key name → value, without the lock.
        wish: parsed from the keys (`wish.keys` is 0 without any).
        status: that its host wrote; None without a status key.
        status_revision: `mod_revision` of the status key; 0 without one.
        lock: its lock; None when it is free.
    """

    id: InstanceId
    keys: Mapping[bytes, RawValue]
    wish: Wish
    status: Status | None = None
    status_revision: int = 0
    lock: LockFact | None = None

    @property
    def held_by(self) -> str:
        """The holder of its lock, as a clause; for an instance that has one."""
        lock = self.lock.lock if self.lock is not None else None
        return f"held by {lock.host}" if lock is not None else "which cannot be read"

    @property
    def problems(self) -> tuple[str, ...]:
        """Its problems: from its host, when that has seen the newest keys, otherwise from the keys."""
        if self.status is not None and self.status.revision >= self.wish.revision:
            return self.status.problems
        return tuple(str(problem) for problem in self.wish.problems)


@frozen(kw_only=True)
class Cluster:
    """All that etcd holds, at about one time.

    Attributes:
        instances: all that have a wish, a status or a lock, in natural order.
        sessions: by host; None where the value cannot be read (the key itself is the session).
        strays: keys below the wishes' prefix that belong to no valid id.
        images: those of the image library.
        unreadable: status and session keys whose value cannot be read.
        history: name of the present history of etcd; None when it has no name, or was not read.
        host_wishes: what people want of whole hosts, by host.
        progress: how far hosts have come that drain, or take back what stands elsewhere for them.
    """

    instances: Mapping[InstanceId, Instance] = field(default_factory=dict)
    sessions: Mapping[str, HostSession | None] = field(default_factory=dict)
    strays: tuple[KeyValue, ...] = ()
    images: tuple[KeyValue, ...] = ()
    unreadable: tuple[KeyValue, ...] = ()
    history: HistoryName | None = None
    host_wishes: Mapping[str, HostWish] = field(default_factory=dict)
    progress: Mapping[str, HostProgress] = field(default_factory=dict)

    def wish_of(self, host: str) -> HostWish:
        """What people want of a host."""
        return self.host_wishes.get(host, IN_SERVICE)

    def alive(self, host: str | None) -> bool:
        """Whether `host` has a session."""
        return host in self.sessions

    def speaks(self, status: Status) -> bool:
        """Whether a status is about now: its host has a session, or it is the last one of an ended container."""
        return self.alive(status.host) or (is_single(status.host) and not status.tells_of_a_process)

    def runs_alone(self, instance: Instance) -> bool:
        """Whether the instance runs on its host in single mode, which needs no supervisor there."""
        status, host = instance.status, instance.wish.runs_on
        return status is not None and self.alive(status.host) and is_same_host(status.host, host)

    def takes(self, instance: InstanceId, host: str | None) -> bool:
        """Whether `host` can run this instance: it has a supervisor, or the instance's container in single mode."""
        return self.alive(host) or (host is not None and is_in_container(instance, host, self.sessions))

    def meant_by(self, host: str | None) -> str:
        """A clause that names the host with a session that was probably meant; empty when there is none."""
        meant = None if host is None else resembling(host, self.sessions)
        return "" if meant is None else f"; did you mean {meant}?"

    def who_has_sessions(self) -> str:
        """A clause that names the hosts that have a session."""
        hosts = sorted(self.sessions)
        return f"with a session: {', '.join(hosts)}" if hosts else "no host has a session"


@frozen
class Shown:
    """An instance as it is shown.

    Attributes:
        host: that reports it, or has to run it.
        phase: a `Phase`, or `UNKNOWN`.
        reason: one sentence.
        halted: the run state of a guest that does not run although its QEMU lives.
    """

    host: str | None
    phase: str
    reason: str
    halted: str | None = None


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key of the natural order: vm9 before vm10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return tuple((0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts)


def shown(instance: Instance, cluster: Cluster) -> Shown:
    """Work out phase and reason of an instance.

    A status whose host has no session says nothing about now: the phase is `unknown`. A wish without a status is
    `waiting` for the host that it names.
    """
    status, wish = instance.status, instance.wish
    if status is None:
        return Shown(wish.runs_on, Phase.WAITING.value, _why_no_status(instance, cluster))
    if not cluster.speaks(status):
        sessions = cluster.who_has_sessions()
        reason = f"host {status.host} has no session ({sessions}); last seen: {status.phase.value}"
        if wish.keys and wish.runs_on != status.host:
            reason += f"; {_where_now(wish)}"
        return Shown(status.host, UNKNOWN, reason)
    reason = status.reason
    said = status.awaited_host is not None and status.awaited_host == wish.runs_on
    if wish.keys and wish.host is not None and not said and not is_same_host(status.host, wish.runs_on):
        away = "" if cluster.alive(wish.runs_on) else f", which has no session ({cluster.who_has_sessions()})"
        reason += f"; {_where_now(wish)}{away}"
    return Shown(status.host, status.phase.value, reason, status.halted)


def _where_now(wish: Wish) -> str:
    """The host that the keys ask for, as a clause."""
    return f"the `host` key now says {wish.host}" if wish.placement is None else where_else(wish)


def _why_no_status(instance: Instance, cluster: Cluster) -> str:
    """Why an instance has no status key, and what has to happen."""
    wish = instance.wish
    if wish.keys == 0:
        return f"no keys; a lock is left, {instance.held_by}"
    if wish.host is None:
        return f"no host: nothing runs it until `host` is set ({cluster.who_has_sessions()})"
    if not cluster.alive(wish.runs_on):
        named = f"`host` names {wish.host}" if wish.placement is None else where_else(wish)
        return f"{named}, which has no session ({cluster.who_has_sessions()}{cluster.meant_by(wish.runs_on)})"
    return f"host {wish.runs_on} has not said anything yet"


def as_object(instance: Instance, cluster: Cluster) -> dict[str, Any]:
    """The JSON object of an instance: that of the status key, and what only a reader of all keys can know.

    `last_phase` is there when the phase is `unknown`.
    """
    view = shown(instance, cluster)
    if instance.status is None:
        status = Status(id=instance.id, host=view.host or "", phase=Phase(view.phase), reason=view.reason, since="")
        status = replace(status, placed_for=None if instance.wish.placement is None else instance.wish.host)
        return replace(status, problems=instance.problems).to_object() | {"host": view.host, "since": None}
    found = instance.status.to_object()
    last = {"last_phase": found["phase"]} if view.phase == UNKNOWN else {}
    return found | {"phase": view.phase, "reason": view.reason, "problems": list(instance.problems)} | last


async def list_all(store: Store, prefix: str) -> Listing:
    """List a prefix; begin again when etcd compacts between two pages."""
    for _ in range(LIST_ATTEMPTS):
        try:
            return await store.list(prefix)
        except Compacted:
            continue
    raise Unavailable(f"etcd compacted its history {LIST_ATTEMPTS} times while {prefix} was being listed")


async def read_cluster(store: Store, layout: Layout) -> Cluster:
    """Read everything.

    The prefixes are read one after the other, sessions last: so for every status the session of its host is seen, too,
    unless the host has just lost it.
    """
    wishes = await list_all(store, layout.wishes_prefix)
    locks_prefix = layout.locks_prefix()
    locks = () if locks_prefix is None else (await list_all(store, locks_prefix)).kvs
    placements = await list_all(store, layout.placements_prefix)
    statuses = await list_all(store, layout.statuses_prefix)
    sessions = await list_all(store, layout.hosts_prefix)
    named = await store.get(layout.history_key)
    drains = await list_all(store, layout.drains_prefix)
    cluster = assemble(
        layout,
        wishes=[*wishes.kvs, *locks],
        placements=placements.kvs,
        statuses=statuses.kvs,
        sessions=sessions.kvs,
    )
    said = {
        kv.key.decode("utf-8", "replace").removeprefix(layout.drains_prefix): told
        for kv in drains.kvs
        if (told := HostProgress.from_json(kv.value)) is not None
    }
    cluster = replace(cluster, progress=said)
    return cluster if named is None else replace(cluster, history=HistoryName.from_json(named.value))


async def read_instance(store: Store, layout: Layout, instance: InstanceId) -> tuple[Instance, Cluster]:
    """Read one instance, and all sessions; an instance that does not exist is empty."""
    wishes = await list_all(store, layout.instance_prefix(instance))
    lock = await store.get(layout.lock_key(instance))
    placement = await store.get(layout.placement_key(instance))
    status = await store.get(layout.status_key(instance))
    sessions = await list_all(store, layout.hosts_prefix)
    cluster = assemble(
        layout,
        wishes=[*wishes.kvs, *([lock] if lock is not None else [])],
        placements=[placement] if placement is not None else [],
        statuses=[status] if status is not None else [],
        sessions=sessions.kvs,
    )
    return cluster.instances.get(instance, absent(instance)), cluster


def absent(instance: InstanceId) -> Instance:
    """An instance of which etcd has no key."""
    return Instance(id=instance, keys={}, wish=parse_wish(instance, {}))


def assemble(
    layout: Layout,
    *,
    wishes: Iterable[KeyValue],
    placements: Iterable[KeyValue] = (),
    statuses: Iterable[KeyValue],
    sessions: Iterable[KeyValue],
) -> Cluster:
    """Put keys together. `wishes` are the keys below the wishes' prefix, and the locks, wherever those lie."""
    keys: dict[InstanceId, dict[bytes, RawValue]] = {}
    locks: dict[InstanceId, LockFact] = {}
    strays: list[KeyValue] = []
    images: list[KeyValue] = []
    of_hosts: list[KeyValue] = []
    for kv in wishes:
        lock_of = layout.id_of_lock(kv.key.decode("utf-8", "replace"))
        if lock_of is not None:
            locks[lock_of] = LockFact(kv, Lock.from_json(kv.value))
            continue
        if kv.key.startswith(layout.images_prefix.encode()):
            images.append(kv)
            continue
        if _of_host(layout, kv) is not None:
            of_hosts.append(kv)
            continue
        named, slash, name = kv.key.removeprefix(layout.wishes_prefix.encode()).partition(b"/")
        instance = parse_id(named.decode("utf-8", "replace")) if slash else None
        if instance is None:
            strays.append(kv)
        else:
            keys.setdefault(instance, {})[name] = RawValue(kv.value[: VALUE_LIMIT + 1], kv.mod_revision)

    placed = {
        kv.key.decode("utf-8", "replace").removeprefix(layout.placements_prefix): Placed.read(kv.value, kv.mod_revision)
        for kv in placements
    }
    statuses = tuple(statuses)
    found, unreadable = _read_statuses(layout, statuses)
    revisions = {_id_of(layout, kv): kv.mod_revision for kv in statuses}
    hosts: dict[str, HostSession | None] = {}
    for kv in sessions:
        host = kv.key.decode("utf-8", "backslashreplace").removeprefix(layout.hosts_prefix)
        hosts[host] = HostSession.from_json(kv.value)
        if hosts[host] is None:
            unreadable.append(kv)

    instances = {
        instance: Instance(
            id=instance,
            keys=keys.get(instance, {}),
            wish=parse_wish(instance, keys.get(instance, {}), placed.get(instance, NOT_PLACED)),
            status=found.get(instance),
            status_revision=revisions.get(instance, 0),
            lock=locks.get(instance),
        )
        for instance in sorted(keys.keys() | locks.keys() | found.keys(), key=natural)
    }
    return Cluster(
        instances=instances,
        sessions=hosts,
        strays=tuple(strays),
        images=tuple(images),
        unreadable=tuple(unreadable),
        host_wishes=host_wishes(layout, of_hosts),
    )


def host_wishes(layout: Layout, keys: Iterable[KeyValue]) -> dict[str, HostWish]:
    """What people want of whole hosts, by host."""
    found: dict[str, dict[str, KeyValue]] = {}
    for kv in keys:
        if (of_host := _of_host(layout, kv)) is not None:
            found.setdefault(of_host[0], {})[of_host[1]] = kv
    return {host: HostWish.of(said.get("drain"), said.get("return")) for host, said in found.items()}


def _of_host(layout: Layout, kv: KeyValue) -> tuple[str, str] | None:
    """The host and the word of a key that says what people want of a whole host; None for another key."""
    prefix = layout.host_wishes_prefix.encode()
    if not kv.key.startswith(prefix):
        return None
    host, _, word = kv.key[len(prefix) :].decode("utf-8", "replace").partition("/")
    return (host, word) if host and word in {"drain", "return"} else None


def _id_of(layout: Layout, status: KeyValue) -> InstanceId | None:
    """The instance of a status key."""
    return parse_id(status.key.decode("utf-8", "replace").removeprefix(layout.statuses_prefix))


def _read_statuses(layout: Layout, statuses: Iterable[KeyValue]) -> tuple[dict[InstanceId, Status], list[KeyValue]]:
    """Parse the status keys; the second part are those that cannot be read."""
    found: dict[InstanceId, Status] = {}
    unreadable: list[KeyValue] = []
    for kv in statuses:
        instance = _id_of(layout, kv)
        status = Status.from_json(kv.value)
        if instance is None or status is None:
            unreadable.append(kv)
        else:
            found[instance] = status
    return found, unreadable
