"""A piece of memory that a QEMU writes a log into: bounded whoever reads it, and no write to it ever waits.

It is a memfd of fixed size, sealed so that it cannot grow. QEMU has it as an open file with a position, writes up to
its end, and gets EPERM behind it, which it takes as "not logged" (QEMU, chardev/char.c, qemu_chr_write_log). Whoever
reads what was written sets the position back, and QEMU goes on from there: first in the other half, so that it never
writes over what is being read, then at the beginning. The position belongs to the open file that
both have, so a successor takes that very file out of the process (pidfd_getfd). Nothing of it is on a file system: it
cannot be replaced, leased, made longer, or be full for somebody else.

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
"""Bytes; a whole number of pages. The messages of a Linux that boots are some 60 KiB. It takes memory only where it was
written to, and that counts as QEMU's."""

HALF = SIZE // 2

PAGE = 4096
"""A write that does not fit is cut at the end of a page, or of the last one."""

SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

PIDFD_GETFD = 438
"""The number of this system call, on all architectures (include/uapi/asm-generic/unistd.h); Linux ≥ 5.6."""


class LogBuffer:
    """One log of one QEMU process.

    Attributes:
        fd: open for writing only (QEMU takes no other for a log), with the position that QEMU writes at.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        # Invariant: what lies before it was taken.
        self._taken = 0

    @classmethod
    def make(cls, name: str) -> Self:
        """A new one, to be handed to a process; `name` is seen in /proc.

        Raises:
            OSError: no file can be opened, or there is no memory.
        """
        memory = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, SIZE)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
            return cls(os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC))
        finally:
            os.close(memory)

    @classmethod
    def of_process(cls, pidfd: int, number: int) -> Self:
        """The one that a process has open under that number (see `numbers_of`).

        Raises:
            OSError: it may not be taken from there, or what is there is none.
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
        """Where this process can open it."""
        return f"/proc/self/fd/{self.fd}"

    def take(self) -> tuple[bytes, bool]:
        """What was written since the last time, and whether it was full, so that more may be missing. Never waits."""
        if fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_APPEND:
            # QEMU opens its logs for appending, and would never write before the end.
            fcntl.fcntl(self.fd, fcntl.F_SETFL, 0)
        begun = os.lseek(self.fd, 0, os.SEEK_CUR)
        if begun == self._taken:
            return b"", False
        reader = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # By the other half: what QEMU leaves behind stands still then, while it goes on. Where it wrote more than a
            # half, which only happens without a reader, it would have to write as much again to come across it.
            data = self._move(reader, HALF) if begun < HALF else b""
            data += self._move(reader, 0)
        finally:
            os.close(reader)
        return data, begun > SIZE - PAGE

    def _move(self, reader: int, to: int) -> bytes:
        """Have QEMU write on at `to`; return what it wrote before that."""
        end = min(os.lseek(self.fd, 0, os.SEEK_CUR), SIZE)
        try:
            # By how far, in one step: so much behind `to` it is then was written meanwhile, behind `end`.
            at = os.lseek(self.fd, to - end, os.SEEK_CUR)
        except OSError:
            # It was moved by somebody else in QEMU: that log is his.
            at = os.lseek(self.fd, to, os.SEEK_SET)
        begin, self._taken = self._taken, at
        return os.pread(reader, max(0, min(end + at - to, SIZE) - begin), min(begin, SIZE))

    def close(self) -> None:
        """Let go of it; a QEMU that lives writes on. Closing twice is no error."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1


def numbers_of(pid: int, names: Collection[str]) -> dict[str, int]:
    """The numbers under which a process has files open that were made with these names, as far as it has.

    A process may call anything so, or have ended, its pid being another's: `LogBuffer.of_process` looks at what it is.

    Raises:
        OSError: what it has open may not be seen.
    """
    wanted = {f"/memfd:{name} (deleted)": name for name in names}
    found: dict[str, int] = {}
    folder = f"/proc/{pid}/fd"
    # Not by pathlib, which takes four times as long: a supervisor that starts does this for each machine.
    for entry in os.listdir(folder):  # noqa: PTH208
        # One may have been closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            name = wanted.get(os.readlink(f"{folder}/{entry}"))  # noqa: PTH115
            if name is not None:
                found[name] = int(entry)
                if len(found) == len(wanted):
                    break
    return found


def _is_one(fd: int) -> bool:
    """Whether an open file is such a piece of memory: nothing in it can make us wait."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != SIZE:
        return False
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        return False
