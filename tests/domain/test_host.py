"""What hosts say of themselves in their sessions, taken together."""

from __future__ import annotations

import pytest

from kvmsupervisor.domain.host import dissent

MINE, OTHER = "/kvm/%i/lock", "/elsewhere/%i/lock"


@pytest.mark.parametrize("others", [{}, {"b": MINE}, {"b": MINE, "c": OTHER}, {"b": OTHER, "c": OTHER, "d": MINE}])
def test_with_one_that_agrees_somebody_else_is_wrong(others: dict[str, str]) -> None:
    """Law: one host with a wrong LOCK stops no other host from starting machines."""
    assert dissent(MINE, others) is None


def test_alone_against_all_others_it_holds() -> None:
    """Law: its own LOCK is named, and some of the others', however many there are."""
    assert str(dissent(MINE, {"b": OTHER})).startswith(
        f"LOCK is {MINE} here, and another one on every other host (b: {OTHER})"
    )
    many = {f"h{number}": OTHER for number in range(100)}
    assert f"h0: {OTHER}, h1: {OTHER}, h10: {OTHER} and 97 more)" in str(dissent(MINE, many))
