"""Logs: lines that programs can read, that never block, and that strangers' text cannot bend."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from kvmsupervisor.config.logs import (
    QUEUE_BYTES,
    TEXT_LIMIT,
    Logs,
    Rotation,
    configure,
)
from kvmsupervisor.config.values import LogFormat, LogLevel

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Logging is the process's own: put it back as pytest set it up."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def logged(path: Path, happen: Callable[[], None], **options: Any) -> list[str]:
    """The lines that `happen` leaves in a log."""
    with path.open("ab") as stream:
        logs = configure(stream=stream, **options)
        happen()
        assert logs.close()
    return path.read_text().splitlines()


def events(path: Path, happen: Callable[[], None], **options: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged(path, happen, format=LogFormat.JSON, **options)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_a_line_is_an_object_with_time_level_and_event(path: Path) -> None:
    """The time is UTC with milliseconds; time, level and event come first."""
    (line,) = logged(path, lambda: structlog.get_logger().info("supervisor.started", pid=7), format=LogFormat.JSON)
    assert re.match(
        r'{"timestamp": "20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "level": "info", "event": "supervisor.started", ',
        line,
    )
    assert json.loads(line)["pid"] == 7


def test_a_file_gets_json_by_itself(path: Path) -> None:
    """What is no terminal gets JSON lines without being told."""
    (line,) = logged(path, lambda: structlog.get_logger().info("supervisor.started"))
    assert json.loads(line)["event"] == "supervisor.started"


def test_a_terminal_gets_columns() -> None:
    """A terminal gets text, in colours unless NO_COLOR is set."""
    controller, terminal = os.openpty()
    with os.fdopen(controller, "rb") as seen, os.fdopen(terminal, "wb") as stream:
        logs = configure(stream=stream)
        structlog.get_logger().info("supervisor.started", pid=7)
        assert logs.close()
        line = os.read(seen.fileno(), 1000)
    assert line.startswith(b"\x1b[")
    assert b"supervisor.started" in line


def test_levels(path: Path) -> None:
    """Events below the level are not written."""

    def happen() -> None:
        for name in ("debug", "info", "warning", "error"):
            getattr(structlog.get_logger(), name)("supervisor.started")

    assert [e["level"] for e in events(path, happen, level=LogLevel.WARNING)] == ["warning", "error"]


def test_an_exception_is_text_in_its_line(path: Path) -> None:
    """A traceback stays in the line of its event."""

    def happen() -> None:
        try:
            int("boom")
        except ValueError:
            structlog.get_logger().exception("instance.error")

    (event,) = events(path, happen)
    assert event["exception"].startswith("Traceback")
    assert event["exception"].endswith("ValueError: invalid literal for int() with base 10: 'boom'")


def test_what_libraries_log_comes_along(path: Path) -> None:
    """From WARNING on, as one event, with the library's name; Python's own warnings too."""

    def happen() -> None:
        logging.getLogger("asyncio").info("not this")
        logging.getLogger("asyncio").error("that: %s", 5)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)  # catch_warnings undid what configure did
            logging.captureWarnings(True)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
            logging.captureWarnings(False)

    first, second = events(path, happen)
    assert (first["event"], first["logger"], first["message"]) == ("log.library", "asyncio", "that: 5")
    assert second["logger"] == "py.warnings"
    assert "old" in second["message"]


@pytest.mark.parametrize("hostile", ["a\nb", "\x1b[2J", "\udcff", "\u202e", '"}', "\x00", "é😀"])
def test_strangers_text_is_one_value_in_json(path: Path, hostile: str) -> None:
    """No text breaks the line or the object."""
    (event,) = events(path, lambda: structlog.get_logger().info("instance.ended", reason=hostile))
    assert event["reason"] == hostile


def test_strangers_text_does_not_command_the_terminal(path: Path) -> None:
    """On the console control characters are spelled out, wherever they come from."""

    def happen() -> None:
        structlog.get_logger().info("instance.ended", reason="x\x1b[2J\r\u202e")
        logging.getLogger("other").error("y\x1b[2J\nz")
        try:
            fail("\x1b[2J")
        except ValueError:
            structlog.get_logger().exception("instance.error")

    lines = logged(path, happen, format=LogFormat.CONSOLE)
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"x\x1b[2J\r\u202e".replace("\\", "\\\\") in lines[0] or r"x\x1b[2J\r\u202e" in lines[0]
    assert r"y\x1b[2J\nz".replace("\\", "\\\\") in lines[1] or r"y\x1b[2J\nz" in lines[1]
    assert lines[-1] == r"ValueError: \x1b[2J"


def fail(message: str) -> None:
    raise ValueError(message)


def test_values_are_bounded(path: Path) -> None:
    """A megabyte of text takes TEXT_LIMIT characters, and says how many it had."""
    (event,) = events(path, lambda: structlog.get_logger().info("instance.invalid", problems="x" * 1_000_000))
    assert event["problems"] == "x" * TEXT_LIMIT + f"… ({1_000_000 - TEXT_LIMIT} characters more)"


def test_any_value_can_be_logged(path: Path) -> None:
    """What JSON does not know is written as Python would show it."""
    (event,) = events(path, lambda: structlog.get_logger().info("instance.error", found={"a": b"\xff", 1: {2}}))
    assert event["found"] == {"a": "b'\\xff'", "1": "{2}"}


def test_a_reader_that_stalls_blocks_nobody() -> None:
    """With nobody reading the pipe, logging goes on; what did not fit is counted, and told when there is room."""
    reader, writer = os.pipe()
    lines = 3 * QUEUE_BYTES // 10_000
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "wb") as stream:
        logs = configure(stream=stream, format=LogFormat.JSON)
        for number in range(lines):
            structlog.get_logger().info("instance.pending", number=number, text="x" * 10_000)
        assert not logs.close(timeout_s=0)
        received: list[dict[str, Any]] = []
        # The thread is stuck in this pipe: reading what it held frees it, and the loss is told behind it.
        while not received or received[-1]["event"] != "log.lost":
            received.append(json.loads(pipe.readline()))
        assert logs.close(timeout_s=20)
    numbers = [event["number"] for event in received[:-1]]
    assert numbers == sorted(numbers)
    assert len(numbers) + received[-1]["lines"] == lines
    assert received[-1]["lines"] > 0


def test_a_reader_that_left_ends_nothing() -> None:
    """A closed pipe loses lines, no more."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as stream:
        logs = configure(stream=stream)
        os.close(reader)
        for _ in range(3):
            structlog.get_logger().info("supervisor.started")
        assert logs.close()


def test_a_pipe_that_somebody_made_non_blocking() -> None:
    """All lines arrive, though writing to it can fail half way."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "wb") as stream:
        logs = configure(stream=stream, format=LogFormat.JSON)
        for number in range(40):
            structlog.get_logger().info("instance.pending", number=number, text="x" * 10_000)
        assert [json.loads(pipe.readline())["number"] for _ in range(40)] == list(range(40))
        assert logs.close()


def test_lines_from_many_threads_stay_whole(path: Path) -> None:
    """Lines are never mixed, whoever writes them."""

    def happen() -> None:
        threads = [
            threading.Thread(target=lambda: [structlog.get_logger().info("x.y", text="z" * 500) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(events(path, happen)) == 200


def test_after_close_nothing_is_written(path: Path) -> None:
    """A late line is dropped, not an error."""
    with path.open("ab") as stream:
        logs = configure(stream=stream)
        assert logs.close()
        structlog.get_logger().info("supervisor.stopped")
    assert path.read_text() == ""


class TestRotation:
    """A log file of our own stays bounded."""

    def test_a_full_file_is_set_aside(self, path: Path) -> None:
        """At its limit the file is renamed, a new one begins and says so; no line is lost on the way."""
        rotation = Rotation(path=path, limit_bytes=2_000)

        def happen() -> None:
            structlog.get_logger().info("instance.pending", text="x" * 3_000)

        with path.open("ab") as stream:
            logs = configure(stream=stream, rotation=rotation)
            happen()
            wait_for_line(path, "log.rotated")
            structlog.get_logger().info("supervisor.stopping")
            assert logs.close()
        (old,) = Path(f"{path}.1").read_text().splitlines()
        assert json.loads(old)["event"] == "instance.pending"
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == [
            "log.rotated",
            "supervisor.stopping",
        ]

    def test_a_folder_that_cannot_be_written_stops_the_rotation_only(self, path: Path) -> None:
        """When the file cannot be set aside, logging goes on in it, and says so once."""
        Path(f"{path}.1").mkdir()
        (Path(f"{path}.1") / "full").touch()

        def happen() -> None:
            for _ in range(3):
                structlog.get_logger().info("instance.pending", text="x" * 3_000)
            wait_for_line(path, "log.rotation_failed")

        found = [event["event"] for event in events(path, happen, rotation=Rotation(path=path, limit_bytes=2_000))]
        assert found.count("instance.pending") == 3
        assert found.count("log.rotation_failed") == 1

    def test_standard_output_and_error_move_together(self, tmp_path: Path) -> None:
        """A daemon's descriptors 1 and 2 both go on in the new file: a crash report is not written into the old."""
        path = tmp_path / "log"
        program = (
            "import os, sys, pathlib, structlog; from kvmsupervisor.config.logs import Rotation, configure\n"
            f"logs = configure(rotation=Rotation(path=pathlib.Path({str(path)!r}), limit_bytes=2000))\n"
            "structlog.get_logger().info('instance.pending', text='x' * 3000)\n"
            "sys.stdin.read(); logs.close(); os.write(1, b'from stdout\\n'); os.write(2, b'from stderr\\n')\n"
        )
        with (
            path.open("ab") as stream,
            subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=stream, stderr=stream, cwd=ROOT
            ) as process,
        ):
            wait_for_line(path, "log.rotated")
            process.communicate(timeout=60)
        assert process.returncode == 0
        assert path.read_text().splitlines()[-2:] == ["from stdout", "from stderr"]


def wait_for_line(path: Path, event: str) -> None:
    """Return when the log holds the event; the test's own timeout ends a wait in vain."""
    while event not in text_of(path):
        threading.Event().wait(0.005)


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # between two files
        return ""


def test_rich_is_not_loaded() -> None:
    """The daemon does not pay for tracebacks that it does not draw; rich can be imported afterwards all the same."""
    program = """
import sys
import kvmsupervisor.config.logs
assert not [m for m in sys.modules if m.startswith('rich')]
import rich.table
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True, cwd=ROOT)


def test_every_event_is_documented() -> None:
    """Programs match on event names: each that the source logs stands in docs/logs.md."""
    call = re.compile(r"\.(?:debug|info|warning|error|exception|critical)\(\s*\"([a-z]+\.[a-z_]+)\"")
    used = {name for file in (ROOT / "kvmsupervisor").rglob("*.py") for name in call.findall(file.read_text())}
    assert "log.rotated" in used
    documented = set(re.findall(r"`([a-z]+\.[a-z_]+)`", (ROOT / "docs" / "logs.md").read_text()))
    assert used - documented == set()


def test_logs_is_a_file_to_its_loggers(path: Path) -> None:
    """Flushing is asked for by those who write, and needs nothing."""
    with path.open("ab") as stream:
        logs = Logs(stream, None)
        logs.write("a line\n")
        logs.flush()
        assert logs.close()
    assert path.read_text() == "a line\n"
