"""The disks of a machine that lives: grown to the size of their keys, and let go on once their file system has room."""

from __future__ import annotations

from functools import partial

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
        sizes = await context.disks.sizes(spec)
        await machine.growth.tell(sizes, sized(spec, None if wish is None else wish.spec))
    elif await machine.room.look(spec, str(disks.folder), partial(disks.room, instance)):
        report.tell("instance.goes_on", reason="there is room for its disks again")


async def size_before_it_runs(machine: Machine, wish: Wish | None) -> None:
    """Have a QEMU whose guest has not run grow the files that are smaller than `wish` says."""
    spec = machine.spec
    if spec is not None and (files := sized(spec, None if wish is None else wish.spec)):
        await machine.growth.tell({}, files)
