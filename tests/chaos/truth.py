"""What a chaos run sees beside its disks, held against the same checkers as a history of the simulation.

Which QEMUs supervisors killed, by their logs; whether what lives is on record; whether a status is so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.status import Status
from tests.support.cluster import Qemu
from tests.support.invariants import Fact, Plight, right_to_end, unrecorded, untrue

KILLED = "killed by its supervisor"
"""How the reason of an end begins that a supervisor brought about by force (`machine.Machine.kill`)."""


def killed_for_nothing(
    ends: Iterable[Mapping[str, Any]], *, owners: Collection[str], locks: Sequence[Lock | None], ordered: bool
) -> Iterator[str]:
    """Each QEMU that was killed although nothing gave its supervisor the right to.

    Args:
        ends: lines `instance.ended` of one instance, from the logs of all hosts.
        owners: the incarnations that have written to its disk.
        locks: all values of its lock.
        ordered: somebody wanted it elsewhere in this run.
    """
    known = [lock for lock in locks if lock is not None]
    epoch_of = {lock.incarnation: lock.epoch for lock in known}
    fenced = {address for lock in known for address in lock.fence}
    for end in ends:
        name = str(end.get("incarnation"))
        if not str(end.get("reason", "")).startswith(KILLED):
            continue
        clients = {address for lock in known if lock.incarnation == name for address in lock.clients}
        plight = Plight(
            ran=name in owners,
            lost=any(
                lock.epoch > epoch_of.get(name, 0) or (lock.incarnation == name and lock.state is LockState.BROKEN)
                for lock in known
            ),
            shut_out=bool(clients & fenced),
            ordered=ordered,
        )
        if right_to_end(plight) is None:
            yield f"{name} was killed for nothing: {end['reason']}"


def off_the_record(qemus: Iterable[Qemu], records: Mapping[str, str]) -> list[str]:
    """The incarnations among these that live, and that no record of their host names any more.

    Args:
        qemus: of one host.
        records: the text of each instance's record there.
    """
    living = {qemu.incarnation for qemu in qemus if qemu.alive and qemu.incarnation not in records[qemu.instance]}
    # One that has ended while its record was read is none.
    still = {qemu.incarnation for qemu in qemus if qemu.alive}
    return unrecorded(living & still, ())


def false_status(
    status: Status | None, lock: Lock | None, qemus: Iterable[Qemu], sessions: Collection[str]
) -> str | None:
    """What the status of a machine that runs claims, and what is not so.

    Args:
        status: of the machine.
        lock: its lock, which says that it runs.
        qemus: all of it, on all hosts; each writes.
        sessions: the hosts that have one.
    """
    if status is None:
        return "there is none"
    pids = [qemu.pid for qemu in qemus]
    return untrue(status, Fact(living=pids, running=pids, lock=lock, sessions=sessions))
