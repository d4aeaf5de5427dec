"""The line about one instance."""

from __future__ import annotations

from typing import Any

import pytest

from kvmsupervisor.cluster.overview import Cluster, assemble
from kvmsupervisor.domain.agent import GuestAddress, GuestFacts
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.web.rows import MOST, Rank, Row, row_of
from tests.cli.conftest import World
from tests.fakes.etcd import FakeEtcd

SECRET = "correct horse battery staple"  # noqa: S105 - of nothing


def cluster_of(world: World) -> Cluster:
    listed = world.etcd._server.select("/", prefix=True)
    layout = world.layout

    def below(prefix: str) -> list[Any]:
        return [kv for kv in listed if kv.key.startswith(prefix.encode())]

    return assemble(
        layout,
        wishes=below(layout.wishes_prefix),
        placements=below(layout.placements_prefix),
        statuses=below(layout.statuses_prefix),
        sessions=below(layout.hosts_prefix),
    )


def the_row(world: World, name: str = "1") -> Row:
    cluster = cluster_of(world)
    return row_of(cluster.instances[InstanceId(name)], cluster)


@pytest.fixture
def world() -> World:
    made = World(FakeEtcd())
    made.host("alpha")
    return made


RANKS: list[tuple[Phase, dict[str, Any], Rank]] = [
    (Phase.RUNNING, {"pid": 1, "run_state": "running"}, Rank.RUNNING),
    (Phase.RUNNING, {"pid": 1, "run_state": "io-error"}, Rank.PROBLEM),
    (Phase.RUNNING, {"pid": 1, "run_state": "running", "pending": ("ram",)}, Rank.NOTICE),
    (Phase.RUNNING, {"pid": 1, "run_state": "running", "notice": "so and so"}, Rank.NOTICE),
    (Phase.RUNNING, {"pid": 1, "run_state": "running", "problems": ("ram: bad",)}, Rank.PROBLEM),
    (Phase.RUNNING, {"pid": 1, "run_state": "running", "held": True}, Rank.PROBLEM),
    (Phase.RUNNING, {"pid": 1, "run_state": "running", "guarded": False}, Rank.PROBLEM),
    (Phase.RUNNING, {"pid": 1, "run_state": "running", "unplugged": ("NIC 0",)}, Rank.PROBLEM),
    (Phase.STOPPED, {}, Rank.STOPPED),
    (Phase.BACKOFF, {}, Rank.PROBLEM),
    (Phase.INVALID, {}, Rank.PROBLEM),
    (Phase.WAITING, {}, Rank.PROBLEM),
    (Phase.STARTING, {}, Rank.UNDER_WAY),
    (Phase.STOPPING, {}, Rank.UNDER_WAY),
    (Phase.MIGRATING, {}, Rank.UNDER_WAY),
]


@pytest.mark.parametrize(("phase", "fields", "rank"), RANKS)
def test_how_much_it_needs_a_person(world: World, phase: Phase, fields: dict[str, Any], rank: Rank) -> None:
    """What a person has to do something about comes first."""
    world.keys("1", host="alpha", ram="1G")
    world.status("1", "alpha", phase, **fields)
    assert the_row(world).rank is rank


def test_a_host_without_a_session_is_unknown(world: World) -> None:
    """Law: nothing is known of what runs there; what was seen last is in the reason."""
    world.running("1", host="beta")
    row = the_row(world)
    assert (row.phase, row.rank, row.host) == ("unknown", Rank.PROBLEM, "beta")
    assert "last seen: running" in row.reason


def test_everything_is_short_and_can_be_seen(world: World) -> None:
    """Law: a megabyte, an override of the direction, and thousands of problems make one line."""
    many = tuple(f"key {number}" for number in range(1000))
    agent = GuestFacts(addresses=tuple(GuestAddress(interface="e", address=f"10.0.0.{n}") for n in range(30)))
    world.keys("1", host="alpha", ram="1G", description="\u202e" + "d" * 60_000)
    world.status(
        "1", "alpha", Phase.BACKOFF, "\u202e" + "x" * 1_000_000, problems=many, pending=many, agent=agent,
        last_exit="\x1b[31m", notice="\u2067",
    )  # fmt: skip
    row = the_row(world)
    texts = [row.reason, row.description, row.last_exit or "", row.notice or "", *row.problems, *row.addresses]
    assert all(text.isprintable() and len(text) < 500 for text in texts)
    assert len(row.problems) == len(row.pending) == len(row.addresses) == MOST + 1
    assert row.problems[-1] == f"and {1000 - MOST} more"


def test_no_secret_is_in_it(world: World) -> None:
    """Law: whatever key a secret stands in, and in a description too, it is not shown."""
    world.running("1", spice_password=SECRET, description=f"password={SECRET.split(maxsplit=1)[0]}")
    assert "correct" not in str(the_row(world).to_object())
