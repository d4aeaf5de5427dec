"""What is done to instances: each act is one transaction that compares what it has read.

They write wishes only, never a lock, a status or a session: those belong to the supervisors.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from kvmsupervisor.adapters.etcd.api import Compare, Delete, Denied, Op, Put, Store, Target
from kvmsupervisor.cluster.acts import leftovers, mac_auto
from kvmsupervisor.cluster.acts.refused import Refused
from kvmsupervisor.cluster.overview import Cluster, Instance, list_all, read_instance
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.goal import where_else
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.names import ANY_HOST, WISH_KEYS
from kvmsupervisor.domain.parse_keys import VALUE_LIMIT, is_known, parse_wish
from kvmsupervisor.domain.spec import Power, Problem, RawValue, Wish
from kvmsupervisor.domain.status import Status
from kvmsupervisor.domain.storage import files_elsewhere
from kvmsupervisor.domain.values import nearest, plain, show, some

CONFLICT_ATTEMPTS = 5
"""How often a change is tried again when another writer was faster. Arbitrary: people do not type faster."""

NAMED = 30
"""How many keys of an instance a message names: as many as an instance with many features has."""

TXN_LIMIT = 100
"""Compares or operations in one transaction; etcd's `--max-txn-ops` is 128 by default."""


@frozen(kw_only=True)
class Written:
    """A wish that was written.

    Attributes:
        instance: of the wish.
        revision: of the write; a status with this revision or a newer one has taken it into account.
        wish: as it is now.
        before: the status key before the write.
        notes: for the person, one sentence each.
    """

    instance: InstanceId
    revision: int
    wish: Wish
    before: Status | None = None
    notes: tuple[str, ...] = ()


async def create(
    store: Store,
    layout: Layout,
    instance: InstanceId,
    values: Mapping[str, str],
    *,
    force: bool = False,
    also: Sequence[Op] = (),
) -> Written:
    """Write the keys of a new instance, all or none.

    Args:
        store: etcd.
        layout: where the keys lie.
        instance: its id.
        values: key name → value.
        force: write although a value has a problem, or `host` has no session.
        also: what is written in the same transaction.

    Raises:
        Refused: the instance has a key already, a value has a problem, or `host` names a host without a session.
    """
    _only_wishes(layout, instance, values)
    found, cluster = await read_instance(store, layout, instance)
    if found.keys:
        names = some(sorted(found.keys), NAMED, lambda name: name.decode("utf-8", "backslashreplace"))
        raise Refused(f"{instance} exists already, with the keys {names}: change it with `set`")
    if not force:
        _refuse_huge(f"{instance} was not created", values)
    values, chosen = await mac_auto.fill_in(store, layout, instance, values)
    keys = {name.encode(): RawValue(value.encode(), 0) for name, value in values.items()}
    wish = parse_wish(instance, keys)
    if wish.problems and not force:
        raise Refused(_problems_message(f"{instance} was not created", wish.problems))
    if not force:
        refuse_absent_host(f"{instance} was not created", wish, cluster)
    result = await store.txn(
        [
            Compare(layout.wish_key(instance, name), Target.CREATE_REVISION, 0)
            for name in dict.fromkeys((*values, *WISH_KEYS))
        ],
        [*(Put(layout.wish_key(instance, name), value.encode()) for name, value in values.items()), *also],
    )
    if not result.succeeded:
        raise Refused(f"{instance} was not created: another writer has just created it; look with `show {instance}`")
    notes = [*chosen, *_problem_notes(wish.problems), *_host_notes(wish, cluster)]
    if found.lock is not None:
        notes.append(f"a lock from before is still there, {found.held_by}: {instance} starts when it is released")
    return Written(instance=instance, revision=result.revision, wish=wish, before=found.status, notes=tuple(notes))


STAYS = "ram"
"""The key that is written as it is where others are only deleted: each machine has it, and nothing compares it."""


async def change(
    store: Store,
    layout: Layout,
    instance: InstanceId,
    values: Mapping[str, str],
    *,
    unset: Sequence[str] = (),
    force: bool = False,
) -> Written:
    """Change keys of an instance that exists, all or none.

    A problem that was there before, in another key, is told but does not prevent the change: the two bad keys of a
    machine can be mended one at a time.

    Args:
        store: etcd.
        layout: where the keys lie.
        instance: its id.
        values: key name → new value.
        unset: keys to delete. A key that is not there is told; an unknown name is refused, because it is a typo.
        force: write although a value has a problem, or a new `host` has no session.

    Raises:
        Refused: there is no such instance, or the change brings a problem, or a `host` without a session.
    """
    _only_wishes(layout, instance, [*values, *unset])

    if not force:
        _refuse_huge(f"{instance} was not changed", values)
    values, chosen = await mac_auto.fill_in(store, layout, instance, values)
    absent: dict[str, None] = {}

    def plan(found: Instance, cluster: Cluster) -> Sequence[Op]:
        absent.clear()
        merged = dict(found.keys)
        _refuse_unknown(instance, found, [] if force else unset)
        for name in unset:
            if merged.pop(name.encode(), None) is None:
                absent.setdefault(name)
        if not merged and not values:
            raise Refused(f"{instance} was not changed: it would have no keys left; remove it with `delete {instance}`")
        merged |= {name.encode(): RawValue(value.encode(), 0) for name, value in values.items()}
        new = _new_problems(found, merged, values)
        if new and not force:
            raise Refused(_problems_message(f"{instance} was not changed", new))
        if "host" in values and not force:
            refuse_absent_host(f"{instance} was not changed", parse_wish(instance, merged), cluster)
            refuse_to_leave_files(f"{instance} was not changed", parse_wish(instance, merged), found)
        # A deletion leaves no revision that a status could tell of: one key that stays is written as it is.
        stays = None if values else merged.get(STAYS.encode())
        again = [] if stays is None or len(stays.value) > VALUE_LIMIT else [stays.value]
        return [
            *(Put(layout.wish_key(instance, name), value.encode()) for name, value in values.items()),
            *(Delete(layout.wish_key(instance, name)) for name in unset),
            *(Put(layout.wish_key(instance, STAYS), value) for value in again),
        ]

    written = await rewrite(store, layout, instance, plan, [*values, *unset])
    return replace(written, notes=(*chosen, *(f"`{name}` was not there" for name in absent), *written.notes))


async def switch(store: Store, layout: Layout, instance: InstanceId, power: str) -> Written:
    """Write `power`, also when it has that value already: a new write is a new order.

    So a machine that ended by itself, with `restart=never`, starts again.

    Raises:
        Refused: there is no such instance.
    """
    return await rewrite(
        store,
        layout,
        instance,
        lambda _, __: [Put(layout.wish_key(instance, "power"), power.encode())],
        ["power"],
    )


async def restart(store: Store, layout: Layout, instance: InstanceId, request: str) -> Written:
    """Ask for one graceful restart by a `restart_request` that was never used before.

    Raises:
        Refused: there is no such instance, or it is switched off.
    """

    def plan(found: Instance, _: Cluster) -> Sequence[Op]:
        if found.wish.power is Power.OFF:
            raise Refused(f"{instance} is switched off (power=off): start it with `start {instance}`")
        return [Put(layout.wish_key(instance, "restart_request"), request.encode())]

    return await rewrite(store, layout, instance, plan, ["restart_request", "power"])


def new_request(now: datetime, *, at_once: bool = False, reset: bool = False) -> str:
    """A `restart_request` that is unique also when two people ask in the same second.

    Args:
        now: the time, in UTC.
        at_once: end it, like by a power cut, instead of asking the guest.
        reset: press the reset button.
    """
    kind = "reset:" if reset else "now:" if at_once else ""
    return f"{kind}{now:%Y-%m-%dT%H:%M:%SZ}-{secrets.token_hex(4)}"


async def delete(store: Store, layout: Layout, instance: InstanceId) -> Written:
    """Delete every wish of an instance, but not its lock: its host does that once QEMU is proven gone.

    This is one transaction, unless the instance has more than a hundred keys: then the first one deletes `host`.

    For an instance without keys, delete what is left of it when no host does that, see `leftovers`.

    Raises:
        Refused: the instance has no keys, and nothing that may be deleted.
    """
    found, cluster = await read_instance(store, layout, instance)
    listing = await list_all(store, layout.instance_prefix(instance))
    lock = layout.lock_key(instance)
    host = layout.wish_key(instance, "host")
    doomed = sorted((kv.key for kv in listing.kvs if kv.key != lock.encode()), key=lambda key: key != host.encode())
    if not doomed:
        if found.status is None and found.lock is None:
            raise Refused(_no_such(instance, found))
        left = await leftovers.take_away(store, layout, found, cluster)
        return Written(instance=instance, revision=left, wish=found.wish, before=found.status)
    if lock.startswith(layout.instance_prefix(instance)):
        readable = [key for key in doomed if _is_text(key)]
        if len(readable) < len(doomed):
            raise Refused(
                f"{instance} has {len(doomed) - len(readable)} keys whose names are not UTF-8: "
                "delete them with etcdctl first"
            )
        ops: list[Op] = [Delete(key.decode()) for key in readable]
    else:
        ops = [Delete(layout.instance_prefix(instance), prefix=True)]
    revision = 0
    for start in range(0, len(ops), TXN_LIMIT):
        revision = (await store.txn([], ops[start : start + TXN_LIMIT])).revision
    notes: list[str] = []
    holder = found.status.host if found.status is not None else None
    swept = False
    try:
        swept = await leftovers.sweep(store, layout, found, cluster)
    except Denied:
        # The wishes are gone, which is what was asked for: people need not be able to write facts.
        notes.append(
            f"its status is left, which this user of etcd may not delete: `delete {instance}` by one who may write "
            f"{layout.status_key(instance)} takes it away"
        )
    if not swept and holder is not None and not cluster.alive(holder):
        notes.append(
            f"host {holder} has no session ({cluster.who_has_sessions()}): it shuts {instance} down when it is "
            f"back; if it is gone for good, `delete {instance}` once more takes away what is left"
        )
    return Written(
        instance=instance,
        revision=revision,
        wish=parse_wish(instance, {}),
        before=found.status,
        notes=tuple(notes),
    )


async def rewrite(
    store: Store,
    layout: Layout,
    instance: InstanceId,
    plan: Callable[[Instance, Cluster], Sequence[Op]],
    touched: Sequence[str],
) -> Written:
    """Read an instance, plan, and write if nothing changed meanwhile; otherwise try again.

    Args:
        store: etcd.
        layout: where the keys lie.
        instance: its id.
        plan: returns what to write, from what was read; it may refuse.
        touched: names of the keys that the plan writes or depends on, also missing ones.

    Raises:
        Refused: there is no such instance, the plan refuses, or other writers keep changing the instance.
    """
    for _ in range(CONFLICT_ATTEMPTS):
        found, cluster = await read_instance(store, layout, instance)
        if not found.keys:
            raise Refused(_no_such(instance, found))
        ops = plan(found, cluster)
        result = await store.txn(_unchanged(layout, found, touched), ops)
        if result.succeeded:
            after, cluster = await read_instance(store, layout, instance)
            return Written(
                instance=instance,
                revision=result.revision,
                wish=after.wish,
                before=found.status,
                notes=(*_problem_notes(after.wish.problems), *_host_notes(after.wish, cluster)),
            )
    raise Refused(f"{instance} was not changed: others changed it {CONFLICT_ATTEMPTS} times meanwhile; try again")


def _unchanged(layout: Layout, found: Instance, touched: Sequence[str]) -> list[Compare]:
    """Compare every key that was read, and that the missing wishes are still missing.

    An instance with more keys than one transaction can compare is invalid anyway: as many keys as fit are compared,
    the touched ones first. Names that are not UTF-8 cannot be compared.
    """
    revisions = dict.fromkeys((*touched, *WISH_KEYS), 0)
    revisions |= {name.decode(): value.mod_revision for name, value in found.keys.items() if _is_text(name)}
    return [
        Compare(layout.wish_key(found.id, name), Target.MOD_REVISION, revision)
        for name, revision in list(revisions.items())[:TXN_LIMIT]
    ]


def _is_text(key: bytes) -> bool:
    """Whether a key can be named in a request (they are `str` here)."""
    return key.decode("utf-8", "replace").encode() == key


def _new_problems(found: Instance, merged: Mapping[bytes, RawValue], values: Mapping[str, str]) -> list[Problem]:
    """The problems that the change brings: in a key that it sets, or in a key that was sound before."""
    before = {_subject(problem) for problem in found.wish.problems}
    touched = set(values)
    for name, text in values.items():
        # Unknown keys share one problem, so each is also judged by itself (where only `ram` is missing).
        alone = parse_wish(found.id, {name.encode(): RawValue(text.encode(), 0)})
        touched |= {_subject(problem) for problem in alone.problems if problem.key != "ram"}
    problems = parse_wish(found.id, merged).problems
    return [p for p in problems if _subject(p) in touched or _subject(p) not in before]


def _subject(problem: Problem) -> str:
    """The subject of a problem: one key, or all unknown keys."""
    return "unknown keys" if problem.key.startswith("unknown key") else problem.key


def _refuse_huge(what: str, values: Mapping[str, str]) -> None:
    """Refuse huge values, also of keys for people only: every host would have to keep them.

    Raises:
        Refused: a value is too large. etcd itself takes at most 1.5 MiB at once, and does not name the key.
    """
    huge = [
        Problem(name, f"{len(value.encode())} bytes", f"a value has at most {VALUE_LIMIT} bytes")
        for name, value in values.items()
        if len(value.encode()) > VALUE_LIMIT
    ]
    if huge:
        raise Refused(_problems_message(what, huge))


def _refuse_unknown(instance: InstanceId, found: Instance, unset: Sequence[str]) -> None:
    """Refuse to delete a key that is not there and has an unknown name.

    Raises:
        Refused: there is such a name; the message says which key was probably meant.
    """
    for name in unset:
        if name.encode() in found.keys or is_known(name.encode()):
            continue
        there = {plain(key): key for key in (raw.decode(errors="replace") for raw in found.keys)}
        near = nearest(name, there)
        meant = "" if near is None else f"; did you mean {near}?"
        raise Refused(f"{instance} was not changed: it has no key {show(name)}{meant} (--force ignores it)")


def _only_wishes(layout: Layout, instance: InstanceId, names: Sequence[str] | Mapping[str, str]) -> None:
    """Refuse to touch the lock as if it were a wish."""
    for name in names:
        if layout.wish_key(instance, name) == layout.lock_key(instance):
            raise Refused(f"`{name}` is the lock of {instance}, no wish: only the host that holds it writes it")


def _no_such(instance: InstanceId, found: Instance) -> str:
    """The message for an instance without keys; its host may still be shutting it down."""
    if found.status is not None:
        return f"{instance} has no keys any more; host {found.status.host} says {found.status.phase.value}"
    return f"there is no instance {instance}"


def _problems_message(what: str, problems: Sequence[Problem]) -> str:
    """Several problems under one heading, one line each."""
    return "\n".join([f"{what} (--force writes it all the same):", *(f"  {problem}" for problem in problems)])


def _problem_notes(problems: Sequence[Problem]) -> list[str]:
    """Notes on problems of keys that were written."""
    return [f"problem: {problem}" for problem in problems]


def _host_notes(wish: Wish, cluster: Cluster) -> list[str]:
    """Notes for a wish on which no host will act, or which no host will take over."""
    return [*_candidate_notes(wish, cluster), *_target_notes(wish, cluster)]


def _candidate_notes(wish: Wish, cluster: Cluster) -> list[str]:
    """A note on failover candidates without a session: they are down, or typos."""
    absent = [f"{host}{cluster.meant_by(host)}" for host in wish.hosts if host != ANY_HOST and not cluster.alive(host)]
    return [f"`hosts` names hosts without a session, which cannot take it over: {', '.join(absent)}"] if absent else []


def _target_notes(wish: Wish, cluster: Cluster) -> list[str]:
    """A note when no host is there to run the instance."""
    if wish.host is None:
        return [f"nothing runs {wish.instance} until `host` is set ({cluster.who_has_sessions()})"]
    if not cluster.takes(wish.instance, wish.runs_on):
        named = f"`host` names {wish.host}" if wish.placement is None else where_else(wish)
        return [f"{named}, which has no session ({cluster.who_has_sessions()}{cluster.meant_by(wish.runs_on)})"]
    target = cluster.sessions.get(wish.runs_on or "")
    if cluster.wish_of(wish.runs_on or "").drain is not None:
        return [f"{wish.runs_on} drains: nothing starts there, and nothing moves there, until `undrain`"]
    if target is not None and target.draining:
        return [f"{wish.runs_on} is stopping all its guests: a guest that runs elsewhere stays there until that ends"]
    return []


def refuse_to_leave_files(what: str, wish: Wish, found: Instance) -> None:
    """Refuse a `host` that has not its local disks: they do not go along.

    Raises:
        Refused: it is so; the message says which disks, and what to do first.
    """
    files = None if found.status is None else found.status.files
    left = {} if wish.spec is None else files_elsewhere(wish.spec, files, wish.host)
    if left:
        disks = ", ".join(f"{key} is on {host}" for key, host in left.items())
        raise Refused(
            f"{what}: {disks}, in a file that does not go along. Shut it down, copy its files to {wish.host}'s "
            "KVM_DISK_DIR, then write `host` with --force; without the files it waits there, and nothing is lost"
        )


def refuse_absent_host(what: str, wish: Wish, cluster: Cluster) -> None:
    """Refuse a `host` without a session: a typo, or a host that is down.

    Raises:
        Refused: it has none; the message says which host was probably meant, and what --force does.
    """
    if wish.host is None or cluster.takes(wish.instance, wish.host):
        return
    if not cluster.sessions:
        raise Refused(
            f"{what}: `host` names {wish.host}, and no host has a session in this etcd under this prefix. Either no "
            "supervisor runs yet, or the supervisors use another etcd (ETCD_ENDPOINTS) or prefix (KVM_PREFIX). "
            "--force writes it all the same"
        )
    raise Refused(
        f"{what}: `host` names {wish.host}, which has no session ({cluster.who_has_sessions()}"
        f"{cluster.meant_by(wish.host)}). --force writes it all the same: then a running guest stays where it is, and "
        f"another one waits, until {wish.host} has a session"
    )
