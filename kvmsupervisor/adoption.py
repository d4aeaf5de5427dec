"""What an earlier supervisor left of one instance: read, as far as it can be, and told where it cannot.

What cannot be read is left alone, with the QEMU that it tells of, and nothing is started beside it. But it does not
vanish: the instance is listed, with a reason that names the file, and the process where it is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvmsupervisor import marks
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.incarnation import Incarnation, Memory, Unreadable
from kvmsupervisor.domain.view import LeftAlone


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What is there.

    Attributes:
        record: of its QEMU; None when there is none, or it must not be touched.
        memory: what outlives a process; a fresh one where it cannot be read.
        alone: why nothing of it is touched; None when all can be read.
    """

    record: Incarnation | None
    memory: Memory
    alone: LeftAlone | None = None


def read(directory: InstanceDir, *, boot_id: str, objection: Callable[[Incarnation], str | None]) -> Left:
    """Read what an earlier supervisor left of an instance.

    Args:
        directory: its folder.
        boot_id: of this boot.
        objection: says why a QEMU on record is not this supervisor's to touch; None when it is.
    """
    record, memory = None, Memory(boot_id=boot_id)
    try:
        record = directory.read_incarnation()
        memory = directory.read_memory(boot_id)
    except Unreadable as error:
        return Left(record=None, memory=memory, alone=_unreadable(directory, error))
    why = None if record is None else objection(record)
    if record is None or why is None:
        return Left(record=record, memory=memory)
    return Left(record=None, memory=memory, alone=LeftAlone(reason=why, pid=record.pid, starttime=record.starttime))


def _unreadable(directory: InstanceDir, error: Unreadable) -> LeftAlone:
    """A record that this release cannot read, and the QEMU that it is probably about."""
    found = marks.seek(directory.path)
    if found is None:
        reason = f"{error}; no QEMU of it is found. Start the release that wrote it, or delete that file"
        return LeftAlone(reason=f"what was kept of it cannot be read: {reason}")
    pid, starttime = found
    reason = f"{error}; QEMU {pid} runs on. Start the release that wrote it, or end that QEMU and delete that file"
    return LeftAlone(reason=f"what was kept of it cannot be read: {reason}", pid=pid, starttime=starttime)
