"""What happened to one instance, for its file on this host and its key in etcd."""

from __future__ import annotations

from kvmsupervisor.domain.events import FILE_ONLY, changes, made, to_line
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.sparing import Sparing
from kvmsupervisor.domain.status import Status
from kvmsupervisor.instance.context import InstanceContext

CHANGES_A_MINUTE = 60
"""How many changes of an instance's status are kept as events within a minute; the others are counted. Arbitrary: ends,
moves and takeovers are no such changes, and none of them is left out."""


class Chronicle:
    """The events of one instance.

    Args:
        instance: which.
        context: what all instances of the host share.
        at_first: what is said of an instance of which nothing was ever said.
    """

    def __init__(self, instance: InstanceId, *, context: InstanceContext, at_first: Status) -> None:
        self._instance = instance
        self._context = context
        self._sparing = Sparing(CHANGES_A_MINUTE)
        # What was last compared with; None until it is known what an earlier supervisor has said.
        self._seen: Status | None = None
        self._at_first = at_first

    def see(self, now: Status) -> None:
        """Note what is new in a status, compared with the last one; that may be an earlier supervisor's."""
        before = self._seen
        if now is before:
            return
        if before is None:
            if not self._context.status_writer.has_begun:
                return
            written = self._context.status_writer.written(self._instance)
            before = self._at_first if written is None else written[0]
        self._seen = now
        for event, reason in changes(before, now):
            untold = self._sparing.note(self._context.clock.now())
            if untold is not None:
                self.note(event, now, reason=reason, untold=untold)

    def note(
        self,
        event: str,
        status: Status,
        *,
        reason: str | None = None,
        epoch: int | None = None,
        end: str = "",
        times: int = 1,
        untold: int = 0,
    ) -> None:
        """Note an event.

        Args:
            event: its name.
            status: of the instance.
            reason: one sentence; None for what the event's name says.
            epoch: None for that of the status.
            end: the class of an end.
            times: how many it stands for.
            untold: how many before it are left out.
        """
        context = self._context
        at = context.clock.wall()
        found = made(event, status, at=at, reason=reason, epoch=epoch, end=end, times=times, untold=untold)
        context.event_files.append(self._instance, to_line(found, self._instance))
        if event not in FILE_ONLY:
            context.status_writer.note(self._instance, found)
