"""The sockets of the HTTP server.

Limits against slow, many or hostile clients: a connection carries one request and lives for `CONNECTION_LIMIT_S` at
most (so a client gains nothing by sending headers, or reading the reply, slowly). When `CONNECTIONS` are open, a new
one ends the oldest. A reply that goes on (a feed, a WebSocket) has no such end: whoever makes the answers limits how
many there are. A reply is given to the kernel piece by piece, so that a client that does not read costs one piece of
memory, and is dropped after `CONNECTION_LIMIT_S`. Of a request's body nothing is received before somebody reads it.
Nothing here resolves names. Only `Web.close` waits, and it has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmsupervisor.adapters.web.listener import listen
from kvmsupervisor.adapters.web.messages import Answer, Later, Peer, ServeSocket, Subscription

if TYPE_CHECKING:
    import ssl

    from kvmsupervisor.adapters.web.exchange import Exchange
    from kvmsupervisor.adapters.web.websocket import WebSocket

CONNECTION_LIMIT_S = 30.0
"""Longest life of a connection: three times Prometheus' default scrape timeout of 10 s."""

CONNECTIONS = 64
"""The most open connections. Arbitrary: a few scrapers, probes and browsers need a tenth of that."""

SHUTDOWN_GRACE_S = 1.0
"""How long unfinished replies may still take when the server closes. Arbitrary."""

HANDSHAKE_S = 10.0
"""How long a client's handshake may take. Arbitrary: a network that loses every second packet needs a few seconds."""

PIECE = 1 << 16
"""Bytes of a reply that are handed over at once: as many as asyncio keeps before it says that the client is slow."""

_LINGER_NOT = struct.pack("ii", 1, 0)
"""`struct linger` that turns close(2) into a reset, see socket(7)."""


class _Connection(asyncio.Protocol):
    """One connection: takes one request, sends one reply, closes.

    Args:
        answer: makes the reply.
        crowd: all connections.
        limit_s: how long it may live.
        tls: the context of a server that speaks TLS. The handshake counts as a part of the connection's life.
    """

    def __init__(self, answer: Answer, crowd: _Crowd, limit_s: float, tls: ssl.SSLContext | None) -> None:
        self._answer = answer
        self._crowd = crowd
        self._limit_s = limit_s
        self._tls = tls
        # None until the handshake is done; what the client sends in that moment is kept.
        self._exchange: Exchange | None = None
        self._early = b""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        # The handshake, and then the reply that is waited for.
        self._task: asyncio.Task[None] | None = None
        # What is left of the reply, or of the piece of a feed; None before there is a reply.
        self._left: memoryview | None = None
        self._paused = False
        self._reader: Subscription | None = None
        self._socket: WebSocket | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the connection's time limit, and the handshake where there is one."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._limit()
        self._crowd.join(self)
        if self._tls is None:
            self._begin()
        else:
            # Until it is the handshake's to read.
            transport.pause_reading()
            self._task = asyncio.get_running_loop().create_task(self._shake_hands(self._tls))

    async def _shake_hands(self, tls: ssl.SSLContext) -> None:
        """Go on with TLS. A client that cannot, or does not, costs no line in the log: anybody may be one."""
        plain = self._transport
        try:
            found = await asyncio.get_running_loop().start_tls(
                plain,
                self,
                tls,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=SHUTDOWN_GRACE_S,
            )
        except OSError:
            found = None
        if found is None:
            # asyncio tells nobody of the end of a connection whose handshake failed.
            self._task = None
            plain.abort()
            self.connection_lost(None)
            return
        self._transport, self._task = found, None
        self._begin()

    def _begin(self) -> None:
        from kvmsupervisor.adapters.web.exchange import Exchange  # noqa: PLC0415 - no start should wait for h11

        told = self._transport.get_extra_info
        address = told("peername") or ("",)
        peer = Peer(address=str(address[0]), secure=self._tls is not None, certificate=told("peercert") or None)
        self._exchange = Exchange(self._answer, peer, self._wanted)
        early, self._early = self._early, b""
        if early:
            self.data_received(early)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up, whichever side ended the connection."""
        self._unlimit()
        if self._task is not None:
            self._task.cancel()
        if self._reader is not None:
            self._reader.close()
        if self._socket is not None:
            self._socket.lost()
        self._crowd.leave(self)

    def data_received(self, data: bytes) -> None:
        """Reply once the request is complete. What is received after that is ignored.

        A bug of ours costs this connection only: asyncio logs it with its traceback.
        """
        if self._socket is not None:
            self._socket.received(data)
        if self._left is not None:
            return
        if self._exchange is None:
            self._early += data
            return
        with self._failing(self._exchange):
            head = self._exchange.receive(data)
        if head is not None:
            self._send(head)
        elif self._task is None and (later := self._exchange.later) is not None:
            if self._exchange.body_is_due:
                # Until somebody reads it. Otherwise what comes is ignored, but that the client leaves is seen.
                self._transport.pause_reading()
            self._task = asyncio.get_running_loop().create_task(self._wait_for(self._exchange, later))
            self._task.add_done_callback(_tell_of_a_bug)

    async def _wait_for(self, exchange: Exchange, later: Later) -> None:
        with self._failing(exchange):
            reply = await later
        if reply.socket is None:
            self._send(exchange.reply(reply))
        else:
            await self._serve(exchange, reply.socket)

    async def _serve(self, exchange: Exchange, serve: ServeSocket) -> None:
        """Go on with a WebSocket, which stays: nothing of a request's limits is for it any more."""
        # Imported by the first one: a supervisor serves none.
        from kvmsupervisor.adapters.web.websocket import NORMAL, OURS, Closed, NotAsked, WebSocket  # noqa: PLC0415

        try:
            answer, early, protocol = exchange.upgrade()
        except NotAsked as error:
            self._send(exchange.not_upgraded(str(error)))
            return
        self._left = memoryview(b"")
        self._unlimit()
        self._crowd.admit(self)
        self._transport.write(answer)
        self._socket = WebSocket(protocol, self._transport)
        if early:
            self._socket.received(early)
        self._transport.resume_reading()
        end = OURS
        try:
            with contextlib.suppress(Closed):
                await serve(self._socket)
            end = NORMAL
        finally:
            self._socket.close(end)

    @contextlib.contextmanager
    def _failing(self, exchange: Exchange) -> Iterator[None]:
        """Say to the client that there was a bug of ours, if there is one."""
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._say_that_it_failed, exchange)
            yield
            on_error.pop_all()

    def _say_that_it_failed(self, exchange: Exchange) -> None:
        # A client that leaves cancels what it waited for.
        if not self._transport.is_closing():
            self._send(exchange.failed())

    def _wanted(self) -> None:
        """The body of the request is wanted."""
        assert self._exchange is not None
        self._transport.write(self._exchange.go_on())
        self._transport.resume_reading()

    @property
    def _is_waited_for(self) -> bool:
        """Whether a reply is on its way."""
        return self._exchange is not None and self._exchange.later is not None and self._left is None

    def eof_received(self) -> bool:
        """A client may end its own direction and listen on: the rest of a reply is sent. A feed's reader has left.

        With TLS both directions end together (as asyncio has it).
        """
        if self._socket is not None:
            self._socket.received(b"")
            return False
        if self._exchange is not None:
            self._exchange.left()
        return self._tls is None and self._reader is None and (self._is_waited_for or bool(self._left))

    def pause_writing(self) -> None:
        """The client is slower than we are."""
        self._paused = True
        if self._socket is not None:
            self._socket.paused(True)
        if self._reader is not None:
            self._limit()

    def resume_writing(self) -> None:
        """It has read what was kept for it."""
        self._paused = False
        if self._socket is not None:
            self._socket.paused(False)
            return
        if self._reader is not None:
            self._unlimit()
        self._pump()

    def _send(self, head: bytes) -> None:
        assert self._exchange is not None
        self._left = memoryview(self._exchange.body)
        self._transport.write(head)
        if self._exchange.feed is not None:
            self._unlimit()
            self._crowd.admit(self)
            self._reader = self._exchange.feed.open(self._pump)
        self._pump()

    def _pump(self) -> None:
        """Send what is there, as far as the client takes it."""
        while not self._paused and not self._transport.is_closing():
            if not self._left:
                piece = b"" if self._reader is None else self._reader.take()
                if not piece:
                    break
                assert self._exchange is not None
                self._left = memoryview(self._exchange.more(piece))
            self._transport.write(self._left[:PIECE])
            self._left = self._left[PIECE:]
        if not self._left and (self._reader is None or self._reader.over):
            self._transport.close()  # once the reply is sent

    def _limit(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._limit_s, self.drop)

    def _unlimit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def finish(self) -> None:
        """Let an unfinished reply be sent; without one, in a feed and in a WebSocket, end now."""
        if self._socket is not None:
            self._socket.go_away()
        elif self._reader is not None:
            self._transport.close()
        elif not (self._left or self._is_waited_for or self._transport.is_closing()):
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


def _tell_of_a_bug(task: asyncio.Task[None]) -> None:
    """As asyncio does where a protocol fails."""
    if not task.cancelled() and (error := task.exception()) is not None:
        told = {"message": "a reply of the HTTP server failed", "exception": error, "task": task}
        asyncio.get_running_loop().call_exception_handler(told)


class _Crowd:
    """The open connections."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[_Connection, asyncio.Future[None]] = {}  # in order of arrival
        self._admitted: set[_Connection] = set()
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

    def admit(self, connection: _Connection) -> None:
        """It stays: it is not counted any more, and gives way to none."""
        self.leave(connection)
        self._admitted.add(connection)

    def leave(self, connection: _Connection) -> None:
        """Forget a connection that ended."""
        self._admitted.discard(connection)
        if (ended := self._open.pop(connection, None)) is not None and not ended.done():
            ended.set_result(None)

    async def disperse(self, grace_s: float) -> None:
        """End all connections, unfinished replies after `grace_s` at the latest, and accept no more."""
        self._dispersed = True
        for connection in [*self._open, *self._admitted]:
            connection.finish()
        try:
            if self._open:
                await asyncio.wait(self._open.values(), timeout=grace_s)
        finally:
            for connection in [*self._open, *self._admitted]:
                connection.drop()


class Web:
    """An HTTP server. Start it once.

    Attributes:
        tls: the context of connections that come from now on; None for plain HTTP.
    """

    def __init__(
        self,
        listen_host: str,
        listen_port: int,
        answer: Answer,
        *,
        setting: str = "KVM_LISTEN",
        limit_s: float = CONNECTION_LIMIT_S,
        connections: int = CONNECTIONS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Remember what to do; nothing is opened yet.

        Args:
            listen_host: an IP address; `0.0.0.0` or `::` for all interfaces (`::` takes IPv4 clients too).
            listen_port: TCP port; 0 for any free one.
            answer: makes the replies.
            setting: what the address comes from, for messages.
            limit_s: longest life of a connection, seconds; in a feed how long a client may read nothing.
            connections: the most open connections.
            tls: see the attribute.
        """
        self.tls = tls
        self._host = listen_host
        self._wanted_port = listen_port
        self._answer = answer
        self._setting = setting
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
        listener = listen(self._host, self._wanted_port, backlog=CONNECTIONS, setting=self._setting)
        self._port = listener.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(
            self._accepted,
            sock=listener,
            backlog=CONNECTIONS,
            start_serving=False,
        )
        await self._server.start_serving()

    def _accepted(self) -> _Connection:
        return _Connection(self._answer, self._crowd, self._limit_s, self.tls)

    async def close(self) -> None:
        """Stop listening, give unfinished replies `SHUTDOWN_GRACE_S`, and end all connections.

        May be called twice. When cancelled, ends the remaining connections at once.
        """
        if self._server is not None:
            self._server.close()
            self._server = None
            await self._crowd.disperse(SHUTDOWN_GRACE_S)
