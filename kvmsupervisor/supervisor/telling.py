"""Has the session say what is so on this host, whenever that changes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import EtcdError
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.timing import RETRY_CAP_S
from kvmsupervisor.machine.etcd_wall import EtcdWall
from kvmsupervisor.supervisor.drain import DrainMark

log = structlog.get_logger(__name__)


class Telling:
    """Keeps the session's value in step with the host.

    Args:
        session: of this host.
        clock: the machine's.
        drain: whether all guests are being stopped: nobody moves one here meanwhile.
        etcd_wall: see `EtcdWall`.
        gaps: other walls between guests that cannot be had, and why.
    """

    def __init__(
        self, session: Session, clock: Clock, drain: DrainMark, etcd_wall: EtcdWall, gaps: tuple[str, ...]
    ) -> None:
        self._session, self._clock = session, clock
        self._drain, self._etcd_wall, self._gaps = drain, etcd_wall, gaps
        self._changed = asyncio.Event()

    def said(self, value: HostSession) -> HostSession:
        """That value, with what is so now."""
        gap = self._etcd_wall.gap
        gaps = self._gaps if gap is None else (*self._gaps, f"etcd: {gap}")
        return replace(value, draining=self._drain.on, gaps=gaps)

    async def run(self) -> None:
        """Write each change, for ever."""
        forget = [source.listen(self._changed.set) for source in (self._drain, self._etcd_wall)]
        if self.said(self._session.value) != self._session.value:
            self._changed.set()
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                try:
                    await self._session.restate(self.said(self._session.value))
                except EtcdError as error:
                    log.warning("session.untold", key=self._session.key, reason=str(error))
                    await self._clock.sleep(RETRY_CAP_S)
                    self._changed.set()
        finally:
            for one in forget:
                one()
