"""The outer world of one supervisor, made of fakes, and the random numbers that everybody draws."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Never

import pytest

from kvmsupervisor.adapters import accelerator, cgroup
from kvmsupervisor.adapters.apart import NO_WALLS
from kvmsupervisor.adapters.ceph import Ceph
from kvmsupervisor.adapters.cgroup import NoCgroups
from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.adapters.event_files import EventFiles
from kvmsupervisor.adapters.links import Links
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.adapters.users import QemuUsers
from kvmsupervisor.cluster.fencing import CephFencing
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.argv import HostSide
from kvmsupervisor.domain.flags import ANY_FLAGS
from kvmsupervisor.instance.assembly import REAL, Outside
from kvmsupervisor.machine.guest_logs import GuestLogs, MachineLogs
from kvmsupervisor.machine.handover import HostFiles
from kvmsupervisor.machine.host import HostFacts, ceph_access
from kvmsupervisor.machine.images import Disks
from kvmsupervisor.machine.system import System
from tests.support.host import KnownTypes


class QuietLinks(Links):
    """No network interfaces, and no news of any."""

    def __init__(self, on_change: Callable[[Set[int]], None]) -> None:
        super().__init__(on_change)
        self.all = {}

    async def run(self) -> Never:
        while True:
            await asyncio.Event().wait()


class QuietMachineLogs(MachineLogs):
    """Logs of a machine that says nothing."""

    def begin(self) -> tuple[int, int]:
        null = _null()
        return null, null

    def adopt(self, argv: Sequence[str], *, pid: int, pidfd: int) -> None:
        pass

    def look(self) -> int:
        return 0

    def tail(self, offset: int) -> list[str]:
        return []

    def close(self) -> None:
        pass


class QuietLogs(GuestLogs):
    """Logs without a thread, without memory of the kernel's, and without a file."""

    def of(self, directory: InstanceDir) -> MachineLogs:
        return QuietMachineLogs(directory, logs=self)

    async def run(self) -> None:
        await asyncio.Event().wait()


MEMORY_MIB = 16384
"""Of a host, for its guests."""


def _host_facts(settings: Settings) -> HostFacts:
    """What a host offers, whatever this machine does: so a seed is the same history everywhere."""
    choice = accelerator.choose("tcg", trouble=None)
    return HostFacts(
        accelerator=choice,
        users=QemuUsers(),
        walls=NO_WALLS,
        host_side=HostSide(qemu=settings.qemu, accel=choice.name, flags=settings.extra_flags or ANY_FLAGS),
        files=HostFiles(state_dir=settings.state_dir, bridge_owner=settings.layout.session_key(settings.hostname)),
        memory_mib=MEMORY_MIB,
        ceph_access=ceph_access(settings),
    )


async def _no_cgroups(wanted: cgroup.Wanted, *, run_dir: Path) -> cgroup.Chosen:
    """Guests outlive their supervisor, whatever this process lives in."""
    return cgroup.Chosen(cgroups=NoCgroups(survives_container=True))


_opened: list[int] = []


def _null() -> int:
    """A descriptor for what nobody reads: one for all histories of this process."""
    if not _opened:
        _opened.append(os.open(os.devnull, os.O_WRONLY))
    return _opened[0]


def outside(
    *,
    clock: Clock,
    system: System,
    jitter: Callable[[], float],
    boot_id: str,
    machine_id: str,
    connect: Callable[[], Store],
    ceph: Callable[[], Ceph],
) -> Outside:
    """What one supervisor is given instead of the world."""
    return replace(
        REAL,
        clock=clock,
        jitter=jitter,
        system=system,
        boot_id=lambda: boot_id,
        machine_id=lambda: machine_id,
        connect=lambda config: connect(),
        gather_host_facts=_host_facts,
        cgroups=_no_cgroups,
        links=QuietLinks,
        logs=lambda clock, settings: QuietLogs(clock=clock),
        machine_types=lambda qemu: KnownTypes(),
        qemu_version=lambda qemu: "7.2.0",
        event_files=lambda settings: EventFiles(None),
        packet_rule=None,
        disks=lambda access, allow_unfenced: Disks(ceph(), allow_unfenced=allow_unfenced),
        fencing=lambda access, allow_unfenced: CephFencing(ceph(), allow_unfenced=allow_unfenced),
    )


@contextmanager
def drawn(chance: Random) -> Iterator[None]:
    """Have names of incarnations, and all other random numbers of this process, come from the seed."""
    before = random.getstate()
    with pytest.MonkeyPatch.context() as patch:
        # uuid4 asks the kernel for them.
        patch.setattr(os, "urandom", chance.randbytes)
        patch.setattr(secrets, "token_bytes", chance.randbytes)
        random.seed(chance.random())
        try:
            yield
        finally:
            random.setstate(before)
