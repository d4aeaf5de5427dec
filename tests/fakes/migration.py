"""The migration of one QEMU's guest in virtual time, at either side: what QEMU does by itself, and when.

Who migrates has one end of a pair of sockets (`FakeSocket`), as a real one has; parts go over it instead of bytes:
memory, which the other side acknowledges, then the rest. What it has in common with a real QEMU is held by
`tests/machine/test_migration.py`, which runs on both: which events come, in which order; what runs again by itself.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmsupervisor.adapters.qmp import MonitorRefused
from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.run_state import INCOMING, PAUSED, POSTMIGRATE, RUNNING

if TYPE_CHECKING:
    from tests.fakes.qemu import FakeQemu

FINISHING = "finish-migrate"
"""The run state of a guest that is stopped for its migration."""

PARTS = 2
"""In how many parts memory is sent; each is acknowledged before the next."""

STEP_S = 0.01
"""How long a step takes that takes no time worth mentioning."""

COMMANDS = frozenset(
    {
        "migrate-set-capabilities",
        "migrate-set-parameters",
        "getfd",
        "migrate",
        "migrate-incoming",
        "migrate-continue",
        "migrate_cancel",
        "query-migrate",
    }
)


class FakeSocket:
    """One end of a pair of sockets.

    Attributes:
        heard: called with each part that comes.
        ended: called once, when nothing comes any more: the other end was closed, or this one was shut down.
    """

    def __init__(self, table: Descriptors) -> None:
        self.heard: Callable[[object], None] = lambda part: None
        self.ended: Callable[[], None] = lambda: None
        self.peer: FakeSocket
        self.is_over = False
        self._table = table
        self._numbers = 0

    def fileno(self) -> int:
        """A number of it, by which `Descriptors.take` has it."""
        return self._table.number(self)

    def dup(self) -> None:
        """One more has it."""
        self._numbers += 1

    def send(self, part: object) -> None:
        """Have the other end hear it; nobody does once either end is over."""
        if not self.is_over:
            self.peer.heard(part)

    def close(self) -> None:
        """One of those who have it has it no more; the last one ends it."""
        self._numbers -= 1
        if self._numbers < 0:
            self.shut_down()

    def shut_down(self) -> None:
        """End it, on both sides, whoever has it."""
        for end in (self, self.peer):
            if not end.is_over:
                end.is_over = True
                end.ended()


class Descriptors:
    """The open sockets of one host, by their numbers."""

    def __init__(self) -> None:
        self._numbers = itertools.count(3_000)
        self._open: dict[int, FakeSocket] = {}

    def pair(self) -> tuple[FakeSocket, FakeSocket]:
        """Two ends that are connected."""
        one, other = FakeSocket(self), FakeSocket(self)
        one.peer, other.peer = other, one
        return one, other

    def number(self, end: FakeSocket) -> int:
        number = next(self._numbers)
        self._open[number] = end
        return number

    def take(self, number: int) -> FakeSocket | None:
        """What goes with a message, and one more has then; None for a file of another kind."""
        end = self._open.pop(number, None)
        if end is not None:
            end.dup()
        return end


@dataclass(frozen=True, eq=False)
class Guest:
    """What goes with a guest from one QEMU to the next.

    Attributes:
        boot: the same in each QEMU that it comes to.
        counted_s: for how long it had run when it came, as it counts in its memory.
        pressed: whether its power button was, which it has not heeded.
        deaf: whether it ignores that.
        held: whether a person has paused it.
    """

    boot: object = field(default_factory=object)
    counted_s: float = 0.0
    pressed: bool = False
    deaf: bool = False
    held: bool = False


@dataclass(frozen=True)
class Memory:
    """A part of it."""


@dataclass(frozen=True)
class Acknowledged:
    """The other side has a part."""


@dataclass(frozen=True)
class Rest:
    """The last part: the guest as it stands.

    Attributes:
        guest: itself.
        run_state: that it had before it was stopped for that.
    """

    guest: Guest
    run_state: str


@dataclass(frozen=True)
class Loaded:
    """The target has all of it."""


class FakeMigration:
    """The migration of one QEMU.

    Args:
        qemu: which.

    Attributes:
        lasts_s: how long its memory takes; the way adds to it.
        status: as `query-migrate` tells it.
        is_inactive: its disks are another one's, or were: `cont` has to ask for them.
        has_all: at the target: whether all of the guest was loaded.
    """

    def __init__(self, qemu: FakeQemu) -> None:
        self.lasts_s = 0.2
        self.status = "none"
        self.is_inactive = self.has_all = False
        self.capabilities: set[str] = set()
        self._qemu = qemu
        self._names: dict[str, FakeSocket] = {}
        self._wire: FakeSocket | None = None
        self._before = RUNNING
        self._left = 0
        self._waiting: list[Callable[[], None]] = []
        self._inbox: deque[Callable[[], None]] = deque()
        self._receives = False
        self._stopped_at = 0.0
        self._downtime_s: float | None = None

    # --- time -------------------------------------------------------------------------------------------------

    def _after(self, seconds: float, step: Callable[[], None]) -> None:
        clock = self._qemu.host_clock
        clock.call_at(clock.now() + seconds, lambda: self._do(step))

    def _do(self, step: Callable[[], None]) -> None:
        """Do it, unless the process has ended; once it goes on, where it is frozen."""
        if not self._qemu.alive:
            return
        if self._qemu.frozen:
            self._waiting.append(step)
        else:
            step()

    def go_on(self) -> None:
        """It was frozen, and is not any more."""
        waiting, self._waiting = self._waiting, []
        for step in waiting:
            self._do(step)

    def end(self) -> None:
        """The process has ended."""
        self._hang_up()
        for end in self._names.values():
            end.shut_down()

    # --- commands ---------------------------------------------------------------------------------------------

    def run(self, command: str, arguments: Mapping[str, Any], end: FakeSocket | None) -> Any:
        match command:
            case "migrate-set-capabilities":
                self.capabilities = {one["capability"] for one in arguments["capabilities"] if one["state"]}
            case "getfd":
                assert end is not None
                self._names[arguments["fdname"]] = end
            case "migrate":
                self._begin(self._named(arguments["uri"]))
            case "migrate-incoming":
                self._await(self._named(arguments["uri"]))
            case "migrate-continue":
                if self.status != arguments["state"]:
                    raise MonitorRefused(
                        f"QEMU refuses migrate-continue: Migration not in expected state: {self.status}"
                    )
                self._tell("device")
                self._after(STEP_S, self._send_rest)
            case "migrate_cancel":
                self._cancel()
            case "query-migrate":
                return self._told()
        return {}

    def _named(self, uri: str) -> FakeSocket:
        return self._names.pop(uri.removeprefix("fd:"))

    def _told(self) -> dict[str, Any]:
        if self.status == "none" or (self._receives and self.status == "setup"):
            return {}
        told: dict[str, Any] = {"status": self.status}
        if not self._receives and self.status != "failed":
            told["ram"] = {"transferred": 1 << 20, "remaining": self._left << 20, "total": PARTS << 20, "mbps": 80.0}
        if self._downtime_s is not None:
            told["downtime"] = round(self._downtime_s * 1000)
        return told

    def _tell(self, status: str) -> None:
        self.status = status
        if "events" in self.capabilities:
            self._qemu.event("MIGRATION", status=status)

    def _hang_up(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.heard, wire.ended = lambda part: None, lambda: None
            wire.shut_down()

    # --- at the source ----------------------------------------------------------------------------------------

    def _begin(self, wire: FakeSocket) -> None:
        if self.status in {"setup", "active", "pre-switchover", "device", "cancelling"}:
            raise MonitorRefused("QEMU refuses migrate: There's a migration process in progress")
        self._receives = False
        self._downtime_s = None
        self._listen(wire)
        self._tell("setup")
        self._left = PARTS
        self._after(STEP_S, self._send_first)

    def _listen(self, wire: FakeSocket) -> None:
        self._wire = wire
        wire.heard = lambda part: self._comes(lambda: self._hear(wire, part))
        wire.ended = lambda: self._comes(lambda: self._lose(wire))

    def _comes(self, what: Callable[[], None]) -> None:
        """What comes is heard in its order."""
        self._inbox.append(what)
        self._after(0.0, self._hear_next)

    def _hear_next(self) -> None:
        self._inbox.popleft()()

    def _send_first(self) -> None:
        if self.status != "setup" or self._receives:
            return
        self._tell("active")
        self._send_memory()

    def _send_memory(self) -> None:
        if self.status != "active" or self._wire is None:
            return
        if self._wire.is_over:
            self._fail()
        else:
            self._wire.send(Memory())

    def _hear(self, wire: FakeSocket, part: object) -> None:
        if wire is not self._wire:
            return
        match part:
            case Acknowledged() if self.status == "active":
                self._left -= 1
                self._after(self.lasts_s / PARTS, self._send_memory if self._left else self._stop_guest)
            case Loaded() if self.status == "device":
                self._downtime_s = self._qemu.host_clock.now() - self._stopped_at
                self.is_inactive = True
                self._qemu.run_state = POSTMIGRATE
                self._tell("completed")
                self._hang_up()
            case Memory() if self._receives:
                if self.status == "setup":
                    self._tell("active")
                wire.send(Acknowledged())
            case Rest() if self._receives:
                self._load(wire, part)

    def _stop_guest(self) -> None:
        if self.status != "active":
            return
        qemu = self._qemu
        self._before, self._stopped_at = qemu.run_state, qemu.host_clock.now()
        qemu.run_state = FINISHING
        if self._before == RUNNING:
            qemu.event("STOP")
        if "pause-before-switchover" in self.capabilities:
            self._tell("pre-switchover")
        else:
            self._tell("device")
            self._send_rest()

    def _send_rest(self) -> None:
        if self.status != "device" or self._wire is None:
            return
        if self._wire.is_over:
            self._fail()
        else:
            self._wire.send(Rest(self._qemu.leaving, self._before))

    def _lose(self, wire: FakeSocket) -> None:
        """The connection is over. While it waits for `migrate-continue` it notices nothing."""
        if wire is not self._wire:
            return
        if self._receives:
            self._lose_source()
        elif self.status in {"active", "device"}:
            self._fail()

    def _fail(self) -> None:
        self._hang_up()
        self._tell("failed")
        self._go_back()

    def _go_back(self) -> None:
        """By itself, as it does whatever the target has."""
        qemu = self._qemu
        if qemu.run_state != FINISHING:
            return
        if self._before == RUNNING:
            qemu.goes_back()
        else:
            qemu.run_state = POSTMIGRATE

    def _cancel(self) -> None:
        if self._receives or self.status not in {"setup", "active", "pre-switchover", "device"}:
            return
        self._tell("cancelling")
        self._hang_up()
        self._after(STEP_S, self._cancelled)

    def _cancelled(self) -> None:
        if self.status == "cancelling":
            self._go_back()
            self._tell("cancelled")

    # --- at the target ----------------------------------------------------------------------------------------

    def _await(self, wire: FakeSocket) -> None:
        if self._qemu.run_state != INCOMING or self.status != "none":
            raise MonitorRefused("QEMU refuses migrate-incoming: The incoming migration has already been started")
        self._receives = True
        self._listen(wire)
        self._tell("setup")
        if wire.is_over:
            self._after(STEP_S, self._lose_source)

    def _load(self, wire: FakeSocket, rest: Rest) -> None:
        qemu = self._qemu
        qemu.take_in(rest.guest)
        self.is_inactive = self.has_all = True
        qemu.run_state = PAUSED if rest.run_state == RUNNING else rest.run_state
        self._tell("completed")
        wire.send(Loaded())
        self._hang_up()

    def _lose_source(self) -> None:
        if not self.has_all:
            self._hang_up()
            if self.status == "setup":
                self._tell("active")
            self._tell("failed")
            self._qemu.end(WaitStatus(code=1))
