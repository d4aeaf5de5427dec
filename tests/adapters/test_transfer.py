"""The connection between two supervisors, on the loopback: real TLS, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest

from kvmsupervisor.adapters.transfer import GREETING_LIMIT, Connection, Listener, TransferFailed, call

KEY, OTHER = b"k" * 32, b"o" * 32
SOON_S = 30.0


@contextlib.asynccontextmanager
async def listening(keys: dict[str, bytes]) -> AsyncIterator[tuple[Listener, asyncio.Queue[Connection]]]:
    calls: asyncio.Queue[Connection] = asyncio.Queue()
    listener = Listener("127.0.0.1", 0, key_of=keys.get, on_call=calls.put_nowait)
    task = asyncio.create_task(listener.run())
    try:
        yield listener, calls
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        listener.close()


async def pair(keys: dict[str, bytes]) -> tuple[Connection, Connection]:
    async with listening(keys) as (listener, calls):
        source = await call("127.0.0.1", listener.port, instance="1", key=KEY, timeout_s=SOON_S)
        return source, await calls.get()


async def test_messages_go_both_ways() -> None:
    """What one side sends the other one gets, of any size that is allowed."""
    source, target = await pair({"1": KEY})
    assert target.instance == "1"
    medium = "x" * 3_000_000
    _, heard = await asyncio.gather(source.send({"medium": medium}, timeout_s=SOON_S), target.receive(timeout_s=SOON_S))
    assert heard == {"medium": medium}
    await target.send({"ready": True}, timeout_s=SOON_S)
    assert await source.receive(timeout_s=SOON_S) == {"ready": True}
    assert source.is_alive
    target.close()
    with pytest.raises(TransferFailed):
        await source.receive(timeout_s=SOON_S)
    assert not source.is_alive
    source.close()


@pytest.mark.parametrize("keys", [{"1": OTHER}, {"2": KEY}, {}], ids=["another key", "another guest", "no offer"])
async def test_who_does_not_know_the_key_is_not_heard(keys: dict[str, bytes]) -> None:
    """Neither side talks to one that has another key, and the next one is heard."""
    async with listening(keys) as (listener, calls):
        with pytest.raises(TransferFailed):
            await call("127.0.0.1", listener.port, instance="1", key=KEY, timeout_s=SOON_S)
        keys["1"] = KEY
        source = await call("127.0.0.1", listener.port, instance="1", key=KEY, timeout_s=SOON_S)
        (await calls.get()).close()
        source.close()
        assert calls.empty()


async def test_who_stands_in_between_is_found_out() -> None:
    """A relay that speaks TLS to each side has two connections, and the proof of one is none for the other."""
    heard: list[bytes] = []
    async with listening({"1": KEY}) as (listener, calls):
        port = listener.port

        class Between(Listener):
            def _greet(self, plain: socket.socket) -> Connection:
                plain.settimeout(SOON_S)
                tls = self._context.wrap_socket(plain, server_side=True)
                said = tls.recv(GREETING_LIMIT)
                heard.append(said)
                with socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as onward:
                    from kvmsupervisor.adapters import transfer  # noqa: PLC0415 - the attacker's own TLS

                    inner = transfer._context(is_server=False).wrap_socket(onward)
                    with inner, tls:
                        inner.sendall(said)
                        tls.sendall(inner.recv(GREETING_LIMIT))
                raise TransferFailed("done")

        between = Between("127.0.0.1", 0, key_of=lambda _: None, on_call=lambda _: None)
        task = asyncio.create_task(between.run())
        with pytest.raises(TransferFailed):
            await call("127.0.0.1", between.port, instance="1", key=KEY, timeout_s=SOON_S)
        task.cancel()
        between.close()
        assert heard
        assert calls.empty()


async def test_strangers_cost_no_more_than_their_turn() -> None:
    """Who says nothing, or nonsense, or too much, keeps nobody out for longer than a greeting may take."""
    async with listening({"1": KEY}) as (listener, calls):
        with contextlib.ExitStack() as stack:
            for junk in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(100)):
                mute = stack.enter_context(socket.create_connection(("127.0.0.1", listener.port)))
                mute.sendall(junk)
            source = await call("127.0.0.1", listener.port, instance="1", key=KEY, timeout_s=SOON_S)
            (await calls.get()).close()
            source.close()


async def test_what_a_qemu_sends_is_carried() -> None:
    """Both directions, all of it, and an end after the last byte."""
    source, target = await pair({"1": KEY})
    over = [asyncio.Event(), asyncio.Event()]
    relays = [source.carry(over[0].set), target.carry(over[1].set)]
    sender, receiver = (relay.qemus_end for relay in relays)
    data = os.urandom(3_000_000)

    def send() -> None:
        sender.sendall(data)
        assert sender.recv(4) == b"done"
        sender.close()

    def receive() -> bytes:
        found = bytearray()
        while len(found) < len(data):
            found += receiver.recv(1 << 20)
        receiver.sendall(b"done")
        assert receiver.recv(1) == b""
        receiver.close()
        return bytes(found)

    _, found = await asyncio.gather(asyncio.to_thread(send), asyncio.to_thread(receive))
    assert found == data
    await asyncio.gather(*(one.wait() for one in over))
    assert relays[0].carried == len(data) + 4
    assert all(relay.is_over for relay in relays)


async def test_a_cut_is_noticed_at_once() -> None:
    """Both QEMUs read an end, also while one of them does not read."""
    source, target = await pair({"1": KEY})
    over = [asyncio.Event(), asyncio.Event()]
    relays = [source.carry(over[0].set), target.carry(over[1].set)]
    relays[0].qemus_end.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            relays[0].qemus_end.send(bytes(1 << 20))
            await asyncio.sleep(0)
    relays[0].cut()
    await asyncio.gather(*(one.wait() for one in over))
    for relay in relays:
        relay.qemus_end.close()
