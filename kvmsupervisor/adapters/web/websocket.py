"""A WebSocket on a connection whose request asked for one, by wsproto.

Both directions press back: what is sent waits while the client is slow, and nothing more is received while what came
is not taken. A client that says nothing for two beats, not even that it lives, is dropped. What comes is handed on as
it comes, so that no length that a client announces costs memory; text is whole, and short.

Sources: RFC 6455; <https://python-hyper.org/projects/wsproto/en/stable/>.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import h11
from wsproto.connection import Connection, ConnectionType
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Event, Ping, Request, TextMessage
from wsproto.handshake import H11Handshake
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

BEAT_S = 25.0
"""How often a client is asked whether it lives: proxies end what is silent for a minute, as a rule."""

BEATS = 2
"""After so many beats without a word a client is dropped: one answer may be late, or lost in a proxy."""

TEXT_LIMIT = 1 << 16
"""The most characters of a text message. Arbitrary: ours have a hundred."""

UNREAD_LIMIT = 1 << 16
"""How many bytes may wait to be taken before nothing more is received. Arbitrary."""

NORMAL, GOING_AWAY, TOO_BIG, BROKEN, OURS = 1000, 1001, 1009, 1002, 1011
"""Status codes (RFC 6455, 7.4.1): the end, the end of this server, too much at once, what is no WebSocket, and a bug of
ours."""

ABNORMAL = 1006
"""Stands for an end without a goodbye, and is never sent."""

REASON_LIMIT = 123
"""Bytes of the reason for a close (RFC 6455, 5.5)."""


class Closed(Exception):
    """There is no WebSocket any more."""


class NotAsked(Exception):
    """The request does not ask for a WebSocket as one is asked for. The message is for the client."""


def accept(headers: Sequence[tuple[bytes, bytes]], path: bytes) -> tuple[bytes, Connection]:
    """What to answer to a request that asks for a WebSocket, and the protocol from then on.

    No extension is accepted: a compressed message has the length that its client likes.

    Raises:
        NotAsked: it asks in another way.
    """
    handshake = H11Handshake(ConnectionType.SERVER)
    try:
        handshake.initiate_upgrade_connection(list(headers), path)
        answer = b""
        for event in handshake.events():
            if isinstance(event, Request):
                answer = handshake.send(AcceptConnection())
    except (RemoteProtocolError, LocalProtocolError, h11.ProtocolError, UnicodeError) as error:
        raise NotAsked(f"this is no request for a WebSocket: {error}") from error
    if handshake.connection is None:
        raise NotAsked("this is no request for a WebSocket")
    return answer, handshake.connection


class WebSocket:
    """One of them, of a server or of a client. One task receives; several may send.

    Args:
        protocol: knows the bytes.
        transport: of the connection.
        beat_s: see `BEAT_S`.
    """

    def __init__(self, protocol: Connection, transport: asyncio.Transport, *, beat_s: float = BEAT_S) -> None:
        self._protocol = protocol
        self._transport = transport
        self._beat_s = beat_s
        self._came: deque[bytes | str] = deque()
        self._unread = 0
        self._text: list[str] = []
        self._text_length = 0
        self._ended = False
        self._end_of_other = (ABNORMAL, "the connection was lost")
        self._paused = False
        self._reading = True
        self._missed = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._timer = asyncio.get_running_loop().call_later(beat_s, self._beat)

    # --- for who uses it ----------------------------------------------------------------------------------------

    async def receive(self) -> bytes | str:
        """The next piece of what the client sends: bytes as they come, or a whole text.

        Raises:
            Closed: nothing more comes.
        """
        while not self._came:
            if self._ended:
                raise Closed
            await self._change()
        piece = self._came.popleft()
        self._unread -= len(piece)
        if not self._reading and self._unread <= UNREAD_LIMIT and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()
        return piece

    async def send(self, message: bytes | str) -> None:
        """Send a message; returns once the client can take more.

        Raises:
            Closed: nobody would get it.
        """
        if self._ended or self._transport.is_closing():
            raise Closed
        self._write(TextMessage(data=message) if isinstance(message, str) else BytesMessage(data=message))
        while self._paused:
            if self._ended:
                raise Closed
            await self._change()

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Say goodbye, and end. May be called twice."""
        if not self._ended:
            self._ended = True
            self._write(CloseConnection(code=code, reason=_cut(reason)))
        self._end()

    def go_away(self) -> None:
        """Say that this server ends, and end."""
        self.close(GOING_AWAY, "this page's server ends")

    @property
    def end(self) -> tuple[int, str]:
        """Code and reason of the other side's goodbye; `ABNORMAL` without one."""
        return self._end_of_other

    @property
    def is_open(self) -> bool:
        """Whether there is anybody."""
        return not self._ended

    async def _change(self) -> None:
        change = asyncio.get_running_loop().create_future()
        self._waiting.add(change)
        try:
            await change
        finally:
            self._waiting.discard(change)

    def _tell(self) -> None:
        for change in self._waiting:
            if not change.done():
                change.set_result(None)

    # --- for the connection -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Take what came with the handshake."""
        self._take_all()

    def received(self, data: bytes) -> None:
        """Bytes have come; none: the client sends nothing more."""
        self._missed = 0
        if self._ended:
            return
        self._protocol.receive_data(data or None)
        self._take_all()

    def _take_all(self) -> None:
        try:
            for event in self._protocol.events():
                self._take(event)
        except RemoteProtocolError as error:
            self._fail(BROKEN, str(error))
        self._tell()

    def paused(self, is_paused: bool) -> None:
        """The client is slower than we are, or not any more."""
        self._paused = is_paused
        self._tell()

    def lost(self) -> None:
        """There is no connection any more."""
        self._ended = True
        self._timer.cancel()
        self._tell()

    # --- inside -------------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        if self._ended:
            return
        match event:
            case BytesMessage(data=data):
                self._keep(bytes(data))
            case TextMessage(data=text, message_finished=finished):
                self._take_text(text, finished=finished)
            case Ping():
                if not self._paused:  # or a client that reads nothing would have us keep its pings
                    self._write(event.response())
            case CloseConnection(code=code, reason=reason):
                self._ended = True
                if code != ABNORMAL:
                    self._end_of_other = (int(code), reason or "")
                self._write(event.response())
                self._end()
            case _:
                pass  # a pong: something has come, which is all that counts

    def _take_text(self, text: str, *, finished: bool) -> None:
        self._text.append(text)
        self._text_length += len(text)
        if self._text_length > TEXT_LIMIT:
            self._fail(TOO_BIG, f"a text has at most {TEXT_LIMIT} characters")
        elif finished:
            whole = "".join(self._text)
            self._text, self._text_length = [], 0
            self._keep(whole)

    def _keep(self, piece: bytes | str) -> None:
        if not piece:
            return
        self._came.append(piece)
        self._unread += len(piece)
        if self._unread > UNREAD_LIMIT and self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def _fail(self, code: int, reason: str) -> None:
        self._came.clear()
        self.close(code, reason)

    def _beat(self) -> None:
        self._missed += 1
        # While nothing is received because what came is not taken, the client's word may be behind that.
        if self._missed > BEATS and self._reading:
            self._transport.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(self._beat_s, self._beat)
        if not self._paused and not self._ended:
            self._write(Ping())

    def _write(self, event: Event) -> None:
        if self._transport.is_closing():
            return
        try:
            self._transport.write(self._protocol.send(event))
        except LocalProtocolError:
            # The other side has said goodbye at this very moment.
            self._ended = True

    def _end(self) -> None:
        self._timer.cancel()
        self._transport.close()
        self._tell()


def _cut(reason: str) -> str:
    return reason.encode()[:REASON_LIMIT].decode(errors="ignore")
