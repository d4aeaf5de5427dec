"""What happens in a history besides its supervisors' own work, and how it is drawn.

`faults.py` and `people.py` have the kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.simulation.loop import WORLD as WORLD_LIFE
from tests.simulation.loop import context_of
from tests.simulation.world import World

HOSTS = ("a", "b", "c")

MACHINES = {"r1": 0.8, "r2": 0.8, "r3": 0.8, "d1": 0.7, "f1": 0.8, "s1": 0.15, "n1": 0.1}
"""How likely each is there at the beginning; `create` has what its letter says: `r` has an image, `n` one without an
exclusive lock, `s` another one's, `f` a file, `d` no disk."""

QUIET = (
    "guest-",
    "qemu-",
    "qmp-",
    "ceph-",
    "transfer-",
    "drain",
    "undrain",
    "move",
    "power",
    "restart",
    "remove",
    "create",
    "etcd-full",
    "etcd-compact",
)
"""How the kinds begin that keep no host from renewing its session."""

SWARM = 0.5
"""How likely a history leaves half of all kinds out, so that the others meet more often (Groce and others, "Swarm
Testing"): which half, it draws."""

GAP_S = 40.0
"""The longest pause between two acts."""


@dataclass(frozen=True, kw_only=True)
class Act:
    """Something that happens.

    Attributes:
        at: seconds after the beginning.
        kind: what; a key of `KINDS`.
        host: where.
        machine: to which.
        other: a second host.
        for_s: for how long.
        x: a number between 0 and 1, for what else there is to choose.
    """

    at: float
    kind: str
    host: str
    machine: str
    other: str
    for_s: float
    x: float

    def __str__(self) -> str:
        where = f"host={self.host} machine={self.machine} other={self.other}"
        return f"{self.at:7.1f} {self.kind} {where} for={self.for_s:.1f} x={self.x:.3f}"

    def happen(self, world: World) -> None:
        if not self.kind.startswith(QUIET):
            world.shaken(self.for_s)
        KINDS[self.kind].run(world, self)


Run = Callable[[World, Act], None]


@dataclass(frozen=True)
class Kind:
    weight: int
    run: Run


KINDS: dict[str, Kind] = {}


def kind(name: str, weight: int = 4) -> Callable[[Run], Run]:
    """Register one kind of act."""

    def add(run: Run) -> Run:
        KINDS[name] = Kind(weight, run)
        return run

    return add


def later(world: World, seconds: float, call: Callable[[], Any], *, ends: str = "") -> None:
    """What ends an act; it happens in the world, whatever becomes of the host.

    Args:
        world: in which.
        seconds: after which.
        call: is called then.
        ends: what it ends, where several acts may go on at a time that end the same: the last one does.
    """
    at = world.loop.time() + seconds
    if ends:
        at = world.until[ends] = max(at, world.until.get(ends, 0.0))

    def end() -> None:
        if not ends or world.until[ends] <= at:
            call()

    world.loop.call_at(at, end, context=context_of(WORLD_LIFE))


def draw_acts(chance: Random, number: int, kinds: Collection[str] = ()) -> list[Act]:
    """The acts of one history, in order; of these kinds only, where some are named."""
    names = [name for name in KINDS if name in kinds or not kinds]
    if not kinds and chance.random() < SWARM:
        names = [name for name in names if chance.random() < 0.5] or names
    weights = [KINDS[name].weight for name in names]
    acts, at = [], 20.0
    for _ in range(number):
        # Often close together, so that several are felt at once.
        at += chance.random() ** 3 * GAP_S
        acts.append(
            Act(
                at=at,
                kind=chance.choices(names, weights)[0],
                host=chance.choice(HOSTS),
                machine=chance.choice(tuple(MACHINES)),
                other=chance.choice(HOSTS),
                for_s=chance.choice([0.3, 2.0, 8.0, 20.0, 40.0, 90.0, 150.0]) * (0.5 + chance.random()),
                x=chance.random(),
            )
        )
    return acts


def draw_settings(chance: Random) -> dict[str, str]:
    """What hosts are set to: mostly so that guests are moved while they run."""
    settings = {}
    if chance.random() < 0.8:
        settings["KVM_MIGRATION_LISTEN"] = "192.0.2.{number}:9747"
    if chance.random() < 0.3:
        settings["KVM_MIGRATION_PARALLEL"] = "2"
    if chance.random() < 0.5:
        settings["KVM_DRAIN_ANY"] = "1"
    if chance.random() < 0.1:
        settings["KVM_RETURN"] = "auto"
    return settings


def draw_cluster(world: World) -> None:
    """The machines that people want at the beginning."""
    chance = world.chance.of("cluster")
    all_on = chance.choice(HOSTS) if chance.random() < 0.15 else None
    for name, likely in MACHINES.items():
        if chance.random() < likely:
            create(world, name, all_on or chance.choice(HOSTS), anywhere=chance.random() < 0.7)


def create(world: World, name: str, host: str, *, anywhere: bool) -> None:
    match name[0]:
        case "r" | "n":
            world.put(name, rbd=f"rbd/{name}")
        case "s":
            # A clone that kept its original's disk.
            world.put(name, rbd="rbd/r1")
    match name:
        case "r3":
            world.put(name, extra_flags="-no-shutdown")
        case "f1":
            world.put(name, extra_flags="-drive file=/tmp/x,format=raw")
    if anywhere and name[0] != "f":
        world.put(name, hosts="a b c")
    world.put(name, shutdown_timeout="20", ram="64", host=host)
