"""The door to consoles: who is let in, what is handed out, who has the keyboard, and what ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.adapters.console import KeyboardLock, open_log
from kvmsupervisor.adapters.descriptors import Carrier, Lost
from kvmsupervisor.adapters.qmp import MonitorRefused
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.names import CONSOLES_FOLDER, CONSOLES_SOCKET
from kvmsupervisor.domain.spec import Display, Spec, spec_to_object
from kvmsupervisor.machine.viewers import Viewers
from kvmsupervisor.supervisor import consoles, serial
from kvmsupervisor.supervisor.consoles import Consoles, NoSuchGroup, group_id
from tests.domain.test_incarnation import RECORD
from tests.fakes.clock import FakeClock

VM = InstanceId("web1")


class Guest:
    """An instance whose QEMU is played by the test.

    Attributes:
        asked: each QMP command.
        given: the descriptors that came with them.
        refuses: the command that QEMU refuses.
    """

    def __init__(self) -> None:
        self.pid: int | None = 4711
        self.starttime: int | None = 1
        self.record = replace(
            RECORD, argv=("qemu", "-vnc", "none"), spec=spec_to_object(Spec(ram_mib=64, display=Display.STD))
        )
        self.asked: list[str] = []
        self.given: list[int] = []
        self.refuses = ""
        self.silent = False
        self.viewers = Viewers(self._ask, lambda: self.record if self.pid is not None else None)

    async def _ask(self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None) -> Any:
        self.asked.append(command)
        if self.silent:
            return None
        if command == self.refuses:
            raise MonitorRefused(f"QEMU refuses {command}: no")
        if fd is not None:
            self.given.append(os.dup(fd))
        return {}


class Client:
    """Who asks, as `kvmsupervisor web` does."""

    def __init__(self, path: Path, clock: FakeClock) -> None:
        self.carrier = Carrier.connect(path, limit=4096)
        self._clock = clock

    async def say(self, **message: object) -> None:
        await self.carrier.send(json.dumps(message).encode(), timeout_s=5)

    async def hear(self) -> tuple[dict[str, Any], int | None]:
        """The next message, in however much virtual time."""
        hearing = asyncio.ensure_future(self.carrier.receive(takes_fd=True))
        for _ in range(200):
            await asyncio.wait([hearing], timeout=0.01)
            if hearing.done():
                break
            await self._clock.advance(serial.LOOK_S)
        data, fd = await hearing
        return json.loads(data), fd

    async def until(self, **wanted: object) -> int | None:
        """Hear until a message has all these; its descriptor."""
        while True:
            message, fd = await self.hear()
            if wanted.items() <= message.items():
                return fd
            if fd is not None:
                os.close(fd)

    async def keyboard(self) -> int:
        """Hear until the keyboard is ours; the connection."""
        fd = await self.until(**{"is": "keyboard", "yours": True})
        assert fd is not None
        return fd

    async def refusal(self, **request: object) -> str:
        """Ask, and be refused."""
        await self.say(**request)
        message, fd = await self.hear()
        assert fd is None
        assert message.keys() == {"refused"}
        return str(message["refused"])


@pytest.fixture
def run_dir() -> Iterator[RunDir]:
    """A short one: a socket's path has 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="kvs", dir="/tmp"))
    yield RunDir(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    for fd in made.given:
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.fixture
def instances(guest: Guest) -> dict[InstanceId, Guest]:
    return {VM: guest}


@pytest.fixture
def folder(run_dir: RunDir) -> Path:
    made = run_dir.instance(VM)
    made.create()
    return made.path


@pytest.fixture
def qemu(folder: Path) -> Iterator[socket.socket]:
    """QEMU's console socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "console.sock"))
        listener.listen(4)
        listener.settimeout(10)
        yield listener


@contextlib.asynccontextmanager
async def opened(door: Consoles) -> AsyncIterator[None]:
    """The door, open."""
    door.open()
    yield
    await door.close()


Call = Callable[[], Client]


@pytest.fixture
async def call(run_dir: RunDir, instances: dict[InstanceId, Guest], clock: FakeClock) -> AsyncIterator[Call]:
    made: list[Client] = []

    def connect() -> Client:
        made.append(Client(run_dir.path / CONSOLES_FOLDER / CONSOLES_SOCKET, clock))
        return made[-1]

    async with opened(Consoles(run_dir, group="", instances=instances, is_guests=lambda uid: False, clock=clock)):
        yield connect
        for client in made:
            client.carrier.close()


async def taken(keyboard: KeyboardLock) -> bool:
    """Whether it can be taken within ten seconds; it is released again."""
    was_free = bool(await becomes(keyboard.take))
    keyboard.release()
    return was_free


async def becomes(look: Callable[[], Any]) -> Any:
    """The first answer that is something, within ten seconds."""
    for _ in range(1000):
        if found := look():
            return found
        await asyncio.sleep(0.01)
    return None


def open_files() -> int:
    """How many this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# --- who is let in --------------------------------------------------------------------------------------------


async def test_only_the_group_may_connect(run_dir: RunDir, clock: FakeClock) -> None:
    """Law: nobody but our own user; with a group that one, too; and a folder of an earlier run is brought to that."""
    path = run_dir.path / CONSOLES_FOLDER / CONSOLES_SOCKET
    for group, modes in (("", (0o700, 0o600)), (f"{os.getgid()}", (0o710, 0o660)), ("", (0o700, 0o600))):
        async with opened(Consoles(run_dir, group=group, instances={}, is_guests=lambda uid: False, clock=clock)):
            assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == modes
            assert path.stat().st_gid == path.parent.stat().st_gid == os.getgid()
        assert not path.exists()


def test_the_group_by_its_name() -> None:
    """Law: a number is one; a missing group stops the start, but for the default one, which is nobody then."""
    assert group_id("root") == group_id("0") == 0
    assert group_id("") is group_id(None) is None
    with pytest.raises(NoSuchGroup, match=r"KVM_CONSOLE_GROUP is nosuchgroup.*groupadd"):
        group_id("nosuchgroup")


async def test_guests_are_not_let_in(run_dir: RunDir, clock: FakeClock, guest: Guest) -> None:
    """Law: a user that QEMUs run as is refused, whatever group it is in."""
    door = Consoles(run_dir, group="", instances={VM: guest}, is_guests=lambda uid: uid == os.getuid(), clock=clock)
    async with opened(door):
        client = Client(run_dir.path / CONSOLES_FOLDER / CONSOLES_SOCKET, clock)
        assert "is one that guests run as" in (await client.hear())[0]["refused"]
        client.carrier.close()
    assert guest.asked == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"{", "one JSON object"),
        (b"[" * 3000, "one JSON object"),
        (b"7", "one JSON object"),
        (b'{"console": "qmp", "instance": "web1"}', "console is one of serial, display"),
        (b'{"console": ["serial"], "instance": "web1"}', "console is one of serial, display"),
        (b'{"console": "serial", "instance": "../web1"}', "instance is"),
        (b'{"console": "serial", "instance": 1}', "instance is"),
        (b'{"console": "serial", "instance": "web1", "who": 1}', "who is text"),
        (b'{"console": "serial", "instance": "web1", "exec": "stop"}', "no 'exec'"),
        (b'{"console": "serial", "instance": "other"}', "other is not on this host"),
    ],
)
async def test_what_is_no_request(call: Call, guest: Guest, said: bytes, words: str) -> None:
    """Law: refused in words, and QEMU is asked for nothing."""
    client = call()
    await client.carrier.send(said, timeout_s=5)
    assert words in (await client.hear())[0]["refused"]
    assert guest.asked == []


async def test_a_long_message_ends_it(call: Call) -> None:
    """Law: nothing of it is read."""
    client = call()
    await client.carrier.send(b"x" * 5000, timeout_s=5)
    with pytest.raises(Lost):
        await client.hear()


async def test_no_descriptor_is_taken_from_a_client(call: Call) -> None:
    """Law: what a client sends along never becomes a descriptor of the supervisor."""
    before = open_files()
    client = call()
    with socket.socket() as gift:
        await client.carrier.send(b"{}", fd=gift.fileno(), timeout_s=5)
        assert "console is one of" in (await client.hear())[0]["refused"]
    client.carrier.close()
    await asyncio.sleep(0.01)
    assert open_files() <= before


async def test_no_more_than_so_many(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: one too many is turned away at once; when one leaves, the next one is let in."""
    monkeypatch.setattr(consoles, "MOST", 2)
    first, second = call(), call()
    await asyncio.sleep(0.01)
    with pytest.raises(Lost):
        await call().hear()
    first.carrier.close()
    second.carrier.close()
    await asyncio.sleep(0.01)
    assert "not on this host" in await call().refusal(console="serial", instance="other")


# --- displays -------------------------------------------------------------------------------------------------


async def test_a_display_is_a_connection_with_qemu(call: Call, guest: Guest) -> None:
    """Law: what the client gets and what QEMU gets are the two ends of one connection, and nothing is between them."""
    client = call()
    await client.say(console="display", instance="web1", who="alice")
    message, fd = await client.hear()
    assert message == {"is": "display"}
    assert fd is not None
    assert guest.asked == ["getfd", "add_client"]
    with socket.socket(fileno=fd) as ours, socket.socket(fileno=guest.given.pop()) as qemus:
        qemus.sendall(b"RFB 003.008\n")
        ours.settimeout(10)
        assert ours.recv(100) == b"RFB 003.008\n"
        with pytest.raises(Lost):
            await client.hear()
        ours.sendall(b"still")
        assert qemus.recv(100) == b"still"


async def test_why_a_display_is_not_shown(call: Call, guest: Guest) -> None:
    """Law: told in words; a QEMU without a VNC server is never asked, as it would say that all went well."""
    request = {"console": "display", "instance": "web1"}
    has = guest.record
    guest.record = replace(has, argv=("qemu", "-vga", "none"), spec=spec_to_object(Spec(ram_mib=64)))
    assert "set the key display" in await call().refusal(**request)
    guest.record = replace(has, argv=("qemu", "-vga", "qxl"), spec=spec_to_object(Spec(ram_mib=64, spice_port=1)))
    assert "earlier release" in await call().refusal(**request)
    guest.record = replace(has, incoming=True)
    assert "on its way" in await call().refusal(**request)
    assert guest.asked == []

    guest.record = has
    guest.refuses = "add_client"
    assert "QEMU refuses add_client" in await call().refusal(**request)
    assert guest.asked == ["getfd", "add_client", "closefd"]
    guest.silent = True
    assert "does not answer" in await call().refusal(**request)
    guest.pid = None
    assert "does not run" in await call().refusal(**request)


# --- serial ---------------------------------------------------------------------------------------------------


async def test_the_log_comes_first_and_after_a_rotation(call: Call, folder: Path, qemu: socket.socket) -> None:
    """Law: descriptors of the log before and of the log, for reading only; and of the next one once it is there."""
    (folder / "console.log.1").write_bytes(b"before\n")
    (folder / "console.log").write_bytes(b"now\n")
    client = call()
    await client.say(console="serial", instance="web1", who="alice")
    older, log = await client.until(**{"is": "older"}), await client.until(**{"is": "log"})
    assert older is not None
    assert log is not None
    assert (os.read(older, 100), os.read(log, 100)) == (b"before\n", b"now\n")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(log, b"x")
    (folder / "console.log").rename(folder / "console.log.1")
    (folder / "console.log").write_bytes(b"next\n")
    following = await client.until(**{"is": "log"})
    assert following is not None
    assert os.read(following, 100) == b"next\n"
    for fd in (older, log, following):
        os.close(fd)


async def test_the_keyboard_is_a_connection_with_qemu(call: Call, folder: Path, qemu: socket.socket) -> None:
    """Law: who types is named to others; what is typed goes to QEMU; when the client leaves, the keyboard is free."""
    client = call()
    await client.say(console="serial", instance="web1", who="alice (in a browser)")
    with socket.socket(fileno=await client.keyboard()) as line, qemu.accept()[0] as its:
        line.sendall(b"ls\r")
        assert its.recv(10) == b"ls\r"
        other = KeyboardLock(folder, who="bob")
        assert not other.take()
        assert other.holder() == "alice (in a browser)"
        client.carrier.close()
        assert await taken(other)
        its.settimeout(10)
        assert its.recv(10) == b""


async def test_browsers_and_terminals_give_way_to_each_other(call: Call, folder: Path, qemu: socket.socket) -> None:
    """Law: the second sees the holder's name and takes over when it wants; who loses it is told by whom."""
    terminal = KeyboardLock(folder, who="root (process 1)")
    assert terminal.take()
    first, second = call(), call()
    await first.say(console="serial", instance="web1", who="alice")
    await first.until(**{"is": "keyboard", "holder": "root (process 1)"})
    await first.say(take=True)
    assert await becomes(terminal.wanted_by) == "alice"
    terminal.want_no_more()
    terminal.release()
    os.close(await first.keyboard())

    await second.say(console="serial", instance="web1", who="bob")
    await second.until(**{"is": "keyboard", "holder": "alice"})
    await second.say(take=True)
    await first.until(**{"is": "keyboard", "lost": "bob"})
    os.close(await second.keyboard())
    await second.say(release=True)
    await second.until(**{"is": "keyboard", "holder": ""})
    assert await taken(terminal)


async def test_a_holder_that_does_not_let_go(call: Call, folder: Path, qemu: socket.socket) -> None:
    """Law: named, and the request withdrawn."""
    stuck = KeyboardLock(folder, who="frozen")
    assert stuck.take()
    client = call()
    await client.say(console="serial", instance="web1", who="alice")
    await client.say(take=True)
    await client.until(**{"is": "keyboard", "stuck": "frozen"})
    assert stuck.wanted_by() == ""
    stuck.release()


async def test_it_goes_on_over_a_restart_of_qemu(call: Call, guest: Guest, qemu: socket.socket) -> None:
    """Law: the end and the next start are told, and the keyboard is connected with the next QEMU."""
    client = call()
    await client.say(console="serial", instance="web1", who="alice")
    await client.until(**{"is": "qemu", "pid": 4711})
    line = socket.socket(fileno=await client.keyboard())
    guest.pid = None
    await client.until(**{"is": "qemu", "pid": None})
    with line:
        line.settimeout(10)
        assert line.recv(10) == b""
    guest.pid, guest.starttime = 4712, 2
    await client.until(**{"is": "qemu", "pid": 4712})
    os.close(await client.keyboard())


async def test_who_does_not_read_loses_the_keyboard(call: Call, qemu: socket.socket) -> None:
    """Law: output that waits in the connection makes the guest wait, so a client that hangs is cut off."""
    client = call()
    await client.say(console="serial", instance="web1", who="alice")
    fd = await client.keyboard()
    with qemu.accept()[0] as its:
        its.sendall(b"output")
        await client.until(**{"is": "keyboard", "lost": ""})
        its.settimeout(10)
        assert its.recv(10) == b""
    os.close(fd)


async def test_an_instance_that_leaves(call: Call, instances: dict[InstanceId, Guest], folder: Path) -> None:
    """Law: the last word says so, and the connection ends."""
    client = call()
    await client.say(console="serial", instance="web1", who="alice")
    await client.until(**{"is": "qemu", "pid": 4711})
    del instances[VM]
    await client.until(**{"is": "gone"})
    with pytest.raises(Lost):
        await client.hear()


async def test_a_client_that_talks_nonsense(call: Call, folder: Path, qemu: socket.socket) -> None:
    """Law: it is let go of, and so is the keyboard."""
    client = call()
    await client.say(console="serial", instance="web1", who="alice")
    os.close(await client.keyboard())
    await client.carrier.send(b"\xff", timeout_s=5)
    with pytest.raises(Lost):
        await client.until(never=True)
    assert await taken(KeyboardLock(folder, who="bob"))


async def test_a_name_is_one_visible_line(call: Call, folder: Path, qemu: socket.socket) -> None:
    """Law: what others read of a holder holds no control characters, and has a length."""
    client = call()
    await client.say(console="serial", instance="web1", who="al\x1b[2Jice\n" + "x" * 500)
    os.close(await client.keyboard())
    holder = KeyboardLock(folder, who="bob").holder()
    assert holder.startswith("al?[2Jice?x")
    assert holder.isprintable()
    assert len(holder) == 120


def test_the_log_of_a_console_is_no_link(tmp_path: Path) -> None:
    """Law: root hands out no file that a link names, and does not wait at a pipe."""
    (tmp_path / "console.log").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic links"):
        open_log(tmp_path / "console.log")
    os.mkfifo(tmp_path / "pipe")
    assert open_log(tmp_path / "pipe") is None
    assert open_log(tmp_path / "missing") is None
