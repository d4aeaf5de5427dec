"""Plays histories: `python -m tests.simulation --seed 7 --steps 12`, `--seeds 500`, `--seed 7 --shrink`.

Exit status 1 when something was violated. docs/reliability.md, "Simulation".
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from tests.simulation.mutants import MUTANTS
from tests.simulation.points import ELSEWHERE, HERE, POINTS
from tests.simulation.run import Played, play
from tests.simulation.shrink import shrink
from tests.simulation.workers import Lost, play_all

Plays = Callable[..., Played]
"""`play`, with what the command line says of all histories."""

STEPS = 16
"""Acts of a history when nothing else is said."""

TOLD_EVERY = 1000
"""Histories after which a long run says how far it is."""


def _numbers(text: str) -> list[int]:
    """`3,5,9` or `1-500`, as numbers."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def seeds_of(text: str) -> list[int]:
    """`3,5,9` or `1-500`; a plain number is how many."""
    return _numbers(f"1-{text}" if text.isdecimal() else text)


def _one(plays: Plays, seed: int, only: list[int] | None, *, trace: bool) -> int:
    played = plays(seed, only=only, keep=None if trace else 0)
    if trace:
        print("\n".join(played.trace))
    for number, act in enumerate(played.acts):
        if only is None or number in only:
            print(f"{number:3}: {act}")
    print(f"{played.steps} steps, {played.virtual_s:.0f} virtual seconds, {dict(played.counts)}")
    print(f"digest {played.digest}")
    for violation in played.violations:
        print(f"VIOLATION {violation}")
    return 1 if played.violations else 0


def _shrink(plays: Plays, seed: int, steps: int) -> int:
    """Find the acts that a violation needs, and the command that plays them."""
    played = plays(seed)
    if not played.violations:
        print("nothing was violated")
        return 0
    law = played.violations[0].law

    def breaks(only: frozenset[int]) -> bool:
        return any(one.law == law for one in plays(seed, only=only).violations)

    left = sorted(shrink(frozenset(range(steps)), breaks))
    named = ",".join(map(str, left)) or "none"
    print(f"[{law}] needs {len(left)} of {steps} acts: --seed {seed} --steps {steps} --acts {named}")
    return _one(plays, seed, left, trace=True)


def _many(plays: Plays, seeds: list[int], workers: int) -> int:
    begun = time.monotonic()
    counts: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    bad, done, lost, virtual_s, work = 0, 0, 0, 0.0, 0
    for seed, played in _all(plays, seeds, workers):
        done += 1
        if isinstance(played, Lost):
            lost += 1
            print(f"seed {seed}: NOT PLAYED to its end: {played.how}", flush=True)
            continue
        virtual_s += played.virtual_s
        work += played.steps
        counts.update(played.counts)
        reached.update(played.reached)
        if played.violations:
            bad += 1
            print(f"seed {seed}: {played.violations[0]}", flush=True)
        if done % TOLD_EVERY == 0:
            print(f"{done} of {len(seeds)} histories, {bad} with a violation{_not_played(lost)}", flush=True)
    took_s = time.monotonic() - begun
    print(
        f"{done} histories, {bad} with a violation{_not_played(lost)}, "
        f"in {took_s:.0f} s: {60 * done / took_s:.0f} a minute, "
        f"{virtual_s / 60 / took_s:.1f} virtual minutes a second, {work} steps"
    )
    print(", ".join(f"{name}: {number}" for name, number in sorted(counts.items())))
    never = sorted(set(HERE) - set(reached))
    print(
        f"failpoints reached: {len(HERE) - len(never)} of {len(HERE)}, never: {never}; "
        f"{len(ELSEWHERE)} more of {len(POINTS)} are cut in {len(set(ELSEWHERE.values()))} other tests"
    )
    return 1 if bad or lost else 0


def _not_played(lost: int) -> str:
    return f", {lost} NOT PLAYED to their ends" if lost else ""


def _all(plays: Plays, seeds: list[int], workers: int) -> Iterator[tuple[int, Played | Lost]]:
    if workers == 1:
        return ((seed, plays(seed)) for seed in seeds)
    return play_all(plays, seeds, workers=workers, tell=partial(print, flush=True))


def _mutants(names: list[str], seeds: list[int], steps: int) -> int:
    """For each mutant the first of the seeds that finds it, as the table in `mutants.py` wants to have it."""
    missed = 0
    for name in names:
        mutant = MUTANTS[name]
        for seed in seeds or [mutant.seed]:
            with mutant.planted():
                found = play(seed, steps=steps, kinds=mutant.kinds, to_the_first=True).violations
            if found and not play(seed, steps=steps, kinds=mutant.kinds, to_the_first=True).violations:
                print(f"{name}: {mutant.law}; seed {seed}: {str(found[0])[:150]}", flush=True)
                break
        else:
            missed += 1
            print(f"{name}: {mutant.law}; NOT FOUND", flush=True)
    return 1 if missed else 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one, and tell what happened")
    parser.add_argument("--seeds", type=seeds_of, help="play these (500, 1-500, or 3,5,9), and tell what was violated")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many acts a history has")
    parser.add_argument("--acts", help="only these of its acts happen (numbers, or none)")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=[], help="only these kinds are drawn")
    parser.add_argument("--trace", action="store_true", help="print all that happened")
    parser.add_argument("--shrink", action="store_true", help="find the acts that the violation needs")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="plant this fault first")
    parser.add_argument(
        "--mutants", nargs="*", help="look for the first of the seeds that finds each of these (or all)"
    )
    parser.add_argument("--lock", help="the setting LOCK, such as /locks/%%i")
    parser.add_argument("--workers", type=int, default=1, help="processes that play --seeds")
    told = parser.parse_args()
    if told.mutants is not None:
        return _mutants(told.mutants or list(MUTANTS), told.seeds or [], told.steps)
    plays: Plays = partial(play, steps=told.steps, kinds=told.kinds, lock=told.lock)
    with MUTANTS[told.mutant].planted() if told.mutant is not None else contextlib.nullcontext():
        if told.seeds is not None:
            return _many(plays, told.seeds, told.workers)
        if told.seed is None:
            parser.error("--seed or --seeds is needed")
        if told.shrink:
            return _shrink(plays, told.seed, told.steps)
        only = None if told.acts is None else [] if told.acts == "none" else _numbers(told.acts)
        return _one(plays, told.seed, only, trace=told.trace)


if __name__ == "__main__":
    sys.exit(main())
