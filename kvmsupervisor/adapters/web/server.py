"""The sockets of the HTTP face, by aiohttp's low-level server.

Bounds against slow, many or hostile clients: a connection carries one request, lives `CONNECTION_LIMIT_S` at
most (so nobody gains by sending headers, or reading the reply, drop by drop), the oldest gives way when
`CONNECTIONS` are open, and lines and header counts are limited. Nothing here resolves names.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from ipaddress import ip_address
from typing import Any

from aiohttp import web

from kvmsupervisor.adapters.web.routes import SAFETY_HEADERS, Reply, Routes

SERVER_NAME = "kvmsupervisor"

CONNECTION_LIMIT_S = 30.0
"""Longest life of a connection: three times Prometheus' default scrape timeout of 10 s."""

CONNECTIONS = 64
"""How many may be open; arbitrary: a few scrapers, probes and browsers need a tenth of it."""

SHUTDOWN_GRACE_S = 1.0
"""How long a reply that is under way may still take when the server closes; arbitrary."""

_LINGER_NOT = struct.pack("ii", 1, 0)
"""`struct linger` that turns close(2) into a reset, see socket(7)."""

_HANDLER_OPTIONS: dict[str, Any] = {
    "max_line_size": 4096,
    "max_field_size": 8190,
    "max_headers": 64,
    "access_log": None,
    "lingering_time": 0,
}
"""Bytes of the request line, bytes of one header, number of headers: arbitrary, browsers stay well below. No
access log (scrapes would fill it), and nobody reads a request's body."""


class ListenError(Exception):
    """`KVM_LISTEN` cannot be listened on: tell the operator."""


class _Connection(web.RequestHandler):
    """One connection; says nothing of the software that serves it, whatever goes wrong."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that is not HTTP, or that failed here.

        What a client sent in error is its own affair: only errors of ours are logged, as aiohttp does, with
        traceback.
        """
        if status >= web.HTTPInternalServerError.status_code:
            response = super().handle_error(request, status, exc, message)
        else:
            response = web.Response(status=status, text="not a request that this server understands\n")
            response.force_close()
        response.headers.update(SAFETY_HEADERS)
        response.headers["Server"] = SERVER_NAME
        return response


class _BoundedServer(web.Server):
    """Makes connections, and ends those that last too long or are too many."""

    def __init__(self, routes: Routes, *, limit_s: float, connections: int) -> None:
        super().__init__(self._handle)
        self._routes = routes
        self._limit_s = limit_s
        self._limit = connections
        # In order of arrival: the first is the oldest.
        self._open: dict[web.RequestHandler, tuple[asyncio.Transport, asyncio.TimerHandle]] = {}

    def __call__(self) -> web.RequestHandler:
        """Make the protocol of a new connection."""
        return _Connection(self, loop=asyncio.get_running_loop(), **_HANDLER_OPTIONS)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Let a connection in; the oldest gives way when there are too many."""
        super().connection_made(handler, transport)
        while len(self._open) >= self._limit:
            self._drop(next(iter(self._open)))
        timer = asyncio.get_running_loop().call_later(self._limit_s, self._drop, handler)
        self._open[handler] = (transport, timer)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection that ended."""
        if handler in self._open:
            self._open.pop(handler)[1].cancel()
        super().connection_lost(handler, exc)

    def drop_all(self) -> None:
        """End every connection now."""
        for handler in list(self._open):
            self._drop(handler)

    def _drop(self, handler: web.RequestHandler) -> None:
        transport, timer = self._open.pop(handler)
        timer.cancel()
        # Not close(), which would wait for the client to read what is buffered here; and a reset, so that the
        # kernel does not wait for it either.
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        transport.abort()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        reply = self._routes.answer(
            method=request.method,
            path=request.path,
            refresh=request.query.get("refresh", ""),
            accept=request.headers.get("Accept", ""),
        )
        return _response(reply)


class Web:
    """The HTTP server of one supervisor."""

    def __init__(
        self,
        listen_host: str,
        listen_port: int,
        routes: Routes,
        *,
        limit_s: float = CONNECTION_LIMIT_S,
        connections: int = CONNECTIONS,
    ) -> None:
        """Remember what to do; nothing is opened yet.

        Args:
            listen_host: an IP address; `0.0.0.0` or `::` for all interfaces (`::` takes IPv4 clients too).
            listen_port: TCP port, 0 for any that is free.
            routes: what answers.
            limit_s: longest life of a connection, seconds.
            connections: how many may be open at once.
        """
        self._host = listen_host
        self._wanted_port = listen_port
        self._routes = routes
        self._limit_s = limit_s
        self._connections = connections
        self._server: asyncio.Server | None = None
        self._manager: _BoundedServer | None = None
        self._port: int | None = None

    @property
    def port(self) -> int:
        """The port that is listened on.

        Raises:
            RuntimeError: the server was never started.
        """
        if self._port is None:
            raise RuntimeError("the HTTP server has not been started")
        return self._port

    async def start(self) -> None:
        """Listen, and answer from now on.

        Raises:
            ListenError: the address is not one, is taken, or is not this host's.
        """
        listener = _listen(self._host, self._wanted_port)
        self._port = listener.getsockname()[1]
        self._manager = _BoundedServer(self._routes, limit_s=self._limit_s, connections=self._connections)
        self._server = await asyncio.get_running_loop().create_server(self._manager, sock=listener)

    async def close(self) -> None:
        """Stop listening, give replies under way `SHUTDOWN_GRACE_S`, end all connections.

        May be called twice. When cancelled, the connections that are left end with the event loop.
        """
        if self._server is None or self._manager is None:
            return
        server, manager = self._server, self._manager
        self._server = self._manager = None
        server.close()
        manager.pre_shutdown()  # those that wait for a request need no grace
        await manager.shutdown(SHUTDOWN_GRACE_S)
        manager.drop_all()
        await server.wait_closed()


def _response(reply: Reply) -> web.Response:
    response = web.Response(
        status=reply.status,
        body=reply.body,
        headers={
            **SAFETY_HEADERS,
            "Server": SERVER_NAME,
            "Content-Type": reply.content_type,
            **reply.headers,
        },
    )
    response.force_close()
    return response


def _listen(host: str, port: int) -> socket.socket:
    """Open the listening socket; names are refused rather than resolved."""
    shown = f"KVM_LISTEN={f'[{host}]' if ':' in host else host}:{port}"
    try:
        address = ip_address(host)
    except ValueError:
        raise ListenError(
            f"{shown}: {host!r} is not an IP address (names are not looked up); "
            "right would be 0.0.0.0:9746 for all interfaces, 127.0.0.1:9746 for this host only, or [::]:9746"
        ) from None
    if port not in range(65_536):
        raise ListenError(f"{shown}: found port {port}; right would be 1 to 65535")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        # With one socket for both families `::` serves IPv4 clients too, whatever net.ipv6.bindv6only says.
        return socket.create_server((host, port), family=family, dualstack_ipv6=host == "::", backlog=CONNECTIONS)
    except OSError as error:
        raise ListenError(f"{shown}: {_advice(error, host, port)}") from error


def _advice(error: OSError, host: str, port: int) -> str:
    """What stands in the way, and what would be right."""
    match error.errno:
        case errno.EADDRINUSE:
            return (
                "another program, perhaps another supervisor, listens there; "
                f"`ss -ltnp 'sport = :{port}'` names it. End it, or give a port that is free"
            )
        case errno.EADDRNOTAVAIL:
            return (
                f"no interface of this host has the address {host}; "
                "right would be one that `ip address` shows, or 0.0.0.0 for all"
            )
        case errno.EACCES:
            return "ports below 1024 need CAP_NET_BIND_SERVICE; right would be a higher one, such as 9746"
        case errno.EAFNOSUPPORT:
            return "this host's kernel has no IPv6; right would be 0.0.0.0 or another IPv4 address"
        case _:
            return error.strerror or str(error)
