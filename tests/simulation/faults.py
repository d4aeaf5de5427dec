"""The kinds of faults."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from tests.fakes.etcd import FakeEtcd
from tests.simulation.acts import Act, kind, later
from tests.simulation.points import MOVES, POINTS, WAYS, Armed, Way
from tests.simulation.world import PASSAGE_S, World

if TYPE_CHECKING:
    from tests.simulation.host import SimHost
    from tests.simulation.points import Hit

START_TIMEOUT_S = 60.0
"""`KVM_START_TIMEOUT`."""

# --- supervisors and hosts ----------------------------------------------------------------------------------------


@kind("supervisor-kill", 8)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.kill()
    later(world, act.for_s, host.start, ends=f"down {act.host}")


@kind("supervisor-upgrade")
def _(world: World, act: Act) -> None:
    """The one that is replaced may be of an earlier release."""
    host = world.host(act.host)
    host.was_earlier = act.x < 0.25
    host.stop()


@kind("supervisor-freeze", 8)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.freeze_supervisor(on=True)
    later(world, act.for_s, lambda: host.freeze_supervisor(on=False))


@kind("failpoint", 40)
def _(world: World, act: Act) -> None:
    """At a point of the program its supervisor is killed, frozen, or gets an error."""
    place, rest = divmod(act.x * len(POINTS), 1)
    way = WAYS[int(rest * len(WAYS))]
    world.armed[POINTS[int(place)]] = Armed(act.host, way, act.for_s)


@kind("struck-in-a-move", 12)
def _(world: World, act: Act) -> None:
    """At a step of a live move something happens at one of its hosts, to a QEMU, or on the way."""
    place, rest = divmod(act.x * len(MOVES), 1)
    hit, rest = divmod(rest * len(HITS), 1)
    world.armed[MOVES[int(place)]] = Armed("", Way.HIT, act.for_s, hit=HITS[int(hit)])


def _kill_what_moves(world: World, host: SimHost, for_s: float) -> None:
    for qemu in [one for one in host.kernel.living if one.migration.status != "none"]:
        qemu.crash()


def _freeze_what_moves(world: World, host: SimHost, for_s: float) -> None:
    for qemu in [one for one in host.kernel.living if one.migration.status != "none"]:
        qemu.frozen = True
        later(world, for_s, partial(setattr, qemu, "frozen", False))


def _freeze_host(world: World, host: SimHost, for_s: float) -> None:
    host.freeze(on=True)
    later(world, for_s, lambda: host.freeze(on=False), ends=f"frozen {host.true_name}")


def _lose_power(world: World, host: SimHost, for_s: float) -> None:
    host.lose_power()
    later(world, for_s, host.boot, ends=f"off {host.true_name}")


def _kill_supervisor(world: World, host: SimHost, for_s: float) -> None:
    host.kill()
    later(world, for_s, host.start, ends=f"down {host.true_name}")


def _lose_replies(world: World, host: SimHost, for_s: float) -> None:
    host.weather.loses_reply = 0.9
    later(world, min(for_s, 10.0), host.weather.clear)


def _cut_from_etcd(world: World, host: SimHost, for_s: float) -> None:
    host.weather.cut = True
    host.weather_changed()

    def mend() -> None:
        host.weather.cut = False
        host.weather_changed()

    later(world, for_s, mend, ends=f"cut {host.true_name}")


def _cut_off(world: World, host: SimHost, for_s: float) -> None:
    _swallow(world, [(host.true_name, other.true_name) for other in world.hosts], for_s, both=True)


def _swallow_what_it_says(world: World, host: SimHost, for_s: float) -> None:
    _swallow(world, [(host.true_name, other.true_name) for other in world.hosts], for_s, both=False)


def _swallow_what_it_is_told(world: World, host: SimHost, for_s: float) -> None:
    _swallow(world, [(other.true_name, host.true_name) for other in world.hosts], for_s, both=False)


def _swallow(world: World, ways: list[tuple[str, str]], for_s: float, *, both: bool) -> None:
    ways = [*ways, *((there, here) for here, there in ways if both)]
    world.net.swallowed.update(ways)
    world.net.changed()

    def mend() -> None:
        world.net.swallowed.difference_update(ways)
        world.net.changed()

    later(world, for_s, mend)


def _think_better(world: World, host: SimHost, for_s: float) -> None:
    """Somebody writes `host` back."""
    for name in sorted(world.wishes):
        for qemu in world.judge.living(name):
            if qemu.migration.status != "none" and world.wishes[name].get("host") not in {None, qemu.host}:
                world.judge.ordered(name, f"moves back to {qemu.host}", to=qemu.host)
                world.put(name, host=qemu.host)
                return


HITS: tuple[Hit, ...] = (
    *(_kill_what_moves, _freeze_what_moves, _freeze_host, _lose_power, _kill_supervisor, _lose_replies),
    *(_cut_from_etcd, _cut_off, _swallow_what_it_says, _swallow_what_it_is_told, _think_better),
)


STUCK_S = 45.0
"""Longer than the rest of a transfer may be under way (`instance.moves.REST_S`)."""


@kind("end-of-a-move", 6)
def _(world: World, act: Act) -> None:
    """Somebody has second thoughts when all is sent; nobody hears of the hand-over; or the target takes no more."""
    if act.x < 0.6:
        hit = _think_better if act.x < 0.3 else _lose_replies
        world.armed["before GIVE"] = Armed("", Way.HIT, act.for_s, hit=hit)
    else:
        world.armed["switching"] = Armed("", Way.HIT, STUCK_S + act.for_s, hit=_freeze_targets)


def _freeze_targets(world: World, host: SimHost, for_s: float) -> None:
    for other in world.hosts:
        for qemu in [one for one in other.kernel.living if one.is_arrival and one.ran_at is None]:
            qemu.frozen = True
            later(world, for_s, partial(setattr, qemu, "frozen", False))


@kind("frozen-at-the-lock", 6)
def _(world: World, act: Act) -> None:
    """A supervisor is frozen right before it writes a lock; what does not run there yet may be moved meanwhile."""

    def move() -> None:
        for name, keys in sorted(world.wishes.items()):
            if act.x < 0.5 and keys.get("host") == act.host != act.other and not world.judge.living(name):
                world.judge.ordered(name, f"moves to {act.other}", to=act.other)
                world.put(name, host=act.other)

    world.armed["lock to be written"] = Armed(act.host, Way.FREEZE, act.for_s, move)


@kind("host-freeze", 6)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.freeze(on=True)
    later(world, act.for_s, lambda: host.freeze(on=False), ends=f"frozen {act.host}")


@kind("host-power", 5)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.lose_power()
    later(world, act.for_s, host.boot, ends=f"off {act.host}")


@kind("host-renamed", 3)
def _(world: World, act: Act) -> None:
    """Its supervisor is started again under another name, for a while; a person may say that it is meant."""
    host = world.host(act.host)
    host.start_with(name=act.other if act.x < 0.5 else "typo")
    if act.x > 0.7:
        later(world, act.for_s / 2, host.confirm_identity)
    later(world, act.for_s, host.start_with)
    later(world, act.for_s + 10.0, host.confirm_identity)


@kind("host-other-prefix", 2)
def _(world: World, act: Act) -> None:
    """The same with another `KVM_PREFIX`."""
    host = world.host(act.host)
    host.start_with(prefix="/kwm")
    later(world, act.for_s, host.start_with)


@kind("host-astray", 2)
def _(world: World, act: Act) -> None:
    """The same with another cluster's etcd, which knows nothing of these machines, or holds a copy of their keys."""
    host = world.host(act.host)
    if act.x < 0.3:
        world.is_copied = True
        world.elsewhere.restore(world.etcd.backup())
    host.start_with(astray=True)
    # In a copy it may be for as long as a takeover waits.
    later(world, act.for_s + (90.0 if act.x < 0.15 else 0.0), host.start_with)


@kind("host-records-lost", 2)
def _(world: World, act: Act) -> None:
    """Its run directory is empty, or one record in it cannot be read."""
    host = world.host(act.host)
    if act.x < 0.5:
        host.lose_records()
    else:
        host.kill()
        living = [qemu.instance for qemu in host.kernel.living]
        host.damage_record(living[int(act.x * len(living))] if living else act.machine)
    later(world, min(act.for_s, 8.0), host.start)


@kind("host-clock", 1)
def _(world: World, act: Act) -> None:
    """Its time of day jumps by days."""
    world.host(act.host).clock.skew_s = (act.x - 0.5) * 1e6


MIGRATE = ("migrate", "migrate-incoming", "migrate-continue", "migrate_cancel", "query-migrate")
"""QMP commands of a live move."""

# --- QEMUs --------------------------------------------------------------------------------------------------------


def _qemu_of(world: World, act: Act) -> Any:
    living = [qemu for qemu in world.judge.living(act.machine) if not world.host(qemu.host).frozen]
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
    if act.x < 0.3:
        world.host(act.host).kernel.hangs_until = world.loop.time() + act.for_s
    if (qemu := _qemu_of(world, act)) is not None:
        qemu.mute = True
        later(world, act.for_s, lambda: setattr(qemu, "mute", False))


@kind("qemu-hangs", 2)
def _(world: World, act: Act) -> None:
    """One ends, and whatever is started on its host does no command for longer than a start may take."""
    if (qemu := _qemu_of(world, act)) is not None:
        world.host(qemu.host).kernel.hangs_until = world.loop.time() + START_TIMEOUT_S + act.for_s
        qemu.crash()


@kind("guest-deaf", 3)
def _(world: World, act: Act) -> None:
    if (qemu := _qemu_of(world, act)) is not None:
        qemu.deaf = True


@kind("guest-shutdown")
def _(world: World, act: Act) -> None:
    if (qemu := _qemu_of(world, act)) is not None and qemu.run_state == "running":
        (qemu.power_off if "-no-shutdown" in qemu.argv else qemu.shut_down)()


@kind("qmp-answer-lost")
def _(world: World, act: Act) -> None:
    commands = ("cont", "quit", "system_powerdown", "query-status", *MIGRATE)
    world.host(act.host).kernel.lose_answer_to = commands[int(act.x * len(commands))]


@kind("guest-paused", 2)
def _(world: World, act: Act) -> None:
    """Somebody stops a guest by a QMP of his own, and lets it go on."""
    if (qemu := _qemu_of(world, act)) is not None:
        qemu.pause()
        guest = qemu.boot
        later(world, act.for_s, lambda: world.let_go_on(guest))


@kind("qemu-fails", 3)
def _(world: World, act: Act) -> None:
    kernel = world.host(act.host).kernel
    if act.x < 0.7:
        kernel.next_words.append("qemu: something is wrong")
    else:
        kernel.fails_until = world.loop.time() + act.for_s


@kind("qemu-ends-at-command", 4)
def _(world: World, act: Act) -> None:
    """Before it does what it is told, or after."""
    commands = ("cont", "quit", "system_powerdown", "query-status", "query-uuid", "query-chardev", *MIGRATE)
    place, rest = divmod(act.x * len(commands), 1)
    world.host(act.host).kernel.dies_at = commands[int(place)], rest < 0.5


# --- etcd ---------------------------------------------------------------------------------------------------------


@kind("etcd-cut", 8)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.weather.cut = True
    host.weather_changed()

    def mend() -> None:
        host.weather.cut = False
        host.weather_changed()

    later(world, act.for_s, mend, ends=f"cut {act.host}")


@kind("etcd-flaky", 8)
def _(world: World, act: Act) -> None:
    weather = world.host(act.host).weather
    weather.loses_request, weather.loses_reply = 0.2 * act.x, 0.2 * act.x
    weather.delays, weather.refuses, weather.slow_s = 0.15 * act.x, 0.2 * (1 - act.x), 0.5 * act.x + 0.02
    weather.repeats = 0.1 * act.x

    def mend() -> None:
        cut = weather.cut
        weather.clear()
        weather.cut = cut

    later(world, act.for_s, mend)


@kind("etcd-no-quorum")
def _(world: World, act: Act) -> None:
    world.quorum.clear()
    later(world, act.for_s, world.quorum.set, ends="quorum")


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
    """The backup takes the place of what there is, and what people do meanwhile may pass the revision that was seen.

    It may be restored once more.
    """
    if world.backup is not None:
        while act.x < 0.5 and world.backup.revision <= world.etcd.revision + 3:
            world.backup.write("/elsewhere", str(world.backup.revision))
        world.etcd.restore(world.backup)
        if not 0.5 <= act.x < 0.75:
            world.backup = None


@kind("etcd-restored-twice", 2)
def _(world: World, act: Act) -> None:
    """One backup is restored, and once more a little later: somebody had moved a machine that writes to a file."""
    backup = world.etcd.backup()

    def restore() -> None:
        if not world.is_healed:
            world.etcd.restore(backup)

    def move() -> None:
        if not world.is_healed and world.wishes.get("f1", {}).get("host") not in {None, act.other}:
            world.judge.ordered("f1", f"moves to {act.other}", to=act.other)
            world.put("f1", host=act.other)

    for after_s, what in ((5.0, restore), (15.0, move), (30.0 + 30.0 * act.x, restore)):
        later(world, after_s, what)


@kind("etcd-lost", 1)
def _(world: World, act: Act) -> None:
    """All data is lost."""
    world.etcd.restore(FakeEtcd(world.loop.time))


# --- the way between hosts, over which guests are moved -------------------------------------------------------------


@kind("transfer-cut", 4)
def _(world: World, act: Act) -> None:
    """Nothing passes between two hosts, or one way nothing does."""
    ways = [(act.host, act.other), (act.other, act.host)][: 1 if act.x < 0.5 else 2]
    world.net.swallowed.update(ways)
    world.net.changed()

    def mend() -> None:
        world.net.swallowed.difference_update(ways)
        world.net.changed()

    later(world, act.for_s, mend)


@kind("transfer-slow", 2)
def _(world: World, act: Act) -> None:
    world.net_slow_s = 3.0 * act.x
    later(world, act.for_s, lambda: setattr(world, "net_slow_s", PASSAGE_S), ends="transfers")


# --- Ceph ---------------------------------------------------------------------------------------------------------


@kind("ceph-away", 5)
def _(world: World, act: Act) -> None:
    world.ceph.away = "its monitors are gone"
    later(world, act.for_s, lambda: setattr(world.ceph, "away", None), ends="ceph")


@kind("ceph-cut", 3)
def _(world: World, act: Act) -> None:
    host = world.host(act.host)
    host.reaches_ceph = False
    later(world, act.for_s, lambda: setattr(host, "reaches_ceph", True), ends=f"ceph {act.host}")


@kind("ceph-osd-late", 3)
def _(world: World, act: Act) -> None:
    """An OSD hears late of clients that are shut out."""
    world.ceph.late_s = 40.0 * act.x
    later(world, act.for_s, lambda: setattr(world.ceph, "late_s", 0.0))


@kind("ceph-slow", 2)
def _(world: World, act: Act) -> None:
    world.ceph.slow_s = 12.0 * act.x
    later(world, act.for_s, lambda: setattr(world.ceph, "slow_s", 0.3))
