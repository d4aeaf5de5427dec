"""What is done when a QEMU has ended: it is told, counted and remembered, and its record goes."""

from __future__ import annotations

from kvmsupervisor.domain.exits import ExitClass
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.restart import after
from kvmsupervisor.domain.spec import Wish
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.moves import Moves
from kvmsupervisor.instance.saved_state import SavedState
from kvmsupervisor.instance.start import Start
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine.machine import Machine


class Ending:
    """Records the ends of one instance's QEMUs."""

    def __init__(
        self,
        instance: InstanceId,
        *,
        context: InstanceContext,
        machine: Machine,
        start: Start,
        moves: Moves,
        saved: SavedState,
        report: Report,
    ) -> None:
        self._id = instance
        self._context = context
        self._machine = machine
        self._start = start
        self._moves = moves
        self._saved = saved
        self._report = report

    async def record(self, wish: Wish | None) -> None:
        """Record the end of the QEMU that has ended.

        Args:
            wish: what its keys say now; None when they have not been read.
        """
        context = self._context
        process = self._machine.view()
        assert process is not None
        assert process.exit is not None
        # Remembered before the record goes: cut off between the two, the exit is recorded again.
        self._saved.keep(
            after(
                self._saved.state,
                process.exit,
                wish,
                asked=process.asked or process.incarnation.incoming,
                ran=not process.never_ran,
                spawned_at=process.incarnation.spawned_at,
                now=context.clock.now(),
                jitter=context.jitter(),
            )
        )
        context.metrics.exited(self._id, process.exit.kind)
        self._report.tell(
            "instance.ended",
            level="info" if process.asked and process.exit.kind is not ExitClass.GUARD else "warning",
            reason=process.exit.text,
            end=process.exit.kind.value,
            pause_s=self._saved.state.pause_s,
        )
        if self._machine.wait_status is not None and self._machine.wait_status.code == 0:
            # Its disks were flushed and closed.
            self._start.closed = process.incarnation.incarnation
        if context.guard is not None:
            context.guard.release(process.incarnation.incarnation)
        if not (process.asked and process.never_ran):
            context.life.ended(process.exit, self._machine.wait_status)
        self._moves.ended()
        await self._machine.drop_record()
        self._start.last_ended = process.incarnation.incarnation
        await context.provisioner.left(self._id)
