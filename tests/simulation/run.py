"""One history: a cluster is made, faults happen, all is healed, and everything must run."""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation import loop as sim
from tests.simulation.acts import Act, draw_acts, draw_cluster
from tests.simulation.judge import Violation
from tests.simulation.outside import drawn
from tests.simulation.points import listening
from tests.simulation.world import World, tapped

SETTLE_S = 900.0
"""Within which everything must run once all is healed: TTL + takeover's wait + the longest pause of a restart (300 s)
and as much again."""

CONFIRM_S = 20.0


@dataclass(kw_only=True)
class Played:
    """What came of it.

    Attributes:
        acts: what happened.
        violations: what must not be.
        digest: of all that happened, the same for the same seed.
        steps: callbacks.
        virtual_s: how long it took.
        counts: of what, how many.
        trace: the lines that were kept.
        reached: which failpoints, how often.
    """

    acts: list[Act]
    violations: list[Violation] = field(default_factory=list)
    digest: str = ""
    steps: int = 0
    virtual_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)
    reached: Counter[str] = field(default_factory=Counter)


def play(seed: int, *, steps: int = 12, only: Collection[int] | None = None, keep: int | None = 0) -> Played:
    """Play one history.

    Args:
        seed: what is drawn.
        steps: how many acts.
        only: numbers of the acts that happen; None for all.
        keep: how many lines of its trace are kept; None for all.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        return sim.run(lambda loop: _play(loop, seed, folder, steps=steps, only=only, keep=keep), seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _play(
    loop: sim.SimLoop, seed: int, folder: Path, *, steps: int, only: Collection[int] | None, keep: int | None
) -> Played:
    world = World(loop, seed, folder, keep=keep)
    acts = draw_acts(world.chance.of("acts"), steps)
    played = Played(acts=acts)
    with drawn(world.chance.of("program")), tapped(world), listening(world):
        draw_cluster(world)
        for host in world.hosts:
            host.start()
        begin = loop.time()
        for number, act in enumerate(acts):
            await asyncio.sleep(max(0.0, begin + act.at - loop.time()))
            if only is None or number in only:
                world.trace.add("act", f"{number}: {act}")
                act.happen(world)
        await asyncio.sleep(30.0)
        world.heal()
        await _settle(world)
        gc.collect()
        for error in loop.errors:
            world.judge.wrong("unheard error", error)
        world.over = True
        played.violations = list(world.judge.violations)
        played.digest = world.trace.digest
        played.steps = loop.steps
        played.virtual_s = loop.time() - sim.START_S
        played.reached = world.reached
        played.counts = world.judge.counts
        played.trace = list(world.trace.lines)
        for host in world.hosts:
            host.kill()
        await asyncio.sleep(0)
    return played


async def _settle(world: World) -> None:
    """Wait until everything is as people want it, and stays so."""
    loop = world.loop
    limit = loop.time() + SETTLE_S
    while True:
        await asyncio.sleep(CONFIRM_S)
        world.confirm()
        missing = world.what_is_missing()
        if not missing:
            return
        if loop.time() > limit:
            for what in missing:
                world.judge.wrong("liveness", what)
            return
