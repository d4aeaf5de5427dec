"""What a person does who reads statuses, and does as they say: now and then, once all is healed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kvmsupervisor.domain.history import HistoryName
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.status import Status

if TYPE_CHECKING:
    from tests.simulation.world import World


def heed(world: World) -> None:
    """Do whatever any status asks for."""
    confirm(world)
    give_back(world)
    break_locks_of_nobody(world)
    give_up_on_nobody(world)
    restart_the_shut_out(world)
    end_the_other(world)


def _statuses(world: World) -> Iterator[Status]:
    for key, value in world.etcd.data.items():
        if key.startswith(world.layout.statuses_prefix) and (status := Status.from_json(value)) is not None:
            yield status


def confirm(world: World) -> None:
    """Whatever any host holds is meant (`confirm-removal`)."""
    held: dict[str, list[str]] = defaultdict(list)
    for status in _statuses(world):
        if status.held:
            held[status.host].append(status.id)
    for host, instances in sorted(held.items()):
        for instance in instances:
            world.judge.ordered(instance, "confirmed")
        world.trace.add("people", f"confirm {host} {instances}")
        world.etcd.write(world.layout.confirmation_key(HostName(host)), json.dumps(instances))


def give_back(world: World) -> None:
    """Restart whoever was started with another's image by mistake.

    The status of that other one asks for it, and `pending` of this one says that its key waits for a restart.
    """
    images = {keys.get("rbd") for keys in world.wishes.values()}
    for name in sorted(world.wishes):
        if any(world.has_anothers(name, image) for image in images):
            _restart(world, name, "restarted with its own image")


def is_nobodys(world: World, lock: Lock | None) -> bool:
    """Whether a host holds it that had a wrong name."""
    return lock is not None and all(lock.host != host.true_name for host in world.hosts)


def break_locks_of_nobody(world: World) -> None:
    """Break the locks of a host that had a wrong name, where nothing of it lives (`break-lock`)."""
    for instance in sorted(world.wishes):
        if is_nobodys(world, world.lock(instance)) and not world.judge.living(instance):
            world.break_lock(instance)


def give_up_on_nobody(world: World) -> None:
    """A host that had a wrong name is gone for good: what runs there has its right one (`confirm-removal`)."""
    name = HistoryName.from_json(world.etcd.data.get(world.layout.history_key, b""))
    asked = {status.reason for status in _statuses(world)}
    for host in () if name is None else name.hosts:
        is_asked = any(f"`kvmsupervisor confirm-removal {host}`" in reason for reason in asked)
        if is_asked and all(host != one.true_name for one in world.hosts) and not world.has_session(host):
            assert name is not None
            name = replace(name, gone=tuple(sorted({*name.gone, host})))
            world.trace.add("people", f"{host} is gone for good")
            world.etcd.write(world.layout.history_key, name.to_json())


def order_drains_again(world: World) -> None:
    """Give a drain again that came with another history, as what its host says asks for (`drain`)."""
    for host, wish in sorted(world.host_wishes.items()):
        said = world.progress(host)
        if "drain" in wish and said is not None and "until it is ordered again" in said.notice:
            world.drain(host, wish["drain"])


def restart_the_shut_out(world: World) -> None:
    """Restart whoever Ceph has shut out although its lock is its own (`restart`)."""
    for status in sorted(_statuses(world), key=lambda one: one.id):
        if "is shut out in Ceph" in status.reason and len(world.judge.living(status.id)) == 1:
            _restart(world, status.id, "restarted with another client of Ceph")


AFTER = 5
"""How often a person reads that another QEMU is to be ended before that is done: it may end by itself."""


def end_the_other(world: World) -> None:
    """End by hand what keeps a QEMU from running, as its status says.

    Its host takes an etcd that has lost its data twice for another cluster's, and lets it run (seed 342).
    """
    for status in list(_statuses(world)) if world.has_begun_again else []:
        if "is open elsewhere, too" not in status.reason:
            continue
        world.asked[status.id] += 1
        for qemu in world.judge.living(status.id) if world.asked[status.id] >= AFTER else []:
            if qemu.pid != status.pid or qemu.host != status.host:
                world.judge.ordered(status.id, f"{qemu.pid} on {qemu.host} is ended by hand")
                qemu.crash(15)


def _restart(world: World, instance: str, why: str) -> None:
    world.judge.ordered(instance, why, at_once=True)
    world.put(instance, restart_request=f"now:{world.loop.time():.3f}")
