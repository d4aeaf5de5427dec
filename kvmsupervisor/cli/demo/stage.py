"""The demo's child processes and its temporary folder: started here, and removed here.

Every process of the demo has the folder's name in its command line or its environment. By that name the last sweep
finds processes that are still there: a QEMU outlives its supervisor on purpose.
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from kvmsupervisor.adapters.process import command_line_of, environment_of

T = TypeVar("T")

TAIL_LINES = 12
"""Lines of a log that an error shows. Arbitrary: a traceback's end fits."""

LOOK_S = 0.05
"""How often to look at a log; `tail -f` does the same, less often."""

SWEEP_DEADLINE_S = 10.0
"""How long to wait for processes to be gone after SIGKILL: a moment, but the machine may be busy."""

PLACE_LIMIT = 12
"""Longest path, in bytes, of the folder around the demo's: 28 of KVM_RUN_DIR, less `/kvsXXXXXXXX/run`."""

FOREIGN = ("KVM_", "ETCD_", "ETCDCTL_", "VM_")
"""Prefixes of variables that would change what the children do."""

FOREIGN_NAMES = ("LOCK", "BRIDGE_IF", "INSTANCE", "SPICE_PORT", "EXTRA_FLAGS", "NOTIFY_SOCKET")


class DemoError(Exception):
    """A step of the demo failed; the message names the step, and has the end of its log."""


class ChildEnded(DemoError):
    """A program that should run has ended.

    Attributes:
        child: the program.
        code: its exit code; negative: the signal that ended it.
    """

    def __init__(self, child: Child, code: int, doing: str) -> None:
        super().__init__(child.with_log(f"ended with exit code {code}, {doing}"))
        self.child = child
        self.code = code


class Child:
    """A program that runs in a session of its own, so that Ctrl-C reaches the demo only, and writes to a log."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, name: str, command: Sequence[str], *, environ: Mapping[str, str], folder: Path) -> Child:
        """Start a program that logs to `<folder>/<name>.log`.

        Raises:
            DemoError: it is not installed.
        """
        log = folder / f"{name}.log"
        with log.open("ab") as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    env=environ,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as error:
                raise DemoError(f"{name} cannot be started: {command[0]}: {error.strerror}") from error
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.returncode is None

    @property
    def output(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")

    def with_log(self, what: str) -> str:
        """A sentence about the program, and the end of its log."""
        lines = self.output.splitlines()[-TAIL_LINES:]
        said = "\n".join(f"  {line}" for line in lines) if lines else "  (nothing)"
        return f"{self.name}: {what}; the last lines of its log:\n{said}"

    async def wait(self) -> int:
        """Wait for its end; return its exit code."""
        return await self._process.wait()

    async def stop(self, *, deadline_s: float, by: signal.Signals = signal.SIGTERM) -> bool:
        """End it and its process group: by SIGTERM, then by SIGKILL. Return whether SIGTERM was enough."""
        if self._process.returncode is not None:
            return True
        self._signal(by)
        try:
            async with asyncio.timeout(deadline_s):
                await self._process.wait()
                return True
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self._process.wait()
            return False

    def _signal(self, number: signal.Signals) -> None:
        # It leads its session. asyncio may reap it, in a thread of its own, a moment before its end is known here.
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


async def while_alive(
    children: Sequence[Child], work: Awaitable[T], *, doing: str, deadline_s: float | None = None
) -> T:
    """Do `work` as long as all `children` run, and not longer than `deadline_s`.

    Args:
        children: the programs that the work needs; the most important one last.
        work: cancelled when it cannot be done.
        doing: words for errors: "waiting for …".
        deadline_s: None to go on for ever.

    Raises:
        ChildEnded: one of them ended.
        DemoError: time is up.
    """
    task = asyncio.ensure_future(work)
    ends = {asyncio.ensure_future(child.wait()): child for child in children}
    try:
        done, _ = await asyncio.wait({task, *ends}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in (task, *ends):
            future.cancel()
        await asyncio.gather(task, *ends, return_exceptions=True)
    if task in done:
        return task.result()
    for end, child in ends.items():
        if end in done:
            raise ChildEnded(child, end.result(), doing)
    raise DemoError(children[-1].with_log(f"{doing} took longer than {deadline_s:g} s"))


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without variables for another supervisor or another etcd."""
    return {
        name: value for name, value in environ.items() if not name.startswith(FOREIGN) and name not in FOREIGN_NAMES
    }


def free_ports(number: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 on which no program listens now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def make_folder() -> Path:
    """A new folder, below TMPDIR if that is short, because the sockets of an instance must fit below it."""
    place = tempfile.gettempdir()
    if len(place) > PLACE_LIMIT:
        place = "/tmp"  # noqa: S108 - mkdtemp takes care of what is wrong with it
    folder = Path(tempfile.mkdtemp(prefix="kvs", dir=place))
    # mkdtemp's are private, and QEMU may run as a user of its own.
    folder.chmod(0o755)
    return folder


def clear_away(folder: Path) -> list[str]:
    """Kill all processes that still bear the folder's name, delete the folder; return the programs that were killed."""
    with ExitStack() as stack:
        left = list(_bearing(str(folder), stack))
        for pidfd, _ in left:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        deadline = time.monotonic() + SWEEP_DEADLINE_S
        for pidfd, _ in left:
            # A pidfd becomes readable when its process ends, pidfd_open(2).
            gone = select.poll()
            gone.register(pidfd, select.POLLIN)
            gone.poll(max(0.0, deadline - time.monotonic()) * 1000)
    shutil.rmtree(folder, ignore_errors=True)
    return [program for _, program in left]


def _bearing(name: str, stack: ExitStack) -> Iterator[tuple[int, str]]:
    """Processes with `name` in their command line or environment: a pidfd, which `stack` closes, and the program."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or (pid := int(entry.name)) == os.getpid():
            continue
        # Opened before the process is looked at: a pid that is given again meanwhile is not hit.
        with suppress(ProcessLookupError), ExitStack() as unless_kept:
            pidfd = os.pidfd_open(pid)
            unless_kept.callback(os.close, pidfd)
            command = command_line_of(pid)
            # What may not be read belongs to another user, and is empty here.
            if any(name in word for word in (*command, *environment_of(pid).values())):
                stack.push(unless_kept.pop_all())
                yield pidfd, Path(command[0]).name if command else entry.name


async def follow_lines(path: Path) -> AsyncGenerator[str]:
    """Yield the lines of a log as they come, for ever. It may not exist yet, and may be cut off and begun anew."""
    position, rest = 0, b""
    while True:
        position, data = _read_on(path, position)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")
        if not data:
            await asyncio.sleep(LOOK_S)


def _read_on(path: Path, position: int) -> tuple[int, bytes]:
    """What a file holds behind `position`, and the next position."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(position if position <= size else 0)
            data = file.read()
            return file.tell(), data
    except FileNotFoundError:
        return 0, b""
