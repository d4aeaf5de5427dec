"""`run --daemon`: detaches by python-daemon, with a pid file, and tells the waiting parent when it has started.

Call `run_daemon` before any thread starts and before gRPC or an event loop exist: none of them survives a
fork (https://github.com/grpc/grpc/blob/master/doc/fork_support.md).
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, NoReturn

import click
from daemon import DaemonContext

STARTED, FAILED, TIMED_OUT = 0, 1, 4
"""The parent's exit statuses, a part of the command's."""

START_TIMEOUT_S = 60.0
"""How long the parent waits until the daemon is ready. Arbitrary: a start that needs etcd takes seconds."""

READY = b"ready\n"
"""The daemon's message to its parent when it has started."""

LAST_WORDS_BYTES = 8192
"""How much of the log the parent shows when the daemon failed. Arbitrary: a screen or two."""

Main = Callable[[Callable[[], None]], int]
"""The daemon's work: it gets `ready`, calls that once when it has started, and returns its exit status."""


class AlreadyRunningError(Exception):
    """Another daemon holds the pid file: leave it alone, or stop it first."""


class PidFile:
    """A pid file that is locked (flock) as long as its process lives.

    The lock decides, not the file: a file that a killed daemon left is taken over. The lock belongs to the open file,
    so it passes from the parent, which takes it, to the daemon, which keeps it.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file

    @classmethod
    def acquire(cls, path: Path) -> PidFile:
        """Lock `path`; make it if it is missing.

        Raises:
            AlreadyRunningError: another process holds the lock; the message names its pid.
            OSError: the file cannot be opened.
        """
        while True:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "a+b")
            with suppress(PermissionError):
                # A user that can read a file can lock it (flock(2)): only we can, also a file of an earlier release.
                os.fchmod(file.fileno(), 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    pid = file.read(32).decode(errors="replace").strip() or "not yet known"
                raise AlreadyRunningError(
                    f"{path}: a supervisor is already running, its pid is {pid}; stop it first, or give this one "
                    "a run directory of its own (KVM_RUN_DIR)"
                ) from None
            # Its last holder may have removed the file between our open and our lock: then we hold another file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    return cls(path, file)
            file.close()

    def fileno(self) -> int:
        """The descriptor that holds the lock."""
        return self._file.fileno()

    def write(self, pid: int) -> None:
        """Write the pid of the process that holds the lock from now on. Only the lock counts: a full disk is fine."""
        with suppress(OSError):
            os.write(self.fileno(), b"%d\n" % pid)

    def release(self) -> None:
        """Remove the file, then release the lock."""
        self._path.unlink(missing_ok=True)
        self._file.close()

    def drop(self) -> None:
        """Close this process's descriptor; the daemon may go on holding the lock."""
        self._file.close()


def run_daemon(main: Main, *, pid_file: Path, log_file: Path, timeout_s: float = START_TIMEOUT_S) -> int:
    """Run `main` as a daemon, and wait in the calling process until it has started.

    The daemon has a session of its own, `/` as its working directory, umask 022, its standard output and
    error appended to `log_file`, and default signal handlers (`main` sets its own). It keeps the limits of
    its parent. Settings that are relative paths must be made absolute first.

    Args:
        main: see `Main`. Only the daemon runs it.
        pid_file: locked by the daemon while it lives, removed at its end.
        log_file: made if it is missing. The caller sees what is written there before the daemon is ready, if it fails.
        timeout_s: how long to wait until the daemon is ready, seconds.

    Returns:
        In the calling process: `STARTED`, `FAILED` (with the daemon's own words on standard error) or
        `TIMED_OUT` (the daemon goes on). In the daemon it does not return, but ends by SystemExit.

    Raises:
        AlreadyRunningError: see `PidFile.acquire`.
        OSError: a file cannot be opened.
        RuntimeError: the process has threads already, see the module.
    """
    if threading.active_count() > 1:
        raise RuntimeError("a process with threads cannot become a daemon: they would be gone after the fork")
    pid_file, log_file = pid_file.absolute(), log_file.absolute()
    log_file.touch(mode=0o640)
    with log_file.open("ab") as log:
        held = PidFile.acquire(pid_file)
        words_begin = log.tell()
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _daemon(main, held, log, writer)
    os.close(writer)
    # The daemon's copy keeps the lock.
    held.drop()
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        status, pid = _await_word(pipe, timeout_s)
    # The child that was forked here ends as soon as python-daemon has forked again.
    os.waitpid(child, 0)
    _report(status, pid, log_file, words_begin)
    return status


def _daemon(main: Main, held: PidFile, log: BinaryIO, writer: int) -> NoReturn:
    """In the child: detach, run `main`, and end."""
    DaemonContext(
        working_directory="/",
        umask=0o022,
        # The event loop installs its own handlers; python-daemon's would end the program at any point.
        signal_map={},
        # python-daemon would set the hard limit to 0, for every QEMU, too: the operator decides about core dumps.
        prevent_core=False,
        # Explicit: by default python-daemon guesses from the parent process.
        detach_process=True,
        files_preserve=[held.fileno(), writer],
        stdout=log,
        stderr=log,
    ).open()
    pid = os.getpid()
    held.write(pid)
    _say(writer, b"%d\n" % pid)

    def ready() -> None:
        _say(writer, READY)
        os.close(writer)

    try:
        status = main(ready)
    finally:
        held.release()
    sys.exit(status)


def _say(writer: int, word: bytes) -> None:
    # The parent may have been interrupted or timed out: no reason for the daemon to end.
    with suppress(BrokenPipeError):
        os.write(writer, word)


def _await_word(pipe: RawIOBase, timeout_s: float) -> tuple[int, str]:
    """In the parent: read the daemon's pid, then `READY`; return the status, and the pid if it came."""
    deadline = time.monotonic() + timeout_s
    heard = b""
    while not heard.endswith(READY):
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return TIMED_OUT, _pid_in(heard)
        part = pipe.read(64)
        if not part:  # the other end is closed: the daemon has ended
            return FAILED, _pid_in(heard)
        heard += part
    return STARTED, _pid_in(heard)


def _pid_in(heard: bytes) -> str:
    return heard.partition(b"\n")[0].decode() or "unknown"


def _report(status: int, pid: str, log_file: Path, words_begin: int) -> None:
    """Tell the person at the terminal the outcome."""
    if status == STARTED:
        click.echo(f"kvmsupervisor is running: pid {pid}, log {log_file}")
        return
    with log_file.open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(words_begin, end - LAST_WORDS_BYTES))
        words = log.read().decode(errors="replace").strip()
    if status == TIMED_OUT:
        click.echo(f"kvmsupervisor (pid {pid}) is not ready yet; it goes on trying, see its log {log_file}", err=True)
    else:
        click.echo(f"kvmsupervisor (pid {pid}) ended before it was ready; log {log_file}", err=True)
    if words:
        click.echo(f"its last words:\n{words}", err=True)
