"""One history: a cluster is made, faults happen, all is healed, and everything must run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.simulation import faults, people
from tests.simulation import loop as sim
from tests.simulation.acts import Act, draw_acts, draw_cluster
from tests.simulation.chance import Chance
from tests.simulation.judge import Violation
from tests.simulation.outside import drawn
from tests.simulation.points import listening
from tests.simulation.world import Enough, World, tapped

SETTLE_S = 900.0
"""Within which everything must run once all is healed: TTL + takeover's wait + the longest pause of a restart (300 s)
and as much again."""

CONFIRM_S = 20.0

KNOWN = (faults, people)
"""Whose kinds can be drawn."""


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


def play(
    seed: int,
    *,
    steps: int = 12,
    only: Collection[int] | None = None,
    kinds: Collection[str] = (),
    keep: int | None = 0,
    to_the_first: bool = False,
) -> Played:
    """Play one history.

    Args:
        seed: what is drawn.
        steps: how many acts.
        only: numbers of the acts that happen; None for all.
        kinds: of acts that are drawn; all, where none is named.
        keep: how many lines of its trace are kept; None for all.
        to_the_first: whether to end with the first violation.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    worlds: list[World] = []

    def begin(loop: sim.SimLoop) -> Coroutine[Any, Any, None]:
        world = World(loop, seed, folder, keep=keep)
        world.to_the_first = to_the_first
        worlds.append(world)
        return _play(world, acts, only)

    acts = draw_acts(Chance(seed).of("acts"), steps, kinds)
    try:
        with contextlib.suppress(Enough):
            sim.run(begin, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (world,) = worlds
    return Played(
        acts=acts,
        violations=list(world.judge.violations),
        digest=world.trace.digest,
        steps=world.loop.steps,
        virtual_s=world.ended_at - sim.START_S,
        counts=world.judge.counts,
        trace=list(world.trace.lines),
        reached=world.reached,
    )


async def _play(world: World, acts: list[Act], only: Collection[int] | None) -> None:
    loop = world.loop
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
        for name in sorted(world.wishes):
            people.mend_keys(world, name, "a")
        world.heal()
        await _settle(world)
        gc.collect()
        # What the collector came upon is told in a step.
        await asyncio.sleep(0)
        world.end()
        for host in world.hosts:
            host.kill()
        await asyncio.sleep(0)


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
