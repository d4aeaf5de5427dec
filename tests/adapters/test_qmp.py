"""QMP: what becomes of a command, the order of events and loss, with a scripted server and with the real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.adapters.qmp import (
    BYTES_PER_S,
    MESSAGE_LIMIT,
    TURN_MESSAGES,
    Monitor,
    MonitorLost,
    MonitorRefused,
    MonitorSilent,
)

LIMIT_S = 5.0
SHORT_S = 0.05
"""The deadline of calls that shall run into it."""

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}
Answer = Callable[["Server", dict[str, Any]], Awaitable[None]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="kvs"))
    yield made
    shutil.rmtree(made)


class Server:
    """A QMP server that greets, agrees to the capabilities, and leaves every other command to `answer`."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "qmp.sock")
        self.greeting: bytes | None = json.dumps(GREETING).encode() + b"\n"
        self.answer: Answer = Server.done
        self.commands: list[str] = []
        self.clients = 0
        self.writer: asyncio.StreamWriter

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.clients += 1
        try:
            if self.greeting is not None:
                writer.write(self.greeting)
            # A client puts nothing between its messages.
            decoder, text = json.JSONDecoder(), ""
            while data := await reader.read(65536):
                text += data.decode()
                with contextlib.suppress(json.JSONDecodeError):
                    while text:
                        request, end = decoder.raw_decode(text)
                        text = text[end:]
                        await self.take(request)
        except ConnectionError:
            pass
        finally:
            self.clients -= 1
            writer.close()

    async def take(self, request: dict[str, Any]) -> None:
        self.commands.append(request["execute"])
        if request["execute"] == "qmp_capabilities":
            await self.done(request)
        else:
            await self.answer(self, request)

    async def say(self, **message: Any) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")
        await self.writer.drain()

    async def done(self, request: Mapping[str, Any]) -> None:
        await self.say(**{"return": {"to": request["execute"]}, "id": request.get("id")})

    async def refuse(self, request: Mapping[str, Any]) -> None:
        await self.say(error={"class": "GenericError", "desc": "no such device"}, id=request["id"])

    async def hang_up(self, request: Mapping[str, Any]) -> None:
        self.writer.close()

    async def keep_silent(self, request: Mapping[str, Any]) -> None:
        """Say nothing."""


@pytest.fixture
async def server(folder: Path) -> AsyncIterator[Server]:
    made = Server(folder)
    listening = await asyncio.start_unix_server(made.serve, made.path)
    yield made
    listening.close()
    async with asyncio.timeout(LIMIT_S):
        while made.clients:  # noqa: ASYNC110 - a real socket has no other end to ask
            await asyncio.sleep(0.005)


class Told:
    """What a monitor told, in order."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.lost = asyncio.Event()

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        self.all.append(f"{name} {dict(data)}" if data else name)

    def on_lost(self) -> None:
        self.all.append("lost")
        self.lost.set()

    async def end(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            await self.lost.wait()


@pytest.fixture
def told() -> Told:
    return Told()


@asynccontextmanager
async def connected(path: str, told: Told) -> AsyncIterator[Monitor]:
    monitor = await Monitor.connect(path, on_event=told.event, on_lost=told.on_lost, timeout_s=LIMIT_S)
    try:
        yield monitor
    finally:
        await monitor.close()


# --- commands -------------------------------------------------------------------------------------------------


async def test_no_descriptor_is_sent_behind_what_is_not_read(folder: Path, told: Told) -> None:
    """Law: a descriptor goes with its own command or not at all: never with a part of another one."""
    path = str(folder / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        connecting = asyncio.create_task(
            Monitor.connect(path, on_event=told.event, on_lost=told.on_lost, timeout_s=LIMIT_S)
        )
        listener.setblocking(False)
        peer, _ = await asyncio.get_running_loop().sock_accept(listener)
        with peer:
            peer.sendall(json.dumps(GREETING).encode() + b"\n")
            await asyncio.get_running_loop().sock_recv(peer, 4096)
            peer.sendall(b'{"return": {}, "id": 1}\n')
            monitor = await connecting
            with pytest.raises(MonitorSilent):
                await monitor.execute("x" * 1_000_000, timeout_s=SHORT_S)
            with pytest.raises(MonitorSilent, match="was not sent"):
                await monitor.execute("add-fd", {}, fd=peer.fileno(), timeout_s=SHORT_S)
            await monitor.close()


async def test_a_command_is_answered(server: Server, told: Told) -> None:
    """Law: the result is what QEMU returned."""
    async with connected(server.path, told) as monitor:
        assert await monitor.execute("query-status") == {"to": "query-status"}
        assert await monitor.execute("cont", {"a": 1}) == {"to": "cont"}
    assert server.commands == ["qmp_capabilities", "query-status", "cont"]
    assert told.all == []


async def test_a_refusal_has_qemus_words(server: Server, told: Told) -> None:
    """Law: what QEMU refuses is refused, not lost; the connection stays."""
    server.answer = Server.refuse
    async with connected(server.path, told) as monitor:
        with pytest.raises(MonitorRefused, match="QEMU refuses device_del: no such device"):
            await monitor.execute("device_del")
        server.answer = Server.done
        await monitor.execute("query-status")


async def test_silence_is_no_loss(server: Server, told: Told) -> None:
    """Law: no answer in time says just that; a late one to the old question is not taken for the next one's."""
    late: list[dict[str, Any]] = []

    async def keep(self: Server, request: dict[str, Any]) -> None:
        late.append(request)

    server.answer = keep
    async with connected(server.path, told) as monitor:
        with pytest.raises(MonitorSilent, match=r"did not answer query-status within 0\.05 s"):
            await monitor.execute("query-status", timeout_s=SHORT_S)
        server.answer = Server.done
        await server.done(late[0])
        assert await monitor.execute("query-version") == {"to": "query-version"}
    assert told.all == []


async def test_a_peer_that_reads_nothing_is_not_written_to_for_ever(folder: Path, told: Told) -> None:
    """Law: what waits for a frozen QEMU is bounded; it is silent, at once then, and heard again when it reads."""
    thawed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n")
        await reader.readuntil(b"}")
        writer.write(b'{"return": {}, "id": 1}\n')
        await thawed.wait()
        while await reader.read(1 << 20):
            # Answers to nobody: the one that waits will be of a command that was sent after the thaw.
            writer.write(b"".join(b'{"return": {}, "id": %d}\n' % number for number in range(2, 40)))
        writer.close()

    path = str(folder / "qmp.sock")
    async with await asyncio.start_unix_server(serve, path, limit=64), connected(path, told) as monitor:
        for _ in range(20):
            with pytest.raises(MonitorSilent) as caught:
                await monitor.execute("x" * 100_000, timeout_s=SHORT_S)
            if "was not sent" in str(caught.value):
                break
        assert "was not sent" in str(caught.value)
        thawed.set()
        async with asyncio.timeout(LIMIT_S):
            while True:
                with contextlib.suppress(MonitorSilent):
                    await monitor.execute("query-status", timeout_s=SHORT_S)
                    break
                await asyncio.sleep(0.005)
    assert told.all == []


async def test_a_connection_lost_in_the_middle_of_a_command(server: Server, told: Told) -> None:
    """Law: what became of the command is not known, and the loss is told once."""
    server.answer = Server.hang_up
    async with connected(server.path, told) as monitor:
        with pytest.raises(MonitorLost):
            await monitor.execute("cont")
        await told.end()
        with pytest.raises(MonitorLost, match="no QMP connection for cont"):
            await monitor.execute("cont")
    assert told.all == ["lost"]


async def test_an_answer_right_before_the_end_counts(server: Server, told: Told) -> None:
    """Law: QEMU answers `quit`, says SHUTDOWN and is gone, all in one breath: nothing of it is missed."""

    async def quit_at_once(self: Server, request: dict[str, Any]) -> None:
        lines = [{"return": {}, "id": request["id"]}, {"event": "SHUTDOWN", "data": {"reason": "host-qmp-quit"}}]
        self.writer.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.writer.close()

    server.answer = quit_at_once
    async with connected(server.path, told) as monitor:
        assert await monitor.execute("quit") == {}
        await told.end()
    assert told.all == ["SHUTDOWN {'reason': 'host-qmp-quit'}", "lost"]


async def test_two_commands_at_once_get_their_own_answers(server: Server, told: Told) -> None:
    """Law: answers are told apart by their id."""
    async with connected(server.path, told) as monitor:
        answers = await asyncio.gather(*(monitor.execute(name) for name in ("a", "b", "c")))
    assert answers == [{"to": name} for name in ("a", "b", "c")]


# --- events and loss ------------------------------------------------------------------------------------------


async def test_events_come_in_order_and_before_the_loss(server: Server, told: Told) -> None:
    """Law: when the loss is told, every event was."""
    async with connected(server.path, told):
        for number in range(50):
            await server.say(event="E", data={"n": number})
        await server.say(event="BARE")
        server.writer.close()
        await told.end()
    assert told.all == [*(f"E {{'n': {number}}}" for number in range(50)), "BARE", "lost"]


async def test_a_flood_of_events_leaves_the_loop_to_others(server: Server, told: Told) -> None:
    """However many events come at once, others have their turn after a few; none is lost, an answer comes through."""
    between: list[int] = []
    flood = [{"event": "RESET", "data": {"number": number}} for number in range(3000)]

    async def flooded(server: Server, request: Mapping[str, Any]) -> None:
        server.writer.write(b"".join(json.dumps(event).encode() + b"\n" for event in flood))
        await server.done(request)

    async def look() -> None:
        seen = 0
        while True:
            await asyncio.sleep(0)
            between.append(len(told.all) - seen)
            seen = len(told.all)

    async with connected(server.path, told) as monitor:
        server.answer = flooded
        looking = asyncio.create_task(look())
        assert await monitor.execute("query-status", timeout_s=LIMIT_S) == {"to": "query-status"}
        looking.cancel()
        assert told.all == [f"RESET {event['data']}" for event in flood]
        assert max(between) <= TURN_MESSAGES
        # It reads on afterwards.
        assert await monitor.execute("query-status", timeout_s=LIMIT_S) == {"to": "query-status"}
    assert len(told.all) == 6000


async def test_large_messages_are_handled_one_by_one_with_pauses(server: Server, told: Told) -> None:
    """Bytes have a rate, as messages have: the loop waits longer after a longer one; the answer comes after all."""
    large = json.dumps({"event": "RTC_CHANGE", "data": {"x": "x" * (MESSAGE_LIMIT // 2)}}).encode() + b"\n"
    count = 6

    async def flooded(server: Server, request: Mapping[str, Any]) -> None:
        server.writer.write(large * count)
        await server.done(request)

    async with connected(server.path, told) as monitor:
        server.answer = flooded
        began = asyncio.get_running_loop().time()
        await monitor.execute("query-status", timeout_s=LIMIT_S)
        # A lower bound: each has been paused for.
        assert asyncio.get_running_loop().time() - began >= count * len(large) / BYTES_PER_S
    assert len(told.all) == count


async def test_a_refusal_is_no_longer_than_people_read(server: Server, told: Told) -> None:
    """QEMU's words go into the log and the status: a megabyte of them does not."""

    async def refused(server: Server, request: Mapping[str, Any]) -> None:
        await server.say(error={"class": "GenericError", "desc": "x" * 500_000}, id=request["id"])

    async with connected(server.path, told) as monitor:
        server.answer = refused
        with pytest.raises(MonitorRefused) as caught:
            await monitor.execute("cont", timeout_s=LIMIT_S)
    assert len(str(caught.value)) < 600


async def test_the_end_of_a_flood_is_heard(server: Server, told: Told) -> None:
    """A QEMU that ends in the middle of it: every event it has sent comes before the loss, in order."""

    async def last_words(server: Server, request: Mapping[str, Any]) -> None:
        server.writer.write(b"".join(b'{"event": "E%d"}\n' % number for number in range(1000)))
        server.writer.close()

    async with connected(server.path, told) as monitor:
        server.answer = last_words
        with pytest.raises(MonitorLost):
            await monitor.execute("query-status", timeout_s=LIMIT_S)
        await told.end()
    assert told.all == [*(f"E{number}" for number in range(1000)), "lost"]


async def test_drained_waits_for_the_last_event(server: Server, told: Told) -> None:
    """Law: whoever learns of the process's end elsewhere can wait for its last words; but not for ever."""
    async with connected(server.path, told) as monitor:
        await monitor.drained(SHORT_S)
        assert told.all == []
        await server.say(event="SHUTDOWN")
        server.writer.close()
        await monitor.drained(LIMIT_S)
        assert told.all == ["SHUTDOWN", "lost"]


NONSENSE = {
    "no JSON": b"what?\n",
    "no object": b"[]\n",
    "no UTF-8": b"\xff\xfe\n",
    "deep": b"[" * 100_000 + b"\n",
    "endless": b"x" * (11 << 20),
    "no id": b'{"error": {}}\n',
    "odd id": b'{"return": {}, "id": []}\n',
    "odd event": b'{"event": 5}\n',
}


@pytest.mark.parametrize("garbage", NONSENSE.values(), ids=NONSENSE)
async def test_a_peer_that_talks_nonsense_is_lost_or_ignored(server: Server, told: Told, garbage: bytes) -> None:
    """Law: no bytes from the socket leave a monitor that neither works nor says that it does not."""
    async with connected(server.path, told) as monitor:
        server.writer.write(garbage)
        try:
            await monitor.execute("query-status", timeout_s=LIMIT_S)
        except MonitorLost:
            await told.end()
            assert told.all == ["lost"]


async def test_closing_tells_nothing_and_lets_the_next_one_in(server: Server, told: Told) -> None:
    """Law: letting go is no loss; the server goes on with the next client."""
    async with connected(server.path, told):
        pass
    async with connected(server.path, told) as monitor:
        await monitor.execute("query-status")
        await monitor.close()
    assert told.all == []


async def test_closing_after_the_loss_is_fine(server: Server, told: Told) -> None:
    """Law: the end may be told from two sides at once."""
    async with connected(server.path, told):
        server.writer.close()
    async with connected(server.path, told) as monitor:
        server.writer.close()
        await told.end()
        await monitor.close()


# --- connecting -----------------------------------------------------------------------------------------------


async def try_to_connect(path: str, told: Told, timeout_s: float = LIMIT_S) -> None:
    monitor = await Monitor.connect(path, on_event=told.event, on_lost=told.on_lost, timeout_s=timeout_s)
    await monitor.close()


async def test_nobody_there(folder: Path, told: Told) -> None:
    """Law: no socket, and a socket without a server, are a loss at once."""
    with pytest.raises(MonitorLost, match=r"cannot connect to QMP at .*qmp\.sock"):
        await try_to_connect(str(folder / "qmp.sock"), told)
    listening = await asyncio.start_unix_server(lambda reader, writer: None, str(folder / "old.sock"))
    listening.close()
    with pytest.raises(MonitorLost):
        await try_to_connect(str(folder / "old.sock"), told)
    assert told.all == []


async def test_somebody_who_does_not_greet(server: Server, told: Told) -> None:
    """Law: listening is not answering; it is told apart from nobody being there."""
    server.greeting = None
    with pytest.raises(MonitorSilent, match="did not greet"):
        await try_to_connect(server.path, told, SHORT_S)
    assert told.all == []


async def test_somebody_who_greets_and_answers_nothing(
    server: Server, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: a QEMU that waits for its devices greets, and does not agree to anything yet: silent, not up."""
    monkeypatch.setattr(Server, "done", Server.keep_silent)
    with pytest.raises(MonitorSilent):
        await try_to_connect(server.path, told, SHORT_S)


@pytest.mark.parametrize("greeting", [b"hello\n", b"{}\n", b"\xff\n", b"[" * 100_000 + b"\n"])
async def test_somebody_else_listens(server: Server, told: Told, greeting: bytes) -> None:
    """Law: whoever does not greet as QMP does is nobody."""
    server.greeting = greeting
    with pytest.raises(MonitorLost):
        await try_to_connect(server.path, told)


async def test_cancelling_is_clean(server: Server, told: Told) -> None:
    """Law: cancelled while connecting or while a command runs, the cancellation goes on and nothing stays open."""
    server.greeting = None
    task = asyncio.create_task(try_to_connect(server.path, told))
    async with asyncio.timeout(LIMIT_S):
        while not server.clients:  # noqa: ASYNC110 - a real socket has no other end to ask
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.greeting = json.dumps(GREETING).encode() + b"\n"
    server.answer = Server.keep_silent
    async with connected(server.path, told) as monitor:
        command = asyncio.create_task(monitor.execute("query-status"))
        async with asyncio.timeout(LIMIT_S):
            while "query-status" not in server.commands:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        command.cancel()
        with pytest.raises(asyncio.CancelledError):
            await command
        server.answer = Server.done
        assert await monitor.execute("query-version") == {"to": "query-version"}
    assert told.all == []


# --- the real QEMU --------------------------------------------------------------------------------------------


@pytest.fixture
async def qemu(folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A machine without anything, paused; its QMP socket is `folder`/qmp.sock."""
    with socket.socket(socket.AF_UNIX) as listener:
        # It listens before QEMU exists, so that there is nothing to wait for.
        listener.bind(str(folder / "qmp.sock"))
        listener.listen(4)
        process = await asyncio.create_subprocess_exec(
            *("qemu-system-x86_64", "-S", "-machine", "none", "-nodefaults", "-display", "none"),
            *("-chardev", f"socket,id=q,fd={listener.fileno()},server=on,wait=off", "-mon", "chardev=q,mode=control"),
            pass_fds=[listener.fileno()],
        )
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_a_real_qemu_serves_one_after_the_other(
    qemu: asyncio.subprocess.Process, folder: Path, told: Told
) -> None:
    """Law 8: letting go leaves QEMU alone; the successor is served by the same process, and `quit` says why."""
    path = str(folder / "qmp.sock")
    for _ in range(3):
        async with connected(path, told) as monitor:
            assert (await monitor.execute("query-status"))["status"] == "prelaunch"
    assert (qemu.returncode, told.all) == (None, [])
    async with connected(path, told) as monitor:
        with pytest.raises(MonitorRefused, match="has not been found"):
            await monitor.execute("no-such-command")
        await monitor.execute("quit")
        await told.end()
    assert told.all == ["SHUTDOWN {'guest': False, 'reason': 'host-qmp-quit'}", "lost"]


async def test_a_real_qemu_gets_a_descriptor(qemu: asyncio.subprocess.Process, folder: Path, told: Told) -> None:
    """§5: an open file goes with a command, among others in any order; QEMU has a copy, and lets go of it when told."""
    (folder / "medium").write_bytes(bytes(65536))
    fds = Path(f"/proc/{qemu.pid}/fd")

    def has_it() -> bool:
        return any(path.readlink() == folder / "medium" for path in fds.iterdir() if path.is_symlink())

    async with connected(str(folder / "qmp.sock"), told) as monitor:
        # It closes none while its guest is paused.
        await monitor.execute("cont")
        for number in (7, 8):
            with (folder / "medium").open("rb") as medium:
                add = monitor.execute("add-fd", {"fdset-id": number}, fd=medium.fileno())
                added, *_ = await asyncio.gather(add, *(monitor.execute("query-status") for _ in range(5)))
            assert added["fdset-id"] == number
            assert has_it()
            file = {"driver": "file", "filename": f"/dev/fdset/{number}", "read-only": True}
            await monitor.execute("blockdev-add", {"node-name": "m", "read-only": True, "driver": "raw", "file": file})
            await monitor.execute("blockdev-del", {"node-name": "m"})
            await monitor.execute("remove-fd", {"fdset-id": number})
            assert not has_it()
        with pytest.raises(MonitorRefused):
            await monitor.execute("add-fd", {"fdset-id": 9})
    with pytest.raises(MonitorLost), (folder / "medium").open("rb") as medium:
        await monitor.execute("add-fd", {"fdset-id": 9}, fd=medium.fileno())


async def test_a_real_qemu_tells_of_running_and_of_its_killer(
    qemu: asyncio.subprocess.Process, folder: Path, told: Told
) -> None:
    """Law: RESUME when it runs; SIGTERM is `host-signal`, told before the end."""
    async with connected(str(folder / "qmp.sock"), told) as monitor:
        await monitor.execute("cont")
        assert (await monitor.execute("query-status"))["status"] == "running"
        qemu.terminate()
        await told.end()
    assert told.all == ["RESUME", "SHUTDOWN {'guest': False, 'reason': 'host-signal'}", "lost"]


async def test_a_real_qemu_that_is_killed_is_lost_without_a_word(
    qemu: asyncio.subprocess.Process, folder: Path, told: Told
) -> None:
    """Law: SIGKILL leaves no event; the loss is told."""
    async with connected(str(folder / "qmp.sock"), told):
        qemu.kill()
        await told.end()
    assert told.all == ["lost"]


async def test_a_real_qemu_that_is_busy_with_another_client(
    qemu: asyncio.subprocess.Process, folder: Path, told: Told
) -> None:
    """Law: QEMU serves one client per socket; who comes second hears nothing, until the first has gone."""
    path = str(folder / "qmp.sock")
    async with connected(path, told):
        with pytest.raises(MonitorSilent):
            await try_to_connect(path, told, SHORT_S)
    async with connected(path, told) as monitor:
        await monitor.execute("query-status")
