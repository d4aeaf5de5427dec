"""What happens in a history besides its supervisors' own work: faults, and what people do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.fakes.etcd import FakeEtcd
from tests.simulation.loop import WORLD as WORLD_LIFE
from tests.simulation.loop import context_of
from tests.simulation.points import POINTS, Armed, Way
from tests.simulation.world import SimHost, World

HOSTS = "abc"
MACHINES = ("r1", "r2", "r3", "d1", "f1")

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


def later(world: World, seconds: float, call: Callable[[], Any]) -> None:
    """What ends an act; it happens in the world, whatever becomes of the host."""
    world.loop.call_later(seconds, call, context=context_of(WORLD_LIFE))


def draw_acts(chance: Random, number: int) -> list[Act]:
    """The acts of one history, in order."""
    names, weights = list(KINDS), [kind.weight for kind in KINDS.values()]
    acts, at = [], 20.0
    for _ in range(number):
        # Often close together, so that several are felt at once.
        at += chance.random() ** 3 * GAP_S
        acts.append(
            Act(
                at=at,
                kind=chance.choices(names, weights)[0],
                host=chance.choice(HOSTS),
                machine=chance.choice(MACHINES),
                other=chance.choice(HOSTS),
                for_s=chance.choice([0.3, 2.0, 8.0, 20.0, 40.0, 90.0, 150.0]) * (0.5 + chance.random()),
                x=chance.random(),
            )
        )
    return acts


def draw_cluster(world: World) -> None:
    """The machines that people want at the beginning."""
    chance = world.chance.of("cluster")
    for name in MACHINES:
        if chance.random() < 0.8:
            create(world, name, chance.choice(HOSTS), anywhere=chance.random() < 0.7)


def create(world: World, name: str, host: str, *, anywhere: bool) -> None:
    match name[0]:
        case "r":
            world.put(name, rbd=f"rbd/{name}")
        case "f":
            world.put(name, extra_flags="-drive file=/tmp/x,format=raw")
    if anywhere and name[0] != "f":
        world.put(name, hosts="a b c")
    world.put(name, shutdown_timeout="20", ram="64", host=host)


# --- supervisors and hosts ----------------------------------------------------------------------------------------


@kind("supervisor-kill", 8)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.kill()
    later(world, act.for_s, host.start)


@kind("supervisor-upgrade")
def _(world: World, act: Act) -> None:
    world.host(act.host).stop()


@kind("supervisor-freeze", 8)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.freeze_supervisor(on=True)
    later(world, act.for_s, lambda: host.freeze_supervisor(on=False))


@kind("failpoint", 40)
def _(world: World, act: Act) -> None:
    """At a point of the program its supervisor is killed, frozen, or gets an error."""
    place, rest = divmod(act.x * len(POINTS), 1)
    way = tuple(Way)[int(rest * len(Way))]
    world.armed[POINTS[int(place)]] = Armed(act.host, way, act.for_s)


@kind("host-freeze", 6)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.freeze(on=True)
    later(world, act.for_s, lambda: host.freeze(on=False))


@kind("host-power", 5)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.lose_power()
    later(world, act.for_s, host.boot)


@kind("host-renamed", 2)
def _(world: World, act: Act) -> None:
    """Its supervisor is started again under another name, for a while."""
    host = world.host(act.host)
    host.kill()
    host.name = act.other if act.x < 0.5 else "typo"
    host.start()
    later(world, act.for_s, lambda: _right_again(host))


def _right_again(host: SimHost) -> None:
    host.kill()
    host.name = host.true_name
    host.start()


# --- QEMUs --------------------------------------------------------------------------------------------------------


def _qemu_of(world: World, act: Act) -> Any:
    living = world.judge.living(act.machine)
    return living[int(act.x * len(living))] if living else None


@kind("qemu-kill", 8)
def _(world: World, act: Act) -> None:
    if (qemu := _qemu_of(world, act)) is not None:
        qemu.crash()


@kind("qemu-freeze")
def _(world: World, act: Act) -> None:
    if (qemu := _qemu_of(world, act)) is not None:
        qemu.frozen = True
        later(world, act.for_s, lambda: setattr(qemu, "frozen", False))


@kind("qemu-mute", 2)
def _(world: World, act: Act) -> None:
    if (qemu := _qemu_of(world, act)) is not None:
        qemu.mute = True
        later(world, act.for_s, lambda: setattr(qemu, "mute", False))


@kind("guest-deaf", 3)
def _(world: World, act: Act) -> None:
    if (qemu := _qemu_of(world, act)) is not None:
        qemu.deaf = True


@kind("guest-shutdown")
def _(world: World, act: Act) -> None:
    if (qemu := _qemu_of(world, act)) is not None and qemu.run_state == "running":
        qemu.shut_down()


@kind("qmp-answer-lost")
def _(world: World, act: Act) -> None:
    commands = ("cont", "quit", "system_powerdown", "query-status")
    world.host(act.host).kernel.lose_answer_to = commands[int(act.x * len(commands))]


@kind("qemu-fails", 3)
def _(world: World, act: Act) -> None:
    world.host(act.host).kernel.next_words.append("qemu: something is wrong")


# --- etcd ---------------------------------------------------------------------------------------------------------


@kind("etcd-cut", 8)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.weather.cut = True
    host.weather_changed()

    def mend() -> None:
        host.weather.cut = False
        host.weather_changed()

    later(world, act.for_s, mend)


@kind("etcd-flaky", 8)
def _(world: World, act: Act) -> None:
    weather = world.host(act.host).weather
    weather.loses_request, weather.loses_reply = 0.2 * act.x, 0.2 * act.x
    weather.delays, weather.refuses, weather.slow_s = 0.15 * act.x, 0.2 * (1 - act.x), 0.5 * act.x + 0.02
    later(world, act.for_s, lambda: None if weather.cut else weather.clear())


@kind("etcd-no-quorum")
def _(world: World, act: Act) -> None:
    world.quorum = False
    later(world, act.for_s, lambda: setattr(world, "quorum", True))


@kind("etcd-watches-cut", 6)
def _(world: World, act: Act) -> None:
    world.host(act.host).weather_changed()


@kind("etcd-compact", 3)
def _(world: World, act: Act) -> None:
    world.etcd.compact()


@kind("etcd-full", 2)
def _(world: World, act: Act) -> None:
    world.etcd.fill()
    later(world, act.for_s, world.etcd.make_space)


@kind("lease-revoked", 5)
def _(world: World, act: Act) -> None:
    """A frozen leader wakes and revokes a healthy holder's lease (etcd #15247)."""
    leases = sorted(world.etcd.leases)
    if leases:
        world.etcd.expire(leases[int(act.x * len(leases))])


@kind("etcd-backup", 3)
def _(world: World, act: Act) -> None:
    world.backup = world.etcd.backup()


@kind("etcd-restored", 3)
def _(world: World, act: Act) -> None:
    """The backup takes the place of what there is, and what people do meanwhile may pass the revision that was seen."""
    if world.backup is not None:
        while act.x < 0.5 and world.backup.revision <= world.etcd.revision + 3:
            world.backup.write("/elsewhere", str(world.backup.revision))
        world.etcd.restore(world.backup)
        world.backup = None


@kind("etcd-lost", 1)
def _(world: World, act: Act) -> None:
    """All data is lost."""
    world.etcd.restore(FakeEtcd(world.loop.time))


# --- Ceph ---------------------------------------------------------------------------------------------------------


@kind("ceph-away", 5)
def _(world: World, act: Act) -> None:
    world.ceph.away = "its monitors are gone"
    later(world, act.for_s, lambda: setattr(world.ceph, "away", None))


@kind("ceph-cut", 3)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.reaches_ceph = False
    later(world, act.for_s, lambda: setattr(host, "reaches_ceph", True))


@kind("ceph-slow", 2)
def _(world: World, act: Act) -> None:
    world.ceph.slow_s = 12.0 * act.x
    later(world, act.for_s, lambda: setattr(world.ceph, "slow_s", 0.3))


# --- people -------------------------------------------------------------------------------------------------------


@kind("move", 8)
def _(world: World, act: Act) -> None:
    if world.wishes.get(act.machine, {}).get("host") not in (None, act.other):
        world.judge.ordered(act.machine, f"moves to {act.other}")
        world.put(act.machine, host=act.other)


@kind("power", 5)
def _(world: World, act: Act) -> None:
    if act.machine in world.wishes and world.wishes[act.machine].get("host"):
        off = world.wishes[act.machine].get("power", "on") == "on"
        world.judge.ordered(act.machine, "power")
        world.put(act.machine, power="off" if off else "on")
        if off and act.x < 0.7:
            later(world, act.for_s, lambda: _power_on(world, act.machine))


def _power_on(world: World, machine: str) -> None:
    if world.wishes.get(machine, {}).get("power") == "off":
        world.put(machine, power="on")


@kind("restart")
def _(world: World, act: Act) -> None:
    if world.wishes.get(act.machine, {}).get("host"):
        world.judge.ordered(act.machine, "restart")
        way = ("", "now:", "reset:")[int(act.for_s) % 3]
        world.put(act.machine, restart_request=f"{way}{act.x:.6f}")


@kind("remove", 4)
def _(world: World, act: Act) -> None:
    if world.wishes.get(act.machine, {}).get("host"):
        world.judge.ordered(act.machine, "removed")
        world.remove(act.machine)
        if act.x < 0.8:
            later(world, act.for_s, lambda: _create_again(world, act))


def _create_again(world: World, act: Act) -> None:
    if not world.wishes.get(act.machine, {}).get("host"):
        create(world, act.machine, act.other, anywhere=act.x < 0.5)


@kind("create", 4)
def _(world: World, act: Act) -> None:
    _create_again(world, act)
