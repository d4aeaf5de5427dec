"""A QMP client for one connection to one QEMU, with as much of the protocol as a supervisor needs.

Source: QEMU Machine Protocol specification (qemu.org, docs/interop/qmp-spec). A server serves one client per socket and
greets it at once. It may answer the first command much later, or never when its devices fail. Each message ends with
CR LF, and an answer has the id of its command.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
from array import array
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from kvmsupervisor.domain.qmp_answers import shortened

MESSAGE_LIMIT = 1 << 20
"""The most bytes of one message. An answer about a hundred disks has some 100 KB; to parse this much takes 10 ms."""

UNREAD_LIMIT = 4096
"""How many bytes may wait for a QEMU that reads nothing, beyond the kernel's buffer. A command has a hundred bytes."""

TURN_MESSAGES, TURN_S = 64, 0.01
"""How many messages of one QEMU are handled before the event loop turns to other work, and the least pause before the
next ones: 6,400 a second. A guest that resets itself 1,360 times a second costs 12 % of a CPU (docs/reliability.md).
Further messages wait in QEMU."""

TURN_BYTES, BYTES_PER_S = 64 << 10, 4 << 20
"""How many bytes of messages end a turn, and how many are handled in a second; a longer message is followed by a longer
pause. A QEMU that sends nothing but large ones costs some 5 % of a CPU; without this it was 70 %."""

Command = Callable[[str, Mapping[str, object] | None], Awaitable[Any]]
"""Runs a QMP command; returns None when QEMU did not do it."""


class MonitorError(Exception):
    """QEMU did not do a command. The subclasses say what to do next."""


class MonitorLost(MonitorError):
    """There is no connection (any more): connect again, or check whether the process lives."""


class MonitorSilent(MonitorError):
    """QEMU did not answer in time: it is frozen or very busy. Report it, ask again later."""


class MonitorRefused(MonitorError):
    """QEMU refuses the command; the message holds QEMU's words. Do not repeat the command unchanged."""


class Monitor:
    """An established connection; made by `connect`.

    Each event is passed to `on_event(name, data)`. When the connection ends, for whatever reason, `on_lost()` is called
    once, after the last event. Both run in the event loop and must not block.
    """

    def __init__(self, talk: _Talk) -> None:
        self._talk = talk

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
            MonitorLost: no program listens, or the connection ended at once.
            MonitorSilent: a program listens, but does not greet within `timeout_s` seconds.
        """
        talk = _Talk(on_event)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().create_unix_connection(lambda: talk, path)
                await talk.greeted
                await talk.ask("qmp_capabilities", None)
            if talk.ended.is_set():
                raise MonitorLost("the other side hung up")
            # Not before: `on_lost` is only for a connection that was established.
            talk.on_lost = on_lost
        except TimeoutError as error:
            raise MonitorSilent(f"QEMU did not greet on {path} within {timeout_s:g} s") from error
        except (OSError, MonitorError) as error:
            raise MonitorLost(f"cannot connect to QMP at {path}: {error}") from error
        finally:
            if talk.on_lost is None:
                await talk.end()
        return cls(talk)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = 5.0,
        fd: int | None = None,
    ) -> Any:
        """Run one command, return its result.

        Args:
            command: its name.
            arguments: its arguments.
            timeout_s: how long it may take.
            fd: a descriptor that goes with it (`add-fd`), of which QEMU gets a copy.

        Raises:
            MonitorRefused: QEMU refuses the command.
            MonitorSilent: QEMU did not answer within `timeout_s` seconds; or it has not read so many earlier commands
                that this one was not sent. A command that was sent may still be done later.
            MonitorLost: the connection ended first.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._talk.ask(command, arguments, fd)
        except TimeoutError as error:
            raise MonitorSilent(f"QEMU did not answer {command} within {timeout_s:g} s") from error

    async def drained(self, timeout_s: float) -> None:
        """Wait until the connection has ended and its last event was passed on, at most `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._talk.ended.wait()

    async def close(self) -> None:
        """End the connection; `on_lost` is not called. QEMU goes on and takes the next client."""
        self._talk.on_lost = None
        await self._talk.end()


class _Talk(asyncio.Protocol):
    """Reads and writes messages, and matches answers to commands.

    Attributes:
        greeted: done when QEMU has greeted.
        ended: set when nothing more will come.
        on_lost: called when the connection has ended, unless None.
    """

    def __init__(self, on_event: Callable[[str, Mapping[str, Any]], None]) -> None:
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.on_lost: Callable[[], None] | None = None
        self._on_event = on_event
        self._transport: asyncio.Transport | None = None
        self._heard = bytearray()
        self._searched = 0
        self._next_turn: asyncio.TimerHandle | None = None
        self._waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._unread = False
        self._fault: str | None = None

    # --- for the monitor --------------------------------------------------------------------------------------

    async def ask(self, command: str, arguments: Mapping[str, object] | None, fd: int | None = None) -> Any:
        """Send a command and wait for its answer, without a limit of time.

        Raises:
            MonitorRefused, MonitorSilent, MonitorLost: see `Monitor.execute`.
        """
        if self._transport is None or self._transport.is_closing():
            raise MonitorLost(f"no QMP connection for {command}")
        if self._unread:
            raise MonitorSilent(f"QEMU does not read what it is asked: {command} was not sent")
        number = next(self._ids)
        message: dict[str, object] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = dict(arguments)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(json.dumps(message).encode(), fd, command)
            answer = await self._waiting[number]
        except _Ended as end:
            raise MonitorLost(f"QMP connection ended during {command}: {end}") from end
        finally:
            # A later answer is dropped.
            del self._waiting[number]
        if "error" in answer:
            raise MonitorRefused(f"QEMU refuses {command}: {shortened(answer['error']['desc'])}")
        return answer["return"]

    def _send(self, data: bytes, fd: int | None, command: str) -> None:
        """Write a message; a descriptor goes with its first byte (unix(7), SCM_RIGHTS)."""
        assert self._transport is not None
        if fd is not None:
            if self._transport.get_write_buffer_size():
                raise MonitorSilent(f"QEMU does not read what it is asked: {command} was not sent")
            sent = _send_with(self._transport.get_extra_info("socket").fileno(), data, fd)
            if sent == 0:
                raise MonitorSilent(f"QEMU does not read what it is asked: {command} was not sent")
            data = data[sent:]
        if data:
            self._transport.write(data)

    async def end(self) -> None:
        """Abort the connection; return when it is gone. QEMU need not read the rest."""
        self.greeted.cancel()
        if self._transport is not None:
            self._transport.abort()
            await self.ended.wait()

    # --- for the event loop -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=UNREAD_LIMIT)
        self._transport = transport

    def pause_writing(self) -> None:
        self._unread = True

    def resume_writing(self) -> None:
        self._unread = False

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if self._next_turn is None:
            self._turn()

    def _turn(self) -> None:
        """Handle some of the received messages, and the rest after a pause; read on once all are handled."""
        assert self._transport is not None
        self._next_turn = None
        taken = self._take_lines(TURN_MESSAGES, TURN_BYTES)
        if b"\n" in self._heard or taken >= TURN_BYTES:
            self._transport.pause_reading()
            pause_s = max(TURN_S, taken / BYTES_PER_S)
            self._next_turn = asyncio.get_running_loop().call_later(pause_s, self._turn)
            return
        self._searched = len(self._heard)
        if len(self._heard) > MESSAGE_LIMIT:
            self._break(f"a message of more than {MESSAGE_LIMIT} bytes")
        elif not self._transport.is_closing():
            self._transport.resume_reading()

    def _take_lines(self, limit: int, size: int) -> int:
        """Handle at most `limit` whole messages, and none once `size` bytes are handled; return how many bytes were."""
        begin = 0
        try:
            for _ in range(limit):
                if begin >= size:
                    break
                end = self._heard.find(b"\n", max(begin, self._searched))
                if end < 0:
                    break
                line, begin, self._searched = bytes(self._heard[begin:end]), end + 1, 0
                self._take(_parsed(line))
        except _Nonsense as error:
            begin = len(self._heard)
            self._break(f"what came is not QMP: {error}")
        del self._heard[:begin]
        return begin

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_turn is not None:
            # Messages from before the end count; they are no more than one read.
            self._next_turn.cancel()
            self._take_lines(len(self._heard), len(self._heard))
        why = self._fault or (str(exc) if exc else "the other side hung up")
        if not self.greeted.done():
            self.greeted.set_exception(MonitorLost(why))
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_Ended(why))
        self.ended.set()
        if self.on_lost is not None:
            self.on_lost()

    def _break(self, why: str) -> None:
        assert self._transport is not None
        self._fault = why
        self._transport.abort()

    def _take(self, message: Any) -> None:
        match message:
            case {"QMP": _}:
                if not self.greeted.done():
                    self.greeted.set_result(None)
            case {"event": str(name), "data": dict(data)}:
                self._on_event(name, data)
            case {"event": str(name)}:
                self._on_event(name, {})
            case {"return": _, "id": int(number)} | {"error": {"desc": str()}, "id": int(number)}:
                answer = self._waiting.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case _:
                raise _Nonsense("neither a greeting nor an event nor an answer")


def _send_with(number: int, data: bytes, fd: int) -> int:
    """Send some of `data`, with a descriptor; return how many bytes, 0 for neither. The event loop does not do that."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
    with socket.socket(fileno=os.dup(number)) as same:
        try:
            return same.sendmsg([data], rights, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise MonitorLost(f"the QMP connection has ended: {error}") from error


class _Ended(Exception):
    """The connection ended before the answer; the message says why."""


class _Nonsense(Exception):
    """The other side does not speak QMP."""


def _parsed(line: bytes) -> object:
    try:
        found: object = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise _Nonsense(str(error)) from error
    return found
