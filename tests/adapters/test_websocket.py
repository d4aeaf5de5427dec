"""WebSockets of the server: real sockets on loopback, against a client by the same library and bytes by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import TypeVar

import pytest

from kvmsupervisor.adapters.web import Reply, Request, Web
from kvmsupervisor.adapters.web import websocket as module
from kvmsupervisor.adapters.web.websocket import TEXT_LIMIT, WebSocket
from tests.support.websocket import Client, Rejected

T = TypeVar("T")

OPENED: list[WebSocket] = []
SERVED: list[str] = []


async def echo(browser: WebSocket) -> None:
    OPENED.append(browser)
    try:
        while True:
            await browser.send(await browser.receive())
    finally:
        SERVED.append("closed")


async def flood(browser: WebSocket) -> None:
    """Sends for ever; counts what was taken."""
    OPENED.append(browser)
    while True:
        await browser.send(b"x" * 65536)
        SERVED.append("sent")


async def deaf(browser: WebSocket) -> None:
    """Takes nothing."""
    OPENED.append(browser)
    await asyncio.get_running_loop().create_future()


async def broken(_browser: WebSocket) -> None:
    raise ValueError("a bug")


SOCKETS = {"/echo": echo, "/flood": flood, "/deaf": deaf, "/broken": broken}


async def answer(request: Request) -> Reply:
    if (serve := SOCKETS.get(request.path)) is not None:
        return Reply(status=HTTPStatus.SWITCHING_PROTOCOLS, body=b"", content_type="text/plain", socket=serve)
    return Reply(status=HTTPStatus.OK, body=b"plain\n", content_type="text/plain")


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    OPENED.clear()
    SERVED.clear()
    made = Web("127.0.0.1", 0, answer)
    await made.start()
    yield made
    await made.close()


async def apart(work: Callable[[], T]) -> T:
    """Run what waits for the server in a thread."""
    return await asyncio.to_thread(work)


async def becomes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.005)


async def test_messages_go_both_ways(web: Web) -> None:
    """Law: bytes and text come as what they were; a goodbye is answered, and ends what serves it."""

    def talk() -> None:
        with Client.connect(web.port, "/echo") as client:
            client.send(b"\x00\xff")
            client.until(b"\x00\xff")
            client.send('{"a": "ä"}')
            assert client.hears(a="ä") == {"a": "ä"}

    await apart(talk)
    await becomes(lambda: SERVED == ["closed"])


@pytest.mark.parametrize(
    "head",
    [
        b"GET /echo HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a\r\n"
        b"Sec-WebSocket-Version: 8\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: \xff\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n",
    ],
)
async def test_who_does_not_ask_for_one_gets_none(web: Web, head: bytes) -> None:
    """Law: told so with a status of HTTP, and nothing of it serves."""
    reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
    writer.write(head)
    got = await reader.read()
    assert got.startswith((b"HTTP/1.1 426 ", b"HTTP/1.1 400 "))
    writer.close()
    await writer.wait_closed()
    assert OPENED == []


async def test_what_is_no_websocket_path_stays_http(web: Web) -> None:
    """Law: a request for a WebSocket where there is none is answered as any other."""

    def ask() -> int:
        with pytest.raises(Rejected) as refused:
            Client.connect(web.port, "/plain")
        return refused.value.status

    assert await apart(ask) == 200


def frame(opcode: int, payload: bytes, *, fin: bool = True, length: int | None = None) -> bytes:
    """A masked frame as a client sends it, with any length in its head."""
    size = len(payload) if length is None else length
    head = bytes([opcode | (0x80 if fin else 0)])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 1 << 16:
        head += bytes([0x80 | 126]) + struct.pack(">H", size)
    else:
        head += bytes([0x80 | 127]) + struct.pack(">Q", size)
    return head + bytes(4) + payload


async def test_a_long_text_ends_it(web: Web) -> None:
    """Law: more than the limit is refused with 1009, in one message or in pieces."""

    def talk(pieces: int) -> int:
        with Client.connect(web.port, "/echo") as client:
            part = b"x" * (TEXT_LIMIT // pieces + 1)
            for number in range(pieces):
                client.end.sendall(frame(0 if number else 1, part, fin=number == pieces - 1))
            return client.the_end().code

    assert await apart(lambda: talk(1)) == 1009
    assert await apart(lambda: talk(4)) == 1009


@pytest.mark.parametrize(
    "sent",
    [
        frame(0x3, b"x"),
        bytes([0x81, 0x01]) + b"x",  # not masked
        frame(0x9, b"x" * 126),
        frame(0x1, b"\xff\xff"),
        frame(0x0, b"x"),
        bytes([0xC1, 0x80, 0, 0, 0, 0]),  # an extension that was not agreed on
    ],
)
async def test_nonsense_ends_it(web: Web, sent: bytes) -> None:
    """Law: what is no WebSocket ends the connection, with a code that says so."""

    def talk() -> int:
        with Client.connect(web.port, "/echo") as client:
            client.end.sendall(sent)
            return client.the_end().code

    assert await apart(talk) in {1002, 1007}
    await becomes(lambda: SERVED == ["closed"])


async def test_a_length_costs_nothing(web: Web) -> None:
    """Law: bytes are handed on as they come, whatever length the client announces."""

    def talk() -> None:
        with Client.connect(web.port, "/echo") as client:
            client.end.sendall(frame(0x2, b"first", length=1 << 62))
            client.until(b"first")
            client.end.sendall(b"second")
            client.until(b"second")

    await apart(talk)


async def test_a_client_that_reads_nothing(web: Web) -> None:
    """Law: what is sent to it waits, and costs a piece of memory; when it reads again, it goes on."""
    client = await apart(lambda: Client.connect(web.port, "/flood"))
    await becomes(lambda: bool(OPENED) and OPENED[0]._paused)
    kept, sent = OPENED[0]._transport.get_write_buffer_size(), len(SERVED)
    await asyncio.sleep(0.05)
    assert len(SERVED) == sent
    assert kept < 1 << 20
    for _ in range(50):
        await apart(client.more)
    await becomes(lambda: len(SERVED) > sent)
    client.end.close()


async def test_a_server_that_takes_nothing(web: Web) -> None:
    """Law: nothing more is received while what came is not taken."""

    def fill() -> int:
        sent = 0
        with Client.connect(web.port, "/deaf") as client:
            client.end.settimeout(1.0)
            with contextlib.suppress(TimeoutError):
                for _ in range(2000):
                    client.end.sendall(frame(0x2, b"x" * 32768))
                    sent += 32768
        return sent

    assert await apart(fill) < 32 << 20
    assert OPENED[0]._unread < 1 << 20


async def test_one_that_is_silent_is_dropped(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: asked whether it lives at each beat; who answers nothing for two of them is dropped, who does stays."""
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(WebSocket.__init__, "__kwdefaults__", {"beat_s": 0.05})
    silent = await apart(lambda: Client.connect(web.port, "/echo"))
    lively = await apart(lambda: Client.connect(web.port, "/echo"))

    def answer_pings() -> None:
        for _ in range(8):
            lively.more()

    await apart(answer_pings)

    def read_to_the_end() -> bytes:
        got = b""
        with contextlib.suppress(OSError):
            while data := silent.end.recv(1 << 16):
                got += data
        return got

    assert b"\x89\x00" in await apart(read_to_the_end)
    lively.send(b"still here")
    await apart(lambda: lively.until(b"still here"))
    lively.end.close()
    silent.end.close()


async def test_a_server_that_ends_says_so(web: Web) -> None:
    """Law: 1001, and the reason."""
    client = await apart(lambda: Client.connect(web.port, "/deaf"))
    closing = asyncio.ensure_future(web.close())
    ended = await apart(client.the_end)
    assert (ended.code, ended.reason) == (1001, "this page's server ends")
    await closing
    client.end.close()


async def test_a_bug_ends_one_only(web: Web) -> None:
    """Law: 1011 for that one; the others go on, and the error is logged with its traceback."""
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context.get("exception")))
    other = await apart(lambda: Client.connect(web.port, "/echo"))

    def talk() -> int:
        with Client.connect(web.port, "/broken") as client:
            return client.the_end().code

    assert await apart(talk) == 1011
    other.send(b"on")
    await apart(lambda: other.until(b"on"))
    other.end.close()


async def test_they_are_not_among_those_that_give_way(web: Web) -> None:
    """Law: a crowd of connections ends no WebSocket."""
    client = await apart(lambda: Client.connect(web.port, "/echo"))
    crowd = await apart(lambda: [socket.create_connection(("127.0.0.1", web.port)) for _ in range(80)])
    await asyncio.sleep(0.05)
    client.send(b"on")
    await apart(lambda: client.until(b"on"))
    for one in crowd:
        one.close()
    client.end.close()


async def test_what_is_sent_early_is_not_lost(web: Web) -> None:
    """Law: bytes that come with the request are the WebSocket's first ones."""
    reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
    head = (
        b"GET /echo HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    writer.write(head + frame(0x2, b"early"))
    got = await reader.readuntil(b"\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 101 ")
    assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in got  # of RFC 6455, 1.3
    assert await reader.readexactly(7) == b"\x82\x05early"
    writer.close()
    await writer.wait_closed()
