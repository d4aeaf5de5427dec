"""The wall before etcd, as a part of a supervisor: which ports, and what is said of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.packet_rule import NoRule
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.machine.etcd_wall import LOOK_EVERY_S, EtcdWall, ports_of
from tests.fakes.clock import FakeClock


class FakeRule:
    """Says in turn what is in `answers`: whether it had to be made, or why it cannot be."""

    def __init__(self, *answers: bool | str) -> None:
        self._answers = iter(answers)

    async def keep(self) -> bool:
        told = next(self._answers)
        if isinstance(told, str):
            raise NoRule(told)
        return told


@pytest.mark.parametrize(
    ("endpoints", "listens", "closed", "left"),
    [
        ("http://127.0.0.1:2379", ("0.0.0.0:9746", "127.0.0.1:9747"), {2379, 2380, 9746, 9747}, set()),
        ("https://a:2379,https://b:12379", ("off", "0.0.0.0:8080"), {2379, 2380, 12379, 8080}, set()),
        ("https://etcd.example:443", ("127.0.0.1:0", "127.0.0.1:0"), set(), {443}),
    ],
)
def test_which_ports(
    endpoints: str, listens: tuple[str, str], closed: set[int], left: set[int], tmp_path: Path
) -> None:
    """Law: etcd's, its members' beside it, the pages of host and cluster; not those that any guest's network needs."""
    told = {"ETCD_ENDPOINTS": endpoints, "KVM_LISTEN": listens[0], "KVM_WEB_LISTEN": listens[1]}
    assert ports_of(load_settings(told, default_config=tmp_path / "none.toml")) == (frozenset(closed), frozenset(left))


async def stands(rule: FakeRule | None, turns: int, *, shared: frozenset[int] = frozenset()) -> list[bool]:
    clock = FakeClock()
    wall = EtcdWall(rule, shared, clock)
    tasks = [asyncio.ensure_future(part()) for part in wall.parts]
    found = []
    for turn in range(turns):
        await clock.advance(LOOK_EVERY_S if turn else 1.0)
        found.append(wall.stands)
    for task in tasks:
        task.cancel()
    return found


async def test_it_is_kept() -> None:
    """Law: it stands, is made again when somebody took it away, and each trouble is told once."""
    with capture_logs() as logs:
        assert await stands(FakeRule(True, False, True, "no", "no", "other", True), 7) == [
            True, True, True, False, False, False, True,
        ]  # fmt: skip
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("etcd_wall.made_again", "somebody took it away"),
        ("qemu.wall_missing", "no"),
        ("qemu.wall_missing", "other"),
    ]


async def test_a_port_of_everybodys_is_no_wall() -> None:
    """Law: what is left open is told, and does not count as shut."""
    with capture_logs() as logs:
        assert await stands(FakeRule(True, False), 2, shared=frozenset({443})) == [False, False]
    assert [line["reason"] for line in logs] == ["etcd is at port 443, which guests' own networks need"]


async def test_where_none_is_wanted_there_is_none() -> None:
    """Law: KVM_ETCD_WALL=off, or QEMUs without users of their own."""
    assert await stands(None, 2) == [False, False]
