"""The one place where the parts are put together that every holder of locks needs: the supervisor, and single mode.

Three steps, each of which makes whole objects: what the outer world is (`Outside`), what a holder is in etcd
(`Membership`), what its instances share (`assemble_context`). What differs between supervisor and single mode is an
argument of the step. The hooks on which a guest's life hangs have no default: who puts the parts together says what
each is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import field, replace
from pathlib import Path
from typing import Protocol

from kvmsupervisor import __version__
from kvmsupervisor.adapters import cgroup
from kvmsupervisor.adapters.ceph import Ceph, CephAccess, CephImages, CephSnapshots
from kvmsupervisor.adapters.cgroup import CgroupManager
from kvmsupervisor.adapters.clock import Clock, boot_id, machine_id
from kvmsupervisor.adapters.etcd import Etcd, EtcdConfig, Store
from kvmsupervisor.adapters.event_files import EventFiles, events_folder
from kvmsupervisor.adapters.links import Changed, Links
from kvmsupervisor.adapters.machines import MachineTypes, qemu_version
from kvmsupervisor.adapters.metrics import Metrics
from kvmsupervisor.adapters.packet_rule import PacketRule
from kvmsupervisor.cluster.fencing import CephFencing, Fencing
from kvmsupervisor.cluster.history import History
from kvmsupervisor.cluster.hosts import Neighbours
from kvmsupervisor.cluster.image_keys import ImageKeys, Imports
from kvmsupervisor.cluster.owners import Owners
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.cluster.status_writer import StatusWriter
from kvmsupervisor.config.settings import DISK_DIR, Settings
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.guard.client import GuardClient
from kvmsupervisor.instance.context import InstanceContext, Life, Moving
from kvmsupervisor.machine import system
from kvmsupervisor.machine.cdrom import Media
from kvmsupervisor.machine.contents import Contents
from kvmsupervisor.machine.guest_logs import GuestLogs
from kvmsupervisor.machine.host import HostFacts, gather_host_facts
from kvmsupervisor.machine.images import Disks
from kvmsupervisor.machine.jobs import Jobs
from kvmsupervisor.machine.library import library_of
from kvmsupervisor.machine.local_disks import FileAccess, LocalDisks
from kvmsupervisor.machine.provisioning import Provisioner
from kvmsupervisor.machine.spawn import Launch
from kvmsupervisor.machine.system import System


class ChooseCgroups(Protocol):
    """Chooses what QEMUs live in, as `cgroup.choose` does."""

    async def __call__(self, wanted: cgroup.Wanted, *, run_dir: Path) -> cgroup.Chosen:
        """Choose; see there."""
        ...


@frozen(kw_only=True)
class Outside:
    """The outer world, as makers of what touches it. `REAL` is the world; tests and simulators give another one.

    Attributes:
        clock: the machine's.
        jitter: random numbers, 0 ≤ x < 1.
        system: processes, QMP, taps and bridges of this host.
        boot_id: the kernel's name for its present boot.
        machine_id: what names this machine across boots.
        connect: etcd.
        gather_host_facts: finds out what the host brings; see `machine.host`.
        cgroups: chooses the cgroup manager.
        links: network interfaces.
        logs: what guests write, with this clock and these settings.
        machine_types: those that a QEMU knows.
        qemu_version: the version of one; empty where that is not known.
        disks: images in Ceph; whether some may be written to without a lock of theirs (`KVM_ALLOW_UNFENCED`).
        fencing: of the storage; likewise.
        files: of this host that are disks.
        event_files: of the instances' events.
        packet_rule: keeps users, first to last, from TCP ports; None where nothing may be done to the host's filter.
    """

    clock: Clock
    jitter: Callable[[], float]
    system: System
    boot_id: Callable[[], str]
    machine_id: Callable[[], str]
    connect: Callable[[EtcdConfig], Store]
    gather_host_facts: Callable[[Settings], HostFacts]
    cgroups: ChooseCgroups
    links: Callable[[Changed], Links]
    logs: Callable[[Clock, Settings], GuestLogs]
    machine_types: Callable[[str], MachineTypes]
    qemu_version: Callable[[str], str]
    disks: Callable[[CephAccess, bool], Disks]
    fencing: Callable[[CephAccess, bool], Fencing]
    files: FileAccess = field(default_factory=FileAccess)
    event_files: Callable[[Settings], EventFiles] = lambda settings: EventFiles(events_folder(settings.state_dir))
    packet_rule: Callable[[int, int, Iterable[int]], PacketRule] | None = None


REAL = Outside(
    clock=Clock(),
    jitter=random.random,
    system=system.REAL,
    boot_id=boot_id,
    machine_id=machine_id,
    connect=Etcd,
    gather_host_facts=gather_host_facts,
    cgroups=cgroup.choose,
    links=Links,
    logs=lambda clock, settings: GuestLogs(clock=clock, max_bytes=settings.log_max_bytes, keep=settings.log_keep),
    machine_types=MachineTypes,
    qemu_version=qemu_version,
    disks=lambda access, allow_unfenced: Disks(Ceph(access), allow_unfenced=allow_unfenced),
    fencing=lambda access, allow_unfenced: CephFencing(Ceph(access), allow_unfenced=allow_unfenced),
    packet_rule=PacketRule,
)


@frozen(kw_only=True)
class Holder:
    """Who holds locks, and where that is kept.

    Attributes:
        name: what locks and statuses call it; a host, or a container in single mode.
        boot_id: of this boot.
        machine: this one, as `HostSession.machine`.
        layout: of the keys.
        run_dir: the folder that is this holder's own; it exists once the parts are put together.
    """

    name: HostName
    boot_id: str
    machine: str
    layout: Layout
    run_dir: Path

    def introduction(self, outside: Outside) -> HostSession:
        """What every holder says of itself in its session."""
        return HostSession(
            host=self.name,
            version=__version__,
            url="",
            boot_id=self.boot_id,
            machine=self.machine,
            started=outside.clock.wall(),
        )


class Membership:
    """What a holder is in etcd: its session, the others', the history, its statuses. Nothing of it does anything yet.

    Args:
        holder: who it is.
        settings: of this host.
        outside: the world.
        store: etcd.
        says: what the session is to say; its `history` is filled in here.
        yields: whether to go on waiting where another one lives under this name; see `Session`.
        gather_s: how long the first of several statuses waits for the others; see `StatusWriter`.
        spread_s: the pause between two writes of statuses.
        on_hosts: called when a host came or went, or has spoken.

    Attributes:
        holder: who it is.
        store: etcd.
        history: that etcd has.
        session: of the holder.
        neighbours: the sessions of all.
        status_writer: writes the status keys.
    """

    def __init__(
        self,
        holder: Holder,
        *,
        settings: Settings,
        outside: Outside,
        store: Store,
        says: HostSession,
        yields: bool,
        gather_s: float,
        spread_s: float,
        on_hosts: Callable[[], None],
    ) -> None:
        layout, clock, rand = holder.layout, outside.clock, outside.jitter
        self.holder = holder
        self.store = store
        self.history = History(
            store=store,
            clock=clock,
            layout=layout,
            me=holder.name,
            run_dir=holder.run_dir,
            patience_s=settings.takeover_wait_s,
        )
        self.session = Session(
            store=store,
            clock=clock,
            layout=layout,
            value=replace(says, history=self.history.spoken_name),
            run_dir=holder.run_dir,
            ttl_s=settings.session_ttl_s,
            yields=yields,
            rand=rand,
        )
        self.neighbours = Neighbours(
            store=store,
            clock=clock,
            layout=layout,
            me=holder.name,
            history=self.history,
            on_change=on_hosts,
            rand=rand,
        )
        self.status_writer = StatusWriter(
            store=store,
            clock=clock,
            layout=layout,
            host=holder.name,
            session=self.session,
            gather_s=gather_s,
            spread_s=spread_s,
            rand=rand,
        )

    async def speak(self, history: str) -> bool:
        """Have the session say that this holder has spoken in this history; False when that did not come about.

        Raises:
            EtcdError: nobody knows whether it says so.
        """
        return await self.session.restate(replace(self.session.value, history=history))


def assemble_context(
    member: Membership,
    *,
    settings: Settings,
    outside: Outside,
    host_facts: HostFacts,
    cgroups: CgroupManager,
    admission: Admission,
    links: Links,
    metrics: Metrics,
    bridge_owner: str,
    settle_s: float,
    guard: GuardClient | None,
    recorded_for: Owners,
    holders: Callable[[InstanceId, Collection[str]], Iterable[InstanceId]],
    namesakes: Callable[[InstanceId, Collection[str]], Iterable[InstanceId]],
    mismatch: str | None,
    dissent: Callable[[], str | None],
    objection: Callable[[Incarnation], str | None],
    draining: Callable[[], bool],
    host_drains: Callable[[HostName], bool],
    life: Life,
    launch: Launch,
    moving: Moving | None = None,
) -> InstanceContext:
    """What all instances of one holder share. The arguments are what differs between holders; see `InstanceContext`.

    Args:
        member: the holder in etcd.
        settings: of this host.
        outside: the world.
        host_facts: what the host brings.
        cgroups: makes the cgroups of QEMUs.
        admission: who may start.
        links: network interfaces of this host.
        metrics: where starts and ends are counted.
        bridge_owner: as whom lines of bridge.conf are written.
        settle_s: how long changed keys must be quiet before a new guest runs.
        guard: of machines that may write to what cannot be fenced; None when there shall be none.
        recorded_for: the other instances whose locks have storage clients on record.
        holders: the other instances that name an image, and have a lock.
        namesakes: the other instances that name an image.
        mismatch: why nothing is started or stopped here.
        dissent: why no lock is taken where none is.
        objection: why a QEMU on record is not ours to touch.
        draining: whether this host stops all its guests.
        host_drains: whether a host takes no guest in.
        life: what the instances are part of.
        launch: how QEMUs are started.
        moving: live moves; None where there are none, as in single mode.
    """
    holder = member.holder
    disks = outside.disks(host_facts.ceph_access, settings.allow_unfenced)
    local_disks = LocalDisks(
        settings.disk_dir,
        is_own=settings.disk_dir == DISK_DIR,
        as_root=host_facts.privileged,
        access=outside.files,
    )
    contents = contents_of(member, settings=settings, outside=outside, host_facts=host_facts)
    media = Media(local_disks, contents)
    return InstanceContext(
        me=holder.name,
        boot_id=holder.boot_id,
        machine=holder.machine,
        layout=holder.layout,
        store=member.store,
        session=member.session,
        status_writer=member.status_writer,
        admission=admission,
        system=outside.system,
        provisioner=Provisioner(
            system=outside.system,
            host=host_facts.host_side,
            files=replace(host_facts.files, bridge_owner=bridge_owner),
            users=host_facts.users,
            walls=host_facts.walls,
            types=outside.machine_types(settings.qemu),
            cgroups=cgroups,
            disks=disks,
            local_disks=local_disks,
            contents=contents,
            media=media,
        ),
        disks=disks,
        local_disks=local_disks,
        contents=contents,
        snapshots=CephSnapshots(Ceph(host_facts.ceph_access)),
        media=media,
        logs=outside.logs(outside.clock, settings),
        event_files=outside.event_files(settings),
        links=links,
        clock=outside.clock,
        jitter=outside.jitter,
        metrics=metrics,
        fencing=outside.fencing(host_facts.ceph_access, settings.allow_unfenced),
        era=lambda: member.history.present,
        host_has_session=member.neighbours.has_session,
        host_gone_since=member.neighbours.gone_since,
        sessions=member.neighbours.names,
        host_drains=host_drains,
        host_side=host_facts.host_side,
        shutdown_timeout_s=settings.shutdown_timeout_s,
        start_timeout_s=settings.start_timeout_s,
        takeover_wait_s=settings.takeover_wait_s,
        settle_s=settle_s,
        guard=guard,
        recorded_for=recorded_for,
        holders=holders,
        namesakes=namesakes,
        mismatch=mismatch,
        dissent=dissent,
        objection=objection,
        draining=draining,
        life=life,
        launch=launch,
        moving=moving,
    )


def contents_of(member: Membership, *, settings: Settings, outside: Outside, host_facts: HostFacts) -> Contents:
    """What new disks of one holder begin with."""
    layout, jobs = member.holder.layout, Jobs()
    keys = ImageKeys(member.store, layout)
    library = library_of(
        settings, user=host_facts.users.of_tools, jobs=jobs, kept=keys.sums, threads=outside.files.threads
    )
    return Contents(
        library=library,
        jobs=jobs,
        keys=keys,
        imports=Imports(member.store, layout, member.holder.name, outside.clock),
        ceph=CephImages(Ceph(host_facts.ceph_access)),
        folder=settings.disk_dir,
        allow_unfenced=settings.allow_unfenced,
        threads=outside.files.threads,
    )
