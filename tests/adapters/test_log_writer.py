"""Files of guests' logs: short, ours, and in nobody's way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.log_writer import QUEUE_BYTES, LogWriter

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
SOMEBODY = 54321


@pytest.fixture
def writer() -> Iterator[LogWriter]:
    made = LogWriter(max_bytes=100, keep=3)
    yield made
    made.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_a_log_is_never_longer_than_its_limit(writer: LogWriter, tmp_path: Path) -> None:
    """Whatever comes at once; so many are kept, the oldest goes, nothing in between is lost."""
    for number in range(5):
        writer.append(tmp_path / "a.log", b"%d" % number * 130)
    writer.close()
    found = contents(tmp_path)
    assert sorted(found) == ["a.log", "a.log.1", "a.log.2", "a.log.3"]
    text = found["a.log.3"] + found["a.log.2"] + found["a.log.1"] + found["a.log"]
    assert b"".join(b"%d" % number * 130 for number in range(5)).endswith(text)
    assert all(len(one) <= 100 for one in found.values())
    assert {entry.stat().st_mode & 0o7777 for entry in tmp_path.iterdir()} == {0o640}


def test_none_may_be_kept(tmp_path: Path) -> None:
    """`KVM_LOG_KEEP=0`: there is one file, of the limited length."""
    writer = LogWriter(max_bytes=10, keep=0)
    writer.append(tmp_path / "a.log", b"0123456789abc")
    writer.close()
    assert contents(tmp_path) == {"a.log": b"abc"}


@pytest.mark.parametrize("what", ["link", "pipe", "hard link", "foreign"])
def test_what_lies_in_its_place_is_set_aside(writer: LogWriter, tmp_path: Path, what: str) -> None:
    """A file of another release's QEMU, a link, a pipe that nobody reads: never written to, never waited for."""
    place, other = tmp_path / "a.log", tmp_path / "other"
    other.write_bytes(b"not ours")
    match what:
        case "link":
            place.symlink_to(other)
        case "pipe":
            os.mkfifo(place)
        case "hard link":
            place.hardlink_to(other)
        case _:
            if os.geteuid() != 0:
                pytest.skip("gives a file to another user")
            place.write_bytes(b"of a user")
            os.chown(place, SOMEBODY, SOMEBODY)
    writer.append(place, b"hello")
    writer.close()
    assert (place.read_bytes(), place.is_symlink(), place.stat().st_uid) == (b"hello", False, os.geteuid())
    assert other.read_bytes() == b"not ours"


def test_a_trouble_is_told_once_and_mends_itself(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk costs these lines of this log."""
    write, full = os.write, True

    def scarce(fd: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(os, "write", scarce)
    with capture_logs() as logs:
        for _ in range(3):
            writer.append(tmp_path / "a.log", b"lost")
        writer.close()
        full = False
        writer.append(tmp_path / "a.log", b"kept")
        writer.append(tmp_path / "gone" / "a.log", b"of an instance that is gone")
        writer.close()
    assert [(one["event"], one["reason"]) for one in logs] == [("log.unwritten", "No space left on device")]
    assert contents(tmp_path) == {"a.log": b"kept"}


def test_a_disk_that_hangs_holds_nobody_up(writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More is refused beyond what may wait; a removal and the end go on without it; memory is bounded."""
    hangs, goes_on = threading.Event(), threading.Event()

    def slow(fd: int, data: bytes) -> int:
        hangs.set()
        goes_on.wait()
        return len(data)

    monkeypatch.setattr(os, "write", slow)
    assert writer.has_room
    for _ in range(QUEUE_BYTES // 1000 + 1):
        writer.append(tmp_path / "a.log", bytes(1000))
    hangs.wait()
    assert not writer.has_room
    writer.drop(tmp_path)
    thread = writer._thread
    writer.close(timeout_s=0.01)
    goes_on.set()
    assert thread is not None
    thread.join()
    assert writer.has_room


def test_a_folder_that_goes_is_not_written_to_any_more(writer: LogWriter, tmp_path: Path) -> None:
    """What waits for it is dropped; the same name, come back, is written to."""
    folder = tmp_path / "1"
    folder.mkdir()
    for _ in range(1000):
        writer.append(folder / "a.log", b"old")
    writer.drop(folder)
    (folder / "a.log").unlink(missing_ok=True)
    for number in range(1, 4):
        (folder / f"a.log.{number}").unlink(missing_ok=True)
    folder.rmdir()
    folder.mkdir()
    writer.append(folder / "a.log", b"new")
    writer.close()
    assert contents(folder) == {"a.log": b"new"}


# --- logs that somebody else writes ---------------------------------------------------------------------------


def test_a_foreign_log_is_cut_and_its_end_is_kept(writer: LogWriter, tmp_path: Path) -> None:
    """Its writer goes on at the beginning; of what was there no more is read than a log may have."""
    place = tmp_path / "a.log"
    with place.open("ab", buffering=0) as file:
        file.write(b"a" * 100)
        writer.trim(place)
        writer.close()
        assert contents(tmp_path) == {"a.log": b"a" * 100}
        file.write(b"b" * 70)
        writer.trim(place)
        writer.close()
        file.write(b"c")
    assert contents(tmp_path) == {"a.log": b"c", "a.log.1": b"a" * 30 + b"b" * 70}


def test_a_log_that_is_long_and_empty_takes_no_room(writer: LogWriter, tmp_path: Path) -> None:
    """A QEMU's user makes it three GiB long: nothing is copied."""
    place = tmp_path / "a.log"
    place.touch()
    os.truncate(place, 3 << 30)
    writer.trim(place)
    writer.close()
    assert contents(tmp_path) == {"a.log": b""}


@needs_root
def test_a_lease_is_not_waited_for(writer: LogWriter, tmp_path: Path) -> None:
    """Its user holds one: opening it would take as long as the kernel lets him (45 s). It is told, and left."""
    place = tmp_path / "a.log"
    place.write_bytes(b"x" * 1000)
    os.chown(place, SOMEBODY, SOMEBODY)
    script = (
        "import fcntl, os, signal, sys\n"
        "fd = os.open('a.log', os.O_RDONLY)\n"
        f"os.setuid({SOMEBODY})\n"
        "signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)\n"
        "print('leased', flush=True); input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"leased\n"
        with capture_logs() as logs:
            writer.trim(place)
            writer.close()
            assert place.stat().st_size == 1000
            # A QEMU of this release does not need that file at all.
            writer.append(place, b"ours")
            writer.close()
        holder.kill()
    assert logs[0]["event"] == "log.unwritten"
    assert place.read_bytes() == b"ours"
