"""One instant of a guest that runs: its file systems frozen by its agent, its processors paused; and its way on.

A guest that stands still must go on whatever becomes of its supervisor. So a keeper (`guard/keeper.py`) is there before
anything is asked of the guest, and the record of the QEMU says meanwhile that it stands: what a supervisor and its
keeper did not come to, because their container was killed, the next supervisor does. Decides nothing.

This is the third place where a guest is let go on, besides a start and a live move. It says `cont` to a guest that this
supervisor, or one before it by the record, has paused, and no other (law 13).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import structlog

from kvmsupervisor.adapters.agent import AgentSilent
from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.qmp import Command, MonitorRefused
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.run_state import PAUSED, RUNNING
from kvmsupervisor.domain.snapshots import How
from kvmsupervisor.failpoints import point
from kvmsupervisor.guard import keeper_client
from kvmsupervisor.guard.keeper_client import KeeperTrouble
from kvmsupervisor.machine.agent_watch import AgentWatch
from kvmsupervisor.machine.images import DiskTrouble
from kvmsupervisor.machine.monitor import Conversation
from kvmsupervisor.machine.system import System

log = structlog.get_logger(__name__)

FREEZE_S = 10.0
"""How long the agent may take to freeze: a guest writes down what it has not written yet. Windows ends a freeze of its
own after ten seconds; a Linux guest that cannot freeze (a loop device on a file system of its own) never does."""

HOLD_S = 10.0
"""How long what is done meanwhile may take. One snapshot takes 50 ms; Ceph that is full, or away, takes for ever."""

THAW_S = 5.0
"""How long one attempt to thaw may take."""

SPARE_S = 5.0
"""How much longer a keeper waits for its supervisor than that has to take."""


class NotHeld(DiskTrouble):
    """The guest did not stand still for all of it: what was taken meanwhile is of no one instant."""


@frozen(kw_only=True)
class Instant:
    """How the guest stands still.

    Attributes:
        how: as its snapshot says.
        why: why its file systems are not frozen; None where they are, or nothing runs.
        check: raises NotHeld where it does not stand any more.
    """

    how: How
    why: str | None
    check: Callable[[], Any]


class Standstill:
    """Instants of one QEMU's guest after the other.

    Args:
        system: what asks its agent, and keeps it.
        talk: with QEMU.
        agent: of the guest.
        directory: of the instance, with their sockets.
        clock: the machine's.
        note: adds to the record.

    Attributes:
        ask: runs a QMP command.
        lasted_s: how long the last one lasted; 0 before the first, and where the guest did not stand still.
    """

    def __init__(
        self,
        system: System,
        talk: Conversation,
        agent: AgentWatch,
        directory: InstanceDir,
        *,
        clock: Clock,
        note: Callable[..., None],
    ) -> None:
        self.ask: Command = talk.ask
        self.lasted_s = 0.0
        self._system = system
        self._talk = talk
        self._agent = agent
        self._agent_socket = directory.agent_socket
        # The spare one first: a supervisor that hangs keeps the other.
        self._monitors = (directory.spare_socket, directory.qmp_socket)
        self._clock = clock
        self._note = note

    @contextlib.asynccontextmanager
    async def instant(self, pause: bool) -> AsyncIterator[Instant]:
        """Have the guest stand still; at the end it goes on, whatever happened.

        Args:
            pause: whether its processors are stopped, as one operation does not take all of its disks.

        Raises:
            DiskTrouble: it cannot be brought to a standstill; nothing is frozen or paused then.
        """
        self.lasted_s = 0.0
        if self._talk.run_state != RUNNING:
            # A person has paused it. Its agent cannot answer, and it is not ours to let go on.
            yield Instant(how=How.PAUSED, why="its guest was paused", check=lambda: None)
            return
        if not pause and not self._agent.open:
            yield Instant(how=How.AT_ONCE, why="no agent of its guest answers", check=lambda: None)
            return
        limit_s = FREEZE_S + HOLD_S + SPARE_S
        try:
            keeper = await self._system.keep(monitors=self._monitors, agent=self._agent_socket, limit_s=limit_s)
        except KeeperTrouble as error:
            raise DiskTrouble(f"its guest is not brought to a standstill, which nothing might end: {error}") from error
        begun = self._clock.now()
        until = begun + limit_s - SPARE_S
        asked = stopped = is_over = False
        try:
            try:
                # On record first.
                self._note(standing=True)
                if self._agent.open:
                    keeper.tell(keeper_client.FROZEN)
                    asked = True
                why = await self._freeze() if asked else "no agent of its guest answers"
                if pause:
                    keeper.tell(keeper_client.PAUSED)
                    stopped = True  # without an answer it may be so later
                    await self._pause()
                await point("standing still")
                how = How.PAUSED if pause else How.AT_ONCE
                yield Instant(
                    how=How.FROZEN if why is None else how, why=why, check=lambda: self._check(until, pause=pause)
                )
            except (KeeperTrouble, OSError) as error:
                raise DiskTrouble(f"its guest is not brought to a standstill: {error}") from error
            finally:
                is_over = await self._go_on(cont=stopped, thaw=asked)
                self.lasted_s = self._clock.now() - begun
        finally:
            keeper.dismiss(done=is_over)
            if is_over:
                with contextlib.suppress(OSError):
                    self._note(standing=False)

    def _check(self, until: float, *, pause: bool) -> None:
        if self._clock.now() >= until or (pause and self._talk.run_state != PAUSED):
            raise NotHeld("it took too long: its guest was let go on meanwhile, so nothing of it counts")

    async def release(self, *, give_up: bool) -> str | None:
        """Let a guest go on that an earlier supervisor has left standing; return what keeps it from that.

        Args:
            give_up: whether it is tried for the last time.
        """
        if not await self._go_on(cont=self._talk.run_state == PAUSED, thaw=self._agent.open) and not give_up:
            return "its guest may still be frozen for a snapshot: its agent does not answer; that is tried again"
        self._note(standing=False)
        return None

    async def _freeze(self) -> str | None:
        """Freeze; return why that came to nothing."""
        # Until it is thawed it answers nothing else.
        self._agent.rests = True
        try:
            count = await self._system.freeze(self._agent_socket, timeout_s=FREEZE_S)
        except AgentSilent as error:
            return str(error)
        return None if count else "its agent has no file system that can be frozen"

    async def _pause(self) -> None:
        try:
            answer = await self._talk.ask("stop")
        except MonitorRefused as error:
            raise DiskTrouble(str(error)) from error
        if answer is None:
            raise DiskTrouble("QEMU does not answer, so its guest cannot be paused")
        self._talk.run_state = PAUSED

    async def _go_on(self, *, cont: bool, thaw: bool) -> bool:
        """Let it go on; False where that is not certain."""
        if cont:
            try:
                if await self._talk.ask("cont") is None:
                    return False
            except MonitorRefused as error:
                log.warning("snapshot.not_continued", error=str(error))
                return False
            self._talk.run_state = RUNNING
        if thaw:
            try:
                await self._system.thaw(self._agent_socket, timeout_s=THAW_S)
            except AgentSilent as error:
                log.warning("snapshot.not_thawed", error=str(error))
                return False
        self._agent.rests = False
        return True
