"""The run directory: what a successor needs to adopt, and the lock that keeps a second supervisor out.

    <run>/_supervisor.lock         flock of the one supervisor of this host; holds its pid for people
    <run>/_session.json            the session that a successor resumes
    <run>/_identity.json           exists while the settings name another host or prefix than the living QEMUs have
    <run>/_draining                exists while this host stops all its guests; holds the id of the boot
    <run>/_guard.lock              flock of the one guard of this host; holds its pid and start time
    <run>/_guard.sock, .log        the guard's socket; its log
    <run>/_consoles/sock           where consoles are asked for, by who is let in (supervisor/consoles.py)
    <run>/_<digest>/               a run directory of its own for a container in single mode (single_stand.py)
    <run>/<id>/incarnation.json    the QEMU process, from before it is spawned until its exit is recorded
    <run>/<id>/memory.json         what outlives a process: restart delay, last exit
    <run>/<id>/guard.json          written by the guard when it has killed the QEMU process
    <run>/<id>/qmp.sock            QMP for the supervisor
    <run>/<id>/qmp-spare.sock      QMP for people and for a successor
    <run>/<id>/console.sock, .log  serial console
    <run>/<id>/console.lock        flock of the person who types on it; says who that is
    <run>/<id>/agent.sock          guest agent channel
    <run>/<id>/qemu.log            QEMU's own messages
    <run>/<id>/media.json, …       boot media, see kvmsupervisor/machine/boot_media.py

The supervisor's own names begin with an underscore; no instance id does. The files are small and on a tmpfs, so the
event loop reads and writes them; logs may be large, and a thread writes them. A record is replaced in one step (write
aside, rename), so a reader sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from kvmsupervisor.domain.incarnation import GuardNote, Incarnation, InstanceState, Unreadable
from kvmsupervisor.domain.keys import InstanceId, parse_id
from kvmsupervisor.folders import make_folder

BACKLOG = 4
"""The backlog of the sockets. QEMU serves one client and the next waits: a successor may connect before we are gone."""


DRAIN_SIGNAL = signal.SIGUSR1
"""Tells the supervisor to read the mark `_draining` again: polling it would cost CPU all the time."""


class AlreadyRunning(Exception):
    """Another supervisor uses this run directory. The message says which one."""


class OutOfReach(Exception):
    """The supervisor of this run directory cannot be signalled from here. The message says why."""


class InstanceDir:
    """One instance's folder and the names in it. A path is made when it is asked for: a dozen of them take time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def qmp_socket(self) -> Path:
        """QMP, for the supervisor."""
        return self.path / "qmp.sock"

    @property
    def spare_socket(self) -> Path:
        """QMP, kept free for a successor and for people."""
        return self.path / "qmp-spare.sock"

    @property
    def qemu_log(self) -> Path:
        """What QEMU says on its standard output and error."""
        return self.path / "qemu.log"

    @property
    def console_socket(self) -> Path:
        """The serial console."""
        return self.path / "console.sock"

    @property
    def console_log(self) -> Path:
        """What the guest wrote to it."""
        return self.path / "console.log"

    @property
    def agent_socket(self) -> Path:
        """The guest agent's channel."""
        return self.path / "agent.sock"

    @property
    def guard_note(self) -> Path:
        """What the guard wrote when it killed QEMU."""
        return self.path / "guard.json"

    @property
    def _incarnation(self) -> Path:
        return self.path / "incarnation.json"

    @property
    def _saved(self) -> Path:
        return self.path / "memory.json"

    def create(self) -> bool:
        """Make the folder unless it exists; return whether it was made."""
        return make_folder(self.path)

    def remove(self) -> None:
        """Delete the folder and everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def read_incarnation(self) -> Incarnation | None:
        """The record of the QEMU process; None when there is none.

        Raises:
            Unreadable: there is one that this release cannot read; the message names the file.
        """
        try:
            data = _read(self._incarnation)
            record = None if data is None else Incarnation.from_json(data)
        except OSError as error:
            raise Unreadable(f"{self._incarnation}: it cannot be opened ({error.strerror})") from error
        except Unreadable as error:
            raise Unreadable(f"{self._incarnation}: {error}") from error
        if record is not None and record.instance != self.path.name:
            # The folder was copied: two instances would have the same process.
            raise Unreadable(f"{self._incarnation}: it is the record of instance {record.instance}")
        return record

    @property
    def has_record(self) -> bool:
        """Whether there is a record of a QEMU process."""
        return self._incarnation.exists()

    def write_incarnation(self, record: Incarnation) -> None:
        """Write the record of the QEMU process, for root only: a URL in its keys may hold a password."""
        write_whole(self._incarnation, record.to_json(), mode=0o600)

    def drop_incarnation(self) -> None:
        """Delete the record: the process is proven gone."""
        _drop(self._incarnation)
        _drop(self.guard_note)

    def guard_killed_at(self, incarnation: str) -> str | None:
        """When the guard killed that QEMU process; None when it did not, or its note cannot be read."""
        try:
            data = _read(self.guard_note)
            note = None if data is None else GuardNote.from_json(data)
        except Unreadable:
            return None
        return note.at if note is not None and note.incarnation == incarnation else None

    def read_state(self, boot_id: str) -> InstanceState:
        """The state that was saved; a new one when there is none, or only one of an earlier boot.

        Raises:
            Unreadable: there is one that this release cannot read; the message names the file.
        """
        try:
            data = _read(self._saved)
            saved = InstanceState(boot_id=boot_id) if data is None else InstanceState.from_json(data)
        except OSError as error:
            raise Unreadable(f"{self._saved}: it cannot be opened ({error.strerror})") from error
        except Unreadable as error:
            raise Unreadable(f"{self._saved}: {error}") from error
        return saved if saved.boot_id == boot_id else InstanceState(boot_id=boot_id)

    def write_state(self, saved: InstanceState) -> None:
        """Save the state."""
        write_whole(self._saved, saved.to_json())

    def drop_state(self) -> None:
        """Delete the saved state: the instance starts from nothing when it comes back."""
        _drop(self._saved)

    def drop_secrets(self) -> None:
        """Delete the files with secrets that an earlier release has left; QEMU gets them in memory now."""
        for name in ("ceph.key", "spice-password"):
            _drop(self.path / name)

    def listen(self, path: Path) -> socket.socket:
        """A listening unix socket at `path`, for QEMU to inherit: a client can connect before QEMU exists."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Before `bind`, so that the path never has another mode (unix_bind in the kernel).
            os.fchmod(listener.fileno(), 0o600)
            try:
                listener.bind(str(path))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                # Of an earlier QEMU.
                path.unlink(missing_ok=True)
                listener.bind(str(path))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener

    def log_size(self) -> int:
        """The length of QEMU's log in bytes."""
        try:
            return self.qemu_log.stat().st_size
        except FileNotFoundError:
            return 0

    def log_tail(self, offset: int, *, limit: int = 8192) -> list[str]:
        """The last lines behind `offset`, from at most `limit` bytes."""
        try:
            with self.qemu_log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                # A log that was rotated meanwhile is shorter than the offset: all its lines are newer.
                begin = offset if offset <= end else 0
                log.seek(max(begin, end - limit))
                return log.read(limit).decode(errors="replace").splitlines()
        except FileNotFoundError:
            return []


class RunDir:
    """`KVM_RUN_DIR`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.guard_lock = path / "_guard.lock"
        self.guard_socket = path / "_guard.sock"
        self._lock_fd = -1

    def acquire(self) -> None:
        """Become the one supervisor of this run directory, until the process ends.

        Raises:
            AlreadyRunning: there is one already.
        """
        make_folder(self.path)
        lock = self.path / "_supervisor.lock"
        descriptor = _open_lock(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise AlreadyRunning(
                f"{lock} is held by process {holder}: a supervisor runs here already; "
                "stop it first, or give this one another KVM_RUN_DIR and KVM_HOSTNAME"
            ) from error
        # The pid is for people and for programs that signal us: a full or read-only file system must not stop us.
        # Written over the old pid, which takes no new space.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0))
        self._lock_fd = descriptor
        self._tighten()

    def _tighten(self) -> None:
        """Close locks, logs and sockets to other users that an earlier release left open.

        Beside the folders of instances all our files begin with `_`. What else is there is a person's.
        """
        for folder, _, names in os.walk(self.path):
            for name in names:
                if folder == str(self.path) and not name.startswith("_"):
                    continue
                with contextlib.suppress(OSError):
                    # Most files are closed already and need no further check.
                    if os.lstat(f"{folder}/{name}").st_mode & 0o077:
                        _keep_from_others(Path(folder, name))

    @property
    def was_used(self) -> bool:
        """Whether a supervisor has used this run directory since the host booted."""
        return (self.path / "_supervisor.lock").exists()

    def release(self) -> None:
        """Release the lock, for the next supervisor."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def guard(self) -> tuple[int, int] | None:
        """Pid and start time of the last guard, which may have ended; None when there was none."""
        words = _glimpse(self.guard_lock).split()
        return (int(words[0]), int(words[1])) if len(words) == 2 and all(map(bytes.isdigit, words)) else None

    def open_guard_log(self) -> int:
        """The guard's log, opened for appending; the caller closes it."""
        log = self.path / "_guard.log"
        return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def is_draining(self, boot_id: str) -> bool:
        """Whether this host stops all its guests. A mark of an earlier boot does not count."""
        return _glimpse(self._draining).decode(errors="replace").strip() == boot_id

    def mark_draining(self, boot_id: str) -> None:
        """Make the supervisor, this one and the next, stop all guests and start none, until `unmark_draining`."""
        make_folder(self.path)
        write_whole(self._draining, f"{boot_id}\n".encode())

    def unmark_draining(self) -> None:
        """Delete the mark."""
        self._draining.unlink(missing_ok=True)

    def signal_supervisor(self) -> bool:
        """Signal the running supervisor to read the mark; return False when none runs.

        Raises:
            OutOfReach: one runs, in another PID namespace.
        """
        lock = self.path / "_supervisor.lock"
        try:
            descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        with os.fdopen(descriptor, "rb") as file:
            text = file.read(32).decode(errors="replace").strip()
            with contextlib.suppress(OSError, ValueError, OverflowError):
                # The pidfd first: /proc shows the process of the pidfd afterwards.
                pidfd = os.pidfd_open(int(text))
                try:
                    # We have the file open, too: our own pid in it means a supervisor in another PID namespace.
                    if int(text) != os.getpid() and _has_open(int(text), os.fstat(descriptor)):
                        signal.pidfd_send_signal(pidfd, DRAIN_SIGNAL)
                        return True
                finally:
                    os.close(pidfd)
            # Not before: taking the lock, even for a moment, would stop a supervisor that is starting.
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                return False
        raise OutOfReach(
            f"{lock} is held by process {text or 'unknown'}, which is not here: "
            "use the host's PID namespace (--pid=host)"
        )

    @property
    def _draining(self) -> Path:
        return self.path / "_draining"

    def instance(self, instance: InstanceId) -> InstanceDir:
        """The folder of one instance, whether it exists or not."""
        return InstanceDir(self.path / instance)

    def find(self, instance: InstanceId) -> InstanceDir:
        """The folder of one instance: the supervisor's, or that of a container in single mode.

        The folder with a record of a QEMU comes first, then one that exists.
        """
        folders = [self.instance(instance), *map(InstanceDir, sorted(self.path.glob(f"_*/{instance}")))]
        there = [folder for folder in folders if folder.path.is_dir()]
        return next((folder for folder in there if folder.has_record), there[0] if there else folders[0])

    def instances(self) -> Iterator[InstanceId]:
        """The ids of all instances with a folder."""
        if not self.path.is_dir():
            return
        for entry in sorted(self.path.iterdir()):
            if entry.is_dir() and (instance := parse_id(entry.name)) is not None:
                yield instance


def write_whole(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file in one step: a reader, or a successor after a crash, sees the old content or the new.

    Raises:
        OSError: the file cannot be written and is unchanged; names `path`.
    """
    aside = f"{path}.new"
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "wb") as file:
            # A file that an earlier release left behind may have another mode.
            os.fchmod(file.fileno(), mode)
            file.write(data)
        # Not `Path.replace`, which makes another path of its result.
        os.replace(aside, path)  # noqa: PTH105
    except OSError as error:
        # On a full file system half a file takes space from others.
        _drop(Path(aside))
        raise OSError(error.errno, error.strerror, str(path)) from error


def _has_open(pid: int, file: os.stat_result) -> bool:
    """Whether a process has this file open."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samestat(entry.stat(), file):
                return True
    return False


def _open_lock(path: Path) -> int:
    """Open a file to lock, and make it if it is missing. An existing one may be on a read-only file system.

    For its owner only: a user who may read a file may lock it (flock(2)). A file of an earlier release is changed.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS or not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(PermissionError):
        os.fchmod(descriptor, 0o600)
    return descriptor


def _keep_from_others(path: Path) -> None:
    """Close a file or a socket to other users; a lock to its group, too, as in `_open_lock`.

    The file is not opened, because a QEMU may own it: a link could lead elsewhere, a pipe or a lease could block us.
    """
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mode = os.fstat(found).st_mode
        theirs = 0o077 if path.suffix == ".lock" else 0o007
        if (stat.S_ISREG(mode) or stat.S_ISSOCK(mode)) and mode & theirs:
            Path(f"/proc/self/fd/{found}").chmod(stat.S_IMODE(mode) & ~theirs)
    finally:
        os.close(found)


def _read(path: Path) -> bytes | None:
    """The content of the file; None when there is no file.

    Raises:
        Unreadable: the file exists and cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror or error}") from error


def _glimpse(path: Path) -> bytes:
    """The content of the file; empty when there is no file, or it cannot be read."""
    try:
        return _read(path) or b""
    except Unreadable:
        return b""


def _drop(path: Path) -> None:
    """Delete a file. A file system that refuses does not matter: the file is overwritten later."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
