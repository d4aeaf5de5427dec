"""Reads what an earlier supervisor left of one instance, and says what of it cannot be read.

A record that cannot be read is left alone, and so is its QEMU; no second QEMU is started. The instance stays listed,
with a reason that names the file, and the process where one is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.process import Hidden
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState, Unreadable
from kvmsupervisor.domain.view import LeftAlone
from kvmsupervisor.machine import identity as process_identity
from kvmsupervisor.machine.system import Processes

LOOK_AGAIN_S = 10.0
"""How often to read an unreadable record again. Arbitrary; an operator who has repaired the file should not wait long,
and each attempt may read all of /proc (20 ms with a thousand processes)."""


class Inheritance:
    """What an earlier supervisor left of one instance.

    Args:
        processes: of this host.
        directory: its folder.
        boot_id: of this boot.
        clock: the machine's.
        objection: returns why this supervisor must not touch the QEMU of a record; None when it may.

    Attributes:
        alone: the record that cannot be read or must not be touched, and why; None when everything is adopted.
        news: that reason, when the last `take` changed it; None otherwise.
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

    def take(self, adopt: Callable[[Incarnation], None], record: Incarnation | None = None) -> InstanceState:
        """Read the folder and adopt its process; return the saved state, a new one when the old one cannot be read.

        Args:
            adopt: called with the record of a QEMU that may have ended; may raise `Hidden`.
            record: the record, where it was read already; None to read it.
        """
        saved, alone = self._read(adopt, record)
        before = None if self.alone is None else self.alone.reason
        self.news = None if alone is None or alone.reason == before else alone.reason
        self.alone = None if alone is None else replace(alone, look_at=self._clock.now() + LOOK_AGAIN_S)
        return saved

    def _read(
        self, adopt: Callable[[Incarnation], None], record: Incarnation | None
    ) -> tuple[InstanceState, LeftAlone | None]:
        directory, saved = self._directory, InstanceState(boot_id=self._boot_id)
        try:
            record = record or directory.read_incarnation()
            saved = directory.read_state(self._boot_id)
        except Unreadable as error:
            return saved, _unreadable(self._processes, directory, error)
        if record is None:
            return saved, None
        why = self._objection(record)
        try:
            if why is None:
                adopt(record)
        except Hidden as error:
            why = str(error)
        return saved, None if why is None else LeftAlone(reason=why, pid=record.pid, starttime=record.starttime)


def _unreadable(processes: Processes, directory: InstanceDir, error: Unreadable) -> LeftAlone:
    """Describe a record that this release cannot read, and the QEMU that probably belongs to it."""
    found = process_identity.seek(processes, directory.path)
    if found is None:
        reason = f"{error}; no QEMU is found for it. Start the release that wrote the file, or delete the file"
        return LeftAlone(reason=f"what was kept of it cannot be read: {reason}")
    pid, starttime = found
    reason = f"{error}; QEMU {pid} runs on. Start the release that wrote the file, or end that QEMU and delete the file"
    return LeftAlone(reason=f"what was kept of it cannot be read: {reason}", pid=pid, starttime=starttime)
