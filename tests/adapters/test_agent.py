"""The guest agent's adapter: against QEMU's own agent, and against guests that mean harm."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvmsupervisor.adapters import agent
from kvmsupervisor.adapters.agent import AgentSilent, ask
from kvmsupervisor.domain.agent import GuestFacts
from tests.support.cluster import eventually

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: a socket's path has 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="kvs", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def real_agent(folder: Path) -> Iterator[Path]:
    """QEMU's agent, which answers for this very machine; its socket."""
    path = folder / "agent.sock"
    argv = ["qemu-ga", "-m", "unix-listen", "-p", str(path), "-t", str(folder), "-f", str(folder / "pid")]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually("the agent's socket", path.exists)
        yield path
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def guest(path: Path, serve: Serve) -> AsyncIterator[None]:
    """A guest whose agent does what `serve` does, with each connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_unix_server(handle, str(path))
    try:
        yield
    finally:
        server.close()


async def token_of(reader: asyncio.StreamReader) -> int:
    """Read the first command, return the token that it wants to have back."""
    line = await reader.readline()
    assert line.startswith(b"\xff")
    asked = json.loads(line[1:])
    assert asked["execute"] == "guest-sync-delimited"
    return int(asked["arguments"]["id"])


def answer(value: object) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


async def honest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers one command after the other, as an old agent does that knows only one of them."""
    writer.write(b"\xff" + answer(await token_of(reader)))
    while line := await reader.readline():
        if json.loads(line)["execute"] == "guest-get-host-name":
            writer.write(answer({"host-name": "web1"}))
        else:
            writer.write(b'{"error": {"class": "CommandNotFound", "desc": "no such command"}}\n')


async def test_the_real_agent_tells_this_machine(real_agent: Path) -> None:
    """Law: host's name, system and version come as the agent has them; and it can be asked again and again."""
    first = await ask(real_agent)
    assert first.hostname == socket.gethostname()
    assert first.os is not None
    version = await asyncio.create_subprocess_exec("qemu-ga", "--version", stdout=subprocess.PIPE)
    printed, _ = await version.communicate()
    assert first.version is not None
    assert first.version in printed.decode()
    for _ in range(5):
        assert await ask(real_agent) == first


async def test_the_real_agent_after_half_a_command(real_agent: Path) -> None:
    """Law: what somebody before us has left in the channel does not reach us."""
    for left in (b'{"execute": "guest-in', b'{"execute": "guest-info"}\n', b"\xfe\xff{{{{ \x00"):
        with socket.socket(socket.AF_UNIX) as before:
            before.connect(str(real_agent))
            before.sendall(left)
        assert (await ask(real_agent)).hostname == socket.gethostname()


async def test_what_an_agent_refuses_is_left_out(folder: Path) -> None:
    """Law: an old agent, or one that may not tell, still counts as one that answers."""
    async with guest(folder / "s", honest):
        assert await ask(folder / "s") == GuestFacts(hostname="web1")


async def test_answers_to_others_are_passed_over(folder: Path) -> None:
    """Law: only behind the echo of our own token an answer is ours."""

    async def stale(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        token = await token_of(reader)
        writer.write(answer({"host-name": "somebody else's"}) + b"\xff" + answer(token + 1) + answer(token))
        writer.write(b"half an answ\xff" + answer(token))
        for _ in agent.COMMANDS:
            writer.write(answer({"host-name": "ours"}))

    async with guest(folder / "s", stale):
        assert (await ask(folder / "s")).hostname == "ours"


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    token = await token_of(reader)
    writer.write(b"\xff" + answer(token) + b"\x00\xfe{]\xff\n" * 10)
    await reader.read()


async def endless_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"a" * 65536)
        await writer.drain()


async def endless_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b'{"return": {}}\n' * 4096)
        await writer.drain()


async def deep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\xff" + answer(await token_of(reader)) + b"[" * 100_000 + b"\n")
    await reader.read()


async def wrong_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\xff" + answer(await token_of(reader) ^ 1) + answer({}) * 4)
    await reader.read()


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\xff" + answer(await token_of(reader)) + b'{"ret')


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (garbage, "nonsense"),
        (endless_line, "a line of more than"),
        (endless_lines, "sends more than"),
        (deep, "nonsense"),
        (wrong_echo, "did not answer"),
        (silence, "did not answer"),
        (hangs_up, "ended the connection"),
    ],
)
async def test_a_hostile_guest_is_an_agent_that_is_silent(folder: Path, serve: Serve, words: str) -> None:
    """Law: whatever comes, it costs at most the deadline and `REPLY_LIMIT` bytes, and is told in one way."""
    async with guest(folder / "s", serve):
        with pytest.raises(AgentSilent, match=words):
            # Whoever never says a thing is waited for as long; a busy machine may need more for the others.
            await ask(folder / "s", timeout_s=0.3 if words == "did not answer" else 30.0)


async def test_nobody_there(folder: Path) -> None:
    """Law: no socket, or one that nobody listens on, is a silent agent, at once."""
    with pytest.raises(AgentSilent, match="cannot be asked"):
        await ask(folder / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s"))
    with pytest.raises(AgentSilent, match="cannot be asked"):
        await ask(folder / "s")


async def test_a_guest_that_reads_nothing_does_not_keep_us(folder: Path) -> None:
    """Law: the connection is dropped when the time is up, whatever is still to be sent."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen(0)
        # As with QEMU, which serves one client: ours is in line, and nobody comes for it.
        for _ in range(2):
            with pytest.raises(AgentSilent):
                await ask(folder / "s", timeout_s=0.1)


async def test_file_systems_are_frozen_and_thawed(folder: Path) -> None:
    """Law: what an agent counts is told; one that refuses, or is late, is named with its command."""
    said: list[str] = []
    answers = {"guest-fsfreeze-freeze": answer(2), "guest-fsfreeze-thaw": b'{"error": {"desc": "not now"}}\n'}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\xff" + answer(await token_of(reader)))
        while line := await reader.readline():
            said.append(json.loads(line)["execute"])
            writer.write(answers[said[-1]])

    async with guest(folder / "a", serve):
        assert await agent.freeze(folder / "a", timeout_s=30) == 2
        with pytest.raises(AgentSilent, match="refuses guest-fsfreeze-thaw"):
            await agent.thaw(folder / "a", timeout_s=30)
        answers["guest-fsfreeze-thaw"] = b""
        with pytest.raises(AgentSilent, match="did not answer guest-fsfreeze-thaw within"):
            await agent.thaw(folder / "a", timeout_s=0.1)
    assert said == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-thaw"]
    with pytest.raises(AgentSilent, match="cannot be asked"):
        await agent.thaw(folder / "none", timeout_s=30)
