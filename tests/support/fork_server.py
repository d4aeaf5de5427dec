"""Starts programs of the package without importing it anew for each: a start costs a tenth of the processor's time.

One process has imported the package, and nothing else: no loop, no thread, no connection. Each start is a fork of it:
a process of its own, with the arguments, environment, working directory, standard streams and session that it was
given, which calls an entry point as `python -m kvmsupervisor` does. That interpreter's own start and the imports in
their order are left out; `tests/cli/test_imports.py`, the demo's tests and whoever starts `sys.executable` have them.
What `/proc` tells of such a process's command line and of its first environment is the fork server's.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.support.checkout import ROOT
from tests.support.namespaces import set_network
from tests.support.readable import readable

MAIN = "kvmsupervisor.cli.main"
ENTRY_POINT = "kvmsupervisor.cli.entrypoint"
"""Modules with a `main` that reads `sys.argv`."""

_KEPT = ("PATH", "HOME", "LANG")
"""Of a test's environment, for the server: the rest comes with each start."""

_LIMIT = 1 << 20
"""Bytes of one request."""


class Forked:
    """A process that the server has made; what `subprocess.Popen` offers, as far as tests need it."""

    def __init__(self, pid: int, pidfd: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._status = status

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; return its exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it lives on.
        """
        if self.returncode is None:
            if not readable(self._status, timeout):
                raise subprocess.TimeoutExpired("kvmsupervisor", timeout or 0)
            # The server ends with its worker, and kills what is left.
            self.returncode = int(os.read(self._status, 16) or -signal.SIGKILL)
            os.close(self._status)
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, never to another process that has its pid by now."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)


class _Server:
    """The server of this worker, as its tests see it."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.set_inheritable(True)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
                cwd=ROOT,
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        atexit.register(self._end)

    def _end(self) -> None:
        self._socket.close()
        self._process.wait(timeout=10)

    def start(self, entry: str, args: Sequence[str], streams: Sequence[int], **request: Any) -> Forked:
        status, theirs = os.pipe()
        # Of this thread: a test may have entered another one, and the server may have been started in another one.
        network = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            told = json.dumps({"entry": entry, "args": args, **request}).encode()
            with self._turn:
                socket.send_fds(self._socket, [told], [*streams, theirs, network])
                answer, (pidfd,), *_ = socket.recv_fds(self._socket, 64, 1)
        finally:
            os.close(theirs)
            os.close(network)
        return Forked(int(answer), pidfd, status)


_server = functools.cache(_Server)


def command(args: Sequence[str], *, entry: str = MAIN) -> list[str]:
    """The command line of the same program without the server, to be put behind another one."""
    program = ("-m", "kvmsupervisor") if entry == MAIN else ("-c", f"from {entry} import main; main()")
    return [sys.executable, *program, *args]


def start(  # noqa: D417 - as subprocess.Popen has them
    args: Sequence[str], *, env: Mapping[str, str], cwd: Path, output: int, entry: str = MAIN
) -> Forked:
    """Start a program in a session of its own, without input.

    Args:
        output: descriptor of what it writes, both streams.
        entry: which program.
    """
    with Path(os.devnull).open("rb") as nothing:
        streams = (nothing.fileno(), output, output)
        return _server().start(entry, args, streams, env=dict(env), cwd=str(cwd), session=True)


def run(args: Sequence[str], *, env: Mapping[str, str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command of `kvmsupervisor` without input; return its exit status and what it wrote.

    Raises:
        subprocess.TimeoutExpired: it did not end, and was killed.
    """
    with Path(os.devnull).open("rb") as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = (nothing.fileno(), out.fileno(), err.fileno())
        process = _server().start(MAIN, args, streams, env=dict(env), cwd=str(cwd), session=False)
        try:
            status = process.wait(timeout)
        except BaseException:
            process.send_signal(signal.SIGKILL)
            process.wait()
            raise
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode())
    return subprocess.CompletedProcess(["kvmsupervisor", *args], status, *said)


# --- the server ---------------------------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> Callable[[], None]:
    """Serve until the worker ends, which ends every process that is left; in each fork return what it has to do."""
    living: dict[int, tuple[int, int]] = {}  # pidfd → pid, where its exit status goes
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd in living:
                selector.unregister(key.fd)
                pid, status = living.pop(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(status, b"%d" % code)
                os.close(status)
                os.close(key.fd)
                continue
            told, received, *_ = socket.recv_fds(requests, _LIMIT, 5)
            if not told:
                for pidfd in living:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                sys.exit()
            *streams, status, network = received
            pid = os.fork()
            if pid == 0:
                for descriptor in (status, *living, *(to for _, to in living.values())):
                    os.close(descriptor)
                selector.close()
                return functools.partial(_become, json.loads(told), streams, network, requests)
            pidfd = os.pidfd_open(pid)
            for descriptor in (*streams, network):
                os.close(descriptor)
            living[pidfd] = (pid, status)
            selector.register(pidfd, selectors.EVENT_READ)


def _become(request: dict[str, Any], streams: Sequence[int], network: int, answers: socket.socket) -> None:
    """Be the program that was asked for, and say so; does not return."""
    if request["session"]:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in set(streams):
        os.close(descriptor)
    if not os.path.sameopenfile(network, own := os.open("/proc/self/ns/net", os.O_RDONLY)):
        set_network(network)
    os.close(own)
    os.close(network)
    os.chdir(request["cwd"])
    for name in _BEFORE:
        os.environ.pop(name, None)
    os.environ.update(request["env"])
    sys.argv = ["kvmsupervisor", *request["args"]]
    pidfd = os.pidfd_open(os.getpid())
    with answers:
        socket.send_fds(answers, [b"%d" % os.getpid()], [pidfd])
    os.close(pidfd)
    import_module(request["entry"]).main()


_BEFORE = frozenset(os.environ)
"""What the server was given, and no program shall see. What the imports below set stays, as they would set it again."""


def _preload() -> None:
    import_module(ENTRY_POINT)
    import_module("kvmsupervisor.cli.supervise")
    for command in import_module(MAIN).COMMANDS.values():
        import_module(f"kvmsupervisor.cli.{command.module}")
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208 - only their number
    assert threads == 1, "a thread does not outlive a fork"


if __name__ == "__main__":
    _preload()
    _serve(socket.socket(fileno=int(sys.argv[1])))()
