"""Histories of a whole cluster, a fifth of a second each: no law is broken, and one seed is one history."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import structlog

from kvmsupervisor.adapters import usage
from kvmsupervisor.machine import host
from tests.simulation import run
from tests.simulation.__main__ import STEPS, seeds_of
from tests.simulation.loop import SimLoop
from tests.simulation.points import ELSEWHERE, HERE, POINTS
from tests.simulation.run import play
from tests.simulation.world import World
from tests.support.checkout import ROOT

QUICK, BLOCK = 500, 20
"""Seeds that every `make test` plays, and in blocks of how many. `make simulate` plays as many as are asked for."""

APART = range(101, 109)
LOCK_APART = "/locks/%i"


@pytest.mark.parametrize("first", range(1, QUICK + 1, BLOCK))
def test_no_law_is_broken(first: int) -> None:
    """Every law, after every step; and when all is healed, everything runs that people want."""
    told = []
    for seed in range(first, first + BLOCK):
        if violations := play(seed, steps=STEPS).violations:
            told += [f"python -m tests.simulation --seed {seed} --shrink", *map(str, violations)]
    assert not told, "\n".join(told)


def test_a_plain_number_is_how_many() -> None:
    """As `make simulate SEEDS=10000` means it."""
    assert seeds_of("3") == [1, 2, 3]
    assert seeds_of("3,5,9") == [3, 5, 9]
    assert seeds_of("7-9") == [7, 8, 9]


@pytest.mark.parametrize("seed", APART)
def test_no_law_is_broken_where_only_some_locks_are_followed(seed: int) -> None:
    """The same with `LOCK` outside the wishes: each host knows the locks that concern it, and no others."""
    played = play(seed, steps=STEPS, lock=LOCK_APART)
    assert not played.violations, (
        f"python -m tests.simulation --seed {seed} --lock {LOCK_APART} --shrink\n"
        + "\n".join(map(str, played.violations))
    )


def test_a_seed_is_one_history() -> None:
    """Byte for byte, twice in this process."""
    one, two = play(7, keep=None), play(7, keep=None)
    assert one.trace == two.trace
    assert one.digest == two.digest
    assert play(8).digest != one.digest


def test_this_machine_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is played on has as much memory, and as many rights, as it likes: a seed is the same history everywhere."""
    here = play(7, steps=4).digest
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(usage, "memory_for_guests_mib", lambda: 1)
    monkeypatch.setattr(host, "memory_for_guests_mib", lambda: 1)
    assert play(7, steps=4).digest == here


@pytest.mark.timeout(900)
def test_names_are_hashed_as_python_likes() -> None:
    """The same history whatever PYTHONHASHSEED is: no decision depends on the order of a set."""
    code = "from tests.simulation.run import play; print(play(7, steps=8).digest)"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "2024")
    }
    assert len(told) == 1


def test_nothing_is_left_of_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand are played by one process: whatever each leaves behind fills the machine's memory."""
    worlds: list[weakref.ref[World]] = []

    class Seen(World):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            worlds.append(weakref.ref(self))

    monkeypatch.setattr(run, "World", Seen)
    kept = [play(seed, steps=4, keep=None) for seed in (3, 4)]
    assert len(kept) == len(worlds) == 2
    assert [world() for world in worlds] == [None, None]


def test_what_is_torn_down_says_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What supervisors log behind the end of their history is told to nobody."""
    right = SimLoop.abandon

    def abandon(self: SimLoop) -> None:
        structlog.get_logger().error("supervisor.started")
        right(self)

    monkeypatch.setattr(SimLoop, "abandon", abandon)
    assert not play(7, steps=4).violations
    assert capfd.readouterr() == ("", "")


def test_an_act_that_is_left_out_does_not_happen() -> None:
    """What shrinking relies on."""
    quiet = play(1, only=[])
    assert quiet.acts == play(1).acts
    assert quiet.counts["ended"] == 0


@pytest.mark.soak
def test_every_failpoint_is_reached() -> None:
    """A fault is only tried where histories come by."""
    missing = set(HERE)
    for seed in range(1, 101):
        missing -= play(seed, steps=STEPS).reached.keys()
        if not missing:
            return
    assert not missing


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_no_history_reaches_is_cut_elsewhere(name: str) -> None:
    """The table names a test that there is, in a module that arms the point."""
    path, _, test = ELSEWHERE[name].partition("::")
    text = (ROOT / "tests" / path).read_text()
    assert f"def {test}(" in text
    assert f'"{name}"' in text
    assert name in POINTS
