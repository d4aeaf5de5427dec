"""Files of the image library on this host: a file has its name once it is whole and was checked, and not before.

    <folder>/<sha256>                     an image as it came
    <folder>/<content>.<format>           the same as another format (`Image.content`)
    <folder>/<name>.part                  one that is being made; locked by who makes it

All of it may block for as long as a file system likes: `disk_files.Threads` is how to call it. Whole files are
read-only for everybody, in a folder that nobody but root enters: a converter without privileges gets one as an open
descriptor (proc_pid_fd(5)). Sources: open(2), flock(2), rename(2), fsync(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Collection
from pathlib import Path

from kvmsupervisor import folders

FOLDER_MODE, PART_MODE, WHOLE_MODE = 0o700, 0o600, 0o444

PART = ".part"

FICLONE = 0x40049409
"""See ioctl_ficlonerange(2), linux/fs.h."""

CANNOT_SHARE = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ETXTBSY, errno.ENOSYS})
"""What file systems answer that have no reflinks, and two that are not the same one."""

READ_BYTES = 4 << 20

STALE_S = 86_400.0
"""How old a part is that nobody goes on with. Arbitrary: a day, in which a server may be mended."""


def make_folder(folder: Path) -> None:
    """Make the library's folder where it is missing.

    Raises:
        OSError: it cannot be made.
    """
    folders.make_folder(folder, mode=FOLDER_MODE)


def is_private(folder: Path) -> bool:
    """Whether nobody but its owner enters a folder.

    Raises:
        OSError: it cannot be told.
    """
    return folder.stat().st_mode & 0o077 == 0


def open_whole(folder: Path, name: str) -> int | None:
    """Open a whole file for reading; None when there is none.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{folder / name} is no plain file: remove it")
    return fd


def open_part(folder: Path, name: str, *, anew: bool) -> int:
    """Open the part of a file that is to be made, and lock it: who has it open is alone with it.

    Args:
        folder: of the library.
        name: of the whole file.
        anew: drop what it has.

    Raises:
        BlockingIOError: another program has it.
        OSError: it cannot be opened.
    """
    fd = os.open(folder / f"{name}{PART}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, PART_MODE)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _same(fd, folder / f"{name}{PART}")
        os.fchown(fd, os.geteuid(), os.getegid())
        os.fchmod(fd, PART_MODE)
        if anew:
            os.ftruncate(fd, 0)
        undo.pop_all()
    return fd


def _same(fd: int, path: Path) -> None:
    """Make sure that what was locked is what is there: who had it may have finished it between the two calls.

    Raises:
        BlockingIOError: it is not.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), path.lstat()):
            return
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))


class Digest:
    """The SHA-256 of a part, kept up while it grows."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._sum = hashlib.sha256()
        self.size = 0

    def read(self) -> None:
        """Take in what is there. What never reached the disk before a power cut is zeros: then the sum differs."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._sum, self.size = hashlib.sha256(), 0
        while data := os.pread(self._fd, READ_BYTES, self.size):
            self._sum.update(data)
            self.size += len(data)

    def append(self, data: bytes) -> None:
        """Write what comes next behind it.

        Raises:
            OSError: it cannot be written.
        """
        at = 0
        while at < len(data):
            at += os.pwrite(self._fd, data[at:], self.size + at)
        self._sum.update(data)
        self.size += len(data)

    def drop(self) -> None:
        """Begin anew."""
        os.ftruncate(self._fd, 0)
        self._sum, self.size = hashlib.sha256(), 0

    def hex(self) -> str:
        """As `sha256sum` prints it."""
        return self._sum.hexdigest()


def finish(folder: Path, name: str, fd: int) -> None:
    """Give a part that is whole its name. It is on the disk before it has it.

    Raises:
        OSError: it cannot be.
    """
    os.fchown(fd, os.geteuid(), os.getegid())
    os.fchmod(fd, WHOLE_MODE)
    os.fsync(fd)
    (folder / f"{name}{PART}").replace(folder / name)
    place = os.open(folder, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def drop_part(folder: Path, name: str) -> None:
    """Remove a part, which the caller has locked."""
    (folder / f"{name}{PART}").unlink(missing_ok=True)


def share(source: int, target: int) -> bool:
    """Have an empty file share all blocks of another one; False where the file system cannot do that.

    Raises:
        OSError: there is no room, or the file system fails.
    """
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in CANNOT_SHARE:
            return False
        raise
    return True


def allocated(fd: int) -> int:
    """Bytes that a file takes on its file system."""
    return os.fstat(fd).st_blocks * 512


def sweep(folder: Path, keep: Collection[str]) -> tuple[str, ...]:
    """Remove the files of images that are kept no longer, and parts that nobody goes on with; return their names.

    What is open somewhere stays readable there.

    Args:
        folder: of the library.
        keep: the SHA-256 of each image that is kept.

    Raises:
        OSError: the folder cannot be read.
    """
    gone = []
    for entry in os.scandir(folder):
        digest = entry.name[:64]
        is_ours = len(digest) == 64 and all(char in "0123456789abcdef" for char in digest)
        if not is_ours or not entry.is_file(follow_symlinks=False):
            continue
        is_part = entry.name.endswith(PART)
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            is_stale = is_part and time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_S
            if digest in keep and not is_stale:
                continue
            # Locked before it is removed: nobody is in the middle of it.
            fd = open_part(folder, entry.name.removesuffix(PART), anew=False) if is_part else -1
            try:
                Path(entry.path).unlink()
            finally:
                if fd >= 0:
                    os.close(fd)
            gone.append(entry.name)
    return tuple(gone)
