"""Failpoints of a chaos run: which are drawn, and how a supervisor and the run tell each other of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmsupervisor.adapters.etcd import Unavailable
from tests.chaos.armed import FAIL, WAYS, Points
from tests.chaos.points import DRAWN, UNREACHED, drawn
from tests.simulation.points import CUTS, POINTS


def test_every_point_is_drawn_or_has_a_reason() -> None:
    """Law: each way at each point comes of some number; only where nobody waits, nothing fails."""
    assert set(UNREACHED) <= set(POINTS)
    found = {drawn(number) for number in range(len(DRAWN) * len(WAYS))}
    wanted = {(name, way) for name in DRAWN for way in WAYS} - {(name, FAIL) for name in CUTS}
    assert found == wanted


async def test_the_armed_point_fails_once(tmp_path: Path) -> None:
    """Law: nothing happens at others; what was reached is on record, by its name and once."""
    run, supervisor = Points(tmp_path), Points(tmp_path)
    assert run.reached == frozenset()
    run.arm("lock written", FAIL)
    assert supervisor.come_to("shut out") is None
    armed = supervisor.come_to("lock written")
    assert armed is not None
    with pytest.raises(Unavailable, match="lock written"):
        await armed
    assert supervisor.come_to("lock written") is None
    assert run.reached == {"shut out", "lock written"}
    assert run.disarm()


def test_what_was_not_met_is_armed_no_more(tmp_path: Path) -> None:
    """Law: a fault that is over hits nobody later."""
    run = Points(tmp_path)
    run.arm("lock written", FAIL)
    assert not run.disarm()
    assert Points(tmp_path).come_to("lock written") is None
