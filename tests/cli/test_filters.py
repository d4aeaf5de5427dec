"""`list` with filters, and its wide form: what is shown is what was asked for, and nothing is left out in silence."""

from __future__ import annotations

import pytest

from kvmsupervisor.domain.agent import GuestAddress, GuestFacts
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World


@pytest.fixture
def shop(world: World) -> World:
    """Two hosts, one of them gone, and machines of two teams."""
    world.host("alpha")
    world.running("web1", **{"x-team": "shop", "x-tier": "front"})
    world.running("web2", **{"x-team": " shop\n"})
    world.running("db1", host="beta", **{"x-team": "shop"})
    world.keys("mail", ram="1G", host="alpha", **{"x-team": "office"})
    world.status("mail", "alpha", Phase.STOPPED)
    return world


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        (["--host", "alpha"], ["mail", "web1", "web2"]),
        (["--host", "alpha", "--host", "beta"], ["db1", "mail", "web1", "web2"]),
        (["--phase", "running"], ["web1", "web2"]),
        (["--phase", "unknown"], ["db1"]),
        (["--phase", "unknown", "--phase", "stopped"], ["db1", "mail"]),
        (["-l", "x-team=shop"], ["db1", "web1", "web2"]),
        (["-l", "x-team=shop", "-l", "x-tier=front"], ["web1"]),
        (["-l", "x-team=shop", "--host", "alpha", "--phase", "running"], ["web1", "web2"]),
        (["-l", "x-team=shop", "--phase", "stopped"], []),
        (["--host", "alph"], []),
        (["-l", "x-team=sho"], []),
    ],
)
def test_filters_combine_and_compare_exactly(shop: World, filters: list[str], ids: list[str]) -> None:
    """The table and JSON have the same ones; the unfiltered JSON objects are not changed by a filter."""
    assert list(shop.rows("list", *filters)) == ids
    every = {one["id"]: one for one in shop.json("list")}
    assert shop.json("list", *filters) == [every[name] for name in ids]


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        (["--host", "alpah"], "no instance names a host 'alpah' (with a session: alpha; did you mean 'alpha'?)"),
        (["-l", "x-taem=shop"], "no instance has a key 'x-taem'; did you mean 'x-team'?"),
        (["-l", "x-team=shpo"], "no instance has x-team='shpo'; did you mean 'shop'?"),
        (["-l", "x-team=office", "--phase", "running"], "no instance is so\n"),
    ],
)
def test_an_empty_list_says_which_value_nobody_has(shop: World, filters: list[str], said: str) -> None:
    """In a pipe too, and beside JSON: standard output stays for programs, and the exit code is 0."""
    for more in ([], ["-o", "json"], ["-o", "wide"]):
        result = shop.run("list", *filters, *more)
        assert result.exit_code == 0
        assert said in result.stderr
    assert shop.json("list", *filters) == []


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        (["--phase", "runing"], "Did you mean running?"),
        (["--phase", "Running"], "Did you mean running?"),
        (["--phase", "\x1b[2J"], "is no phase; the phases are"),
        (["-l", "team=shop"], "such as x-team"),
        (["-l", "power=on"], "is no key for people"),
        (["-l", "x-team"], "is not KEY=VALUE"),
        (["-l", "=shop"], "is not KEY=VALUE"),
    ],
)
def test_what_is_no_filter_is_usage(shop: World, filters: list[str], said: str) -> None:
    """A filter that cannot be right is refused, not taken for one that nothing passes."""
    result = shop.run("list", *filters)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.split())
    assert "\x1b" not in result.stderr


def test_a_placed_instance_is_found_at_the_host_that_reports_it(shop: World) -> None:
    """`--host` is the column HOST: what a host runs, not what is meant for it."""
    shop.keys("web2", host="gamma")
    assert "web2" in shop.rows("list", "--host", "alpha")
    assert "web2" not in shop.rows("list", "--host", "gamma")


def test_wide_shows_addresses_ram_and_description(world: World) -> None:
    """Each address once, four of them at most; a description is one short line, whatever it holds."""
    world.host("alpha")
    long = "first line\nsecond \x1b[2J " + "word " * 100
    world.running("1", description=long)
    found = [GuestAddress(interface=f"e{n}", address=f"192.0.2.{n // 2}") for n in range(12)]
    world.status("1", "alpha", Phase.RUNNING, agent=GuestFacts(addresses=tuple(found)), pid=1)
    world.running("2")
    wide = world.run("list", "-o", "wide").stdout
    assert "192.0.2.0, 192.0.2.1, 192.0.2.2, 192.0.2.3 and 2 more" in wide
    assert "1024M" in wide
    assert r"first line\nsecond \x1b[2J word" in wide
    assert len(wide.splitlines()) == 3
    assert max(map(len, wide.splitlines())) < 400
    table = world.run("list").stdout
    assert "192.0.2" not in table


def test_wide_shows_no_address_of_a_guest_that_does_not_run(world: World) -> None:
    """A status without the agent's word has none."""
    world.host("alpha")
    world.running("1")
    world.status("1", "alpha", Phase.STOPPED)
    assert world.rows("list", "-o", "wide")["1"].count("-") >= 3
