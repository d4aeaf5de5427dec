"""A Landlock domain for one QEMU: what it may open, connect to and signal. Needs no capability, only a kernel with it.

A process in a domain may trace, signal and reach by abstract sockets nothing outside of it. Source: landlock(7).
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator

from kvmsupervisor.adapters.apart import calls

_VERSION = 1
_PATH_BENEATH, _NET_PORT = 1, 2

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPED = 1 | 2
"""Abstract sockets, signals."""

_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""How many rights on files a version of Landlock knows; a later one knows those of the one before."""

NETWORK_SINCE, SCOPES_SINCE = 4, 6
"""The versions that know of TCP ports (Linux 6.7), and of signals and abstract sockets (Linux 6.12)."""


def version() -> int:
    """The kernel's version of Landlock; 0 without."""
    try:
        return calls.create_ruleset(None, _VERSION)
    except OSError:
        return 0


def _all_rights(known: int) -> int:
    return (1 << max(count for since, count in _RIGHTS.items() if since <= known)) - 1


@contextlib.contextmanager
def domain(
    known: int,
    *,
    reads: Iterable[str],
    writes: Iterable[str],
    listens: Iterable[int] | None,
    connects: bool,
) -> Iterator[Callable[[], None]]:
    """Make a domain; call what is yielded in the thread that enters it.

    Args:
        known: `version()`.
        reads: paths below which everything may be read and executed; one that is missing is left out.
        writes: the same for all that a file system can do.
        listens: the TCP ports that it may listen on; None for any.
        connects: whether it may connect to TCP ports.

    Raises:
        OSError: the kernel refuses.
    """
    rights = _all_rights(known)
    ports = 0
    if known >= NETWORK_SINCE:
        ports = (_BIND_TCP if listens is not None else 0) | (0 if connects else _CONNECT_TCP)
    attributes = struct.pack("=Q", rights)
    if known >= NETWORK_SINCE:
        attributes += struct.pack("=Q", ports)
    if known >= SCOPES_SINCE:
        attributes += struct.pack("=Q", _SCOPED)
    ruleset = calls.create_ruleset(attributes)
    try:
        for path in reads:
            _allow(ruleset, path, _READING & rights)
        for path in writes:
            _allow(ruleset, path, rights)
        for port in listens or () if ports & _BIND_TCP else ():
            calls.add_rule(ruleset, _NET_PORT, struct.pack("=QQ", _BIND_TCP, port))
        yield lambda: calls.restrict_self(ruleset)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        calls.add_rule(ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, fd))
    finally:
        os.close(fd)
