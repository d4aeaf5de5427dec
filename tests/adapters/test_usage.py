"""Usage of processes: from procfs, and never somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kvmsupervisor.adapters.usage import (
    Usage,
    VcpuWaits,
    memory_for_guests_mib,
    memory_of_host,
    traffic_by_tap,
    usage_of,
)
from kvmsupervisor.domain.counters import Flow


def stat_line(
    name: str, *, state: str = "S", utime: int = 0, stime: int = 0, threads: int = 1, starttime: int = 0, rss: int = 0
) -> bytes:
    """A `/proc/<pid>/stat` line as proc(5) describes it, other fields 0."""
    fields = ["0"] * 50
    numbers = {11: utime, 12: stime, 17: threads, 19: starttime, 21: rss}
    fields[0] = state
    for place, number in numbers.items():
        fields[place] = str(number)
    return f"42 ({name}) {' '.join(fields)}\n".encode()


def write_stat(proc: Path, line: bytes) -> None:
    (proc / "42").mkdir()
    (proc / "42" / "stat").write_bytes(line)


def test_reads_cpu_time_and_resident_memory(tmp_path: Path) -> None:
    """User and system ticks add up to seconds, pages become bytes."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    write_stat(tmp_path, stat_line("qemu", utime=3 * ticks, stime=ticks, threads=3, rss=7))
    assert usage_of(42, proc=tmp_path) == Usage(cpu_s=4.0, memory_bytes=7 * page, threads=3, files=None)


def test_a_hostile_process_name_changes_nothing(tmp_path: Path) -> None:
    """A name may hold spaces and parentheses: the last one ends it."""
    write_stat(tmp_path, stat_line("x) Z 1 (y", rss=1))
    assert usage_of(42, proc=tmp_path) == Usage(
        cpu_s=0.0, memory_bytes=os.sysconf("SC_PAGE_SIZE"), threads=1, files=None
    )


def test_a_recycled_pid_gives_nothing(tmp_path: Path) -> None:
    """The pid of a process that started at another time is another process."""
    write_stat(tmp_path, stat_line("qemu", starttime=1000))
    assert usage_of(42, starttime=1000, proc=tmp_path) is not None
    assert usage_of(42, starttime=999, proc=tmp_path) is None


def test_a_vanished_process_gives_nothing(tmp_path: Path) -> None:
    """No entry in procfs, no usage."""
    assert usage_of(42, proc=tmp_path) is None


def test_a_real_process() -> None:
    """The kernel's own file reads the same way: this interpreter has used time and memory."""
    found = usage_of(os.getpid())
    assert found is not None
    assert found.cpu_s > 0
    assert 1 << 20 < found.memory_bytes < 1 << 40
    assert found.threads >= 1
    # Linux 6.2 and later tell.
    assert found.files is None or found.files >= 3


def test_a_zombie_gives_nothing() -> None:
    """An ended process that nobody waited for holds nothing any more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert usage_of(process.pid) is None


def meminfo(tmp_path: Path, *lines: str) -> Path:
    """A file as proc_meminfo(5) describes it."""
    path = tmp_path / "meminfo"
    path.write_text("\n".join(("MemTotal:       16384000 kB", "MemFree:         1024 kB", *lines)) + "\n")
    return path


def test_memory_for_guests(tmp_path: Path) -> None:
    """Law: all of the host's memory, in MiB, where no huge pages are set aside."""
    assert memory_for_guests_mib(meminfo(tmp_path)) == 16_000
    none = ("HugePages_Total:       0", "Hugepagesize:       2048 kB")
    assert memory_for_guests_mib(meminfo(tmp_path, *none)) == 16_000


def test_huge_pages_are_set_aside(tmp_path: Path) -> None:
    """Law: huge pages are the host's no more, used or not."""
    some = ("HugePages_Total:    1000", "HugePages_Free:     1000", "Hugepagesize:       2048 kB")
    assert memory_for_guests_mib(meminfo(tmp_path, *some)) == 14_000


def test_this_machines_own_memory() -> None:
    """Law: the kernel's own file is read the same way."""
    assert 128 < memory_for_guests_mib() < 1 << 24


NET_DEV = """\
Inter-|   Receive                               |  Transmit
 face |bytes packets errs drop fifo frame c. m. |bytes packets errs drop fifo colls carrier compressed
    lo:  100       1    0    0    0     0  0  0    100       1    0    0    0     0       0          0
  tap0:    5       2    3    4    0     0  0  0      7       6    8    9    0     0       0          0
"""


def test_traffic_is_the_guests(tmp_path: Path) -> None:
    """Law: what the host receives by a tap its guest has sent; a tap that is not here counts nothing."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "dev").write_text(NET_DEV)
    found = traffic_by_tap(tmp_path)
    assert found.keys() == {"lo", "tap0"}
    assert found["tap0"].sent == Flow(bytes=5, packets=2, errors=3, dropped=4)
    assert found["tap0"].received == Flow(bytes=7, packets=6, errors=8, dropped=9)
    # The kernel's own file is read the same way.
    assert "lo" in traffic_by_tap()


def test_the_hosts_memory() -> None:
    """Law: what is there, and what of it could be had."""
    total, available = memory_of_host()
    assert 128 << 20 < available < total


def a_thread(proc: Path, tid: int, name: str, schedstat: str) -> None:
    folder = proc / "7" / "task" / str(tid)
    folder.mkdir(parents=True)
    (folder / "comm").write_text(f"{name}\n")
    (folder / "schedstat").write_text(schedstat)


def test_vcpus_wait_for_processors(tmp_path: Path) -> None:
    """Law: of the threads of vCPUs alone, found once; again when there are more of them, and nothing of a dead one."""
    a_thread(tmp_path, 7, "qemu-system-x86", "1 900000000000 1\n")
    a_thread(tmp_path, 8, "CPU 0/KVM", "100 1500000000 3\n")
    waits = VcpuWaits(tmp_path)
    assert waits.seconds(7, 1, 1) == 1.5
    a_thread(tmp_path, 9, "CPU 1/KVM", "100 500000000 3\n")
    assert waits.seconds(7, 1, 1) == 1.5
    assert waits.seconds(7, 1, 2) == 2.0
    (tmp_path / "7" / "task" / "9" / "schedstat").unlink()
    assert waits.seconds(7, 1, 2) is None
    waits.keep({8})
    assert VcpuWaits(tmp_path).seconds(8, 1, 1) is None
