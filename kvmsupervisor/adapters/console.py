"""An instance's serial console for people: all of them read its log, one of them has the keyboard.

QEMU's socket serves one client at a time and keeps nothing for the next. So all output comes from the log, which the
supervisor writes, and the socket is for typing only. The person who may type holds an flock.

    console.log    read by all; rotated to console.log.1 (of an earlier release's QEMU: copied and truncated)
    console.sock   connected by the holder of the keyboard; its output is dropped, so that the guest never waits
    console.lock   flock of the holder of the keyboard; says who that is
    console.want   says who wants the keyboard; the holder releases it then
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

READ_BYTES = 64 * 1024
"""How many bytes are read from the log at once."""

SCROLLBACK_BYTES = 1024 * 1024
"""How many bytes back to look for lines: about 20,000 lines of usual length."""

PENDING_BYTES = 64 * 1024
"""How many bytes may wait for a guest that does not read its console."""

WHO_BYTES = 200


class ConsoleLog:
    """The output of the guest: its last lines first, then everything new, across rotations."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._older = path.with_name(f"{path.name}.1")
        self._fd = -1
        self._at = 0

    def begin(self, lines: int) -> bytes:
        """The last `lines` lines, an unfinished one included; `read` goes on behind them."""
        self._reopen()
        if self._fd < 0:
            return b""
        self._at = os.fstat(self._fd).st_size
        kept = _tail(self._fd, self._at)
        if kept.count(b"\n") <= lines:
            kept = self._of_older(lambda fd: _tail(fd, os.fstat(fd).st_size)) + kept
        return _last_lines(kept, lines)

    def read(self) -> bytes:
        """New output, at most `READ_BYTES`; empty when there is none."""
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return b""
        if self._fd < 0:
            self._reopen()
        elif not os.path.samestat(now, os.fstat(self._fd)):
            # The log was rotated and is complete; or the instance was removed and came back.
            if missed := os.pread(self._fd, READ_BYTES, self._at):
                self._at += len(missed)
                return missed
            self._reopen()
        elif now.st_size < self._at:
            missed, self._at = self._missed(self._at), 0
            if missed:
                return missed
        if self._fd < 0:
            return b""
        data = os.pread(self._fd, READ_BYTES, self._at)
        self._at += len(data)
        return data

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _reopen(self) -> None:
        self.close()
        self._at = 0
        self._fd = _open(self._path)

    def _missed(self, at: int) -> bytes:
        """The output behind `at` from before the log was copied and truncated: it is in the copy."""
        return self._of_older(lambda fd: os.pread(fd, SCROLLBACK_BYTES, at))

    def _of_older(self, read: Callable[[int], bytes]) -> bytes:
        """What is read of the log before this one; empty when there is none."""
        with contextlib.suppress(OSError):
            fd = _open(self._older)
            if fd >= 0:
                try:
                    return read(fd)
                finally:
                    os.close(fd)
        return b""


def _open(path: Path) -> int:
    """Open a log; -1 when it is missing, or no file.

    An earlier release's QEMU owns its logs: root follows no link of it, and waits at no pipe.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return -1


def _tail(fd: int, end: int) -> bytes:
    begin = max(0, end - SCROLLBACK_BYTES)
    return os.pread(fd, end - begin, begin)


def _last_lines(data: bytes, lines: int) -> bytes:
    if lines <= 0:
        return b""
    split = data.split(b"\n")
    # Behind the last line break there is an unfinished line, or nothing.
    return b"\n".join(split[-(lines + (not split[-1])) :])


class KeyboardLock:
    """The right to type on one console.

    Args:
        folder: the instance's folder in the run directory.
        who: tells others who holds the keyboard.
    """

    def __init__(self, folder: Path, *, who: str) -> None:
        self._lock_path = folder / "console.lock"
        self._want_path = folder / "console.want"
        self._who = who.encode()[:WHO_BYTES]
        self._lock = -1

    @property
    def ours(self) -> bool:
        """Whether we hold it. After the instance was removed and came back the lock is another file: we do not."""
        if self._lock < 0:
            return False
        try:
            return os.path.samestat(self._lock_path.stat(), os.fstat(self._lock))
        except FileNotFoundError:
            return False

    def take(self) -> bool:
        """Take the keyboard if it is free; return whether we hold it."""
        if self.ours:
            return True
        self.release()
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with contextlib.suppress(PermissionError):
            # A user who may read a file may lock it (flock(2)). A file of an earlier release is changed, too.
            os.fchmod(descriptor, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        # On a full disk we hold it all the same; the file just does not say who does.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self._who, 0)
        self._lock = descriptor
        # An old request may be of a program that gave up or was killed; one that still waits repeats it.
        self.want_no_more()
        return True

    def release(self) -> None:
        """Release the keyboard."""
        if self._lock >= 0:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = -1

    def holder(self) -> str:
        """Who holds it, in their own words; empty when it is free. A killed holder may be named until the next one."""
        return _words(self._lock_path)

    def want(self) -> None:
        """Ask the holder to release it."""
        descriptor = os.open(
            self._want_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        with os.fdopen(descriptor, "wb") as want:
            want.write(self._who)

    def wanted_by(self) -> str:
        """Who wants it; empty when there is no request."""
        return _words(self._want_path)

    def want_no_more(self) -> None:
        """Withdraw the request."""
        self._want_path.unlink(missing_ok=True)


class Keyboard(KeyboardLock):
    """The right to type on one console, and the connection that it goes through.

    Args:
        folder: the instance's folder in the run directory.
        who: tells others who holds the keyboard.
        wake: called, from another thread, when the guest has written something or the connection has ended.
    """

    def __init__(self, folder: Path, *, who: str, wake: Callable[[], None]) -> None:
        super().__init__(folder, who=who)
        self._socket_path = folder / "console.sock"
        self._wake = wake
        self._socket: socket.socket | None = None
        self._ended = threading.Event()
        self._pending = bytearray()

    def release(self) -> None:
        """Release the keyboard. Unsent bytes are dropped."""
        self.disconnect()
        super().release()

    @property
    def connected(self) -> bool:
        """Whether QEMU is at the other end."""
        return self._socket is not None and not self._ended.is_set()

    def connect(self) -> bool:
        """Connect to QEMU if it listens. Does not wait: the kernel accepts the connection at once."""
        self.disconnect()
        ended = threading.Event()
        with contextlib.ExitStack() as undo:
            try:
                connection = undo.enter_context(connect(self._socket_path))
            except OSError:
                return False
            # A thread, because our own output may block for long (a stopped terminal), and the guest must not wait.
            threading.Thread(target=self._drain, args=(connection, ended), daemon=True).start()
            # Only now: a signal may raise anywhere in here, and `disconnect` waits for a started thread.
            self._socket, self._ended = connection, ended
            undo.pop_all()
        return True

    def disconnect(self) -> None:
        """Leave QEMU's socket to the next client."""
        connection, self._socket = self._socket, None
        self._pending.clear()
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            self._ended.wait()
            connection.close()

    def type(self, data: bytes) -> bool:
        """Queue `data` for the guest; return False, and drop `data`, when too much is waiting already."""
        if len(self._pending) + len(data) > PENDING_BYTES:
            return False
        self._pending += data
        self.flush()
        return True

    @property
    def pending(self) -> int:
        """How many bytes the guest has not read yet."""
        return len(self._pending)

    def flush(self) -> None:
        """Send as much as possible without waiting."""
        if not self.connected or self._socket is None:
            return
        # The reading thread reports the end of the connection.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self._pending:
                del self._pending[: self._socket.send(self._pending)]

    def fileno(self) -> int:
        """The descriptor of the connection, to wait until more can be sent."""
        assert self._socket is not None
        return self._socket.fileno()

    def _drain(self, connection: socket.socket, ended: threading.Event) -> None:
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        with contextlib.suppress(OSError):
            while True:
                poller.poll()
                if not connection.recv(READ_BYTES):
                    break
                self._wake()
        ended.set()
        self._wake()


def connect(path: Path) -> socket.socket:
    """A connection to QEMU's console, which serves one at a time. Does not wait: the kernel accepts it at once.

    Who has it reads what comes, or the guest waits.

    Raises:
        OSError: no QEMU listens there.
    """
    with contextlib.ExitStack() as undo:
        connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        connection.setblocking(False)
        connection.connect(str(path))
        undo.pop_all()
    return connection


def unread(connection: socket.socket) -> int:
    """How many bytes of the guest's output wait in a connection (unix(7), SIOCINQ)."""
    answer = fcntl.ioctl(connection, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def open_log(path: Path) -> int | None:
    """A descriptor of a log, for reading; None when it is missing, or no file.

    Raises:
        OSError: it cannot be opened.
    """
    fd = _open(path)
    return None if fd < 0 else fd


def _words(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(WHO_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
