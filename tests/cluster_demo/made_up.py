"""A made-up cluster in virtual time: keys as supervisors write them, for the tests of scenes and view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.status import Phase, Status, Transfer
from tests.cluster_demo.picture import LAYOUT, Picture, Said
from tests.cluster_demo.pings import EVERY_S, Pings
from tests.cluster_demo.terms import DB, GUESTS, HOSTS, WEB

TAKE_S = 3.0
"""How long anything takes here."""


@dataclass(slots=True)
class Faults:
    """What goes wrong.

    Attributes:
        cold: guests are stopped for a move.
        restarted: guests boot during a live move.
        unfenced: nobody is shut out.
        never_taken: nobody takes over from a host without a session.
        fresh_disk: a guest that is started elsewhere finds nothing on its disk.
        ended: what is said to have ended.
        refused: the command, by its first word, that ends with 1.
    """

    cold: bool = False
    restarted: bool = False
    unfenced: bool = False
    never_taken: bool = False
    fresh_disk: bool = False
    ended: str | None = None
    refused: str = ""


@dataclass(slots=True)
class MadeUp:
    """A `Stage`; `keys` is what etcd would have."""

    faults: Faults = field(default_factory=Faults)
    keys: dict[str, bytes] = field(default_factory=dict)
    pings: Pings = field(default_factory=Pings)
    done: list[str] = field(default_factory=list)
    _now: float = 100.0
    _pinged: bool = False
    _seq: int = 0
    _due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    _boots: dict[str, int] = field(default_factory=dict)
    _blocked: set[str] = field(default_factory=set)

    # --- time and sight ---------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds
        due = [act for at, act in self._due if at <= self._now]
        self._due = [(at, act) for at, act in self._due if at > self._now]
        for act in due:
            act()
        while self._pinged and self._seq * EVERY_S < self._now - 100.0:
            self._seq += 1
            web = self.look().guests[WEB.name]
            alive = web.lock is not None and web.runs_on(web.lock.host) and self._session(web.lock.host)
            line = f"64 bytes from {WEB.address}: icmp_seq=" if alive else "no answer yet for icmp_seq="
            self.pings.hear(f"{line}{self._seq}", self._now)

    def look(self) -> Picture:
        return Picture.of(self.keys, HOSTS, tuple(plan.name for plan in GUESTS))

    def says(self, guest: str, host: str) -> Said | None:
        if not self.look().guests[guest].runs_on(host) or not self._session(host):
            return None
        return Said(self._boots[guest], 7, round(self._now * 10))

    def trouble(self) -> str | None:
        return self.faults.ended

    def blocklist(self) -> set[str]:
        return self._blocked

    # --- what is done -----------------------------------------------------------------------------------------

    def prepare_guest(self) -> None:
        self.done.append("guest")

    def start_etcd(self) -> None:
        self.done.append("etcd")

    def start_ceph(self) -> None:
        self.done.append("ceph")

    def start_host(self, name: str) -> None:
        self.done.append(f"host {name}")
        self._after(lambda: self._begin_session(name))

    def write_guests(self, file: str) -> None:
        self.done.append(file)

    def begin_pings(self) -> None:
        self._pinged = True
        self._seq = round((self._now - 100.0) / EVERY_S)

    def pull_plug(self, host: str) -> None:
        left = [plan.name for plan in GUESTS if self._host(plan.name) == host]
        self._after(lambda: self._end_session(host))
        # Its guests answer no more, whatever the keys say.
        self._pinged = False
        for name in left:
            if not self.faults.never_taken:
                self._after(lambda name=name: self._take_over(name, host), 3 * TAKE_S)  # type: ignore[misc]

    def power_on(self, host: str) -> None:
        self._after(lambda: self._begin_session(host))

    def command(self, words: Sequence[str], on_line: Callable[[str], None]) -> int:
        on_line(f"{words[0]}: done")
        if words[0] == self.faults.refused:
            return 1
        match words[0], words[1]:
            case "apply", _:
                for plan in GUESTS:
                    self._write(plan.name, "host", plan.host)
                    self._write(plan.name, "ram", "96")
                    self._after(lambda plan=plan: self._run(plan.name, plan.host, None))  # type: ignore[misc]
            case "move", name:
                self._write(name, "host", words[2])
                self._go(name, words[2])
            case "drain", host:
                self.keys[LAYOUT.drain_key(host)] = b"live"
                for name, to in ((WEB.name, "gamma"), (DB.name, "alpha")):
                    self._place(name, to)
                    self._go(name, to)
            case "undrain", host:
                self.keys.pop(LAYOUT.drain_key(host), None)
                for plan in GUESTS:
                    self._after(lambda name=plan.name: self._return(name, host))  # type: ignore[misc]
            case other:
                raise AssertionError(other)
        return 0

    # --- what happens -----------------------------------------------------------------------------------------

    def _after(self, act: Callable[[], None], seconds: float = TAKE_S) -> None:
        self._due.append((self._now + seconds, act))

    def _session(self, host: str) -> bool:
        return LAYOUT.session_key(HostName(host)) in self.keys

    def _begin_session(self, name: str) -> None:
        made = HostSession(host=name, version="1", url="", boot_id="b", guests_mib=1024)
        self.keys[LAYOUT.session_key(HostName(name))] = made.to_json()

    def _end_session(self, name: str) -> None:
        del self.keys[LAYOUT.session_key(HostName(name))]

    def _write(self, name: str, key: str, value: str) -> None:
        self.keys[LAYOUT.wish_key(InstanceId(name), key)] = value.encode()

    def _host(self, name: str) -> str:
        lock = self.look().guests[name].lock
        assert lock is not None
        return lock.host

    def _place(self, name: str, host: str) -> None:
        placed = Placement(host=HostName(host), why="drain", since="", of=1)
        self.keys[LAYOUT.placement_key(InstanceId(name))] = placed.to_json()

    def _go(self, name: str, to: str) -> None:
        """A live move, or what goes wrong with it."""
        source = self._host(name)
        if self.faults.restarted or self.faults.cold:
            self._boots[name] += 1
        self._run(name, to, None if self.faults.cold else source)

    def _return(self, name: str, host: str) -> None:
        self.keys.pop(LAYOUT.placement_key(InstanceId(name)), None)
        self._go(name, host)

    def _run(self, name: str, host: str, source: str | None) -> None:
        self._boots.setdefault(name, 1)
        one, before = InstanceId(name), self.look().guests[name].lock
        epoch = 1 if before is None else before.epoch + 1
        lock = Lock(
            host=HostName(host),
            boot_id="b",
            epoch=epoch,
            state=LockState.RUNNING,
            incarnation=f"{name}{epoch}",
            pid=7,
            starttime=7,
            clients=(f"10.97.0.1:0/{epoch}{name}",),
        )
        self.keys[LAYOUT.lock_key(one)] = lock.to_json()
        move = None if source is None else Transfer(source=source, target=host, stopped_ms=31)
        status = Status(
            id=name, host=host, phase=Phase.RUNNING, reason="runs", since="", pid=7, run_state="running", move=move
        )
        self.keys[LAYOUT.status_key(one)] = status.to_json()

    def _take_over(self, name: str, host: str) -> None:
        guest = self.look().guests[name]
        assert guest.lock is not None
        to = "gamma" if name == WEB.name else "alpha"
        if not self.faults.unfenced:
            self._blocked.update(guest.lock.clients)
        fencing = replace(guest.lock, host=HostName(to), state=LockState.FENCING)
        self.keys[LAYOUT.lock_key(InstanceId(name))] = fencing.to_json()
        self._place(name, to)

        def start() -> None:
            self._boots[name] = 1 if self.faults.fresh_disk else self._boots[name] + 1
            self._run(name, to, None)
            self._pinged = True

        self._after(start)
