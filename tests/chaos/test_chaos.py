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

SMALL = ("--machines", "1", "--no-guard", "--hosts", "2", "--ttl", "2", "--wait", "3", "--settle", "0")


def chaos(folder: Path, *args: str, limit_s: float = 110.0) -> tuple[int, dict[str, Any], str]:
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
def test_a_short_run(tmp_path: Path) -> None:
    """Laws 3, 4, 6, 8: whatever fails, nobody writes behind a later epoch, and nobody is restarted without need.

    This seed kills a QEMU, cuts its host off from etcd for about as long as a takeover waits, replaces the supervisor,
    and loses etcd's leader.
    """
    kinds = [Kind.QEMU_KILL, Kind.SUPERVISOR_KILL, Kind.LEADER_KILL, Kind.ETCD_CUT]
    status, report, _ = chaos(
        tmp_path, *SMALL, "--seed", "2948", "--minutes", "1", "--faults", "4", "--kinds", ",".join(kinds)
    )
    assert report["violations"] == []
    assert status == 0
    assert {*report["faults"]} >= {*kinds}
    assert report["fences"] >= 1
    assert report["owners"] >= 2
    assert report["records"] > 100


@pytest.mark.guest
def test_without_fencing_two_writers_are_found(tmp_path: Path) -> None:
    """Law: the judge can fail. Ceph's own program is replaced by one that says it has fenced, and has not."""
    status, report, said = chaos(tmp_path, *SMALL, "--seed", "1", "--play", "cut-etcd:90", "--sabotage")
    found = "\n".join(report["violations"])
    assert status == 1
    assert " wrote after " in found, "no writer of a lower epoch behind one of a higher"
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
