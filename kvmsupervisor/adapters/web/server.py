"""The sockets of the HTTP server.

Limits against slow, many or hostile clients: a connection carries one request and lives for `CONNECTION_LIMIT_S` at
most (so a client gains nothing by sending headers, or reading the reply, slowly). When `CONNECTIONS` are open, a new
one ends the oldest. Nothing here resolves names. Only `Web.close` waits, and it has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING

from kvmsupervisor.adapters.web.listener import listen
from kvmsupervisor.adapters.web.routes import Routes

if TYPE_CHECKING:
    from kvmsupervisor.adapters.web.exchange import Exchange

CONNECTION_LIMIT_S = 30.0
"""Longest life of a connection: three times Prometheus' default scrape timeout of 10 s."""

CONNECTIONS = 64
"""The most open connections. Arbitrary: a few scrapers, probes and browsers need a tenth of that."""

SHUTDOWN_GRACE_S = 1.0
"""How long unfinished replies may still take when the server closes. Arbitrary."""

_LINGER_NOT = struct.pack("ii", 1, 0)
"""`struct linger` that turns close(2) into a reset, see socket(7)."""


class _Connection(asyncio.Protocol):
    """One connection: takes one request, sends one reply, closes."""

    def __init__(self, exchange: Exchange, crowd: _Crowd, limit_s: float) -> None:
        self._exchange = exchange
        self._crowd = crowd
        self._limit_s = limit_s
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the connection's time limit."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(self._limit_s, self.drop)
        self._crowd.join(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up, whichever side ended the connection."""
        self._timer.cancel()
        self._crowd.leave(self)

    def data_received(self, data: bytes) -> None:
        """Reply once the request is complete. Nothing is received after that.

        A bug of ours costs this connection only: asyncio logs it with its traceback.
        """
        with contextlib.ExitStack() as on_error:
            on_error.callback(lambda: self._send(self._exchange.failed()))
            reply = self._exchange.receive(data)
            on_error.pop_all()
        if reply is not None:
            self._send(reply)

    def _send(self, reply: bytes) -> None:
        self._transport.write(reply)
        self._transport.close()  # once the reply is sent

    def finish(self) -> None:
        """Let an unfinished reply be sent; without one, end now."""
        if not self._transport.is_closing():
            self.drop()

    def drop(self) -> None:
        """End now, even in the middle of a reply."""
        if self._transport.is_closing() and not self._transport.get_write_buffer_size():
            return  # the kernel has the rest of the reply, and sends it
        # Not close(), which would wait until the client has read what is buffered here. And a reset, so that the kernel
        # does not wait for the client either.
        if (sock := self._transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        self._transport.abort()


class _Crowd:
    """The open connections."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[_Connection, asyncio.Future[None]] = {}  # in order of arrival
        self._dispersed = False

    def join(self, connection: _Connection) -> None:
        """Add a connection; end the oldest when there are too many."""
        if self._dispersed:  # it was accepted at this very moment
            connection.drop()
            return
        while len(self._open) >= self._limit:
            oldest = next(iter(self._open))
            self.leave(oldest)
            oldest.drop()
        self._open[connection] = asyncio.get_running_loop().create_future()

    def leave(self, connection: _Connection) -> None:
        """Forget a connection that ended."""
        if (ended := self._open.pop(connection, None)) is not None and not ended.done():
            ended.set_result(None)

    async def disperse(self, grace_s: float) -> None:
        """End all connections, unfinished replies after `grace_s` at the latest, and accept no more."""
        self._dispersed = True
        for connection in self._open:
            connection.finish()
        try:
            if self._open:
                await asyncio.wait(self._open.values(), timeout=grace_s)
        finally:
            for connection in self._open:
                connection.drop()


class Web:
    """The HTTP server of one supervisor. Start it once."""

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
            listen_port: TCP port; 0 for any free one.
            routes: makes the answers.
            limit_s: longest life of a connection, seconds.
            connections: the most open connections.
        """
        self._host = listen_host
        self._wanted_port = listen_port
        self._routes = routes
        self._limit_s = limit_s
        self._server: asyncio.Server | None = None
        self._crowd = _Crowd(connections)
        self._port: int | None = None

    @property
    def port(self) -> int:
        """The port that the server listens on.

        Raises:
            RuntimeError: the server was never started.
        """
        if self._port is None:
            raise RuntimeError("the HTTP server has not been started")
        return self._port

    async def start(self) -> None:
        """Listen, and answer from now on. After a cancellation `close` cleans up.

        Raises:
            ListenError: the address is malformed, in use, or not this host's.
        """
        listener = listen(self._host, self._wanted_port, backlog=CONNECTIONS)
        self._port = listener.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(
            self._accepted,
            sock=listener,
            backlog=CONNECTIONS,
            start_serving=False,
        )
        await self._server.start_serving()

    def _accepted(self) -> _Connection:
        # Imported by the first connection: no start should wait for h11.
        from kvmsupervisor.adapters.web.exchange import Exchange  # noqa: PLC0415

        return _Connection(Exchange(self._routes), self._crowd, self._limit_s)

    async def close(self) -> None:
        """Stop listening, give unfinished replies `SHUTDOWN_GRACE_S`, and end all connections.

        May be called twice. When cancelled, ends the remaining connections at once.
        """
        if self._server is not None:
            self._server.close()
            self._server = None
            await self._crowd.disperse(SHUTDOWN_GRACE_S)
