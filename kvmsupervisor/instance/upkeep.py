"""The lock of a QEMU that lives: written again where it is missing or older, or with this host's present name."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from kvmsupervisor.cluster.fencing import NotFenced
from kvmsupervisor.cluster.lock import InstanceLock
from kvmsupervisor.domain.lock import Change
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine.machine import Machine


async def reassert(machine: Machine, lock: InstanceLock, report: Report, context: InstanceContext) -> None:
    """Write it again; kill the QEMU instead when another host has had it meanwhile.

    The status tells that. Where the status is gone as well, because the instance was removed, Ceph does: a QEMU that
    was shut out never writes again. A Ceph that does not answer keeps no lock from being written.

    Raises:
        SwapFailed: somebody was faster, or our session is gone.
        EtcdError: etcd did not do it.
    """
    record = machine.record
    assert record is not None
    with contextlib.suppress(NotFenced):
        if gone := await context.fencing.shut_out(record.clients):
            await machine.kill(
                f"its lock is gone, and {', '.join(gone)} was shut out: another host has had it meanwhile"
            )
            return
    other = await lock.reassert(
        record.as_lock(context.me, facts=context.layout.facts, ran=not machine.never_ran), context.era()
    )
    if other is not None:
        await machine.kill(f"{other.host} has had its lock meanwhile, up to epoch {other.epoch}")
        return
    report.tell("lock.reasserted", level="warning", epoch=record.epoch)


async def rename(lock: InstanceLock, report: Report, context: InstanceContext) -> None:
    """Write it with this host's present name and facts prefix (law 12).

    Raises:
        SwapFailed, EtcdError: see `reassert`.
    """
    held = lock.view.lock
    assert held is not None
    await lock.write(Change.RENAME, replace(held, host=context.me, facts=context.layout.facts), None)
    report.tell("lock.renamed", level="warning", epoch=held.epoch, former=held.host)
