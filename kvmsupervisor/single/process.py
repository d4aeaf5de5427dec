"""One QEMU with its user's own options, on our own standard streams: started, asked over QMP, shut down, its end told.

It knows nothing of locks. Whether its guest begins to run is the caller's business: see `paused`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path

import structlog

from kvmsupervisor.adapters import process as kernel
from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.qmp import Monitor, MonitorError
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.lifecycle import POWERDOWN_EVERY_S, QUIT_WAIT_S
from kvmsupervisor.domain.secrecy import cleaned, secrets_in

log = structlog.get_logger(__name__)

CONFIG = """\
[chardev "kvmsupervisor"]
  backend = "socket"
  fd = "{fd}"
  server = "on"
  wait = "off"

[mon "kvmsupervisor"]
  mode = "control"
  chardev = "kvmsupervisor"
"""
"""A QMP monitor, in the syntax of -readconfig (qemu-system-x86_64(1)). The options -mon and -qmp would do the same, and
QEMU would leave out the monitor that it has by default."""

ANSWER_S = 5.0
"""How long one QMP exchange may take. A healthy QEMU answers in milliseconds; a loaded host needs seconds."""

RECONNECT_S = 0.25
"""Pause between attempts to connect to a QEMU that lives."""


class Rung(IntEnum):
    """How far up the ladder of a stop. Each signal climbs one."""

    RUN = 0
    ASK = 1
    QUIT = 2
    KILL = 3


def exit_status(status: WaitStatus) -> int:
    """As shells have it: the exit code, or 128 and the signal's number; 1 when nobody knows."""
    if status.signal is not None:
        return 128 + status.signal
    return 1 if status.code is None else status.code


class Foreground:
    """The QEMU process.

    Attributes:
        ended: set once it has ended.
    """

    def __init__(self, *, program: str, options: Sequence[str], clock: Clock, shutdown_timeout_s: float) -> None:
        self.ended = asyncio.Event()
        self._program = program
        self._options = tuple(options)
        self._clock = clock
        self._shutdown_timeout_s = shutdown_timeout_s
        self._process: kernel.Process | None = None
        self._monitor: Monitor | None = None
        self._rung = Rung.RUN
        # Set by whatever a stop waits for: its end, and more haste.
        self._wake = asyncio.Event()
        self._folder = Path()

    @property
    def started(self) -> bool:
        """Whether there is, or was, a process."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Of the process, once it was started."""
        assert self._process is not None
        return self._process.pid

    @property
    def starttime(self) -> int:
        """Of the process, clock ticks since boot."""
        assert self._process is not None
        return self._process.starttime

    @property
    def status(self) -> int:
        """What to exit with, once it has ended."""
        assert self._process is not None
        return exit_status(self._process.status)

    @property
    def wants_to_wait(self) -> bool:
        """Whether its user wants it paused, or to wait for a migration: its guest is not ours to let run then."""
        return any(option in {"-S", "--S", "-incoming", "--incoming"} for option in self._options)

    def start(self, marks: Mapping[str, str], *, paused: bool) -> None:
        """Start it.

        Args:
            marks: environment variables beyond our own, by which it is known.
            paused: whether its guest shall not run before `go_on`.

        Raises:
            SpawnFailed: it cannot be started at all.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="kvmsupervisor-"))
        directory = InstanceDir(self._folder)
        with directory.listen(directory.qmp_socket) as qmp:
            config = self._folder / "qmp.cfg"
            config.write_text(CONFIG.format(fd=qmp.fileno()))
            ours = ["-readconfig", str(config), *(["-S"] if paused else [])]
            self._process = kernel.spawn_in_front(
                [self._program, *ours, *self._options],
                environment={**os.environ, **marks},
                pass_fds=[qmp.fileno()],
                on_end=self._on_end,
            )

    def _on_end(self) -> None:
        self.ended.set()
        self._wake.set()

    async def answers(self) -> bool:
        """Return once it answers on QMP: its devices are there then. False when it ended first.

        It has no deadline: whoever started it sees what it does, and may stop it.
        """
        while not self.ended.is_set():
            try:
                monitor = self._monitor or await self._connect()
                # QEMU greets before its devices are there.
                await monitor.execute("query-status", timeout_s=ANSWER_S)
            except MonitorError as error:
                log.debug("qmp.not_yet", error=str(error))
                await self._clock.wait(self.ended, self._clock.now() + RECONNECT_S)
            else:
                return True
        return False

    async def _connect(self) -> Monitor:
        socket = str(self._folder / "qmp.sock")
        self._monitor = await Monitor.connect(
            socket, on_event=lambda name, data: None, on_lost=self._on_lost, timeout_s=ANSWER_S
        )
        return self._monitor

    def _on_lost(self) -> None:
        self._monitor = None

    async def go_on(self) -> None:
        """Let its guest run."""
        if not await self._command("cont"):
            log.error("qemu.not_continued", reason="QEMU did not take `cont`; see above")

    async def _command(self, command: str) -> bool:
        """Run a QMP command; False when it was not done."""
        try:
            monitor = self._monitor or await self._connect()
            await monitor.execute(command, timeout_s=ANSWER_S)
        except MonitorError as error:
            if not self.ended.is_set():
                log.warning("qmp.failed", command=command, error=cleaned(str(error), secrets_in(self._options)))
            return False
        return True

    # --- the end ----------------------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Climb one rung: ask the guest, tell QEMU to end, kill it."""
        self._rung = Rung(min(self._rung + 1, Rung.KILL))
        self._wake.set()

    def kill(self) -> None:
        """SIGKILL, at once."""
        if self._process is not None:
            self._process.signal(signal.SIGKILL)

    async def shut_down(self) -> None:
        """Press the power button until it has ended, or until more is called for; then end it. Returns with its end."""
        self._rung = max(self._rung, Rung.ASK)
        force_at = self._clock.now() + self._shutdown_timeout_s
        while self._rung is Rung.ASK and not self.ended.is_set() and self._clock.now() < force_at:
            await self._command("system_powerdown")
            await self._pause(min(force_at, self._clock.now() + POWERDOWN_EVERY_S))
        self._rung = max(self._rung, Rung.QUIT)
        if not self.ended.is_set() and self._rung is Rung.QUIT:
            log.warning("qemu.forced", reason="its guest did not shut down in time, QEMU is told to end")
            if not await self._command("quit") and self._process is not None:
                self._process.signal(signal.SIGTERM)
            await self._pause(self._clock.now() + QUIT_WAIT_S)
        if not self.ended.is_set():
            self.kill()
        await self.ended.wait()

    async def _pause(self, until: float) -> None:
        if not self.ended.is_set():
            await self._clock.wait(self._wake, until)
            self._wake.clear()

    async def close(self) -> None:
        """Let go of what belongs to it."""
        if self._monitor is not None:
            monitor, self._monitor = self._monitor, None
            await monitor.close()
        if self._process is not None:
            self._process.close()
        if self._folder != Path():
            shutil.rmtree(self._folder, ignore_errors=True)
