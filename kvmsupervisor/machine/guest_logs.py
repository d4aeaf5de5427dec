"""What guests and their QEMUs write, into files that cannot hurt (docs/decisions/0020-logs-in-memory.md).

QEMU writes into two bounded pieces of memory, one for the serial console, one for what it says itself. As soon as it
has, they are read, and a thread writes it to `console.log` and `qemu.log`, files of our own. Without a supervisor what
came first stays in memory for the next one. A QEMU of an earlier release writes these files by itself: they are cut.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.inotify import Inotify
from kvmsupervisor.adapters.log_buffer import SIZE, LogBuffer, numbers_of
from kvmsupervisor.adapters.log_writer import LogWriter
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.argv import logs_into_memory

log = structlog.get_logger(__name__)

TURN_S = 0.05
"""The pause after each look, so that a flood costs twenty looks a second. Arbitrary; a person who types does not see
it, because the first look comes at once."""

BUSY_BYTES, REST_S = 4096, 0.25
"""Who has written so much since the last look is left alone for a while: so a guest logs 1 MiB a second at most."""

SWEEP_S = 60.0
"""How often all logs are looked at, whatever was told of them."""

BLIND_SWEEP_S = 1.0
"""The same where nobody can tell (no inotify left)."""

TAIL_BYTES = 8192
"""How much of QEMU's last words is kept for the reason of its end."""

MISSED = f"\r\n[output is missing here: more than {SIZE >> 10} KiB came at once]\r\n".encode()


class MachineLogs:
    """Both logs of one instance, of one QEMU after the other."""

    def __init__(self, directory: InstanceDir, *, logs: GuestLogs) -> None:
        self._directory = directory
        self._logs = logs
        self._buffers: dict[Path, LogBuffer] = {}
        self._watches: list[int] = []
        self._tail = b""
        # Those that a QEMU of an earlier release writes.
        self._foreign: Sequence[Path] = ()

    def begin(self) -> tuple[int, int]:
        """Make them for a QEMU to come; return the descriptors of the console's, and of its own.

        Raises:
            OSError: no file can be opened.
        """
        self.close()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for path in (self._directory.console_log, self._directory.qemu_log):
                self._buffers[path] = LogBuffer.make(path.name)
                # For whoever waits for it; and one that a QEMU of an earlier release has written goes aside.
                self._logs.writer.append(path, b"")
            undo.pop_all()
        self._watch()
        return self._buffers[self._directory.console_log].fd, self._buffers[self._directory.qemu_log].fd

    def adopt(self, argv: Sequence[str], *, pid: int, pidfd: int) -> None:
        """Take those that a QEMU has which an earlier supervisor started, with that command line."""
        self.close()
        paths = (self._directory.console_log, self._directory.qemu_log)
        if logs_into_memory(argv):
            try:
                numbers = numbers_of(pid, [path.name for path in paths])
                for path in paths:
                    self._buffers[path] = LogBuffer.of_process(pidfd, numbers.get(path.name, -1))
            except OSError as error:
                log.warning(
                    "log.out_of_reach",
                    instance=self._directory.path.name,
                    reason=f"{error.strerror}; it takes Linux 5.6 and CAP_SYS_PTRACE",
                )
        else:
            self._foreign = paths
        self._watch()
        self.look()

    def look(self) -> int:
        """Hand on what was written since the last time; return how many bytes. Does not wait."""
        for path in self._foreign:
            self._logs.writer.trim(path)
        found = 0
        for path, buffer in self._buffers.items():
            try:
                data, full = buffer.take()
            except OSError:
                # No file can be opened just now: it stays there until the next look.
                continue
            if path == self._directory.qemu_log:
                self._tail = (self._tail + data)[-TAIL_BYTES:]
            if data:
                self._logs.writer.append(path, data + MISSED if full else data)
            found += len(data)
        return found

    def tail(self, offset: int) -> list[str]:
        """QEMU's last words; from its log behind `offset` where it has ended without a supervisor.

        Nothing is lost but what it said after the last look of a supervisor that is gone.
        """
        self.look()
        return self._tail.decode(errors="replace").splitlines() or self._directory.log_tail(offset)

    def close(self) -> None:
        """Let go of them, once what was written is handed on."""
        self.look()
        self._logs.forget(self, self._watches)
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers, self._watches, self._foreign, self._tail = {}, [], (), b""

    def _watch(self) -> None:
        watched = [(buffer.path, True) for buffer in self._buffers.values()]
        for path, follow in (*watched, *((str(path), False) for path in self._foreign)):
            number = self._logs.watch(self, path, follow=follow)
            if number is not None:
                self._watches.append(number)


class GuestLogs:
    """Those of all instances of a host.

    Args:
        clock: the machine's.
        max_bytes: how long a log may become (`KVM_LOG_MAX_BYTES`).
        keep: how many are kept that were set aside (`KVM_LOG_KEEP`).
    """

    def __init__(self, *, clock: Clock, max_bytes: int = 1 << 20, keep: int = 3) -> None:
        self.writer = LogWriter(max_bytes=max_bytes, keep=keep)
        self._clock = clock
        self._inotify: Inotify | None = None
        self._watched: dict[int, MachineLogs] = {}
        self._unwatched: set[MachineLogs] = set()
        self._awake = asyncio.Event()

    def of(self, directory: InstanceDir) -> MachineLogs:
        """Those of one instance."""
        return MachineLogs(directory, logs=self)

    def watch(self, logs: MachineLogs, path: str, *, follow: bool) -> int | None:
        """Have `logs` looked at when that file was written to; None where nobody can tell: then it is looked often."""
        try:
            if self._inotify is None:
                self._inotify = Inotify()
                self._awake.set()
            number = self._inotify.watch(path, follow=follow)
        except OSError as error:
            if not self._unwatched:
                log.warning("log.not_watched", file=path, reason=error.strerror or str(error))
            self._unwatched.add(logs)
            self._awake.set()
            return None
        self._watched[number] = logs
        return number

    def forget(self, logs: MachineLogs, numbers: Sequence[int]) -> None:
        """Look at `logs` no more, which were watched under these numbers."""
        self._unwatched.discard(logs)
        for number in numbers:
            del self._watched[number]
            if self._inotify is not None:
                self._inotify.unwatch(number)

    async def run(self) -> None:
        """Look at each log when it was written to, until cancelled."""
        due: dict[MachineLogs, float] = {}
        swept = -SWEEP_S
        while True:
            await self._wait(min([self._sweep_at(swept), *due.values()]))
            now = self._clock.now()
            written = set() if self._inotify is None else self._inotify.written()
            if written is None or now >= self._sweep_at(swept):
                found, swept = {*self._watched.values(), *self._unwatched}, now
            else:
                found = {self._watched[number] for number in written if number in self._watched}
            for logs in found:
                due.setdefault(logs, now)
            for logs in [one for one, at in due.items() if at <= now]:
                if self.writer.has_room and logs.look() < BUSY_BYTES:
                    del due[logs]
                else:
                    due[logs] = now + REST_S
            await self._clock.sleep(TURN_S)

    def close(self) -> None:
        """Have the rest written; all instances have let go of theirs."""
        self.writer.close()
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def _sweep_at(self, swept: float) -> float:
        return swept + (BLIND_SWEEP_S if self._unwatched else SWEEP_S)

    async def _wait(self, until: float) -> None:
        """Until something was written, or until then."""
        self._awake.clear()
        if self._inotify is None:
            await self._clock.wait(self._awake, until)
            return
        loop, fd = asyncio.get_running_loop(), self._inotify.fd
        # Not all the time: in a flood it would be called for every byte.
        loop.add_reader(fd, self._awake.set)
        try:
            await self._clock.wait(self._awake, until)
        finally:
            loop.remove_reader(fd)
