"""The outer world of whole supervisors in virtual time: what `Supervisor` and single mode are given instead of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.adapters.event_files import EventFiles
from kvmsupervisor.cluster.fencing import Fencing
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.instance.assembly import REAL, Outside
from kvmsupervisor.machine.host import HostFacts, gather_host_facts
from kvmsupervisor.machine.images import Disks
from tests.fakes.qemu import FakeQemus
from tests.support.host import KnownTypes


def outside(
    qemus: FakeQemus,
    connect: Callable[[], Store],
    *,
    memory_mib: int | None = None,
    fencing: Fencing | None = None,
    disks: Disks | None = None,
    machine: str | None = None,
) -> Outside:
    """The world with these processes, their clock and this etcd. No chance; no real QEMU is asked in real time.

    Args:
        qemus: the processes, and everybody's clock.
        connect: gives each supervisor its client of etcd.
        memory_mib: of the host, `KVM_MEMORY_RESERVE` included; None for what this machine has.
        fencing: of the storage; None for the real one, which has no Ceph here.
        disks: likewise.
        machine: names the machine, and its boot; None for this one.
    """
    real = REAL if machine is None else replace(REAL, boot_id=lambda: f"boot-{machine}", machine_id=lambda: machine)
    return replace(
        real,
        clock=qemus.clock,
        packet_rule=None,
        system=qemus.system,
        jitter=lambda: 0.5,
        connect=lambda config: connect(),
        gather_host_facts=gather_host_facts if memory_mib is None else partial(_with_memory, memory_mib),
        machine_types=lambda qemu: KnownTypes(),
        event_files=lambda settings: EventFiles(None),
        fencing=REAL.fencing if fencing is None else lambda access, allow_unfenced: fencing,
        disks=REAL.disks if disks is None else lambda access, allow_unfenced: disks,
    )


def _with_memory(memory_mib: int, settings: Settings) -> HostFacts:
    return replace(gather_host_facts(settings), memory_mib=memory_mib - settings.memory_reserve_mib)
