"""Several ids and patterns: what they mean is shown and asked, and exactly that is done."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmsupervisor.cli.choice import Pattern, chosen, question
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cluster.overview import Cluster, Instance
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.spec import RawValue
from tests.cli.conftest import World

KEYS = {b"ram": RawValue(b"64", 1)}


def instance(name: str, *, gone: bool = False) -> Instance:
    keys = {} if gone else KEYS
    return Instance(id=InstanceId(name), keys=keys, wish=parse_wish(InstanceId(name), keys))


THERE = [instance(name) for name in ("web1", "web2", "web10", "Web1", "db.a")] + [instance("old", gone=True)]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["web1", Pattern("web?")], ["web1", "web2"]),
        ([Pattern("web1*"), "web2", "web1"], ["web1", "web10", "web2"]),
        ([Pattern("*")], ["web1", "web2", "web10", "Web1", "db.a"]),
        ([Pattern("web[12]")], ["web1", "web2"]),
        ([Pattern("[!w]*")], ["Web1", "db.a"]),
        ([Pattern("db*")], ["db.a"]),
        (["old"], ["old"]),
    ],
)
def test_what_words_mean(words: list[InstanceId | Pattern], meant: list[str]) -> None:
    """Law: a pattern means whole ids that have keys; each id is there once, in the order of the words."""
    assert chosen(words, THERE) == meant


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([Pattern("x*")], "no instance is like 'x*'"),
        ([Pattern("ol?")], "no instance is like 'ol?'"),
        ([Pattern("[")], "no instance is like '['"),
        (["web", Pattern("*")], "nothing was done: there is no instance web (did you mean web"),
        (["web1", Pattern("x*"), "nobody"], "nothing was done: no instance is like 'x*', there is no instance nobody"),
        ([Pattern("w" * 500 + "*")], "(501 characters)"),
    ],
)
def test_words_that_mean_nothing(words: list[InstanceId | Pattern], said: str) -> None:
    """Law: one word that means nothing refuses all of them."""
    with pytest.raises(Refused) as caught:
        chosen(words, THERE)
    assert said in caught.value.message


def test_a_question_names_all_that_it_is_about() -> None:
    """Law: with host and phase, and no control character of a status; of hundreds the first are named."""
    many = [instance(f"i{number}") for number in range(60)]
    text = question([one.id for one in many], Cluster(instances={one.id: one for one in many}), "Sure?")
    assert text.splitlines()[0].startswith("  i0  ")
    assert text.splitlines()[-2:] == ["  … and 10 more", "Sure?"]


# --- the commands ---------------------------------------------------------------------------------------------


@pytest.fixture
def webs(world: World) -> World:
    world.host("alpha")
    for name in ("web1", "web2", "db"):
        world.running(name)
    return world


def left(world: World) -> set[str]:
    return {name for name in ("web1", "web2", "web3", "db") if world.value(name, "ram") is not None}


def test_delete_asks_about_what_it_removes(webs: World) -> None:
    """Law: the question names them, a no leaves all, a yes removes exactly those, and each has its result."""
    refused = webs.run("delete", "web*", input_text="n\n", asked=True)
    assert refused.exit_code == 1
    assert "  web1  running on alpha\n  web2  running on alpha\nShut the guests of these 2 instances" in refused.stdout
    assert left(webs) == {"web1", "web2", "db"}
    done = webs.run("delete", "web*", input_text="y\n", asked=True)
    assert done.stdout.endswith("web1 removed\nweb2 removed\n")
    assert left(webs) == {"db"}


def test_what_comes_after_the_question_is_not_removed(
    webs: World, acting: Callable[[Callable[[str], None]], None]
) -> None:
    """Law: what a pattern means is what was shown: an instance that was made since stays."""

    def act(call: str) -> None:
        if call == "txn" and webs.value("web3", "ram") is None:
            webs.running("web3")

    acting(act)
    assert webs.run("delete", "web*", "--yes").exit_code == 0
    assert left(webs) == {"web3", "db"}


@pytest.mark.parametrize("words", [["web", "*"], ["nobody", "web1"], ["web1", "x*"], ["README.md", "web1", "db"]])
def test_delete_is_all_or_nothing(webs: World, words: list[str]) -> None:
    """Law: a word that means nothing (a typo, or a file's name that a shell made of `*`) removes nothing."""
    before = webs.etcd.revision
    result = webs.run("delete", *words, "--yes")
    assert (result.exit_code, webs.etcd.revision) == (1, before)
    assert "nothing was done: " in result.stderr


@pytest.mark.parametrize(("args", "value"), [(["stop"], "off"), (["stop", "--now"], "off-now")])
def test_stop_asks_before_it_takes_a_pattern(webs: World, args: list[str], value: str) -> None:
    """Law: without a terminal it needs --yes; ids alone are stopped as ever, unasked."""
    assert webs.run(*args, "web*").exit_code == 2
    assert webs.run(*args, "web*", input_text="n\n", asked=True).exit_code == 1
    assert webs.value("web1", "power") is None
    assert webs.run(*args, "web*", "--yes").stdout == "web1 to be stopped\nweb2 to be stopped\n"
    assert [webs.value(name, "power") for name in ("web1", "web2", "db")] == [value, value, None]
    assert webs.run(*args, "db", "nobody").exit_code == 1
    assert webs.value("db", "power") == value


def test_start_takes_a_pattern(webs: World) -> None:
    """Law: what a pattern means is started unasked; an id that is not there beside it starts nothing."""
    assert webs.run("start", "web*", "nobody").exit_code == 1
    assert webs.value("web1", "power") is None
    assert webs.run("start", "web*").stdout == "web1 to be started\nweb2 to be started\n"
    assert webs.value("db", "power") is None


def test_show_several(webs: World) -> None:
    """Law: each is shown; JSON of one id is an object, of several words or a pattern an array."""
    shown = webs.run("show", "web*", "db")
    assert shown.exit_code == 0
    headings = [line for line in shown.stdout.splitlines() if " on alpha: running" in line]
    assert [line.partition(" ")[0] for line in headings] == ["web1", "web2", "db"]
    assert [one["id"] for one in webs.json("show", "web*")] == ["web1", "web2"]
    assert [one["id"] for one in webs.json("show", "d*")] == ["db"]
    assert webs.json("show", "db")["id"] == "db"
    some = webs.run("show", "db", "wbe1")
    assert some.exit_code == 1
    assert "db on alpha" in some.stdout
    assert "there is no instance wbe1 (did you mean web1?)" in some.stderr
    assert webs.run("show", "x*").exit_code == 1
