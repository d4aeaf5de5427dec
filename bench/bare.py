"""The same QEMUs without a supervisor: spawned one by one, and from a shell loop."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.qmp import await_answers, await_run
from bench.rig import PATIENCE_S, kill

_FD = re.compile(r"\bfd=(\d+)\b")
_LOG = re.compile(r"/dev/fdset/\d+")


@dataclass(frozen=True, slots=True)
class Bare:
    """How long one spawn took, in seconds: until QEMU answered, and until its guest ran."""

    answered_s: float
    runs_s: float


def spawn(record: dict[str, Any], run_dir: Path, folder: Path) -> Bare:
    """Spawn the QEMU of an incarnation again, ask it over QMP, let its guest run, end it.

    Args:
        record: of the incarnation, which names the command line.
        run_dir: of its instance, as the command line names it.
        folder: to be used in its stead.
    """
    folder.mkdir(exist_ok=True)
    path = folder / "qmp.sock"
    path.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        # The first is QMP; the others nobody connects to.
        descriptors = []
        words = _logging_by_itself(record["argv"], folder)
        for number in range(sum(len(_FD.findall(word)) for word in words)):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            at = folder / f"{number}.sock" if number else path
            at.unlink(missing_ok=True)
            listener.bind(str(at))
            listener.listen(4)
            descriptors.append(listener.fileno())
        numbers = iter(descriptors)
        argv = [_FD.sub(lambda _: f"fd={next(numbers)}", word).replace(str(run_dir), str(folder)) for word in words]
        begun = time.monotonic()
        process = subprocess.Popen(
            argv,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
        )
    try:
        run = await_run(path, let_it=True, timeout_s=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    return Bare(run.answered_at - begun, run.runs_at - begun)


def shell_loop(records: Sequence[tuple[dict[str, Any], Path]], folder: Path, width: int) -> float:
    """Spawn all of them with `xargs -P width`, ask each over QMP, end them; return the seconds until all answered.

    QEMU's own `-daemonize` tells the shell that it is up. They are watched from the begin, as a supervisor's are: what
    that costs is in both figures.
    """
    folder.mkdir()
    lines, sockets, pid_files = [], [], []
    for record, run_dir in records:
        place = folder / run_dir.name
        place.mkdir()
        names = ("qmp.sock", "qmp2.sock", "console.sock", "agent.sock")
        argv = _confined_less(_moved(record["argv"], [f"path={place / name}" for name in names], run_dir, place))
        lines.append(shlex.join(["exec", *argv, "-daemonize", "-pidfile", str(place / "pid")]))
        sockets.append(place / "qmp2.sock")
        pid_files.append(place / "pid")
    commands = folder / "commands"
    commands.write_text("\n".join(lines) + "\n")
    try:
        begun = time.monotonic()
        with commands.open() as text:
            loop = subprocess.Popen(
                ["xargs", "-P", str(width), "-d", "\\n", "-I", "LINE", "sh", "-c", "LINE"], stdin=text
            )
        try:
            answers = await_answers(sockets, timeout_s=PATIENCE_S, poll_s=0.01)
        finally:
            status = loop.wait()
        assert status == 0, f"xargs ended with {status}"
        return max(answer.answered_at for answer in answers.values()) - begun
    finally:
        for file in pid_files:
            if file.exists():
                kill(int(file.read_text()))


def _confined_less(argv: Sequence[str]) -> list[str]:
    """The command line with as much of its sandbox as lets QEMU daemonize: it forks, and leaves its session."""
    at = argv.index("-sandbox") + 1
    kept = [word for word in argv[at].split(",") if not word.startswith(("spawn=", "elevateprivileges="))]
    return [*argv[:at], ",".join(kept), *argv[at + 1 :]]


def _logging_by_itself(argv: Sequence[str], folder: Path) -> list[str]:
    """The command line with a file for its console's log: nobody is there who would read a pipe."""
    at = [index for index, word in enumerate(argv) if word == "-add-fd"]
    kept = [word for index, word in enumerate(argv) if index not in at and index - 1 not in at]
    return [_LOG.sub(str(folder / "console.log"), word) for word in kept]


def _moved(argv: Sequence[str], monitors: Sequence[str], run_dir: Path, folder: Path) -> list[str]:
    """The command line with other sockets for its monitors, in their order, and another folder."""
    left = iter(monitors)
    words = _logging_by_itself(argv, folder)
    return [_FD.sub(lambda _: next(left), word).replace(str(run_dir), str(folder)) for word in words]
