"""A world of its own for the demo: its processes and files end with it, whatever ends it.

The demo runs in a child that is the first process of a PID namespace: when that ends, by itself, by Ctrl-C between any
two instructions, or by SIGKILL, the kernel ends all others in there. What they write is in a file system in memory, in
a mount namespace of theirs. The parent waits, passes signals on, and puts the terminal right. When it is killed, the
kernel kills the child, too (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tests.support.checkout import ROOT

CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
PR_SET_PDEATHSIG = 1

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends the demo in order. The second one ends it by force."""

ORDERLY_S = 20
"""How long the end may take after a signal. Arbitrary: it takes a second, and what is left then is killed."""

MEMORY = "size=1g,mode=755"
"""Of the file system in memory. What is written are etcd's data, logs and sockets; Ceph's disk is in its own memory."""

SHOW_AGAIN = "\x1b[?1049l\x1b[?25h"
"""What makes a terminal leave the view's screen, and show its cursor."""

DESK = "desk"
"""File of shell variables in the folder, with which the operator's commands find the cluster."""


class Refused(Exception):
    """This machine gives the demo no world of its own; the message says why."""


def run_apart(main: Callable[[Path], int]) -> int:
    """Call `main` in a world of its own; return what it returns, or 128 and the number of the signal that ended it.

    The calling process can start no other one afterwards.

    Args:
        main: gets the path of a folder, which is in memory and has at most 16 bytes. In the folder's place outside is a
            program `kvmsupervisor` meanwhile: that of the operator's desk.

    Raises:
        Refused: not root, or without the right to make namespaces.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/tmp"))
    try:
        folder.chmod(0o755)
        with _terminal():
            return _run_in_child(main, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_in_child(main: Callable[[Path], int], folder: Path) -> int:
    unshare(CLONE_NEWPID)
    signals = 0
    child = 0

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL if signals > 1 else number)
        signal.alarm(ORDERLY_S)

    # Neither side may meet a signal before it knows what to do with it.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _be_child(main, folder)
    _write_program(folder, child)
    signal.signal(signal.SIGALRM, pass_on)
    for number in ENDS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and sys.stdout.isatty():
        print(SHOW_AGAIN, end="", flush=True)
    return code if code >= 0 else 128 - code


def _be_child(main: Callable[[Path], int], folder: Path) -> None:
    """The first process of the new world; does not return."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with raising():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
            _settle(folder)
            status = main(folder)
    except Refused as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - the child of a fork must not go on as its parent
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        # Nothing is to be waited for, or undone: the kernel does that.
        os._exit(status)


@contextmanager
def raising() -> Iterator[None]:
    """Have the first signal raise in this thread, and further ones nothing: the end is not to be interrupted."""
    came = False

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if came:
            return
        came = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in ENDS:
        signal.signal(number, end)
    yield


def unshare(flags: int) -> None:
    """Python has `os.unshare` since 3.12 only.

    Raises:
        Refused: it is not allowed.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        why = os.strerror(ctypes.get_errno())
        raise Refused(f"cluster-demo: this machine gives it no namespaces of its own (unshare: {why}); it needs root")


def _settle(folder: Path) -> None:
    """Mounts of its own: the processes as they are called here, and the folder in memory."""
    unshare(CLONE_NEWNS)
    for words in (
        ("mount", "--make-rprivate", "/"),
        ("mount", "-t", "proc", "proc", "/proc"),
        ("mount", "-t", "tmpfs", "-o", MEMORY, "tmpfs", str(folder)),
    ):
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
        if done.returncode:
            raise Refused(f"cluster-demo: {shlex.join(words)}: {done.stderr.strip()}")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def _write_program(folder: Path, child: int) -> None:
    """`kvmsupervisor`, run where the demo's child is: for a person in another terminal."""
    inside = f'. {folder}/{DESK} && exec {shlex.quote(sys.executable)} -m kvmsupervisor "$@"'
    words = ["nsenter", f"--target={child}", "--pid", "--mount", "--net", "--", "sh", "-c", inside, "kvmsupervisor"]
    program = folder / "kvmsupervisor"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    program.chmod(0o755)


def write_desk(folder: Path, environment: dict[str, str]) -> None:
    """Write what that program, and the demo's own commands, are started with; it begins to work then."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    path = f"export PYTHONPATH={shlex.quote(str(ROOT))}"
    (folder / DESK).write_text("\n".join([*lines, path, f"cd {shlex.quote(str(folder))}", ""]))


@contextmanager
def _terminal() -> Iterator[None]:
    """Leave the terminal as it was found."""
    before = None
    with contextlib.suppress(termios.error, ValueError, OSError):
        before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
