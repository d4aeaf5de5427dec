"""What is done for each kind of fault, and what ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.chaos.faults import Fault, Kind
from tests.chaos.world import ChaosHost, World
from tests.support.cluster import Qemu
from tests.support.processes import freeze

End = Callable[[], None]

WAKE_S = 0.5
"""How long a host's QEMUs have been awake before its supervisor is: they are what could do harm."""


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
        }

    def begin(self, fault: Fault) -> Act:
        """Let it happen."""
        return self._kinds[fault.kind](fault)

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

    # --- what all share ---------------------------------------------------------------------------------------

    @property
    def _all(self) -> frozenset[str]:
        return frozenset(self._world.machines)

    def _leader_freeze(self, fault: Fault) -> Act:
        leader = self._world.leader()
        return Act(fault=fault, whom=leader.name, machines=self._all, end=self._world.freeze_members([leader]))

    def _leader_kill(self, fault: Fault) -> Act:
        leader = self._world.leader()
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
