"""QEMU processes in virtual time: what `machine/machine.py` sees of the kernel and of QMP, without either.

    qemus = FakeQemus(clock)
    qemus.system        # what spawns and adopts them, for whatever takes a `System`

Each spawned process is a `FakeQemu`, whose fields say how it behaves (`deaf`, `frozen`, `stubborn`); `prepare` is
called with each one before it begins. The run directory, its sockets and records stay real.

`FakeQemus.ran_off_the_record` is what law 3 forbids: guests that were let run although `on_record` denied it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmsupervisor.adapters.agent import AgentSilent
from kvmsupervisor.adapters.process import SpawnFailed
from kvmsupervisor.adapters.qmp import MonitorLost, MonitorRefused, MonitorSilent
from kvmsupervisor.domain.agent import GuestFacts
from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.machine.system import System
from tests.fakes.clock import FakeClock
from tests.fakes.network import FakeNetwork

OnEvent = Callable[[str, Mapping[str, Any]], None]


class FakeQemu:
    """One process.

    Attributes:
        deaf: its guest ignores the power button.
        stubborn: QEMU takes `quit` and lives on.
        frozen: it answers nothing on QMP; it can be killed all the same.
        mute: it greets, and answers no command.
        refuses: QMP commands that it refuses, with its words.
        words: what it writes on its standard error before it exits with status 1 at once; None: it lives.
        run_state: QMP's.
        agent: what its guest's agent says, None when nobody answers there.
        agent_open: whether the guest has the agent's channel open; `open_agent` turns it and tells.
        presses: when its power button was pressed.
        commands: all QMP commands that it did, in order.
        asked: when its guest's agent was asked.
    """

    def __init__(self, host: FakeQemus, pid: int, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self.pid = pid
        self.starttime = pid * 10
        self.argv = tuple(argv)
        self.environment = dict(environment)
        self.run_state = "prelaunch"
        self.deaf = self.stubborn = self.frozen = self.mute = False
        self.refuses: dict[str, str] = {}
        self.words: str | None = None
        self.agent: GuestFacts | None = None
        self.agent_open = False
        self.asked: list[float] = []
        self.presses: list[float] = []
        self.commands: list[str] = []
        self.status: WaitStatus | None = None
        self._host = host
        self._processes: list[FakeProcess] = []
        self._monitors: list[FakeMonitor] = []

    @property
    def alive(self) -> bool:
        return self.status is None

    @property
    def instance(self) -> str:
        return self.environment["KVMSUPERVISOR_INSTANCE"]

    @property
    def ram(self) -> str:
        return self.argv[self.argv.index("-m") + 1]

    def is_in(self, directory: Path) -> bool:
        """Whether that is its run directory: its sockets were opened there, and it knows their numbers only."""
        return any(f"opaque={directory}/console.log" in word for word in self.argv)

    def event(self, name: str, **data: Any) -> None:
        for monitor in self._monitors:
            monitor.on_event(name, data)

    def open_agent(self, facts: GuestFacts | None = None, *, is_open: bool = True) -> None:
        """The guest opens (or closes) its agent's channel; `facts` is what the agent answers from now on."""
        self.agent, self.agent_open = facts, is_open
        self.event("VSERPORT_CHANGE", id="agent0", open=is_open)

    def shut_down(self, reason: str = "guest-shutdown") -> None:
        """End as QEMU does: it says why, then exits."""
        if self.alive:
            self.event("SHUTDOWN", guest=reason.startswith("guest"), reason=reason)
            self.end(WaitStatus(code=0))

    def power_off(self, reason: str = "guest-shutdown") -> None:
        """Its guest powers itself off under `-no-shutdown`: QEMU says so, stops the guest, and lives on."""
        self.run_state = "shutdown"
        self.event("SHUTDOWN", guest=True, reason=reason)
        self.event("STOP")

    def crash(self, number: int = 9) -> None:
        self.end(WaitStatus(signal=number))

    def end(self, status: WaitStatus) -> None:
        if not self.alive:
            return
        self.status = status
        for monitor in tuple(self._monitors):
            monitor.lose()
        for process in tuple(self._processes):
            asyncio.get_running_loop().call_soon(process.end)

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self.crash(number)
        elif number == signal.SIGTERM and not self.frozen:
            self.shut_down("host-signal")

    def run(self, command: str) -> Any:
        if command in self.refuses:
            raise MonitorRefused(f"QEMU refuses {command}: {self.refuses[command]}")
        self.commands.append(command)
        match command:
            case "query-uuid":
                return {"UUID": self.argv[self.argv.index("-uuid") + 1]}
            case "query-status":
                return {"status": self.run_state, "running": self.run_state == "running"}
            case "query-chardev":
                return [{"label": "agent0", "frontend-open": self.agent_open, "filename": "unix"}]
            case "cont":
                if not self._host.on_record(self):
                    self._host.ran_off_the_record.append(self)
                self.run_state = "running"
                self.event("RESUME")
            case "system_powerdown":
                self.presses.append(self._host.clock.now())
                if not self.deaf and self.run_state == "running":
                    self._host.clock.call_at(self._host.clock.now() + 0.1, self.shut_down)
            case "quit" if not self.stubborn:
                asyncio.get_running_loop().call_soon(self.shut_down, "host-qmp-quit")
        return {}


class FakeProcess:
    """Stands for `adapters.process.Process`."""

    def __init__(self, qemu: FakeQemu, on_end: Callable[[], None], *, is_child: bool) -> None:
        self.pid = qemu.pid
        self.is_child = is_child
        self.starttime = qemu.starttime
        self.ended = asyncio.Event()
        self.status = WaitStatus()
        self._qemu = qemu
        self._on_end = on_end
        qemu._processes.append(self)

    @property
    def pidfd(self) -> int:
        return self.pid if self._qemu.alive else -1

    def signal(self, number: int) -> None:
        self._qemu.signal(number)

    async def terminate(self) -> None:
        self.signal(signal.SIGTERM)
        clock = self._qemu._host.clock
        await clock.wait(self.ended, clock.now() + 1.0)

    def close(self) -> None:
        if self in self._qemu._processes:
            self._qemu._processes.remove(self)

    def end(self) -> None:
        if self in self._qemu._processes:
            self.close()
            self.status = self._qemu.status or WaitStatus()
            self.ended.set()
            self._on_end()


class FakeMonitor:
    """Stands for `adapters.qmp.Monitor`."""

    def __init__(self, qemu: FakeQemu, host: FakeQemus, on_event: OnEvent, on_lost: Callable[[], None]) -> None:
        self.on_event = on_event
        self._on_lost = on_lost
        self._qemu = qemu
        self._host = host
        self._lost = asyncio.Event()
        qemu._monitors.append(self)

    async def execute(self, command: str, arguments: object = None, *, timeout_s: float = 5.0) -> Any:
        await asyncio.sleep(0)
        if not self._lost.is_set() and (self._qemu.frozen or self._qemu.mute):
            await self._host.clock.wait(self._lost, self._host.clock.now() + timeout_s)
            if not self._lost.is_set():
                raise MonitorSilent(f"QEMU did not answer {command}")
        if self._lost.is_set():
            raise MonitorLost(f"no QMP connection for {command}")
        answer = self._qemu.run(command)
        if self._host.lose_answer_to == command:
            self._host.lose_answer_to = None
            self.lose()
            raise MonitorLost(f"QMP connection ended during {command}")
        return answer

    async def drained(self, timeout_s: float) -> None:
        await self._host.clock.wait(self._lost, self._host.clock.now() + timeout_s)

    async def close(self) -> None:
        self._detach()

    def lose(self) -> None:
        """The connection ends."""
        if self in self._qemu._monitors:
            self._detach()
            self._on_lost()

    def _detach(self) -> None:
        if self in self._qemu._monitors:
            self._qemu._monitors.remove(self)
        self._lost.set()


class FakeQemus:
    """All processes of a machine.

    Attributes:
        all: every QEMU that was ever spawned, in order.
        prepare: called with each before it begins.
        no_program: spawning fails with these words.
        shortage: spawning fails for want of what this errno names.
        lose_answer_to: the next such QMP command is done, and the connection lost before its answer.
        on_record: whether a QEMU's guest may run; what law 3 asks. True unless a test says otherwise.
        ran_off_the_record: those that were let run all the same.
        network: taps and bridges.
        system: all of it.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.all: list[FakeQemu] = []
        self.prepare: Callable[[FakeQemu], None] = lambda qemu: None
        self.no_program: str | None = None
        self.shortage: int | None = None
        self.lose_answer_to: str | None = None
        self.on_record: Callable[[FakeQemu], bool] = lambda qemu: True
        self.ran_off_the_record: list[FakeQemu] = []
        self.network = FakeNetwork()
        self.system = System(
            processes=self,
            connect=self.connect,
            ask_agent=self.ask,
            network=self.network,
            index_of=self.network.index_of,
            ensure_device=lambda device: False,
            port_trouble=self.network.port_trouble,
        )
        self._pids = itertools.count(2_000_000_000)

    @property
    def alive(self) -> list[FakeQemu]:
        return [qemu for qemu in self.all if qemu.alive]

    @property
    def running(self) -> list[FakeQemu]:
        """Those whose guest runs."""
        return [qemu for qemu in self.alive if qemu.run_state == "running"]

    # What stands for adapters.process.

    def spawn(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_fd: int,
        pass_fds: Sequence[int],
        on_end: Callable[[], None],
        stdin: int | None = None,
    ) -> FakeProcess:
        if self.no_program is not None:
            raise SpawnFailed(self.no_program)
        if self.shortage is not None:
            raise OSError(self.shortage, os.strerror(self.shortage))
        qemu = FakeQemu(self, next(self._pids), argv, environment)
        self.all.append(qemu)
        self.prepare(qemu)
        process = FakeProcess(qemu, on_end, is_child=True)
        if qemu.words is not None:
            os.write(log_fd, qemu.words.encode())
            qemu.end(WaitStatus(code=1))
        return process

    def reopen(
        self, pid: int, *, starttime: int | None, marks: Mapping[str, str], on_end: Callable[[], None]
    ) -> FakeProcess | None:
        for qemu in self.alive:
            if qemu.pid == pid and starttime in (None, qemu.starttime) and marks.items() <= qemu.environment.items():
                return FakeProcess(qemu, on_end, is_child=False)
        return None

    def find(self, marks: Mapping[str, str]) -> Iterator[int]:
        return (qemu.pid for qemu in self.alive if marks.items() <= qemu.environment.items())

    def having(self, name: str) -> Iterator[int]:
        return (qemu.pid for qemu in self.alive if name in qemu.environment)

    def is_alive(self, pid: int, starttime: int) -> bool:
        return any((qemu.pid, qemu.starttime) == (pid, starttime) for qemu in self.alive)

    def environment_of(self, pid: int) -> Mapping[str, str]:
        return next((qemu.environment for qemu in self.alive if qemu.pid == pid), {})

    def command_line_of(self, pid: int) -> tuple[str, ...]:
        return next((qemu.argv for qemu in self.alive if qemu.pid == pid), ())

    def starttime_of(self, pid: int) -> int | None:
        return next((qemu.starttime for qemu in self.alive if qemu.pid == pid), None)

    # What stands for adapters.agent.

    async def ask(self, path: Path) -> GuestFacts:
        (qemu,) = [qemu for qemu in self.alive if qemu.is_in(path.parent)]
        qemu.asked.append(self.clock.now())
        await asyncio.sleep(0)
        if qemu.agent is None:
            await self.clock.sleep(5.0)
            raise AgentSilent("no answer")
        return qemu.agent

    # What stands for adapters.qmp.Monitor.

    async def connect(
        self, path: str, *, on_event: OnEvent, on_lost: Callable[[], None], timeout_s: float
    ) -> FakeMonitor:
        await asyncio.sleep(0)
        for qemu in self.alive:
            if qemu.is_in(Path(path).parent):
                if qemu.frozen:
                    await self.clock.sleep(timeout_s)
                    raise MonitorSilent("QEMU did not greet")
                return FakeMonitor(qemu, self, on_event, on_lost)
        raise MonitorLost(f"cannot connect to QMP at {path}: nobody listens")
