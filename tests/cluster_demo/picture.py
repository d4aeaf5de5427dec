"""What the keys in etcd say of hosts and guests, as the view shows it and as the scenes' promises are checked. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmsupervisor.domain.admission import OVERHEAD_MIB
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.host_wish import HostProgress
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.lock import NOT_YET_RUN, Lock, LockState
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.status import Phase, Status

LAYOUT = Layout()


@dataclass(frozen=True, slots=True)
class Said:
    """What a guest says of itself on its console.

    Attributes:
        boot: which one this is, counted on its disk.
        up_s: seconds since then.
        written: how often it has written to its disk, in all boots.
    """

    boot: int
    up_s: int
    written: int

    def __str__(self) -> str:
        return f"boot {self.boot}, up {self.up_s} s, wrote {self.written}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestFacts:
    """One guest.

    Attributes:
        name: its id.
        wanted: its key `host`.
        lock: its lock; None without one.
        status: what its host says of it; None before that.
        placement: where it runs instead of on `wanted`; None without one.
    """

    name: str
    wanted: str
    lock: Lock | None = None
    status: Status | None = None
    placement: Placement | None = None

    def runs_on(self, host: str) -> bool:
        """Whether its guest runs there, by lock and status."""
        lock, status = self.lock, self.status
        return (
            (lock is not None and lock.host == host and lock.state is LockState.RUNNING)
            and (status is not None and status.host == host and status.up)
            and status.phase is Phase.RUNNING
        )

    def taken_from(self, host: str) -> bool:
        """Whether another host has its lock by now."""
        return self.lock is not None and self.lock.host != host

    @property
    def may_run(self) -> bool:
        """Whether all that has to be shut out is, and its QEMU is on record."""
        return self.lock is not None and self.lock.state not in NOT_YET_RUN

    @property
    def came_live_from(self) -> str | None:
        """The host that it came from in a live move, with its QEMU that runs now; None for one that booted here."""
        move = None if self.status is None else self.status.move
        return None if move is None or move.stopped_ms is None else move.source

    @property
    def stopped_ms(self) -> int | None:
        """How long it stood still in that move, by its status."""
        move = None if self.status is None else self.status.move
        return None if move is None else move.stopped_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """One host.

    Attributes:
        name: of the host.
        session: what it says of itself; None while it has none.
        drain: the value of its key `drain`, or empty.
        progress: how far it has come with that; None where there is nothing to tell.
        guests: those whose lock it holds.
        ram_mib: the memory of these, and what their QEMUs need besides.
    """

    name: str
    session: HostSession | None = None
    drain: str = ""
    progress: HostProgress | None = None
    guests: tuple[GuestFacts, ...] = ()
    ram_mib: int = 0

    @property
    def free_mib(self) -> int | None:
        """Room for more guests; None while that is not known."""
        return None if self.session is None or not self.session.guests_mib else self.session.guests_mib - self.ram_mib


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The cluster at one instant."""

    hosts: Mapping[str, HostFacts] = field(default_factory=dict)
    guests: Mapping[str, GuestFacts] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Mapping[str, bytes], hosts: tuple[str, ...], guests: tuple[str, ...]) -> Picture:
        """Read the keys."""

        def text(key: str) -> str:
            return keys.get(key, b"").decode(errors="replace").strip()

        found = {name: _guest(name, keys) for name in guests}

        def host(name: str) -> HostFacts:
            session, told = keys.get(f"{LAYOUT.hosts_prefix}{name}"), keys.get(LAYOUT.drain_fact_key(name))
            here = tuple(one for one in found.values() if one.lock is not None and one.lock.host == name)
            rams = (text(LAYOUT.wish_key(InstanceId(one.name), "ram")) for one in here)
            return HostFacts(
                name=name,
                session=None if session is None else HostSession.from_json(session),
                drain=text(LAYOUT.drain_key(name)),
                progress=None if told is None else HostProgress.from_json(told),
                guests=here,
                ram_mib=sum(int(ram) + OVERHEAD_MIB for ram in rams if ram.isdecimal()),
            )

        return cls(hosts={name: host(name) for name in hosts}, guests=found)


def _guest(name: str, keys: Mapping[str, bytes]) -> GuestFacts:
    one = InstanceId(name)
    lock, status = keys.get(LAYOUT.lock_key(one)), keys.get(LAYOUT.status_key(one))
    placed = keys.get(LAYOUT.placement_key(one))
    return GuestFacts(
        name=name,
        wanted=keys.get(LAYOUT.wish_key(one, "host"), b"").decode(errors="replace").strip(),
        lock=None if lock is None else Lock.from_json(lock),
        status=None if status is None else Status.from_json(status),
        placement=None if placed is None else Placement.from_json(placed),
    )
