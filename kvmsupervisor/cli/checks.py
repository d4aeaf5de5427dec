"""`check`: finds all that is wrong with the keys and the instances; it reads all keys."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli.output import parse_time, printable_bytes
from kvmsupervisor.cluster.overview import Cluster, Instance, natural, read_cluster
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.images import image_name, is_of_library, parse_image
from kvmsupervisor.domain.keys import ID_RULE, HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.names import FREE_KEY, FREE_KEY_PREFIX
from kvmsupervisor.domain.spec import Power, RestartPolicy, Spec, Wish
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.domain.storage import files_elsewhere, origins_of, pinning
from kvmsupervisor.domain.values import Unfit, invisible

SETTLE_S = 2.0
"""Seconds that a host gets to act on a wish before `check` calls it late. Arbitrary: hosts write a status within
milliseconds, and a person who has just written a key does not want an alarm."""

OVERDUE_S = 60.0
"""Seconds that a shutdown may last beyond its guest's time. QEMU is killed by then, which takes milliseconds; the rest
is for clocks that differ, because the host's clock says when the shutdown began. Arbitrary."""

NOT_RUNNING = frozenset({Phase.BACKOFF, Phase.WAITING, Phase.STARTING, Phase.STOPPING})
"""Phases of a machine that does not run, or only runs for moments."""


@frozen(kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        instances: that it concerns; none for keys that belong to no instance.
        key: the name of a wish, or a whole key.
        found: the present value or state.
        wanted: the right value or state.
        late: whether the finding may be over in a moment.
    """

    instances: tuple[InstanceId, ...]
    key: str
    found: str
    wanted: str
    late: bool = False

    def to_object(self) -> dict[str, Any]:
        """As `check -o json` prints it."""
        found = asdict(self)
        del found["late"]
        return found | {"instances": list(self.instances)}


@frozen(kw_only=True)
class Patience:
    """How long things may last.

    Attributes:
        settle_s: time between two looks at findings that may be over in a moment; only those that stay are told.
        shutdown_timeout_s: of a guest without the key `shutdown_timeout`.
        now: the time by this machine's clock.
    """

    settle_s: float
    shutdown_timeout_s: float
    now: datetime


async def check_all(store: Store, layout: Layout, patience: Patience) -> tuple[Cluster, list[Finding]]:
    """Read everything and return the findings, in the order of the instances."""
    cluster = await read_cluster(store, layout)
    findings = find_all(cluster, layout, patience)
    early = {finding.instances for finding in findings if finding.late}
    if early:
        await asyncio.sleep(patience.settle_s)
        cluster = await read_cluster(store, layout)
        findings = [f for f in find_all(cluster, layout, patience) if not f.late or f.instances in early]
    return cluster, findings


def find_all(cluster: Cluster, layout: Layout, patience: Patience) -> list[Finding]:
    """All findings, in the order of the instances; those without an instance come last."""
    findings: list[Finding] = []
    for instance in cluster.instances.values():
        findings += _of_wish(instance, cluster, layout)
        findings += _of_status(instance, cluster, layout)
        findings += _of_a_stop(instance, cluster, layout, patience)
        findings += _of_lock(instance, cluster, layout)
    findings += _used_twice(cluster)
    findings += _of_hosts(cluster, layout)
    findings += _of_images(cluster, layout)
    findings += _of_nobody(cluster, layout)
    findings += _of_history(cluster, layout)
    findings += _of_doubt(cluster)
    return sorted(findings, key=lambda finding: (not finding.instances, [natural(i) for i in finding.instances[:1]]))


def _of_wish(instance: Instance, cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Problems of the keys that people write."""
    for problem in instance.wish.problems:
        yield Finding(instances=(instance.id,), key=problem.key, found=problem.found, wanted=problem.wanted)
    yield from _of_characters(instance)
    yield from _of_local_disks(instance)
    host = instance.wish.runs_on
    if host is not None and not cluster.takes(instance.id, host) and not cluster.runs_alone(instance):
        yield Finding(
            instances=(instance.id,),
            key="host" if instance.wish.placement is None else layout.placement_key(instance.id),
            found=f"{host!r}, which has no session",
            wanted=f"a host {cluster.who_has_sessions()}{cluster.meant_by(host)}"
            if cluster.sessions
            else "a running supervisor: no host has one",
        )


def _of_local_disks(instance: Instance) -> Iterator[Finding]:
    """Disks that are files of another host than that where it is to run, or that keep others from taking it over."""
    wish, status = instance.wish, instance.status
    if wish.spec is None:
        return
    for key, host in files_elsewhere(wish.spec, None if status is None else status.files, wish.runs_on).items():
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=f"a file of {host}, and `host` is {wish.runs_on}",
            wanted=f"the file copied to {wish.runs_on} while the machine is off, or `host` as it was",
        )
    local = pinning(wish.spec)
    if wish.hosts and local:
        yield Finding(
            instances=(instance.id,),
            key="hosts",
            found=f"hosts to take it over, and {', '.join(local)} in a file of one host",
            wanted="all its disks in Ceph, or no key `hosts`: no other host can take it over",
        )


def _of_characters(instance: Instance) -> Iterator[Finding]:
    """Values with invisible characters, in keys that have no problem otherwise."""
    bad = {problem.key for problem in instance.wish.problems}
    for raw_name, raw in instance.keys.items():
        name = raw_name.decode("utf-8", "backslashreplace")
        for_people = name == FREE_KEY or name.startswith(FREE_KEY_PREFIX)
        held = None if for_people or name in bad else invisible(raw.value.decode("utf-8", "replace"))
        if held is not None:
            yield Finding(
                instances=(instance.id,),
                key=name,
                found=f"a value with the invisible character {held}",
                wanted="the value without that character",
            )


def _of_status(instance: Instance, cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Statuses that a host should have written by now, and facts that no host keeps up to date."""
    status, wish = instance.status, instance.wish
    key = layout.status_key(instance.id)
    if status is not None and status.held and cluster.speaks(status):
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=status.reason,
            wanted=f"its keys as they were, or `kvmsupervisor confirm-removal {status.host}`",
        )
    if wish.keys == 0:
        if status is not None and not cluster.speaks(status):
            yield Finding(
                instances=(instance.id,),
                key=key,
                found=f"the status of an instance without keys, by {status.host}, which has no session",
                wanted=f"no status: {status.host} deletes it when it is back; if {status.host} is gone for good, "
                f"`kvmsupervisor delete {instance.id}` does",
            )
        return
    if wish.host is None or not cluster.takes(instance.id, wish.runs_on):
        return
    if status is None:
        yield Finding(
            instances=(instance.id,),
            key=key,
            found="nothing",
            wanted=f"a status from host {wish.runs_on}",
            late=True,
        )
    elif status.revision < wish.revision:
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=f"revision {status.revision}, by {status.host}: {status.phase.value}, {status.reason}",
            wanted=f"revision {wish.revision}, the newest of its keys",
            late=True,
        )
    elif cluster.speaks(status) and status.halted is not None:
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=f"its guest does not run: {status.halted}, by {status.host}",
            wanted=f"a guest that runs; {status.reason}",
        )
    elif cluster.speaks(status) and status.unplugged:
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=f"{'; '.join(status.unplugged)}, by {status.host}",
            wanted="each NIC plugged into the bridge of its key",
        )
    elif not cluster.speaks(status):
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=f"nothing newer than what {status.host} wrote, which has no session: {status.phase.value}",
            wanted=f"a status from host {wish.runs_on}",
            late=True,
        )
    elif _is_down(status, wish, cluster):
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=f"{status.phase.value} on {status.host} since {status.since}: {status.reason}",
            wanted="running",
            late=True,
        )
    elif cluster.speaks(status) and not wish.problems and status.problems:
        # What its keys ask for and that host does not have.
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=f"{status.phase.value} on {status.host} since {status.since}: {'; '.join(status.problems)}",
            wanted=f"a host that has what its keys ask for, or other keys, for {status.host} to run it",
        )


def _is_down(status: Status, wish: Wish, cluster: Cluster) -> bool:
    """Whether the instance should run, and does not, or only for moments; other findings tell of bad keys and hosts."""
    if wish.power is not Power.ON or wish.problems or status.problems:
        return False
    if status.phase is Phase.STOPPED:
        # With another policy it may have ended by itself, as wanted.
        session = cluster.sessions.get(status.host)
        return wish.restart is RestartPolicy.ALWAYS or (session is not None and session.draining)
    return status.phase in NOT_RUNNING


def _of_a_stop(instance: Instance, cluster: Cluster, layout: Layout, patience: Patience) -> Iterator[Finding]:
    """A shutdown that lasts longer than it may: not even force ends QEMU."""
    status, wish = instance.status, instance.wish
    if status is None or status.phase is not Phase.STOPPING or not cluster.speaks(status):
        return
    given_s = patience.shutdown_timeout_s if wish.shutdown_timeout_s is None else wish.shutdown_timeout_s
    began = parse_time(status.since)
    # An instance that should run is found anyway.
    should_run = wish.host is not None and wish.power is Power.ON
    if not should_run and began is not None and patience.now - began > timedelta(seconds=given_s + OVERDUE_S):
        yield Finding(
            instances=(instance.id,),
            key=layout.status_key(instance.id),
            found=f"{status.phase.value} on {status.host} since {status.since}: {status.reason}",
            wanted="stopped",
        )


def _of_lock(instance: Instance, cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Locks that cannot be read, or whose holder has no session."""
    if instance.lock is None:
        return
    key, lock = layout.lock_key(instance.id), instance.lock.lock
    if lock is None:
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=printable_bytes(instance.lock.kv.value, limit=80),
            wanted="a lock as supervisors write it: JSON with host, boot_id, epoch, state",
        )
    elif not cluster.alive(lock.host):
        yield Finding(
            instances=(instance.id,),
            key=key,
            found=f"held by {lock.host} (epoch {lock.epoch}, {lock.state.value}), which has no session",
            wanted=f"a holder {cluster.who_has_sessions()}" if cluster.sessions else "a holder with a session",
        )


def _of_hosts(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Troubles that hosts tell of themselves."""
    for host, session in cluster.sessions.items():
        if session is not None and session.notice:
            yield Finding(
                instances=(),
                key=layout.session_key(HostName(host)),
                found=session.notice,
                wanted="a host that supervises",
            )
        for gap in () if session is None else session.gaps:
            yield Finding(
                instances=(),
                key=layout.session_key(HostName(host)),
                found=f"a wall between guests is missing on {host}: {gap}",
                wanted="what it takes, or a setting that does without it (docs/security.md)",
            )


def _used_twice(cluster: Cluster) -> Iterator[Finding]:
    """MACs and images that two instances use, and ports that two use on one host."""
    yield from _duplicates(
        cluster, "mac", lambda host, spec: {nic.mac for nic in spec.all_nics}, "one MAC for each NIC"
    )
    yield from _duplicates(
        cluster,
        "rbd",
        lambda host, spec: set() if spec.rbd is None else {spec.rbd.name},
        "an image of its own for each instance: two writers destroy an image",
    )
    yield from _duplicates(
        cluster,
        "spice_port",
        lambda host, spec: set() if spec.spice_port is None or host is None else {(spec.spice_port, host)},
        "a port of its own for each instance of a host",
    )
    yield from _duplicates(
        cluster,
        "forward",
        lambda host, spec: set() if host is None else {(f"{one.protocol} {one.port}", host) for one in spec.forward},
        "a port of its own for each instance of a host",
    )


def _duplicates(
    cluster: Cluster, key: str, values_of: Callable[[str | None, Spec], Collection[Hashable]], wanted: str
) -> Iterator[Finding]:
    """One finding for each value that several instances have."""
    users: dict[Hashable, list[InstanceId]] = defaultdict(list)
    for instance in cluster.instances.values():
        if instance.wish.spec is not None:
            for value in values_of(instance.wish.runs_on, instance.wish.spec):
                users[value].append(instance.id)
    for value, ids in users.items():
        if len(ids) > 1:
            text = f"{value[0]} on host {value[1]}" if isinstance(value, tuple) else str(value)
            yield Finding(instances=tuple(ids), key=key, found=f"{text}, used by {', '.join(ids)}", wanted=wanted)


def _of_images(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Entries of the image library that cannot be used, and disks still to be made of one that is not there."""
    there = set()
    for kv in cluster.images:
        name = kv.key.decode(errors="replace").removeprefix(layout.images_prefix)
        there.add(name)
        try:
            parse_image(image_name(name), kv.value.decode(errors="replace").strip())
        except Unfit as unfit:
            found = "a value that is not shown, as it may hold a password"
            yield Finding(instances=(), key=printable_bytes(kv.key), found=found, wanted=str(unfit))
    for instance in cluster.instances.values():
        runs = instance.status is not None and instance.status.pid is not None
        spec = instance.wish.spec
        origins = {} if runs or spec is None else origins_of(spec)
        medium = None if spec is None or spec.cdrom is None else spec.cdrom.image
        if medium is not None and medium not in there:
            yield Finding(
                instances=(instance.id,),
                key="cdrom",
                found=f"{medium}, and the library has no image of that name",
                wanted=f"an image that `image list` shows, or `image add {medium}`, or file:NAME.iso",
            )
        for key, name in origins.items():
            if is_of_library(name) and name not in there:
                yield Finding(
                    instances=(instance.id,),
                    key=key,
                    found=f"from={name}, and the library has no image of that name",
                    wanted=f"an image that `image list` shows, or `image add {name}`; disks that exist need no from=",
                )


def _of_nobody(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Keys that belong to no instance, and facts that cannot be read."""
    hosts = layout.host_wishes_prefix
    for kv in cluster.strays:
        if kv.key.startswith(hosts.encode()):
            wanted = f"{hosts}<host>/drain, or {hosts}<host>/return"
            yield Finding(instances=(), key=printable_bytes(kv.key), found="no wish for a host", wanted=wanted)
            continue
        yield Finding(
            instances=(),
            key=printable_bytes(kv.key),
            found="a key that belongs to no instance",
            wanted=f"{layout.prefix}/<id>/<key>, where an id is {ID_RULE}",
        )
    for host, wish in cluster.host_wishes.items():
        if wish.odd:
            yield Finding(instances=(), key=f"{hosts}{host}/", found=wish.odd, wanted="one of these values")
        elif not cluster.alive(host):
            found = f"{host}, which has no session{cluster.meant_by(host)}"
            yield Finding(instances=(), key=f"{hosts}{host}/", found=found, wanted="a host that has one")
    for kv in cluster.unreadable:
        yield Finding(
            instances=(),
            key=printable_bytes(kv.key),
            found=printable_bytes(kv.value, limit=80),
            wanted="a value of this release; its host writes it anew when its supervisor starts",
        )


def _of_history(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Hosts that others wait for since etcd has another history."""
    name = cluster.history
    if name is None or not name.hosts:
        return
    said = {host for host, session in cluster.sessions.items() if session is not None and session.history == name.id}
    waited_for = sorted((cluster.sessions.keys() | set(name.hosts)) - said - set(name.gone))
    if waited_for:
        yield Finding(
            instances=(),
            key=layout.history_key,
            found=f"another history of etcd than before (restored, or its data lost), as {name.by} has noticed; "
            f"{', '.join(waited_for)} {'have' if len(waited_for) > 1 else 'has'} not said yet what runs there",
            wanted="a session of each, or `kvmsupervisor confirm-removal HOST` for a host that is gone for good",
        )


def _of_doubt(cluster: Cluster) -> Iterator[Finding]:
    """Instances that a host which is gone held before etcd had another history, and has not said there what runs."""
    name = cluster.history
    if name is None or not name.number:
        return
    for one in cluster.instances.values():
        lock = None if one.lock is None else one.lock.lock
        if lock is None or lock.storage is not Storage.RBD or lock.history == name.id or cluster.alive(lock.host):
            continue
        yield Finding(
            instances=(one.id,),
            key="lock",
            found=f"held by {lock.host}, which has no session, since before etcd was restored or lost its data; while "
            "somebody has its disks open, its guest counts as running and is not fenced",
            wanted=f"a session of {lock.host}; if nothing of it runs any more: `kvmsupervisor break-lock {one.id}`",
        )


def concerning(findings: Iterable[Finding], instance: InstanceId) -> list[Finding]:
    """The findings that concern one instance."""
    return [finding for finding in findings if instance in finding.instances]
