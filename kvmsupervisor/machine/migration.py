"""The migration of one QEMU's guest, at either side, over QMP: begun, watched, cancelled, finished.

Decides nothing. Sources: qapi/migration.json; docs/devel/migration of QEMU. What of it works under every sandbox, and
what QEMU does by itself in which phase, was measured (docs/moving.md).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.qmp import MonitorRefused
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.run_state import POSTMIGRATE
from kvmsupervisor.domain.transfer import Stage
from kvmsupervisor.machine.monitor import Conversation

NAME = "move"
"""Of the descriptor, in QEMU's list of them."""

CAPABILITIES = ("events", "return-path", "pause-before-switchover", "auto-converge")
"""With `return-path` a source that says `completed` has heard that the target has all of it (law 13)."""

FIGURES_S = 0.2
"""How long QEMU may take to say how long its guest was stopped, which is still so; it takes a millisecond."""

FIGURES_EVERY_S = 2.0
"""How often to ask how much was sent. Each answer is a write of the status key. Arbitrary: a person watches it."""

CANCEL_S, CANCEL_POLL_S = 3.0, 0.02
"""How long a cancelled transfer may take to end, and how often that is looked for. It takes milliseconds."""


class MoveRefused(Exception):
    """QEMU does not do it. The message holds its words."""


@frozen(kw_only=True)
class Figures:
    """How far a transfer has come. Sizes are bytes, times seconds."""

    sent: int = 0
    left: int = 0
    total: int = 0
    rate: float = 0.0
    downtime_s: float | None = None


class Migration:
    """Of one QEMU."""

    def __init__(self, clock: Clock, talk: Conversation) -> None:
        self._clock, self._talk = clock, talk
        self.figures = Figures()
        self._following: asyncio.Task[None] | None = None

    async def send(self, fd: int, *, bandwidth: int, downtime_ms: int, told: Callable[[], None]) -> None:
        """Begin to send the guest over that descriptor, of which QEMU gets a copy.

        Args:
            fd: a connected socket.
            bandwidth: bytes in a second; 0 for no limit.
            downtime_ms: for how long the guest may be stopped.
            told: called whenever there are new figures.

        Raises:
            MoveRefused: QEMU does not.
        """
        self.figures = Figures()
        await self._set(CAPABILITIES)
        await self._ask("migrate-set-parameters", {"max-bandwidth": bandwidth, "downtime-limit": downtime_ms})
        await self._ask("getfd", {"fdname": NAME}, fd=fd)
        await self._ask("migrate", {"uri": f"fd:{NAME}"})
        # One whose guest has come and was paused is a source from now on.
        self._talk.stage, self._talk.receives = Stage.ACTIVE, False
        self.close()
        self._following = asyncio.create_task(self._follow(told))

    async def _follow(self, told: Callable[[], None]) -> None:
        """Ask for figures now and then, while memory is sent and the guest runs."""
        while True:
            await self._clock.sleep(FIGURES_EVERY_S)
            if self._talk.stage is not Stage.ACTIVE:
                return
            await self.look()
            told()

    def close(self) -> None:
        """Ask no more by itself."""
        if self._following is not None:
            self._following.cancel()
            self._following = None

    async def receive(self, fd: int) -> None:
        """Have a QEMU that waits take its guest from that descriptor; see `send`."""
        await self._set(("events", "return-path"))
        await self._ask("getfd", {"fdname": NAME}, fd=fd)
        await self._ask("migrate-incoming", {"uri": f"fd:{NAME}"})

    async def switch(self) -> None:
        """Send the rest. From here on the guest runs again by itself when it fails.

        Raises:
            MoveRefused: QEMU does not.
        """
        await self._ask("migrate-continue", {"state": "pre-switchover"})
        if self._talk.stage is Stage.SWITCHOVER:
            self._talk.stage = Stage.DEVICE

    async def cancel(self) -> None:
        """Cancel, and wait until the guest runs again; it may not have come to that."""
        await self._talk.command("migrate_cancel")
        deadline = self._clock.now() + CANCEL_S
        while self._talk.stage in {Stage.ACTIVE, Stage.SWITCHOVER} and self._clock.now() < deadline:
            await self._clock.sleep(CANCEL_POLL_S)
            await self.look()
        self._talk.probe_at = 0.0

    async def go_on(self) -> bool:
        """Let the guest go on, at whichever side; whether QEMU has confirmed it.

        Raises:
            MoveRefused: QEMU does not.
        """
        if await self._ask("cont") is None:
            self._talk.probe_at = 0.0
            return False
        self._talk.runs()
        self._talk.stage = Stage.IDLE
        return True

    async def look(self) -> None:
        """Ask how far it has come."""
        told = await self._talk.command("query-migrate")
        if told is None:
            return
        status = str(told.get("status", "none"))
        self._talk.note_migration(status)
        ram = told.get("ram") or {}
        downtime = told.get("downtime")
        self.figures = Figures(
            sent=int(ram.get("transferred", 0)),
            left=int(ram.get("remaining", 0)),
            total=int(ram.get("total", 0)),
            rate=float(ram.get("mbps", 0.0)) * 125_000,
            downtime_s=None if downtime is None else downtime / 1000,
        )
        if self._talk.stage is Stage.DONE and not self._talk.receives:
            self._talk.run_state = POSTMIGRATE

    async def stopped_ms(self) -> int | None:
        """How long the guest has been stopped for it; None where QEMU does not say so at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIGURES_S):
                await self.look()
        stopped_s = self.figures.downtime_s
        return None if stopped_s is None else round(stopped_s * 1000)

    async def _set(self, names: tuple[str, ...]) -> None:
        wanted = [{"capability": name, "state": True} for name in names]
        await self._ask("migrate-set-capabilities", {"capabilities": wanted})

    async def _ask(self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None) -> Any:
        try:
            answer = await self._talk.ask(command, arguments, fd=fd)
        except MonitorRefused as error:
            raise MoveRefused(str(error)) from error
        if answer is None and command != "cont":
            raise MoveRefused(f"QEMU does not answer {command}")
        return answer
