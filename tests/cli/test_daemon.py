"""`run --daemon`: the parent knows how the start went, one pid file has one living owner, the daemon is detached."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.cli.daemon import AlreadyRunningError, PidFile, run_daemon
from tests.support.readable import readable

DEADLINE_S = 30
"""A test that waits in vain fails by then; nothing is measured."""

PRELUDE = """
import json, os, resource, signal, sys, time
from pathlib import Path
from kvmsupervisor.cli.daemon import AlreadyRunningError, run_daemon

def wait_for_sigterm():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    return lambda: signal.sigwait({signal.SIGTERM})
"""

WAITS = """
def main(ready):
    wait = wait_for_sigterm()
    ready()
    wait()
    return 0
"""


class Place:
    """Where a daemon runs, and the process that starts it."""

    def __init__(self, folder: Path) -> None:
        self.pid_file = folder / "supervisor.pid"
        self.log = folder / "supervisor.log"
        self._folder = folder

    def run(self, main: str, *, timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """Start a daemon whose `main` this is; return its parent's end."""
        program = f"""{PRELUDE}{textwrap.dedent(main)}
try:
    status = run_daemon(main, pid_file=Path("supervisor.pid"), log_file=Path("supervisor.log"), timeout_s={timeout_s})
except AlreadyRunningError as error:
    sys.exit(str(error))
sys.exit(status)
"""
        return subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S,
            check=False,
            cwd=self._folder,
        )

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text())

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal the daemon and wait until it is gone."""
        pidfd = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(pidfd, number)
            assert readable(pidfd, DEADLINE_S), "the daemon did not end"
        finally:
            os.close(pidfd)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place; a daemon that a failed test left there is killed, if the file's lock says that it lives."""
    place = Place(tmp_path)
    yield place
    try:
        PidFile.acquire(place.pid_file).release()
    except AlreadyRunningError:
        place.end(signal.SIGKILL)


def test_the_parent_returns_when_the_daemon_has_started(place: Place) -> None:
    """Exit status 0 and the pid, no sooner than the daemon said so; the pid file names the same process."""
    done = place.run("""
        def main(ready):
            wait = wait_for_sigterm()
            Path("/proc/self/fd/1").resolve().with_name("reached").touch()
            ready()
            wait()
            return 0
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert place.log.with_name("reached").exists()
    assert done.stdout == f"kvmsupervisor is running: pid {place.pid}, log {place.log}\n"
    place.end()
    assert not place.pid_file.exists()


def test_the_daemon_is_detached(place: Place) -> None:
    """No terminal and no way to one, `/`, umask 022, nothing to read, one log, its parent's limits and signals."""
    done = place.run("""
        def main(ready):
            wait = wait_for_sigterm()
            fds = {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                   if os.path.exists(f"/proc/self/fd/{fd}")}
            print(json.dumps({
                "leads": os.getsid(0) == os.getpid(), "cwd": os.getcwd(), "umask": os.umask(0o22),
                "fds": fds, "core": resource.getrlimit(resource.RLIMIT_CORE), "sigint": str(signal.getsignal(2)),
            }), flush=True)
            ready()
            wait()
            return 0
    """)
    assert done.returncode == 0, done
    found: dict[str, Any] = json.loads(place.log.read_text())
    place.end()
    # A session's leader could get a terminal by opening one; after the second fork it is not the leader.
    assert found["leads"] is False
    assert found["cwd"] == "/"
    assert found["umask"] == 0o22
    assert found["fds"]["0"] == "/dev/null"
    assert found["fds"]["1"] == found["fds"]["2"] == str(place.log)
    assert "default_int_handler" in found["sigint"]

    assert tuple(found["core"]) == resource.getrlimit(resource.RLIMIT_CORE)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        ("print('KVM_LISTEN: nonsense', file=sys.stderr); return 2", "KVM_LISTEN: nonsense"),
        ("raise ValueError('boom')", "ValueError: boom"),
        ("sys.exit('no etcd')", "no etcd"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ""),
        ("return 0", ""),
    ],
    ids=["returns", "raises", "exits", "killed", "says-nothing"],
)
def test_a_failed_start_is_told_with_the_daemons_words(place: Place, main: str, words: str) -> None:
    """Whatever ends the daemon before it is ready: exit status 1, and what it wrote, but no older words."""
    place.log.write_text("words of yesterday\n")
    done = place.run(f"def main(ready):\n    {main}\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "ended before it was ready" in done.stderr
    assert words in done.stderr
    assert "yesterday" not in done.stderr
    PidFile.acquire(place.pid_file).release()


def test_a_long_log_is_cut(place: Place) -> None:
    """Of many words the last are shown."""
    done = place.run("def main(ready):\n    print('x' * 100_000); print('the end', flush=True); return 1\n")
    assert done.stderr.endswith("xxx\nthe end\n")
    assert len(done.stderr) < 10_000


def test_a_slow_start_is_not_waited_for_for_ever(place: Place) -> None:
    """Exit status 4 when time is up; the daemon goes on, and does not mind that nobody hears it any more."""
    done = place.run(
        """
        def main(ready):
            wait = wait_for_sigterm()
            wait()
            ready()
            Path("/proc/self/fd/1").resolve().with_name("went-on").touch()
            return 0
        """,
        timeout_s=1,
    )
    assert done.returncode == 4
    assert f"(pid {place.pid}) is not ready yet" in done.stderr
    place.end()
    assert place.log.with_name("went-on").exists()


class TestPidFile:
    """One pid file, one living owner."""

    def test_a_second_daemon_names_the_first(self, place: Place) -> None:
        """A live daemon is an error that names its pid and the file, and nothing happens to it."""
        assert place.run(WAITS).returncode == 0
        first = place.pid
        second = place.run(WAITS)
        assert second.returncode == 1
        assert f"pid is {first}" in second.stderr
        assert str(place.pid_file) in second.stderr
        assert place.pid == first
        place.end()

    def test_a_killed_daemons_file_is_replaced(self, place: Place) -> None:
        """After kill -9 the file is still there; the next daemon takes it over."""
        assert place.run(WAITS).returncode == 0
        first = place.pid
        place.end(signal.SIGKILL)
        assert place.pid == first
        assert place.run(WAITS).returncode == 0
        assert place.pid != first
        place.end()

    def test_a_recycled_pid_does_not_count(self, place: Place) -> None:
        """A stale file that names a living process of somebody else stops nobody."""
        place.pid_file.write_text(f"{os.getpid()}\n")
        assert place.run(WAITS).returncode == 0
        assert place.pid != os.getpid()
        place.end()

    def test_a_holder_that_has_not_written_yet(self, tmp_path: Path) -> None:
        """Between lock and pid the message makes none up."""
        path = tmp_path / "pid"
        path.write_text("4711\n")
        held = PidFile.acquire(path)
        with pytest.raises(AlreadyRunningError, match="not yet known"):
            PidFile.acquire(path)
        held.release()
        assert not path.exists()

    def test_nobody_else_can_hold_it(self, tmp_path: Path) -> None:
        """Whoever may read a file may lock it: it is its owner's only, whatever the umask, also one of before."""
        path = tmp_path / "pid"
        before = os.umask(0)
        try:
            for _ in range(2):
                held = PidFile.acquire(path)
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                held.drop()
                path.chmod(0o644)
        finally:
            os.umask(before)

    def test_a_file_removed_between_open_and_lock_is_no_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When the last owner removes the file just then, a new one is made: a lock on no file keeps nobody out."""
        path = tmp_path / "pid"
        last = PidFile.acquire(path)
        real_open, opened = os.open, 0

        def open_then_lose(file: Any, *arguments: Any, **more: Any) -> int:
            nonlocal opened
            descriptor = real_open(file, *arguments, **more)
            if file == path:
                opened += 1
                if opened == 1:
                    last.release()
            return descriptor

        monkeypatch.setattr(os, "open", open_then_lose)
        held = PidFile.acquire(path)
        assert opened == 2
        with pytest.raises(AlreadyRunningError):
            PidFile.acquire(path)
        held.release()


def test_threads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a thread has started it is too late: they would be gone in the daemon."""
    monkeypatch.setattr("threading.active_count", lambda: 2)
    with pytest.raises(RuntimeError, match="threads"):
        run_daemon(lambda ready: 0, pid_file=tmp_path / "pid", log_file=tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_opened_are_errors_of_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is forked when the pid file cannot be made."""
    monkeypatch.setattr("threading.active_count", lambda: 1)  # whatever else this test process does
    with pytest.raises(FileNotFoundError):
        run_daemon(lambda ready: 0, pid_file=tmp_path / "none" / "pid", log_file=tmp_path / "log")
