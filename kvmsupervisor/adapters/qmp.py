"""One QMP connection to one QEMU. Wraps `qemu.qmp`, whose errors and states stay in here.

Source: QEMU Machine Protocol specification (qemu.org, docs/interop/qmp-spec): a server serves one client per socket,
greets at once, and may answer the first command long after, or never, when the devices fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.error import ProtocolError

# It logs as errors what is raised here as well, and told by whoever knows what it means.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)

CLOSE_S = 2.0
"""How long a disconnect may take. A frozen QEMU reads nothing; the socket is dropped all the same."""


ENDS = (QMPError, OSError, EOFError, ValueError, TypeError, RecursionError)
"""What a connection ends with: that of the socket, or what reading nonsense (no UTF-8, too long, too deep) raised."""

Command = Callable[[str, Mapping[str, object] | None], Awaitable[Any]]
"""Runs a QMP command; None when it was not done."""


class MonitorError(Exception):
    """A command was not done. The subclasses say what to do next."""


class MonitorLost(MonitorError):
    """There is no connection (any more): connect again, or look whether the process lives."""


class MonitorSilent(MonitorError):
    """QEMU did not answer in time: it is frozen or very busy. Report it, ask again later."""


class MonitorRefused(MonitorError):
    """QEMU understood and refuses; the message holds its words. Do not repeat it unchanged."""


class _Sink(EventListener):
    """Hands each event on at once, in order, before the end of the connection is told."""

    def __init__(self, on_event: Callable[[str, Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._on_event = on_event

    async def put(self, event: Message) -> None:
        data = event.get("data")
        self._on_event(str(event["event"]), data if isinstance(data, dict) else {})


class _Client(QMPClient):
    """Without the debugging log, for which each message would be written out once more, whether it is kept or not."""

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class Monitor:
    """An established connection; made by `connect`.

    Events go to `on_event(name, data)`; when the connection ends, for whatever cause, `on_lost()` is called once, after
    the last event. Both run in the event loop and must not block.
    """

    def __init__(self, client: QMPClient, on_lost: Callable[[], None]) -> None:
        self._client = client
        self._on_lost = on_lost
        self._ended = asyncio.Event()
        self._keeper = asyncio.create_task(self._keep())

    @classmethod
    async def connect(
        cls,
        path: str,
        *,
        on_event: Callable[[str, Mapping[str, Any]], None],
        on_lost: Callable[[], None],
        timeout_s: float,
    ) -> Monitor:
        """Connect to the socket at `path`, read the greeting, negotiate.

        Raises:
            MonitorLost: nobody listens, or the connection ended at once.
            MonitorSilent: somebody listens and says nothing for `timeout_s` seconds.
        """
        client = _Client()
        client.register_listener(_Sink(on_event))
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(path)
        except TimeoutError as error:
            raise MonitorSilent(f"QEMU did not greet on {path} within {timeout_s:g} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise MonitorLost(f"cannot connect to QMP at {path}: {error}") from error
        return cls(client, on_lost)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = 5.0
    ) -> Any:
        """Run one command, return its result.

        Raises:
            MonitorRefused: QEMU says no.
            MonitorSilent: no answer within `timeout_s` seconds.
            MonitorLost: the connection ended first.
        """
        if self._client.runstate is not Runstate.RUNNING:
            raise MonitorLost(f"no QMP connection for {command}")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except TimeoutError as error:
            raise MonitorSilent(f"QEMU did not answer {command} within {timeout_s:g} s") from error
        except ExecuteError as error:
            raise MonitorRefused(f"QEMU refuses {command}: {error.error.error.desc}") from error
        except (ExecInterruptedError, QMPError, ProtocolError, OSError, EOFError) as error:
            raise MonitorLost(f"QMP connection ended during {command}: {error}") from error

    async def drained(self, timeout_s: float) -> None:
        """Wait until the connection has ended and its last event was handed on, at most `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()

    async def close(self) -> None:
        """End the connection; `on_lost` is not called. QEMU goes on and takes the next client."""
        self._on_lost = lambda: None
        self._keeper.cancel()
        # Not awaited itself: its cancellation is not ours.
        await asyncio.wait([self._keeper])
        await self._disconnect()

    async def _keep(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        await self._disconnect()
        self._ended.set()
        self._on_lost()

    async def _disconnect(self) -> None:
        if self._client.runstate is Runstate.IDLE:
            return
        # How it ended does not matter here: the caller learns what matters from the process.
        with contextlib.suppress(*ENDS):
            async with asyncio.timeout(CLOSE_S):
                await self._client.disconnect()
