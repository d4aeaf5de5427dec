"""What a run says of itself."""

from __future__ import annotations

import json
from dataclasses import replace

from tests.chaos.faults import Terms
from tests.chaos.report import Episode, Felt, Report, rows

ONE = Felt(machine="vm0", hit=True, guarded=False, away_s=2.0, restarts=1, bound_s=8.0, blind_s=0.1)


def an_episode(*kinds: str, felt: tuple[Felt, ...]) -> Episode:
    return Episode(kinds=kinds, told=(), began_s=1.0, lasted_s=2.0, felt=felt)


EPISODES = (
    an_episode("qemu-kill", felt=(ONE, replace(ONE, machine="vm1", hit=False, away_s=0.1, restarts=0))),
    an_episode("qemu-kill", felt=(replace(ONE, away_s=4.0, bound_s=9.0),)),
    an_episode("qemu-kill", felt=(replace(ONE, machine="guarded", guarded=True, away_s=7.0),)),
    an_episode("cut-etcd", "host-edit", felt=(replace(ONE, away_s=20.0),)),
)

REPORT = Report(
    seed=7,
    minutes=3,
    took_s=180.0,
    terms=Terms(machines=2, hosts=3, ttl_s=5, wait_s=40, guarded=True),
    boot_s=1.0,
    faults={"qemu-kill": 3, "cut-etcd": 1, "host-edit": 1},
    episodes=EPISODES,
    replay="make chaos SEED=7 MINUTES=3",
)


def test_the_figures_of_each_kind() -> None:
    """Law: those that were hit count, median and worst; what came with others, and what has a guard, stands apart."""
    head, *body = rows(EPISODES)
    assert head[0] == "fault"
    assert body == [
        ("qemu-kill", "2", "2", "2", "3.0 s", "4.0 s", "9.0 s"),
        ("qemu-kill, under guard", "1", "1", "1", "7.0 s", "7.0 s", "8.0 s"),
        ("several at once", "1", "1", "1", "20.0 s", "20.0 s", "8.0 s"),
    ]


def test_a_violation_is_told_with_what_replays_it() -> None:
    """Law: people find what broke, the seed and the command; programs find all of it."""
    assert str(REPORT).endswith("no violation")
    broken = replace(REPORT, violations=("vm0: epoch: somebody wrote late",))
    assert "VIOLATION vm0: epoch: somebody wrote late\nagain: make chaos SEED=7 MINUTES=3" in str(broken)
    assert "5 faults on 3 machines of 3 hosts" in str(broken)
    assert json.loads(broken.to_json())["violations"] == ["vm0: epoch: somebody wrote late"]
