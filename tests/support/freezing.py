"""Processes that are stopped by SIGSTOP: each of their threads, when that has returned."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

LIMIT_S = 20.0


def freeze(pid: int) -> None:
    """Stop it, and wait until it is.

    One thread takes the signal and tells the others. On a busy machine they run on meanwhile, long enough for a member
    of etcd to pass an event on.

    Raises:
        ProcessLookupError: there is none such.
        TimeoutError: a thread of it runs on.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + LIMIT_S
    while running := _running(pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} was stopped {LIMIT_S:g} s ago and runs on: {', '.join(running)}")
        time.sleep(0.001)


def _running(pid: int) -> list[str]:
    """The threads that are neither stopped (`T`) nor gone (`Z`, `X`), with their states: proc_pid_stat(5)."""
    states = {}
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            states[thread.parent.name] = thread.read_text(errors="replace").rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [f"{thread} in state {state}" for thread, state in states.items() if state not in {"T", "Z", "X"}]
