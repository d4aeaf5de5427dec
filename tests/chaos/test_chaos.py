"""Runs of the chaos suite, as people start it: a short one, a sabotaged one, and long ones among the soaks.

The judge reads the disks. What the laws are is in `records`, what is promised in time in `bounds`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.faults import Kind
from tests.support.cluster import ROOT

SMALL = ("--machines", "1", "--no-guard", "--hosts", "2", "--settle", "0")


def chaos(folder: Path, *args: str, limit_s: float = 280.0) -> tuple[int, dict[str, Any], str]:
    """Run it; return its exit status, its report, and what it said."""
    report = folder / "report.json"
    argv = [sys.executable, "-m", "tests.chaos", *args, "--json", str(report)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        try:
            said, _ = run.communicate(timeout=limit_s)
        except BaseException:
            # It ends what it has started.
            run.terminate()
            said, _ = run.communicate()
            print(said)  # noqa: T201
            raise
    print(said)  # noqa: T201
    return run.returncode, json.loads(report.read_bytes()) if report.exists() else {}, said


@pytest.mark.guest
@pytest.mark.timeout(300)
def test_a_short_run(tmp_path: Path) -> None:
    """Laws 3, 4, 6, 8: whatever fails, nobody writes behind a later epoch, and nobody is restarted without need.

    This seed kills a QEMU, lets its host reboot, loses what etcd answers it, and replaces its supervisor while etcd
    looks for another leader. A takeover is in the next test.
    """
    kinds = [Kind.QEMU_KILL, Kind.SUPERVISOR_KILL, Kind.LEADER_KILL, Kind.HOST_REBOOT, Kind.ETCD_CUT]
    # A busy machine may lose a session of three seconds; nobody takes anything over within the six that follow.
    drawn = ("--seed", "1673", "--ttl", "3", "--wait", "6", "--minutes", "1", "--faults", "4")
    status, report, _ = chaos(tmp_path, *SMALL, *drawn, "--kinds", ",".join(kinds))
    assert report["violations"] == []
    assert status == 0
    assert {*report["faults"]} == {*kinds}
    assert report["fences"] >= 2
    assert report["owners"] >= 3
    assert report["records"] > 100


@pytest.mark.guest
@pytest.mark.timeout(300)
def test_without_fencing_two_writers_are_found(tmp_path: Path) -> None:
    """Law: the judge can fail. Ceph's own program is replaced by one that says it has fenced, and has not."""
    status, report, said = chaos(
        tmp_path, *SMALL, "--seed", "1", "--ttl", "2", "--wait", "2", "--play", "cut-etcd:90", "--sabotage"
    )
    found = "\n".join(report["violations"])
    assert status == 1
    # Which of the two is written depends on whose record came last before the end: either tells two writers.
    assert " wrote after " in found or " wrote as if the other were not there" in found, "no two writers"
    assert "blocklist" in found, "no client that was not shut out in time"
    assert "again: python -m tests.chaos --seed 1" in said


def test_a_printed_schedule_replays(tmp_path: Path) -> None:
    """Law: the command that a run prints draws the same faults again."""
    status, _, said = chaos(tmp_path, "--minutes", "5", "--list")
    first, *faults = said.splitlines()
    assert status == 0
    words = first.partition("again: ")[2].split()
    assert words[0] == "make"
    seed, minutes = (word.partition("=")[2] for word in words[2:])
    again = chaos(tmp_path, "--seed", seed, "--minutes", minutes, "--list")[2].splitlines()
    assert again == [first, *faults]
    assert len(faults) > 5


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_long_run(tmp_path: Path) -> None:
    """The laws and the promises, for half an hour, from a seed that is printed; `CHAOS_SEED` replays one."""
    seed = os.environ.get("CHAOS_SEED", str(random.SystemRandom().randrange(1 << 31)))
    status, report, _ = chaos(tmp_path, "--seed", seed, "--minutes", "30", limit_s=3500.0)
    assert report["violations"] == [], report["replay"]
    assert status == 0
