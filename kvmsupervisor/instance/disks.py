"""The disks of a machine that lives: grown to the size of their keys, and what has stopped its guest at one of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kvmsupervisor.cluster.fencing import NotFenced
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import Wish
from kvmsupervisor.domain.storage import sized
from kvmsupervisor.domain.view import Action
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine.machine import Machine

GROWTH_EVERY_S = 600.0
"""How often the images of a running machine are looked at by themselves: `rbd info` takes 50 ms of processor, so with a
hundred machines this is 1 % of one. A change of any key of the instance has them looked at at once."""


SHUT_OUT_EVERY_S = 60.0
"""How often Ceph is asked whether it has shut out a guest that an error has stopped. Arbitrary: `ceph` takes 0.3 s of a
processor, and the first time is at once."""


async def tend(
    action: Action,
    instance: InstanceId,
    wish: Wish | None,
    *,
    machine: Machine,
    report: Report,
    context: InstanceContext,
) -> None:
    """Do what `action` (`GROW`, `ROOM`) says of the disks of a running machine."""
    spec, disks = machine.spec, context.local_disks
    assert spec is not None
    if action is Action.GROW:
        machine.growth.look(spec, GROWTH_EVERY_S)
        sizes = await context.disks.sizes(spec, report.tell_trouble)
        await machine.growth.tell(sizes, sized(spec, None if wish is None else wish.spec))
        return
    if await machine.room.look(spec, str(disks.folder), partial(disks.room, instance)):
        report.tell("instance.goes_on", reason="there is room for its disks again")
    record = machine.record
    if machine.room.said is None and record is not None and record.clients:
        await _ask_whether_shut_out(instance, record.clients, machine=machine, report=report, context=context)


async def _ask_whether_shut_out(
    instance: InstanceId, clients: Sequence[str], *, machine: Machine, report: Report, context: InstanceContext
) -> None:
    """Say so where Ceph has shut out a QEMU whose lock is its own: a person did it, or a host with another etcd."""
    said = None
    try:
        if gone := await context.fencing.shut_out(clients):
            said = (
                f"{', '.join(gone)} is shut out in Ceph (`ceph osd blocklist ls`), so this QEMU never writes again; "
                f"make sure that nobody else runs it, then `kvmsupervisor restart --now {instance}` begins it anew"
            )
    except NotFenced as error:
        report.tell_trouble(f"Ceph does not say whether this QEMU was shut out: {error}")
    machine.room.blame(said, again_s=SHUT_OUT_EVERY_S)


async def size_before_it_runs(machine: Machine, wish: Wish | None) -> None:
    """Have a QEMU whose guest has not run grow the files that are smaller than `wish` says."""
    spec = machine.spec
    if spec is not None and (files := sized(spec, None if wish is None else wish.spec)):
        await machine.growth.tell({}, files)
