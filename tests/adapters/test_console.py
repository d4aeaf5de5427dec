"""The console's adapter: the log over rotations, and who has the keyboard."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmsupervisor.adapters.console import PENDING_BYTES, READ_BYTES, ConsoleLog, Keyboard

Sit = Callable[[str], Keyboard]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: a socket's path has 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="kvs", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def log(folder: Path) -> Iterator[ConsoleLog]:
    log = ConsoleLog(folder / "console.log")
    yield log
    log.close()


@pytest.fixture
def sit(folder: Path) -> Iterator[Sit]:
    made: list[Keyboard] = []

    def make(who: str) -> Keyboard:
        made.append(Keyboard(folder, who=who, wake=lambda: None))
        return made[-1]

    yield make
    for keyboard in made:
        keyboard.release()


@pytest.mark.parametrize(
    ("lines", "shown"),
    [(0, b""), (1, b"login: "), (2, b"three\r\nlogin: "), (9, b"one\r\ntwo\r\nthree\r\nlogin: ")],
)
def test_scroll_back_counts_lines(folder: Path, log: ConsoleLog, lines: int, shown: bytes) -> None:
    """Law: so many lines, the unfinished one counted; over the border of a rotation; `read` goes on behind them."""
    (folder / "console.log.1").write_bytes(b"one\r\ntwo\r\n")
    (folder / "console.log").write_bytes(b"three\r\nlogin: ")
    assert log.begin(lines) == shown
    assert log.read() == b""
    with (folder / "console.log").open("ab") as file:
        file.write(b"root")
    assert log.read() == b"root"


def test_a_finished_last_line_is_one_line(folder: Path, log: ConsoleLog) -> None:
    """Law: the empty text behind the last line break is no line."""
    (folder / "console.log").write_bytes(b"one\ntwo\n")
    assert log.begin(1) == b"two\n"


def test_a_log_that_comes_later(folder: Path, log: ConsoleLog) -> None:
    """Law: no log is an empty one."""
    assert log.begin(10) == b""
    assert log.read() == b""
    (folder / "console.log").write_bytes(b"x" * (READ_BYTES + 1))
    assert (len(log.read()), len(log.read()), len(log.read())) == (READ_BYTES, 1, 0)


def test_a_rotation_before_anything_was_read(folder: Path, log: ConsoleLog) -> None:
    """Law: what was written between the last look and the copy comes from the copy."""
    path = folder / "console.log"
    path.write_bytes(b"seen\n")
    log.begin(9)
    path.write_bytes(b"seen\nmissed\n")
    shutil.copyfile(path, folder / "console.log.1")
    path.write_bytes(b"new\n")
    assert (log.read(), log.read(), log.read()) == (b"missed\n", b"new\n", b"")
    os.truncate(path, 0)
    (folder / "console.log.1").unlink()
    assert log.read() == b""
    path.write_bytes(b"x\n")
    assert log.read() == b"x\n"


def test_another_file_is_read_from_its_beginning(folder: Path, log: ConsoleLog) -> None:
    """Law: an instance that was removed and came back has a new log."""
    path = folder / "console.log"
    path.write_bytes(b"old\n")
    log.begin(9)
    (folder / "other").write_bytes(b"new, and longer\n")
    (folder / "other").replace(path)
    assert log.read() == b"new, and longer\n"


def test_one_keyboard(sit: Sit) -> None:
    """Law: one has it, others know who; once let go it is free, and nobody is named."""
    alice, bob = sit("alice"), sit("bob")
    assert alice.take()
    assert alice.take()
    assert not bob.take()
    assert bob.holder() == "alice"
    assert (alice.ours, bob.ours) == (True, False)
    alice.release()
    assert bob.holder() == ""
    assert bob.take()
    assert alice.holder() == "bob"


def test_wanting_it(sit: Sit) -> None:
    """Law: whoever has it sees who wants it; a wish that nobody heeded does not outlive the next taking."""
    alice, bob, carol = sit("alice"), sit("bob"), sit("carol")
    alice.take()
    assert alice.wanted_by() == ""
    bob.want()
    assert alice.wanted_by() == "bob"
    alice.release()
    assert carol.take()
    assert carol.wanted_by() == ""


def test_a_lock_on_a_file_that_is_gone_is_none(folder: Path, sit: Sit) -> None:
    """Law: removing and making the instance again makes a new keyboard, which the first to come has."""
    alice, bob = sit("alice"), sit("bob")
    alice.take()
    (folder / "console.lock").unlink()
    assert not alice.ours
    assert bob.take()
    assert not alice.take()
    assert bob.ours


def test_links_are_not_followed(folder: Path, sit: Sit) -> None:
    """Law: nobody who may write into the folder makes us write elsewhere."""
    (folder / "victim").write_bytes(b"precious")
    for name in ("console.lock", "console.want"):
        (folder / name).symlink_to(folder / "victim")
    alice = sit("alice")
    with pytest.raises(OSError, match="symbolic links"):
        alice.take()
    with pytest.raises(OSError, match="symbolic links"):
        alice.want()
    assert (folder / "victim").read_bytes() == b"precious"


def test_typing(folder: Path, sit: Sit) -> None:
    """Law: what is typed arrives; what comes back is dropped, however much; more than fits is refused, whole."""
    alice = sit("alice")
    assert not alice.connect()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "console.sock"))
        listener.listen(1)
        assert alice.connect()
        with listener.accept()[0] as qemu:
            qemu.settimeout(30)
            qemu.sendall(b"o" * 4_000_000)
            assert alice.type(b"root\r")
            assert qemu.recv(100) == b"root\r"
            while alice.type(b"x" * 1000):
                pass
            assert PENDING_BYTES - 1000 < alice.pending <= PENDING_BYTES
            assert qemu.recv(100)
            assert alice.connected
        alice.disconnect()
        assert not alice.connected
        assert alice.pending == 0


def test_the_end_of_the_connection_wakes(folder: Path) -> None:
    """Law: QEMU's end is noticed without typing."""
    woken = threading.Event()
    alice = Keyboard(folder, who="alice", wake=woken.set)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "console.sock"))
        listener.listen(1)
        assert alice.connect()
        listener.accept()[0].close()
        assert woken.wait(30)
        assert not alice.connected
        alice.type(b"x")
        alice.release()


@pytest.mark.timeout(20)
def test_letting_go_after_a_signal_in_the_middle_of_connecting(
    folder: Path, sit: Sit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: wherever a signal cuts connecting off, letting go waits for nothing that has not begun."""

    def cut_off(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    alice = sit("alice")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "console.sock"))
        listener.listen(1)
        monkeypatch.setattr(threading.Thread, "start", cut_off)
        with pytest.raises(KeyboardInterrupt):
            alice.connect()
        alice.release()
        assert not alice.connected
