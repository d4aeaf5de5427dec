"""A serial console in a browser: the log first, then what is new; and what a person types who has the keyboard.

`supervisor/serial.py` says what the supervisor tells. Output comes from the log alone, at the pace of the browser: a
browser that stalls reads on later, from the same file, and no guest waits for it. What QEMU sends on the keyboard's
connection is read at once and dropped, as the log has it.

A supervisor may come and go: the log stays open, and the next one is asked again.

The browser gets output as bytes, and as text what the supervisor tells, and `{"is": "supervisor", "lost": true}`. It
sends bytes to type, and as text `{"take": true}`, `{"release": true}`, or `{"shown": 4096}`: how many bytes of output
its terminal has shown. Who says that once gets no more than `WINDOW_BYTES` beyond it: a hidden tab shows little, and
keeps in memory, or loses, what comes all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from typing import Never

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.descriptors import Carrier, Lost
from kvmsupervisor.adapters.web.websocket import WebSocket
from kvmsupervisor.aio import ended, until_one_ends
from kvmsupervisor.domain.consoles import ConsoleRequest
from kvmsupervisor.domain.control_sequences import printed
from kvmsupervisor.web.console_door import Door, NoConsole

PIECE = 1 << 15
"""Bytes of output that are sent at once. Arbitrary."""

BACKLOG_BYTES = 1 << 18
"""How much of the log is shown at first. Arbitrary: some 4,000 lines, of which a browser keeps as many."""

BUSY_S, REST_S = 0.02, 0.1
"""How often to look at the log: shortly after output, and otherwise; as the command `console` does."""

BUSY_LOOKS = 100
"""How many looks after the last output are frequent."""

WAITING_BYTES = 1 << 16
"""How much may wait for a guest that does not read its console."""

AGAIN_S, AWAY_S = 1.0, 60.0
"""How often a supervisor that left is asked for again, and for how long. Arbitrary: an upgrade takes a few seconds."""

WINDOW_BYTES = 1 << 20
"""How much output may be on its way to a terminal. Arbitrary: xterm.js throws away what is beyond 50 MB."""

SEND_S = 5.0
"""How long the supervisor may take to hear. Arbitrary."""


class SerialBridge:
    """One of them.

    Args:
        browser: of the person.
        door: where the supervisor is asked.
        request: for the console.
        clock: the machine's.
    """

    def __init__(self, browser: WebSocket, door: Door, request: ConsoleRequest, clock: Clock) -> None:
        self._browser = browser
        self._door = door
        self._request = request
        self._clock = clock
        self._supervisor: Carrier | None = None
        # The log that is read, and those that follow it. Invariant: each is open.
        self._logs: deque[int] = deque()
        self._older: int | None = None
        self._at: int | None = None
        self._news = asyncio.Event()
        self._line: socket.socket | None = None
        self._drain: asyncio.Task[None] | None = None
        self._waiting = bytearray()
        self._to_type = asyncio.Event()
        self._why: str | None = None
        self._sent = 0
        self._seen: int | None = None
        self._has_seen = asyncio.Event()

    async def run(self) -> str:
        """Until one side ends; return why, for people.

        Raises:
            Closed: the browser has left.
            NoConsole: the supervisor refuses, or stays away.
        """
        try:
            await until_one_ends(self._show(), self._keep_asking(), self._hear_person(), self._type())
            return self._why or ""
        finally:
            await self._unplug()
            for fd in (*self._logs, *(() if self._older is None else (self._older,))):
                os.close(fd)

    # --- output -----------------------------------------------------------------------------------------------

    async def _show(self) -> None:
        looks = 0
        while True:
            data = self._next()
            if data:
                looks = BUSY_LOOKS
                await self._browser.send(data)
                self._sent += len(data)
                while self._seen is not None and self._sent - self._seen > WINDOW_BYTES:
                    self._has_seen.clear()
                    await self._has_seen.wait()
                continue
            if self._why is not None:
                return
            self._news.clear()
            looks = max(0, looks - 1)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BUSY_S if looks else REST_S):
                    await self._news.wait()

    def _next(self) -> bytes:
        """More output; empty when there is none yet."""
        while self._logs:
            log = self._logs[0]
            if self._at is None:
                self._at, begun = self._begin(log)
                if begun:
                    return begun
            elif os.fstat(log).st_size < self._at:
                self._at = 0  # copied and truncated, as an earlier release's QEMU needs it
            if data := os.pread(log, PIECE, self._at):
                self._at += len(data)
                return data
            if len(self._logs) == 1:
                break
            # It is complete, and there is a next one.
            os.close(self._logs.popleft())
            self._at = 0
        return b""

    def _begin(self, log: int) -> tuple[int, bytes]:
        """Where to go on in the log, and the end of what came before that."""
        end = os.fstat(log).st_size
        begun = _tail(log, end, BACKLOG_BYTES)
        if self._older is not None:
            size = os.fstat(self._older).st_size
            begun = _tail(self._older, size, BACKLOG_BYTES - len(begun)) + begun
            os.close(self._older)
            self._older = None
        return end, printed(begun)

    # --- the supervisor ---------------------------------------------------------------------------------------

    async def _keep_asking(self) -> None:
        until, asks = self._clock.now() + AWAY_S, False
        while True:
            try:
                supervisor = self._supervisor = await self._door.ask(self._request)
            except NoConsole:
                if not asks or self._clock.now() >= until:
                    raise
            else:
                with contextlib.closing(supervisor), contextlib.suppress(Lost):
                    await self._hear(supervisor)
                self._supervisor, asks, until = None, True, self._clock.now() + AWAY_S
                await self._unplug()
                if self._why is not None:
                    self._news.set()
                    await asyncio.get_running_loop().create_future()
                await self._browser.send('{"is": "supervisor", "lost": true}')
            await self._clock.sleep(AGAIN_S)

    async def _hear(self, supervisor: Carrier) -> None:
        """Follow what it tells, until it leaves, or says its last word.

        Raises:
            Lost: it has left.
            NoConsole: it refuses.
        """
        while self._why is None:
            data, fd = await supervisor.receive(takes_fd=True)
            told = json.loads(data)
            if fd is not None and not await self._take(told, fd):
                os.close(fd)
            match told:
                case {"refused": why}:
                    raise NoConsole(str(why))
                case {"is": "log" | "older"}:
                    continue
                case {"is": "keyboard"} if told.get("yours") is not True:
                    await self._unplug()
                case {"is": "gone"}:
                    self._why = f"{self._request.instance} is not on this host any more"
            await self._browser.send(data.decode(errors="replace"))

    async def _take(self, told: dict[str, object], fd: int) -> bool:
        """Keep a descriptor; return whether it was kept."""
        match told:
            case {"is": "log"} if not self._logs or not _is_same(fd, self._logs[-1]):
                self._logs.append(fd)
                self._news.set()
            case {"is": "older"} if self._at is None and self._older is None:
                self._older = fd
            case {"is": "keyboard", "yours": True}:
                await self._unplug()
                self._line = socket.socket(fileno=fd)
                self._line.setblocking(False)
                self._drain = asyncio.get_running_loop().create_task(self._drop(self._line))
            case _:
                return False
        return True

    async def _drop(self, line: socket.socket) -> None:
        """Read what QEMU sends, so that it never waits; that it does says that there is output."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while await loop.sock_recv(line, 1 << 16):
                self._news.set()

    # --- the person -------------------------------------------------------------------------------------------

    async def _hear_person(self) -> Never:
        while True:
            piece = await self._browser.receive()
            if isinstance(piece, bytes):
                self._keep(piece)
                continue
            if (seen := _shown(piece)) is not None:
                self._seen = seen
                self._has_seen.set()
                continue
            wish = _wish(piece)
            if wish is not None and self._supervisor is not None:
                with contextlib.suppress(Lost):
                    await self._supervisor.send(wish, timeout_s=SEND_S)

    def _keep(self, piece: bytes) -> None:
        """Keep it for the guest. Without the keyboard, and when too much waits already, it is dropped."""
        if self._line is not None and len(self._waiting) + len(piece) <= WAITING_BYTES:
            self._waiting += piece
            self._to_type.set()

    async def _type(self) -> Never:
        loop = asyncio.get_running_loop()
        while True:
            await self._to_type.wait()
            self._to_type.clear()
            line, piece = self._line, bytes(self._waiting)
            self._waiting.clear()
            if line is not None and piece:
                with contextlib.suppress(OSError):
                    await loop.sock_sendall(line, piece)

    async def _unplug(self) -> None:
        line, drain = self._line, self._drain
        self._line = self._drain = None
        self._waiting.clear()
        if line is not None:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        if drain is not None:
            await ended(drain)
        if line is not None:
            line.close()


def _tail(log: int, end: int, most: int) -> bytes:
    begin = max(0, end - max(0, most))
    data = os.pread(log, end - begin, begin)
    # From a line's beginning, unless it is the log's.
    return data if begin == 0 else data.partition(b"\n")[2]


def _is_same(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def _shown(text: str) -> int | None:
    """How much a terminal says that it has shown; None for another text."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(text):
            case {"shown": int(number)} if number >= 0:
                return number
    return None


def _wish(text: str) -> bytes | None:
    """What a person wants of the keyboard, as the supervisor is told; None for what is no such wish."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(text):
            case {"take": True}:
                return b'{"take": true}'
            case {"release": True}:
                return b'{"release": true}'
    return None
