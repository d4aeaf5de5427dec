"""The sentences of a story: what machines there are, and what happens."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.simulation.host import SimHost
from tests.simulation.world import World

Happen = Callable[..., object]

SENTENCES: list[tuple[re.Pattern[str], Happen]] = []

FOR_ALL_S = 1e6
"""Whatever a fault costs, it may have cost it."""

KEYS = re.compile(r"(\S+?)=(\S+)")


class Unknown(Exception):
    """A sentence that no story knows."""


def sentence(pattern: str) -> Callable[[Happen], Happen]:
    """Register one; HOST and MACHINE in it are names, WORD is anything without white space."""
    for name in ("HOST", "MACHINE", "WORD"):
        pattern = pattern.replace(name, r"(\S+?)")

    def add(happen: Happen) -> Happen:
        SENTENCES.append((re.compile(pattern), happen))
        return happen

    return add


def happen(world: World, said: str) -> None:
    """Do what a sentence says.

    Raises:
        Unknown: no sentence is like it.
    """
    for pattern, run in SENTENCES:
        if (found := pattern.fullmatch(said)) is not None:
            world.shaken(FOR_ALL_S)
            run(world, *found.groups())
            return
    raise Unknown(said)


# --- hosts --------------------------------------------------------------------------------------------------------


@sentence("HOST loses power")
def _(world: World, host: str) -> None:
    world.host(host).lose_power()


@sentence("HOST has power again")
def _(world: World, host: str) -> None:
    world.host(host).boot()


@sentence("HOST freezes, its guests too")
def _(world: World, host: str) -> None:
    world.host(host).freeze(on=True)


@sentence("HOST goes on where it was")
def _(world: World, host: str) -> None:
    world.host(host).freeze(on=False)


@sentence("the whole site loses power")
def _(world: World) -> None:
    world.quorum.clear()
    world.ceph.away = "no monitor answers"
    for host in world.hosts:
        host.lose_power()


@sentence("the supervisor of HOST is stopped, and the next one started")
def _(world: World, host: str) -> None:
    world.host(host).stop()


@sentence("the supervisor of HOST is killed")
def _(world: World, host: str) -> None:
    world.host(host).kill()


@sentence("the next supervisor of HOST starts")
def _(world: World, host: str) -> None:
    world.host(host).start()


@sentence("the supervisor of HOST is started again under the name WORD")
def _(world: World, host: str, name: str) -> None:
    world.host(host).start_with(name=name)


# --- etcd and Ceph ------------------------------------------------------------------------------------------------


@sentence("etcd is away from all hosts")
def _(world: World) -> None:
    for host in world.hosts:
        _cut(host, cut=True)


@sentence("etcd is back")
def _(world: World) -> None:
    world.quorum.set()
    for host in world.hosts:
        _cut(host, cut=False)


def _cut(host: SimHost, *, cut: bool) -> None:
    host.weather.cut = cut
    host.weather_changed()


@sentence("a backup of etcd is made")
def _(world: World) -> None:
    world.backup = world.etcd.backup()


@sentence("etcd is restored from the backup")
def _(world: World) -> None:
    assert world.backup is not None
    world.etcd.restore(world.backup)


@sentence("etcd has no space left")
def _(world: World) -> None:
    world.etcd.fill()


@sentence("etcd has space again")
def _(world: World) -> None:
    world.etcd.make_space()


@sentence("Ceph's monitors are away")
def _(world: World) -> None:
    world.ceph.away = "no monitor answers"


@sentence("Ceph's monitors are back")
def _(world: World) -> None:
    world.ceph.away = None


# --- people -------------------------------------------------------------------------------------------------------


@sentence("somebody writes MACHINE: (.+)")
def _(world: World, machine: str, keys: str) -> None:
    world.judge.ordered(machine, keys)
    for name, value in KEYS.findall(keys):
        world.put(machine, **{name: value})


@sentence("somebody deletes everything below /kvm")
def _(world: World) -> None:
    world.erase([key for key in world.etcd.data if key.startswith("/kvm/")])


@sentence("somebody writes the keys again, from a file")
def _(world: World) -> None:
    world.set_right()


@sentence("the QEMU of MACHINE is killed")
def _(world: World, machine: str) -> None:
    for qemu in world.judge.living(machine):
        qemu.crash()


# --- the beginning ------------------------------------------------------------------------------------------------

MACHINE = re.compile(
    r"(\S+) runs on (\w+)(?:, or else on ([\w ]+))?; (?:its disk is (an image in Ceph|a file)|it has no disk)\."
)


def arrange(world: World, said: str) -> bool:
    """Write the keys of a machine, if this sentence tells of one."""
    if (found := MACHINE.fullmatch(said)) is None:
        return False
    name, host, others, disk = found.groups()
    keys = {"hosts": others.replace(" or ", " ")} if others else {}
    match disk:
        case "an image in Ceph":
            keys["rbd"] = f"rbd/{name}"
        case "a file":
            keys["extra_flags"] = f"-drive file=/srv/{name}.raw,format=raw"
    world.put(name, ram="64", **keys, host=host)
    return True
