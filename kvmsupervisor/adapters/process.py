"""Processes: starts, finds, watches and signals them through pidfds.

The kernel reuses pids, but a pidfd always means the same process (pidfd_open(2)). So a process is identified after its
pidfd was opened, and all signals go through the pidfd. When the process ends, also as a zombie, the pidfd becomes
readable.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from kvmsupervisor.aio import in_own_thread
from kvmsupervisor.domain.exits import WaitStatus

PROC = Path("/proc")

PIDFD_GET_INFO = 0xC040FF0B
"""ioctl of Linux ≥ 6.13, `_IOWR(0xFF, 11, struct pidfd_info)` with the 64 bytes of its first version
(include/uapi/linux/pidfd.h). Older kernels answer ENOTTY."""

PIDFD_INFO_EXIT = 1 << 3
"""Flag that asks for the exit code; set in the answer when there is one (Linux ≥ 6.15)."""

STAT_BYTES = 4096
"""More than a line of /proc/<pid>/stat can have: some fifty numbers, and a name of 64 bytes (proc_pid_stat(5))."""

FIRST_PID_NAMESPACE = "4026531836"
"""The number of the initial PID namespace; it never changes (include/linux/proc_ns.h, PROC_PID_INIT_INO)."""


TERM_S = 3.0
"""How long a QEMU may take to heed SIGTERM. Before its guest ran, it needs 20 ms to close its disks on a quiet host."""


SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
"""Errors that mean a shortage of the host (fork(2), pidfd_open(2)), and not a fault of the program."""


class SpawnFailed(Exception):
    """The program could not be started; the message names the program and says why."""


class NotEntered(OSError):
    """What keeps the program apart cannot be had now, so the program was not started."""


class Hidden(Exception):
    """A process with that pid lives, and its identity cannot be read: leave it alone. The message says why."""


class Process:
    """A watched process, whose identity is certain. It lives, or it has ended.

    Attributes:
        pid: its process id.
        starttime: when it started, clock ticks since boot (field 22 of /proc/<pid>/stat).
        is_child: whether this program started it.
        ended: set once it has ended.
        status: how it ended, once it has; both fields None when that is not known.
    """

    def __init__(self, pid: int, pidfd: int, starttime: int, *, is_child: bool, on_end: Callable[[], None]) -> None:
        self.pid = pid
        self.starttime = starttime
        self.ended = asyncio.Event()
        self.status = WaitStatus()
        self._pidfd = pidfd
        self.is_child = is_child
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._end)

    @property
    def pidfd(self) -> int:
        """The pidfd, to pass on to the guard; -1 once the process has ended or is no longer watched."""
        return self._pidfd

    def signal(self, number: signal.Signals) -> None:
        """Send a signal. A process that has already ended is no error."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def terminate(self) -> None:
        """Send SIGTERM; return when the process has ended, or after `TERM_S`."""
        self.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERM_S):
                await self.ended.wait()

    def close(self) -> None:
        """Stop watching the process, which goes on."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _end(self) -> None:
        self.status = self._reap() if self.is_child else _status_of_foreigner(self.pid, self._pidfd, self.starttime)
        self.close()
        self.ended.set()
        self._on_end()

    def _reap(self) -> WaitStatus:
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return WaitStatus()
        if result is None:
            return WaitStatus()
        if result.si_code == os.CLD_EXITED:
            return WaitStatus(code=result.si_status)
        return WaitStatus(signal=result.si_status)


def spawn(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    log_fd: int,
    pass_fds: Sequence[int],
    on_end: Callable[[], None],
    stdin: int | None = None,
    enter: Callable[[], None] | None = None,
) -> Process:
    """Start a program in its own session. Its output goes to `log_fd`, and it inherits `pass_fds` only.

    The program outlives this process; when it ends earlier, it is reaped through its pidfd. Blocks for a vfork and an
    exec (about 1 ms); a thread would not help, because Python holds the interpreter's lock meanwhile.

    Args:
        argv: the program and its arguments.
        environment: the whole environment.
        log_fd: standard output and standard error.
        pass_fds: the descriptors that the program inherits, under the same numbers.
        on_end: called once when the program has ended.
        stdin: its standard input; None for an empty one.
        enter: called before, in a thread that ends afterwards: whatever the thread enters, the program is in.
            Nothing is imported there, as our modules may be out of sight.

    Raises:
        SpawnFailed: the program does not exist or is not executable.
        NotEntered: `enter` failed. No process is left.
        OSError: the host is short of something (`SHORTAGES`). No process is left.
    """

    def start() -> subprocess.Popen[bytes]:
        if enter is not None:
            try:
                enter()
            except OSError as error:
                raise NotEntered(error.errno, error.strerror, error.filename) from error
        return subprocess.Popen(
            argv,
            env=dict(environment),
            cwd="/",
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=pass_fds,
            start_new_session=True,
        )

    try:
        return _watched(start() if enter is None else in_own_thread(start), on_end)
    except OSError as error:
        if error.errno in SHORTAGES or isinstance(error, NotEntered):
            raise
        raise SpawnFailed(f"cannot start {argv[0]}: {error.strerror or error}") from error


def spawn_in_front(
    argv: Sequence[str], *, environment: Mapping[str, str], pass_fds: Sequence[int], on_end: Callable[[], None]
) -> Process:
    """Start a program on our own standard streams, in our own folder, in its own session.

    The program has our terminal, but not as its controlling terminal: Ctrl-C signals us, not the program. The program
    can read the terminal all the same: the kernel stops only background processes of the terminal's own session
    (credentials(7), tty_check_change in the kernel).

    Args:
        argv: the program and its arguments.
        environment: the whole environment.
        pass_fds: the descriptors that it inherits beyond the standard streams, under the same numbers.
        on_end: called once when the program has ended.

    Raises:
        SpawnFailed: the program does not exist or is not executable, or there is no memory.
    """
    try:
        child = subprocess.Popen(argv, env=dict(environment), pass_fds=pass_fds, start_new_session=True)
        return _watched(child, on_end)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise SpawnFailed(f"cannot start {argv[0]}: {said or error}") from error


def _watched(child: subprocess.Popen[bytes], on_end: Callable[[], None]) -> Process:
    """Watch a child through its pidfd.

    Raises:
        OSError: there is no descriptor left. The child is killed then.
    """
    with contextlib.ExitStack() as undo:
        # A child that cannot be watched is killed.
        undo.callback(child.wait)
        undo.callback(child.kill)
        pidfd = os.pidfd_open(child.pid)
        undo.callback(os.close, pidfd)
        # Only we can reap a child, so its stat exists even when the child has already ended.
        starttime = _starttime(child.pid) or 0
        undo.pop_all()
    # We reap it through the pidfd; this keeps Popen from waiting for it, and from warning that it was not reaped.
    child.returncode = 0
    return Process(child.pid, pidfd, starttime, is_child=True, on_end=on_end)


def reopen(pid: int, *, starttime: int | None, marks: Mapping[str, str], on_end: Callable[[], None]) -> Process | None:
    """Find a process that an earlier supervisor started; None when it is gone or another process has its pid.

    Args:
        pid: its process id.
        starttime: its start time; None when that was never recorded.
        marks: environment variables that the process certainly has.
        on_end: called once when the process ends.

    Raises:
        Hidden: we may not read its environment, or cannot open a file for want of descriptors or memory.
    """
    with _seen(f"process {pid}"):
        return _reopen(pid, starttime=starttime, marks=marks, on_end=on_end)


@contextlib.contextmanager
def _seen(what: str) -> Iterator[None]:
    """Turn a shortage of this host into `Hidden`: it does not mean that a process has gone."""
    try:
        yield
    except OSError as error:
        if error.errno not in SHORTAGES:
            raise
        raise Hidden(f"{what} cannot be looked at: {error.strerror}") from error


def _reopen(pid: int, *, starttime: int | None, marks: Mapping[str, str], on_end: Callable[[], None]) -> Process | None:
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        if _is_shortage(error):
            raise
        return None
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, pidfd)
        # From now on /proc shows the process of the pidfd, or no process when that one has ended.
        found = _starttime(pid)
        if found is None or (starttime is not None and found != starttime):
            return None
        try:
            is_it = _has_marks(pid, marks)
        except PermissionError as error:
            if _is_over(pidfd):
                return None
            raise Hidden(
                f"process {pid} lives where its QEMU was, and whether it is that cannot be seen: {error.filename}: "
                f"{error.strerror}. It takes CAP_SYS_PTRACE and CAP_DAC_OVERRIDE, no fewer capabilities than it has, "
                "and the same AppArmor profile"
            ) from error
        if not is_it or _is_over(pidfd):
            return None
        undo.pop_all()
    return Process(pid, pidfd, found, is_child=False, on_end=on_end)


def find(marks: Mapping[str, str]) -> Iterator[int]:
    """The pids of all session leaders whose environment holds `marks`.

    A process that `spawn` started leads a session; its children inherit the environment, but do not lead a session. A
    process whose environment we may not read is skipped: without root, that is most processes.

    Raises:
        Hidden: we cannot open a file for want of descriptors or memory.
    """
    with _seen("what runs on this host"):
        entries = list(PROC.iterdir())
    for entry in entries:
        found = False
        with contextlib.suppress(PermissionError), _seen(f"process {entry.name}"):
            found = entry.name.isdigit() and _has_marks(int(entry.name), marks) and _leads_session(int(entry.name))
        if found:
            yield int(entry.name)


def having(name: str) -> Iterator[int]:
    """The pids of all session leaders with an environment variable of this name; see `find`."""
    for entry in PROC.iterdir():
        if entry.name.isdigit() and name in environment_of(pid := int(entry.name)) and _leads_session(pid):
            yield pid


def environment_of(pid: int) -> Mapping[str, str]:
    """The environment that a process was started with; empty when the process is gone, or we may not read it."""
    try:
        words = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (word.decode(errors="replace").partition("=") for word in words)
    return {name: value for name, _, value in pairs}


def command_line_of(pid: int) -> tuple[str, ...]:
    """The command line that a process was started with; empty when the process is gone."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ()
    return tuple(word.decode(errors="replace") for word in words[:-1])


def starttime_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when the process is gone."""
    return _starttime(pid)


def is_alive(pid: int, starttime: int) -> bool:
    """Whether the process with this pid and start time lives. Yes, to be safe, when that cannot be read."""
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        return _is_shortage(error)
    try:
        fields = _stat_fields(pid)
        # A killed process is a zombie before its last thread has ended and its pidfd becomes readable.
        ending = fields is None or fields[0] in {"Z", "X"}
        return not ending and _starttime(pid) == starttime and not _is_over(pidfd)
    except OSError as error:
        return _is_shortage(error)
    finally:
        os.close(pidfd)


def _is_shortage(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in SHORTAGES


def pid_namespace() -> str | None:
    """The number of our PID namespace; None for the initial one, that of a host (pid_namespaces(7)).

    The kernel reuses a number only after its namespace has ended with all processes in it.
    """
    number = (PROC / "self/ns/pid").readlink().name.removeprefix("pid:[").removesuffix("]")
    return None if number == FIRST_PID_NAMESPACE else number


def _is_over(pidfd: int) -> bool:
    """Whether the process has ended. A zombie has."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the third on (proc_pid_stat(5)); the second may hold any character."""
    try:
        # Without pathlib, which takes longer than the kernel: each start does this.
        file = os.open(f"{PROC}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(file, STAT_BYTES).decode(errors="replace")
        finally:
            os.close(file)
    except OSError as error:
        if _is_shortage(error):
            raise
        return None
    return text.rpartition(")")[2].split()


def _starttime(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[22 - 3]) if fields and len(fields) > 22 - 3 else None


def _has_marks(pid: int, marks: Mapping[str, str]) -> bool:
    """Whether the environment of the process holds `marks`.

    Raises:
        PermissionError: we may not read the environment.
    """
    try:
        environment = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except PermissionError:
        raise
    except OSError as error:
        if _is_shortage(error):
            raise
        return False
    return all(f"{name}={value}".encode() in environment for name, value in marks.items())


def _leads_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _status_of_foreigner(pid: int, pidfd: int, starttime: int) -> WaitStatus:
    """How a process that is not our child ended: from its zombie, or from the pidfd once it was reaped."""
    try:
        fields = _stat_fields(pid)
    except OSError:
        fields = None
    if fields and len(fields) > 52 - 3 and int(fields[22 - 3]) == starttime and fields[0] == "Z":
        return _from_wait(int(fields[52 - 3]))
    buffer = bytearray(struct.pack("=Q", PIDFD_INFO_EXIT).ljust(64, b"\0"))
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, buffer)
    except OSError:
        return WaitStatus()
    mask, code = struct.unpack_from("=Q", buffer)[0], struct.unpack_from("=i", buffer, 60)[0]
    return _from_wait(code) if mask & PIDFD_INFO_EXIT else WaitStatus()


def _from_wait(status: int) -> WaitStatus:
    if os.WIFSIGNALED(status):
        return WaitStatus(signal=os.WTERMSIG(status))
    return WaitStatus(code=os.WEXITSTATUS(status))
