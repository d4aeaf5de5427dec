"""In which order the workers of a run take the tests: the dear ones first, each worker from another place on.

A test with real servers mostly waits (a third of a processor), one of the simulation computes. In the order of their
names all workers wait at once, and compute at once, and the last ones are dear. So the dear ones are dealt out one by
one, and each hand begins elsewhere; the cheap ones follow, and whoever has none left takes half of another's.

The first distribution of xdist's `worksteal` is by number, in order; that is what hands are made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import pytest

T = TypeVar("T")

DEAR_FOLDERS = ("tests/attack/", "tests/chaos/", "tests/e2e/", "tests/guard/", "tests/simulation/")

DEAR_FIXTURES = frozenset({"ceph", "etcd_alone", "etcd_cluster", "etcd_server", "guest", "lan", "netns", "puppet"})
"""Those that start servers or guests, or that make networks."""


def is_dear(item: pytest.Item) -> bool:
    """Whether that test may take seconds."""
    return item.nodeid.startswith(DEAR_FOLDERS) or not DEAR_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def together(items: Sequence[pytest.Item]) -> list[list[pytest.Item]]:
    """Tests that share what was made for their module; all others are alone."""
    found: list[list[pytest.Item]] = []
    for _, group in groupby(items, key=lambda item: item.nodeid.partition("::")[0]):
        tests = list(group)
        found += [tests] if any(map(_needs_module, tests)) else [[test] for test in tests]
    return found


def _needs_module(item: pytest.Item) -> bool:
    definitions = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009 - pytest has no public way
    return any(each[-1].scope == "module" for each in definitions.values())


def dealt(dear: Sequence[Sequence[T]], cheap: Sequence[T], hands: int) -> list[T]:
    """All tests, in an order whose contiguous parts of equal size are the hands.

    Args:
        dear: groups that stay together.
        cheap: the others.
        hands: how many.
    """
    number = sum(map(len, dear)) + len(cheap)
    rest = iter(cheap)
    order: list[T] = []
    for hand, size in enumerate(_sizes(number, hands)):
        mine = dear[hand::hands]
        begin = len(mine) * hand // hands
        taken = [test for group in (*mine[begin:], *mine[:begin]) for test in group]
        order += taken
        order += _first(rest, size - len(taken))
    return [*order, *rest]


def _sizes(number: int, hands: int) -> Iterator[int]:
    """As xdist divides them."""
    for left in range(hands, 0, -1):
        yield number // left
        number -= number // left


def _first(rest: Iterator[T], number: int) -> list[T]:
    return [test for _, test in zip(range(number), rest, strict=False)]


def deal(items: list[pytest.Item], hands: int, is_dear: Callable[[pytest.Item], bool] = is_dear) -> None:
    """Put the tests of a run into that order."""
    cheap = [item for item in items if not is_dear(item)]
    items[:] = dealt(together([item for item in items if is_dear(item)]), cheap, hands)
