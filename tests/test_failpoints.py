"""Failpoints are off, and each is where the simulation looks for it."""

from __future__ import annotations

from collections import Counter

import pytest

from kvmsupervisor import failpoints
from tests.simulation.points import CUTS, POINTS


def test_they_are_off() -> None:
    """Nobody is told in production."""
    assert failpoints.reached is None


async def test_who_listens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    async def wait() -> None:
        told.append("waited")

    def reached(name: str) -> object:
        told.append(name)
        return wait() if name == "one" else None

    monkeypatch.setattr(failpoints, "reached", reached)
    await failpoints.point("one")
    await failpoints.point("two")
    failpoints.cut("three")
    assert told == ["one", "waited", "two", "three"]


def test_each_name_is_one_place() -> None:
    assert set(CUTS) <= set(POINTS)
    assert [name for name, times in Counter(POINTS).items() if times > 1] == []
