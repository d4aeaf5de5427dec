"""A QEMU that is started for an instance, whether its guest begins here or comes from another host; and its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from kvmsupervisor.adapters.cgroup import CgroupFailed
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.domain.argv import Provision
from kvmsupervisor.domain.identity import HostIdentity
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.nics import ELSEWHERE
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.domain.storage import storage_of
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.provisioning import HOST_RETRY_S, NotReady, Opened


def new_record(
    instance: InstanceId,
    incarnation: str,
    runs: Spec,
    opened: Opened,
    context: InstanceContext,
    *,
    spec: Mapping[str, Any],
    restart_request: str | None,
    revision: int,
) -> Incarnation:
    """The record of a QEMU that is about to be started, without what its lock tells.

    Args:
        instance: whose it is.
        incarnation: which one.
        runs: the machine.
        opened: what was opened for it.
        context: of all instances.
        spec: the machine as it is recorded.
        restart_request: the value of that key.
        revision: of the wish that it is started from.
    """
    user = opened.quarters.user
    return Incarnation(
        instance=instance,
        incarnation=incarnation,
        epoch=0,
        boot_id=context.boot_id,
        argv=(),
        spec=spec,
        storage=storage_of(runs),
        accelerator=context.host_side.accel,
        machine=opened.machine,
        taps=opened.tap_names,
        tap_indexes=tuple(context.system.index_of(tap) or ELSEWHERE for tap in opened.tap_names),
        bridges=opened.bridges,
        restart_request=restart_request,
        revision=revision,
        log_offset=0,
        spawned_at=context.clock.now(),
        uid=None if user is None else user.uid,
        under=HostIdentity.of(context.me, context.layout),
        vouched=True,
    )


async def launch(
    machine: Machine,
    record: Incarnation,
    spec: Spec,
    opened: Opened,
    build_argv: Callable[[Provision], tuple[str, ...]],
) -> None:
    """Start a QEMU in its cgroup; one that does not come there is killed.

    Raises:
        NotReady: it cannot be started.
    """
    directory = machine.directory
    try:
        machine.spawn(record, spec, partial(opened.provision, directory), build_argv, opened.quarters)
    except OSError as error:
        raise NotReady(f"QEMU cannot be started: {explain(error, directory.path)}", HOST_RETRY_S) from error
    if machine.pid is not None:
        try:
            await opened.quarters.cgroup.settle(machine.pid)
        except CgroupFailed as error:
            await machine.give_up(str(error))


def must_note(machine: Machine, **known: Any) -> None:
    """Add to its record what has to stand there before anything else is done.

    Args:
        machine: with the QEMU.
        known: fields of `Incarnation`.

    Raises:
        NotReady: the record cannot be written.
    """
    try:
        machine.note(**known)
    except OSError as error:
        said = explain(error, machine.directory.path)
        raise NotReady(f"its record cannot be written: {said}", HOST_RETRY_S) from error
