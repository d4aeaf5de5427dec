"""Files with the events of instances, on storage that outlives a boot; written in a thread, so that no loop waits.

    <folder>/<id>.jsonl, <id>.jsonl.1     the newer and the older half, `HALF_BYTES` each at most
    <folder>/_left/                       those of instances that are no longer here, for `KEPT_S`

A line is appended at once and not synced: a host that loses power loses its last seconds, and a line that is torn is
left out by readers. A disk that is full, slow or gone costs these lines only; that is logged once, until it goes well.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import structlog

from kvmsupervisor.folders import make_folder

log = structlog.get_logger(__name__)

HALF_BYTES = 64 * 1024
"""Two halves are the limit of an instance's history. A crash loop writes some hundred lines a day."""

KEPT_S = 7 * 86_400.0
"""How long the events of a removed instance are kept: a week has the weekend in it on which nobody asks."""

MOST_LEFT = 1000
"""Most removed instances whose events are kept. Arbitrary: a host that makes and removes machines all day must not
fill its disk."""

MOST_WAITING = 1000
"""Lines that wait for a disk that hangs. Later ones are lost, and that is logged."""

GATHER_S = 0.25
"""How long a line waits for the next ones. A start has its lines within that time, and the thread that would write them
meanwhile would hold it up by some milliseconds: Python runs one thread at a time. Arbitrary else."""

LEFT = "_left"
SUFFIX, OLDER = ".jsonl", ".1"

FILE_MODE, FOLDER_MODE = 0o640, 0o750
"""Reasons quote keys and QEMU's words."""

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def events_folder(state_dir: Path) -> Path:
    """The folder below the state directory: no instance has a name like that."""
    return state_dir / "_events"


class EventFiles:
    """The files of one host, and their thread, which begins with the first line.

    Args:
        folder: of the files; None to keep none.
        now: the time of day, in seconds.
    """

    def __init__(self, folder: Path | None, *, now: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._now = now
        self._jobs: queue.Queue[Callable[[Path], None] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._failing = False
        self._full = False
        # Whether lines are on their way to the thread, and wait for no more.
        self._hurry = threading.Event()

    def append(self, instance: str, line: bytes) -> None:
        """Append a line, which ends with a newline. Does not wait."""
        self._put(lambda folder: self._append(folder, instance, line))

    def set_aside(self, instance: str) -> None:
        """The instance is no longer here: keep its events for a while. Does not wait."""
        self._put(lambda folder: self._set_aside(folder, instance))

    def begin(self, instances: Collection[str]) -> None:
        """These instances are here; what is left of others is kept for a while. Does not wait."""
        here = frozenset(instances)
        self._put(lambda folder: self._begin(folder, here))

    def close(self, timeout_s: float = 2.0) -> None:
        """Write the rest, for at most that time: a disk that hangs must not keep the process from ending."""
        if self._thread is not None:
            self._hurry.set()
            with contextlib.suppress(queue.Full):
                self._jobs.put_nowait(None)
                self._thread.join(timeout_s)
            self._thread = None
            self._hurry = threading.Event()

    def _put(self, job: Callable[[Path], None]) -> None:
        if self._folder is None:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            if not self._full:
                self._full = True
                log.warning("events.lost", folder=str(self._folder), reason="the disk does not take them")
            return
        self._full = False
        if self._thread is None:
            # A daemon thread: one that hangs in the kernel must not keep the process from ending.
            arguments = (self._folder, self._hurry)
            self._thread = threading.Thread(target=self._run, args=arguments, name="events", daemon=True)
            self._thread.start()

    def _run(self, folder: Path, hurry: threading.Event) -> None:
        while (job := self._jobs.get()) is not None:
            if self._jobs.empty():
                hurry.wait(GATHER_S)
            try:
                job(folder)
            except OSError as error:
                if not self._failing:
                    self._failing = True
                    file = str(error.filename or folder)
                    log.warning("events.unwritten", file=file, reason=error.strerror or str(error))
            else:
                self._failing = False

    # --- what the thread does ---------------------------------------------------------------------------------

    def _append(self, folder: Path, instance: str, line: bytes) -> None:
        path = folder / (instance + SUFFIX)
        try:
            fd = self._open(path, 0)
        except FileNotFoundError:
            make_folder(folder, mode=FOLDER_MODE)
            self._take_back(folder, instance)
            fd = self._open(path)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                # An earlier write was cut off.
                line = b"\n" + line
            if size + len(line) <= HALF_BYTES:
                self._write(fd, path, line)
                return
        finally:
            os.close(fd)
        path.replace(path.with_name(path.name + OLDER))
        fd = self._open(path)
        try:
            self._write(fd, path, line.lstrip(b"\n"))
        finally:
            os.close(fd)

    def _open(self, path: Path, create: int = os.O_CREAT) -> int:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | create | _FLAGS, FILE_MODE)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise OSError(errno.EEXIST, "something else is in its place", str(path))

    def _write(self, fd: int, path: Path, line: bytes) -> None:
        if os.write(fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def _begin(self, folder: Path, here: Collection[str]) -> None:
        if folder.is_dir():
            for path in [*folder.glob("*" + SUFFIX)]:
                instance = path.name.removesuffix(SUFFIX)
                if instance not in here:
                    self._set_aside(folder, instance)
            self._sweep(folder / LEFT)

    def _set_aside(self, folder: Path, instance: str) -> None:
        left = folder / LEFT
        for name in (instance + SUFFIX, instance + SUFFIX + OLDER):
            with contextlib.suppress(FileNotFoundError):
                # From now on it is kept for that time, however old its last event is.
                os.utime(folder / name, (self._now(), self._now()))
                make_folder(left, mode=FOLDER_MODE)
                (folder / name).replace(left / name)
        self._sweep(left)

    def _take_back(self, folder: Path, instance: str) -> None:
        for name in (instance + SUFFIX, instance + SUFFIX + OLDER):
            with contextlib.suppress(FileNotFoundError):
                (folder / LEFT / name).replace(folder / name)

    def _sweep(self, left: Path) -> None:
        try:
            found = [(entry.stat(follow_symlinks=False).st_mtime, entry.path) for entry in os.scandir(left)]
        except FileNotFoundError:
            return
        found.sort(reverse=True)
        for number, (at, path) in enumerate(found):
            if number >= 2 * MOST_LEFT or at < self._now() - KEPT_S:
                Path(path).unlink()


def read(folder: Path, instance: str) -> bytes:
    """What an instance's files hold, oldest first; empty without any. At most twice `HALF_BYTES`.

    Raises:
        OSError: a file is there and cannot be read.
    """
    name = instance + SUFFIX
    found = b"".join(_read(folder / one) for one in (name + OLDER, name))
    return found or b"".join(_read(folder / LEFT / one) for one in (name + OLDER, name))


def instances_in(folder: Path) -> list[str]:
    """The instances with a file there, also those of which the events are kept for a while."""
    try:
        return [
            name.removesuffix(SUFFIX)
            for name in sorted(path.name for path in folder.iterdir())
            if name.endswith(SUFFIX)
        ]
    except FileNotFoundError:
        return []


def _read(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return b""
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return b""
        return os.pread(fd, HALF_BYTES, max(0, found.st_size - HALF_BYTES))
    finally:
        os.close(fd)
