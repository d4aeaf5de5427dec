"""A WebSocket to another server of this kind, over TLS with certificates on both sides.

Sources: RFC 6455, 4.1; RFC 8446, 4.4.2.4 and 6.2 (with TLS 1.3 a server that wants none of our certificate says so
behind the handshake).
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import h11
from wsproto.connection import ConnectionType
from wsproto.events import AcceptConnection, RejectConnection, RejectData, Request
from wsproto.handshake import H11Handshake
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from kvmsupervisor.adapters.web.websocket import WebSocket

REPLY_LIMIT = 1 << 16
"""The most bytes of a reply that is a refusal."""

PORT = 443


class NoAnswer(Exception):
    """There is no WebSocket. The message says why, for people: the server's own words, if it has said any."""


async def dial(
    url: str, target: str, *, headers: Mapping[str, str], tls: ssl.SSLContext, timeout_s: float
) -> WebSocket:
    """Open one.

    Args:
        url: `https://name[:port]`; the name is to be in the server's certificate.
        target: path and query.
        headers: beside those of every WebSocket.
        tls: which servers are trusted, and what is shown to them.
        timeout_s: how long all of it may take.

    Raises:
        NoAnswer: there is none.
    """
    place = urlsplit(url)
    name = place.hostname or ""
    handshake = H11Handshake(ConnectionType.CLIENT)
    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    asked = handshake.send(Request(host=place.netloc, target=target, extra_headers=named))
    ours = _Dialled(handshake, asked)
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().create_connection(
                lambda: ours, name, place.port or PORT, ssl=tls, server_hostname=name
            )
            return await ours.opened
    except TimeoutError as error:
        raise NoAnswer(f"{url} does not answer within {timeout_s:g} s") from error
    except ssl.SSLCertVerificationError as error:
        raise NoAnswer(f"the certificate of {url} is not right: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise NoAnswer(f"{url} and this page do not agree on TLS: {_words(error)}") from error
    except OSError as error:
        raise NoAnswer(f"{url} cannot be reached: {error.strerror or error}") from error
    finally:
        ours.give_up()


class _Dialled(asyncio.Protocol):
    """The connection: a handshake, then a WebSocket.

    Attributes:
        opened: done when there is one, or the server has said why not.
    """

    def __init__(self, handshake: H11Handshake, asked: bytes) -> None:
        self.opened: asyncio.Future[WebSocket] = asyncio.get_running_loop().create_future()
        self._handshake = handshake
        self._asked = asked
        self._transport: asyncio.Transport | None = None
        self._socket: WebSocket | None = None
        self._status = 0
        self._body = b""

    def give_up(self) -> None:
        """Nobody waits any more; end what did not become a WebSocket."""
        if self._socket is None or not self.opened.done() or self.opened.cancelled():
            self.opened.cancel()
            if self._transport is not None:
                self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._asked)

    def data_received(self, data: bytes) -> None:
        if self._socket is not None:
            self._socket.received(data)
            return
        try:
            self._handshake.receive_data(data)
            for event in self._handshake.events():
                self._take(event)
        except (RemoteProtocolError, LocalProtocolError, h11.ProtocolError) as error:
            self._fail(NoAnswer(f"the other page answers what is no HTTP: {error}"))

    def _take(self, event: Any) -> None:
        match event:
            case AcceptConnection():
                assert self._handshake.connection is not None
                assert self._transport is not None
                self._socket = WebSocket(self._handshake.connection, self._transport)
                if not self.opened.done():
                    self.opened.set_result(self._socket)
                self._socket.begin()
            case RejectConnection(status_code=status):
                self._status = status
                if not event.has_body:
                    self._refused()
            case RejectData(data=data, body_finished=finished):
                self._body += data
                if finished or len(self._body) > REPLY_LIMIT:
                    self._refused()

    def _refused(self) -> None:
        self._fail(NoAnswer(f"the other page refuses it: {_said(self._body) or f'status {self._status}'}"))

    def eof_received(self) -> bool:
        if self._socket is not None:
            self._socket.received(b"")
        return False

    def pause_writing(self) -> None:
        if self._socket is not None:
            self._socket.paused(True)

    def resume_writing(self) -> None:
        if self._socket is not None:
            self._socket.paused(False)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._socket is not None:
            self._socket.lost()
        else:
            # A server that does not accept a certificate may end so, and its alert is lost with the connection.
            why = f": {_words(exc)}" if isinstance(exc, ssl.SSLError) else ""
            self._fail(NoAnswer(f"the other page refuses this page's certificate, or has just ended{why}"))

    def _fail(self, error: NoAnswer) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)
        if self._transport is not None:
            self._transport.abort()


def _said(body: bytes) -> str:
    """The server's words in a refusal of ours."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    return str(found["error"]) if isinstance(found, dict) and "error" in found else ""


def _words(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")
