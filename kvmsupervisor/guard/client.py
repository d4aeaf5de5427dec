"""The supervisor's side of the guard (law 7): finds or starts it, tells it the deadline, gives it machines to watch.

`guard/program.py` is the guard itself. One task keeps it up, level-triggered: an event only wakes the task, and the
task then brings about three things. There is a guard while there is a machine to watch; the guard watches all of them;
it knows until when this host's session holds. A guard that has ended, or does not answer any more, is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never
from uuid import uuid4

import structlog

from kvmsupervisor import __version__
from kvmsupervisor.adapters import process as kernel
from kvmsupervisor.adapters.cgroup import CgroupFailed, CgroupManager
from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.guard_channel import PROTOCOL, Channel, ChannelLost, ChannelRefused
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import Limits

log = structlog.get_logger(__name__)

PROGRAM = Path(__file__).with_name("program.py")

MARK = "KVMSUPERVISOR_GUARD"
"""The environment variable that identifies a guard (law 8); its value is the run directory."""

HOME = InstanceId("_guard")
"""The name of its cgroup. No instance id begins with an underscore."""

ANSWER_S = 2.0
"""How long a guard may take to answer; it takes less than a millisecond. One that takes longer is replaced."""

START_S = 10.0
"""How long a new guard may take for its first answer: it takes 30 ms, or seconds on a loaded host."""

WATCH_S = 3.0
"""How long a worker waits for its machine to be put under guard before it looks at other things again."""

END_S = 5.0
"""How long a killed guard may take to end."""

RETRY_S = 1.0
"""Pause after a guard could not be started. Arbitrary; short, because machines that wait for it do not run."""


class Unguarded(Exception):
    """The machine is not under guard: try again later. The message says why."""


class _Trouble(Exception):
    """There is no guard now. The message says why."""


@frozen(kw_only=True)
class Charge:
    """One machine to watch: a pidfd of our own, and the file in which the guard notes that it killed the machine."""

    pidfd: int
    note: Path


@dataclass(slots=True, kw_only=True)
class _Line:
    """A guard with an open channel.

    Attributes:
        process: of the guard.
        channel: to the guard.
        holds: the machines that the guard has confirmed on this channel.
        told: the last deadline that the guard was told on this channel.
        outdated: whether the guard is of another version.
    """

    process: kernel.Process
    channel: Channel
    holds: set[str] = field(default_factory=set)
    told: float | None = None
    outdated: bool = False


class GuardClient:
    """Keeps the guard up while there is a machine to watch.

    Args:
        run_dir: locked by this supervisor.
        clock: the machine's.
        cgroups: makes cgroups outside the supervisor's container.
        ttl_s: of this host's session.
        notify: called, in the event loop, when machines come under guard or are no longer under guard.
        version: of this program; a guard of another version is replaced.

    Attributes:
        trouble: why there is no guard, although one is wanted; None when there is one.
        unlocked: why the guard's memory is not locked; None when it is locked, or there is no guard.
    """

    def __init__(
        self,
        *,
        run_dir: RunDir,
        clock: Clock,
        cgroups: CgroupManager,
        ttl_s: float,
        notify: Callable[[], None],
        version: str = __version__,
    ) -> None:
        self.trouble: str | None = None
        self.unlocked: str | None = None
        self._run_dir = run_dir
        self._clock = clock
        self._cgroups = cgroups
        self._ttl_s = ttl_s
        self._notify = notify
        self._version = version
        self._charges: dict[str, Charge] = {}
        # Machines that live, and that the guard is to be told to forget.
        self._leaving: set[str] = set()
        # Until when the session holds; None before this supervisor has confirmed it once.
        self._until: float | None = None
        self._line: _Line | None = None
        # A living guard without a channel: not connected yet, or it does not answer.
        self._mute: kernel.Process | None = None
        self._looked = False
        self._wake = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []

    # --- what it is told and asked ----------------------------------------------------------------------------

    def renewed(self, until: float) -> None:
        """Note that the session was confirmed and holds until then, CLOCK_BOOTTIME. Does not block."""
        self._until = until
        self._wake.set()

    def holds(self, incarnation: str) -> bool:
        """Whether the guard watches that machine."""
        return self._line is not None and incarnation in self._line.holds

    async def watch(self, incarnation: str, *, pidfd: int, note: Path) -> None:
        """Put a machine under guard; return once it is. It stays under guard, also of a later one, until `release`.

        Raises:
            Unguarded: the machine is not under guard yet.
        """
        self._leaving.discard(incarnation)
        if incarnation not in self._charges:
            try:
                self._charges[incarnation] = Charge(pidfd=os.dup(pidfd), note=note)
            except OSError as error:
                raise Unguarded(f"its process cannot be handed over: {error.strerror}") from error
        if not self.holds(incarnation):
            await self._attempt()
        if not self.holds(incarnation):
            raise Unguarded(self.trouble or "the guard is being started")

    async def forget(self, incarnation: str) -> None:
        """Have the guard watch a machine no more that lives on: storage can fence all that it may write to by now.

        Raises:
            Unguarded: the guard may still watch it.
        """
        self.release(incarnation)
        self._leaving.add(incarnation)
        await self._attempt()
        if incarnation in self._leaving:
            raise Unguarded("the guard does not let it go: it is of another release, or does not answer")

    def release(self, incarnation: str) -> None:
        """Forget a machine that has ended. The guard sees its end by itself."""
        charge = self._charges.pop(incarnation, None)
        if charge is not None:
            os.close(charge.pidfd)
        if self._line is not None:
            self._line.holds.discard(incarnation)

    async def caught_up(self) -> None:
        """Return once the guard has written down what it did until now, or does not answer."""
        if self._line is not None:
            with contextlib.suppress(Unguarded):
                await self._attempt()

    async def dismiss(self) -> None:
        """Stop a guard left by an earlier supervisor, because KVM_UNFENCED=pin wants none. Machines live on."""
        self._find()
        if self._mute is None:
            return
        self._mute.signal(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._mute.ended.wait()
        log.info("guard.dismissed", pid=self._mute.pid, reason="KVM_UNFENCED is pin")
        self.close()

    def close(self) -> None:
        """Close the channel. The guard goes on."""
        for incarnation in tuple(self._charges):
            self.release(incarnation)
        if self._line is not None:
            self._line.channel.close()
            self._line.process.close()
            self._line = None
        if self._mute is not None:
            self._mute.close()
            self._mute = None

    async def _attempt(self) -> None:
        """Wait until the guard knows everything that is wanted now.

        Raises:
            Unguarded: there is no guard, or it takes too long.
        """
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._wake.set()
        try:
            async with asyncio.timeout(WATCH_S):
                await waiter
        except TimeoutError as error:
            raise Unguarded("the guard is being started, or does not answer") from error

    # --- the task ---------------------------------------------------------------------------------------------

    async def run(self) -> Never:
        """Keep the guard up, for ever. Cancelling leaves the guard as it is."""
        while True:
            self._wake.clear()
            waiting, self._waiting = self._waiting, []
            try:
                await self._bring_up()
            except _Trouble as error:
                self._tell_trouble(str(error))
                for waiter in waiting:
                    if not waiter.done():
                        waiter.set_exception(Unguarded(str(error)))
                await self._clock.sleep(RETRY_S)
            else:
                self.trouble = None
                for waiter in waiting:
                    if not waiter.done():
                        waiter.set_result(None)
                await self._clock.wait(self._wake)

    async def _bring_up(self) -> None:
        """One turn of the task. It may be cut off anywhere; the next turn goes on.

        Raises:
            _Trouble: there is no guard now.
        """
        if not self._looked:
            self._looked = True
            self._find()
        if self._line is not None and self._line.process.ended.is_set():
            self._lose("it has ended")
        if self._mute is not None and self._mute.ended.is_set():
            self._mute = None
        if self._line is None and self._mute is not None:
            await self._connect(self._mute)
        if self._line is None and self._mute is None:
            self._leaving.clear()  # nobody watches them
        if self._line is not None:
            try:
                greeting = await self._tell(self._line)
            except (ChannelLost, ChannelRefused) as error:
                self._lose(str(error))
            else:
                # A machine that only the guard knows (a record of another release) would be lost with it.
                if self._line.outdated and set(greeting[4:]) <= self._charges.keys():
                    await self._begin(self._line.process)
        if self._line is None and self._charges:
            await self._begin(self._mute)

    async def _tell(self, line: _Line) -> list[str]:
        """Tell a guard what it does not know yet; return its greeting, as evidence that it is alive.

        Raises:
            ChannelLost, ChannelRefused: the guard does not take it.
        """
        for name, charge in tuple(self._charges.items()):
            # The machine may have been released meanwhile, and its descriptor reused.
            if name not in line.holds and name in self._charges:
                await line.channel.ask(f"watch {name} {charge.note}", charge.pidfd, timeout_s=ANSWER_S)
                if name in self._charges:
                    line.holds.add(name)
        for name in tuple(self._leaving):
            await line.channel.ask(f"forget {name}", timeout_s=ANSWER_S)
            self._leaving.discard(name)
        until = self._until
        if until is not None and until != line.told:
            await line.channel.ask(f"until {until!r}", timeout_s=ANSWER_S)
            line.told = until
        return (await line.channel.ask("hello", timeout_s=ANSWER_S)).split()

    # --- finding one, starting one ----------------------------------------------------------------------------

    def _find(self) -> None:
        """Find a guard that an earlier supervisor has started: by pidfd, start time and environment (law 8)."""
        found = self._run_dir.guard()
        if found is not None:
            pid, starttime = found
            marks = {MARK: str(self._run_dir.path)}
            self._mute = kernel.reopen(pid, starttime=starttime, marks=marks, on_end=self._wake.set)

    async def _connect(self, process: kernel.Process) -> None:
        """Connect to a living guard. One that does not answer, or answers something unknown, will be replaced."""
        try:
            channel = Channel.connect(self._run_dir.guard_socket)
            greeting = (await channel.ask("hello", timeout_s=ANSWER_S)).split()
        except (ChannelLost, ChannelRefused) as error:
            log.warning("guard.silent", pid=process.pid, reason=str(error))
            return
        if greeting[:2] != ["guard", str(PROTOCOL)]:
            channel.close()
            log.warning("guard.not_understood", pid=process.pid, reason=" ".join(greeting[:3]))
            return
        version = greeting[2]
        self._line = _Line(process=process, channel=channel, outdated=version != self._version)
        self._mute = None
        self._note_memory(int(greeting[3]))
        log.info("guard.found", pid=process.pid, version=version, machines=len(greeting) - 4)
        self._notify()

    async def _begin(self, former: kernel.Process | None) -> None:
        """Start a guard. It replaces `former`, if there is one.

        Raises:
            _Trouble: no guard could be started.
        """
        if self._until is None:
            # There was no guard until now: kill no machine before this supervisor had time to find its session.
            self._until = self._clock.now() + self._ttl_s
        try:
            line = await self._start()
        except (CgroupFailed, kernel.SpawnFailed, OSError) as error:
            raise _Trouble(f"the guard cannot be started: {error}") from error
        replaces = former if former is not None and former.pidfd >= 0 else None
        try:
            await line.channel.ask("hello", timeout_s=START_S)
            greeting = await self._tell(line)
            await line.channel.ask("take", None if replaces is None else replaces.pidfd, timeout_s=START_S)
        except (ChannelLost, ChannelRefused) as error:
            line.channel.close()
            line.process.signal(signal.SIGKILL)
            raise _Trouble(f"the guard that was started does not do its work: {error}") from error
        if self._line is not None:
            self._line.channel.close()
        self._line, self._mute = line, None
        self._note_memory(int(greeting[3]))
        log.info("guard.started", pid=line.process.pid, replaces=None if replaces is None else replaces.pid)
        self._notify()

    async def _start(self) -> _Line:
        """Start the program, as a candidate.

        Raises:
            CgroupFailed, SpawnFailed, OSError: it could not be started.
        """
        files = self._run_dir
        with contextlib.ExitStack() as always, contextlib.ExitStack() as on_error:
            channel, theirs = Channel.pair()
            on_error.callback(channel.close)
            always.callback(theirs.close)
            log_fd = files.open_guard_log()
            always.callback(os.close, log_fd)
            cgroup = await self._cgroups.prepare(HOME, str(uuid4()), Limits())
            always.callback(cgroup.close)
            words = [sys.executable, "-I", "-S", str(PROGRAM), str(theirs.fileno())]
            process = kernel.spawn(
                cgroup.wrap([*words, str(files.guard_lock), str(files.guard_socket), self._version]),
                environment={MARK: str(files.path), "PATH": os.environ.get("PATH", os.defpath)},
                log_fd=log_fd,
                pass_fds=[theirs.fileno()],
                on_end=self._wake.set,
                stdin=cgroup.stdin,
                enter=cgroup.enter,
            )
            on_error.callback(process.signal, signal.SIGKILL)
            await cgroup.settle(process.pid)
            on_error.pop_all()
            return _Line(process=process, channel=channel)

    # --- its end ----------------------------------------------------------------------------------------------

    def _lose(self, why: str) -> None:
        """Note that the guard does not answer. While its process lives, a new guard has to replace it."""
        assert self._line is not None
        line, self._line = self._line, None
        line.channel.close()
        if not line.process.ended.is_set():
            self._mute = line.process
        self.unlocked = None
        if line.holds:
            log.error("guard.lost", pid=line.process.pid, reason=why, machines=len(line.holds))
            self._notify()

    def _tell_trouble(self, trouble: str) -> None:
        if self.trouble != trouble:
            log.error("guard.missing", reason=trouble, machines=len(self._charges))
        self.trouble = trouble

    def _note_memory(self, errno: int) -> None:
        self.unlocked = None if errno == 0 else os.strerror(errno)
        if self.unlocked is not None:
            log.error(
                "guard.memory_unlocked",
                reason=f"{self.unlocked}: while the host is short of memory the guard may come too late; give the "
                "container CAP_IPC_LOCK, or --ulimit memlock=-1",
            )
