"""What all instances of a host share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from kvmsupervisor.adapters.ceph import CephSnapshots
from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.adapters.event_files import EventFiles
from kvmsupervisor.adapters.links import Links
from kvmsupervisor.adapters.metrics import Metrics
from kvmsupervisor.cluster.fencing import Fencing
from kvmsupervisor.cluster.owners import Owners
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.cluster.status_writer import StatusWriter
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.argv import HostSide
from kvmsupervisor.domain.decision import Decision
from kvmsupervisor.domain.exits import Exit, WaitStatus
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.history import Era
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.offer import MoveFacts
from kvmsupervisor.domain.view import IN_SERVICE, Clearing, Haste, View
from kvmsupervisor.guard.client import GuardClient
from kvmsupervisor.machine.cdrom import Media
from kvmsupervisor.machine.contents import Contents
from kvmsupervisor.machine.guest_logs import GuestLogs
from kvmsupervisor.machine.images import Disks
from kvmsupervisor.machine.local_disks import LocalDisks
from kvmsupervisor.machine.provisioning import Provisioner
from kvmsupervisor.machine.spawn import Launch
from kvmsupervisor.machine.system import System


class Life(Protocol):
    """What the instances of a holder are part of: a host, which goes on without each of them, or one container."""

    def leaving(self) -> str | None:
        """Why an instance is to be stopped and let go of; None when it is not."""
        ...

    def haste(self) -> Haste:
        """In what a hurry that is."""
        ...

    def clearing(self, instance: InstanceId) -> Clearing:
        """What a drain means to an instance."""
        ...

    def decided(self, view: View, decision: Decision) -> None:
        """Be told, at every turn, what was seen of an instance and what was decided."""
        ...

    def ended(self, end: Exit, status: WaitStatus) -> None:
        """Be told how a QEMU ended that was not merely discarded before its guest ran."""
        ...


class HostsLife:
    """A host's. What its drain says to the instances is written here by `supervisor.evacuation`.

    Attributes:
        why_closed: why nothing is started; None when things are.
        evictions: why instances are stopped, by id.
        remarks: why instances stay although the host drains, by id.
    """

    def __init__(self) -> None:
        self.why_closed: str | None = None
        self.evictions: Mapping[InstanceId, str] = {}
        self.remarks: Mapping[InstanceId, str] = {}

    def leaving(self) -> str | None:
        """Nobody leaves a host as a whole: keys and drains say who goes."""
        return None

    def haste(self) -> Haste:
        """None, therefore."""
        return Haste.NONE

    def clearing(self, instance: InstanceId) -> Clearing:
        """As it was last decided."""
        if self.why_closed is None:
            return IN_SERVICE
        evicted, remark = self.evictions.get(instance), self.remarks.get(instance)
        return Clearing(closed=self.why_closed, evicted=evicted, remark=remark)

    def decided(self, view: View, decision: Decision) -> None:
        """Nothing to do."""

    def ended(self, end: Exit, status: WaitStatus) -> None:
        """Nothing to do."""


class Few:
    """At most so many instances at a time.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: set[InstanceId] = set()

    def take(self, instance: InstanceId) -> bool:
        """Whether it is one of them now."""
        if instance not in self._taken and len(self._taken) >= self._most:
            return False
        self._taken.add(instance)
        return True

    def give_back(self, instance: InstanceId) -> None:
        """It is one of them no more, if it was."""
        self._taken.discard(instance)


@frozen(kw_only=True)
class Moving:
    """What live moves need of this host; a host without it takes part in none.

    Attributes:
        facts: as its session tells them.
        facts_of: those of another host; None where that takes part in none.
        only_cold: `KVM_MIGRATION=cold`.
        only_live: `KVM_MIGRATION=live`.
        bandwidth: bytes in a second for one guest; 0 for no limit.
        leaving: who is on the way from here.
        coming: who is on the way to here.
    """

    facts: MoveFacts
    facts_of: Callable[[HostName], MoveFacts | None]
    only_cold: bool = False
    only_live: bool = False
    bandwidth: int = 0
    leaving: Few
    coming: Few


@frozen(kw_only=True)
class InstanceContext:
    """What all instances of a host share.

    Attributes:
        me: this host.
        boot_id: of this boot.
        machine: this one, as `HostSession.machine`.
        layout: of the keys.
        store: etcd.
        session: of this host.
        status_writer: writes the status keys.
        admission: who may start, and how many MiB are promised to whom.
        provisioner: of what QEMUs need of this host.
        system: processes, QMP and networks of this host.
        clock: the machine's.
        jitter: random numbers, 0 ≤ x < 1.
        metrics: where starts and ends are counted.
        fencing: of the storage.
        host_has_session: whether a host has a session; None when not known.
        host_gone_since: when a host's session was last seen to go, CLOCK_BOOTTIME; 0 where it never was.
        host_drains: whether a host takes no guest in: it drains, or says that it stops all its guests.
        sessions: the names under which hosts, and containers in single mode, have sessions; as far as it is known.
        host_side: what the host chooses for every QEMU.
        shutdown_timeout_s: default between power button and force.
        start_timeout_s: within which a new QEMU must answer.
        settle_s: how long changed keys must be quiet before a new guest runs.
        disks: images in Ceph.
        local_disks: files of this host.
        contents: what new disks begin with.
        snapshots: of images in Ceph.
        media: what CD-ROM drives hold.
        logs: of all guests.
        event_files: what happened to the instances, on this host.
        links: network interfaces of this host.
        guard: of machines that may write to what cannot be fenced; None when there shall be none (KVM_UNFENCED=pin).
        takeover_wait_s: how long a takeover waits for a host whose machine still has its disks open (law 4).
        holders: the other instances whose keys name one of these images for writing, and which have a lock.
        namesakes: the other instances whose keys name one of these images for writing, in the order of their ids.
        recorded_for: the other instances whose locks have storage clients on record.
        mismatch: why nothing is started or stopped on this host (law 12); None when all goes its way.
        dissent: why no lock is taken where none is: other hosts look for it elsewhere; None when all agree.
        objection: why a QEMU on record is not ours to touch; None when it is.
        era: the history of etcd that decisions are made in.
        draining: whether this host stops all its guests (`stop --all --local`).
        life: what the instances are part of.
        launch: how QEMUs are started.
        moving: live moves; None where they are not switched on.
    """

    me: HostName
    boot_id: str
    machine: str
    layout: Layout
    store: Store
    session: Session
    status_writer: StatusWriter
    admission: Admission
    provisioner: Provisioner
    system: System
    clock: Clock
    jitter: Callable[[], float]
    metrics: Metrics
    fencing: Fencing
    host_has_session: Callable[[HostName], bool | None]
    host_gone_since: Callable[[HostName], float]
    host_drains: Callable[[HostName], bool]
    sessions: Callable[[], Collection[str]]
    host_side: HostSide
    shutdown_timeout_s: float
    start_timeout_s: float
    settle_s: float
    disks: Disks
    local_disks: LocalDisks
    contents: Contents
    snapshots: CephSnapshots
    media: Media
    logs: GuestLogs
    event_files: EventFiles
    links: Links
    era: Callable[[], Era]
    # Without defaults: a quiet "nobody", or "nothing against it", where a hook was forgotten would be a guest's end.
    guard: GuardClient | None
    takeover_wait_s: float
    holders: Callable[[InstanceId, Collection[str]], Iterable[InstanceId]]
    namesakes: Callable[[InstanceId, Collection[str]], Iterable[InstanceId]]
    recorded_for: Owners
    mismatch: str | None
    dissent: Callable[[], str | None]
    objection: Callable[[Incarnation], str | None]
    draining: Callable[[], bool]
    life: Life
    launch: Launch
    moving: Moving | None
