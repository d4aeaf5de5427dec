"""Homes in the host's cgroup tree itself: v2, v1 with all its hierarchies, and the two side by side.

One folder for all in each hierarchy, in it one for each process. A process is moved in all of them in which there is a
container's cgroup to leave: a runtime looks at one only (on v1 the `devices` hierarchy) when it kills a container's
processes, but which one is its affair.

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

from kvmsupervisor.adapters.cgroup.homes import PROC, Home, HomeFailed, Impossible, cgroups_of
from kvmsupervisor.adapters.cgroup.place import Place, unescaped
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import Limits, cpu_weight

FOLDER = "kvmsupervisor"

ENTER = 'while [ "$1" != -- ]; do echo 0 >"$1" || exit 126; shift; done; shift; exec "$@"'
"""The child's prefix, run by /bin/sh: 0 is the writer itself, in whatever PID namespace. On v1 it is written to
`tasks`: for one thread that moves itself the kernel spares the lock that `cgroup.procs` makes everybody wait for
(kernel/cgroup/cgroup.c, cgroup_procs_write_start), and a shell has one thread."""

LIMITED = ("cpu", "memory")
"""The controllers that homes have limits for."""

REMOVE_ATTEMPTS, REMOVE_PAUSE_S = 5, 0.02
"""The kernel may hold a cgroup for a moment after its last process has ended."""

STALE_S = 60.0
"""How old an empty home must be to be swept, by the wall clock, which files are dated by. Its process enters within
milliseconds; one that finds its home swept, because that clock jumped, ends and is started again."""


@frozen(kw_only=True)
class Hierarchy:
    """One hierarchy of the host.

    Attributes:
        top: where it is mounted; homes are made below.
        controllers: those of v1, as /proc names them; empty for v2.
    """

    top: Path
    controllers: frozenset[str] = frozenset()

    @property
    def unified(self) -> bool:
        """Whether it is v2's."""
        return not self.controllers

    def has(self, controller: str) -> bool:
        """Whether it limits what `controller` is about."""
        if not self.unified:
            return controller in self.controllers
        return controller in (self.top / "cgroup.controllers").read_text(encoding="ascii").split()

    @property
    def door(self) -> str:
        """The file in a home that its process writes itself into."""
        return "cgroup.procs" if self.unified else "tasks"


def find_hierarchies(proc: Path = PROC) -> tuple[Hierarchy, ...]:
    """All hierarchies that matter to homes, at the places where they are mounted.

    Those are where this process is in a cgroup, a container's maybe, and those that have the limits.

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
            # One that nobody uses is no loss: the kernel names v2's, and v1's that were once used, even so.
            raise Impossible(
                f"the host's cgroup hierarchy {controllers or 'v2'} is not mounted here as a whole; run the container "
                "with -v /sys/fs/cgroup:/sys/fs/cgroup"
            )
    # In a root there is no container's cgroup to leave. Each home is half a millisecond of a start; in v2's tree beside
    # v1's it is 6 to 16 ms, in which `cgroup.procs` waits for all processors.
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
    """Where whole hierarchies are mounted, by their controllers."""
    mounts: dict[frozenset[str], Path] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = [*after.split(" "), "", ""][:3]
        if root != "/" or kind not in {"cgroup", "cgroup2"}:
            continue
        # Beside its controllers a v1 mount has options of its own, none of which is the name of a controller.
        words = options.split(",") if kind == "cgroup" else []
        names = frozenset(word for word in words if not re.match(r"(rw|ro|xattr|clone_children|noprefix)$|\w+=/", word))
        mounts.setdefault(names - {"cpuset_v2_mode", "favordynmods", "nofavordynmods"}, Path(unescaped(point)))
    return mounts


@frozen
class TreeHome:
    """Folders that are made, and the files by which a process enters them."""

    doors: tuple[Path, ...]
    stdin: int | None = None

    def wrap(self, argv: Sequence[str]) -> tuple[str, ...]:
        """Enter by every door, then become `argv`."""
        return ("/bin/sh", "-c", ENTER, "sh", *map(str, self.doors), "--", *argv)

    async def settle(self, pid: int) -> None:
        """Nothing to do: it enters by itself, or ends with status 126 and a word in its log."""

    def close(self) -> None:
        """Nothing to do."""


class Tree:
    """Homes in the host's tree.

    Args:
        hierarchies: where.
        survives_container: whether they outlive the container: not without the host's PID namespace.
    """

    name = "cgroup"

    def __init__(self, hierarchies: Sequence[Hierarchy], *, survives_container: bool) -> None:
        self.survives_container = survives_container
        self._hierarchies = tuple(hierarchies)

    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Home:
        """Make a folder in every hierarchy, with its limits. Takes less than a millisecond, so no thread is used.

        Raises:
            HomeFailed: the kernel refuses, or a limit has no controller here.
        """
        name = f"{instance}@{incarnation}"
        doors: list[Path] = []
        kept: set[str] = set()
        try:
            for hierarchy in self._hierarchies:
                folder = hierarchy.top / FOLDER / name
                _make(hierarchy, folder, limits, kept)
                doors.append(folder / hierarchy.door)
        except OSError as error:
            await self.remove(instance)
            raise HomeFailed(f"cannot make a cgroup: {error.filename}: {error.strerror}") from error
        if missing := _wanted(limits) - kept:
            await self.remove(instance)
            raise HomeFailed(f"this kernel has no cgroup controller {', '.join(sorted(missing))} for this limit")
        return TreeHome(tuple(doors))

    async def remove(self, instance: InstanceId) -> None:
        """Remove the instance's folders in which no process is."""
        for attempt in range(REMOVE_ATTEMPTS):
            # An id holds no '@', so "a" does not match what is of "a.b".
            left = [path for one in self._hierarchies for path in (one.top / FOLDER).glob(f"{instance}@*")]
            for path in left:
                with contextlib.suppress(OSError):
                    path.rmdir()
            if not any(path.exists() for path in left):
                return
            await asyncio.sleep(REMOVE_PAUSE_S * (attempt + 1))

    def sweep(self) -> None:
        """Remove the homes that nobody removed, because the supervisor, or the whole of it, was cut off before.

        A home in which a process lives cannot be removed; one that was made just now may await its process.
        """
        for path in [path for one in self._hierarchies for path in (one.top / FOLDER).glob("*@*")]:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.rmdir()

    async def close(self) -> None:
        """Nothing is held."""


def open_tree(place: Place) -> Tree:
    """Homes in the host's tree.

    Raises:
        Impossible: it is not the host's, or cannot be written to.
    """
    if not place.host_cgroups:
        raise Impossible("the container has a cgroup namespace of its own; run it with --cgroupns=host")
    tree = Tree(find_hierarchies(), survives_container=place.host_pids)
    tree.sweep()
    return tree


def _wanted(limits: Limits) -> set[str]:
    wanted = {"cpu": limits.cpu_shares, "memory": limits.memory_limit}
    return {controller for controller, limit in wanted.items() if limit is not None}


def _make(hierarchy: Hierarchy, folder: Path, limits: Limits, kept: set[str]) -> None:
    """Make one folder and write its limits; note in `kept` the controllers of those that were written."""
    parent = folder.parent
    parent.mkdir(mode=0o755, exist_ok=True)
    if hierarchy.unified:
        controllers = sorted(one for one in _wanted(limits) if hierarchy.has(one))
        for above in (hierarchy.top, parent) if controllers else ():
            (above / "cgroup.subtree_control").write_text(" ".join(f"+{one}" for one in controllers))
    elif "cpuset" in hierarchy.controllers:
        # A new cpuset of v1 has neither processors nor memory, and takes no process before it has.
        _inherit(parent)
    # There is one already where a start of this very incarnation did not get as far as its process.
    folder.mkdir(mode=0o755, exist_ok=True)
    if "cpuset" in hierarchy.controllers:
        _inherit(folder)
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


def _inherit(folder: Path) -> None:
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (folder / name).read_text().strip():
            (folder / name).write_text((folder.parent / name).read_text())
