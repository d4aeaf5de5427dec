"""Which failpoints a chaos run draws: all that its world can come to."""

from __future__ import annotations

from tests.chaos.armed import FAIL, KILL, WAYS
from tests.simulation.points import CUTS, MOVES, POINTS

UNREACHED = {
    **dict.fromkeys(MOVES, "no machine moves while it runs"),
    **dict.fromkeys(("cloned", "copied", "frozen", "imported", "noted"), "no disk is made"),
    **dict.fromkeys(
        (
            *("before SNAPSHOT", "standing still", "images snapshot", "snapshot taken", "taken away from one disk"),
            *("to be rolled back", "one disk rolled back", "file duplicated", "image duplicated"),
        ),
        "nobody takes a snapshot",
    ),
    "before FINISH": "no guest powers itself off",
    "before GIVE_UP": "no QEMU is silent for all of its start",
    "before GROW": "it is looked for every ten minutes",
    "before PLUG": "no machine has a NIC",
    "before POWERDOWN": "guests have no time to shut down",
    "before PREPARE": "no machine has media",
    "before READ": "no record is damaged",
    "before RESET": "nobody asks for one",
    "before ROOM": "no disk is a file",
    "before ASK": "no two machines name one image",
}
"""Those that it does not, and why."""

DRAWN = tuple(name for name in POINTS if name not in UNREACHED)
"""The others."""


def drawn(number: int) -> tuple[str, str]:
    """A point, and what happens there, by a number that a schedule has drawn; nobody waits at some, so none fails."""
    rest, place = divmod(number, len(DRAWN))
    name, way = DRAWN[place], WAYS[rest % len(WAYS)]
    return name, KILL if way == FAIL and name in CUTS else way
