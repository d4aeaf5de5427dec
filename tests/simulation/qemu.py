"""One host's QEMU processes in virtual time: `tests.fakes.qemu`, with the time that QMP takes, and lives.

What a QEMU tells reaches a supervisor in its own callbacks: a frozen one hears it later, a dead one never.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Protocol

from kvmsupervisor.adapters.process import Hidden, SpawnFailed
from kvmsupervisor.adapters.qmp import MonitorLost, MonitorRefused, MonitorSilent
from kvmsupervisor.domain.ceph import Client
from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.run_state import POSTMIGRATE
from tests.fakes.migration import FakeSocket, Guest
from tests.fakes.qemu import FakeMonitor, FakeProcess, FakeQemu, FakeQemus, OnEvent, listening
from tests.fakes.transfer import FakeNet
from tests.simulation.ceph import CephCluster
from tests.simulation.clock import SimClock
from tests.simulation.loop import LIFE, Life

QMP_S = 0.02
"""The longest time one way of QMP takes."""

LATE_S = 2.0
"""How often a guest writes whose client one OSD takes for good."""

LASTS_S = (0.1, 0.3, 1.0, 3.0, 8.0, 20.0, 200.0)
"""How long memory is sent: the last one's guest writes faster than it can be."""

BOOT_S = 0.05
"""The longest time a QEMU takes until it has opened its disks, and greets."""


class Watcher(Protocol):
    """Who is told what is done to QEMUs."""

    def spawned(self, qemu: SimQemu) -> None: ...
    def continued(self, qemu: SimQemu, *, again: bool) -> None: ...
    def ended_by_us(self, qemu: SimQemu, how: str) -> None: ...
    def ended(self, qemu: SimQemu) -> None: ...


def image_of(argv: Sequence[str]) -> str | None:
    """The image in Ceph that a command line names."""
    for option, value in pairwise(argv):
        if option == "-blockdev" and (node := json.loads(value)).get("driver") == "rbd":
            return f"{node['pool']}/{node['image']}"
    return None


class SimQemu(FakeQemu):
    """One process.

    Attributes:
        host: the name of its host.
        client: its address in Ceph.
        image: in Ceph, that it writes to; None when its disk is none.
        disk: what it writes to, in Ceph or elsewhere; None without a disk.
        since: when it was spawned, virtual time.
        ran_at: when its guest was let run first; None while it was not.
        bears: whose command ended it, as far as a supervisor did.
        asked_at: when its power button was pressed first; None while it was not.
        was_hindered: whether it ever hung.
        is_arrival: whether it was started for another one's guest.
    """

    def __init__(
        self,
        kernel: SimQemus,
        pid: int,
        argv: Sequence[str],
        environment: Mapping[str, str],
        listening: Mapping[int, Path],
    ) -> None:
        self.was_hindered = False
        super().__init__(kernel, pid, argv, environment, listening)
        self.kernel = kernel
        self.host = kernel.name
        self.client = Client(f"192.0.2.{kernel.number}:0/{pid}")
        self.image = image_of(argv)
        self.disk = self.image or (self.instance if "-drive" in argv else None)
        self.since = asyncio.get_running_loop().time()
        self.ready_at = kernel.clock.now() + kernel.chance.random() * BOOT_S
        self.ran_at: float | None = None
        self.bears: list[str] = []
        self.asked_at: float | None = None
        self._held = False
        self.is_arrival = "-incoming" in argv
        self.migration.lasts_s = LASTS_S[int(kernel.chance.random() ** 1.5 * len(LASTS_S))]

    @property
    def incarnation(self) -> str:
        return self.environment["KVMSUPERVISOR_INCARNATION"]

    @property
    def writes(self) -> bool:
        """Whether its guest runs, and storage lets it write."""
        if not self.alive or self.run_state != "running":
            return False
        return self.image is None or self.kernel.ceph.may_write(self.client)

    def _go_on(self) -> None:
        self.was_hindered |= self._frozen or self._mute
        super()._go_on()

    def event(self, name: str, **data: Any) -> None:
        for monitor in tuple(self._clients):
            assert isinstance(monitor, SimMonitor)
            monitor.hear(name, data)

    def end(self, status: WaitStatus) -> None:
        if not self.alive:
            return
        self.run_state = self.run_state
        self.status = status
        self.migration.end()
        if status.code == 0:
            self.kernel.ceph.close(self.client)
        else:
            self.kernel.ceph.vanish(self.client)
        self.kernel.watcher.ended(self)
        for monitor in tuple(self._clients):
            assert isinstance(monitor, SimMonitor)
            monitor.hear_end()
        self._call_line()
        for process in tuple(self._processes):
            assert isinstance(process, SimProcess)
            process.hear_end()

    def fail_to_write(self) -> None:
        """Its guest writes to a disk that it is shut out of: QEMU stops it (`werror=stop`)."""
        ceph = self.kernel.ceph
        if not self.alive or self.run_state != "running" or not ceph.is_shut_out(self.client):
            return
        if ceph.may_write(self.client):
            # An OSD that has not heard of it yet.
            asyncio.get_running_loop().call_later(LATE_S, self.fail_to_write)
            return
        self.run_state = "io-error"
        self.event("BLOCK_IO_ERROR", action="stop")
        self.event("STOP")

    def go_on(self) -> None:
        """It hangs no more."""
        self.frozen = self.mute = False

    def pause(self) -> None:
        """Somebody stops its guest, by a QMP of his own."""
        if self.alive and self.run_state == "running":
            self.run_state = "paused"
            self._held = True
            self.event("STOP")

    def resume(self) -> None:
        """And lets it go on, also where it was reset meanwhile; one whose guest never ran is nobody's to resume."""
        if self.alive and self._held and self.run_state in {"paused", "prelaunch", POSTMIGRATE}:
            self._held = False
            self.goes_back()

    @property
    def is_held(self) -> bool:
        """Whether a person has paused its guest."""
        return self._held

    @property
    def leaving(self) -> Guest:
        return replace(super().leaving, held=self._held)

    def take_in(self, guest: Guest) -> None:
        super().take_in(guest)
        self._held = guest.held

    def goes_back(self) -> None:
        if self.image is not None:
            self.kernel.ceph.write(self.image, self.client)
        super().goes_back()
        self.kernel.watcher.continued(self, again=True)

    def vanish(self) -> None:
        """The host's power is gone: no process, and nothing is told."""
        if self.alive:
            self.run_state = self.run_state
            self.status = WaitStatus(signal=9)
            self.migration.end()
            self.kernel.ceph.vanish(self.client)
            self._clients.clear()
            self._processes.clear()
            self.kernel.watcher.ended(self)

    async def serve(self, path: Path, on_event: OnEvent, on_lost: Callable[[], None], until: float) -> FakeMonitor:
        clock = self.kernel.clock
        await clock.sleep_until(self.ready_at)
        while self.alive and (self.frozen or any(client.path == path for client in self._clients)):
            turn = asyncio.Event()
            self._line.append(turn)
            if not await clock.wait(turn, until):
                raise MonitorSilent(f"QEMU did not greet on {path}")
        if not self.alive:
            raise MonitorLost(f"cannot connect to QMP at {path}: the other side hung up")
        return SimMonitor(self, self.kernel, path, on_event, on_lost)

    def _run(self, command: str, arguments: Any, end: FakeSocket | None = None) -> Any:
        kernel = self.kernel
        if kernel.dies_at is None or kernel.dies_at[0] != command:
            return super()._run(command, arguments, end)
        (_, before), kernel.dies_at = kernel.dies_at, None
        if not before:
            super()._run(command, arguments, end)
        self.crash()
        return {}

    def _do(self, command: str) -> None:
        if command in {"quit", "system_powerdown"}:
            self.kernel.watcher.ended_by_us(self, command)
            if command == "system_powerdown" and self.asked_at is None:
                self.asked_at = asyncio.get_running_loop().time()
        super()._do(command)

    def _cont(self) -> None:
        before, again = self.run_state, self.ran_at is not None
        if self.migration.is_inactive and self.image is not None and self.kernel.ceph.is_shut_out(self.client):
            raise MonitorRefused("QEMU refuses cont: Failed to invalidate the cache: endpoint shutdown")
        super()._cont()
        if before != self.run_state:
            self.migration.is_inactive = False
            if self.image is not None:
                self.kernel.ceph.write(self.image, self.client)
            if self.ran_at is None:
                self.ran_at = asyncio.get_running_loop().time()
            self.kernel.watcher.continued(self, again=again)


class SimProcess(FakeProcess):
    """Tells its end in the life that asked for it."""

    def __init__(self, qemu: FakeQemu, on_end: Callable[[], None], *, is_child: bool) -> None:
        super().__init__(qemu, on_end, is_child=is_child)
        self.context = contextvars.copy_context()
        self.life = LIFE.get()

    def signal(self, number: int) -> None:
        qemu = self._qemu
        assert isinstance(qemu, SimQemu)
        if qemu.alive:
            qemu.kernel.watcher.ended_by_us(qemu, signal.Signals(number).name)
        super().signal(number)

    def hear_end(self) -> None:
        asyncio.get_running_loop().call_soon(self.end, context=self.context)


class SimMonitor(FakeMonitor):
    """A QMP connection that takes time."""

    def __init__(
        self, qemu: SimQemu, host: SimQemus, path: Path, on_event: OnEvent, on_lost: Callable[[], None]
    ) -> None:
        super().__init__(qemu, host, path, on_event, on_lost)
        self.context = contextvars.copy_context()
        self.life = LIFE.get()
        self._chance = host.chance

    def hear(self, name: str, data: Mapping[str, Any]) -> None:
        asyncio.get_running_loop().call_soon(self._heard, name, data, context=self.context)

    def _heard(self, name: str, data: Mapping[str, Any]) -> None:
        if not self._lost.is_set():
            self.on_event(name, data)

    def hear_end(self) -> None:
        asyncio.get_running_loop().call_soon(self.lose, context=self.context)

    async def execute(
        self, command: str, arguments: object = None, *, timeout_s: float = 5.0, fd: int | None = None
    ) -> Any:
        await asyncio.sleep(self._chance.random() * QMP_S)
        answer = await super().execute(command, arguments, timeout_s=timeout_s, fd=fd)
        await asyncio.sleep(self._chance.random() * QMP_S)
        if self._lost.is_set():
            raise MonitorLost(f"QMP connection ended during {command}")
        return answer


class SimQemus(FakeQemus):
    """The kernel of one host: it sees its own processes only.

    Args:
        name: of the host.
        number: of the host, for addresses.
        clock: its clock.
        ceph: the cluster's.
        chance: for the time that things take.
        watcher: told of what happens.
        net: over which guests are moved, the cluster's; None for one of its own.

    Attributes:
        hidden: processes that may not be looked at.
        next_words: with which the next ones end at once.
        dies_at: the QMP command at which the next QEMU that is given it ends, and whether before it is done.
        hangs_until: QEMUs that are spawned before this time, virtual, do no command until then.
        fails_until: those that are spawned before this time end at once.
    """

    def __init__(
        self,
        name: str,
        number: int,
        *,
        clock: SimClock,
        ceph: CephCluster,
        chance: Random,
        watcher: Watcher,
        net: FakeNet | None = None,
    ) -> None:
        super().__init__(clock, net, name)  # type: ignore[arg-type]
        self.name = name
        self.number = number
        self.ceph = ceph
        self.chance = chance
        self.watcher = watcher
        self.hidden: set[int] = set()
        self.next_words: list[str] = []
        self.dies_at: tuple[str, bool] | None = None
        self.hangs_until = self.fails_until = 0.0

    @property
    def living(self) -> list[SimQemu]:
        return [qemu for qemu in self.all if isinstance(qemu, SimQemu) and qemu.alive]

    def forget(self, life: Life) -> None:
        """A supervisor is gone, with its connections and its pidfds."""
        for qemu in self.living:
            for client in tuple(qemu._clients):
                if isinstance(client, SimMonitor) and client.life is life:
                    qemu.detach(client)
            qemu._processes = [one for one in qemu._processes if isinstance(one, SimProcess) and one.life is not life]
        self.transfers.net.gone(self.transfers, lambda context: context.get(LIFE) is life, silently=False)

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
        words = self.next_words.pop() if self.next_words else None
        if asyncio.get_running_loop().time() < self.fails_until:
            words = "qemu: something is wrong"
        qemu = SimQemu(self, next(self._pids), argv, environment, listening(pass_fds))
        qemu.words = words
        self.all.append(qemu)
        self.watcher.spawned(qemu)
        process = SimProcess(qemu, on_end, is_child=True)
        if qemu.image is not None:
            self.ceph.open(qemu.image, qemu.client)
        if words is not None:
            qemu.end(WaitStatus(code=1))
        left_s = self.hangs_until - qemu.since
        if left_s > 0:
            qemu.mute = True
            self.clock.call_at(self.clock.now() + left_s, qemu.go_on)
        return process

    def reopen(
        self, pid: int, *, starttime: int | None, marks: Mapping[str, str], on_end: Callable[[], None]
    ) -> FakeProcess | None:
        for qemu in self.living:
            if qemu.pid == pid and starttime in (None, qemu.starttime) and marks.items() <= qemu.environment.items():
                if pid in self.hidden:
                    raise Hidden(f"process {pid} cannot be seen")
                return SimProcess(qemu, on_end, is_child=False)
        return None

    async def connect(
        self, path: str, *, on_event: OnEvent, on_lost: Callable[[], None], timeout_s: float
    ) -> FakeMonitor:
        await asyncio.sleep(self.chance.random() * QMP_S)
        return await super().connect(path, on_event=on_event, on_lost=on_lost, timeout_s=timeout_s)
