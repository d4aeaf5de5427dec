"""A request and the reply to it, as routes see them; and a feed, a reply that goes on."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

from kvmsupervisor.adapters.web.body import Body, NoBody
from kvmsupervisor.domain.frozen import frozen

if TYPE_CHECKING:
    from kvmsupervisor.adapters.web.websocket import WebSocket

SAFETY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""On every reply. A reply may contain untrusted text (of QEMU or of keys), which no browser may execute."""


@frozen(kw_only=True)
class Peer:
    """The other end of a connection.

    Attributes:
        address: its IP address; empty where that is not known.
        secure: whether it speaks TLS with this server itself.
        certificate: that it has proven, as `ssl.SSLSocket.getpeercert` tells it; None without one.
    """

    address: str = ""
    secure: bool = False
    certificate: Mapping[str, Any] | None = None


UNKNOWN_PEER = Peer()
NO_BODY = NoBody()


@frozen(kw_only=True)
class Request:
    """One request.

    Attributes:
        method: as the client wrote it.
        path: percent-decoded, without the query.
        query: parameters of the query, each with all its values, in their order.
        headers: by their names in small letters; several of one name are one list, with commas (RFC 9110, 5.3).
        peer: who has sent it.
        body: of it, read by whoever asks for it. An answer that does not wait cannot.
    """

    method: str
    path: str
    query: Mapping[str, Sequence[str]] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    peer: Peer = UNKNOWN_PEER
    body: Body = NO_BODY

    def first(self, name: str) -> str:
        """The first value of a parameter of the query; empty without it."""
        return next(iter(self.query.get(name, ())), "")


class Subscription(Protocol):
    """One reader of a feed.

    Attributes:
        over: whether nothing more will come: the connection ends once what there is was sent.
    """

    over: bool

    def take(self) -> bytes:
        """What this reader has not had yet, in one piece; empty when it has everything."""
        ...

    def close(self) -> None:
        """The reader has left."""
        ...


class Feed(Protocol):
    """The body of a reply that goes on until one side ends it."""

    def open(self, wake: Callable[[], None]) -> Subscription:
        """Add a reader; `wake` is called when there may be something to take, and must not raise."""
        ...


ServeSocket = Callable[["WebSocket"], Coroutine[Any, Any, None]]
"""Uses a WebSocket until its end; cancelled when the connection is lost. `Closed` is an end like any other."""


@frozen(kw_only=True)
class Reply:
    """One HTTP reply.

    Attributes:
        status: of it.
        body: whole, or with a feed what comes before that.
        content_type: of the body.
        headers: add to `SAFETY_HEADERS`, or replace them.
        feed: what the body goes on with; None for a body that is whole.
        socket: serves the WebSocket that was asked for, until it returns; None for a reply of HTTP. With it the rest of
            the reply is not sent.
    """

    status: HTTPStatus
    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)
    feed: Feed | None = None
    socket: ServeSocket | None = None


Later = Coroutine[Any, Any, Reply]
"""A reply that is waited for, at most as long as a connection lives; cancelled when the client leaves."""

Answer = Callable[[Request], Reply | Later]
"""Makes the reply to a request. It returns at once."""
