"""What every connection between supervisors does: the same laws for real sockets and for the fake of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import pytest

from kvmsupervisor.adapters import transfer
from kvmsupervisor.adapters.transfer import TransferFailed
from kvmsupervisor.machine.system import Connection, Transfers
from tests.fakes.clock import FakeClock, settle
from tests.fakes.migration import Descriptors, FakeSocket
from tests.fakes.transfer import FakeNet, FakeTransfers

KEY, OTHER = b"k" * 32, b"o" * 32
LIMIT_S = 30.0

T = TypeVar("T")


class Qemu(Protocol):
    """A QEMU's end of a relay: what it sends are single letters."""

    heard: str
    is_over: bool

    def say(self, letter: str) -> None: ...
    def hang_up(self) -> None: ...


class FakeEnd:
    def __init__(self, end: FakeSocket) -> None:
        self.heard, self.is_over = "", False
        self._end = end
        end.heard, end.ended = self._hear, self._ends

    def _hear(self, part: object) -> None:
        self.heard += str(part)

    def _ends(self) -> None:
        self.is_over = True

    def say(self, letter: str) -> None:
        self._end.send(letter)

    def hang_up(self) -> None:
        self._end.shut_down()


class RealEnd:
    def __init__(self, end: socket.socket) -> None:
        self.heard, self.is_over = "", False
        self._end = socket.socket(fileno=end.detach())
        self._end.setblocking(False)
        asyncio.get_running_loop().add_reader(self._end, self._read)

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(ConnectionError):
            data = self._end.recv(4096)
        self.heard += data.decode()
        if not data:
            self.is_over = True
            asyncio.get_running_loop().remove_reader(self._end)

    def say(self, letter: str) -> None:
        self._end.send(letter.encode())

    def hang_up(self) -> None:
        asyncio.get_running_loop().remove_reader(self._end)
        self._end.close()
        self.is_over = True


class Place:
    """Two hosts, and a way between them."""

    source: Transfers
    target: Transfers
    address: str
    end: Callable[[Any], Qemu]

    def __init__(self, kind: str) -> None:
        self.clock: FakeClock | None = None
        if kind == "fake":
            self.clock = FakeClock()
            net = FakeNet(self.clock)
            self.source, self.target = (FakeTransfers(net, Descriptors(), name) for name in "ab")
            self.address, self.port, self.end = "192.0.2.1", 9747, FakeEnd
        else:
            self.source = self.target = transfer
            self.address, self.port, self.end = "127.0.0.1", 0, RealEnd
        self.calls: list[Connection] = []

    async def until(self, true: Callable[[], object]) -> None:
        if self.clock is not None:
            await self.clock.advance_until(true, LIMIT_S)
            await settle()
            return
        async with asyncio.timeout(LIMIT_S):
            while not true():  # noqa: ASYNC110 - it happens in threads
                await asyncio.sleep(0.01)

    async def done(self, awaitable: Awaitable[T]) -> T:
        task = asyncio.ensure_future(awaitable)
        await self.until(task.done)
        return task.result()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        listener = self.target.listen(self.address, self.port, key_of={"1": KEY}.get, on_call=self.calls.append)
        running = asyncio.create_task(listener.run())
        try:
            yield listener.port
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            listener.close()

    async def call(self, port: int, *, instance: str = "1", key: bytes = KEY) -> Connection:
        return await self.done(self.source.call(self.address, port, instance=instance, key=key, timeout_s=LIMIT_S))

    async def pair(self) -> tuple[Connection, Connection]:
        async with self.listening() as port:
            mine = await self.call(port)
            await self.until(lambda: self.calls)
        return mine, self.calls[0]


@pytest.fixture(params=["fake", "real"])
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param)


async def test_messages_and_the_end_of_them(place: Place) -> None:
    """Both ways, in order; then one side hangs up, and the other one learns that."""
    mine, theirs = await place.pair()
    assert (mine.instance, theirs.instance) == ("1", "1")
    assert mine.is_alive
    assert theirs.is_alive
    for number in (1, 2):
        await place.done(mine.send({"number": number}, timeout_s=LIMIT_S))
    for number in (1, 2):
        assert await place.done(theirs.receive(timeout_s=LIMIT_S)) == {"number": number}
    await place.done(theirs.send({"ready": True}, timeout_s=LIMIT_S))
    assert await place.done(mine.receive(timeout_s=LIMIT_S)) == {"ready": True}
    theirs.close()
    await place.until(lambda: not mine.is_alive)
    with pytest.raises(TransferFailed):
        await place.done(mine.receive(timeout_s=LIMIT_S))
    mine.close()


@pytest.mark.parametrize("wrong", [{"key": OTHER}, {"instance": "2"}])
async def test_who_is_not_expected_is_not_heard(place: Place, wrong: dict[str, Any]) -> None:
    async with place.listening() as port:
        with pytest.raises(TransferFailed):
            await place.call(port, **wrong)
    assert place.calls == []


async def test_nobody_listens(place: Place) -> None:
    async with place.listening() as port:
        pass
    with pytest.raises(TransferFailed):
        await place.call(port)


async def test_what_qemus_say_is_carried(place: Place) -> None:
    """Both ways; what one has said before it hangs up is heard first, and then both relays are over."""
    mine, theirs = await place.pair()
    ends: list[str] = []
    relays = mine.carry(lambda: ends.append("mine")), theirs.carry(lambda: ends.append("theirs"))
    source, target = (place.end(relay.qemus_end) for relay in relays)
    source.say("a")
    await place.until(lambda: target.heard == "a")
    target.say("b")
    await place.until(lambda: source.heard == "b")
    source.say("c")
    source.hang_up()
    await place.until(lambda: target.is_over and len(ends) == 2)
    assert target.heard == "ac"
    target.hang_up()
    assert all(relay.is_over for relay in relays)


async def test_a_relay_is_cut(place: Place) -> None:
    """Both QEMUs notice at once."""
    mine, theirs = await place.pair()
    relays = mine.carry(lambda: None), theirs.carry(lambda: None)
    source, target = (place.end(relay.qemus_end) for relay in relays)
    relays[0].cut()
    await place.until(lambda: source.is_over and target.is_over)
    await place.until(lambda: all(relay.is_over for relay in relays))
    source.hang_up()
    target.hang_up()
