"""Cgroups in the host's tree itself: v2, v1 with all its hierarchies, and both side by side.

Each hierarchy has one folder of ours, with one cgroup in it for each process. The process is moved in every hierarchy
where it would otherwise stay in the container's cgroup. A container runtime looks at one hierarchy only when it kills a
container's processes (on v1 at `devices`), but which one is up to the runtime.

Sources: kernel, Documentation/admin-guide/cgroup-v1 and cgroup-v2; cgroups(7); proc_pid_mountinfo(5).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvmsupervisor.adapters.cgroup.manager import PROC, Cgroup, CgroupFailed, Impossible, cgroups_of
from kvmsupervisor.adapters.cgroup.place import Place, unescaped
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import TASKS, Limits, cpu_weight

FOLDER = "kvmsupervisor"

ENTER = 'echo 0 >&0 || exit 126; exec "$@" </dev/null'
"""The child's prefix in v2's hierarchy, run by /bin/sh. 0 stands for the writer itself, in any PID namespace. The file
is open already, as standard input: where the child is, it has no name."""

LIMITED = ("cpu", "memory")
"""The controllers of the limits that an instance may have."""

REMOVE_ATTEMPTS, REMOVE_PAUSE_S = 5, 0.02
"""The kernel may hold a cgroup for a moment after its last process has ended."""

STALE_S = 60.0
"""How old an empty cgroup must be to be swept, by the wall clock, which dates files. A process enters its cgroup within
milliseconds. A process whose cgroup was swept, because that clock jumped, ends and is started again."""


@frozen(kw_only=True)
class Hierarchy:
    """One hierarchy of the host.

    Attributes:
        top: where it is mounted; our folder is below.
        controllers: those of v1, as /proc names them; empty for v2.
    """

    top: Path
    controllers: frozenset[str] = frozenset()

    @property
    def unified(self) -> bool:
        """Whether it is v2's."""
        return not self.controllers

    def has(self, controller: str) -> bool:
        """Whether it has this controller."""
        if not self.unified:
            return controller in self.controllers
        return controller in (self.top / "cgroup.controllers").read_text(encoding="ascii").split()

    @property
    def folder(self) -> Path:
        """The cgroup above all of ours."""
        return self.top / FOLDER

    @property
    def door(self) -> str:
        """The file in a cgroup that its process writes itself into."""
        return "cgroup.procs" if self.unified else "tasks"


def find_hierarchies(proc: Path = PROC) -> tuple[Hierarchy, ...]:
    """The hierarchies in which a QEMU needs a cgroup, with the places where they are mounted.

    These are the hierarchies in which this process is not in the root (but in a container's cgroup, for example), and
    those that have the controllers of limits.

    Raises:
        Impossible: one is not mounted as a whole, or cannot be written to.
    """
    mounts = _mounts((proc / "self/mountinfo").read_text(encoding="utf-8", errors="replace"))
    found: dict[Hierarchy, str] = {}
    inits = cgroups_of(1, proc)
    for controllers, own in cgroups_of("self", proc).items():
        names = frozenset(controllers.split(",")) - {""}
        top = mounts.get(names)
        if top is not None:
            found[Hierarchy(top=top, controllers=names)] = own
        elif own != inits.get(controllers):
            # A hierarchy that nobody uses is no loss: the kernel names v2 always, and v1 ones that were used once.
            raise Impossible(
                f"the host's cgroup hierarchy {controllers or 'v2'} is not mounted here as a whole; run the container "
                "with -v /sys/fs/cgroup:/sys/fs/cgroup"
            )
    # In a root there is no container's cgroup to leave. Each cgroup costs a start half a millisecond; in v2's tree
    # beside v1's it is 6 to 16 ms, in which `cgroup.procs` waits for all processors.
    needed = [one for one, own in found.items() if own != "/" or any(map(one.has, LIMITED))] or list(found)
    if not needed:
        raise Impossible("no cgroup hierarchy is mounted here; run the container with -v /sys/fs/cgroup:/sys/fs/cgroup")
    for one in needed:
        if not os.access(one.top, os.W_OK):
            raise Impossible(
                f"{one.top} cannot be written to; it takes root, and a container's own is read-only: run it with "
                "-v /sys/fs/cgroup:/sys/fs/cgroup"
            )
    return tuple(needed)


def _mounts(mountinfo: str) -> Mapping[frozenset[str], Path]:
    """The mount points of whole hierarchies, by their controllers."""
    mounts: dict[frozenset[str], Path] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = [*after.split(" "), "", ""][:3]
        if root != "/" or kind not in {"cgroup", "cgroup2"}:
            continue
        # A v1 mount lists its controllers among other options. No other option has the name of a controller.
        words = options.split(",") if kind == "cgroup" else []
        names = frozenset(word for word in words if not re.match(r"(rw|ro|xattr|clone_children|noprefix)$|\w+=/", word))
        mounts.setdefault(names - {"cpuset_v2_mode", "favordynmods", "nofavordynmods"}, Path(unescaped(point)))
    return mounts


class TreeCgroup:
    """The files through which a process enters its cgroups, which exist.

    In a hierarchy of v1 a thread may be elsewhere than its process, and what the thread starts is where it is: so the
    thread enters that starts the process. There 0 is written to `tasks`: for a thread that moves itself the kernel does
    not take the lock that every write to `cgroup.procs` waits for (kernel/cgroup/cgroup.c, cgroup_procs_write_start).
    In v2 the process enters by itself before it becomes its program.

    Args:
        tasks: the file of each hierarchy of v1.
        procs: the file of v2's; None where no cgroup is needed there.

    Raises:
        OSError: the latter cannot be opened.
    """

    def __init__(self, tasks: Sequence[Path], procs: Path | None) -> None:
        self._tasks = tuple(map(os.fspath, tasks))
        self.stdin: int | None = None if procs is None else os.open(procs, os.O_WRONLY | os.O_CLOEXEC)

    @property
    def enters_as_root(self) -> bool:
        """In v2: kernels before Linux 5.17 ask who writes to the file, and not who opened it."""
        return self.stdin is not None

    def enter(self) -> None:
        """Move this thread in every hierarchy of v1."""
        for path in self._tasks:
            file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(file, b"0")
            finally:
                os.close(file)

    def wrap(self, argv: Sequence[str]) -> tuple[str, ...]:
        """Enter v2's cgroup, then become `argv`."""
        return tuple(argv) if self.stdin is None else ("/bin/sh", "-c", ENTER, "sh", *argv)

    async def settle(self, pid: int) -> None:
        """Nothing to do: the process enters by itself, or ends with status 126 and a line in its log."""

    def close(self) -> None:
        """Close the file."""
        if self.stdin is not None:
            os.close(self.stdin)
            self.stdin = None


class Tree:
    """Makes cgroups in the host's tree.

    Args:
        hierarchies: the hierarchies to make them in.
        survives_container: whether processes in them outlive the container: not without the host's PID namespace.
    """

    name = "cgroup"

    def __init__(self, hierarchies: Sequence[Hierarchy], *, survives_container: bool) -> None:
        self.survives_container = survives_container
        self._hierarchies = tuple(hierarchies)

    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Cgroup:
        """Make a folder in every hierarchy, with its limits. Takes less than a millisecond, so no thread is used.

        Raises:
            CgroupFailed: the kernel refuses, or a limit has no controller here.
        """
        name = f"{instance}@{incarnation}"
        tasks, procs = [], None
        kept: set[str] = set()
        try:
            for hierarchy in self._hierarchies:
                parent = hierarchy.folder
                _make(hierarchy, parent, folder := parent / name, limits, kept)
                if hierarchy.unified:
                    procs = folder / hierarchy.door
                else:
                    tasks.append(folder / hierarchy.door)
            if missing := _wanted(limits) - kept:
                await self.remove(instance)
                raise CgroupFailed(f"this kernel has no cgroup controller {', '.join(sorted(missing))} for this limit")
            return TreeCgroup(tasks, procs)
        except OSError as error:
            await self.remove(instance)
            raise CgroupFailed(f"cannot make a cgroup: {error.filename}: {error.strerror}") from error

    async def remove(self, instance: InstanceId) -> None:
        """Remove the instance's folders that have no process in them."""
        for attempt in range(REMOVE_ATTEMPTS):
            # An id has no '@' in it, so "a" does not match a folder of "a.b".
            left = [path for one in self._hierarchies for path in one.folder.glob(f"{instance}@*")]
            for path in left:
                with contextlib.suppress(OSError):
                    path.rmdir()
            if not any(path.exists() for path in left):
                return
            await asyncio.sleep(REMOVE_PAUSE_S * (attempt + 1))

    def sweep(self) -> None:
        """Remove cgroups that were left behind because the supervisor, or the whole host, was cut off before.

        The kernel does not remove a cgroup with a process in it. A cgroup that was made just now may still get its
        process.
        """
        for path in [path for one in self._hierarchies for path in one.folder.glob("*@*")]:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.rmdir()

    async def close(self) -> None:
        """Nothing is held."""


def open_tree(place: Place) -> Tree:
    """The manager that uses the host's tree.

    Raises:
        Impossible: the tree is not the host's, or cannot be written to.
    """
    if not place.host_cgroups:
        raise Impossible("the container has a cgroup namespace of its own; run it with --cgroupns=host")
    tree = Tree(find_hierarchies(), survives_container=place.host_pids)
    tree.sweep()
    return tree


def _wanted(limits: Limits) -> set[str]:
    wanted = {"cpu": limits.cpu_shares, "memory": limits.memory_limit}
    return {controller for controller, limit in wanted.items() if limit is not None}


def _make(hierarchy: Hierarchy, parent: Path, folder: Path, limits: Limits, kept: set[str]) -> None:
    """Make one folder and write its limits; add to `kept` the controller of each limit that was written."""
    if not parent.is_dir():
        parent.mkdir(mode=0o755, exist_ok=True)
    if hierarchy.unified:
        controllers = sorted(one for one in _wanted(limits) if hierarchy.has(one))
        for above in (hierarchy.top, parent) if controllers else ():
            (above / "cgroup.subtree_control").write_text(" ".join(f"+{one}" for one in controllers))
    elif "cpuset" in hierarchy.controllers:
        # A new cpuset of v1 has neither processors nor memory nodes, and accepts no process before it has both.
        _inherit(parent)
    # The folder exists where an earlier start of this same incarnation did not get as far as its process.
    folder.mkdir(mode=0o755, exist_ok=True)
    if "cpuset" in hierarchy.controllers:
        _inherit(folder)
    _bound_tasks(hierarchy, parent, folder)
    if limits.cpu_shares is not None and hierarchy.has("cpu"):
        if hierarchy.unified:
            (folder / "cpu.weight").write_text(str(cpu_weight(limits.cpu_shares)))
        else:
            (folder / "cpu.shares").write_text(str(limits.cpu_shares))
        kept.add("cpu")
    if limits.memory_limit is not None and hierarchy.has("memory"):
        name = "memory.max" if hierarchy.unified else "memory.limit_in_bytes"
        (folder / name).write_text(str(limits.memory_limit))
        kept.add("memory")


def _bound_tasks(hierarchy: Hierarchy, parent: Path, folder: Path) -> None:
    """Bound its threads, where this hierarchy can; nothing else depends on it, as its user is bounded, too."""
    bound = folder / "pids.max"
    with contextlib.suppress(OSError):
        if hierarchy.unified and not bound.exists() and hierarchy.has("pids"):
            for above in (hierarchy.top, parent):
                (above / "cgroup.subtree_control").write_text("+pids")
        # Never made here: where the kernel has not made it, there is no such bound.
        file = os.open(bound, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(file, str(TASKS).encode())
        finally:
            os.close(file)


def _inherit(folder: Path) -> None:
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (folder / name).read_text().strip():
            (folder / name).write_text((folder.parent / name).read_text())
