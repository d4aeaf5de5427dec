"""Logs: one JSON object per line, or coloured columns on a terminal. docs/logs.md lists the events.

Import this module before anything else that imports structlog. structlog loads rich when that is installed, for
tracebacks that are not wanted here: 5 MB in a daemon that has 80 for everything.

Writing never blocks the event loop. A line is put into a queue of `QUEUE_BYTES` and a thread writes it. When the reader
of the log stalls and the queue is full, lines are dropped and counted, and `log.lost` says how many as soon as there is
room. A killed process loses the lines in its queue; an orderly end waits for the queue.
"""

from __future__ import annotations

import json
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

    None in `sys.modules` marks a module as missing (Python reference, 5.3.1).
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
    from structlog.typing import EventDict, Processor, WrappedLogger

QUEUE_BYTES = 1 << 20
"""Size of the queue for a reader that stalls. Arbitrary: some thousand lines, 1 % of the memory budget."""

TEXT_LIMIT = 16_384
"""Characters of one value, tracebacks included. Arbitrary: text of strangers must not fill a disk."""

GATHER_S = 0.01
"""How long the first line waits for others. Each wake-up of the thread takes the interpreter from the event loop, which
costs more than the line itself. Arbitrary: a person sees no difference."""

CLOSE_TIMEOUT_S = 2.0
"""How long the end of the program waits for a reader that stalls. Arbitrary."""


class Stream(Protocol):
    """The target of the lines: an open file, such as `sys.stderr`. Only its descriptor is used."""

    def fileno(self) -> int:
        """Return the descriptor."""
        ...


@frozen(kw_only=True)
class Rotation:
    """Keeps a log file bounded: at `limit_bytes` it becomes `<path>.1`, and a new one begins.

    Attributes:
        path: of the file that the stream has open for appending.
        limit_bytes: the two files need at most twice this, and a line. The default is arbitrary: the run directory is
            usually in memory.
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
        # A daemon thread: a thread that is stuck in a write must not keep the process from ending.
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
        """Write, and wait for the reader. False when the write fails: full disk, closed pipe, lost terminal."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                # Another process that shares the terminal or pipe has made it non-blocking.
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
        # In a daemon standard output and error share the file; both move to the new one.
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
    """Set up logging for the whole process: structlog for our events, the standard library's logging for libraries.

    Libraries (asyncio, grpc, Python's warnings) are logged from WARNING on. This starts a thread: call it after the
    last fork.

    Args:
        level: lowest level of our own events.
        format: of the lines; `auto` is console on a terminal, else JSON.
        stream: target of the lines; default standard error.
        rotation: when the stream is a file of ours.
    """
    target = sys.stderr if stream is None else stream
    console = format is LogFormat.CONSOLE or (format is LogFormat.AUTO and os.isatty(target.fileno()))
    logs = Logs(target, rotation)
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        _in_order,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    renderer: Processor
    if console:
        shared += [_bounded, _visible]
        renderer = structlog.dev.ConsoleRenderer(
            colors=os.isatty(target.fileno()) and "NO_COLOR" not in os.environ,
            exception_formatter=structlog.dev.plain_traceback,
            sort_keys=False,
        )
    else:
        renderer = _as_json
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.value.upper()]),
        # The factory needs only write and flush.
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


def _of_library(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Give all lines of libraries one event name: their free text is none."""
    return {**event, "event": "log.library", "message": event["event"]}


def _in_order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Put the fields that every line has first: time in UTC, level, event."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
    return {"timestamp": now, "level": event.pop("level"), "event": event.pop("event"), **event}


_ENCODER = json.JSONEncoder(ensure_ascii=False, default=repr)


def _as_json(logger: WrappedLogger, method: str, event: EventDict) -> str:
    """One JSON object. A line that is not too long has no value that is, so the values are hardly ever looked at."""
    line = _ENCODER.encode(event)
    return line if len(line) <= TEXT_LIMIT else _ENCODER.encode(_bounded(logger, method, event))


def _bounded(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > TEXT_LIMIT:
            event[key] = f"{value[:TEXT_LIMIT]}… ({len(value) - TEXT_LIMIT} characters more)"
    return event


def _visible(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Spell out control characters: text of strangers must not control the terminal. JSON escapes them."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(
                c if c.isprintable() or (key in {"exception", "stack"} and c in "\n\t") else ascii(c)[1:-1]
                for c in value
            )
    return event
