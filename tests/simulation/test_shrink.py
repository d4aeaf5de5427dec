"""What a violation does not need is taken away."""

from __future__ import annotations

import pytest

from tests.simulation.shrink import shrink


@pytest.mark.parametrize("needed", [{3}, {0, 15}, {2, 3, 9}, set(), set(range(16))])
def test_what_is_left_is_what_is_needed(needed: set[int]) -> None:
    assert shrink(frozenset(range(16)), lambda only: needed <= only) == needed
