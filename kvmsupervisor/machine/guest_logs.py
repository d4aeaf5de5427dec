"""Copies the output of guests and of QEMU from bounded memory to log files (docs/decisions/0020-logs-in-memory.md).

QEMU writes into two bounded pieces of memory: one for the serial console, one for QEMU's own messages. The supervisor
reads them after each write, and a thread writes the bytes to `console.log` and `qemu.log`. While there is no
supervisor, the first bytes stay in memory for the next one. A QEMU of an earlier release writes the files itself; those
files are truncated when they become too long.
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
"""The pause after each read, so that a flood costs at most twenty reads a second. Arbitrary; a person who types does
not notice it, because the first read comes at once."""

BUSY_BYTES, REST_S = 4096, 0.25
"""A log that grew by so many bytes rests for so long: a guest can log at most 1 MiB a second."""

SWEEP_S = 60.0
"""How often to read all logs, whether inotify reported writes or not."""

BLIND_SWEEP_S = 1.0
"""The same when no inotify instance is available."""

TAIL_BYTES = 8192
"""How many of QEMU's last bytes are kept, to find the reason of its end in them."""

MISSED = f"\r\n[output is missing here: more than {SIZE >> 10} KiB came at once]\r\n".encode()


class MachineLogs:
    """The two logs of one instance, for one QEMU after the other."""

    def __init__(self, directory: InstanceDir, *, logs: GuestLogs) -> None:
        self._directory = directory
        self._own = directory.qemu_log
        self._console = directory.console_log
        self._logs = logs
        self._buffers: dict[Path, LogBuffer] = {}
        self._watches: list[int] = []
        self._tail = b""
        # Logs that a QEMU of an earlier release writes itself.
        self._foreign: Sequence[Path] = ()

    def begin(self) -> tuple[int, int]:
        """Make both logs for a new QEMU; return the descriptors of the console's log and of QEMU's own.

        Raises:
            OSError: no file can be opened.
        """
        self.close()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for path in (self._console, self._own):
                self._buffers[path] = LogBuffer.make(path.name)
                # Makes the file, for readers that wait for it, and sets aside one of an earlier release's QEMU.
                self._logs.writer.append(path, b"")
            undo.pop_all()
        self._watch()
        return self._buffers[self._console].fd, self._buffers[self._own].fd

    def adopt(self, argv: Sequence[str], *, pid: int, pidfd: int) -> None:
        """Open the logs of a QEMU that an earlier supervisor started with that command line."""
        self.close()
        paths = (self._console, self._own)
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
        """Pass on what was written since the last call; return the number of bytes. Does not wait."""
        for path in self._foreign:
            self._logs.writer.trim(path)
        found = 0
        for path, buffer in self._buffers.items():
            try:
                data, full = buffer.take()
            except OSError:
                # No file can be opened now: the bytes stay in memory until the next call.
                continue
            if path is self._own:
                self._tail = (self._tail + data)[-TAIL_BYTES:]
            if data:
                self._logs.writer.append(path, data + MISSED if full else data)
            found += len(data)
        return found

    def tail(self, offset: int) -> list[str]:
        """QEMU's last lines; those in the log behind `offset` when QEMU ended without a supervisor.

        Lost is only what QEMU wrote after the last read of a supervisor that is gone.
        """
        self.look()
        return self._tail.decode(errors="replace").splitlines() or self._directory.log_tail(offset)

    def close(self) -> None:
        """Pass on the rest, then close both logs."""
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
    """The logs of all instances of a host.

    Args:
        clock: the machine's.
        max_bytes: the limit of one log file (`KVM_LOG_MAX_BYTES`).
        keep: how many older files are kept beside it (`KVM_LOG_KEEP`).
    """

    def __init__(self, *, clock: Clock, max_bytes: int = 1 << 20, keep: int = 3) -> None:
        self.writer = LogWriter(max_bytes=max_bytes, keep=keep)
        self._clock = clock
        self._inotify: Inotify | None = None
        self._watched: dict[int, MachineLogs] = {}
        self._unwatched: set[MachineLogs] = set()
        self._awake = asyncio.Event()

    def of(self, directory: InstanceDir) -> MachineLogs:
        """The logs of one instance."""
        return MachineLogs(directory, logs=self)

    def watch(self, logs: MachineLogs, path: str, *, follow: bool) -> int | None:
        """Read `logs` after each write to that file; None when inotify cannot watch it: then `logs` is read often."""
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
        """Stop reading `logs`, which are watched under these numbers."""
        self._unwatched.discard(logs)
        for number in numbers:
            del self._watched[number]
            if self._inotify is not None:
                self._inotify.unwatch(number)

    async def run(self) -> None:
        """Read each log after it was written to, until cancelled."""
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
        """Write the rest. All instances have closed their logs before."""
        self.writer.close()
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def _sweep_at(self, swept: float) -> float:
        return swept + (BLIND_SWEEP_S if self._unwatched else SWEEP_S)

    async def _wait(self, until: float) -> None:
        """Wait until something was written, at most until then."""
        self._awake.clear()
        if self._inotify is None:
            await self._clock.wait(self._awake, until)
            return
        loop, fd = asyncio.get_running_loop(), self._inotify.fd
        # Only while waiting: in a flood the reader would be called for every byte.
        loop.add_reader(fd, self._awake.set)
        try:
            await self._clock.wait(self._awake, until)
        finally:
            loop.remove_reader(fd)
