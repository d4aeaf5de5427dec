"""Files that QEMU inherits open, so that QEMU opens none of ours by name, and its user needs no right to one.

Where an option of QEMU takes a name only, the name is that of an inherited descriptor (`hardware.inherited`). Opening
that name asks for rights on the file again, so what is handed over this way is a sealed file in memory that anybody may
read. Nobody else can reach it: it has no name, and /proc/PID/fd is for its process and root (proc_pid_fd(5)).

Sources: memfd_create(2), fcntl(2) (file seals), open(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

OWN_MODE = 0o600


def sealed(name: str, data: bytes) -> int:
    """A descriptor of a new file in memory that holds `data`, and that nobody can change; `name` shows in /proc.

    Raises:
        OSError: no file can be opened, or there is no memory.
    """
    memory = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(memory), "wb") as file:
            file.write(data)
        os.fchmod(memory, 0o444)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
        return os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(memory)


def open_own(path: Path, *, writable: bool) -> int:
    """Open a file of ours for QEMU. It becomes ours alone: an earlier release gave some to QEMU's user.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    flags = os.O_RDWR if writable else os.O_RDONLY
    # Not waited for, and not followed: where QEMU's user owned the folder it could have put a pipe or a link there.
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        _own(fd, path)
        os.set_blocking(fd, True)
        undo.pop_all()
    return fd


def _own(fd: int, path: Path) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is no plain file")
    if (found.st_uid, stat.S_IMODE(found.st_mode)) != (os.geteuid(), OWN_MODE):
        os.fchown(fd, os.geteuid(), os.getegid())
        os.fchmod(fd, OWN_MODE)
