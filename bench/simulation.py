"""The simulation: how many histories, and how much virtual time, one core plays."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.figures import Figure, Sample, Unit
from bench.rig import Rig
from tests.simulation.__main__ import STEPS
from tests.simulation.run import play

TURNS = 1_000_000

LOOP_IS = f"loops of {TURNS:,} additions"


def measure(rig: Rig, *, seeds: int) -> Iterator[Figure]:
    """Play histories, with a plain loop of Python before each: both in seconds of this process on a processor.

    The budget is that of `make test`, 500 histories in two minutes of two cores.
    """
    loops, histories, virtual = [], [], []
    play(0, steps=STEPS)
    for seed in range(1, seeds + 1):
        rig.tell(f"history {seed} of {seeds}")
        loops.append(60 / _loop_s())
        begun = time.process_time()
        virtual_s = play(seed, steps=STEPS).virtual_s
        took_s = time.process_time() - begun
        histories.append(60 / took_s)
        virtual.append(virtual_s / 60 / took_s)
    loop = Sample.of(loops)
    measured = Sample.of(histories)
    yield Figure(
        what="simulated histories, a minute of one core",
        measured=measured,
        unit=_whole,
        reference=loop,
        reference_is=LOOP_IS,
        budget="≥ 125",
        met=measured.median >= 125,
    )
    yield Figure(
        what="simulated minutes of three hosts, a second of one core",
        measured=Sample.of(virtual),
        unit=_tenths,
    )


def _loop_s() -> float:
    begun = time.process_time()
    total = 0
    for number in range(TURNS):
        total += number
    return time.process_time() - begun


_whole: Unit = "{:.0f}".format
_tenths: Unit = "{:.1f}".format
