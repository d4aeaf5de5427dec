"""A buffer in memory that a QEMU writes a log into: bounded whether or not somebody reads it, and no write ever waits.

It is a memfd of fixed size, sealed so that it cannot grow. QEMU has it as an open file with a position. QEMU writes up
to the end of the file, and gets EPERM for more, which QEMU treats as "not logged" (chardev/char.c,
qemu_chr_write_log). The reader sets the position back, and QEMU goes on from there: first in the other half, so that
QEMU never writes over bytes that are being read, then at the beginning. The position belongs to the open file
description that both share, so a successor takes that same one out of the process (pidfd_getfd). Nothing is on a file
system: the buffer cannot be replaced, leased or made longer, and cannot fill a disk.

Sources: memfd_create(2), fcntl(2) (file seals), lseek(2), pidfd_getfd(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Collection
from typing import Self

SIZE = 256 << 10
"""Bytes; a whole number of pages. A Linux that boots prints some 60 KiB. Only pages that were written to take memory,
and that memory counts as QEMU's."""

HALF = SIZE // 2

PAGE = 4096
"""A write that does not fit is cut at the end of a page, at the latest of the last one."""

SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

PIDFD_GETFD = 438
"""The number of this system call, on all architectures (include/uapi/asm-generic/unistd.h); Linux ≥ 5.6."""


class LogBuffer:
    """One log of one QEMU process.

    Attributes:
        fd: open for writing only (QEMU accepts nothing else for a log), with the position that QEMU writes at.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        # Invariant: everything before this position was taken.
        self._taken = 0

    @classmethod
    def make(cls, name: str) -> Self:
        """Make a buffer to hand to a process; `name` shows in /proc.

        Raises:
            OSError: no file can be opened, or there is no memory.
        """
        memory = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, SIZE)
            # Otherwise QEMU could open it again for reading, under its name in /proc/self/fd.
            os.fchmod(memory, 0o600)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
            return cls(os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC))
        finally:
            os.close(memory)

    @classmethod
    def of_process(cls, pidfd: int, number: int) -> Self:
        """The buffer that a process has open under that number (see `numbers_of`).

        Raises:
            OSError: it may not be taken from the process, or what is open there is no such buffer.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if not _is_one(fd):
            os.close(fd)
            raise OSError(errno.EINVAL, f"its open file {number} is no log of ours")
        return cls(fd)

    @property
    def path(self) -> str:
        """The path under which this process can open it."""
        return f"/proc/self/fd/{self.fd}"

    def take(self) -> tuple[bytes, bool]:
        """Return what was written since the last call, and whether the buffer was full (then more may be lost)."""
        if fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_APPEND:
            # QEMU opens its logs for appending; then it would write at the end only.
            fcntl.fcntl(self.fd, fcntl.F_SETFL, 0)
        begun = os.lseek(self.fd, 0, os.SEEK_CUR)
        if begun == self._taken:
            return b"", False
        reader = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # First to the other half: the bytes that QEMU leaves behind do not change then, while QEMU goes on. Where
            # QEMU wrote more than a half, which only happens without a reader, it would have to write as much again
            # before it reaches them.
            data = self._move(reader, HALF) if begun < HALF else b""
            data += self._move(reader, 0)
        finally:
            os.close(reader)
        return data, begun > SIZE - PAGE

    def _move(self, reader: int, to: int) -> bytes:
        """Have QEMU write on at `to`; return what it wrote before that."""
        end = min(os.lseek(self.fd, 0, os.SEEK_CUR), SIZE)
        try:
            # Relative, in one step: the distance between the new position and `to` is what QEMU wrote after `end`.
            at = os.lseek(self.fd, to - end, os.SEEK_CUR)
        except OSError:
            # Something else in QEMU moved it, such as a guest that has broken in: what this log says is its own affair.
            at = os.lseek(self.fd, to, os.SEEK_SET)
        begin, self._taken = self._taken, at
        return os.pread(reader, max(0, min(end + at - to, SIZE) - begin), min(begin, SIZE))

    def close(self) -> None:
        """Close it. A living QEMU goes on writing. Closing twice is no error."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1


def numbers_of(pid: int, names: Collection[str]) -> dict[str, int]:
    """The descriptor numbers of a process's open files that were made with these names, as far as it has any.

    A process may use these names for anything, and the pid may meanwhile be another process's: `LogBuffer.of_process`
    checks what it gets.

    Raises:
        OSError: the open files of the process may not be read.
    """
    wanted = {f"/memfd:{name} (deleted)": name for name in names}
    found: dict[str, int] = {}
    folder = f"/proc/{pid}/fd"
    # Without pathlib, which takes four times as long: a supervisor does this for each machine when it starts.
    for entry in os.listdir(folder):  # noqa: PTH208
        # The file may have been closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            name = wanted.get(os.readlink(f"{folder}/{entry}"))  # noqa: PTH115
            if name is not None:
                found[name] = int(entry)
                if len(found) == len(wanted):
                    break
    return found


def _is_one(fd: int) -> bool:
    """Whether an open file is such a buffer, so that reading it never waits."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != SIZE:
        return False
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        return False
