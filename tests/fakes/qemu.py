"""QEMU processes in virtual time: what `machine/machine.py` sees of the kernel and of QMP, without either.

    qemus = FakeQemus(clock)
    qemus.system        # what spawns and adopts them, for whatever takes a `System`

Each spawned process is a `FakeQemu`, whose fields say how it behaves (`deaf`, `frozen`, `stubborn`); `prepare` is
called with each one before it begins. The run directory, its sockets and records stay real: a fake finds out, as the
real one does, which sockets its options give it by number.

What it has in common with a real QEMU is held by `tests/machine/test_system.py` and `test_migration.py`, which run on
both.

`FakeQemus.ran_off_the_record` is what law 3 forbids: guests that were let run although `on_record` denied it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvmsupervisor.adapters.agent import AgentSilent
from kvmsupervisor.adapters.process import TERM_S, SpawnFailed
from kvmsupervisor.adapters.qmp import MonitorLost, MonitorRefused, MonitorSilent
from kvmsupervisor.domain.agent import GuestFacts
from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.run_state import INCOMING, NEVER_RAN, POWERED_OFF, RUNNING
from kvmsupervisor.guard.keeper_client import FROZEN, PAUSED, KeeperTrouble
from kvmsupervisor.machine.system import System
from tests.fakes.clock import FakeClock
from tests.fakes.drive import COMMANDS, FakeDrive
from tests.fakes.migration import COMMANDS as MOVING
from tests.fakes.migration import FINISHING, Descriptors, FakeMigration, FakeSocket, Guest
from tests.fakes.network import FakeNetwork
from tests.fakes.plugged import COMMANDS as PLUGGED
from tests.fakes.plugged import FakePlugged
from tests.fakes.transfer import FakeNet, FakeTransfers

OnEvent = Callable[[str, Mapping[str, Any]], None]


def listening(descriptors: Sequence[int]) -> dict[int, Path]:
    """Where those of the open files listen that are sockets, by their numbers."""
    found = {}
    for fd in descriptors:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as listener:
                found[fd] = Path(listener.getsockname())
    return found


@dataclass(eq=False)
class Request:
    """A QMP command on its way.

    Attributes:
        done: set once there is an answer, or there will be none.
        answer: its result, or the error.
        wire: the socket that goes with it.
    """

    command: str
    arguments: Any = None
    wire: FakeSocket | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Any = None

    def end(self, answer: Any) -> None:
        self.answer = answer
        self.done.set()


class FakeQemu:
    """One process.

    Attributes:
        deaf: its guest ignores the power button, or it has no guest.
        stubborn: QEMU takes `quit` and lives on.
        refuses: QMP commands that it refuses, with its words.
        words: what it writes on its standard error before it exits with status 1 at once; None: it lives.
        migration: of its guest.
        blocks: its disks, as `query-block` tells them.
        drive: its CD-ROM drive.
        plugged: its devices that come and go.
        agent: what its guest's agent says, None when nobody answers there.
        agent_open: whether the guest has the agent's channel open; `open_agent` turns it and tells.
        file_systems: how many its agent can freeze; None: it does not answer to that.
        frozen_file_systems: how many are frozen.
        deaf_to_thaw: its agent does not answer to that.
        presses: when its power button was pressed.
        commands: all QMP commands that it did, in order.
        asked: when its guest's agent was asked.
        sockets: where its character devices listen, by their names.
        monitors: the sockets on which it speaks QMP.
    """

    def __init__(
        self,
        host: FakeQemus,
        pid: int,
        argv: Sequence[str],
        environment: Mapping[str, str],
        listening: Mapping[int, Path],
    ) -> None:
        self.pid = pid
        self.starttime = pid * 10
        self.argv = tuple(argv)
        self.environment = dict(environment)
        self.sockets: dict[str, Path] = {}
        self.monitors: set[Path] = set()
        for option, value in pairwise(argv):
            fields = dict(one.partition("=")[::2] for one in value.split(","))
            if option == "-chardev" and int(fields.get("fd", -1)) in listening:
                self.sockets[fields["id"]] = listening[int(fields["fd"])]
            elif option == "-mon":
                self.monitors.add(self.sockets[fields["chardev"]])
            elif option == "-readconfig":
                # The monitor that single mode puts beside its user's options.
                self.monitors |= {listening[int(fd)] for fd in re.findall(r'fd = "(\d+)"', Path(value).read_text())}
        self.blocks: list[dict[str, Any]] = []
        self.drive = FakeDrive(argv, self.event)
        self._host = host
        self._guest = Guest()
        self._run_state = INCOMING if "-incoming" in argv else NEVER_RAN
        self._ran_from = 0.0
        self.migration = FakeMigration(self)
        self.plugged = FakePlugged(argv, self.event)
        self.deaf = ("-machine", "none") in pairwise(argv)
        self.stubborn = False
        self.refuses: dict[str, str] = {}
        self.words: str | None = None
        self.agent: GuestFacts | None = None
        self.agent_open = False
        self.asked: list[float] = []
        self.file_systems: int | None = 1
        self.frozen_file_systems = 0
        self.deaf_to_thaw = False
        self.presses: list[float] = []
        self.commands: list[str] = []
        self.status: WaitStatus | None = None
        self._frozen = self._mute = self._terminated = self._pressed = False
        self._processes: list[FakeProcess] = []
        self._clients: list[FakeMonitor] = []
        self._requests: list[tuple[FakeMonitor, Request]] = []
        # Set, and forgotten, whenever somebody who waits to be served has to look again.
        self._line: list[asyncio.Event] = []

    @property
    def alive(self) -> bool:
        return self.status is None

    @property
    def instance(self) -> str:
        return self.environment["KVMSUPERVISOR_INSTANCE"]

    @property
    def ram(self) -> str:
        return self.argv[self.argv.index("-m") + 1]

    @property
    def run_state(self) -> str:
        """QMP's."""
        return self._run_state

    @run_state.setter
    def run_state(self, state: str) -> None:
        now = self._host.clock.now()
        if self._run_state == RUNNING:
            self._guest = replace(self._guest, counted_s=self._guest.counted_s + now - self._ran_from)
        self._run_state, self._ran_from = state, now

    @property
    def host_clock(self) -> FakeClock:
        """Of the machine that it lives on."""
        return self._host.clock

    @property
    def boot(self) -> object:
        """The same in each QEMU that its guest comes to."""
        return self._guest.boot

    @property
    def counted_s(self) -> float:
        """For how long its guest has run, as it counts in its memory."""
        runs_s = self._host.clock.now() - self._ran_from if self.alive and self._run_state == RUNNING else 0.0
        return self._guest.counted_s + runs_s

    @property
    def leaving(self) -> Guest:
        """Its guest, as it goes to another one."""
        return replace(self._guest, pressed=self._pressed, deaf=self.deaf)

    def take_in(self, guest: Guest) -> None:
        """Another one's guest has come."""
        self._guest = guest
        self._pressed, self.deaf = guest.pressed, guest.deaf

    def goes_back(self) -> None:
        """Its guest was stopped for a migration that came to nothing, and runs again by itself."""
        self.run_state = RUNNING
        self.event("RESUME")
        self._heed_button()

    @property
    def frozen(self) -> bool:
        """Whether it does nothing at all, as after SIGSTOP. What it was asked meanwhile it does once it goes on."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        self._go_on()

    @property
    def mute(self) -> bool:
        """Whether it hangs behind the negotiation of QMP: it does no command before it goes on."""
        return self._mute

    @mute.setter
    def mute(self, mute: bool) -> None:
        self._mute = mute
        self._go_on()

    def is_in(self, directory: Path) -> bool:
        """Whether that is its run directory."""
        return directory in {path.parent for path in self.monitors}

    def event(self, name: str, **data: Any) -> None:
        for client in self._clients:
            client.on_event(name, data)

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
        self.run_state = POWERED_OFF
        self.event("SHUTDOWN", guest=True, reason=reason)
        self.event("STOP")

    def crash(self, number: int = 9) -> None:
        self.end(WaitStatus(signal=number))

    def end(self, status: WaitStatus) -> None:
        if not self.alive:
            return
        # What its guest has counted counts.
        self.run_state = self.run_state
        self.status = status
        self.migration.end()
        for client in tuple(self._clients):
            client.lose()
        self._call_line()
        for process in tuple(self._processes):
            asyncio.get_running_loop().call_soon(process.end)

    def signal(self, number: int) -> None:
        match number:
            case signal.SIGKILL if self.alive:
                self.crash(number)
            case signal.SIGTERM:
                self._terminated = True
                self._go_on()
            case signal.SIGSTOP | signal.SIGCONT:
                self.frozen = number == signal.SIGSTOP

    # --- QMP --------------------------------------------------------------------------------------------------

    async def serve(self, path: Path, on_event: OnEvent, on_lost: Callable[[], None], until: float) -> FakeMonitor:
        """Serve a client at one of its sockets, as soon as nobody else is served there."""
        while self.alive and (self.frozen or any(client.path == path for client in self._clients)):
            turn = asyncio.Event()
            self._line.append(turn)
            if not await self._host.clock.wait(turn, until):
                raise MonitorSilent(f"QEMU did not greet on {path}")
        if not self.alive:
            raise MonitorLost(f"cannot connect to QMP at {path}: the other side hung up")
        return FakeMonitor(self, self._host, path, on_event, on_lost)

    def take(self, client: FakeMonitor, request: Request) -> None:
        """Do what a client asks, once it can."""
        self._requests.append((client, request))
        self._go_on()

    def attach(self, client: FakeMonitor) -> None:
        self._clients.append(client)

    def detach(self, client: FakeMonitor) -> None:
        """It is gone, and so is what it asked and was not done."""
        self._clients.remove(client)
        for other, request in self._requests:
            if other is client and request.wire is not None:
                request.wire.close()
        self._requests = [one for one in self._requests if one[0] is not client]
        self._call_line()

    def forsake(self) -> None:
        """Whoever watched it and was served is gone, without a word."""
        self._processes.clear()
        self._clients.clear()
        self._requests.clear()
        self._call_line()

    def serves(self, client: FakeMonitor) -> bool:
        return client in self._clients

    def _go_on(self) -> None:
        if self.frozen:
            return
        self._call_line()
        self.migration.go_on()
        if self._terminated and not self.mute:
            self.shut_down("host-signal")
        while self._requests and not self.mute:
            client, request = self._requests.pop(0)
            try:
                answer = self._run(request.command, request.arguments, request.wire)
            except MonitorRefused as error:
                answer = error
            if not self.alive:
                answer = MonitorLost(f"QMP connection ended during {request.command}: the other side hung up")
            if self._host.lose_answer_to == request.command:
                self._host.lose_answer_to = None
                client.lose()
                answer = MonitorLost(f"QMP connection ended during {request.command}")
            request.end(answer)

    def _call_line(self) -> None:
        line, self._line = self._line, []
        for turn in line:
            turn.set()

    def by_hand(self, command: str) -> Any:
        """A person runs a command at the spare socket."""
        return self._run(command, None)

    def _run(self, command: str, arguments: Any, end: FakeSocket | None = None) -> Any:
        if command in self.refuses:
            raise MonitorRefused(f"QEMU refuses {command}: {self.refuses[command]}")
        answers = {
            "query-status": {"status": self.run_state, "running": self.run_state == RUNNING},
            "query-chardev": [{"label": "agent0", "frontend-open": self.agent_open, "filename": "unix"}],
            "query-block": [*self.blocks, *self.drive.block],
            "query-blockstats": [],
            "qom-get": {},
        }
        self.commands.append(command)
        given = dict(arguments or {})
        # A descriptor of a tap is no socket of a move.
        if command in MOVING and not (command == "getfd" and end is None):
            return self.migration.run(command, given, end)
        if command == "device_add" and given["driver"] == "virtio-blk-pci" and not self._host.on_record(self):
            self._host.ran_off_the_record.append(self)
        if command in PLUGGED or self.plugged.concerns(command, given):
            return self.plugged.run(command, given)
        if command in COMMANDS:
            return self._with_disks(command, self.drive.run(command, given))
        if command == "transaction":
            for action in arguments["actions"]:
                self._snapshots(action["data"]["device"]).append({"name": action["data"]["name"], "date-sec": 1})
            return {}
        if command == "blockdev-snapshot-delete-internal-sync":
            held = self._snapshots(arguments["device"])
            held[:] = [one for one in held if one["name"] != arguments["name"]]
            return {}
        if command == "block_resize":
            self._resize(arguments)
            return {}
        if command == "query-uuid":
            return {"UUID": self.argv[self.argv.index("-uuid") + 1]}
        if command in answers:
            return answers[command]
        self._do(command)
        return {}

    def _snapshots(self, node: str) -> list[dict[str, Any]]:
        (image,) = [one["inserted"]["image"] for one in self.blocks if one["inserted"]["node-name"] == node]
        held: list[dict[str, Any]] = image.setdefault("snapshots", [])
        return held

    def _with_disks(self, command: str, answer: Any) -> Any:
        if command == "query-fdsets":
            return [*answer, *({"fdset-id": number} for number in self.plugged.sets)]
        if command == "query-named-block-nodes":
            return [*answer, *({"node-name": name} for name in self.plugged.nodes)]
        return answer

    def _resize(self, arguments: Any) -> None:
        for block in self.blocks:
            if block["inserted"]["node-name"] == arguments["node-name"]:
                block["inserted"]["image"]["virtual-size"] = arguments["size"]

    def _do(self, command: str) -> None:
        match command:
            case "cont" if self.run_state == POWERED_OFF:
                raise MonitorRefused("QEMU refuses cont: Resetting the Virtual Machine is required")
            case "cont" if self.run_state == FINISHING:
                raise MonitorRefused("QEMU refuses cont: Migration is not finalized yet")
            case "cont" if self.run_state == INCOMING:
                pass
            case "cont":
                self._cont()
            case "stop" if self.run_state == RUNNING:
                self.run_state = "paused"
                self.event("STOP")
            case "system_powerdown":
                self.presses.append(self._host.clock.now())
                self.event("POWERDOWN")
                # A guest that is paused heeds it when it goes on; before it has run there is none to heed it.
                self._pressed = self.run_state != NEVER_RAN
                self._heed_button()
            case "system_reset":
                self._pressed = False
                if self.run_state not in {RUNNING, INCOMING, FINISHING}:
                    self.run_state = NEVER_RAN
                self.event("RESET", guest=False, reason="host-qmp-system-reset")
            case "quit" if not self.stubborn:
                asyncio.get_running_loop().call_soon(self.shut_down, "host-qmp-quit")
            case "stop" | "quit":
                pass
            case _:
                raise MonitorRefused(f"QEMU refuses {command}: The command {command} has not been found")

    def _cont(self) -> None:
        if not self._host.on_record(self):
            self._host.ran_off_the_record.append(self)
        if self.run_state != RUNNING:
            self.run_state = RUNNING
            self.event("RESUME")
            self._heed_button()

    def _heed_button(self) -> None:
        if self._pressed and not self.deaf and self.run_state == RUNNING:
            self._pressed = False
            clock = self._host.clock
            clock.call_at(clock.now() + 0.1, self.power_off if "-no-shutdown" in self.argv else self.shut_down)


class FakeKeeper:
    """Stands for `guard.keeper_client.Keeper`.

    Attributes:
        told: what it was told, in order.
        done: whether all was over when it was let go of; None before that.
    """

    def __init__(self, qemu: FakeQemu) -> None:
        self.told = b""
        self.done: bool | None = None
        self._qemu = qemu

    def tell(self, what: bytes) -> None:
        self.told += what

    def dismiss(self, *, done: bool) -> None:
        self.done = done
        if not done:
            self.act()

    def act(self) -> None:
        """Its supervisor is gone: it does what that has left."""
        if PAUSED in self.told and self._qemu.run_state == "paused":
            self._qemu.by_hand("cont")
        if FROZEN in self.told and not self._qemu.deaf_to_thaw:
            self._qemu.frozen_file_systems = 0


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
        return self.pid if self._watches else -1

    @property
    def _watches(self) -> bool:
        return self in self._qemu._processes

    def signal(self, number: int) -> None:
        if self._watches:
            self._qemu.signal(number)

    async def terminate(self) -> None:
        self.signal(signal.SIGTERM)
        clock = self._qemu._host.clock
        await clock.wait(self.ended, clock.now() + TERM_S)

    def close(self) -> None:
        if self._watches:
            self._qemu._processes.remove(self)

    def end(self) -> None:
        if self._watches:
            self.close()
            self.status = self._qemu.status or WaitStatus()
            self.ended.set()
            self._on_end()


class FakeMonitor:
    """Stands for `adapters.qmp.Monitor`."""

    def __init__(
        self, qemu: FakeQemu, host: FakeQemus, path: Path, on_event: OnEvent, on_lost: Callable[[], None]
    ) -> None:
        self.path = path
        self.on_event = on_event
        self._on_lost = on_lost
        self._qemu = qemu
        self._host = host
        self._lost = asyncio.Event()
        self._asked: set[Request] = set()
        qemu.attach(self)

    async def execute(
        self, command: str, arguments: object = None, *, timeout_s: float = 5.0, fd: int | None = None
    ) -> Any:
        await asyncio.sleep(0)
        if self._lost.is_set():
            raise MonitorLost(f"no QMP connection for {command}")
        request = Request(command, arguments, None if fd is None else self._host.descriptors.take(fd))
        self._asked.add(request)
        try:
            self._qemu.take(self, request)
            if not await self._host.clock.wait(request.done, self._host.clock.now() + timeout_s):
                raise MonitorSilent(f"QEMU did not answer {command}")
        finally:
            self._asked.remove(request)
        if isinstance(request.answer, Exception):
            raise request.answer
        return request.answer

    async def drained(self, timeout_s: float) -> None:
        await self._host.clock.wait(self._lost, self._host.clock.now() + timeout_s)

    async def close(self) -> None:
        self._detach("it was closed")

    def lose(self) -> None:
        """The connection ends."""
        if self._qemu.serves(self):
            self._detach("the other side hung up")
            self._on_lost()

    def _detach(self, why: str) -> None:
        if self._qemu.serves(self):
            self._qemu.detach(self)
        self._lost.set()
        for request in self._asked:
            if not request.done.is_set():
                request.end(MonitorLost(f"QMP connection ended during {request.command}: {why}"))


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
        no_keeper: what keeps a keeper from being started.
        keepers: all that were started, in order.
        network: taps and bridges.
        descriptors: sockets that QEMUs get.
        transfers: over which guests are moved.
        system: all of it.
    """

    def __init__(self, clock: FakeClock, net: FakeNet | None = None, name: str = "") -> None:
        self.clock = clock
        self.all: list[FakeQemu] = []
        self.prepare: Callable[[FakeQemu], None] = lambda qemu: None
        self.no_program: str | None = None
        self.shortage: int | None = None
        self.lose_answer_to: str | None = None
        self.on_record: Callable[[FakeQemu], bool] = lambda qemu: True
        self.ran_off_the_record: list[FakeQemu] = []
        self.no_keeper: str | None = None
        self.keepers: list[FakeKeeper] = []
        self.network = FakeNetwork()
        self.descriptors = Descriptors()
        self.transfers = FakeTransfers(net or FakeNet(clock), self.descriptors, name)
        self.system = System(
            processes=self,
            connect=self.connect,
            ask_agent=self.ask,
            freeze=self.freeze,
            thaw=self.thaw,
            keep=self.keep,
            network=self.network,
            index_of=self.network.index_of,
            ensure_device=lambda device: False,
            port_trouble=self.network.port_trouble,
            transfers=self.transfers,
        )
        self._pids = itertools.count(2_000_000_000)

    @property
    def alive(self) -> list[FakeQemu]:
        return [qemu for qemu in self.all if qemu.alive]

    @property
    def running(self) -> list[FakeQemu]:
        """Those whose guest runs."""
        return [qemu for qemu in self.alive if qemu.run_state == "running"]

    def forsake(self, run_dir: Path) -> None:
        """The supervisor of a run directory is gone, as by SIGKILL: so are its connections and its pidfds."""
        for qemu in self.alive:
            if qemu.is_in(run_dir / qemu.instance):
                qemu.forsake()

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
        enter: Callable[[], None] | None = None,
    ) -> FakeProcess:
        if self.no_program is not None:
            raise SpawnFailed(self.no_program)
        if self.shortage is not None:
            raise OSError(self.shortage, os.strerror(self.shortage))
        qemu, process = self._begin(argv, environment, pass_fds, on_end)
        if qemu.words is not None:
            os.write(log_fd, qemu.words.encode())
            qemu.end(WaitStatus(code=1))
        return process

    def spawn_in_front(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        pass_fds: Sequence[int],
        on_end: Callable[[], None],
    ) -> FakeProcess:
        if self.no_program is not None:
            raise SpawnFailed(self.no_program)
        qemu, process = self._begin(argv, environment, pass_fds, on_end)
        if qemu.run_state == NEVER_RAN and "-S" not in argv:
            qemu.run_state = "running"
        if qemu.words is not None:
            qemu.end(WaitStatus(code=1))
        return process

    def _begin(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        pass_fds: Sequence[int],
        on_end: Callable[[], None],
    ) -> tuple[FakeQemu, FakeProcess]:
        if "/" in argv[0] and not Path(argv[0]).exists():
            raise SpawnFailed(f"cannot start {argv[0]}: No such file or directory")
        qemu = FakeQemu(self, next(self._pids), argv, environment, listening(pass_fds))
        self.all.append(qemu)
        self.prepare(qemu)
        return qemu, FakeProcess(qemu, on_end, is_child=True)

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
        (qemu,) = [qemu for qemu in self.alive if qemu.sockets.get("agent0") == path]
        qemu.asked.append(self.clock.now())
        await asyncio.sleep(0)
        if qemu.agent is None:
            await self.clock.sleep(5.0)
            raise AgentSilent("no answer")
        return qemu.agent

    async def freeze(self, path: Path, *, timeout_s: float) -> int:
        qemu = self._at_agent(path)
        if qemu.file_systems is None or qemu.run_state != RUNNING:
            await self.clock.sleep(timeout_s)
            raise AgentSilent(f"the guest's agent did not answer guest-fsfreeze-freeze within {timeout_s:g} s")
        qemu.frozen_file_systems = qemu.file_systems
        return qemu.file_systems

    async def thaw(self, path: Path, *, timeout_s: float) -> int:
        qemu = self._at_agent(path)
        if qemu.deaf_to_thaw or qemu.run_state != RUNNING:
            await self.clock.sleep(timeout_s)
            raise AgentSilent("no answer")
        thawed, qemu.frozen_file_systems = qemu.frozen_file_systems, 0
        return thawed

    def _at_agent(self, path: Path) -> FakeQemu:
        (qemu,) = [qemu for qemu in self.alive if qemu.sockets.get("agent0") == path]
        return qemu

    # What stands for guard.keeper_client.

    async def keep(self, *, monitors: Sequence[Path], agent: Path, limit_s: float) -> FakeKeeper:
        await asyncio.sleep(0)
        if self.no_keeper is not None:
            raise KeeperTrouble(self.no_keeper)
        (qemu,) = [qemu for qemu in self.alive if qemu.monitors == {*monitors}]
        keeper = FakeKeeper(qemu)
        self.keepers.append(keeper)
        return keeper

    # What stands for adapters.qmp.Monitor.

    async def connect(
        self, path: str, *, on_event: OnEvent, on_lost: Callable[[], None], timeout_s: float
    ) -> FakeMonitor:
        await asyncio.sleep(0)
        # Who binds a path takes it from whoever had it, also when it ends.
        bound = next((qemu for qemu in reversed(self.all) if Path(path) in qemu.monitors), None)
        if bound is not None and bound.alive:
            return await bound.serve(Path(path), on_event, on_lost, self.clock.now() + timeout_s)
        raise MonitorLost(f"cannot connect to QMP at {path}: nobody listens")
