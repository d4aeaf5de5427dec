"""Processes as /proc shows them, and stopping one so that it really stands."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc tells of a process or thread: proc_pid_stat(5).

    Attributes:
        state: one letter.
        starttime: clock ticks since boot, by which a process is told from any later one with its pid.
    """

    state: str
    starttime: int

    @property
    def alive(self) -> bool:
        """Whether it has not ended; a zombie has."""
        return self.state not in {"Z", "X"}


def stat_of(pid: int, *, thread: int | None = None) -> Stat | None:
    """Look at a process, or a thread of it; None when there is none such."""
    folder = Path(f"/proc/{pid}") if thread is None else Path(f"/proc/{pid}/task/{thread}")
    try:
        # Its name stands in brackets, and may hold any other.
        fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(state=fields[0], starttime=int(fields[19]))


def starttime_of(pid: int) -> int:
    """The start time of a process that is there, which it is until it was reaped."""
    stat = stat_of(pid)
    assert stat is not None, f"there is no process {pid}"
    return stat.starttime


def freeze(pid: int) -> None:
    """SIGSTOP for a process; returns when all its threads have stopped.

    One of them takes the signal and tells the others. On a busy machine they run on meanwhile, long enough for a member
    of etcd to pass an event on.

    Raises:
        ProcessLookupError: there is none such.
        TimeoutError: a thread of it runs on.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + LIMIT_S
    while running := _running(pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} was stopped {LIMIT_S:g} s ago and runs on: {running}")
        # Nothing tells of a stop but looking: it is seen a moment later, and the deadline is above.
        time.sleep(0.001)


def _running(pid: int) -> dict[int, Stat]:
    """The threads that are neither stopped nor gone."""
    try:
        threads = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:
        return {}
    stats = {thread: stat_of(pid, thread=thread) for thread in threads}
    return {thread: stat for thread, stat in stats.items() if stat is not None and stat.alive and stat.state != "T"}
