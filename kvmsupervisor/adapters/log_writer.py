"""Writes the log files of guests and keeps them short, in a thread of its own: the event loop never waits for a disk.

    <name>              the newest output; owned by our own user
    <name>.1, .2, …     older output

Rotation renames the files. A log that a QEMU of an earlier release writes belongs to another user: at most `max_bytes`
of it are read, and it is opened in a way that no link, lease or pipe can block us.
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
"""How many bytes may wait for a slow disk. Further output stays in QEMU's memory, where the excess is dropped."""

MODE = 0o640
"""The mode of the logs: the output of guests may hold secrets."""

DROP_S = 0.1
"""How long a removal waits for an unfinished write. A write that hangs leaves a folder behind, no more."""

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _Job(NamedTuple):
    """Data to write; without data, a log to truncate."""

    number: int
    path: Path
    data: bytes | None


class LogWriter:
    """The thread, started with the first write.

    Args:
        max_bytes: the limit of one log file.
        keep: how many older files are kept.
    """

    def __init__(self, *, max_bytes: int, keep: int) -> None:
        self._max_bytes = max_bytes
        self._keep = keep
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._doing = threading.Lock()
        self._numbers = itertools.count()
        # Jobs for a folder with a lower number are dropped.
        self._dropped: dict[Path, int] = {}
        self._queued = 0
        self._thread: threading.Thread | None = None
        # Logs whose last write failed: each failure is logged once.
        self._failing: set[Path] = set()
        self._rotated: dict[Path, Sparing] = {}

    @property
    def has_room(self) -> bool:
        """Whether the queue has room."""
        return self._queued < QUEUE_BYTES

    def append(self, path: Path, data: bytes) -> None:
        """Append `data` to the log, which is made if it is missing. Does not wait."""
        self._put(path, data)

    def trim(self, path: Path) -> None:
        """Truncate a log that a QEMU writes itself, if it is too long. Does not wait."""
        self._put(path, None)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write the rest, for at most that time: a disk that hangs must not keep the process from ending."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout_s)
            self._thread = None

    def drop(self, folder: Path) -> None:
        """Drop all waiting writes to a folder that is removed. Waits for an unfinished write."""
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
            # A daemon thread: one that hangs in the kernel must not keep the process from ending.
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
            # ENOENT: the folder is gone, and so is the instance.
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
        """Open the log for appending: a regular file of our own. Anything else in its place is set aside."""
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
        """Rename the log and the older files; delete the oldest one."""
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
            # QEMU appends, so it goes on at the beginning. Output between the two steps is lost.
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
