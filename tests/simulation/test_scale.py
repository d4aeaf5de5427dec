"""What etcd is asked grows as docs/scale.md says: few hosts are enough to see it."""

from __future__ import annotations

import pytest

from tests.simulation.scale import APART, CANDIDATES, simulate
from tests.simulation.scale_real import play_for_real

WATCHED = 5
"""Prefixes that each host watches: wishes with locks, those for hosts, placements, sessions, the history's name."""

LOCK_WRITES = 2
"""Of a machine that starts: the lock is taken, and says that the guest runs."""


def test_a_host_asks_no_more_when_there_are_more_hosts() -> None:
    """Requests of a host at its start depend on its own instances; with the default `LOCK` all hear of each lock."""
    few, many = (simulate(["mass-start"], hosts, 2 * hosts, None)[0] for hosts in (3, 9))
    for told in (few, many):
        assert told.asked.requests["Watch"] == WATCHED * told.hosts
        assert told.asked.requests["LeaseGrant"] == told.hosts
    assert many.asked.requests["Txn"] / many.hosts == pytest.approx(few.asked.requests["Txn"] / few.hosts, rel=0.3)
    heard = many.asked.events["locks"]
    assert heard > LOCK_WRITES * many.instances * many.hosts / 2


def test_locks_apart_are_heard_of_by_those_whom_they_concern() -> None:
    """The host that runs an instance, and its candidates, however many others there are."""
    (told,) = simulate(["mass-start"], 9, 18, APART)
    assert 0 < told.asked.events["locks"] <= LOCK_WRITES * told.instances * (1 + CANDIDATES)
    own_and_candidates = told.instances // told.hosts * (1 + CANDIDATES)
    # One watch more: of a key that no lock has.
    assert told.asked.requests["Watch"] == told.hosts * (WATCHED + own_and_candidates + 1)


@pytest.mark.soak
def test_a_real_etcd_is_asked_what_the_simulated_one_is() -> None:
    """At rest exactly a session's requests; the watches of a start exactly; its transactions within a half."""
    (start, rest), (real_start, real_rest) = (
        simulate(["mass-start", "rest"], 3, 15, None),
        play_for_real(["mass-start", "rest"], 3, 15, None, boot_s=0.0),
    )
    assert real_start.asked.requests["LeaseGrant"] == start.asked.requests["LeaseGrant"]
    assert real_start.asked.requests["Watch"] >= start.asked.requests["Watch"]
    assert real_start.asked.requests["Txn"] == pytest.approx(start.asked.requests["Txn"], rel=0.5)
    assert sum(real_rest.asked.events.values()) == sum(rest.asked.events.values()) == 0
    for method in ("LeaseKeepAlive", "Range"):
        assert real_rest.asked.requests[method] == pytest.approx(rest.asked.requests[method], abs=2 * 3)
