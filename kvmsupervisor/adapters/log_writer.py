"""Log files of guests, written and kept short by a thread of its own: nobody ever waits for them.

    <name>              what came last; this user's own
    <name>.1, .2, …     what came before

They are set aside by renaming. Of a log that is another user's, because a QEMU of an earlier release writes it by its
path, no more than `max_bytes` are ever read, and it is opened so that no link, no lease and no pipe can hold us up.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import queue
import stat
import threading
import time
from pathlib import Path
from typing import NamedTuple

import structlog

from kvmsupervisor.domain.sparing import Sparing

log = structlog.get_logger(__name__)

QUEUE_BYTES = 4 << 20
"""How much may wait for a slow disk. Beyond it nothing is taken: it stays with QEMU, which drops what is too much."""

MODE = 0o640
"""What guests write may hold secrets."""

DROP_S = 0.1
"""How long a removal waits for a write that is half done. One that hangs leaves a folder behind, no more."""

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _Job(NamedTuple):
    """Something to write, or, without data, a log to be cut."""

    number: int
    path: Path
    data: bytes | None


class LogWriter:
    """The thread, begun when there is something to write.

    Args:
        max_bytes: how long a log may become.
        keep: how many that were set aside are kept.
    """

    def __init__(self, *, max_bytes: int, keep: int) -> None:
        self._max_bytes = max_bytes
        self._keep = keep
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._doing = threading.Lock()
        self._numbers = itertools.count()
        # Jobs for a folder that came before this number are no longer wanted.
        self._dropped: dict[Path, int] = {}
        self._queued = 0
        self._thread: threading.Thread | None = None
        # Those that could not be written last time: told once.
        self._failing: set[Path] = set()
        self._rotated: dict[Path, Sparing] = {}

    @property
    def has_room(self) -> bool:
        """Whether more is taken."""
        return self._queued < QUEUE_BYTES

    def append(self, path: Path, data: bytes) -> None:
        """Have `data` written at the end, of a new log if there is none. Does not wait."""
        self._put(path, data)

    def trim(self, path: Path) -> None:
        """Have a log cut that somebody else writes, if it has become too long. Does not wait."""
        self._put(path, None)

    def close(self, timeout_s: float = 2.0) -> None:
        """Have the rest written, for so long; a disk that hangs keeps nobody from ending."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout_s)
            self._thread = None

    def drop(self, folder: Path) -> None:
        """Nothing that waits to be written there is wanted: the folder is removed. Waits for what is half done."""
        self._dropped[folder] = next(self._numbers)
        if self._doing.acquire(timeout=DROP_S):
            for path in [path for path in self._rotated if path.parent == folder]:
                del self._rotated[path]
            self._failing = {path for path in self._failing if path.parent != folder}
            self._doing.release()

    def _put(self, path: Path, data: bytes | None) -> None:
        with self._lock:
            self._queued += len(data or b"")
        self._jobs.put(_Job(next(self._numbers), path, data))
        if self._thread is None:
            # A daemon: one that hangs in the kernel must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="guest-logs", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._doing:
                if job.number > self._dropped.get(job.path.parent, -1):
                    self._do(job.path, job.data)
            with self._lock:
                self._queued -= len(job.data or b"")

    def _do(self, path: Path, data: bytes | None) -> None:
        try:
            if data is None:
                self._trim(path)
            else:
                self._append(path, data)
        except OSError as error:
            # Its folder is gone: so is the instance.
            if error.errno != errno.ENOENT and path not in self._failing:
                self._failing.add(path)
                log.warning(
                    "log.unwritten", instance=path.parent.name, file=str(path), reason=error.strerror or str(error)
                )
        else:
            self._failing.discard(path)

    # --- what the thread does ---------------------------------------------------------------------------------

    def _append(self, path: Path, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            fd = self._open_own(path)
            try:
                room = self._max_bytes - os.fstat(fd).st_size
                if rest and room > 0:
                    rest = rest[os.write(fd, rest[:room]) :]
            finally:
                os.close(fd)
            if not rest:
                return
            if room <= 0:
                self._set_aside(path)

    def _open_own(self, path: Path) -> int:
        """The log, open for appending: a plain file of ours alone. Anything else in its place is set aside."""
        for _ in range(2):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _FLAGS, MODE)
            except OSError as error:
                # A link; a pipe that nobody reads; a lease.
                if error.errno not in {errno.ELOOP, errno.ENXIO, errno.EWOULDBLOCK}:
                    raise
            else:
                found = os.fstat(fd)
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1:
                    if found.st_mode & 0o7777 & ~MODE:
                        os.fchmod(fd, MODE)
                    return fd
                os.close(fd)
            self._set_aside(path)
        raise OSError(errno.EEXIST, "somebody puts something else in its place")

    def _set_aside(self, path: Path) -> None:
        """Rename it, and those that were before it; the oldest goes."""
        self._make_way(path)
        with contextlib.suppress(FileNotFoundError):
            if self._keep:
                path.replace(path.with_name(f"{path.name}.1"))
            else:
                path.unlink()
        self._tell_rotated(path)

    def _tell_rotated(self, path: Path) -> None:
        untold = self._rotated.setdefault(path, Sparing()).note(time.monotonic())
        if untold is not None:
            log.info("log.rotated", instance=path.parent.name, file=str(path), **({"untold": untold} if untold else {}))

    def _make_way(self, path: Path) -> None:
        for number in range(self._keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(f"{path.name}.{number}").replace(path.with_name(f"{path.name}.{number + 1}"))

    def _trim(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | _FLAGS)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size <= self._max_bytes:
                return
            # The writer appends, so it goes on at the beginning. What it writes between the two is lost.
            tail = os.pread(fd, self._max_bytes, found.st_size - self._max_bytes)
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        aside = path.with_name(path.name + ".new")
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        if self._keep and tail.strip(b"\0"):
            kept = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, MODE)
            with os.fdopen(kept, "wb") as file:
                file.write(tail)
            self._make_way(path)
            aside.replace(path.with_name(f"{path.name}.1"))
        self._tell_rotated(path)
