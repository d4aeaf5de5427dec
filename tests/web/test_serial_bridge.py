"""A serial console in a browser: what a browser that stalls costs, and what a guest that does not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from kvmsupervisor.adapters.descriptors import Carrier
from kvmsupervisor.adapters.web.websocket import WebSocket
from kvmsupervisor.domain.consoles import ConsoleKind, ConsoleRequest
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.web.console_door import Door, NoConsole
from kvmsupervisor.web.serial_bridge import BACKLOG_BYTES, WAITING_BYTES, WINDOW_BYTES, SerialBridge
from tests.fakes.clock import FakeClock

REQUEST = ConsoleRequest(kind=ConsoleKind.SERIAL, instance=InstanceId("one"), who="alice")


class Browser:
    """A WebSocket whose person reads while `reads` is set, and types what is put into `typed`."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.seen = bytearray()
        self.told: list[dict[str, Any]] = []
        self.typed: asyncio.Queue[bytes | str] = asyncio.Queue()

    async def send(self, message: bytes | str) -> None:
        await self.reads.wait()
        if isinstance(message, str):
            self.told.append(json.loads(message))
        else:
            self.seen += message

    async def receive(self) -> bytes | str:
        return await self.typed.get()


class Bench:
    """A bridge between a browser and a supervisor that the test plays."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "console.log"
        self.log.touch()
        self.browser = Browser()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.supervisor = Carrier(ours, limit=4096)
        self.qemu, self._line = socket.socketpair()
        self.qemu.setblocking(False)
        bench = self

        class Known:
            asked = 0

            async def ask(self, _request: ConsoleRequest) -> Carrier:
                bench.asked += 1
                if bench.asked > 1:
                    raise NoConsole("away")
                return Carrier(theirs, limit=4096)

        self.asked = 0
        self.clock = FakeClock()
        self.bridge = SerialBridge(cast("WebSocket", self.browser), cast("Door", Known()), REQUEST, self.clock)

    async def tell(self, *, fd: int | None = None, **message: object) -> None:
        await self.supervisor.send(json.dumps(message).encode(), fd=fd, timeout_s=5)

    async def hand_log(self) -> None:
        fd = os.open(self.log, os.O_RDONLY)
        await self.tell(fd=fd, **{"is": "log"})
        os.close(fd)

    async def plug(self) -> None:
        await self.tell(fd=self._line.fileno(), **{"is": "keyboard", "yours": True})
        self._line.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    running = asyncio.ensure_future(made.bridge.run())
    yield made
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError, NoConsole):
        await running
    made.supervisor.close()
    made.qemu.close()
    made._line.close()


async def becomes(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.005)


async def test_a_browser_that_stalls_holds_up_no_guest(bench: Bench) -> None:
    """Requirement 9: what QEMU sends is read all the same, nothing of it is kept, and the log is read on from there."""
    await bench.hand_log()
    await bench.plug()
    await becomes(lambda: bench.browser.told == [{"is": "keyboard", "yours": True}])
    bench.browser.reads.clear()
    loop, piece = asyncio.get_running_loop(), b"x" * 65536
    async with asyncio.timeout(20):
        for _ in range(160):
            await loop.sock_sendall(bench.qemu, piece)
    with bench.log.open("ab") as log:
        log.write(piece * 160)
    assert len(bench.browser.seen) < 1 << 20
    bench.browser.reads.set()
    await becomes(lambda: len(bench.browser.seen) == 160 * len(piece))


async def test_a_terminal_that_falls_behind(bench: Bench) -> None:
    """Law: once it says how far it is, no more than a window is on its way; a mebibyte is no loss of the rest."""
    await bench.hand_log()
    bench.browser.typed.put_nowait('{"shown": 0}')
    await becomes(lambda: bench.bridge._seen == 0)
    with bench.log.open("ab") as log:
        log.write(b"x" * (5 << 20))
    await becomes(lambda: len(bench.browser.seen) > WINDOW_BYTES)
    await asyncio.sleep(0.3)
    assert len(bench.browser.seen) <= WINDOW_BYTES + (1 << 16)
    for text in ('{"shown": -1}', '{"shown": "all"}', '{"shown": 2097152}'):
        bench.browser.typed.put_nowait(text)
    await becomes(lambda: len(bench.browser.seen) > 3 << 20)
    bench.browser.typed.put_nowait(f'{{"shown": {5 << 20}}}')
    await becomes(lambda: len(bench.browser.seen) == 5 << 20)


async def test_a_guest_that_does_not_read(bench: Bench) -> None:
    """Law: what is typed waits, so much of it and no more, and is dropped when the keyboard goes."""
    await bench.hand_log()
    await bench.plug()
    await becomes(lambda: bool(bench.browser.told))
    for _ in range(100):
        bench.browser.typed.put_nowait(b"y" * 16384)
    await becomes(bench.browser.typed.empty)
    assert len(bench.bridge._waiting) <= WAITING_BYTES
    await bench.supervisor.send(b'{"is": "keyboard", "lost": "bob"}', timeout_s=5)
    await becomes(lambda: len(bench.browser.told) == 2)
    assert not bench.bridge._waiting
    assert bench.bridge._line is None


async def test_what_came_before_is_shown_without_orders_to_the_terminal(bench: Bench) -> None:
    """Law: the end of the log before and of the log; old questions to a terminal would be answered into the guest."""
    older = bench.log.with_name("console.log.1")
    older.write_bytes(b"cut line\n" * 40000 + b"older\r\n")
    bench.log.write_bytes(b"\x1b[6n\x1b]0;title\x07\x1b[31mred\x1b[0m\r\n")
    fd = os.open(older, os.O_RDONLY)
    await bench.tell(fd=fd, **{"is": "older"})
    os.close(fd)
    await bench.hand_log()
    await becomes(lambda: b"red\r\n" in bench.browser.seen)
    assert bench.browser.seen.endswith(b"older\r\nred\r\n")
    assert bench.browser.seen.startswith(b"cut line\n")
    assert len(bench.browser.seen) < BACKLOG_BYTES + 64
    with bench.log.open("ab") as log:
        log.write(b"\x1b[32mnew")
    await becomes(lambda: bench.browser.seen.endswith(b"\x1b[32mnew"))


async def test_wishes_reach_the_supervisor_and_nothing_else_does(bench: Bench) -> None:
    """Law: of what a browser says as text only these two are passed on, written anew."""
    for text in ('{"take": true, "instance": "other"}', "[", '{"console": "display"}', '{"release": true}'):
        bench.browser.typed.put_nowait(text)
    heard = [(await bench.supervisor.receive())[0] for _ in range(2)]
    assert heard == [b'{"take": true}', b'{"release": true}']


async def test_a_supervisor_that_refuses_and_one_that_stays_away(bench: Bench, tmp_path: Path) -> None:
    """Law: told in its words; one that was there is asked again for a minute, and no longer."""
    await bench.hand_log()
    bench.supervisor.close()
    await becomes(lambda: bench.browser.told == [{"is": "supervisor", "lost": True}])
    await bench.clock.advance(30)
    assert 20 < bench.asked < 40
    await bench.clock.advance(40)
    other = Bench(tmp_path)
    running = asyncio.ensure_future(other.bridge.run())
    await other.supervisor.send(b'{"refused": "one is not on this host"}', timeout_s=5)
    with pytest.raises(NoConsole, match="one is not on this host"):
        await running
    other.supervisor.close()
    other.qemu.close()
    other._line.close()
