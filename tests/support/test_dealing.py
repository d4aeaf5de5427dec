"""The order in which workers take the tests of a run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.dealing import dealt


@given(st.lists(st.integers(1, 5), max_size=30), st.integers(0, 60), st.integers(1, 7))
def test_none_is_lost(sizes: list[int], cheap: int, hands: int) -> None:
    """Law: each test is there once; what belongs together follows one after the other."""
    groups = [[(number, at) for at in range(size)] for number, size in enumerate(sizes)]
    rest = [(-1, at) for at in range(cheap)]
    order = dealt(groups, rest, hands)
    assert sorted(order) == sorted([*rest, *(test for group in groups for test in group)])
    for group in groups:
        begin = order.index(group[0])
        assert order[begin : begin + len(group)] == group


def test_each_hand_begins_with_dear_ones_and_elsewhere() -> None:
    """Law: as xdist divides them, each worker has its share of the dear ones, first, and from another place on."""
    order = dealt([[f"d{number}"] for number in range(6)], [f"c{number}" for number in range(9)], 3)
    assert [order[:5], order[5:10], order[10:]] == [
        ["d0", "d3", "c0", "c1", "c2"],
        ["d1", "d4", "c3", "c4", "c5"],
        ["d5", "d2", "c6", "c7", "c8"],
    ]
