"""The run directory: what a successor needs to adopt, and the lock that keeps a second supervisor out.

    <run>/_supervisor.lock         flock of the one supervisor of this host; holds its pid for people
    <run>/_session.json            the session that a successor resumes
    <run>/_identity.json           there while the settings say another name or prefix than what lives was started under
    <run>/_draining                there while this host stops all its guests; holds the boot that this is about
    <run>/_guard.lock              flock of the one guard of this host; holds its pid and start time
    <run>/_guard.sock, .log        where it is spoken to; what it says
    <run>/_<digest>/               a run directory of its own for a container in single mode (single_stand.py)
    <run>/<id>/incarnation.json    the QEMU process, from before it is spawned until it is buried
    <run>/<id>/memory.json         what outlives a process: backoff, last exit
    <run>/<id>/guard.json          written by the guard when it has killed the QEMU process
    <run>/<id>/qmp.sock            QMP for the supervisor
    <run>/<id>/qmp-spare.sock      QMP for people and for a successor
    <run>/<id>/console.sock, .log  serial console
    <run>/<id>/console.lock        flock of whoever types on it; says who that is
    <run>/<id>/agent.sock          guest agent channel
    <run>/<id>/qemu.log            what QEMU itself says
    <run>/<id>/ceph.key            its key to Ceph, for QEMU's group only
    <run>/<id>/media.json, …       boot media, see kvmsupervisor/machine/boot_media.py

The supervisor's own names begin with an underscore, which no instance id does. Files are small and lie on a tmpfs, so
they are read and written in the event loop; logs, which may be large, are written by a thread. Records are replaced
whole (write aside, rename), so a reader sees the old or the new one.
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
from functools import lru_cache
from pathlib import Path

from kvmsupervisor.domain.incarnation import GuardNote, Incarnation, Memory, Unreadable
from kvmsupervisor.domain.keys import InstanceId, parse_id

BACKLOG = 4
"""Of the QMP sockets. One client is served, the next waits: the successor may come before we are gone."""


DRAIN_SIGNAL = signal.SIGUSR1
"""Tells the supervisor to look at the mark `_draining` again: polling it would cost something all the time."""


class AlreadyRunning(Exception):
    """Another supervisor has this run directory. The message says which."""


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
    def ceph_key(self) -> Path:
        """The key to Ceph, while QEMU starts."""
        return self.path / "ceph.key"

    @property
    def spice_password(self) -> Path:
        """The password, while QEMU starts."""
        return self.path / "spice-password"

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
    def _memory(self) -> Path:
        return self.path / "memory.json"

    def create(self) -> None:
        """Make the folder; it may be there already."""
        make_folder(self.path)

    def remove(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def read_incarnation(self) -> Incarnation | None:
        """The record of the QEMU process; None when there is none.

        Raises:
            Unreadable: there is one that this release cannot read; the message names the file.
        """
        try:
            data = _read(self._incarnation)
            record = None if data is None else _parsed(data)
        except OSError as error:
            raise Unreadable(f"{self._incarnation}: it cannot be opened ({error.strerror})") from error
        except Unreadable as error:
            raise Unreadable(f"{self._incarnation}: {error}") from error
        if record is not None and record.instance != self.path.name:
            # A folder that was copied. Two instances would have one process.
            raise Unreadable(f"{self._incarnation}: it is the record of instance {record.instance}")
        return record

    @property
    def has_record(self) -> bool:
        """Whether a QEMU process is on record."""
        return self._incarnation.exists()

    def write_incarnation(self, record: Incarnation) -> None:
        """Put the QEMU process on record, for root only: a URL in its keys may hold a password."""
        write_whole(self._incarnation, record.to_json(), mode=0o600)

    def drop_incarnation(self) -> None:
        """Delete the record: the process is proven gone."""
        _drop(self._incarnation)
        _drop(self.guard_note)

    def guard_killed_at(self, incarnation: str) -> str | None:
        """When the guard killed that QEMU process; None when it did not, or nobody can read what it has written."""
        try:
            data = _read(self.guard_note)
            note = None if data is None else GuardNote.from_json(data)
        except Unreadable:
            return None
        return note.at if note is not None and note.incarnation == incarnation else None

    def read_memory(self, boot_id: str) -> Memory:
        """What outlived the last process; a fresh memory when there is none, or one of an earlier boot.

        Raises:
            Unreadable: there is one that this release cannot read; the message names the file.
        """
        try:
            data = _read(self._memory)
            memory = Memory(boot_id=boot_id) if data is None else Memory.from_json(data)
        except OSError as error:
            raise Unreadable(f"{self._memory}: it cannot be opened ({error.strerror})") from error
        except Unreadable as error:
            raise Unreadable(f"{self._memory}: {error}") from error
        return memory if memory.boot_id == boot_id else Memory(boot_id=boot_id)

    def write_memory(self, memory: Memory) -> None:
        """Keep what outlives a process."""
        write_whole(self._memory, memory.to_json())

    def drop_memory(self) -> None:
        """Forget: the instance starts from nothing when it comes back."""
        _drop(self._memory)

    def write_ceph_key(self, key: str, *, group: int | None) -> Path:
        """Keep the key to Ceph where QEMU reads it, once, when it starts; return where.

        Args:
            key: base64, as a keyring holds it.
            group: id of QEMU's group, which may read it; None when QEMU runs as this user.
        """
        aside = self.ceph_key.with_name(self.ceph_key.name + ".new")
        aside.unlink(missing_ok=True)
        # Never readable for others, not for a moment, whatever the umask is.
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, key.encode())
            if group is not None:
                os.fchown(descriptor, -1, group)
            os.fchmod(descriptor, 0o640)
        finally:
            os.close(descriptor)
        aside.replace(self.ceph_key)
        return self.ceph_key

    def drop_ceph_key(self) -> None:
        """Delete the key to Ceph: QEMU has read it."""
        _drop(self.ceph_key)

    def listen(self, path: Path) -> socket.socket:
        """A listening unix socket at `path`, to be handed to QEMU, so that a client may connect before QEMU exists."""
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Of the socket to be, so that it is never there with another mode (unix_bind in the kernel).
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(str(path))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener

    def log_size(self) -> int:
        """Bytes in QEMU's log."""
        return self.qemu_log.stat().st_size if self.qemu_log.exists() else 0

    def log_tail(self, offset: int, *, limit: int = 8192) -> list[str]:
        """The last lines that were written behind `offset`, from at most `limit` bytes."""
        try:
            with self.qemu_log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                # A log that was rotated meanwhile is shorter than the offset: all of it is newer then.
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
            AlreadyRunning: another one is.
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
        # Only people read it, and whoever signals us: a full or read-only file system is no reason not to supervise.
        # Written over what is there, which takes no new room.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0))
        self._lock_fd = descriptor
        self._tighten()

    def _tighten(self) -> None:
        """Take from others what an earlier release left open to them: locks, logs, sockets."""
        for folder, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(OSError):
                    # What is closed already is most of it, and needs no second look.
                    if os.lstat(f"{folder}/{name}").st_mode & 0o077:
                        _keep_from_others(Path(folder, name))

    @property
    def was_used(self) -> bool:
        """Whether a supervisor ever ran with it, since the host booted."""
        return (self.path / "_supervisor.lock").exists()

    def release(self) -> None:
        """Let the next supervisor in."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def guard(self) -> tuple[int, int] | None:
        """Pid and start time of the last guard, which may be gone; None when there was none."""
        words = _glimpse(self.guard_lock).split()
        return (int(words[0]), int(words[1])) if len(words) == 2 and all(map(bytes.isdigit, words)) else None

    def open_guard_log(self) -> int:
        """The guard's log, opened for appending; the caller closes it."""
        log = self.path / "_guard.log"
        return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def is_draining(self, boot_id: str) -> bool:
        """Whether this host stops all its guests. A mark of an earlier boot has had its effect."""
        return _glimpse(self._draining).decode(errors="replace").strip() == boot_id

    def mark_draining(self, boot_id: str) -> None:
        """Have the supervisor, this one or the next, stop all guests and start none, until `unmark_draining`."""
        make_folder(self.path)
        write_whole(self._draining, f"{boot_id}\n".encode())

    def unmark_draining(self) -> None:
        """End that."""
        self._draining.unlink(missing_ok=True)

    def signal_supervisor(self) -> bool:
        """Have the running supervisor look at the mark; False when none runs.

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
                # The pidfd first: what is found in /proc afterwards is of the process that it holds.
                pidfd = os.pidfd_open(int(text))
                try:
                    # We have it open, too. Our own number is that of a supervisor in another PID namespace.
                    if int(text) != os.getpid() and _has_open(int(text), os.fstat(descriptor)):
                        signal.pidfd_send_signal(pidfd, DRAIN_SIGNAL)
                        return True
                finally:
                    os.close(pidfd)
            # Not before: holding the lock, for a moment even, would be in the way of a supervisor that starts.
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
        """The folder of one instance, made or not."""
        return InstanceDir(self.path / instance)

    def find(self, instance: InstanceId) -> InstanceDir:
        """The folder of one instance wherever it is: the supervisor's, or a container's in single mode.

        The one with a record of a QEMU, else the one that is there.
        """
        folders = [self.instance(instance), *map(InstanceDir, sorted(self.path.glob(f"_*/{instance}")))]
        there = [folder for folder in folders if folder.path.is_dir()]
        return next((folder for folder in there if folder.has_record), there[0] if there else folders[0])

    def instances(self) -> Iterator[InstanceId]:
        """All ids that have a folder."""
        if not self.path.is_dir():
            return
        for entry in sorted(self.path.iterdir()):
            if entry.is_dir() and (instance := parse_id(entry.name)) is not None:
                yield instance


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, whatever the umask: others may pass, not write.

    QEMU, which runs as another user, opens its files in there. One that is there is left as it is.
    """
    if not path.parent.exists():
        make_folder(path.parent)
    try:
        path.mkdir(mode=0o755)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        path.chmod(0o755)


def write_whole(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file in one step: a reader, or a successor after a crash, sees the old content or the new.

    Raises:
        OSError: it cannot be written, and is what it was; names `path`.
    """
    aside = path.with_name(path.name + ".new")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "wb") as file:
            # One that was left behind by an earlier release may have another.
            os.fchmod(file.fileno(), mode)
            file.write(data)
        aside.replace(path)
    except OSError as error:
        # On a full file system half a file keeps others from being written.
        _drop(aside)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _has_open(pid: int, file: os.stat_result) -> bool:
    """Whether a process has this file open."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samestat(entry.stat(), file):
                return True
    return False


def _open_lock(path: Path) -> int:
    """A file to be locked; one that is there can be on a read-only file system, too.

    For its owner only: whoever may read a file may lock it (flock(2)). One of an earlier release is made so.
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


@lru_cache(maxsize=256)
def _parsed(data: bytes) -> Incarnation:
    """A record. A supervisor reads each record twice when it starts: to find its own identity, and to adopt."""
    return Incarnation.from_json(data)


def _keep_from_others(path: Path) -> None:
    """Take away what others may do with a file or a socket; with a lock, its group too, as in `_open_lock`.

    It is not opened, because a QEMU may own it: a link, a pipe or a lease could lead astray or hold up who opens it.
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
    """What is in the file; None when there is none.

    Raises:
        Unreadable: there is one that cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror or error}") from error


def _glimpse(path: Path) -> bytes:
    """What is in the file; nothing when there is none, or it cannot be read."""
    try:
        return _read(path) or b""
    except Unreadable:
        return b""


def _drop(path: Path) -> None:
    """Delete a file. On a file system that refuses nothing new is begun either, and it is written over later."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
