"""Usage of processes: from procfs, and never somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kvmsupervisor.adapters.usage import Usage, memory_for_guests_mib, traffic_of, usage_of
from kvmsupervisor.domain.counters import Traffic


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


def test_traffic_is_the_guests(tmp_path: Path) -> None:
    """Law: what the host receives by a tap its guest has sent; a tap that is not here counts nothing."""
    folder = tmp_path / "tap0" / "statistics"
    folder.mkdir(parents=True)
    (folder / "rx_bytes").write_text("5\n")
    (folder / "tx_bytes").write_text("7\n")
    assert traffic_of("tap0", tmp_path) == Traffic(received_bytes=7, sent_bytes=5)
    assert traffic_of("tap1", tmp_path) is None
