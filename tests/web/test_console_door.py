"""The way to the supervisor's consoles: what is said when there is none."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from kvmsupervisor.adapters.descriptors import Carrier
from kvmsupervisor.domain.consoles import ConsoleKind, ConsoleRequest
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.names import CONSOLES_FOLDER, CONSOLES_SOCKET
from kvmsupervisor.web.console_door import Door, NoConsole

REQUEST = ConsoleRequest(kind=ConsoleKind.DISPLAY, instance=InstanceId("one"), who="alice")


def open_files() -> int:
    """How many this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_request_is_read_as_it_was_meant() -> None:
    """Law: what one side writes, the other reads."""
    for request in (REQUEST, ConsoleRequest(kind=ConsoleKind.SERIAL, instance=InstanceId("a.b-c"), who="ü")):
        assert ConsoleRequest.parse(request.to_json()) == request


async def test_nobody_is_there(tmp_path: Path) -> None:
    """Law: the path is named, and what may be the cause; a socket that was left behind is the same."""
    with pytest.raises(NoConsole, match=r"this host's supervisor gives out no consoles.*/_consoles/sock"):
        await Door(tmp_path).ask(REQUEST)
    (tmp_path / CONSOLES_FOLDER).mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(tmp_path / CONSOLES_FOLDER / CONSOLES_SOCKET))
    with pytest.raises(NoConsole, match="it does not run, is older, or has another KVM_RUN_DIR"):
        await Door(tmp_path).ask(REQUEST)


async def test_it_may_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the setting that lets a group in is named."""

    def refuse(path: Path, *, limit: int) -> Carrier:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Carrier, "connect", refuse)
    with pytest.raises(NoConsole, match="KVM_CONSOLE_GROUP names the group that may"):
        await Door(tmp_path).ask(REQUEST)


@pytest.mark.parametrize(
    ("answer", "with_fd", "words"),
    [
        (b'{"refused": "one is not on this host"}', False, "one is not on this host"),
        (b"[]", False, "in a way that this page does not know"),
        (b'{"is": "log"}', True, "in a way that this page does not know"),
        (b'{"is": "display"}', False, "in a way that this page does not know"),
        (b"", False, "does not answer"),
    ],
)
async def test_other_answers(tmp_path: Path, answer: bytes, with_fd: bool, words: str) -> None:
    """Law: no descriptor is kept, and the supervisor's own words are passed on."""
    folder = tmp_path / CONSOLES_FOLDER
    folder.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / CONSOLES_SOCKET))
        listener.listen()
        listener.settimeout(10)
        door = Door(tmp_path)
        carrier = Carrier.connect(folder / CONSOLES_SOCKET, limit=4096)
        end, _ = listener.accept()
        carrier.close()
        end.close()

        asking = asyncio.ensure_future(door.display(REQUEST))
        end, _ = await asyncio.to_thread(listener.accept)
        with end:
            assert ConsoleRequest.parse(end.recv(4096)) == REQUEST
            before = open_files()
            if answer:
                socket.send_fds(end, [answer], [end.fileno()] if with_fd else [])
        with pytest.raises(NoConsole, match=words):
            await asking
    assert open_files() <= before
