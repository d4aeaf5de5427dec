"""Files of this host that are disks of machines: opened, checked, locked, and made where people want that.

All of it may block for as long as a file system likes: `in_thread` is how to call it. A file is looked at before it is
opened for anything, and what is known of it is of the descriptor that QEMU gets, not of a name.

The files are the supervisor's own, mode 0600: QEMU gets a descriptor, so its user needs no right to any. `flock` is
taken on that descriptor and ends with the last copy of it, so it lasts as long as the QEMU that has it
(docs/decisions/0025-local-disks.md). Sources: open(2), flock(2), linkat(2), proc_pid_fd(5), statvfs(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from kvmsupervisor import folders
from kvmsupervisor.domain import qcow2
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk

T = TypeVar("T")

SECTOR = 512

FOLDER_MODE, FILE_MODE = 0o700, 0o600

NO_NAMELESS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
"""What file systems without `O_TMPFILE` answer (NFS, CephFS, 9p, older overlays), each in its way; see open(2)."""

NO_SECOND_NAMES = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems where a file has one name only answer (FAT); see link(2)."""

UNDER_WAY = ".{}.kvmsupervisor"
"""Name of a disk that has to have one before it is whole. No key can say it: a disk's name begins with no dot."""

NOTE = "user.kvmsupervisor.made"
"""The extended attribute of a file that was made of an image: for whom, and of which (`images.note_of`)."""

ROLLED_BACK = "user.kvmsupervisor.rollback"
"""The extended attribute with the last request for which a file was rolled back to a snapshot."""

DEADLINE_S = 10.0
"""How long a file system may take for one disk. Arbitrary: a healthy one takes milliseconds, and this is only so long
that a disk which has to spin up is waited for."""


class FileTrouble(Exception):
    """A disk's file is not as it must be. The message says what and which, and what would help."""


class NoFile(FileTrouble):
    """There is no such file."""


class FileLocked(FileTrouble):
    """Another program has the file open as a disk."""


@frozen(kw_only=True)
class DiskFile:
    """A file that was opened as a disk, and locked.

    Attributes:
        fd: its descriptor, to be closed by who got it.
        size: bytes that the disk has.
        note: what was kept with it when it was made of an image, None for nothing.
    """

    fd: int
    size: int
    note: str | None = None


def make_folder(folder: Path) -> None:
    """Make the folder of all disks where it is missing.

    Raises:
        OSError: it cannot be made.
    """
    folders.make_folder(folder, mode=FOLDER_MODE)


def open_disk(folder: Path, disk: FileDisk) -> DiskFile:
    """Open a disk's file, lock it, and look at it. It is made, empty, where it is missing and has a size.

    Raises:
        FileLocked: another program has it.
        NoFile: it is missing, and has no size.
        FileTrouble: it is no plain file, or no image that may be opened.
        OSError: it cannot be opened or made.
    """
    path = folder / disk.name
    for _ in range(2):
        try:
            return _open(path, disk)
        except FileNotFoundError:
            if disk.size is None or disk.origin is not None:
                raise NoFile(
                    f"there is no file {path} on this host: put it there, or say by size= (such as size=20G) that an "
                    "empty disk is to be made"
                ) from None
            _make(folder, disk)
    raise FileTrouble(f"the file {path} was removed while it was being opened")


def _open(path: Path, disk: FileDisk) -> DiskFile:
    with contextlib.ExitStack() as undo:
        # Nothing is opened before it is known what it is: a device may act on that, a pipe may wait.
        found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _check_kind(path, _drop_second_name(path, os.fstat(found)))
            flags = os.O_RDONLY if disk.ro else os.O_RDWR
            fd = os.open(f"/proc/self/fd/{found}", flags | os.O_CLOEXEC)
        finally:
            os.close(found)
        undo.callback(os.close, fd)
        _lock(path, fd, shared=disk.ro)
        _own(path, fd, disk)
        size = _size(path, fd, disk)
        undo.pop_all()
    return DiskFile(fd=fd, size=size, note=note_of(fd))


def _check_kind(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise FileTrouble(f"{path} is a symbolic link, which may lead anywhere: put the file itself there")
    if not stat.S_ISREG(found.st_mode):
        raise FileTrouble(f"{path} is no plain file")
    if found.st_nlink > 1:
        raise FileTrouble(
            f"{path} has {found.st_nlink} names (hard links), so it may be another one's file, too: leave it one"
        )


def _lock(path: Path, fd: int, *, shared: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileLocked(
            f"{path} is in use by another program (`lslocks` names it): no two can have one disk"
        ) from None


def _own(path: Path, fd: int, disk: FileDisk) -> None:
    """See to it that no other user can open it: guests are strangers to each other."""
    found = os.fstat(fd)
    if (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), FILE_MODE):
        return
    try:
        os.fchown(fd, os.geteuid(), os.getegid())
        os.fchmod(fd, FILE_MODE)
    except OSError as error:
        if disk.ro and error.errno == errno.EROFS:
            return
        if not _is_open_to_others(found):
            return  # FAT has no mode 0600 to set, but may be mounted so that all in it is as private
        said = f"it cannot be made this supervisor's alone, mode 0600 ({error.strerror})"
        raise OSError(error.errno, said, str(path)) from error
    if _is_open_to_others(os.fstat(fd)):
        # Such as NTFS by FUSE: it takes each mode, and keeps none.
        raise FileTrouble(
            f"{path} is on a file system that keeps neither owners nor modes, so that others may open it: mount it "
            f"with uid={os.geteuid()},umask=077"
        )


def _is_open_to_others(found: os.stat_result) -> bool:
    return found.st_uid != os.geteuid() or bool(stat.S_IMODE(found.st_mode) & 0o077)


def _size(path: Path, fd: int, disk: FileDisk) -> int:
    if disk.format is DiskFormat.RAW:
        # QEMU shows a sector that is not whole as a whole one.
        return -(-os.fstat(fd).st_size // SECTOR) * SECTOR
    try:
        return qcow2.virtual_size(os.pread(fd, qcow2.HEADER_BYTES, 0))
    except qcow2.Refused as refused:
        raise FileTrouble(f"{path} {refused}") from None


def _make(folder: Path, disk: FileDisk) -> None:
    """Make an empty disk. It has no name before it is whole and on the disk, and takes nobody's name."""
    assert disk.size is not None
    path = folder / disk.name
    try:
        with _opened(folder, os.O_DIRECTORY | os.O_RDONLY) as place:
            try:
                _make_nameless(place, folder, disk)
            except OSError as error:
                if error.errno not in NO_NAMELESS_FILES:
                    raise
                _make_aside(place, path, disk)
            os.fsync(place)
    except FileNotFoundError:
        raise FileTrouble(
            f"the folder for disks, {folder} (KVM_DISK_DIR), is not there: mount its file system, or make the folder"
        ) from None


def _make_nameless(place: int, folder: Path, disk: FileDisk) -> None:
    with _opened(folder, os.O_TMPFILE | os.O_RDWR) as fd:
        fill(fd, disk)
        with contextlib.suppress(FileExistsError):
            # With a descriptor of the folder, as only then Python follows the link to the file.
            os.link(f"/proc/self/fd/{fd}", disk.name, dst_dir_fd=place, follow_symlinks=True)


def _make_aside(place: int, path: Path, disk: FileDisk) -> None:
    """The same where a file has a name from the beginning: under another one, which a cut leaves to the next try."""
    aside = path.with_name(UNDER_WAY.format(disk.name))
    with _opened(aside, os.O_CREAT | os.O_NOFOLLOW | os.O_RDWR) as fd:
        # Who has this lock is the only one that fills, names or removes the file.
        _lock(aside, fd, shared=False)
        found = os.fstat(fd)
        if found.st_nlink != 1:
            if found.st_nlink > 1:
                # It was named, and that name was changed: a disk of its own now.
                os.unlink(aside.name, dir_fd=place)
            # Otherwise another one has named it and removed this name, between our opening and our lock.
            raise FileLocked(f"{path} is being made by another program")
        os.ftruncate(fd, 0)
        fill(fd, disk)
        try:
            with contextlib.suppress(FileExistsError):
                os.link(aside.name, disk.name, src_dir_fd=place, dst_dir_fd=place)
        except OSError as error:
            if error.errno not in NO_SECOND_NAMES:
                raise
            raise FileTrouble(
                f"{path.parent} is on a file system where a file has one name only, so that a disk made there might "
                f"take another file's place: make {path} by hand, by `qemu-img create`"
            ) from None
        finally:
            os.unlink(aside.name, dir_fd=place)


def _drop_second_name(path: Path, found: os.stat_result) -> os.stat_result:
    """Take away the name under which a disk was made, when that was cut off just before."""
    aside = path.with_name(UNDER_WAY.format(path.name))
    if found.st_nlink == 2:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(aside.lstat(), found):
                aside.unlink()
                return path.lstat()
    return found


def fill(fd: int, disk: FileDisk) -> None:
    """Make an empty disk of an empty file."""
    assert disk.size is not None
    os.fchmod(fd, FILE_MODE)
    if disk.format is DiskFormat.RAW:
        os.ftruncate(fd, disk.size)
    else:
        _write(fd, qcow2.empty(disk.size))
    os.fsync(fd)


@frozen
class NewFile:
    """A disk's file that has no name yet: nothing of it is left where its maker is cut off.

    Attributes:
        folder: where it is to be.
        disk: which.
        fd: its descriptor.
    """

    folder: Path
    disk: FileDisk
    fd: int

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)

    def finish(self) -> None:
        """Have it on the disk, and give it its name. Where somebody has put a file there meanwhile, that one stays.

        Raises:
            OSError: it cannot be.
        """
        os.fsync(self.fd)
        with _opened(self.folder, os.O_DIRECTORY | os.O_RDONLY) as place:
            with contextlib.suppress(FileExistsError):
                # With a descriptor of the folder, as only then Python follows the link to the file.
                os.link(f"/proc/self/fd/{self.fd}", self.disk.name, dst_dir_fd=place, follow_symlinks=True)
            os.fsync(place)


def begin(folder: Path, disk: FileDisk, note: str | None = None) -> NewFile:
    """Make a file that has no name yet.

    Args:
        folder: where it is to be.
        disk: which.
        note: what is kept with it (xattr(7)).

    Raises:
        FileTrouble: there is no such folder, or its file system cannot do that.
        OSError: it cannot be made.
    """
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)
    except FileNotFoundError:
        raise FileTrouble(
            f"the folder for disks, {folder} (KVM_DISK_DIR), is not there: mount its file system, or make the folder"
        ) from None
    except OSError as error:
        if error.errno in NO_NAMELESS_FILES:
            raise FileTrouble(
                f"{folder} is on a file system that cannot make a file before its name: make {folder / disk.name} by "
                "hand, by `qemu-img create` or `qemu-img convert`"
            ) from None
        raise
    try:
        os.fchmod(fd, FILE_MODE)
        if note is not None:
            os.setxattr(f"/proc/self/fd/{fd}", NOTE, note.encode())
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EOPNOTSUPP:
            raise FileTrouble(
                f"{folder} is on a file system without extended attributes, by which a disk that was made of an image "
                f"is told from others: make {folder / disk.name} by hand, by `qemu-img convert`, and leave from= out"
            ) from None
        raise
    return NewFile(folder, disk, fd)


def note_of(fd: int) -> str | None:
    """What `NewFile.finish` kept with a file."""
    try:
        return os.getxattr(fd, NOTE).decode(errors="replace")
    except OSError:
        # There is none, or the file system keeps none.
        return None


def snapshots_of(fd: int) -> tuple[int, tuple[qcow2.Internal, ...]]:
    """Bytes of a qcow2 image's disk, and the snapshots within it.

    Raises:
        FileTrouble: it is no image that may be opened.
        OSError: it cannot be read.
    """
    head = os.pread(fd, qcow2.HEADER_BYTES, 0)
    try:
        size = qcow2.virtual_size(head)
    except qcow2.Refused as refused:
        raise FileTrouble(f"its file {refused}") from None
    offset, count = qcow2.table_of(head)
    table = os.pread(fd, count * qcow2.SNAPSHOT_BYTES, offset) if count else b""
    return size, qcow2.snapshots(table, count)


def rolled_back(fd: int) -> str | None:
    """What `note_rolled_back` kept with a file; None for nothing."""
    try:
        return os.getxattr(fd, ROLLED_BACK).decode(errors="replace")
    except OSError:
        return None


def note_rolled_back(fd: int, request: str) -> None:
    """Keep with a file the request for which it was rolled back. Where the file system keeps nothing, nothing is kept.

    Raises:
        OSError: it cannot be, for another reason.
    """
    try:
        os.setxattr(fd, ROLLED_BACK, request.encode())
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise


def _write(fd: int, data: bytes) -> None:
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], at)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
    try:
        yield fd
    finally:
        os.close(fd)


def room(folder: Path, *, as_root: bool) -> int:
    """Bytes that are left on the folder's file system, for root or for others.

    Raises:
        OSError: it cannot be told.
    """
    found = os.statvfs(folder)
    return (found.f_bfree if as_root else found.f_bavail) * found.f_frsize


class Threads:
    """Calls that may block, each in a thread of its own, and each with a deadline.

    A thread that a file system holds cannot be ended. It is left behind: it keeps neither this program from ending nor
    other calls from their threads, and there is at most one for each name.
    """

    def __init__(self) -> None:
        self._held: set[str] = set()

    async def call(
        self,
        name: str,
        work: Callable[[], T],
        *,
        deadline_s: float = DEADLINE_S,
        undo: Callable[[T], None] = lambda _: None,
    ) -> T:
        """Return what `work` returns.

        Args:
            name: for whom; while one of its calls is held, others fail at once.
            work: is run in a thread.
            deadline_s: how long it may take.
            undo: called with the result when that came too late.

        Raises:
            FileTrouble: it took too long, or an earlier one still does; or what `work` raises.
            OSError: what `work` raises.
        """
        if name in self._held:
            raise FileTrouble("its file system does not answer")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def end(result: T | None, error: BaseException | None) -> None:
            self._held.discard(name)
            if done.cancelled():
                if error is None:
                    undo(result)  # type: ignore[arg-type]
            elif error is None:
                done.set_result(result)  # type: ignore[arg-type]
            else:
                done.set_exception(error)

        def run() -> None:
            result: T | None = None
            failure: BaseException | None = FileTrouble("looking at it failed")
            try:
                result, failure = work(), None
            except (FileTrouble, OSError) as error:
                failure = error
            finally:
                # The loop may have been closed: then nobody waits, and the process ends.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(end, result, failure)

        self._held.add(name)
        threading.Thread(target=run, name=f"disk of {name}", daemon=True).start()
        try:
            async with asyncio.timeout(deadline_s):
                return await done
        except TimeoutError:
            raise FileTrouble(f"its file system does not answer (for {deadline_s:g} s so far)") from None
