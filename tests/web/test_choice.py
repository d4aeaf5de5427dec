"""Which instances a list shows, and in which order: all of it in the address."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.web.choice import SORTS, Choice
from kvmsupervisor.web.rows import Rank, Row


def row(name: str, **fields: Any) -> Row:
    said: dict[str, Any] = {
        "id": name,
        "rank": Rank.RUNNING,
        "host": "alpha",
        "placed_for": None,
        "phase": "running",
        "halted": None,
        "since": "2026-03-01T12:00:00Z",
        "reason": "QEMU runs the guest",
        "last_exit": None,
        "notice": None,
        "problems": (),
        "pending": (),
        "restarts": 0,
        "epoch": 1,
        "ram_mib": 1024,
        "addresses": (),
        "description": "",
        "acted_on": 1,
        "revision": 1,
    }
    return Row(**said | fields)


ROWS = [
    row("vm2", description="the shop", ram_mib=4096),
    row("vm9", rank=Rank.STOPPED, phase="stopped", host="beta", reason="`power` is off"),
    row("vm10", rank=Rank.PROBLEM, phase="backoff", reason="crashed (signal 9)", since="2026-03-02T12:00:00Z"),
    row("vm11", rank=Rank.UNDER_WAY, phase="starting", addresses=("10.0.0.7",), restarts=2),
]


def chosen(query: str) -> list[str]:
    return [one.id for one in Choice.parse(parse_qs(query)).choose(ROWS)]


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("", ["vm10", "vm11", "vm2", "vm9"]),
        ("sort=id", ["vm2", "vm9", "vm10", "vm11"]),
        ("sort=-id", ["vm11", "vm10", "vm9", "vm2"]),
        ("sort=since", ["vm2", "vm9", "vm11", "vm10"]),
        ("sort=-restarts", ["vm11", "vm2", "vm9", "vm10"]),
        ("sort=host", ["vm2", "vm10", "vm11", "vm9"]),
        ("sort=-ram", ["vm2", "vm9", "vm10", "vm11"]),
        ("q=SHOP", ["vm2"]),
        ("q=vm1+signal", ["vm10"]),
        ("q=10.0.0.7", ["vm11"]),
        ("q=nothing", []),
        ("host=beta", ["vm9"]),
        ("phase=starting", ["vm11"]),
        ("show=problems", ["vm10"]),
        ("sort=nonsense&other=1", ["vm10", "vm11", "vm2", "vm9"]),
    ],
)
def test_what_an_address_asks_for(query: str, wanted: list[str]) -> None:
    """Law: without a wish problems come first; equal ones are in the natural order of their ids."""
    assert chosen(query) == wanted


@given(
    words=st.text(max_size=50).map(lambda text: text.strip()).filter(str.isprintable),
    host=st.text(max_size=20).map(lambda text: text.strip()).filter(str.isprintable),
    problems=st.booleans(),
    sort=st.sampled_from(list(SORTS)),
    down=st.booleans(),
)
def test_the_address_says_all_of_it(words: str, host: str, problems: bool, sort: str, down: bool) -> None:
    """Law: a list is found again by its address."""
    one = Choice(words=words, host=host, problems=problems, sort=sort, down=down)
    assert Choice.parse(parse_qs(urlsplit(one.address()).query)) == one
