"""Web servers of tests: real sockets, answers that a test writes byte by byte."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Site:
    """A server on loopback.

    Attributes:
        answers: how each path is answered; any other one with status 404. They may be changed while it runs.
        requests: the heads of the requests so far.
        open: how many connections it has now.
    """

    port: int = 0
    scheme: str = "http"
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    open: int = 0

    def url(self, path: str, *, user: str = "", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{user}{host}:{self.port}{path}"

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the other side of a connection brings about."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  the kernel tells nobody
                await asyncio.sleep(0.005)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head)
            await self.answers.get(head.split()[1].partition("?")[0], raw(b"HTTP/1.1 404 Not Found\r\n\r\n"))(writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def site(
    certificate: tuple[Path, Path] | None = None, *, address: str = "127.0.0.1", **answers: Answer
) -> AsyncIterator[Site]:
    """Run a server at an address of loopback; `user_data=…` answers the path `/user_data`."""
    made = Site(answers={f"/{name}": answer for name, answer in answers.items()})
    tls = None
    if certificate is not None:
        made.scheme = "https"
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(*certificate)
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(made.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, address, 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def raw(data: bytes) -> Answer:
    """Exactly these bytes, then the end of the connection."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


def ok(body: bytes, *headers: str) -> Answer:
    """Status 200 with this body."""
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def redirect(location: str, status: int = 302) -> Answer:
    """A redirect to `location`."""
    return raw(f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())


def reset(data: bytes) -> Answer:
    """These bytes, and then the connection is reset instead of closed."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    return answer


def drip(*pieces: bytes) -> Answer:
    """These pieces, then one byte after the other, for ever."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
        while not writer.is_closing():
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.write(b"x")

    return answer
