"""The memory that a QEMU logs into: bounded, never in its way, and taken over by a successor."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvmsupervisor.adapters.log_buffer import PAGE, SIZE, LogBuffer, numbers_of


@pytest.fixture
def buffer() -> Iterator[LogBuffer]:
    made = LogBuffer.make("test")
    yield made
    made.close()


def say(buffer: LogBuffer, text: bytes) -> int:
    """As QEMU does: until no more is taken."""
    done = 0
    while done < len(text):
        try:
            done += os.write(buffer.fd, text[done:])
        except PermissionError:
            break
    return done


def test_all_is_taken_once_and_in_order(buffer: LogBuffer) -> None:
    """However often it is looked at, over any length; what is new begins where the last look ended."""
    assert buffer.take() == (b"", False)
    told = b""
    for number in range(3000):
        assert say(buffer, b"line %d\n" % number * 10) > 0
        if number % 7 == 0:
            told += buffer.take()[0]
    told += buffer.take()[0]
    assert told == b"".join(b"line %d\n" % number * 10 for number in range(3000))


def test_what_is_too_much_is_dropped_at_once(buffer: LogBuffer) -> None:
    """Whoever writes does not wait, memory does not grow, what came first is kept, and that more is missing is told."""
    assert say(buffer, bytes(range(256)) * 4096) == SIZE
    assert say(buffer, b"x") == 0
    assert os.fstat(buffer.fd).st_size == SIZE
    data, full = buffer.take()
    assert (len(data), full) == (SIZE, True)
    # There is room again.
    assert say(buffer, b"again") == 5
    assert buffer.take() == (b"again", False)


def test_what_is_written_during_a_look_is_not_lost(buffer: LogBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading and setting back somebody writes: that is taken too, once."""
    read, said = os.pread, iter([b"late", b""])

    def racing(fd: int, size: int, at: int) -> bytes:
        data = read(fd, size, at)
        say(buffer, next(said, b""))
        return data

    monkeypatch.setattr(os, "pread", racing)
    say(buffer, b"early ")
    assert buffer.take() == (b"early late", False)
    say(buffer, b"next")
    assert buffer.take() == (b"next", False)


def test_it_cannot_be_changed_by_who_writes_it(buffer: LogBuffer) -> None:
    """A QEMU that its guest has taken over neither makes it longer nor shorter nor stops the reading."""
    with pytest.raises(PermissionError):
        os.ftruncate(buffer.fd, SIZE + PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(buffer.fd, 0)
    for place in (1 << 60, 0, 7):
        os.lseek(buffer.fd, place, os.SEEK_SET)
        data, _ = buffer.take()
        assert len(data) <= SIZE
    fcntl.fcntl(buffer.fd, fcntl.F_SETFL, os.O_APPEND)
    buffer.take()
    assert say(buffer, b"well") == 4


def test_an_opened_for_appending_log_is_put_right(buffer: LogBuffer) -> None:
    """QEMU opens its logs so, and would write nothing; the first look, before its guest runs, mends it."""
    fcntl.fcntl(buffer.fd, fcntl.F_SETFL, os.O_APPEND)
    assert say(buffer, b"nothing") == 0
    buffer.take()
    assert say(buffer, b"something") == 9


def test_a_successor_takes_it_over(buffer: LogBuffer) -> None:
    """Out of the process that has it: what was said meanwhile, and the very position that it writes at."""
    script = "import os, sys; os.write(7, b'before'); input(); os.write(7, b' after'); input()"
    with subprocess.Popen(
        [sys.executable, "-c", f"import os; os.dup2({buffer.fd}, 7); {script}"],
        stdin=subprocess.PIPE,
        pass_fds=[buffer.fd],
    ) as process:
        assert process.stdin is not None
        pidfd = os.pidfd_open(process.pid)
        try:
            while os.lseek(buffer.fd, 0, os.SEEK_CUR) < 6:
                os.sched_yield()
            other = LogBuffer.of_process(pidfd, numbers_of(process.pid, ["test"])["test"])
            assert other.take() == (b"before", False)
            process.stdin.write(b"\n")
            process.stdin.flush()
            while os.lseek(other.fd, 0, os.SEEK_CUR) < 6:
                os.sched_yield()
            assert other.take() == (b" after", False)
            other.close()
            assert numbers_of(process.pid, ["tes", "tests"]) == {}
            with pytest.raises(OSError, match="Bad file descriptor"):
                LogBuffer.of_process(pidfd, -1)
        finally:
            os.close(pidfd)
            process.kill()


def test_what_a_process_calls_its_log_is_looked_at() -> None:
    """Another memory of that name, without a bound, is not taken for one: it might be of any size."""
    script = "import os; os.memfd_create('test', 0); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pidfd = os.pidfd_open(process.pid)
        try:
            with pytest.raises(OSError, match="no log of ours"):
                LogBuffer.of_process(pidfd, numbers_of(process.pid, ["test"])["test"])
        finally:
            os.close(pidfd)
            process.kill()


def test_nothing_is_lost_or_changed_however_fast_it_is_written() -> None:
    """Law: every byte once and in order, also when some are written between any two steps of the reader."""
    buffer = LogBuffer.make("console.log")
    count = 60_000
    writer = f"""
import os
for number in range({count}):
    os.write(1, bytes([number % 251]))
"""
    found = bytearray()
    with subprocess.Popen([sys.executable, "-c", writer], stdout=buffer.fd) as process:
        while process.poll() is None:
            data, full = buffer.take()
            assert not full
            found += data
    found += buffer.take()[0]
    buffer.close()
    assert len(found) == count
    assert found == bytes(number % 251 for number in range(count))
