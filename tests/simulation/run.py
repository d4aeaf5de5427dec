"""One history: a cluster is made, faults happen, all is healed, and everything must run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation import advice, faults, people
from tests.simulation import loop as sim
from tests.simulation.acts import Act, draw_acts, draw_cluster, draw_settings
from tests.simulation.chance import Chance
from tests.simulation.emptying import Emptying, Returning
from tests.simulation.judge import Violation
from tests.simulation.outside import drawn
from tests.simulation.points import listening
from tests.simulation.settling import CONFIRM_S, LOOK_S, Settling
from tests.simulation.watches import followed
from tests.simulation.world import Enough, World, tapped

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
    lock: str | None = None,
) -> Played:
    """Play one history.

    Args:
        seed: what is drawn.
        steps: how many acts.
        only: numbers of the acts that happen; None for all.
        kinds: of acts that are drawn; all, where none is named.
        keep: how many lines of its trace are kept; None for all.
        to_the_first: whether to end with the first violation.
        lock: `LOCK`; None for the default.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    acts = draw_acts(Chance(seed).of("acts"), steps, kinds)

    def played() -> Played:
        settings = draw_settings(Chance(seed).of("settings"))
        world = World(sim.SimLoop(seed), Chance(seed), folder, keep=keep, lock=lock, settings=settings)
        world.to_the_first = to_the_first
        with contextlib.suppress(Enough), tapped(world):
            sim.run_within(world.loop, lambda loop: _play(world, acts, only))
        return _played(world, acts)

    try:
        # When `played` has returned, nothing holds its world any more.
        with sim.apart():
            return played()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _played(world: World, acts: list[Act]) -> Played:
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
    with drawn(world.chance.of("program")), listening(world), followed(world):
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
        advice.break_locks_of_nobody(world)
        await _empty(world)
        await _settle(world)
        gc.collect()
        # What the collector came upon is told in a step.
        await asyncio.sleep(0)
        world.end()
        for host in world.hosts:
            host.kill()
        await asyncio.sleep(0)


async def _empty(world: World) -> None:
    """Each host that drains becomes empty, or says what keeps it from that; then people end all drains."""
    hosts = sorted(host for host, wish in world.host_wishes.items() if "drain" in wish)
    if not hosts:
        return
    emptying = Emptying(world, hosts)
    while not emptying.is_over and not emptying.look():
        await asyncio.sleep(CONFIRM_S)
        advice.heed(world)
        advice.order_drains_again(world)
    emptying.end()
    chance = world.chance.of("undrain")
    for host in hosts:
        world.undrain(host, chance.choice([None, "live", "live", "cold"]))


async def _settle(world: World) -> None:
    """Wait until everything is as people want it, and stays so."""
    settling, returning = Settling(world), Returning(world)
    is_well = False
    while not is_well and not (settling.is_over and returning.is_over):
        for _ in range(int(CONFIRM_S / LOOK_S)):
            await asyncio.sleep(LOOK_S)
            is_well = settling.look() and returning.look()
        advice.heed(world)
    settling.end()
    returning.end()
