"""How long the lock of a host without a session is left alone, because its disks are in use (law 4)."""

from __future__ import annotations

from dataclasses import replace

from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.domain.storage import images_of
from kvmsupervisor.domain.view import Deferral
from kvmsupervisor.failpoints import point
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.status import Report

ASK_WATCHERS_EVERY_S = 2.0
"""How often to ask Ceph for watchers of the disks of an orphaned instance. Each question runs one short program."""

ASK_SELDOM_S = 15.0
"""The same once the wait is over and storage alone decides (law 11), which may take days."""


class TakeoverWait:
    """The wait of one instance, by the incarnation whose lock it is.

    Attributes:
        seen: the storage clients that had its disks open meanwhile.
    """

    def __init__(self, *, context: InstanceContext, report: Report) -> None:
        self._context = context
        self._report = report
        # Whom storage has named as users of its disks while this one waited.
        self.seen: frozenset[str] = frozenset()
        # By incarnation, history and this host's own session; the incarnation of an absent lock is empty.
        self._known: tuple[tuple[str, int, int], Deferral] | None = None

    def so_far(self, lock: Lock | None, *, holder_has_session: bool | None) -> Deferral | None:
        """How long the takeover of `lock` has waited. Forgotten when another has it, or its holder is back.

        Also when this host has lost its own session: while it heard nothing, the holder may have been back.
        """
        if self._known is not None and (
            self._known[0] != self._key(lock) or self._was_back(lock, self._known[1], holder_has_session)
        ):
            self._known = None
        return None if self._known is None else self._known[1]

    def _was_back(self, lock: Lock | None, known: Deferral, holder_has_session: bool | None) -> bool:
        """Whether its holder has a session, or had one since the wait began and has lost it again."""
        if lock is None or lock.host == self._context.me:
            return False
        began = known.until - self._context.takeover_wait_s
        return holder_has_session is True or self._context.host_gone_since(lock.host) > began

    def _key(self, lock: Lock | None) -> tuple[str, int, int]:
        return "" if lock is None else lock.incarnation, self._context.era().count, self._context.session.lease

    async def ask_watchers(self, lock: Lock | None, spec: Spec) -> None:
        """Ask who has its disks open: the host that holds its lock has no session, or has not spoken (law 11).

        Raises:
            NotFenced: that is not known.
        """
        context = self._context
        now, wait_s = context.clock.now(), context.takeover_wait_s
        ask_at = now + ASK_WATCHERS_EVERY_S
        known = self.so_far(lock, holder_has_session=None)
        if known is None:
            known = Deferral(until=now + wait_s, told=context.clock.wall_after(wait_s), ask_at=ask_at)
            if lock is not None and lock.host != context.me:
                self._report.tell("lock.orphaned", holder=lock.host, epoch=lock.epoch, wait_s=wait_s)
        # Noted before the question: a storage that does not answer does not make the wait longer.
        known = replace(known, ask_at=ask_at)
        key = self._key(lock)
        self._known = (key, known)
        watchers = await context.fencing.watchers(images_of(spec), lock)
        self.seen |= frozenset(watchers)
        await point("watchers known")
        now = context.clock.now()
        every_s = ASK_SELDOM_S if watchers and now >= known.until else ASK_WATCHERS_EVERY_S
        # Counted from the answer, by which a takeover may go on.
        self._known = (key, replace(known, ask_at=now + every_s, watchers=watchers))
