"""The kinds of what people do, right or wrong."""

from __future__ import annotations

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.removal import ALWAYS_ALLOWED
from tests.simulation.acts import HOSTS, Act, create, kind, later
from tests.simulation.world import World


@kind("move", 8)
def _(world: World, act: Act) -> None:
    # Who moves a machine sees its key.
    is_there = f"/kvm/{act.machine}/host" in world.etcd.data
    if is_there and world.wishes.get(act.machine, {}).get("host") not in (None, act.other):
        world.judge.ordered(act.machine, f"moves to {act.other}", to=act.other)
        world.put(act.machine, host=act.other)


@kind("move-a-guest", 8)
def _(world: World, act: Act) -> None:
    """One that runs, and may go on elsewhere without a stop."""
    fit = [name for name in sorted(world.wishes) if name[0] in "rd" and f"/kvm/{name}/host" in world.etcd.data]
    guests = [name for name in fit if any(qemu.writes for qemu in world.judge.living(name))]
    if guests and world.wishes[name := guests[int(act.x * len(guests))]].get("host") != act.other:
        world.judge.ordered(name, f"moves to {act.other}", to=act.other)
        world.put(name, host=act.other)


@kind("move-and-back", 4)
def _(world: World, act: Act) -> None:
    """Somebody has second thoughts."""
    before = world.wishes.get(act.machine, {}).get("host")
    if before is None or before not in HOSTS or before == act.other:
        return
    world.judge.ordered(act.machine, f"moves to {act.other}", to=act.other)
    world.put(act.machine, host=act.other)

    def back() -> None:
        if world.wishes.get(act.machine, {}).get("host") == act.other:
            world.judge.ordered(act.machine, f"moves back to {before}", to=before)
            world.put(act.machine, host=before)

    later(world, 6.0 * act.x * act.x, back)


@kind("moved-from-the-silent", 3)
def _(world: World, act: Act) -> None:
    """A host has no session, and a person moves its machines elsewhere by hand."""
    for name, keys in sorted(world.wishes.items()):
        host = keys.get("host")
        if host in HOSTS and host != act.other and not world.has_session(host) and world.has_session(act.other):
            world.judge.ordered(name, f"moves to {act.other}", to=act.other)
            world.put(name, host=act.other)


@kind("drain", 8)
def _(world: World, act: Act) -> None:
    """It ends after a while, mostly; and what has left may be wanted back."""
    mode = "live" if act.x < 0.6 else "cold" if act.x < 0.8 else "stop"
    world.drain(act.host, mode)
    way = int(act.for_s * 1000) % 4
    if way:
        back = (None, None, "live", "cold")[way]
        later(world, act.for_s, lambda: _undrain(world, act.host, mode, back))


def _undrain(world: World, host: str, mode: str, back: str | None) -> None:
    if world.host_wishes.get(host, {}).get("drain") == mode and not world.is_healed:
        world.undrain(host, back)


@kind("undrain", 2)
def _(world: World, act: Act) -> None:
    world.undrain(act.host, "live" if act.x < 0.7 else None)


@kind("host-as-placed", 3)
def _(world: World, act: Act) -> None:
    """`host` is written again, as the place where a failover has put the machine."""
    for name in sorted(world.wishes):
        placed = world.placed(name)
        if placed is not None and world.wishes[name].get("host") != placed:
            world.put(name, host=placed)


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
        way = ("", "now:", "reset:")[int(act.for_s) % 3]
        world.judge.ordered(act.machine, "restart", at_once=way != "")
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


@kind("move-to-nobody", 3)
def _(world: World, act: Act) -> None:
    """A typo in `host`: nobody has that name. It is mended after a while."""
    before = world.wishes.get(act.machine, {}).get("host")
    if before is None or before not in HOSTS:
        return
    world.put(act.machine, host=NOBODY)
    later(world, act.for_s, lambda: mend_keys(world, act.machine, before))


NOBODY = "nodex"


def mend_keys(world: World, machine: str, host: str) -> None:
    """Write the host that was meant, unless somebody has written another one; and its own image."""
    if machine == "r2" and world.wishes.get(machine, {}).get("rbd") == "rbd/r1":
        world.put(machine, rbd="rbd/r2")
    if world.wishes.get(machine, {}).get("host", host) not in HOSTS:
        world.judge.ordered(machine, f"goes to {host}", to=host)
        world.put(machine, host=host)


@kind("mass-removal", 2)
def _(world: World, act: Act) -> None:
    """All wishes are deleted by mistake, and written again after a while.

    On a host that runs more than two, nothing is to happen. For the others it is an order.
    """
    for host in world.hosts:
        statuses = {qemu.instance: world.judge.status(qemu.instance) for qemu in host.kernel.living}
        # The removal of one that is held already is no other one.
        running = [name for name, status in statuses.items() if status is None or not status.held]
        for name in running if len(running) <= ALWAYS_ALLOWED else []:
            world.judge.ordered(name, "removed by mistake")
    world.erase([key for key in world.etcd.data if key.startswith("/kvm/") and not key.endswith("/lock")])
    later(world, min(act.for_s, 40.0), world.set_right)


@kind("key-deleted", 4)
def _(world: World, act: Act) -> None:
    """A key that is a supervisor's is deleted by hand: a lock, a status, both, a session."""
    name = InstanceId(act.machine)
    lock, status = world.layout.lock_key(name), world.layout.status_key(name)
    session = world.layout.session_key(HostName(act.host))
    world.erase([[lock], [status], [lock, status], [session]][int(act.x * 4)])


@kind("rbd-mistaken", 1)
def _(world: World, act: Act) -> None:
    """The key `rbd` of one names another one's image, for a while."""
    if world.wishes.get("r2", {}).get("host"):
        world.put("r2", rbd="rbd/r1")
        if act.x < 0.5:
            later(world, act.for_s, lambda: mend_keys(world, "r2", act.host))


@kind("key-garbage", 2)
def _(world: World, act: Act) -> None:
    """A wish turns into nonsense, and is written again after a while."""
    if world.wishes.get(act.machine, {}).get("host"):
        world.judge.wrote(world.etcd.revision + 1)
        world.etcd.write(f"/kvm/{act.machine}/ram", "a lot")
        later(world, act.for_s, world.set_right)


@kind("lock-broken", 3)
def _(world: World, act: Act) -> None:
    """`break-lock`, where it is allowed."""
    for name in sorted(world.wishes):
        world.break_lock(name)
