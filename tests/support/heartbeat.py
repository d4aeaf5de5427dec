"""Heartbeats of booted guests, as they reach the console's log: when each came, and how long the pauses were.

A guest that was frozen, or ended, pauses; one that was started again counts from one. Both are seen from outside, by
the test's clock, and inside, by the guest's own uptime, which each heartbeat tells. Neither is enough: a clock outside
may be held up itself, and a machine that was stopped by QMP has its own clock stopped, too.

Run as a program it is the listener: a process of its own, which no other thread of the test can keep waiting.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

LINE = re.compile(rb"HB (\d+) (\d+\.\d+)\r?\n")
LOOK_S = 0.01
LATE_S = 0.1
"""A look that comes so late is told: what was seen then may have been there before."""


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat: its number, the guest's uptime in it, and when it was seen (CLOCK_MONOTONIC)."""

    number: int
    uptime: float
    seen: float


class Heartbeats:
    """Listens while it is entered.

    Args:
        logs: console logs by instance; they need not be there yet.
    """

    def __init__(self, logs: Mapping[str, Path]) -> None:
        self._logs = dict(logs)
        self._told = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed at the exit
        self._listener: subprocess.Popen[bytes] | None = None
        self._beats: dict[str, list[Beat]] = {instance: [] for instance in self._logs}
        self._late: list[tuple[float, float]] = []
        self._offset = 0

    def __enter__(self) -> Self:
        words = [f"{instance}={path}" for instance, path in self._logs.items()]
        argv = [sys.executable, "-S", "-E", __file__, *words]
        self._listener = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._told)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.kill()
        self._listener.wait()
        self._read()
        self._told.close()

    def _read(self) -> None:
        """Read what the listener has told since."""
        if self._told.closed:
            return
        data = os.pread(self._told.fileno(), 1 << 24, self._offset)
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        for line in data.decode().splitlines():
            instance, *numbers = line.split()
            if instance == "-":
                self._late.append((float(numbers[0]), float(numbers[1])))
            else:
                self._beats[instance].append(Beat(int(numbers[0]), float(numbers[1]), float(numbers[2])))

    def beats(self, instance: str) -> list[Beat]:
        """All that this guest has sent."""
        self._read()
        return list(self._beats[instance])

    def all_beat(self, since: float) -> bool:
        """Whether every guest has been heard after `since`."""
        self._read()
        return all(beats and beats[-1].seen > since for beats in self._beats.values())

    def gap(self, since: float, until: float) -> float:
        """The longest time between two heartbeats of one guest, as far as it lies between the two times.

        A guest that is silent at the end has the rest counted, too.
        """
        return max(
            _longest([since, *(beat.seen for beat in self.beats(one) if since < beat.seen < until), until])
            for one in self._beats
        )

    def uptime_gap(self, since: float, until: float) -> float:
        """The same by the guests' own clocks: without the delays of whoever looked."""
        return max(
            _longest([beat.uptime for beat in self.beats(one) if since < beat.seen < until]) for one in self._beats
        )

    def held_up(self, since: float, until: float) -> float:
        """The longest time for which the listener itself did not come to look."""
        self._read()
        return max((late for seen, late in self._late if since < seen < until), default=0.0)

    def assert_unbroken(self) -> None:
        """No heartbeat is missing, and no guest began anew.

        A line of which a killed supervisor has passed on the beginning is whole again when the next one has passed on
        the rest: the listener has seen the lines behind it in memory by then.
        """
        for instance in self._beats:
            numbers = sorted(beat.number for beat in self.beats(instance))
            assert numbers == list(range(1, len(numbers) + 1)), (instance, numbers)


def _longest(times: list[float]) -> float:
    return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


# --- the listener ---------------------------------------------------------------------------------------------


class _Tail:
    def __init__(self, instance: str, path: str) -> None:
        self._instance, self._path = instance, path
        self._offset = 0
        self._rest = b""
        self._seen: set[tuple[bytes, bytes]] = set()
        self._memory: Path | None = None
        self._sought = 0.0

    def read(self, now: float) -> Iterable[str]:
        """What has come: in the log, and, where no supervisor writes that, in the memory that QEMU logs into."""
        for beat in (*LINE.findall(self._file()), *LINE.findall(self._in_memory(now))):
            if beat not in self._seen:
                self._seen.add(beat)
                yield f"{self._instance} {int(beat[0])} {float(beat[1])} {now}"

    def _file(self) -> bytes:
        try:
            if Path(self._path).stat().st_size <= self._offset:
                return b""
            with Path(self._path).open("rb") as log:
                log.seek(self._offset)
                data = log.read()
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        whole, end, self._rest = (self._rest + data).rpartition(b"\n")
        return whole + end

    def _in_memory(self, now: float) -> bytes:
        try:
            if self._memory is None:
                # Looking for it reads all of /proc.
                if now < self._sought + 0.5:
                    return b""
                self._sought = now
                self._memory = _memory_of(Path(self._path).with_name("incarnation.json"))
            if self._memory is None:
                return b""
            told = (self._memory.parents[1] / "fdinfo" / self._memory.name).read_text().split()
            with self._memory.open("rb") as memory:
                return memory.read(int(told[1]))
        except OSError:
            self._memory = None
            return b""


def _memory_of(record: Path) -> Path | None:
    """What the QEMU of a record logs its console into; its pid on record may be one of another namespace."""
    found = re.search(rb'"incarnation": ?"([^"]+)"', record.read_bytes())
    if found is None:
        return None
    mark = b"KVMSUPERVISOR_INCARNATION=" + found[1]
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                for file in (process / "fd").iterdir():
                    if str(file.readlink()).startswith("/memfd:console.log"):
                        return file
    return None


def _listen(words: Iterable[str]) -> None:
    """Tell of every heartbeat, and of being late. It goes before the guests, so that it does not measure itself."""
    with contextlib.suppress(PermissionError):
        os.nice(-10)
    tails = [_Tail(*word.split("=", 1)) for word in words]
    last = time.monotonic()
    while True:
        time.sleep(LOOK_S)
        now = time.monotonic()
        if now - last > LATE_S:
            print(f"- {now} {now - last}", flush=True)  # noqa: T201
        last = now
        for tail in tails:
            for line in tail.read(now):
                print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    _listen(sys.argv[1:])
