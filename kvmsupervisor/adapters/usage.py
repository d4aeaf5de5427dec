"""What a process uses, and what a host has, read from `/proc`.

Reads one short file per process and walks no memory map, so 100 processes cost a few milliseconds. Source: proc(5),
`/proc/[pid]/stat` (https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from kvmsupervisor.domain.counters import Flow, Traffic
from kvmsupervisor.domain.frozen import frozen

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# Positions among the fields that follow the command's name; proc(5) counts from 1 and calls the first of them
# 3.
_STATE, _UTIME, _STIME, _THREADS, _STARTTIME, _RSS = (field - 3 for field in (3, 14, 15, 20, 22, 24))
_GONE_STATES = (b"Z", b"X", b"x")


@frozen(kw_only=True)
class Usage:
    """What a process has used and holds now.

    Attributes:
        cpu_s: user and system time of all its threads since it started, seconds. For QEMU this is the guest's
            work too: time in KVM guest mode counts as user time of the vCPU's thread.
        memory_bytes: resident set (RSS). The kernel keeps it in per-CPU counters, so it may be wrong by some
            hundred KiB; memory from hugetlbfs is not in it. PSS would split shared pages, but costs a walk of
            all page tables at every scrape.
        threads: of the process.
        files: that it has open; None where the kernel does not tell (before Linux 6.2).
    """

    cpu_s: float
    memory_bytes: int
    threads: int
    files: int | None


def usage_of(pid: int, *, starttime: int | None = None, proc: Path = PROC) -> Usage | None:
    """Return what process `pid` uses, or None when it is gone.

    Does not block: the kernel answers from counters in memory.

    Args:
        pid: of the process.
        starttime: clock ticks since boot at which it must have started; another one is another process, that
            got the same pid, and gives None. None: not compared.
        proc: where procfs is mounted.
    """
    try:
        stat = (proc / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may itself hold spaces and parentheses: only the last one closes it.
    fields = stat.rpartition(b")")[2].split()
    if fields[_STATE] in _GONE_STATES:
        return None
    if starttime is not None and int(fields[_STARTTIME]) != starttime:
        return None
    return Usage(
        cpu_s=(int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS_PER_S,
        memory_bytes=int(fields[_RSS]) * _PAGE_BYTES,
        threads=int(fields[_THREADS]),
        files=_files_of(pid, proc),
    )


def _files_of(pid: int, proc: Path) -> int | None:
    """How many files a process has open: the size of this folder, since Linux 6.2 (proc_pid_fd(5)); before, 0."""
    try:
        return (proc / str(pid) / "fd").stat().st_size or None
    except OSError:
        return None


def memory_for_guests_mib(meminfo: Path = PROC / "meminfo") -> int:
    """The host's memory in MiB, without the reserved huge pages (proc_meminfo(5)).

    Huge pages of other sizes than the default one are not listed there; they are few.
    """
    values = _figures(meminfo)
    huge_kib = values.get("HugePages_Total", 0) * values.get("Hugepagesize", 0)
    return (values["MemTotal"] - huge_kib) // 1024


def memory_of_host(meminfo: Path = PROC / "meminfo") -> tuple[int, int]:
    """The host's memory, and what of it could be had for new processes, in bytes (proc_meminfo(5))."""
    values = _figures(meminfo)
    return values["MemTotal"] << 10, values["MemAvailable"] << 10


def _figures(meminfo: Path) -> dict[str, int]:
    """The figures of that file by their names: KiB, or a number of pages (proc_meminfo(5))."""
    values = {}
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0])
    return values


def traffic_by_tap(proc: Path = PROC) -> Mapping[str, Traffic]:
    """The traffic of every interface of our network namespace, seen by the guest of a tap (proc_pid_net(5), `dev`).

    What the host has received from a tap its guest has sent. One read for all, however many there are.
    """
    found = {}
    for line in (proc / "net" / "dev").read_text().splitlines()[2:]:
        name, _, rest = line.partition(":")
        numbers = [int(word) for word in rest.split()]
        received, sent = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        found[name.strip()] = Traffic(received=_flow(sent), sent=_flow(received))
    return found


def _flow(numbers: Sequence[int]) -> Flow:
    return Flow(bytes=numbers[0], packets=numbers[1], errors=numbers[2], dropped=numbers[3])


class VcpuWaits:
    """How long the vCPUs of guests were ready to run and had no processor.

    QEMU names the threads of vCPUs (`debug-threads=on`); which these are is looked up once for each process, and again
    when the number of vCPUs differs. Source: sched-stats in the kernel's documentation (`/proc/<pid>/schedstat`).
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        # By pid and start time: paths of the threads' files.
        self._threads: dict[tuple[int, int | None], tuple[Path, ...]] = {}

    def seconds(self, pid: int, starttime: int | None, vcpus: int) -> float | None:
        """Seconds of all vCPUs of a process together; None where the kernel does not tell, or it is gone."""
        threads = self._threads.get((pid, starttime), ())
        if len(threads) != vcpus:
            threads = self._threads[pid, starttime] = self._find(pid)
        try:
            return sum(int(path.read_bytes().split()[1]) for path in threads) / 1e9 if threads else None
        except (OSError, ValueError, IndexError):
            self._threads.pop((pid, starttime), None)
            return None

    def keep(self, living: Collection[int]) -> None:
        """Forget all other processes."""
        for pid, starttime in [one for one in self._threads if one[0] not in living]:
            del self._threads[pid, starttime]

    def _find(self, pid: int) -> tuple[Path, ...]:
        try:
            tasks = list((self._proc / str(pid) / "task").iterdir())
            return tuple(
                task / "schedstat" for task in tasks if (task / "comm").read_bytes().startswith((b"CPU ", b"ALL CPUs"))
            )
        except OSError:
            return ()
