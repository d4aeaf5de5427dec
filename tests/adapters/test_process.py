"""Processes through pidfds: spawned, found again, told apart, and how they ended, with real ones."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvmsupervisor.adapters import process as kernel
from kvmsupervisor.adapters.process import (
    Hidden,
    Process,
    SpawnFailed,
    find,
    is_alive,
    pid_namespace,
    reopen,
    spawn,
    spawn_in_front,
)
from kvmsupervisor.domain.exits import WaitStatus
from tests.support.processes import stat_of

LIMIT_S = 10.0
MARKS = {"KVMSUPERVISOR_INSTANCE": "1", "KVMSUPERVISOR_INCARNATION": "x y=z"}
Spawn = Callable[..., Process]


def nothing() -> None:
    """Nobody needs to be told."""


async def ended(process: Process) -> WaitStatus:
    async with asyncio.timeout(LIMIT_S):
        await process.ended.wait()
    return process.status


def become(pid: int, state: str | None) -> None:
    """Wait in this very turn of the loop until /proc says so of a process; None: until it is gone."""
    for _ in range(5000):
        if state_of(pid) == state:
            return
        select.select([], [], [], 0.002)
    raise AssertionError(f"process {pid} is {state_of(pid)}, not {state}")


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """The open descriptors of a process and what they are; that of the listing itself is closed by then."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = str(entry.readlink())
    return found


def environment_of(pid: int) -> dict[str, str]:
    variables = Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").rstrip("\0").split("\0")
    return dict(variable.split("=", 1) for variable in variables)


def folder_of(pid: int) -> str:
    return str(Path(f"/proc/{pid}/cwd").readlink())


async def until(true: Callable[[], object]) -> None:
    """Poll what only the kernel knows."""
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110 - /proc has no events
            await asyncio.sleep(0.005)


def state_of(pid: int) -> str | None:
    stat = stat_of(pid)
    return None if stat is None else stat.state


async def begun(process: Process) -> None:
    """Wait until its environment can be read: the kernel shows it a moment after the program has begun."""
    environment = Path(f"/proc/{process.pid}/environ")
    await until(environment.read_bytes)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Spawn]:
    """`spawn` with defaults; what still runs at the end is killed and reaped."""
    made: list[Process] = []

    def go(
        *argv: str,
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        on_end: Callable[[], None] = nothing,
        log: Path = tmp_path / "log",
    ) -> Process:
        log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            process = spawn(
                argv, environment=environment or dict(MARKS), log_fd=log_fd, pass_fds=pass_fds, on_end=on_end
            )
        finally:
            os.close(log_fd)
        made.append(process)
        return process

    yield go
    for process in made:
        process.signal(signal.SIGKILL)
        if process._pidfd >= 0:
            await ended(process)


# --- its end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 7, 255])
async def test_an_exit_status_is_told(start: Spawn, code: int) -> None:
    """Law: the exit status reaches whoever spawned it."""
    assert await ended(start("/bin/sh", "-c", f"exit {code}")) == WaitStatus(code=code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
async def test_a_deadly_signal_is_told(start: Spawn, number: signal.Signals) -> None:
    """Law: killed is not exited; signals go through the pidfd."""
    process = start("/bin/sleep", "60")
    process.signal(number)
    assert await ended(process) == WaitStatus(signal=number)


async def test_one_that_ended_before_anybody_looked_is_told_too(start: Spawn) -> None:
    """Law: there is no instant too early to end."""
    process = start("/bin/true")
    become(process.pid, "Z")
    assert await ended(process) == WaitStatus(code=0)


async def test_its_end_is_told_once_and_after_the_facts(start: Spawn) -> None:
    """Law: when `on_end` is called, the status is there; it is called once."""
    seen: list[WaitStatus] = []
    process: Process = start("/bin/sh", "-c", "exit 3", on_end=lambda: seen.append(process.status))
    await ended(process)
    await asyncio.sleep(0)
    assert seen == [WaitStatus(code=3)]


async def test_nothing_is_left_of_it(start: Spawn) -> None:
    """Law: no zombie and no descriptor stay behind, and signalling it now harms nobody."""
    before = descriptors().keys()
    process = start("/bin/true")
    await ended(process)
    assert state_of(process.pid) is None
    assert descriptors().keys() == before
    process.signal(signal.SIGKILL)
    process.close()


async def test_closing_lets_it_go_on(start: Spawn) -> None:
    """Law: a supervisor that lets go touches nothing, and is told nothing any more."""
    told: list[str] = []
    process = start("/bin/sleep", "60", on_end=lambda: told.append("end"))
    await begun(process)
    process.close()
    process.close()
    assert is_alive(process.pid, process.starttime)
    again = reopen(process.pid, starttime=process.starttime, marks=MARKS, on_end=nothing)
    assert again is not None
    again.signal(signal.SIGKILL)
    await ended(again)
    os.waitpid(process.pid, os.WNOHANG)  # noqa: ASYNC222 - it does not wait
    assert told == []


# --- its surroundings -----------------------------------------------------------------------------------------


async def test_a_session_of_its_own_and_nothing_inherited(start: Spawn, tmp_path: Path) -> None:
    """Law: it outlives us: own session, standard input from nowhere, only what was passed, only its environment."""
    read, write = os.pipe()
    leaked = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        # Stopped by its own words: before that, its loader may still have a library open.
        process = start("/bin/sh", "-c", "kill -STOP $$", pass_fds=[write])
        become(process.pid, "T")
        fds = descriptors(process.pid)
        assert os.getsid(process.pid) == process.pid
        assert fds.keys() == {0, 1, 2, write}
        assert (fds[0], fds[1], fds[2]) == ("/dev/null", str(tmp_path / "log"), str(tmp_path / "log"))
        assert fds[write].startswith("pipe:")
        assert environment_of(process.pid) == MARKS
        assert folder_of(process.pid) == "/"
    finally:
        for descriptor in (read, write, leaked):
            os.close(descriptor)


async def test_what_it_says_is_in_the_log(start: Spawn, tmp_path: Path) -> None:
    """Law: both outputs, in order, appended."""
    (tmp_path / "log").write_text("before\n")
    await ended(start("/bin/sh", "-c", "echo out; echo err >&2"))
    assert (tmp_path / "log").read_text() == "before\nout\nerr\n"


@pytest.mark.parametrize(
    ("program", "why"),
    [("/nonexistent/qemu", "No such file or directory"), ("/etc/passwd", "Permission denied"),
     ("qemu-that-is-nowhere", "No such file or directory"), ("/", "Permission denied")],
)  # fmt: skip
async def test_what_cannot_be_started_is_named(start: Spawn, program: str, why: str) -> None:
    """Law: the message names the program and says why."""
    with pytest.raises(SpawnFailed, match=rf"^cannot start {program}: .*{why}"):
        start(program)


async def test_what_cannot_be_watched_is_not_kept(start: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: without a pidfd there is no process: it is killed and reaped, not left to itself."""

    def refused(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", refused)
    with pytest.raises(OSError, match="Too many open files"):
        start("/bin/sleep", "61.25", environment={"KVS_UNWATCHED": "1"})
    assert list(find({"KVS_UNWATCHED": "1"})) == []


async def test_a_shortage_is_no_sign_that_a_process_has_gone(start: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor to look with, what lives is not taken for gone: it would be started a second time."""
    process = start("/bin/sleep", "60")
    await begun(process)

    def refused(*args: object, **more: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for function in ("pidfd_open", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refused)
            assert is_alive(process.pid, process.starttime)
            with pytest.raises(Hidden, match="Too many open files"):
                reopen(process.pid, starttime=process.starttime, marks=MARKS, on_end=nothing)


# --- found again (law 8) --------------------------------------------------------------------------------------


async def test_the_same_process_is_found_again(start: Spawn) -> None:
    """Law 8: pid, start time and environment agree; also when the start time was never recorded."""
    process = start("/bin/sleep", "60")
    await begun(process)
    for starttime in (process.starttime, None):
        again = reopen(process.pid, starttime=starttime, marks=MARKS, on_end=nothing)
        assert again is not None
        assert (again.pid, again.starttime) == (process.pid, process.starttime)
        again.close()


async def test_a_recycled_pid_is_not_it(start: Spawn) -> None:
    """Law 8: the same pid with another start time is another process; nothing stays open."""
    process = start("/bin/sleep", "60")
    await begun(process)
    before = descriptors().keys()
    assert reopen(process.pid, starttime=process.starttime + 1, marks=MARKS, on_end=nothing) is None
    assert not is_alive(process.pid, process.starttime - 1)
    assert is_alive(process.pid, process.starttime)
    assert descriptors().keys() == before


@pytest.mark.parametrize(
    "marks",
    [{"KVMSUPERVISOR_INSTANCE": "2"}, {**MARKS, "MORE": "1"}, {"KVMSUPERVISOR_INSTANCE": ""}, {"INSTANCE": "1"}],
)
async def test_a_foreign_process_is_not_it(start: Spawn, marks: dict[str, str]) -> None:
    """Law 8: every mark must be there, whole."""
    process = start("/bin/sleep", "60")
    await begun(process)
    assert reopen(process.pid, starttime=process.starttime, marks=marks, on_end=nothing) is None
    assert process.pid not in find(marks)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**31, 2**80])
def test_a_pid_that_cannot_be_is_nobody(pid: int) -> None:
    """Law: whatever a record or a lock says, nobody is hurt."""
    assert reopen(pid, starttime=1, marks={}, on_end=nothing) is None
    assert not is_alive(pid, 1)


async def test_the_dead_are_not_found(start: Spawn) -> None:
    """Law 8: neither a zombie nor a pid that is gone."""
    gone = start("/bin/true")
    await ended(gone)
    assert reopen(gone.pid, starttime=gone.starttime, marks=MARKS, on_end=nothing) is None
    assert not is_alive(gone.pid, gone.starttime)
    zombie = start("/bin/true")
    become(zombie.pid, "Z")
    assert reopen(zombie.pid, starttime=zombie.starttime, marks={}, on_end=nothing) is None
    assert not is_alive(zombie.pid, zombie.starttime)


async def test_it_is_found_by_its_environment(start: Spawn) -> None:
    """Law 8: a process whose pid was never recorded is found by its marks."""
    process = start("/bin/sleep", "60", environment={**MARKS, "KVS_TEST": str(os.getpid())})
    start("/bin/sleep", "60")
    await until(lambda: list(find({**MARKS, "KVS_TEST": str(os.getpid())})) == [process.pid])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
async def test_one_that_may_not_be_looked_at_is_not_taken_for_gone(start: Spawn) -> None:
    """Law 8: root that may not read a living process's environment knows nothing of it; what ended is gone."""
    process = start("setpriv", "--reuid=65534", "--clear-groups", "/bin/sleep", "60")
    await begun(process)
    await until(lambda: Path(f"/proc/{process.pid}").stat().st_uid == 65534)
    look = (
        "import asyncio; from kvmsupervisor.adapters.process import Hidden, find, reopen\n"
        "async def main(pid, starttime):\n"
        "    try: print(reopen(pid, starttime=starttime, marks={'A': 'b'}, on_end=print))\n"
        "    except Hidden as error: print(error)\n"
        "    print(list(find({'A': 'b'})))\n"
    )

    def ask(starttime: int) -> list[str]:
        argv = ("setpriv", "--bounding-set=-all,+dac_override", "--inh-caps=-all", sys.executable, "-c")
        code = f"{look}asyncio.run(main({process.pid}, {starttime}))"
        done = subprocess.run([*argv, code], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    said, found = ask(process.starttime)
    assert f"process {process.pid} lives where its QEMU was" in said
    assert f"/proc/{process.pid}/environ: Permission denied" in said
    assert "CAP_SYS_PTRACE" in said
    assert found == "[]"
    assert ask(process.starttime + 1) == ["None", "[]"]
    process.signal(signal.SIGKILL)
    await ended(process)
    assert ask(process.starttime) == ["None", "[]"]


# --- orphans: the end of a process that is not our child ------------------------------------------------------

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
print(child.pid, flush=True)
if sys.argv[1] == "stay":
    sys.stdin.readline()
    child.wait()
    sys.stdin.readline()
"""


@pytest.fixture
def parents() -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start a parent with a child: it dies at once, or stays and reaps when it is written to."""
    made = []

    def go(fate: str, *argv: str) -> tuple[subprocess.Popen[str], int]:
        parent = subprocess.Popen(
            [sys.executable, "-S", "-c", PARENT, fate, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=MARKS,
        )
        made.append(parent)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        # The kernel shows an environment a moment after the program has begun.
        for _ in range(5000):
            if Path(f"/proc/{pid}/environ").read_bytes():
                break
            select.select([], [], [], 0.002)
        if fate == "die":
            parent.wait()
        return parent, pid

    yield go
    for parent in made:
        parent.kill()
        parent.communicate()


ENDS = [
    (("/bin/sleep", "60"), signal.SIGKILL, WaitStatus(signal=9)),
    (("/bin/sh", "-c", "trap 'exit 5' TERM; echo; while :; do sleep 0.02; done"), signal.SIGTERM, WaitStatus(code=5)),
]


@pytest.mark.parametrize(("argv", "number", "status"), ENDS)
async def test_how_an_orphan_ended_is_told(
    parents: Callable[..., tuple[subprocess.Popen[str], int]],
    argv: Sequence[str],
    number: signal.Signals,
    status: WaitStatus,
) -> None:
    """Law: a QEMU whose supervisor died ends in sight of the next, whoever reaps it, at once."""
    _, pid = parents("die", *argv)
    process = reopen(pid, starttime=None, marks=MARKS, on_end=nothing)
    assert process is not None
    if number is signal.SIGTERM:
        # Until its trap is set, it would die of the signal.
        await until(lambda: find_children(pid))
    process.signal(number)
    assert await ended(process) == status


def find_children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")


async def test_a_zombie_tells_how_it_ended(parents: Callable[..., tuple[subprocess.Popen[str], int]]) -> None:
    """Law: while its parent has not reaped it, /proc tells."""
    _, pid = parents("stay", "/bin/sleep", "60")
    process = reopen(pid, starttime=None, marks=MARKS, on_end=nothing)
    assert process is not None
    process.signal(signal.SIGKILL)
    assert await ended(process) == WaitStatus(signal=9)
    assert state_of(pid) == "Z"


async def test_one_that_was_reaped_first_is_told_by_the_kernel(
    parents: Callable[..., tuple[subprocess.Popen[str], int]],
) -> None:
    """Law: once it is reaped, the pidfd tells (PIDFD_GET_INFO, Linux 6.15), or nobody does: never a wrong status."""
    parent, pid = parents("stay", "/bin/sleep", "60")
    process = reopen(pid, starttime=None, marks=MARKS, on_end=nothing)
    assert process is not None
    assert parent.stdin is not None
    # This turn of the loop is kept until it has ended and was reaped.
    os.kill(pid, signal.SIGKILL)
    parent.stdin.write("\n")
    parent.stdin.flush()
    become(pid, None)
    told = await ended(process)
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    assert told == (WaitStatus(signal=9) if release >= (6, 15) else WaitStatus())


async def test_a_kernel_that_cannot_tell_is_believed(
    parents: Callable[..., tuple[subprocess.Popen[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: on an older kernel (ENOTTY) the end of a reaped orphan is unknown, and nothing else."""
    monkeypatch.setattr(kernel, "PIDFD_GET_INFO", 0xC040FF7F)
    parent, pid = parents("stay", "/bin/sleep", "60")
    process = reopen(pid, starttime=None, marks=MARKS, on_end=nothing)
    assert process is not None
    assert parent.stdin is not None
    os.kill(pid, signal.SIGKILL)
    parent.stdin.write("\n")
    parent.stdin.flush()
    become(pid, None)
    assert await ended(process) == WaitStatus()


async def test_one_in_front_has_our_streams_and_our_folder(capfd: pytest.CaptureFixture[str]) -> None:
    """Law: streams and folder are ours, the environment is what was given, the session its own; its status is told."""
    script = 'echo "$PWD $MARK $(cut -d " " -f 6 /proc/$$/stat)"; echo oops >&2; exit 42'
    process = spawn_in_front(
        ["/bin/sh", "-c", script], environment={"MARK": "x", "PATH": os.environ["PATH"]}, pass_fds=[], on_end=nothing
    )
    assert await ended(process) == WaitStatus(code=42)
    said = capfd.readouterr()
    assert said.out.split() == [str(Path.cwd()), "x", str(process.pid)]
    assert said.err == "oops\n"


async def test_what_cannot_be_put_in_front_says_why() -> None:
    """Law: the program is named, and the cause; a NUL in an argument is one."""
    for argv in (["/nowhere/qemu"], ["/bin/true", "a\0b"]):
        with pytest.raises(SpawnFailed, match=f"cannot start {argv[0]}"):
            spawn_in_front(argv, environment={}, pass_fds=[], on_end=nothing)


def test_a_pid_namespace_has_a_number_unless_it_is_the_kernels_own() -> None:
    """Law: the kernel's first one is None; any other is told from it, and is the same for all in it."""
    code = "from kvmsupervisor.adapters.process import pid_namespace; print(pid_namespace())"

    def found(*before: str) -> str:
        argv = [*before, sys.executable, "-c", code]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    own = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the text is what counts
    assert (pid_namespace() is None) == (own == "pid:[4026531836]")
    assert found() == str(pid_namespace())
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    inner = found("unshare", *user, "--pid", "--fork", "--mount-proc")
    assert inner.isdigit()
    assert inner != str(pid_namespace())
