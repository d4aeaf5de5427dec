"""An empty room: a mount namespace in which there is only what one QEMU needs, and namespaces without others' objects.

One base is made when the supervisor starts: programs, a few devices, a /proc that shows nobody else. Each QEMU gets a
copy of it, with what its machine needs besides, and no way back: it has neither the capability to leave a root
directory nor a descriptor outside of it, and outside is only the base.

A file system of /proc with `hidepid=invisible,subset=pid` shows a process those that it could trace, and nothing of the
kernel's (proc(5), Linux 5.8). A network namespace is not made for each: that takes five times as long as all the rest,
and the one that all share has nothing in it, not even a loopback.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvmsupervisor.adapters.apart import calls
from kvmsupervisor.adapters.apart.calls import ATTR_NODEV, ATTR_NOSUID, ATTR_RDONLY
from kvmsupervisor.aio import in_own_thread
from kvmsupervisor.domain.frozen import frozen

PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Folders of programs and libraries; on most systems all but the first are links (file-hierarchy(7))."""

DEVICES = ("null", "zero", "full", "random", "urandom")

USUAL_DEVICE = "/dev/kvm"
"""The device that most QEMUs need besides. Its place is in the base, so that those need no /dev of their own."""

ALWAYS = ("/etc/ld.so.cache", "/etc/localtime")
"""What programs need of /etc: where the libraries are, and the time zone (ld.so(8), localtime(5))."""

_ROOM = "/room"
_SMALL = "mode=755,size=1m"
_BUILD_AT = ("/run", "/mnt")
_FILE_ONLY = calls.MS_NOSUID | calls.MS_NODEV | calls.MS_NOEXEC
_READ_ONLY = calls.MS_REMOUNT | calls.MS_BIND | calls.MS_RDONLY | _FILE_ONLY


@frozen
class Base:
    """The base of all rooms.

    Attributes:
        mounts: descriptor of its mount namespace.
        network: descriptor of the empty network namespace.
        links: its links, by path.
        folders: its mounts, by path.
    """

    mounts: int
    network: int
    links: tuple[tuple[str, str], ...]
    folders: tuple[str, ...]

    @classmethod
    def make(cls, further: Iterable[str] = ()) -> Base:
        """Make the base, with further folders of programs.

        Raises:
            OSError: this process may not, or the kernel cannot.
        """
        return in_own_thread(lambda: cls._make(tuple(further)))

    @classmethod
    def _make(cls, further: Sequence[str]) -> Base:
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        own = f"self/task/{threading.get_native_id()}/ns"
        try:
            calls.unshare(calls.CLONE_FS | calls.CLONE_NEWNS)
            links, folders = _furnish(further)
            mounts = os.open(f"{own}/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
            calls.unshare(calls.CLONE_NEWNET)
            network = os.open(f"{own}/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        finally:
            os.close(proc)
        return cls(mounts, network, links, folders)

    def close(self) -> None:
        """Let go of it; rooms stay."""
        os.close(self.mounts)
        os.close(self.network)


def _furnish(further: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Make the base the root of this thread's mount namespace; return its links and its mounts."""
    calls.mount_at(None, "/", None, calls.MS_REC | calls.MS_PRIVATE)
    os.umask(0o022)  # this thread's alone: users of guests have to get through
    place = next(path for path in _BUILD_AT if Path(path).is_dir())
    links, trees = [], {}
    for path in (*PROGRAMS, *further):
        if Path(path).is_symlink():
            links.append((path, os.fspath(Path(path).readlink())))
        elif Path(path).is_dir():
            trees[path] = calls.cloned(path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    devices = {f"/dev/{name}": calls.cloned(f"/dev/{name}", ATTR_NOSUID) for name in DEVICES}
    calls.mount_at("tmpfs", place, "tmpfs", _FILE_ONLY, _SMALL)
    os.chdir(place)
    for path in (_ROOM, "/proc", "/dev"):
        Path(place + path).mkdir(mode=0o755)
    for path, target in links:
        Path(place + path).symlink_to(target)
    for path, tree in {**trees, **devices}.items():
        _put(place, path, tree)
    Path(place + USUAL_DEVICE).touch(mode=0o644)
    calls.mount_at("proc", f"{place}/proc", "proc", _FILE_ONLY, "subset=pid,hidepid=invisible")
    calls.change_root()
    calls.mount_at(None, "/", None, _READ_ONLY)
    return tuple(links), (*trees, "/dev", "/proc")


def _put(root: str, path: str, tree: int) -> None:
    """Mount a tree at its place below `root`; the place is made where it is missing.

    By plain system calls: each start of a QEMU does this some times.
    """
    at = root + path
    try:
        if not os.path.exists(at):
            is_folder = stat.S_ISDIR(os.fstat(tree).st_mode)
            os.makedirs(at if is_folder else os.path.dirname(at), 0o755, exist_ok=True)
            if not is_folder:
                os.mknod(at, 0o644)
        calls.attach(tree, at)
    finally:
        os.close(tree)


class Room:
    """The room of one process to come.

    Args:
        base: of all rooms.
        reads: paths that are in it, for reading.
        writes: paths that are in it, for all that their modes allow.
        is_offline: whether it has no network.

    Raises:
        OSError: the kernel refuses. A path that is missing is left out.
    """

    def __init__(self, base: Base, *, reads: Iterable[str], writes: Iterable[str], is_offline: bool) -> None:
        self._base = base
        self._is_offline = is_offline
        self._trees: dict[str, int] = {}
        wanted = dict.fromkeys((*ALWAYS, *reads), ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
        wanted |= dict.fromkeys(writes, ATTR_NOSUID)
        try:
            # A folder comes before what is in it.
            for path in sorted(wanted):
                if os.path.exists(path):
                    self._trees[path] = calls.cloned(path, wanted[path])
        except OSError:
            self.close()
            raise

    def enter(self) -> None:
        """Take this thread, which must end afterwards, into the room."""
        base = self._base
        calls.unshare(calls.CLONE_FS)
        calls.enter(base.mounts, calls.CLONE_NEWNS)
        calls.unshare(calls.CLONE_NEWNS | calls.CLONE_NEWIPC)
        if self._is_offline:
            calls.enter(base.network, calls.CLONE_NEWNET)
        mask = os.umask(0o022)  # this thread's alone, as its root is
        calls.mount_at("tmpfs", _ROOM, "tmpfs", _FILE_ONLY, _SMALL)
        own_devices = any(path.startswith("/dev/") and path != USUAL_DEVICE for path in self._trees)
        for path in base.folders:
            if path != "/dev" or not own_devices:
                _put(_ROOM, path, calls.copied(path))
        for path in DEVICES if own_devices else ():
            _put(_ROOM, f"/dev/{path}", calls.copied(f"/dev/{path}"))
        for path, target in base.links:
            os.symlink(target, _ROOM + path)
        while self._trees:
            path = next(iter(self._trees))
            _put(_ROOM, path, self._trees.pop(path))
        calls.mount_at(None, _ROOM, None, _READ_ONLY)
        os.umask(mask)
        os.chroot(_ROOM)
        os.chdir("/")

    def close(self) -> None:
        """Let go of what was not taken into it."""
        while self._trees:
            os.close(self._trees.popitem()[1])
