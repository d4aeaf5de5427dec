"""What is so at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field

from kvmsupervisor.domain.counters import DiskCounts, Traffic
from kvmsupervisor.domain.durations import Durations
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.run_state import RunState
from kvmsupervisor.domain.status import Phase, Transfer


@frozen(kw_only=True)
class InstanceSample:
    """One instance at the moment of a scrape.

    Attributes:
        id: the instance.
        phase: the phase that it is in.
        run_state: of its guest; None without a process.
        epoch: of its lock; 0 before the first.
        pending: how many keys take effect at the next restart.
        invalid: whether any of its keys has a problem, also while it runs on as it was.
        unguarded: whether the guard should watch its QEMU and does not.
        placed_for: the host that it runs here instead of; None when its keys name this host.
        host_absent: whether its keys name a host that has no session, so that it stays here.
        cpu_s: CPU seconds that its QEMU has used; None without a process.
        memory_bytes: resident memory of its QEMU; None without a process.
        threads: of its QEMU; None without a process.
        files: that its QEMU has open; None without a process, and where the kernel does not tell.
        disks: what QEMU counts of each disk.
        nics: what the host counts of each NIC, by its name.
        plugged: whether each NIC is plugged into a bridge, by its name.
        guest_memory: bytes by kind, as the guest's balloon driver reports them.
        accelerator: of its QEMU; None without a process.
        machine: the versioned machine type; None when it is not known.
        since: when its phase began, seconds since 1970; None when that is not known.
        next_start: when it is started again after an end, seconds since 1970; None when it does not wait for that.
        pinned: whether only this host may start it, because its disks cannot be fenced.
        vcpus: of its guest; None without a process.
        ram_bytes: memory of its guest; None without a process.
        waited_s: seconds that its vCPUs were ready to run and had no processor; None where the kernel does not tell.
        move: its live move from here, while one is under way.
    """

    id: InstanceId
    phase: Phase
    run_state: RunState | None = None
    epoch: int = 0
    pending: int = 0
    invalid: bool = False
    unguarded: bool = False
    placed_for: str | None = None
    host_absent: bool = False
    cpu_s: float | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    files: int | None = None
    disks: Sequence[DiskCounts] = ()
    nics: Sequence[tuple[str, Traffic]] = ()
    plugged: Sequence[tuple[str, bool]] = ()
    guest_memory: Sequence[tuple[str, int]] = ()
    accelerator: str | None = None
    machine: str | None = None
    since: float | None = None
    next_start: float | None = None
    pinned: bool = False
    vcpus: int | None = None
    ram_bytes: int | None = None
    waited_s: float | None = None
    move: Transfer | None = None


@frozen(kw_only=True)
class HostSample:
    """What the host has.

    Attributes:
        cpus: its processors.
        memory: bytes by kind: `total`, `available` as its kernel says, `for_guests`, and `promised` to guests.
    """

    cpus: int
    memory: Sequence[tuple[str, int]] = ()


@frozen(kw_only=True)
class Snapshot:
    """The whole supervisor at the moment of a scrape.

    Attributes:
        etcd_up: whether etcd's quorum answered the last request.
        session_remaining_s: seconds that the session lasts without another renewal; 0 without a session.
        watch_revision: the etcd revision up to which the wishes are known; 0 before the first list.
        qemu_privileged: whether QEMU runs as root.
        walls: what keeps guests apart, and whether it does on this host.
        guests_survive: whether guests outlive the supervisor's container.
        history_changes: how often etcd had another history than before.
        orphans: instances of the whole cluster that no host with a session looks after; None while that is not known.
        drain: machines of a host that drains by state: left, moving, moved, refused; empty in service.
        drained: whether it drains and none is left.
        removals_held: instances whose removal waits for an operator's confirmation.
        identity_mismatch: whether nothing is started or stopped, because the settings differ from those under which the
            QEMUs of this host were started.
        guard_memory_locked: False when there is a guard whose memory could not be locked.
        host: what the host has; None where that is not known.
        draining: whether the host drains.
        sessions_lost: how often its session was lost.
        ceph_up: whether Ceph answered this host's last question; None before the first.
        fences_pending: addresses that are still to be shut out before machines of this host may start.
        etcd: how long requests to etcd took.
        instances: the instances that this host is responsible for, the invalid ones too.
    """

    etcd_up: bool
    session_remaining_s: float
    watch_revision: int
    qemu_privileged: bool = False
    walls: Sequence[tuple[str, bool]] = ()
    guests_survive: bool = True
    orphans: int | None = None
    drain: Sequence[tuple[str, int]] = ()
    drained: bool = False
    removals_held: int = 0
    identity_mismatch: bool = False
    history_changes: int = 0
    guard_memory_locked: bool = True
    host: HostSample | None = None
    draining: bool = False
    sessions_lost: int = 0
    ceph_up: bool | None = None
    fences_pending: int = 0
    etcd: Durations = field(default_factory=Durations)
    instances: Sequence[InstanceSample] = ()
