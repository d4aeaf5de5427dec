"""The lock of a QEMU that lives: written again where that is due, and vouched for."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from kvmsupervisor.cluster.fencing import NotFenced
from kvmsupervisor.cluster.lock import InstanceLock, SwapFailed
from kvmsupervisor.domain.history import Era
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Change, LockState, LockView
from kvmsupervisor.domain.view import Action
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.new_qemu import must_note
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine.machine import Machine


async def keep(
    action: Action, machine: Machine, lock: InstanceLock, report: Report, context: InstanceContext, *, seen: LockView
) -> None:
    """Do one of the three.

    Args:
        action: which.
        machine: with the QEMU.
        lock: of its instance.
        report: of the instance.
        context: what all instances share.
        seen: the lock by which that was decided.

    Raises:
        SwapFailed: somebody was faster, or our session is gone.
        EtcdError: etcd did not do it.
        NotReady: our own record of it cannot be kept.
    """
    match action:
        case Action.REASSERT:
            await _reassert(machine, lock, report, context, seen=seen)
        case Action.RENAME:
            await _rename(machine, lock, report, context)
        case Action.VOUCH:
            await _vouch(machine, lock, report)
        case _:
            raise AssertionError(action)


def follow_epoch(machine: Machine, seen: LockView, era: Era) -> None:
    """Have the record of a QEMU say the epoch of its lock, from which whoever takes it over counts.

    To and fro between two stores each may have another one.
    """
    record, lock = machine.record, seen.lock
    if (
        record is None
        or record.incoming
        or lock is None
        or lock.state is not LockState.RUNNING
        or seen.era != era.count
    ):
        return
    if lock.incarnation == record.incarnation and lock.epoch != record.epoch:
        with contextlib.suppress(OSError):
            machine.note(epoch=lock.epoch)


async def _vouch(machine: Machine, lock: InstanceLock, report: Report) -> None:
    """Repeat its clients among the facts, as its own release did not: the next host may shut them out on that word."""
    record = machine.record
    assert record is not None
    await lock.repeat(record.clients)
    must_note(machine, vouched=True)
    report.tell("lock.vouched", addresses=list(record.clients))


async def _reassert(
    machine: Machine, lock: InstanceLock, report: Report, context: InstanceContext, *, seen: LockView
) -> None:
    """Write it again; kill the QEMU instead when another host has had it meanwhile.

    The status tells that. Where the status is gone as well, because the instance was removed, Ceph does.

    Raises:
        SwapFailed, EtcdError: see `keep`.
    """
    record = machine.record
    assert record is not None
    if await _ended_as_shut_out(machine, report, context, "its lock is gone"):
        return
    era = context.era()
    epoch = await lock.epoch_of_the_living(record, seen, era)
    # On record first: cut off here, a successor finds the lock older by its epoch. A full disk keeps no lock from its
    # QEMU: a lock is known by its incarnation.
    with contextlib.suppress(OSError):
        machine.note(epoch=epoch)
    facts, ran = context.layout.facts, not machine.never_ran
    ours = record.as_lock(context.me, facts=facts, ran=ran, machine=context.machine)
    other = await lock.reassert(replace(ours, epoch=epoch, history=era.mark or None), era)
    if other is not None:
        await machine.kill(f"{other.host} has had its lock meanwhile, up to epoch {other.epoch}")
        return
    report.tell("lock.reasserted", level="warning", epoch=epoch)


async def _rename(machine: Machine, lock: InstanceLock, report: Report, context: InstanceContext) -> None:
    """Write it with this host's present name and facts prefix (law 12), and the history that etcd has (law 11).

    A backup may be older than a takeover: then the lock that came back names a QEMU that was fenced. It is killed.

    Raises:
        SwapFailed, EtcdError: see `keep`.
    """
    held = lock.view.lock
    assert held is not None
    if await _ended_as_shut_out(machine, report, context, "its lock is older than that"):
        return
    mark = context.era().mark or None
    await lock.write(Change.RENAME, replace(held, host=context.me, facts=context.layout.facts, history=mark), None)
    report.tell("lock.renamed", level="warning", epoch=held.epoch, former=held.host)


async def release(
    lock: InstanceLock, report: Report, context: InstanceContext, *, there: bool, stale_placement: int
) -> None:
    """Release the lock, and write the last status and the last events in the same step.

    Args:
        lock: of an instance whose process is proven gone.
        report: of it.
        context: what all instances share.
        there: whether it has keys; otherwise nothing of it stays.
        stale_placement: see `InstanceLock.release`.

    Raises:
        SwapFailed, EtcdError: see `reassert`.
    """
    writer, instance = context.status_writer, InstanceId(report.status.id)
    if there and writer.publishes(instance):
        last, seen = replace(report.status, pid=None, incarnation=None), lock.view
        events = await writer.events_of(instance)
        if not lock.view.says_the_same_as(seen):
            # What was decided on is not what would be released now: another host may have it.
            raise SwapFailed("the lock changed meanwhile")
        revision = await lock.release(last, stale_placement=stale_placement, events=events)
        writer.wrote(instance, last.to_json(), revision, events)
    else:
        await lock.release(None, stale_placement=stale_placement)
        writer.forget(instance)


async def _ended_as_shut_out(machine: Machine, report: Report, context: InstanceContext, why: str) -> bool:
    """Kill a QEMU that was shut out: it never writes again. A Ceph that does not answer keeps no lock from its QEMU."""
    record = machine.record
    assert record is not None
    try:
        gone = await context.fencing.shut_out(record.clients)
    except NotFenced as error:
        report.tell_trouble(f"Ceph does not say whether this QEMU was shut out: {error}")
        return False
    if gone:
        await machine.kill(f"{why}, and {', '.join(gone)} was shut out: another host has had it meanwhile")
    return bool(gone)
