"""One request and its reply as bytes of HTTP/1.1, by h11. Knows no sockets.

The size of a request's head is limited. Its body is ignored, unless a reply that is waited for reads it.

Sources: RFC 9110 (what requests and replies mean), RFC 9112 (how HTTP/1.1 writes them),
<https://h11.readthedocs.io/en/latest/api.html>.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

import h11

from kvmsupervisor.adapters.web.body import Arriving, Unreadable
from kvmsupervisor.adapters.web.messages import (
    SAFETY_HEADERS,
    UNKNOWN_PEER,
    Answer,
    Feed,
    Later,
    Peer,
    Reply,
    Request,
)

if TYPE_CHECKING:
    from wsproto.connection import Connection

SERVER_NAME = "kvmsupervisor"

HEAD_LIMIT = 16_384
"""The most bytes of the request line and all headers together. This limit and the next three are arbitrary: browsers
stay well below."""

LINE_LIMIT = 4096
"""The most bytes of the request line's method and target."""

FIELD_LIMIT = 8190
"""The most bytes of one header's name and value."""

FIELDS = 64
"""The most headers."""

_TARGET = re.compile(r"(?:[a-z][a-z0-9+.-]*://[^/?]*)?(?P<path>[^?]*)\??(?P<query>.*)", re.IGNORECASE)
"""A request target, with or without scheme and authority (RFC 9112, 3.2). Matches every target that h11 accepts."""


class Exchange:
    """The one request of a connection, and its reply.

    A reply never tells which software serves it, whatever goes wrong. Malformed requests are not logged.

    Args:
        answer: makes the reply.
        peer: the other end of the connection.
        wanted: called when more bytes of the request's body are wanted; until then none are.

    Attributes:
        body: of the reply, once there is one; sent as it is, behind the head.
        feed: what comes after that, each piece through `more`; None when the reply is complete.
        later: the reply, if it is waited for: hand it to `reply`, and go on to `receive` meanwhile.
    """

    def __init__(self, answer: Answer, peer: Peer = UNKNOWN_PEER, wanted: Callable[[], None] = lambda: None) -> None:
        self.body = b""
        self.feed: Feed | None = None
        self.later: Later | None = None
        self._answer = answer
        self._peer = peer
        self._wanted = wanted
        self._asked: h11.Request | None = None
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
        self._room = HEAD_LIMIT + 1  # h11 refuses a request that is incomplete even with the last of these bytes
        self._with_body = True
        self._arriving: Arriving | None = None

    def receive(self, data: bytes) -> bytes | None:
        """Take the next bytes from the client; return the reply's head, or None while there is none yet.

        Another request behind the first one is ignored. Do not call this again after a reply.
        """
        if self._arriving is not None:
            if not self._arriving.ended:
                self._take_body(data)
            return None
        self._http.receive_data(data[: self._room])
        rest = data[self._room :]
        self._room -= len(data)
        try:
            request = self._http.next_event()
            if not isinstance(request, h11.Request):
                return None
            self._asked = request
            self._with_body = request.method != b"HEAD"
            reply = self._replied(request)
        except h11.RemoteProtocolError:
            return self._written(_plain(HTTPStatus.BAD_REQUEST, "not a request that this server understands"))
        if isinstance(reply, Reply):
            return self._written(reply)
        self.later = reply
        self._take_body(rest)
        return None

    @property
    def body_is_due(self) -> bool:
        """Whether more of the request's body will come."""
        return self._arriving is not None and not self._arriving.ended

    def reply(self, reply: Reply) -> bytes:
        """The head of the reply that was waited for."""
        return self._written(reply)

    def upgrade(self) -> tuple[bytes, bytes, Connection]:
        """Go on with a WebSocket: what to answer, what the client has sent already, and the protocol from now on.

        Raises:
            NotAsked: the client asks for none; `reply` may still be called.
        """
        # Imported by the first one: no server's start should wait for it.
        from kvmsupervisor.adapters.web.websocket import accept  # noqa: PLC0415

        assert self._asked is not None
        answer, protocol = accept(list(self._asked.headers), self._asked.target)
        return answer, self._http.trailing_data[0], protocol

    def go_on(self) -> bytes:
        """What to send when the body is wanted: some clients ask before they send it (RFC 9110, 10.1.1)."""
        if not self._http.they_are_waiting_for_100_continue:
            return b""
        return self._http.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue")) or b""

    def not_upgraded(self, why: str) -> bytes:
        """The head of a reply to who asks for no WebSocket, and could have nothing else."""
        headers = {"Upgrade": "websocket", "Connection": "close, upgrade"}
        return self._written(replace(_plain(HTTPStatus.UPGRADE_REQUIRED, why), headers=headers))

    def left(self) -> None:
        """The client sends nothing more."""
        if self._arriving is not None:
            self._arriving.fail(Unreadable("the request's body ends before its end"))

    def failed(self) -> bytes:
        """The bytes to send when `receive` ended with a bug of ours."""
        return self._written(_plain(HTTPStatus.INTERNAL_SERVER_ERROR, "an error of this server; its log says more"))

    def _take_body(self, data: bytes) -> None:
        assert self._arriving is not None
        try:
            if data:
                self._http.receive_data(data)
            while isinstance(event := self._http.next_event(), h11.Data | h11.EndOfMessage):
                if isinstance(event, h11.EndOfMessage):
                    self._arriving.end()
                    return
                self._arriving.more(bytes(event.data))
        except h11.RemoteProtocolError:
            self._arriving.fail(Unreadable("the request's body is not one that this server understands"))

    def more(self, data: bytes) -> bytes:
        """A piece of the feed as HTTP writes it: in a chunk, or for HTTP/1.0 as it is."""
        return self._http.send(h11.Data(data=data)) or b""

    def _written(self, reply: Reply) -> bytes:
        head = self._http.send(_head(reply))
        assert head is not None
        if self._with_body:
            # h11 adds nothing to a body whose length is in the headers.
            self.body = reply.body if reply.feed is None else self.more(reply.body)
            self.feed = reply.feed
        return head

    def _replied(self, request: h11.Request) -> Reply | Later:
        if not _acceptable(request):
            raise h11.RemoteProtocolError("another HTTP, or too much")
        target = _TARGET.fullmatch(request.target.decode("ascii"))
        assert target is not None
        headers: dict[str, str] = {}
        for raw, value in request.headers:
            name, text = raw.decode("latin-1"), value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
        length = headers.get("content-length", "")
        self._arriving = Arriving(int(length) if length.isdecimal() else None, self._wanted)
        return self._answer(
            Request(
                method=request.method.decode("ascii"),
                path=unquote(target["path"]) or "/",  # an empty path means the root (RFC 9110, 4.2.3)
                query=parse_qs(target["query"]),
                headers=headers,
                peer=self._peer,
                body=self._arriving,
            )
        )


def _acceptable(request: h11.Request) -> bool:
    return (
        request.http_version in {b"1.0", b"1.1"}
        and len(request.method) + len(request.target) <= LINE_LIMIT
        and len(request.headers) <= FIELDS
        and all(len(name) + len(value) <= FIELD_LIMIT for name, value in request.headers)
    )


def _head(reply: Reply) -> h11.Response:
    """The status line and headers of a reply."""
    headers = {
        **SAFETY_HEADERS,
        "Server": SERVER_NAME,
        "Date": formatdate(usegmt=True),  # required of a server that has a clock (RFC 9110, 6.6.1)
        "Content-Type": reply.content_type,
        **({"Content-Length": str(len(reply.body))} if reply.feed is None else {}),
        "Connection": "close",
        **reply.headers,
    }
    return h11.Response(status_code=reply.status, reason=reply.status.phrase, headers=list(headers.items()))


def _plain(status: HTTPStatus, line: str) -> Reply:
    return Reply(status=status, body=f"{line}\n".encode(), content_type="text/plain; charset=utf-8")
