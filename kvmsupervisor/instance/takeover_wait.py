"""How long the lock of a host without a session is left alone, because its disks are in use (law 4)."""

from __future__ import annotations

from dataclasses import replace

from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.domain.storage import images_of
from kvmsupervisor.domain.view import Deferral
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.status import Report

ASK_WATCHERS_EVERY_S = 2.0
"""How often to ask Ceph for watchers of the disks of an orphaned instance. Each question runs one short program."""


class TakeoverWait:
    """The wait of one instance, by the incarnation whose lock it is."""

    def __init__(self, *, context: InstanceContext, report: Report) -> None:
        self._context = context
        self._report = report
        self._known: tuple[str, Deferral] | None = None

    def so_far(self, lock: Lock | None, *, holder_has_session: bool | None) -> Deferral | None:
        """How long the takeover of `lock` has waited. Forgotten when another has it, or its holder is back."""
        if self._known is not None and (
            lock is None or lock.incarnation != self._known[0] or holder_has_session is True
        ):
            self._known = None
        return None if self._known is None else self._known[1]

    async def ask_watchers(self, lock: Lock, spec: Spec) -> None:
        """Ask who has its disks open, while the host that holds its lock has no session.

        Raises:
            NotFenced: that is not known.
        """
        context = self._context
        now, wait_s = context.clock.now(), context.takeover_wait_s
        ask_at = now + ASK_WATCHERS_EVERY_S
        known = self.so_far(lock, holder_has_session=None)
        if known is None:
            known = Deferral(until=now + wait_s, told=context.clock.wall_after(wait_s), ask_at=ask_at)
            self._report.tell("lock.orphaned", holder=lock.host, epoch=lock.epoch, wait_s=wait_s)
        # Noted before the question: a storage that does not answer does not make the wait longer.
        known = replace(known, ask_at=ask_at)
        self._known = (lock.incarnation, known)
        watchers = await context.fencing.watchers(images_of(spec))
        self._known = (lock.incarnation, replace(known, watchers=watchers))
