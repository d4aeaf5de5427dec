"""Histories of a whole cluster, a third of a second each: no law is broken, and one seed is one history."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.simulation.__main__ import STEPS
from tests.simulation.points import POINTS
from tests.simulation.run import play
from tests.support.checkout import ROOT

QUICK = range(1, 33)
"""Seeds that every `make test` plays. `make simulate` plays as many as are asked for."""


@pytest.mark.parametrize("seed", QUICK)
def test_no_law_is_broken(seed: int) -> None:
    """Every law, after every step; and when all is healed, everything runs that people want."""
    played = play(seed, steps=STEPS)
    assert not played.violations, f"python -m tests.simulation --seed {seed} --shrink\n" + "\n".join(
        map(str, played.violations)
    )


def test_a_seed_is_one_history() -> None:
    """Byte for byte, twice in this process."""
    one, two = play(7, keep=None), play(7, keep=None)
    assert one.trace == two.trace
    assert one.digest == two.digest
    assert play(8).digest != one.digest


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


def test_an_act_that_is_left_out_does_not_happen() -> None:
    """What shrinking relies on."""
    quiet = play(1, only=[])
    assert quiet.acts == play(1).acts
    assert quiet.counts["ended"] == 0


UNREACHED = {
    "before GUARD": "no host has a guard here",
    "before PLUG": "no machine has a NIC",
    "before ROOM": "no machine has a file as its disk by `disk/<n>`",
    **dict.fromkeys(("cloned", "copied", "frozen", "imported", "noted"), "no images are made, and no snapshots"),
    "before GIVE_UP": "seldom: a QEMU has to hang for all of its start",
    "before READ": "seldom: a record has to be damaged while its QEMU lives",
    "before TIDY": "seldom: a placement has to end while its machine stays",
}
"""Failpoints that a hundred histories may miss, and why."""


@pytest.mark.soak
def test_every_failpoint_is_reached() -> None:
    """A fault is only tried where histories come by."""
    reached = {name for seed in range(1, 101) for name in play(seed, steps=STEPS).reached}
    assert set(POINTS) - reached <= set(UNREACHED)
    assert set(UNREACHED) <= set(POINTS)
