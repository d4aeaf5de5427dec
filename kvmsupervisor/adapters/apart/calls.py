"""System calls that Python has no functions for. Those that enter something are for a thread that ends afterwards.

Sources: clone(2), setns(2), unshare(2), mount(2), open_tree(2), move_mount(2), mount_setattr(2), pivot_root(2),
keyctl(2), landlock(7), setresuid(2), capset(2); include/uapi/linux and arch/*/include/uapi/asm/unistd.h for the
numbers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from typing import Any

CLONE_FS, CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWNET = 0x200, 0x20000, 0x8000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
MNT_DETACH = 2

ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_KEYCTL = {"x86_64": 250, "aarch64": 219}
_SETGROUPS = {"x86_64": 116, "aarch64": 159}
_SETRESGID = {"x86_64": 119, "aarch64": 149}
_SETRESUID = {"x86_64": 117, "aarch64": 147}
_CAPSET = {"x86_64": 126, "aarch64": 91}
"""Numbers from 424 on are the same on all architectures, older ones are not."""

_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_KEYCTL_JOIN_SESSION_KEYRING = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def _syscall(what: str, number: int, *arguments: Any) -> int:
    return _checked(_libc.syscall(number, *arguments), what)


def _number(what: str, numbers: dict[str, int]) -> int:
    machine = platform.machine()
    if machine not in numbers:
        raise OSError(38, f"{what} is not known for {machine}")
    return numbers[machine]


def unshare(flags: int) -> None:
    """Give this thread namespaces of its own; with `CLONE_FS` a root and a working folder, too."""
    _checked(_libc.unshare(flags), "unshare")


def enter(namespace: int, kind: int) -> None:
    """Move this thread into the namespace of a descriptor."""
    _checked(_libc.setns(namespace, kind), "setns")


def mount_at(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount a file system at `target`, or change what is mounted there; see the system call mount."""
    words = (None if word is None else os.fsencode(word) for word in (source, target, kind))
    _checked(_libc.mount(*words, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def change_root() -> None:
    """Make the working folder, a mount point, the root of this mount namespace; nothing of the old one is left."""
    _syscall("pivot_root", _number("pivot_root", _PIVOT_ROOT), b".", b".")
    # The old root is mounted over the new one now (pivot_root(2), NOTES).
    _checked(_libc.umount2(b".", MNT_DETACH), "umount /")
    os.chdir("/")


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def copied(path: str) -> int:
    """A copy of what is mounted at `path` and below, in no namespace yet; private where that is."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    return _syscall(f"open_tree {path}", _OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)


def cloned(path: str, attributes: int) -> int:
    """The same with these attributes, and private."""
    fd = copied(path)
    wanted = _MountAttributes(attributes, 0, MS_PRIVATE, 0)
    try:
        size = ctypes.sizeof(wanted)
        flags = _AT_EMPTY_PATH | _AT_RECURSIVE
        _syscall(f"mount_setattr {path}", _MOUNT_SETATTR, fd, b"", flags, ctypes.byref(wanted), size)
    except OSError:
        os.close(fd)
        raise
    return fd


def attach(tree: int, path: str) -> None:
    """Mount what `cloned` returned."""
    _syscall(f"move_mount {path}", _MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)


def no_new_privileges() -> None:
    """See to it that no program which this thread starts gains a privilege (prctl(2))."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def new_session_keyring() -> None:
    """Leave our keyring behind, which may hold keys of root (session-keyring(7))."""
    _syscall("keyctl", _number("keyctl", _KEYCTL), _KEYCTL_JOIN_SESSION_KEYRING, None)


def set_user(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Give other ids to this thread alone: glibc's functions, and Python's, give them to all threads (nptl(7))."""
    wanted = struct.pack(f"={len(groups)}I", *groups)
    _syscall("setgroups", _number("setgroups", _SETGROUPS), len(groups), wanted)
    _syscall("setresgid", _number("setresgid", _SETRESGID), *(ctypes.c_uint(gid),) * 3)
    _syscall("setresuid", _number("setresuid", _SETRESUID), *(ctypes.c_uint(uid),) * 3)


def empty_bounding_set() -> None:
    """Let no program that this thread starts ever have a capability. Takes CAP_SETPCAP."""
    # Their numbers are without gaps, and what follows the last one is no valid argument.
    number = 0
    while _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    error = ctypes.get_errno()
    if error != errno.EINVAL:
        raise OSError(error, os.strerror(error), f"prctl PR_CAPBSET_DROP {number}")


def drop_capabilities() -> None:
    """Leave this thread no capability: none to use, none to hand on (capset(2), prctl(2))."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _syscall("capset", _number("capset", _CAPSET), header, bytes(24))
    _checked(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl")


def create_ruleset(attributes: bytes | None, flags: int = 0) -> int:
    """landlock_create_ruleset(2)."""
    size = 0 if attributes is None else len(attributes)
    return _syscall("landlock_create_ruleset", _CREATE_RULESET, attributes, size, flags)


def add_rule(ruleset: int, kind: int, attributes: bytes) -> None:
    """landlock_add_rule(2)."""
    _syscall("landlock_add_rule", _ADD_RULE, ruleset, kind, attributes, 0)


def restrict_self(ruleset: int) -> None:
    """landlock_restrict_self(2)."""
    _syscall("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
