"""The sockets of the HTTP server.

Bounds against slow, many or hostile clients: a connection carries one request, lives `CONNECTION_LIMIT_S` at
most (so nobody gains by sending headers, or reading the reply, drop by drop), and the oldest gives way when
`CONNECTIONS` are open. Nothing here resolves names, and nothing waits but `Web.close`, which has a deadline.
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
"""How many may be open; arbitrary: a few scrapers, probes and browsers need a tenth of it."""

SHUTDOWN_GRACE_S = 1.0
"""How long a reply that is under way may still take when the server closes; arbitrary."""

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
        """Begin a life that is limited."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(self._limit_s, self.drop)
        self._crowd.join(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End, whoever wished it."""
        self._timer.cancel()
        self._crowd.leave(self)

    def data_received(self, data: bytes) -> None:
        """Reply as soon as it is known how. Nothing is received from then on.

        An error of ours costs this connection only: asyncio logs it with its traceback.
        """
        with contextlib.ExitStack() as on_error:
            on_error.callback(lambda: self._send(self._exchange.failed()))
            reply = self._exchange.receive(data)
            on_error.pop_all()
        if reply is not None:
            self._send(reply)

    def _send(self, reply: bytes) -> None:
        self._transport.write(reply)
        self._transport.close()  # once that is sent

    def finish(self) -> None:
        """Let a reply that is under way come to its end; without one, end now."""
        if not self._transport.is_closing():
            self.drop()

    def drop(self) -> None:
        """End now, whatever is under way."""
        if self._transport.is_closing() and not self._transport.get_write_buffer_size():
            return  # what is left of the reply is with the kernel, which sends it
        # Not close(), which would wait for the client to read what is buffered here; and a reset, so that the
        # kernel does not wait for it either.
        if (sock := self._transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        self._transport.abort()


class _Crowd:
    """The connections that are open."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[_Connection, asyncio.Future[None]] = {}  # in order of arrival
        self._dispersed = False

    def join(self, connection: _Connection) -> None:
        """Let a connection in; the oldest gives way when there are too many."""
        if self._dispersed:  # it was accepted in the very moment
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
        """End all connections, replies under way after `grace_s` at the latest, and let nobody in any more."""
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
    """The HTTP server of one supervisor, to be started once."""

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
        self._server: asyncio.Server | None = None
        self._crowd = _Crowd(connections)
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
        """Listen, and answer from now on. When cancelled, `close` ends what had begun.

        Raises:
            ListenError: the address is not one, is taken, or is not this host's.
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
        # What knows HTTP is imported by the first connection: no start should wait for it.
        from kvmsupervisor.adapters.web.exchange import Exchange  # noqa: PLC0415

        return _Connection(Exchange(self._routes), self._crowd, self._limit_s)

    async def close(self) -> None:
        """Stop listening, give replies under way `SHUTDOWN_GRACE_S`, end all connections.

        May be called twice. When cancelled, the connections that are left end at once.
        """
        if self._server is not None:
            self._server.close()
            self._server = None
            await self._crowd.disperse(SHUTDOWN_GRACE_S)
