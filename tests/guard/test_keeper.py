"""The keeper: what it does once its supervisor is gone, or late, and what it leaves alone. It is the real program."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvmsupervisor.guard import keeper_client
from kvmsupervisor.guard.keeper_client import FROZEN, PAUSED, Keeper, keep

LIMIT_S = 30.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: a socket's path has 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="kvs", dir="/tmp"))
    yield path
    shutil.rmtree(path)


class Qemu:
    """What a keeper sees of a QEMU and its guest.

    Attributes:
        state: QMP's run state.
        migration: what QMP says of its migration.
        mute: the sockets that greet nobody, as another client is served there.
        refusals: how often the agent still refuses.
        said: the commands that it got, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state, self.migration = "paused", "none"
        self.mute: set[str] = set()
        self.refusals = 0
        self.said: list[str] = []
        self.thawed = asyncio.Event()

    @asynccontextmanager
    async def lives(self) -> AsyncIterator[Qemu]:
        servers = [
            await asyncio.start_unix_server(self._monitor(name), self.folder / name) for name in ("spare", "main")
        ]
        servers.append(await asyncio.start_unix_server(self._agent, self.folder / "agent"))
        try:
            yield self
        finally:
            for server in servers:
                server.close()

    def _monitor(self, name: str):  # type: ignore[no-untyped-def]
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if name in self.mute:
                await reader.read()
                return
            writer.write(b'{"QMP": {}}\r\n{"event": "RESUME", "data": {}}\r\n')
            while line := await reader.readline():
                command = json.loads(line)["execute"]
                self.said.append(command)
                answers = {"query-status": {"status": self.state}, "query-migrate": {"status": self.migration}}
                if command == "cont":
                    self.state = "running"
                writer.write(json.dumps({"return": answers.get(command, {})}).encode() + b"\r\n")
            writer.close()

        return serve

    async def _agent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readline()
        asked = json.loads(first[1:])
        # An answer to an earlier client is still under way.
        writer.write(b'{"return": 7}\n\xff' + json.dumps({"return": asked["arguments"]["id"]}).encode() + b"\n")
        self.said.append(json.loads(await reader.readline())["execute"])
        if self.refusals:
            self.refusals -= 1
            writer.write(b'{"error": {"desc": "busy"}}\n')
        else:
            writer.write(b'{"return": 1}\n')
            self.thawed.set()
        await reader.read()
        writer.close()

    async def kept(self, limit_s: float = LIMIT_S) -> Keeper:
        monitors = [self.folder / name for name in ("spare", "main")]
        return await keep(monitors=monitors, agent=self.folder / "agent", limit_s=limit_s)


async def ended(keeper: Keeper) -> None:
    async with asyncio.timeout(LIMIT_S):
        await keeper._process.ended.wait()  # type: ignore[attr-defined]


async def test_its_supervisor_is_gone(folder: Path) -> None:
    """The pipe ends: the guest goes on, and then its file systems."""
    async with Qemu(folder).lives() as qemu:
        keeper = await qemu.kept()
        keeper.tell(FROZEN)
        keeper.tell(PAUSED)
        keeper.dismiss(done=False)
        await ended(keeper)
        assert qemu.said == ["qmp_capabilities", "query-status", "query-migrate", "cont", "guest-fsfreeze-thaw"]


async def test_all_is_over(folder: Path) -> None:
    async with Qemu(folder).lives() as qemu:
        keeper = await qemu.kept()
        keeper.tell(FROZEN + PAUSED)
        keeper.dismiss(done=True)
        await ended(keeper)
        assert qemu.said == []


async def test_its_supervisor_is_late(folder: Path) -> None:
    """A limit of seconds holds whatever the supervisor does; it does not matter that a client has a socket."""
    async with Qemu(folder).lives() as qemu:
        qemu.refusals = 1
        keeper = await qemu.kept(limit_s=0.1)
        keeper.tell(FROZEN + PAUSED)
        await ended(keeper)
        assert qemu.state == "running"
        assert qemu.said.count("guest-fsfreeze-thaw") == 2
        with pytest.raises(keeper_client.KeeperTrouble):
            keeper.tell(PAUSED)
        keeper.dismiss(done=False)


@pytest.mark.parametrize(("state", "migration"), [("postmigrate", "completed"), ("paused", "active"), ("io-error", "")])
async def test_law_13_no_other_guest_is_let_go_on(folder: Path, state: str, migration: str) -> None:
    """Only a guest that is paused, and that no live move is about."""
    async with Qemu(folder).lives() as qemu:
        qemu.state, qemu.migration = state, migration
        keeper = await qemu.kept()
        keeper.tell(PAUSED)
        keeper.dismiss(done=False)
        await ended(keeper)
        assert "cont" not in qemu.said
        assert "guest-fsfreeze-thaw" not in qemu.said, "nobody had frozen it"


async def test_qemu_has_ended(folder: Path) -> None:
    """There is nothing to do then, and it does not try for minutes."""
    async with Qemu(folder).lives() as qemu:
        keeper = await qemu.kept()
        keeper.tell(FROZEN + PAUSED)
    for name in ("spare", "main", "agent"):
        (folder / name).unlink(missing_ok=True)
    keeper.dismiss(done=False)
    await ended(keeper)


async def test_it_cannot_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is frozen: the caller is told."""
    monkeypatch.setattr(keeper_client, "PROGRAM", folder / "none.py")
    with pytest.raises(keeper_client.KeeperTrouble, match="does not answer"):
        await Qemu(folder).kept()
