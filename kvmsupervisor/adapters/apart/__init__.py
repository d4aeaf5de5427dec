"""What keeps one QEMU from all else on its host: an empty view of the file system, no network, a Landlock domain.

`raise_walls` finds out what this host can do; `Walls.entry` is the way in, for one process to come; `become` makes it
another user.
"""

from kvmsupervisor.adapters.apart.user import become
from kvmsupervisor.adapters.apart.walls import LANDLOCK, NO_WALLS, VIEW, Entry, HostView, Walls, raise_walls

__all__ = ["LANDLOCK", "NO_WALLS", "VIEW", "Entry", "HostView", "Walls", "become", "raise_walls"]
