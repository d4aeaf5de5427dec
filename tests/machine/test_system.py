"""What every `System` does with a QEMU: the same laws for the fake one and for a real one (under TCG)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pytest

from kvmsupervisor.adapters.process import SpawnFailed
from kvmsupervisor.adapters.qmp import MonitorLost, MonitorRefused, MonitorSilent
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.run_state import NEVER_RAN, POWERED_OFF, RUNNING
from kvmsupervisor.machine.system import REAL, QemuProcess, QmpConnection, System
from tests.fakes.clock import FakeClock, settle
from tests.fakes.qemu import FakeQemu, FakeQemus

T = TypeVar("T")

LIMIT_S = 120.0
"""Far above what anything here takes; only a hang reaches it."""

SHORT_S = 0.3
"""For what never comes: the least time that a real QEMU is waited for."""

MARK = "KVMSUPERVISOR_INCARNATION"


class Place:
    """A run directory, and a QEMU that is started there; the subclasses say which.

    Attributes:
        events: all that was told on QMP, `(name, data)` in order; `LOST` where a connection ended.
        ends: how often a process was said to have ended.
    """

    system: System

    def __init__(self) -> None:
        self.directory = InstanceDir(Path(tempfile.mkdtemp(prefix="kvs")) / "1")
        self.directory.create()
        self.marks = {MARK: str(uuid4()), "KVMSUPERVISOR_INSTANCE": "1"}
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.ends = 0
        self.pids: list[int] = []

    async def until(self, true: Callable[[], object]) -> None:
        """Let time pass until it is so."""
        raise NotImplementedError

    async def done(self, awaitable: Awaitable[T]) -> T:
        """Let time pass until something has come to its end; return what it came to."""
        task = asyncio.ensure_future(awaitable)
        await self.until(task.done)
        return task.result()

    def prepare_guest(self) -> list[str]:
        """Options of a guest that heeds the power button."""
        raise NotImplementedError

    async def booted(self) -> None:
        """Let time pass until the guest heeds the power button."""

    def argv(self, *more: str) -> list[str]:
        """A machine without anything, paused."""
        return ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", *more]

    def spawn(self, *more: str, program: str | None = None) -> QemuProcess:
        """Start it; `more` are further options, `-machine none` without any."""
        with (
            self.directory.listen(self.directory.qmp_socket) as main,
            self.directory.listen(self.directory.spare_socket) as spare,
            (self.directory.path / "log").open("ab") as log,
        ):
            argv = self.argv(*(more or ("-machine", "none")))
            for number, listener in enumerate((main, spare)):
                argv += ["-chardev", f"socket,id=qmp{number},fd={listener.fileno()},server=on,wait=off"]
                argv += ["-mon", f"chardev=qmp{number},mode=control"]
            made = self.system.processes.spawn(
                argv if program is None else [program, *argv[1:]],
                environment={"PATH": os.environ["PATH"], **self.marks},
                log_fd=log.fileno(),
                pass_fds=[main.fileno(), spare.fileno()],
                on_end=self.on_end,
            )
        self.pids.append(made.pid)
        return made

    def on_end(self) -> None:
        self.ends += 1

    async def reach(self, *, spare: bool = False, timeout_s: float = LIMIT_S) -> QmpConnection:
        """Connect, while somebody else lets time pass."""
        path = self.directory.spare_socket if spare else self.directory.qmp_socket
        return await self.system.connect(
            str(path),
            on_event=lambda name, data: self.events.append((name, data)),
            on_lost=lambda: self.events.append(("LOST", {})),
            timeout_s=timeout_s,
        )

    async def connect(self, *, spare: bool = False, timeout_s: float = LIMIT_S) -> QmpConnection:
        return await self.done(self.reach(spare=spare, timeout_s=timeout_s))

    async def do(self, monitor: QmpConnection, command: str, *, timeout_s: float = LIMIT_S) -> Any:
        return await self.done(monitor.execute(command, timeout_s=timeout_s))

    async def state(self, monitor: QmpConnection) -> str:
        answer = await self.do(monitor, "query-status")
        assert answer["running"] is (answer["status"] == RUNNING)
        return str(answer["status"])

    async def told(self, *names: str) -> list[Mapping[str, Any]]:
        """Let time pass until so many events were told; they are these. What they said."""
        await self.until(lambda: len(self.events) >= len(names))
        found, self.events = self.events, []
        assert [name for name, _ in found] == list(names)
        return [data for _, data in found]

    def close(self) -> None:
        shutil.rmtree(self.directory.path.parent)


class FakePlace(Place):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.qemus = FakeQemus(self.clock)
        self.qemus.prepare = self.prepare
        self.system = self.qemus.system

    @staticmethod
    def prepare(qemu: FakeQemu) -> None:
        if "nonsense" in qemu.argv:
            qemu.words = "qemu-system-x86_64: -device nonsense: 'nonsense' is not a valid device model name\n"

    async def until(self, true: Callable[[], object]) -> None:
        await self.clock.advance_until(true, LIMIT_S)
        await settle()

    def prepare_guest(self) -> list[str]:
        return ["-machine", "q35"]


class RealPlace(Place):
    system = REAL

    def __init__(self, guest: Callable[[], Guest]) -> None:
        super().__init__()
        self._guest = guest
        self._serial = self.directory.path / "serial"

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            # What is waited for happens in another process.
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def prepare_guest(self) -> list[str]:
        options = self._guest().options(tag="here")
        return ["-machine", "q35,accel=tcg", "-m", "128", "-serial", f"file:{self._serial}", *options]

    async def booted(self) -> None:
        await self.until(lambda: self._serial.exists() and "HELLO from here" in self._serial.read_text())

    def close(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            # Those that were let go of are nobody's.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        super().close()


@pytest.fixture(params=["fake", "real"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    made = FakePlace() if request.param == "fake" else RealPlace(lambda: request.getfixturevalue("guest"))
    yield made
    made.close()


# --- the guest's run state ------------------------------------------------------------------------------------


async def test_it_starts_paused_and_goes_on_and_stops_when_told(place: Place) -> None:
    """`cont` and `stop` are told as events, once; said again they change nothing."""
    place.spawn()
    monitor = await place.connect()
    assert await place.state(monitor) == NEVER_RAN
    for _ in range(2):
        assert await place.do(monitor, "cont") == {}
        assert await place.state(monitor) == RUNNING
    await place.told("RESUME")
    for _ in range(2):
        assert await place.do(monitor, "stop") == {}
        assert await place.state(monitor) == "paused"
    await place.told("STOP")
    await place.do(monitor, "cont")
    assert await place.state(monitor) == RUNNING


async def test_the_power_button_of_a_machine_without_a_guest(place: Place) -> None:
    """It is told that it was pressed, paused or not, and nothing follows."""
    place.spawn()
    monitor = await place.connect()
    assert await place.do(monitor, "system_powerdown") == {}
    await place.told("POWERDOWN")
    await place.do(monitor, "cont")
    await place.do(monitor, "system_powerdown")
    await place.told("RESUME", "POWERDOWN")
    assert await place.state(monitor) == RUNNING


async def test_a_reset(place: Place) -> None:
    """It is told as the host's. A running guest runs on; one that is stopped is as if it had never run."""
    place.spawn()
    monitor = await place.connect()
    await place.do(monitor, "cont")
    await place.told("RESUME")
    assert await place.do(monitor, "system_reset") == {}
    (data,) = await place.told("RESET")
    assert data == {"guest": False, "reason": "host-qmp-system-reset"}
    assert await place.state(monitor) == RUNNING
    await place.do(monitor, "stop")
    await place.do(monitor, "system_reset")
    await place.told("STOP", "RESET")
    assert await place.state(monitor) == NEVER_RAN


async def test_a_guest_that_heeds_the_power_button(place: Place) -> None:
    """One that was pressed while it was paused is heeded when it goes on.

    With `-no-shutdown` QEMU lives on, and its guest does not go on before a reset.
    """
    process = place.spawn(*place.prepare_guest(), "-no-shutdown")
    monitor = await place.connect()
    await place.do(monitor, "cont")
    await place.booted()
    place.events.clear()
    await place.do(monitor, "stop")
    await place.do(monitor, "system_powerdown")
    await place.told("STOP", "POWERDOWN")
    assert await place.state(monitor) == "paused"
    await place.do(monitor, "cont")
    _, data, _ = await place.told("RESUME", "SHUTDOWN", "STOP")
    assert data == {"guest": True, "reason": "guest-shutdown"}
    assert await place.state(monitor) == POWERED_OFF
    with pytest.raises(MonitorRefused, match="Resetting the Virtual Machine is required"):
        await place.do(monitor, "cont")
    await place.do(monitor, "system_reset")
    assert await place.state(monitor) == NEVER_RAN
    await place.do(monitor, "quit")
    await place.until(process.ended.is_set)
    assert process.status == WaitStatus(code=0)


# --- its end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["quit", "SIGTERM"])
async def test_an_end_in_order(place: Place, way: str) -> None:
    """It says why, hangs up, and exits with 0; which of the two is seen first is open."""
    process = place.spawn()
    monitor = await place.connect()
    if way == "quit":
        assert await place.do(monitor, "quit") == {}
    else:
        process.signal(signal.SIGTERM)
    await place.until(process.ended.is_set)
    data, _ = await place.told("SHUTDOWN", "LOST")
    assert data == {"guest": False, "reason": "host-qmp-quit" if way == "quit" else "host-signal"}
    assert (process.status, process.pidfd, place.ends) == (WaitStatus(code=0), -1, 1)
    await place.done(monitor.drained(LIMIT_S))


async def test_terminate_returns_with_the_end(place: Place) -> None:
    """SIGTERM, and nothing more to wait for."""
    process = place.spawn()
    await place.connect()
    await place.done(process.terminate())
    assert process.status == WaitStatus(code=0)


async def test_a_kill(place: Place) -> None:
    """Nothing is said; a signal to a process that has ended is no error."""
    process = place.spawn()
    await place.connect()
    process.signal(signal.SIGKILL)
    await place.until(process.ended.is_set)
    await place.told("LOST")
    assert process.status == WaitStatus(signal=signal.SIGKILL)
    process.signal(signal.SIGKILL)
    process.close()
    assert place.ends == 1


async def test_options_that_it_refuses(place: Place) -> None:
    """It writes why, and exits with 1 before anybody is served."""
    process = place.spawn("-machine", "none", "-device", "nonsense")
    with pytest.raises(MonitorLost):
        await place.connect()
    await place.until(process.ended.is_set)
    assert process.status == WaitStatus(code=1)
    said = (place.directory.path / "log").read_text()
    assert "-device nonsense: 'nonsense' is not a valid device model name" in said
    assert place.events == []


def test_a_program_that_is_not_there(place: Place) -> None:
    """There is no process then."""
    with pytest.raises(SpawnFailed, match="cannot start /nonexistent/qemu: No such file or directory"):
        place.spawn(program="/nonexistent/qemu")
    assert list(place.system.processes.find(place.marks)) == []


# --- its QMP connections --------------------------------------------------------------------------------------


async def test_it_goes_on_without_its_client_and_takes_the_next(place: Place) -> None:
    """One that hangs up is not told of it; the next one finds the guest as it was."""
    place.spawn()
    first = await place.connect()
    await place.do(first, "cont")
    await place.told("RESUME")
    await place.done(first.close())
    with pytest.raises(MonitorLost):
        await place.do(first, "query-status")
    second = await place.connect()
    assert await place.state(second) == RUNNING
    assert place.events == []


async def test_one_client_is_served_at_a_socket_and_the_next_waits(place: Place) -> None:
    """Until its time is over, or the first one has hung up."""
    place.spawn()
    first = await place.connect()
    with pytest.raises(MonitorSilent):
        await place.connect(timeout_s=SHORT_S)
    waiting = asyncio.create_task(place.reach())
    assert await place.state(first) == NEVER_RAN
    assert not waiting.done()
    await place.done(first.close())
    assert await place.state(await place.done(waiting)) == NEVER_RAN


async def test_both_sockets_serve_at_once_and_hear_the_same(place: Place) -> None:
    """The spare one is for people, while the supervisor has the other."""
    place.spawn()
    first, spare = await place.connect(), await place.connect(spare=True)
    await place.do(spare, "cont")
    await place.told("RESUME", "RESUME")
    assert await place.state(first) == RUNNING


async def test_one_that_ends_between_two_commands(place: Place) -> None:
    """The first was done and answered; whoever has asked the second learns that the connection ended, no more."""
    process = place.spawn()
    monitor = await place.connect()
    assert await place.do(monitor, "cont") == {}
    process.signal(signal.SIGSTOP)
    asked = asyncio.ensure_future(monitor.execute("query-status", timeout_s=LIMIT_S))
    await asyncio.sleep(0)
    process.signal(signal.SIGKILL)
    await place.until(asked.done)
    assert isinstance(asked.exception(), MonitorLost)
    await place.until(process.ended.is_set)
    await place.told("RESUME", "LOST")


async def test_one_that_somebody_else_lets_go_on(place: Place) -> None:
    """A person at the spare socket pauses its guest, and lets it go on: the supervisor is told of both."""
    place.spawn()
    monitor, theirs = await place.connect(), await place.connect(spare=True)
    await place.do(monitor, "cont")
    await place.told("RESUME", "RESUME")
    await place.do(theirs, "stop")
    await place.told("STOP", "STOP")
    assert await place.state(monitor) == "paused"
    await place.do(theirs, "cont")
    await place.told("RESUME", "RESUME")
    assert await place.state(monitor) == RUNNING


async def test_a_command_that_it_does_not_know(place: Place) -> None:
    """It is refused by its name, and the connection goes on."""
    place.spawn()
    monitor = await place.connect()
    with pytest.raises(MonitorRefused, match="nonsense: The command nonsense has not been found"):
        await place.do(monitor, "nonsense")
    assert await place.state(monitor) == NEVER_RAN


async def test_nobody_answers_after_the_end(place: Place) -> None:
    """Neither at the connection nor at the socket."""
    process = place.spawn()
    monitor = await place.connect()
    process.signal(signal.SIGKILL)
    await place.until(process.ended.is_set)
    await place.told("LOST")
    with pytest.raises(MonitorLost):
        await place.do(monitor, "query-status")
    with pytest.raises(MonitorLost):
        await place.connect()


async def test_what_a_frozen_one_was_asked_it_does_once_it_goes_on(place: Place) -> None:
    """It answers nothing and greets nobody; it does later what was given up, and SIGTERM too."""
    process = place.spawn()
    monitor = await place.connect()
    await place.do(monitor, "cont")
    await place.told("RESUME")
    process.signal(signal.SIGSTOP)
    with pytest.raises(MonitorSilent):
        await place.do(monitor, "stop", timeout_s=SHORT_S)
    with pytest.raises(MonitorSilent):
        await place.connect(spare=True, timeout_s=SHORT_S)
    assert place.events == []
    process.signal(signal.SIGCONT)
    await place.told("STOP")
    assert await place.state(monitor) == "paused"
    process.signal(signal.SIGSTOP)
    process.signal(signal.SIGTERM)
    with pytest.raises(MonitorSilent):
        await place.do(monitor, "query-status", timeout_s=SHORT_S)
    assert not process.ended.is_set()
    process.signal(signal.SIGCONT)
    await place.until(process.ended.is_set)
    await place.until(lambda: len(place.events) == 2)
    await place.told("SHUTDOWN", "LOST")


# --- its process ----------------------------------------------------------------------------------------------


async def test_a_successor_finds_the_process(place: Place) -> None:
    """By pid, start time and marks together; by the marks alone; not by others'. It hears of the end, and how."""
    processes = place.system.processes
    process = place.spawn()
    assert process.is_child
    monitor = await place.connect()
    pid, starttime = process.pid, process.starttime
    assert list(processes.find(place.marks)) == [pid]
    assert pid in processes.having(MARK)
    assert processes.is_alive(pid, starttime)
    assert not processes.is_alive(pid, starttime + 1)
    assert processes.starttime_of(pid) == starttime
    assert processes.environment_of(pid)[MARK] == place.marks[MARK]
    assert processes.command_line_of(pid)[:2] == ("qemu-system-x86_64", "-S")

    process.close()
    assert process.pidfd == -1
    process.signal(signal.SIGKILL)
    assert await place.state(monitor) == NEVER_RAN
    other = {**place.marks, MARK: "another"}
    assert list(processes.find(other)) == []
    assert processes.reopen(pid, starttime=starttime, marks=other, on_end=place.on_end) is None
    assert processes.reopen(pid, starttime=starttime + 1, marks=place.marks, on_end=place.on_end) is None
    again = processes.reopen(pid, starttime=None, marks=place.marks, on_end=place.on_end)
    assert again is not None
    assert (again.pid, again.starttime, again.is_child, again.ended.is_set()) == (pid, starttime, False, False)
    again.signal(signal.SIGKILL)
    await place.until(again.ended.is_set)
    assert (again.status, place.ends, process.ended.is_set()) == (WaitStatus(signal=signal.SIGKILL), 1, False)
    assert not processes.is_alive(pid, starttime)
    assert processes.reopen(pid, starttime=starttime, marks=place.marks, on_end=place.on_end) is None
