"""What every QEMU does by itself in a migration of its guest: the same laws for the fake one and for a real one.

Two QEMUs, and between them a way that is held up, in one direction or both, or cut; as docs/moving.md was measured.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any, Protocol

import pytest

from kvmsupervisor.adapters.qmp import MonitorRefused
from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.run_state import INCOMING, PAUSED, POSTMIGRATE, RUNNING
from kvmsupervisor.machine.system import QemuProcess, QmpConnection
from tests.fakes.migration import FINISHING, FakeSocket
from tests.machine.test_system import LIMIT_S, FakePlace, Place, RealPlace

MACHINE = ("-machine", "q35,accel=tcg", "-m", "16")
END = object()


class Way(Protocol):
    """The way between two QEMUs."""

    ends: tuple[Any, Any]

    def hold(self, *, there: bool = False, back: bool = False) -> None: ...
    def cut(self) -> None: ...
    def close(self) -> None: ...


class FakeWay:
    def __init__(self, place: FakePlace) -> None:
        (mine, one), (theirs, other) = (place.qemus.descriptors.pair() for _ in range(2))
        self.ends = mine, theirs
        self._inner = one, other
        self._held = {one: False, other: False}
        self._kept: dict[FakeSocket, list[object]] = {one: [], other: []}
        for end, out in ((one, other), (other, one)):
            end.heard = lambda part, end=end, out=out: self._pass(end, out, part)  # type: ignore[misc]
            end.ended = lambda end=end, out=out: self._pass(end, out, END)  # type: ignore[misc]

    def _pass(self, end: FakeSocket, out: FakeSocket, part: object) -> None:
        if self._held[end]:
            self._kept[end].append(part)
        elif part is END:
            out.shut_down()
        else:
            out.send(part)

    def hold(self, *, there: bool = False, back: bool = False) -> None:
        one, other = self._inner
        self._held = {one: there, other: back}
        for end, out in ((one, other), (other, one)):
            kept, self._kept[end] = self._kept[end], []
            for part in kept:
                self._pass(end, out, part)

    def cut(self) -> None:
        for end in self._inner:
            end.shut_down()

    def close(self) -> None:
        self.cut()


class RealWay:
    def __init__(self) -> None:
        (mine, one), (theirs, other) = (socket.socketpair() for _ in range(2))
        self.ends = mine, theirs
        self._inner = one, other
        self._held = {one: False, other: False}
        self._turn = threading.Condition()
        self._threads = [
            threading.Thread(target=self._carry, args=pair, daemon=True) for pair in ((one, other), (other, one))
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, end: socket.socket, out: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = end.recv(1 << 16)
                with self._turn:
                    self._turn.wait_for(lambda: not self._held[end])
                if not data:
                    break
                out.sendall(data)
        self.cut()

    def hold(self, *, there: bool = False, back: bool = False) -> None:
        with self._turn:
            self._held = dict(zip(self._inner, (there, back), strict=True))
            self._turn.notify_all()

    def cut(self) -> None:
        for end in self._inner:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hold()
        self.cut()
        for thread in self._threads:
            thread.join(LIMIT_S)
        for end in (*self.ends, *self._inner):
            end.close()


class Side:
    """One QEMU.

    Attributes:
        told: the events of its migration and its guest, each as one word.
    """

    def __init__(self, place: Place, *more: str) -> None:
        self.place = place
        self.process: QemuProcess = place.spawn(*MACHINE, *more)
        self.monitor: QmpConnection
        self.told: list[str] = []

    async def connect(self) -> None:
        self.monitor = await self.place.connect()

    def heard(self) -> list[str]:
        """What was told since, each once."""
        found, self.place.events = self.place.events, []
        for name, data in found:
            if name == "MIGRATION":
                self.told.append(str(data["status"]))
            elif name in {"STOP", "RESUME"}:
                self.told.append(name)
        return self.told

    async def until(self, *told: str) -> None:
        """Let time pass until exactly this was told since the last time."""
        await self.place.until(lambda: len(self.heard()) >= len(told))
        assert self.told == list(told)
        self.told = []

    async def ask(self, command: str, end: Any = None, **arguments: Any) -> Any:
        work = self.monitor.execute(command, arguments or None, timeout_s=LIMIT_S, fd=None if end is None else end)
        return await self.place.done(work)

    async def state(self) -> tuple[str, str]:
        """Run state, and how far the migration is."""
        run_state = (await self.ask("query-status"))["status"]
        return run_state, (await self.ask("query-migrate")).get("status", "none")

    async def ends(self) -> WaitStatus:
        await self.place.until(self.process.ended.is_set)
        return self.process.status


class Pair:
    """A source, whose guest runs, and a target that waits for it; the way between them."""

    def __init__(self, kind: str) -> None:
        place = FakePlace() if kind == "fake" else RealPlace(_no_guest)
        other = FakePlace() if kind == "fake" else RealPlace(_no_guest)
        if isinstance(place, FakePlace) and isinstance(other, FakePlace):
            other.clock, other.qemus, other.system = place.clock, place.qemus, place.system
            self.way: Way = FakeWay(place)
        else:
            self.way = RealWay()
        self.source, self.target = Side(place), Side(other, "-incoming", "defer")

    async def begin(self, *, paused: bool = False, switch: bool = True) -> None:
        """Have the guest sent, up to the switch-over."""
        for side in (self.source, self.target):
            await side.connect()
        await self.source.ask("cont")
        if paused:
            await self.source.ask("stop")
        await self.source.until("RESUME", *(("STOP",) if paused else ()))
        assert await self.target.state() == (INCOMING, "none")
        for side, names in (
            (self.source, ("events", "return-path", "pause-before-switchover")),
            (self.target, ("events", "return-path")),
        ):
            wanted = [{"capability": name, "state": True} for name in names]
            assert await side.ask("migrate-set-capabilities", capabilities=wanted) == {}
        for side, end, command in (
            (self.target, self.way.ends[1], "migrate-incoming"),
            (self.source, self.way.ends[0], "migrate"),
        ):
            assert await side.ask("getfd", end.fileno(), fdname="move") == {}
            end.close()
            assert await side.ask(command, uri="fd:move") == {}
        if switch:
            await self.source.until("setup", "active", *(() if paused else ("STOP",)), "pre-switchover")
            await self.target.until("setup", "active")
            assert await self.source.state() == (FINISHING, "pre-switchover")
            assert await self.target.state() == (INCOMING, "active")

    async def go_on(self) -> None:
        assert await self.source.ask("migrate-continue", state="pre-switchover") == {}

    def close(self) -> None:
        self.way.close()
        for side in (self.source, self.target):
            side.place.close()


def _no_guest() -> Any:
    raise AssertionError("nobody boots here")


@pytest.fixture(params=["fake", "real"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


async def test_it_goes_over(pair: Pair) -> None:
    """The source says `completed` once the target has all of it; both stand still, and each goes on when told."""
    await pair.begin()
    with pytest.raises(MonitorRefused, match="Migration is not finalized yet"):
        await pair.source.ask("cont")
    await pair.go_on()
    await pair.source.until("device", "completed")
    await pair.target.until("completed")
    assert await pair.source.state() == (POSTMIGRATE, "completed")
    assert await pair.target.state() == (PAUSED, "completed")
    assert (await pair.source.ask("query-migrate"))["downtime"] >= 0
    with pytest.raises(MonitorRefused, match="Migration not in expected state: completed"):
        await pair.go_on()
    assert await pair.source.ask("migrate_cancel") == {}
    await pair.target.ask("cont")
    await pair.target.until("RESUME")
    # QEMU itself keeps nobody from letting both run.
    await pair.source.ask("cont")
    await pair.source.until("RESUME")
    assert await pair.source.state() == (RUNNING, "completed")


async def test_a_paused_guest(pair: Pair) -> None:
    """It arrives paused; where that fails it does not run by itself, and its run state tells of the migration."""
    await pair.begin(paused=True)
    pair.target.process.signal(signal.SIGKILL)
    await pair.target.ends()
    assert await pair.source.state() == (FINISHING, "pre-switchover")
    await pair.go_on()
    await pair.source.until("device", "failed")
    assert await pair.source.state() == (POSTMIGRATE, "failed")
    await pair.source.ask("cont")
    await pair.source.until("RESUME")


@pytest.mark.parametrize("when", ["sending", "stopped"])
async def test_it_is_cancelled(pair: Pair, when: str) -> None:
    """The guest runs on, or again, by itself; the target ends."""
    if when == "sending":
        pair.way.hold(there=True)
    await pair.begin(switch=when == "stopped")
    if when == "sending":
        await pair.source.until("setup", "active")
    assert await pair.source.ask("migrate_cancel") == {}
    resumes = () if when == "sending" else ("RESUME",)
    await pair.source.until("cancelling", *resumes, "cancelled")
    assert await pair.source.state() == (RUNNING, "cancelled")
    pair.way.hold()
    assert await pair.target.ends() == WaitStatus(code=1)


async def test_the_way_is_cut_while_it_is_sent(pair: Pair) -> None:
    """The source runs on, and says that it failed; the target ends."""
    pair.way.hold(there=True)
    await pair.begin(switch=False)
    await pair.source.until("setup", "active")
    pair.way.cut()
    pair.way.hold()
    await pair.source.until("failed")
    assert await pair.source.state() == (RUNNING, "failed")
    assert await pair.target.ends() == WaitStatus(code=1)


async def test_the_way_is_cut_while_it_is_stopped(pair: Pair) -> None:
    """The source notices nothing before it is to go on: then it fails, and runs again by itself."""
    await pair.begin()
    pair.way.cut()
    assert await pair.target.ends() == WaitStatus(code=1)
    assert await pair.source.state() == (FINISHING, "pre-switchover")
    await pair.go_on()
    await pair.source.until("device", "failed", "RESUME")
    assert await pair.source.state() == (RUNNING, "failed")


@pytest.mark.parametrize("way_out", ["cut", "cancel"])
async def test_its_answer_is_lost(pair: Pair, way_out: str) -> None:
    """The target has all of it and stands still; the source, which does not know, runs again by itself."""
    await pair.begin()
    pair.way.hold(back=True)
    await pair.go_on()
    await pair.source.until("device")
    await pair.target.until("completed")
    assert (await pair.source.state())[1] == "device"
    if way_out == "cut":
        pair.way.cut()
        await pair.source.until("failed", "RESUME")
    else:
        await pair.source.ask("migrate_cancel")
        await pair.source.until("cancelling", "RESUME", "cancelled")
    assert (await pair.source.state())[0] == RUNNING
    assert await pair.target.state() == (PAUSED, "completed")


async def test_the_target_dies_behind_the_switch(pair: Pair) -> None:
    """Frozen, it is waited for; dead, the source runs again by itself."""
    await pair.begin()
    pair.target.process.signal(signal.SIGSTOP)
    await pair.go_on()
    await pair.source.until("device")
    assert await pair.source.state() == (FINISHING, "device")
    pair.target.process.signal(signal.SIGKILL)
    await pair.source.until("failed", "RESUME")


async def test_a_frozen_target_takes_it_later(pair: Pair) -> None:
    """What was sent to it is not lost."""
    await pair.begin()
    pair.target.process.signal(signal.SIGSTOP)
    await pair.go_on()
    await pair.source.until("device")
    pair.target.process.signal(signal.SIGCONT)
    await pair.source.until("completed")
    await pair.target.until("completed")


async def test_the_source_ends_behind_the_switch(pair: Pair) -> None:
    """What the target has it keeps."""
    await pair.begin()
    pair.way.hold(back=True)
    await pair.go_on()
    await pair.target.until("completed")
    await pair.source.ask("quit")
    assert await pair.source.ends() == WaitStatus(code=0)
    assert await pair.target.state() == (PAUSED, "completed")
    await pair.target.ask("cont")
    await pair.target.until("RESUME")


async def test_the_source_dies_before_the_switch(pair: Pair) -> None:
    """The target has nothing, and ends."""
    await pair.begin()
    pair.source.process.signal(signal.SIGKILL)
    assert await pair.target.ends() == WaitStatus(code=1)


async def test_a_guest_that_waits_is_nobodys_to_let_run(pair: Pair) -> None:
    """`cont` is taken, and lets nothing run that has not come."""
    await pair.begin()
    assert await pair.target.ask("cont") == {}
    assert await pair.target.ask("stop") == {}
    assert await pair.target.state() == (INCOMING, "active")
