"""An instance's serial console, as people use it: all read its log, one of them has the keyboard.

QEMU's socket serves one client at a time and keeps nothing for the next. So whatever is shown comes from the log, which
the supervisor writes beside it, and the socket is for typing only. Who may type holds an flock beside it.

    console.log    read by everybody; set aside as console.log.1 (that of an earlier release's QEMU: copied, and cut)
    console.sock   connected by whoever has the keyboard; what comes from it is dropped, so that the guest never waits
    console.lock   flock of whoever has the keyboard; holds words that say who that is
    console.want   words of somebody who wants the keyboard; whoever has it lets go then
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path

READ_BYTES = 64 * 1024
"""How much is taken from the log at once."""

SCROLLBACK_BYTES = 1024 * 1024
"""How far back lines are looked for: 20,000 of them, at a console's usual length."""

PENDING_BYTES = 64 * 1024
"""How much may wait for a guest that does not read its console."""

WHO_BYTES = 200


class ConsoleLog:
    """What the guest writes: first the last lines, then all that comes, over every rotation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._older = path.with_name(f"{path.name}.1")
        self._fd = -1
        self._at = 0

    def begin(self, lines: int) -> bytes:
        """The last `lines` lines that are there, a line that is not finished counted; `read` goes on behind them."""
        self._reopen()
        if self._fd < 0:
            return b""
        self._at = os.fstat(self._fd).st_size
        kept = _tail(self._fd, self._at)
        if kept.count(b"\n") <= lines:
            with contextlib.suppress(OSError), self._older.open("rb") as older:
                kept = _tail(older.fileno(), os.fstat(older.fileno()).st_size) + kept
        return _last_lines(kept, lines)

    def read(self) -> bytes:
        """What was written since, at most `READ_BYTES` of it; nothing when there is nothing new."""
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return b""
        if self._fd < 0:
            self._reopen()
        elif not os.path.samestat(now, os.fstat(self._fd)):
            # It was set aside, and is whole by now; or the instance was removed, and came back.
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
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _reopen(self) -> None:
        self.close()
        self._at = 0
        with contextlib.suppress(FileNotFoundError):
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def _missed(self, at: int) -> bytes:
        """What had been written behind `at` when the log was copied and truncated: the copy has it."""
        with contextlib.suppress(OSError), self._older.open("rb") as older:
            return os.pread(older.fileno(), SCROLLBACK_BYTES, at)
        return b""


def _tail(fd: int, end: int) -> bytes:
    begin = max(0, end - SCROLLBACK_BYTES)
    return os.pread(fd, end - begin, begin)


def _last_lines(data: bytes, lines: int) -> bytes:
    if lines <= 0:
        return b""
    split = data.split(b"\n")
    # Behind the last line break there is a line that is not finished, or nothing.
    return b"\n".join(split[-(lines + (not split[-1])) :])


class Keyboard:
    """The right to type on one console, and the connection that it goes through.

    Args:
        folder: the instance's, in the run directory.
        who: words for others: who has it.
        wake: called, from another thread, when the guest has written something or the connection has ended.
    """

    def __init__(self, folder: Path, *, who: str, wake: Callable[[], None]) -> None:
        self._socket_path = folder / "console.sock"
        self._lock_path = folder / "console.lock"
        self._want_path = folder / "console.want"
        self._who = who.encode()[:WHO_BYTES]
        self._wake = wake
        self._lock = -1
        self._socket: socket.socket | None = None
        self._ended = threading.Event()
        self._pending = bytearray()

    @property
    def ours(self) -> bool:
        """Whether we have it. Also after the instance was removed and came back: a lock on another file is none."""
        if self._lock < 0:
            return False
        try:
            return os.path.samestat(self._lock_path.stat(), os.fstat(self._lock))
        except FileNotFoundError:
            return False

    def take(self) -> bool:
        """Take it, if nobody has it."""
        if self.ours:
            return True
        self.release()
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with contextlib.suppress(PermissionError):
            # Whoever may read a file may lock it (flock(2)). One of an earlier release is made so, too.
            os.fchmod(descriptor, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        # On a full disk it is had all the same; only who has it is not told.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self._who, 0)
        self._lock = descriptor
        # Of somebody who gave up, or was killed: who still wants it says so again.
        self.want_no_more()
        return True

    def release(self) -> None:
        """Let it go. What was not sent yet is dropped."""
        self.disconnect()
        if self._lock >= 0:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = -1

    def holder(self) -> str:
        """Who has it, in words of theirs; empty when nobody has. Somebody killed may be named until the next comes."""
        return _words(self._lock_path)

    def want(self) -> None:
        """Ask whoever has it to let go."""
        descriptor = os.open(
            self._want_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        with os.fdopen(descriptor, "wb") as want:
            want.write(self._who)

    def wanted_by(self) -> str:
        """Who asks for it; empty when nobody does."""
        return _words(self._want_path)

    def want_no_more(self) -> None:
        """The asking is over."""
        self._want_path.unlink(missing_ok=True)

    # The connection.

    @property
    def connected(self) -> bool:
        """Whether QEMU is at the other end."""
        return self._socket is not None and not self._ended.is_set()

    def connect(self) -> bool:
        """Connect to QEMU, if it listens. Does not wait: QEMU's socket takes a client into its line at once."""
        self.disconnect()
        ended = threading.Event()
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
            try:
                connection.setblocking(False)
                connection.connect(str(self._socket_path))
            except OSError:
                return False
            # A thread, because our own output may block for long (a stopped terminal), and the guest shall not.
            threading.Thread(target=self._drain, args=(connection, ended), daemon=True).start()
            # Only now: a signal may raise anywhere in here, and `disconnect` waits for a thread that has to be there.
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
        """Have `data` sent; False when too much is waiting already, and `data` is dropped."""
        if len(self._pending) + len(data) > PENDING_BYTES:
            return False
        self._pending += data
        self.flush()
        return True

    @property
    def pending(self) -> int:
        """Bytes that the guest has not taken yet."""
        return len(self._pending)

    def flush(self) -> None:
        """Send what can be sent now."""
        if not self.connected or self._socket is None:
            return
        # The end of the connection is told by the thread that reads from it.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self._pending:
                del self._pending[: self._socket.send(self._pending)]

    def fileno(self) -> int:
        """Of the connection, to wait until more can be sent."""
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


def _words(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(WHO_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
