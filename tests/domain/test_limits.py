"""Limits in the words of both generations of cgroups."""

import pytest

from kvmsupervisor.domain.limits import cpu_weight


@pytest.mark.parametrize(
    ("shares", "weight"), [(1024, 100), (2, 1), (512, 50), (2048, 200), (102_400, 10_000), (262_144, 10_000)]
)
def test_shares_become_weight_in_proportion(shares: int, weight: int) -> None:
    """Law: the default stays the default, double stays double, and the result is one that the kernel takes."""
    assert cpu_weight(shares) == weight
