"""What is done for each kind of fault, and what ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations

from tests.chaos.faults import PARTS, Fault, Kind, Part, Reach
from tests.chaos.points import drawn
from tests.chaos.world import ChaosHost, World
from tests.support.cluster import Qemu
from tests.support.processes import freeze

End = Callable[[], None]

WAKE_S = 0.5
"""How long a host's QEMUs have been awake before its supervisor is: they are what could do harm."""

BACK_S = 2.0
"""Between two parts of a site that come back one after the other: long enough for a supervisor to have tried."""

NAMES = ("{}.example.org", "{}0", "localhost")
"""Under what a host is started by mistake: its full name, a typo, a name that DHCP did not give."""

FLOOD_LIMIT = 4 << 20
"""What the run directory of a host may hold with one machine that floods its console, bytes: the limit of its logs
(`KVM_LOG_MAX_BYTES` as the world sets it, times `KVM_LOG_KEEP` and one) and as much again."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """A fault that has begun.

    Attributes:
        fault: which.
        whom: whom it hit, for people.
        machines: those that feel it.
        end: ends it; may be called when the world has changed meanwhile.
        void: whether there was nothing to hit.
    """

    fault: Fault
    whom: str
    machines: frozenset[str]
    end: End = _nothing
    void: bool = False


def felt_by(machine: str, acts: Sequence[Act]) -> list[Act]:
    """By which of the acts that went on together a machine is judged.

    One alone is felt by those that it hit. What mixes may spread to all: a taker that dies has machines of its own.
    What found nothing to hit mixes with nothing.
    """
    real = [act for act in acts if not act.void]
    return real if len(real) > 1 else [act for act in real if machine in act.machines]


class Acts:
    """Does harm to a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._kinds: dict[Kind, Callable[[Fault], Act]] = {
            Kind.SUPERVISOR_KILL: self._supervisor_kill,
            Kind.SUPERVISOR_FREEZE: self._supervisor_freeze,
            Kind.QEMU_KILL: self._qemu_kill,
            Kind.QEMU_FREEZE: self._qemu_freeze,
            Kind.HOST_CRASH: self._host_crash,
            Kind.HOST_REBOOT: self._host_reboot,
            Kind.HOST_FREEZE: self._host_freeze,
            Kind.STRAY_FENCE: self._stray_fence,
            Kind.ETCD_CUT: self._cut,
            Kind.CEPH_CUT: self._cut,
            Kind.BOTH_CUT: self._cut,
            Kind.LEADER_FREEZE: self._leader_freeze,
            Kind.LEADER_KILL: self._leader_kill,
            Kind.QUORUM_LOSS: self._quorum_loss,
            Kind.CEPH_FREEZE: self._ceph_freeze,
            Kind.MON_FREEZE: self._mon_freeze,
            Kind.MOVE: self._move,
            Kind.GARBAGE: self._garbage,
            Kind.GUARD_KILL: self._guard_kill,
            Kind.HISTORY: self._history,
            Kind.STORE: self._store,
            Kind.NAME: self._name,
            Kind.RUN_DIR: self._run_dir,
            Kind.FLOOD: self._flood,
            Kind.FAILPOINT: self._failpoint,
            Kind.SITE_POWER: self._site_power,
        }
        # What each fault that has begun and not ended has hold of, by its number.
        self._held: dict[int, frozenset[tuple[Part, str]]] = {}

    def begin(self, fault: Fault) -> Act:
        """Let it happen, unless another one has hold of what it would hit: then there is nothing to hit."""
        wanted = self._parts(fault)
        for other, held in self._held.items():
            if both := sorted(f"{part.value} of {whose}" for part, whose in wanted & held):
                return _void(fault, f"fault {other} has hold of {both[0]}")
        act = self._kinds[fault.kind](fault)
        if act.void:
            return act
        self._held[fault.number] = wanted

        def end() -> None:
            del self._held[fault.number]
            act.end()

        return replace(act, end=end)

    def _parts(self, fault: Fault) -> frozenset[tuple[Part, str]]:
        """What it has hold of, part by part; `whose` is a host or a machine, or both where all are hit."""
        world = self._world
        hosts = [host.name for host in world.hosts]
        if fault.reach is not Reach.ALL:
            hosts = [world.host_of(self._machine(fault)).name]
        machines = [self._machine(fault)] if fault.reach is Reach.MACHINE else world.machines
        machines = [machine for machine in machines if world.host_of(machine).name in hosts]
        whose = {
            Part.QEMU: machines,
            Part.MEMBERS: ["etcd"],
            Part.CEPH: ["the cluster"],
            Part.KEYS: ["people"],
        }
        return frozenset((part, one) for part in PARTS[fault.kind] for one in whose.get(part, hosts))

    # --- hosts ------------------------------------------------------------------------------------------------

    def _machine(self, fault: Fault) -> str:
        return self._world.machines[fault.machine % len(self._world.machines)]

    def _hit(self, fault: Fault) -> tuple[ChaosHost, frozenset[str]]:
        host = self._world.host_of(self._machine(fault))
        return host, frozenset(self._world.machines_of(host))

    def _supervisor_kill(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        if not host.running:
            return _void(fault, host.name)
        host.kill9()
        return Act(fault=fault, whom=host.name, machines=machines, end=lambda: _relaunch(host))

    def _supervisor_freeze(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        if not host.running:
            return _void(fault, host.name)
        thaw = _frozen_supervisor(host)
        return Act(fault=fault, whom=host.name, machines=machines, end=thaw)

    def _failpoint(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        machine = self._machine(fault)
        qemus = self._world.qemus_of(machine)
        if not host.running or not qemus:
            return _void(fault, host.name)
        name, way = drawn(fault.other)
        host.points.arm(name, way)
        for qemu in qemus:
            qemu.signal(signal.SIGKILL)

        def end() -> None:
            host.points.disarm()
            if host.running:
                # Nothing, where it is not stopped.
                os.kill(host.pid, signal.SIGCONT)
            else:
                host.launch()

        return Act(fault=fault, whom=f"{host.name}, {way} at {name!r}", machines=machines, end=end)

    def _qemu_kill(self, fault: Fault) -> Act:
        machine = self._machine(fault)
        qemus = self._world.qemus_of(machine)
        for qemu in qemus:
            qemu.signal(signal.SIGKILL)
        return Act(fault=fault, whom=machine, machines=frozenset({machine}), void=not qemus)

    def _qemu_freeze(self, fault: Fault) -> Act:
        machine = self._machine(fault)
        qemus = self._world.qemus_of(machine)
        return Act(fault=fault, whom=machine, machines=frozenset({machine}), end=_frozen_qemus(qemus), void=not qemus)

    def _guard_kill(self, fault: Fault) -> Act:
        (machine,) = self._world.guarded
        host = self._world.host_of(machine)
        killed = host.kill_guard()
        return Act(fault=fault, whom=host.name, machines=self._world.guarded, void=not killed)

    def _host_crash(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        host.crash()
        return Act(fault=fault, whom=host.name, machines=machines, end=lambda: _relaunch(host))

    def _host_reboot(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        host.crash()
        host.reboot()
        return Act(fault=fault, whom=host.name, machines=machines)

    def _host_freeze(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        return Act(fault=fault, whom=host.name, machines=machines, end=_frozen_host(host))

    def _stray_fence(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        locks = [self._world.runs(machine) for machine in machines]
        end = _frozen_host(host)
        for lock in locks:
            for address in () if lock is None else lock.clients:
                self._world.ceph.ceph("osd", "blocklist", "add", address, f"{fault.duration_s - 3:.0f}")
        return Act(fault=fault, whom=host.name, machines=machines, end=end, void=not locks)

    def _cut(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        addresses = []
        if fault.kind is not Kind.CEPH_CUT:
            addresses += self._world.etcd_addresses
        if fault.kind is not Kind.ETCD_CUT:
            addresses.append(self._world.ceph_address)
        host.node.lose(addresses, fault.way)
        return Act(fault=fault, whom=host.name, machines=machines, end=host.node.hear)

    def _name(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        if not host.running:
            return _void(fault, host.name)
        name = NAMES[fault.other % len(NAMES)].format(host.name)
        host.kill9()
        host.launch(name)

        def end() -> None:
            if host.running:
                host.kill9()
            host.launch()

        return Act(fault=fault, whom=f"{host.name} as {name}", machines=machines, end=end)

    def _run_dir(self, fault: Fault) -> Act:
        host, machines = self._hit(fault)
        if not host.running:
            return _void(fault, host.name)
        free = host.fill_run_dir()
        host.kill9()
        host.launch()

        def end() -> None:
            free()
            # That it serves in a full one is promised; it is started anew only where it did not.
            assert host.running, f"the supervisor of {host.name} ended in a full run directory:\n{host.log[-2000:]}"

        return Act(fault=fault, whom=host.name, machines=machines, end=end)

    def _flood(self, fault: Fault) -> Act:
        world = self._world
        host, machines = self._hit(fault)
        written = world.begin_flood(host)

        def end() -> None:
            size = host.run_dir_used
            _persistently(world.end_flood)
            assert size < FLOOD_LIMIT, f"the run directory of {host.name} holds {size} bytes under a flood"

        return Act(fault=fault, whom=host.name, machines=machines, end=end, void=not written)

    # --- what all share ---------------------------------------------------------------------------------------

    @property
    def _all(self) -> frozenset[str]:
        return frozenset(self._world.machines)

    def _leader_freeze(self, fault: Fault) -> Act:
        leader = self._world.leader()
        if leader is None:
            return _void(fault, "nobody leads")
        return Act(fault=fault, whom=leader.name, machines=self._all, end=self._world.freeze_members([leader]))

    def _leader_kill(self, fault: Fault) -> Act:
        leader = self._world.leader()
        if leader is None:
            return _void(fault, "nobody leads")
        return Act(fault=fault, whom=leader.name, machines=self._all, end=self._world.kill_member(leader))

    def _quorum_loss(self, fault: Fault) -> Act:
        members = self._world.etcd.members
        spared = members[fault.other % len(members)]
        gone = [member for member in members if member is not spared]
        whom = ", ".join(member.name for member in gone)
        return Act(fault=fault, whom=whom, machines=self._all, end=self._world.freeze_members(gone))

    def _ceph_freeze(self, fault: Fault) -> Act:
        self._world.ceph.freeze()
        return Act(fault=fault, whom="monitor and OSD", machines=self._all, end=self._world.ceph.thaw)

    def _mon_freeze(self, fault: Fault) -> Act:
        self._world.ceph.stop_mon()
        return Act(fault=fault, whom="monitor", machines=self._all, end=self._world.ceph.thaw)

    def _history(self, fault: Fault) -> Act:
        world = self._world
        return self._other_etcd(fault, world.restore, dict.fromkeys(world.machines, ("host",)))

    def _store(self, fault: Fault) -> Act:
        world = self._world
        names = {machine: ("host", *world.wishes(machine)) for machine in world.machines}
        return self._other_etcd(fault, world.wipe, names)

    def _other_etcd(self, fault: Fault, change: Callable[[], None], names: Mapping[str, Sequence[str]]) -> Act:
        """Change what etcd holds; a person writes keys again, after a while: `host` as it was, the others as ever."""
        world = self._world
        hosts = {machine: world.host_of(machine) for machine in world.machines}
        change()

        def end() -> None:
            for machine, host in hosts.items():
                wishes = {**world.wishes(machine), "host": host.name}
                for name in sorted(names[machine], key=lambda name: name == "host"):
                    _persistently(partial(world.keys.try_write, world.wish_key(machine, name), wishes[name]))
            world.back_up()

        return Act(fault=fault, whom="all members", machines=self._all, end=end)

    def _site_power(self, fault: Fault) -> Act:
        world = self._world
        for host in world.hosts:
            host.crash()
        world.etcd.kill()
        world.ceph.lose_power()

        def boot() -> None:
            for host in world.hosts:
                host.reboot()

        backs: dict[str, Callable[[], None]] = {
            "hosts": boot,
            "etcd": world.etcd.start,
            "Ceph": world.ceph.get_power,
        }
        order = list(permutations(backs))[fault.other % 6]

        def end() -> None:
            for name in order:
                backs[name]()
                time.sleep(BACK_S)

        return Act(fault=fault, whom=f"back as {', '.join(order)}", machines=self._all, end=end)

    # --- keys -------------------------------------------------------------------------------------------------

    def _move(self, fault: Fault) -> Act:
        world, machine = self._world, self._machine(fault)
        here = world.hosts.index(world.host_of(machine))
        there = world.hosts[(here + 1 + fault.other % (len(world.hosts) - 1)) % len(world.hosts)]
        written = world.keys.try_write(world.wish_key(machine, "host"), there.name)
        return Act(fault=fault, whom=f"{machine} to {there.name}", machines=frozenset({machine}), void=not written)

    def _garbage(self, fault: Fault) -> Act:
        world, machine = self._world, self._machine(fault)
        host = world.host_of(machine)
        ghost = f"{world.keys.layout.prefix}/ghost"
        # What is written, and what is there afterwards: None for nothing.
        nonsense: tuple[tuple[str, str, str | None, str | None], ...] = (
            ("ram=banana", world.wish_key(machine, "ram"), "banana", world.wishes(machine)["ram"]),
            ("an unknown key", world.wish_key(machine, "colour"), "\x1b[31m\x07", None),
            ("a machine without ram", f"{ghost}/host", host.name, None),
            ("a lock of nobody", f"{ghost}/lock", "{" * 5000, None),
            ("no instance at all", f"{world.keys.layout.prefix}/..//\x01", "x" * 100_000, None),
            ("no key for hosts", world.wish_key(machine, "hosts"), "\n\t,,", world.wishes(machine).get("hosts")),
            ("the lock deleted", world.lock_key(machine), None, None),
            ("the lock overwritten", world.lock_key(machine), '{"version": 99}', None),
            ("the status overwritten", world.status_key(machine), "[]", None),
            ("the session deleted", world.session_key(host), None, None),
            ("the session overwritten", world.session_key(host), "nonsense", None),
        )
        said, key, value, after = nonsense[fault.other % len(nonsense)]
        keys = world.keys
        written = keys.try_delete(key) if value is None else keys.try_write(key, value)

        def mend() -> None:
            if after is not None:
                _persistently(lambda: keys.try_write(key, after))
            elif value is not None and keys.get(key) == value.encode():
                _persistently(lambda: keys.try_delete(key))

        return Act(fault=fault, whom=f"{said} ({machine})", machines=self._all, end=mend, void=not written)


def _void(fault: Fault, whom: str) -> Act:
    return Act(fault=fault, whom=whom, machines=frozenset(), void=True)


def _relaunch(host: ChaosHost) -> None:
    if not host.running:
        host.launch()


def _frozen_supervisor(host: ChaosHost) -> End:
    if not host.running:
        return _nothing
    pid = host.pid
    host.freeze()

    def thaw() -> None:
        # Another fault may have killed it; its successor is not ours to wake.
        if host.running and host.pid == pid:
            with suppress(ProcessLookupError):
                host.thaw()

    return thaw


def _frozen_qemus(qemus: list[Qemu]) -> End:
    for qemu in qemus:
        qemu.signal(signal.SIGSTOP)

    def thaw() -> None:
        for qemu in qemus:
            qemu.signal(signal.SIGCONT)

    return thaw


def _frozen_host(host: ChaosHost) -> End:
    supervisor, guard, qemus = _frozen_supervisor(host), host.guard, _frozen_qemus(host.qemus())
    if guard is not None:
        freeze(guard)

    def thaw() -> None:
        qemus()
        time.sleep(WAKE_S)
        if guard is not None and host.guard == guard:
            os.kill(guard, signal.SIGCONT)
        supervisor()

    return thaw


def _persistently(act: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not act():
        assert time.monotonic() < deadline, "etcd does not take a key although nothing is wrong with it any more"
