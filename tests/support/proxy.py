"""TCP proxies that lose things, to stand between a client and its server or between etcd's members.

Held bytes are kept, not dropped: after `heal` they flow on, as TCP's retransmissions would after a network
that lost packets came back.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Self

_CHUNK = 65536


class Link:
    """One proxied connection. Both directions flow until they are held."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.requests = asyncio.Event()
        self.replies = asyncio.Event()
        self.requests.set()
        self.replies.set()


class Proxy:
    """Forwards one loopback port to another.

    Args:
        identify: names who connects, from the first bytes that came; default: nobody in particular.
    """

    def __init__(self, identify: Callable[[bytes], str] = lambda _: "") -> None:
        self.target = 0
        self.port = 0
        self.links: set[Link] = set()
        self.on_link: Callable[[Link], None] = lambda _: None
        self._identify = identify
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        """Listen on a free port, until the end of the block."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def hole(self) -> None:
        """Let nothing through any more, in either direction, while every connection seems to live."""
        self.on_link = _hold
        for link in self.links:
            _hold(link)

    def lose_replies(self) -> None:
        """Let nothing back to the clients; what they send arrives."""
        self.on_link = lambda link: link.replies.clear()
        for link in self.links:
            link.replies.clear()

    def heal(self) -> None:
        """Let everything through, what was held included."""
        self.on_link = lambda _: None
        for link in self.links:
            link.requests.set()
            link.replies.set()

    def cut(self) -> None:
        """Close every connection; what was held is lost."""
        for task in self._tasks:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._forward(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(_CHUNK)
        link = Link(self._identify(first))
        self.links.add(link)
        self.on_link(link)
        try:
            await link.requests.wait()
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self.target)
            try:
                back_writer.write(first)
                async with asyncio.TaskGroup() as group:
                    there = group.create_task(_pump(reader, back_writer, link.requests))
                    back = group.create_task(_pump(back_reader, writer, link.replies))
                    # Whichever side ends first ends both.
                    there.add_done_callback(lambda _: back.cancel())
                    back.add_done_callback(lambda _: there.cancel())
            finally:
                back_writer.close()
        finally:
            self.links.discard(link)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            await gate.wait()
            writer.write(data)
            await writer.drain()


def _hold(link: Link) -> None:
    link.requests.clear()
    link.replies.clear()


class PeerNetwork:
    """Proxies between etcd's members, one before each, from which single members can be cut off.

    Who connects is known by a header of etcd's peer protocol (`X-Server-From`, the member's id in hex).
    """

    def __init__(self, size: int) -> None:
        self.proxies = [Proxy(_peer_id) for _ in range(size)]
        self._names: dict[str, int] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[PeerNetwork]:
        """Listen for all members."""
        async with contextlib.AsyncExitStack() as stack:
            for proxy in self.proxies:
                await stack.enter_async_context(proxy.running())
            yield self

    def name(self, ids: dict[str, int]) -> None:
        """Say which member has which id."""
        self._names = ids

    def cut_off(self, member: int) -> None:
        """Hold everything between `member` and the others."""
        for target, proxy in enumerate(self.proxies):
            if target == member:
                proxy.hole()
            else:
                proxy.on_link = self._holding_from(member)
                for link in self._links_from(proxy, member):
                    _hold(link)

    def heal(self) -> None:
        """Let everything through."""
        for proxy in self.proxies:
            proxy.heal()

    def _holding_from(self, member: int) -> Callable[[Link], None]:
        def judge(link: Link) -> None:
            if self._names.get(link.source) == member:
                _hold(link)

        return judge

    def _links_from(self, proxy: Proxy, member: int) -> Iterator[Link]:
        return (link for link in proxy.links if self._names.get(link.source) == member)


class Line:
    """One host's way to several servers, for tests that block: a proxy before each, in a thread of their own."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = tuple(ports)
        self._proxies: list[Proxy] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._over.set)
        self._thread.join()

    @property
    def ports(self) -> list[int]:
        """To connect to, in the order of the servers."""
        return [proxy.port for proxy in self._proxies]

    def cut(self) -> None:
        """Let nothing through any more, while every connection seems to live."""
        for proxy in self._proxies:
            self._do(proxy.hole)

    def heal(self) -> None:
        """Let everything through, what was held included."""
        for proxy in self._proxies:
            self._do(proxy.heal)

    def _do(self, what: Callable[[], object]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(what)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            for port in self._ports:
                proxy = await stack.enter_async_context(Proxy().running())
                proxy.target = port
                self._proxies.append(proxy)
            self._ready.set()
            await self._over.wait()


def _peer_id(first: bytes) -> str:
    found = re.search(rb"X-Server-From: ([0-9a-f]+)", first)
    return found[1].decode() if found else ""
