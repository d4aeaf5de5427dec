"""The failpoints of the program, and what a history does at them: kill, freeze, or let a step fail."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvmsupervisor import failpoints
from kvmsupervisor.adapters.etcd import Unavailable
from kvmsupervisor.domain.view import Action
from tests.simulation.loop import LIFE, WORLD, context_of
from tests.support.checkout import ROOT

if TYPE_CHECKING:
    from tests.simulation.host import SimHost
    from tests.simulation.world import World


class Way(Enum):
    """What happens at a point."""

    KILL = "kill"
    FREEZE = "freeze"
    FAIL = "fail"
    HIT = "hit"
    """Something else happens there."""


Hit = Callable[["World", "SimHost", float], None]
"""Something that happens to a host, or beside it, for so many seconds."""


def _named(call: str) -> Iterator[str]:
    """The names that stand in the program's text."""
    for path in sorted((ROOT / "kvmsupervisor").rglob("*.py")):
        yield from re.findall(rf'\b{call}\("([^"]+)"\)', path.read_text())


CUTS = tuple(_named("cut"))
"""Points at which nobody waits."""

POINTS = (*(f"before {action.name}" for action in Action if action is not Action.FORGET), *_named("point"), *CUTS)
"""All of them."""


MOVES = (
    *("before OFFER", "before RECEIVE", "before TELL", "clients of the arrival known", "before ARRIVE", "arriving"),
    "arrival on record",
    *("before SETTLE", "before CALL", "connected to the target", "before ANNOUNCE", "before SEND", "sending"),
    *("before SWITCH", "switching", "before GIVE", "handing over", "handed over", "before CANCEL", "before CALL_OFF"),
    *("before CUT", "before GO_BACK"),
)
"""Those of a live move."""

WAYS = (Way.KILL, Way.FREEZE, Way.FAIL)
"""What is drawn at any point."""

CHANGES = (
    *("before CHANGE", "going, not asked for", "closed, still on record", "coming, not open", "open, not on record"),
    *("on record, not given", "NIC coming"),
)
"""Those of a machine that is changed while it runs."""

ELSEWHERE = {
    **dict.fromkeys(CHANGES, "instance/test_changes.py::test_cut_off"),
    "before GUARD": "instance/test_failpoints.py::test_guard",
    "before MEDIUM": "instance/test_failpoints.py::test_medium",
    "before PLUG": "instance/test_failpoints.py::test_plug",
    "before ROOM": "instance/test_failpoints.py::test_room",
    **dict.fromkeys(
        (
            "before SNAPSHOT",
            "standing still",
            "images snapshot",
            "snapshot taken",
            "taken away from one disk",
            "to be rolled back",
            "one disk rolled back",
        ),
        "e2e/test_snapshots.py::test_cut_off",
    ),
    **dict.fromkeys(("file duplicated", "image duplicated"), "machine/test_duplicates.py::test_cut_off"),
    "copied": "machine/test_contents.py::test_cut_off_while_it_is_copied",
    **dict.fromkeys(("imported", "frozen", "cloned", "noted"), "machine/test_contents_ceph.py::test_cut_off"),
}
"""Points that no history comes to: nothing has a guard, a NIC, a drive, a disk that comes or is a file, or an image
that is made. Each with the test that cuts there, in virtual time or on a real Ceph."""

HERE = tuple(name for name in POINTS if name not in ELSEWHERE)
"""Those that a hundred histories come to."""


class Killed(BaseException):
    """Leaves a step that does not wait: its supervisor is dead."""


@dataclass(frozen=True, slots=True)
class Armed:
    """What happens the next time that a host comes to a point.

    Attributes:
        host: which; empty for any.
        way: what happens.
        for_s: for how long.
        meanwhile: what somebody does while it is frozen there.
        hit: what else happens.
    """

    host: str
    way: Way
    for_s: float
    meanwhile: Callable[[], None] = lambda: None
    hit: Hit = lambda world, host, for_s: None


@contextmanager
def listening(world: World) -> Iterator[None]:
    """Count who comes to which point in this world, and do there what is armed."""

    def reached(name: str) -> Awaitable[None] | None:
        life = LIFE.get()
        if world.over or life is WORLD:
            return None
        world.reached[name] += 1
        armed = world.armed.get(name)
        host: SimHost | None = getattr(life, "host", None)
        if armed is None or host is None or life.dead or armed.host not in {"", host.true_name}:
            return None
        del world.armed[name]
        return _meet(world, name, armed, host)

    before, failpoints.reached = failpoints.reached, reached
    try:
        yield
    finally:
        failpoints.reached = before


def _meet(world: World, name: str, armed: Armed, host: SimHost) -> Awaitable[None] | None:
    world.shaken(armed.for_s)
    world.trace.add("point", f"{armed.way.value} {host.true_name} at {name!r}")
    match armed.way:
        case Way.KILL:
            host.kill()
            world.loop.call_later(armed.for_s, host.start, context=context_of(WORLD))
            if name in CUTS:
                raise Killed(name)
            return _never()
        case Way.FREEZE:
            host.freeze_supervisor(on=True)
            world.loop.call_later(armed.for_s / 2, armed.meanwhile, context=context_of(WORLD))
            thaw = lambda: host.freeze_supervisor(on=False)  # noqa: E731
            world.loop.call_later(armed.for_s, thaw, context=context_of(WORLD))
            return None if name in CUTS else asyncio.sleep(0)
        case Way.FAIL:
            return None if name in CUTS else _fail(name)
        case Way.HIT:
            # In a step of its own: what happens to who is in the middle of one would not be felt by it.
            world.loop.call_soon(armed.hit, world, host, armed.for_s, context=context_of(WORLD))
            return None if name in CUTS else asyncio.sleep(0)


async def _never() -> None:
    await asyncio.Event().wait()


async def _fail(name: str) -> None:
    await asyncio.sleep(0)
    raise Unavailable(f"failpoint {name!r}")
