"""What an earlier supervisor left of one instance: read, as far as it can be, and told where it cannot.

What cannot be read is left alone, with the QEMU that it tells of, and nothing is started beside it. But it does not
vanish: the instance is listed, with a reason that names the file, and the process where it is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.process import Hidden
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.incarnation import Incarnation, Memory, Unreadable
from kvmsupervisor.domain.view import LeftAlone
from kvmsupervisor.machine import identity as marks
from kvmsupervisor.machine.system import Processes

LOOK_AGAIN_S = 10.0
"""How often a record that could not be read is looked at again. Arbitrary: a person who has mended it waits for that,
and a look may read all of /proc, 20 ms with a thousand processes."""


class Inheritance:
    """What an earlier supervisor left of one instance.

    Args:
        processes: of this host.
        directory: its folder.
        boot_id: of this boot.
        clock: the machine's.
        objection: says why a QEMU on record is not this supervisor's to touch; None when it is.

    Attributes:
        alone: what cannot be read of it, or must not be touched; None when all is taken over.
        news: why, when that was not so, or for another reason, before it was read last; None otherwise.
    """

    def __init__(
        self,
        processes: Processes,
        directory: InstanceDir,
        *,
        boot_id: str,
        clock: Clock,
        objection: Callable[[Incarnation], str | None],
    ) -> None:
        self.alone: LeftAlone | None = None
        self.news: str | None = None
        self._processes = processes
        self._directory = directory
        self._boot_id = boot_id
        self._clock = clock
        self._objection = objection

    def take(self, adopt: Callable[[Incarnation], None]) -> Memory:
        """Read what is there, adopt its process; return what outlives one, a fresh memory where that is unreadable.

        Args:
            adopt: called with the record of a QEMU, which may have ended; may raise `Hidden`.
        """
        memory, alone = self._read(adopt)
        before = None if self.alone is None else self.alone.reason
        self.news = None if alone is None or alone.reason == before else alone.reason
        self.alone = None if alone is None else replace(alone, look_at=self._clock.now() + LOOK_AGAIN_S)
        return memory

    def _read(self, adopt: Callable[[Incarnation], None]) -> tuple[Memory, LeftAlone | None]:
        directory, memory = self._directory, Memory(boot_id=self._boot_id)
        try:
            record = directory.read_incarnation()
            memory = directory.read_memory(self._boot_id)
        except Unreadable as error:
            return memory, _unreadable(self._processes, directory, error)
        if record is None:
            return memory, None
        why = self._objection(record)
        try:
            if why is None:
                adopt(record)
        except Hidden as error:
            why = str(error)
        return memory, None if why is None else LeftAlone(reason=why, pid=record.pid, starttime=record.starttime)


def _unreadable(processes: Processes, directory: InstanceDir, error: Unreadable) -> LeftAlone:
    """A record that this release cannot read, and the QEMU that it is probably about."""
    found = marks.seek(processes, directory.path)
    if found is None:
        reason = f"{error}; no QEMU of it is found. Start the release that wrote it, or delete that file"
        return LeftAlone(reason=f"what was kept of it cannot be read: {reason}")
    pid, starttime = found
    reason = f"{error}; QEMU {pid} runs on. Start the release that wrote it, or end that QEMU and delete that file"
    return LeftAlone(reason=f"what was kept of it cannot be read: {reason}", pid=pid, starttime=starttime)
