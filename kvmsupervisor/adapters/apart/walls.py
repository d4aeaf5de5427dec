"""What of all walls this host can have, and the way in for one QEMU.

Namespaces and Landlock domains belong to a thread, and what it starts inherits them. So a thread that ends afterwards
enters them and starts the program: nothing of ours runs between fork and exec, and no other thread changes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from pathlib import Path

from kvmsupervisor.adapters.apart import calls, landlock
from kvmsupervisor.adapters.apart.room import ALWAYS, DEVICES, PROGRAMS, Base, Room
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.sight import Sight

VIEW, LANDLOCK = "view", "landlock"
"""The names of walls, in the metric and in words: namespaces in which there is nothing else, and a Landlock domain."""


@frozen(kw_only=True)
class HostView:
    """What QEMUs of this host may see besides programs, and what none of them ever does.

    Attributes:
        seen: further paths that all see, for reading (`KVM_QEMU_SEES`).
        hidden: folders that none sees, whatever its keys name.
    """

    seen: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    @property
    def shows_all(self) -> bool:
        """Whether everything is seen: there is no view of its own then."""
        return "/" in self.seen

    def shows(self, path: str) -> bool:
        """Whether a key may show a path: one that lies in no hidden folder, and contains none."""
        if not path.startswith("/") or ".." in path.split("/"):
            return False
        real = os.path.realpath(path)
        mine = real.rstrip("/") + "/"
        folders = (os.path.realpath(folder).rstrip("/") + "/" for folder in self.hidden)
        return not any(mine.startswith(folder) or folder.startswith(mine) for folder in folders)


@frozen(kw_only=True)
class Walls:
    """The walls of this host.

    Attributes:
        base: of the rooms; None where none can be made.
        landlock: the kernel's version of Landlock; 0 without.
        view: what may be seen.
        lacking: why a wall does not stand, by its name.
    """

    base: Base | None = None
    landlock: int = 0
    view: HostView = HostView()
    lacking: Mapping[str, str] = field(default_factory=dict)

    @property
    def stand(self) -> bool:
        """Whether there are any: files are kept apart by either."""
        return self.base is not None or self.landlock > 0

    def entry(self, sight: Sight) -> Entry | None:
        """The way in for one process to come, to be closed; None where there are no walls.

        Raises:
            OSError: what was there when the supervisor started cannot be had now: nothing is started without it.
        """
        return Entry(self, sight) if self.stand else None


NO_WALLS = Walls(lacking=dict.fromkeys((VIEW, LANDLOCK), "QEMU runs as the same user as its supervisor"))


class Entry:
    """The way into the walls for one process to come.

    Attributes:
        kept_out: paths that its keys name and that it does not see.
    """

    def __init__(self, walls: Walls, sight: Sight) -> None:
        view = walls.view
        writes = [path for path in sight.writable if view.shows(path)]
        self.kept_out = tuple(path for path in sight.writable if path not in writes and Path(path).exists())
        reads = (*sight.files, *view.seen)
        self._room: Room | None = None
        self._undo = contextlib.ExitStack()
        with self._undo:
            if walls.base is not None and not view.shows_all:
                self._room = Room(walls.base, reads=reads, writes=writes, is_offline=not sight.needs_network)
                self._undo.callback(self._room.close)
                # Otherwise it could open again, under their names in /proc/self/fd, what it inherits from outside.
                reads, writes = (), ["/"]
            elif view.shows_all:
                writes = ["/"]
            else:
                reads = (*PROGRAMS, "/proc", *ALWAYS, *reads)
                writes += [f"/dev/{name}" for name in DEVICES]
            self._reads, self._writes = reads, tuple(writes)
            self._sight, self._landlock = sight, walls.landlock
            self._undo = self._undo.pop_all()

    def enter(self) -> None:
        """Take this thread, which must end afterwards, inside.

        Raises:
            OSError: the kernel refuses.
        """
        with contextlib.suppress(OSError):
            # A kernel without keyrings has none to leave.
            calls.new_session_keyring()
        if self._room is not None:
            self._room.enter()
        if self._landlock:
            sight = self._sight
            calls.no_new_privileges()
            with landlock.domain(
                self._landlock,
                reads=self._reads,
                writes=self._writes,
                listens=sight.listens,
                connects=sight.connects,
            ) as restrict:
                restrict()

    def close(self) -> None:
        """Let go of what was not used."""
        self._undo.close()


def raise_walls(
    view: HostView,
    *,
    programs: Iterable[str] = (),
    make_base: Callable[[Iterable[str]], Base] = Base.make,
    version: Callable[[], int] = landlock.version,
) -> Walls:
    """Find out which walls this host can have.

    Args:
        view: what may be seen.
        programs: folders of programs that are in no usual place.
        make_base: makes the base of all rooms; raises OSError.
        version: the kernel's version of Landlock.
    """
    base, lacking, known = None, {}, version()
    try:
        base = make_base(programs)
    except OSError as error:
        lacking[VIEW] = (
            f"no view of its own can be made for QEMU ({error.filename}: {error.strerror}); it takes CAP_SYS_ADMIN and "
            "CAP_SYS_CHROOT, Linux 5.12, and no profile of AppArmor that forbids mounts"
        )
    if not known:
        lacking[LANDLOCK] = "this kernel has no Landlock: it takes Linux 5.13, and landlock among its modules (lsm=)"
    return Walls(base=base, landlock=known, view=view, lacking=lacking)
