"""What all instances of a host share, and the interface to what fences storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.adapters.metrics import Metrics
from kvmsupervisor.adapters.users import QemuUser
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.argv import HostSide
from kvmsupervisor.domain.exits import Exit, WaitStatus
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.provisioning import Provisioner
from kvmsupervisor.publisher import Publisher
from kvmsupervisor.session import Session


class NotFenced(Exception):
    """An address could not be proven fenced: no start. The message says why, and what would help."""


class Fencing(Protocol):
    """What storage offers to law 3 and 4: which clients a QEMU has, and to shut some out for good."""

    async def clients(self, record: Incarnation) -> tuple[str, ...]:
        """The addresses of the (paused) QEMU's own storage clients."""
        ...

    async def fence(self, addresses: tuple[str, ...]) -> None:
        """Shut out each address, and verify it.

        Raises:
            NotFenced: one of them could not be.
        """
        ...


class Diskless:
    """The storage of machines without a fenceable disk: no clients, nothing to fence."""

    async def clients(self, record: Incarnation) -> tuple[str, ...]:
        """None."""
        return ()

    async def fence(self, addresses: tuple[str, ...]) -> None:
        """Nothing to do without addresses; with some it cannot be done here."""
        if addresses:
            raise NotFenced(f"this release cannot fence the storage clients {', '.join(addresses)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all instances of a host share.

    Attributes:
        me: this host.
        boot_id: of this boot.
        layout: of the keys.
        store: etcd.
        session: of this host.
        publisher: of statuses.
        admission: who may start, and how many MiB are promised to whom.
        provisioner: of what QEMUs need of this host.
        user: that QEMU runs as; None for our own.
        clock: the machine's.
        jitter: random numbers, 0 ≤ x < 1.
        metrics: where starts and ends are counted.
        fencing: of the storage.
        host_has_session: whether a host has a session; None when not known.
        host_side: what the host chooses for every QEMU.
        shutdown_timeout_s: default between power button and force.
        start_timeout_s: within which a new QEMU must answer.
        settle_s: how long changed keys must be quiet before a new guest runs.
        draining: whether this host stops all its guests (`stop --all --local`).
        leaving: why an instance is to be stopped and let go of; None when it is not.
        ended: told how a QEMU ended that was not merely discarded before its guest ran.
    """

    me: HostName
    boot_id: str
    layout: Layout
    store: Store
    session: Session
    publisher: Publisher
    admission: Admission
    provisioner: Provisioner
    user: QemuUser | None
    clock: Clock
    jitter: Callable[[], float]
    metrics: Metrics
    fencing: Fencing
    host_has_session: Callable[[HostName], bool | None]
    host_side: HostSide
    shutdown_timeout_s: float
    start_timeout_s: float
    settle_s: float
    draining: Callable[[], bool] = lambda: False
    leaving: Callable[[], str | None] = lambda: None
    ended: Callable[[Exit, WaitStatus], None] = lambda end, status: None
