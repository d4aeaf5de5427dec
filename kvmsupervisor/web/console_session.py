"""One console: the supervisor is asked for it, and what it gives is bridged to the browser's WebSocket."""

from __future__ import annotations

import contextlib
from pathlib import Path

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.web.websocket import NORMAL, Closed, WebSocket
from kvmsupervisor.domain.consoles import ConsoleKind, ConsoleRequest
from kvmsupervisor.web.console_door import Door, NoConsole
from kvmsupervisor.web.display_bridge import bridge
from kvmsupervisor.web.serial_bridge import SerialBridge

REFUSED = 4000
"""Status code of a WebSocket that is ended because there is no console (RFC 6455, 7.4.2: from 4000 on: ours)."""


class Session:
    """One of them.

    Args:
        run_dir: of the supervisor.
        request: for the console.
        clock: the machine's.
    """

    def __init__(self, run_dir: Path, request: ConsoleRequest, *, clock: Clock) -> None:
        self._door = Door(run_dir)
        self._request = request
        self._clock = clock

    async def run(self, browser: WebSocket) -> str:
        """Until one side ends; return why, for people; nothing where the browser has left, or was made to."""
        try:
            if self._request.kind is ConsoleKind.DISPLAY:
                with contextlib.closing(await self._door.display(self._request)) as qemu:
                    why = await bridge(browser, qemu)
            else:
                why = await SerialBridge(browser, self._door, self._request, self._clock).run()
        except NoConsole as no:
            browser.close(REFUSED, str(no))
            return str(no)
        except Closed:
            return ""
        browser.close(NORMAL, why)
        return why
