"""The simulation can fail: each fault that is planted is found. The table of them is `mutants.py`."""

from __future__ import annotations

import pytest

from tests.simulation.__main__ import STEPS
from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.run import play

NEAR = 60
"""How many more seeds are tried when the one on record finds it no more: changes of the program change histories."""

FAR = range(1, 1001)


def finds(mutant: Mutant, seed: int, *, kinds: tuple[str, ...]) -> bool:
    """Whether something is violated with it that is not without it."""
    with mutant.planted():
        found = play(seed, steps=STEPS, kinds=kinds, to_the_first=True).violations
    return bool(found) and not play(seed, steps=STEPS, kinds=kinds, to_the_first=True).violations


@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_found(name: str) -> None:
    """By the seed that is on record for it, or by one near that."""
    mutant = MUTANTS[name]
    assert any(finds(mutant, seed, kinds=mutant.kinds) for seed in range(mutant.seed, mutant.seed + 1 + NEAR)), (
        f"write another seed into the table: python -m tests.simulation --mutants {name} --seeds 1-200"
    )


@pytest.mark.soak
@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_found_among_all_kinds(name: str) -> None:
    """Without a word which kinds of acts it takes."""
    assert any(finds(MUTANTS[name], seed, kinds=()) for seed in FAR)


def test_the_faults_of_releases_are_in_the_table() -> None:
    """A1 to A11, each put back."""
    laws = " ".join(mutant.law for mutant in MUTANTS.values()).replace(",", " ").split()
    assert {f"A{number}" for number in range(1, 12)} <= set(laws)


def test_nothing_stays_planted() -> None:
    """A history after a mutant's is the one that it was before."""
    before = play(7, steps=4).digest
    assert finds(MUTANTS["runs-before-the-record"], 1, kinds=())
    assert play(7, steps=4).digest == before
