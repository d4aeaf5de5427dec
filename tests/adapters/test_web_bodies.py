"""The HTTP server where a reply is waited for, reads a body, or is sent over TLS: real sockets, on loopback."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.adapters.web import Later, Reply, Request, TooLarge, Unreadable, Web
from kvmsupervisor.adapters.web.exchange import Exchange
from tests.support.certificates import Authority

DEADLINE_S = 30.0
LIMIT = 1000


def said(text: str, status: HTTPStatus = HTTPStatus.OK) -> Reply:
    return Reply(status=status, body=text.encode(), content_type="text/plain")


async def echo(request: Request) -> Reply:
    """Says what it was sent, and by whom."""
    try:
        body = await request.body.read(LIMIT)
    except TooLarge as large:
        return said(str(large), HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    except Unreadable as unreadable:
        return said(str(unreadable), HTTPStatus.BAD_REQUEST)
    peer = request.peer
    return said(f"{body.decode()}|{peer.address}|{peer.secure}|{peer.certificate is not None}")


@asynccontextmanager
async def serving(answer: Callable[[Request], Reply | Later] = echo, **more: Any) -> AsyncIterator[Web]:
    web = Web("127.0.0.1", 0, answer, **more)
    await web.start()
    try:
        yield web
    finally:
        await web.close()


async def ask(web: Web, *pieces: bytes, half_close: bool = False, **more: Any) -> bytes:
    """Send pieces, each once the one before it is gone; return all that comes back."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port, **more)
        with closing(writer):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            if half_close:
                writer.write_eof()
            return await reader.read()


def post(body: bytes, *headers: bytes) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: h", length, *headers, b"", b""]) + body


class TestBody:
    """A body is what a handler asks for."""

    @pytest.mark.parametrize("size", [1, 7, 10_000])
    async def test_it_comes_in_pieces_of_any_size(self, size: int) -> None:
        """Together with the head, or drop by drop."""
        data = post(b"x" * 50)
        async with serving() as web:
            got = await ask(web, *(data[at : at + size] for at in range(0, len(data), size)))
        assert got.startswith(b"HTTP/1.1 200 ")
        assert got.endswith(b"x" * 50 + b"|127.0.0.1|False|False")

    async def test_chunks(self) -> None:
        """A client that does not know how long it will be."""
        head = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with serving() as web:
            assert b"\r\n\r\nabcde|" in await ask(web, head, b"3\r\nabc\r\n2\r\n", b"de\r\n0\r\n\r\n")
            assert b" 413 " in await ask(web, head, b"fff\r\n" + b"x" * 4095)
            assert b" 400 " in await ask(web, head, b"zz\r\n")

    async def test_one_that_is_announced_too_large_is_not_received(self) -> None:
        """Nor one that grows beyond what is taken."""
        async with serving() as web:
            assert b" 413 " in await ask(web, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1001\r\n\r\n")
            assert b" 200 " in await ask(web, post(b"x" * 1000))

    async def test_a_client_that_asks_first_is_told_to_go_on(self) -> None:
        """`Expect: 100-continue`, as curl sends it."""
        head, _, body = post(b"abc", b"Expect: 100-continue").partition(b"\r\n\r\n")
        async with serving() as web, asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            with closing(writer):
                writer.write(head + b"\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
                writer.write(body)
                assert b"abc|" in await reader.read()

    @pytest.mark.parametrize(
        "lengths", [b"Content-Length: 3\r\nContent-Length: 4", b"Content-Length: -1", b"Content-Length: 9" * 30]
    )
    async def test_lengths_that_mean_two_things(self, lengths: bytes) -> None:
        """Attack: a proxy in front reads another request than this server does."""
        async with serving() as web:
            got = await ask(web, b"POST / HTTP/1.1\r\nHost: h\r\n" + lengths + b"\r\n\r\nabcd")
        assert got.startswith(b"HTTP/1.1 400 ")

    async def test_a_client_that_breaks_off(self) -> None:
        """In the middle of a body: it is told, if it still listens."""
        async with serving() as web:
            assert b" 400 " in await ask(web, post(b"x" * 50)[:-10], half_close=True)

    async def test_what_nobody_reads_is_not_received(self) -> None:
        """Attack: a gigabyte to a path that wants nothing, or before it is known who sends it."""
        gate = asyncio.Event()

        async def wait(_request: Request) -> Reply:
            await gate.wait()
            return said("done")

        async with serving(wait) as web, asyncio.timeout(DEADLINE_S):
            sock = socket.create_connection(("127.0.0.1", web.port))
            sock.setblocking(False)
            sock.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n")
            sent = 0
            for _ in range(200):
                try:
                    sent += sock.send(b"x" * 1_000_000)
                except BlockingIOError:
                    await asyncio.sleep(0.005)
            gate.set()
            sock.close()
        assert sent < 20_000_000

    async def test_a_client_that_leaves_ends_what_it_waits_for(self) -> None:
        """And a slow body ends with its connection's time."""
        ended = asyncio.Event()

        async def wait(_request: Request) -> Reply:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return said("never")

        async with serving(wait) as web, asyncio.timeout(DEADLINE_S):
            _, writer = await asyncio.open_connection("127.0.0.1", web.port)
            writer.write(post(b""))
            await asyncio.sleep(0.05)
            # One that only ends its own direction may still listen: this one is gone.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            await ended.wait()
        async with serving(limit_s=0.1) as web, asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            writer.write(post(b"abc")[:-1])
            with pytest.raises(ConnectionError):
                await reader.read()
            writer.close()

    async def test_a_bug_costs_one_connection(self) -> None:
        """500; the next one is answered."""
        calls: list[str] = []

        async def broken(request: Request) -> Reply:
            calls.append(request.method)
            if len(calls) == 1:
                raise RuntimeError("a bug")
            return said("well")

        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with serving(broken) as web:
            assert (await ask(web, post(b""))).startswith(b"HTTP/1.1 500 ")
            assert (await ask(web, post(b""))).startswith(b"HTTP/1.1 200 ")
        assert told

    async def test_the_end_lets_a_reply_be_made(self) -> None:
        """What is waited for is given its time; not for ever."""
        begun = asyncio.Event()

        async def slow(_request: Request) -> Reply:
            begun.set()
            await asyncio.sleep(0.1)
            return said("done")

        async with serving(slow) as web:
            task = asyncio.create_task(ask(web, post(b"")))
            await begun.wait()
            await web.close()
            assert b"done" in await task

    def test_a_head_that_is_long_takes_no_body_for_it(self) -> None:
        """The limit of the head holds, also where a body comes with it."""

        def now(_request: Request) -> Reply:
            return said("ok")

        assert (Exchange(now).receive(post(b"x" * 100_000)) or b"").startswith(b"HTTP/1.1 200 ")
        assert (Exchange(now).receive(post(b"x", b"X: " + b"y" * 17_000)) or b"").startswith(b"HTTP/1.1 400 ")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


def server_context(authority: Authority, name: str = "server", **more: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(name))
    for key, value in more.items():
        setattr(context, key, value)
    return context


def client_context(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.certificate)


class TestTls:
    """The same over TLS."""

    async def test_no_piece_of_a_reply_waits_for_an_acknowledgement(self) -> None:
        """Nagle's algorithm is off for every connection: with TLS each reply took 40 ms more."""
        async with serving() as web, asyncio.timeout(DEADLINE_S):
            _, writer = await asyncio.open_connection("127.0.0.1", web.port)
            while not web._crowd._open:  # noqa: ASYNC110 - the kernel tells
                await asyncio.sleep(0.01)
            (one,) = web._crowd._open
            accepted = one._transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.transport.abort()

    async def test_requests_and_bodies(self, authority: Authority) -> None:
        """In one piece with the end of the handshake, or later."""
        async with serving(tls=server_context(authority)) as web:
            context = client_context(authority)
            for pieces in ([post(b"abc")], [post(b"abc")[:-3], b"a", b"bc"]):
                got = await ask(web, *pieces, ssl=context, server_hostname="localhost")
                assert got.endswith(b"abc|127.0.0.1|True|False")
            large = await ask(web, post(b"x" * 100_000), ssl=context, server_hostname="localhost")
            assert b" 413 " in large

    async def test_a_certificate_of_the_client(self, authority: Authority, tmp_path: Path) -> None:
        """Is told to who answers; one of another authority, or none, comes to nothing."""
        tls = server_context(authority)
        tls.load_verify_locations(authority.certificate)
        tls.verify_mode = ssl.CERT_REQUIRED
        context, stranger = client_context(authority), client_context(authority)
        context.load_cert_chain(*authority.issue("ops"))
        stranger.load_cert_chain(*Authority.make(tmp_path / "other").issue("ops"))
        async with serving(tls=tls) as web:
            got = await ask(web, post(b"a"), ssl=context, server_hostname="localhost")
            assert got.endswith(b"a|127.0.0.1|True|True")
            for other in (client_context(authority), stranger):
                got = b""
                # TLS 1.3 tells a client of that only after its own part of the handshake.
                with suppress(OSError):
                    got = await ask(web, post(b"a"), ssl=other, server_hostname="localhost")
                assert got == b""

    async def test_another_context_is_for_the_next_connection(self, authority: Authority) -> None:
        """A certificate is renewed without anything that ends."""
        async with serving(tls=server_context(authority)) as web, asyncio.timeout(DEADLINE_S):
            context = client_context(authority)
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", web.port, ssl=context, server_hostname="localhost"
            )
            web.tls = server_context(authority, "renewed")
            writer.write(post(b"old"))
            assert b"old|" in await reader.read()
            _, other = await asyncio.open_connection("127.0.0.1", web.port, ssl=context, server_hostname="localhost")
            subject = other.get_extra_info("peercert")["subject"]
            assert subject == ((("commonName", "renewed"),),)
            for one in (writer, other):
                one.transport.abort()
            # Also what it asks of clients: not only the certificate is another one.
            strict = server_context(authority)
            strict.load_verify_locations(authority.certificate)
            strict.verify_mode = ssl.CERT_REQUIRED
            web.tls = strict
            got = b""
            with suppress(OSError):
                got = await ask(web, post(b"a"), ssl=context, server_hostname="localhost")
            assert got == b""

    async def test_who_does_not_shake_hands_is_dropped(self, authority: Authority) -> None:
        """Attacks: plain HTTP, rubbish, silence, and more of that than there may be connections; no line in the log."""
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with serving(tls=server_context(authority), connections=4) as web, asyncio.timeout(DEADLINE_S):
            for rubbish in (post(b"a"), b"\0" * 100, b"\x16\x03\x01\xff\xff" + b"x" * 70_000):
                got = b""
                with suppress(ConnectionError):
                    got = await ask(web, rubbish)
                assert b"HTTP" not in got
            silent = [await asyncio.open_connection("127.0.0.1", web.port) for _ in range(12)]
            await asyncio.sleep(0.05)
            assert len(web._crowd._open) <= 4
            context = client_context(authority)
            assert b"a|" in await ask(web, post(b"a"), ssl=context, server_hostname="localhost")
            for _, writer in silent:
                writer.transport.abort()
        assert told == []
