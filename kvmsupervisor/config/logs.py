"""Logs: one JSON object per line, or coloured columns on a terminal. docs/logs.md lists the events.

Import this module before anything else that imports structlog. structlog loads rich whenever that is
installed, for tracebacks that are not wanted here: 5 MB in a daemon that has 80 for everything.

Writing never blocks the event loop. A line is put into a queue of `QUEUE_BYTES` and a thread writes it; when
whoever reads the other end stalls and the queue is full, lines are dropped and counted, and `log.lost` says
how many as soon as there is room. What a killed process had not yet written is lost; an orderly end waits for
the queue.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Protocol, TextIO, cast

from kvmsupervisor.config.values import LogFormat, LogLevel
from kvmsupervisor.domain.frozen import frozen


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Make `import name` fail inside of the block, unless it was imported before.

    None in `sys.modules` stands for a module that is known to be missing (Python reference, 5.3.1).
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = cast("ModuleType", None)
    try:
        yield
    finally:
        del sys.modules[name]


with _without("rich"):
    import structlog
    from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

QUEUE_BYTES = 1 << 20
"""What waits for a reader that stalls; arbitrary: some thousand lines, 1 % of the memory budget."""

TEXT_LIMIT = 16_384
"""Characters of one value, tracebacks included; arbitrary: strangers' text must not fill a disk."""

GATHER_S = 0.01
"""How long the first line waits for others. Every wake-up of the thread takes the interpreter from the event loop in
the midst of its work, which costs more than the line itself. Arbitrary: a person sees no difference."""

CLOSE_TIMEOUT_S = 2.0
"""How long the end of the program waits for a reader that stalls; arbitrary."""


class Stream(Protocol):
    """Where lines go: an open file, such as `sys.stderr`. Only its descriptor is used."""

    def fileno(self) -> int:
        """Return the descriptor."""
        ...


@frozen(kw_only=True)
class Rotation:
    """Keeps a log file bounded: at `limit_bytes` it becomes `<path>.1`, and a new one begins.

    Attributes:
        path: of the file that the stream has open for appending.
        limit_bytes: twice this is what the two files need at most, one line more or less. Arbitrary default:
            the run directory is usually in memory.
    """

    path: Path
    limit_bytes: int = 8 << 20


class Logs:
    """The open log. `close` it last."""

    def __init__(self, stream: Stream, rotation: Rotation | None) -> None:
        self._fd = stream.fileno()
        self._rotation = rotation
        self._changed = threading.Condition()
        # All below are guarded by _changed.
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._lost = 0
        self._closing = False
        self._gathering = False
        # A daemon thread: one that is stuck in a write must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Queue whole lines, or count them as lost. Never blocks; any thread may call it."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            if self._queued_bytes + len(data) > QUEUE_BYTES:
                self._lost += 1
                return
            self._queue.append(data)
            self._queued_bytes += len(data)
            if not self._gathering:
                self._changed.notify()

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Write what is queued, within `timeout_s`, and stop. Later lines go nowhere.

        Returns:
            Whether everything was written.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        """The thread: write batches until closed and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                self._gathering = True
                self._changed.wait_for(lambda: self._closing, GATHER_S)
                self._gathering = False
                batch = b"".join(self._queue)
                lines = len(self._queue)
                self._queue.clear()
                self._queued_bytes = 0
            if not batch:
                return
            if not self._write_all(batch):
                with self._changed:
                    self._lost += lines
                continue
            self._tell_lost()
            if self._rotation is not None:
                self._rotate(self._rotation)

    def _write_all(self, data: bytes) -> bool:
        """Write, waiting for the reader. False when that cannot be: full disk, closed pipe, lost terminal."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                # Somebody who shares the terminal or the pipe made it non-blocking.
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:
                return False
        return True

    def _tell_lost(self) -> None:
        with self._changed:
            lost, self._lost = self._lost, 0
        if lost:
            structlog.get_logger().warning("log.lost", lines=lost)

    def _rotate(self, rotation: Rotation) -> None:
        found = os.fstat(self._fd)
        if found.st_size < rotation.limit_bytes or not stat.S_ISREG(found.st_mode):
            return
        try:
            rotation.path.replace(f"{rotation.path}.1")
            fresh = os.open(rotation.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        except OSError as error:
            structlog.get_logger().error("log.rotation_failed", file=str(rotation.path), error=str(error))
            self._rotation = None
            return
        # Standard output and error share the file when a daemon runs; both move on to the new one.
        for fd in {1, 2, self._fd}:
            with suppress(OSError):
                if os.path.samestat(os.fstat(fd), found):
                    os.dup2(fresh, fd)
        os.close(fresh)
        structlog.get_logger().info("log.rotated", file=str(rotation.path), bytes=found.st_size)


def configure(
    *,
    level: LogLevel = LogLevel.INFO,
    format: LogFormat = LogFormat.AUTO,  # noqa: A002 – the setting's name
    stream: Stream | None = None,
    rotation: Rotation | None = None,
) -> Logs:
    """Set up logging for the whole process: structlog, and the standard library's for what others log.

    Others (asyncio, grpc, Python's warnings) are heard from WARNING on. Starts a thread, so call it after the last
    fork.

    Args:
        level: from which severity on our own events are written.
        format: how lines look; `auto` is console on a terminal, else JSON.
        stream: where they go; default standard error.
        rotation: for a stream that is a file of ours.
    """
    target = sys.stderr if stream is None else stream
    console = format is LogFormat.CONSOLE or (format is LogFormat.AUTO and os.isatty(target.fileno()))
    logs = Logs(target, rotation)
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        _in_order,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _bounded,
    ]
    renderer: Processor
    if console:
        shared.append(_visible)
        renderer = structlog.dev.ConsoleRenderer(
            colors=os.isatty(target.fileno()) and "NO_COLOR" not in os.environ,
            exception_formatter=structlog.dev.plain_traceback,
            sort_keys=False,
        )
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.value.upper()]),
        # A file to it is what has write and flush.
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", logs)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(logs)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, _of_library, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    return logs


def instance_logger(instance: str) -> FilteringBoundLogger:
    """A logger whose every line names the instance; bind `epoch` and `incarnation` with each incarnation."""
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger.bind(instance=instance, epoch=0, incarnation=None)


def _of_library(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Free text is no event's name: what others log is all one event."""
    return {**event, "event": "log.library", "message": event["event"]}


def _in_order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Put what every line has, the time in UTC among it, where people look first."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
    return {"timestamp": now, "level": event.pop("level"), "event": event.pop("event"), **event}


def _bounded(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > TEXT_LIMIT:
            event[key] = f"{value[:TEXT_LIMIT]}… ({len(value) - TEXT_LIMIT} characters more)"
    return event


def _visible(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Spell out control characters: strangers' text must not command the terminal. JSON escapes them."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(
                c if c.isprintable() or (key in {"exception", "stack"} and c in "\n\t") else ascii(c)[1:-1]
                for c in value
            )
    return event
