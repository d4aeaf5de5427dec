"""What outlives a QEMU process of one instance, in memory and in its file."""

from __future__ import annotations

from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.domain.incarnation import InstanceState
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine.machine import Machine


class SavedState:
    """The state of one instance, also for a successor while there is a process to adopt.

    Attributes:
        state: as it is now.
    """

    def __init__(self, state: InstanceState, *, machine: Machine, report: Report) -> None:
        self.state = state
        self._machine = machine
        self._report = report
        self._written = True

    def keep(self, state: InstanceState) -> None:
        """Take what it is now, and write it down where it differs."""
        if state != self.state:
            self.state = state
            self.write()

    def write_again(self) -> None:
        """Write it once more, where that has failed."""
        if not self._written:
            self.write()

    def write(self) -> None:
        """Write it down, where a process is on record. A successor that does not find it is told less, that is all."""
        if self._machine.record is None:
            return
        try:
            self._machine.directory.write_state(self.state)
        except OSError as error:
            if self._written:
                said = explain(error, self._machine.directory.path)
                self._report.tell("instance.memory_unwritten", level="warning", reason=said)
            self._written = False
        else:
            self._written = True
