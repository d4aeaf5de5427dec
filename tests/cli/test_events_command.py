"""`events`: one command says why it restarted last night, on any machine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kvmsupervisor.adapters.etcd.api import Compacted
from kvmsupervisor.adapters.event_files import EventFiles, events_folder
from kvmsupervisor.cli import following
from kvmsupervisor.domain.events import Event, to_json, to_line
from kvmsupervisor.domain.keys import InstanceId
from tests.cli.conftest import World


@pytest.fixture(autouse=True)
def _zone(monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path) -> Iterator[None]:
    """A zone of its own, and no files of this machine."""
    world.environ["KVM_STATE_DIR"] = str(tmp_path)
    monkeypatch.setenv("TZ", "XYZ-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def event(minute: int, name: str = "ended", reason: str = "crashed (signal 9)", **more: object) -> Event:
    fields = {"host": "alpha", "epoch": minute} | more
    return Event(at=f"2026-03-01T11:{minute:02}:00Z", event=f"instance.{name}", reason=reason, **fields)  # type: ignore[arg-type]


def put(world: World, instance: str, *events: Event) -> None:
    world.etcd.write(world.layout.events_key(InstanceId(instance)), to_json(events)[0])


def test_why_it_restarted_is_one_command_without_its_host(world: World) -> None:
    """No session is needed, and no instance has to be listed; times are local, the newest is last."""
    put(world, "web1", event(5), event(6, "running", "runs"), event(7, "running", "took over", host="beta"))
    found = world.run("events", "web1")
    assert found.exit_code == 0
    assert found.stdout.splitlines() == [
        "TIME                 HOST   EPOCH  EVENT    REASON",
        "2026-03-01 13:05:00  alpha      5  ended    crashed (signal 9)",
        "2026-03-01 13:06:00  alpha      6  running  runs",
        "2026-03-01 13:07:00  beta       7  running  took over",
    ]


def test_all_are_merged_by_time(world: World) -> None:
    """With their names; `--since` leaves out what is older."""
    put(world, "a", event(1), event(40))
    put(world, "b", event(20, times=3, since="2026-03-01T11:02:00Z"))
    lines = world.run("events").stdout.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["a", "b", "a"]
    assert "crashed (signal 9) (3 times since 2026-03-01 13:02:00)" in lines[2]
    assert [one["instance"] for one in world.json("events", "--since", "45m")] == ["b", "a"]
    assert [one["epoch"] for one in world.json("events", "--since", "2026-03-01T13:30:00+02:00")] == [40]
    assert [one["instance"] for one in world.json("events", "b*")] == ["b"]
    assert len(world.json("events", "--since", "999999w")) == 3
    nothing = world.run("events", "--since", "1s")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "no events since then" in nothing.stderr


def test_clocks_that_differ_turn_no_history_around(world: World) -> None:
    """The host that took over has a clock that is behind: it took over after the crash all the same."""
    put(world, "1", event(30), event(10, "running", host="beta"), event(31, "running", host="beta"))
    put(world, "2", event(20))
    assert [(one["instance"], one["epoch"]) for one in world.json("events")] == [
        ("2", 20),
        ("1", 30),
        ("1", 10),
        ("1", 31),
    ]


def test_a_host_has_more_than_etcd(world: World, tmp_path: Path) -> None:
    """Its file, with what only the key has of other hosts; nothing twice."""
    files = EventFiles(events_folder(tmp_path))
    for minute in range(40):
        files.append("1", to_line(event(minute), InstanceId("1")))
    files.append("gone", to_line(event(9), InstanceId("gone")))
    files.close()
    put(world, "1", *(event(minute) for minute in range(40)), event(50, host="beta"))
    assert [one["epoch"] for one in world.json("events", "1")] == [*range(40), 50]
    assert [one["epoch"] for one in world.json("events", "gone")] == [9]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["wbe1"], "there is no instance wbe1 (did you mean web1?)"),
        (["x*"], "no instance is like x*"),
        (["--since", "yesterday"], "'yesterday' is no length of time such as 90m, 12h or 2d, and no time."),
        (["--since", "9999999999d"], "is no length of time"),
        (["web1", "-o", "yaml"], "is not one of"),
    ],
)
def test_who_mistypes_is_told(world: World, words: list[str], said: str) -> None:
    """What was found, and what was probably meant."""
    world.running("web1")
    found = world.run("events", *words)
    assert found.exit_code in {1, 2}
    assert said in found.stderr


def test_an_instance_without_events_says_so(world: World) -> None:
    """It is there: that is no error."""
    world.running("web1")
    found = world.run("events", "web1")
    assert (found.exit_code, found.stdout) == (0, "")
    assert "no events" in found.stderr


def test_what_strangers_wrote_harms_no_terminal(world: World) -> None:
    """Escape sequences, newlines, no times, megabytes, no JSON at all."""
    put(world, "1", event(1, reason="\x1b[2J\nroot@host# rm \u202e" + "x" * 10**6), event(2, "\x1b]0;t\x07"))
    world.etcd.write(world.layout.events_key(InstanceId("2")), b"\xff" * 5000)
    world.etcd.write(world.layout.events_prefix + "../../etc", to_json([event(3)])[0])
    found = world.run("events")
    assert found.exit_code == 0
    assert "\x1b" not in found.stdout
    assert "\u202e" not in found.stdout
    assert len(found.stdout.splitlines()) == 3
    assert len(found.stdout) < 4096


@pytest.mark.parametrize("at", ["", "later", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-03-01"])
def test_a_time_that_is_none_breaks_no_order(world: World, at: str) -> None:
    """Nor a clock that was far off: the other events are there."""
    put(world, "1", event(1), Event(at=at, host="alpha", event="instance.ended", since=at, times=2), event(2))
    found = world.run("events")
    assert found.exit_code == 0, found.exception
    assert len(found.stdout.splitlines()) == 4
    assert len(world.json("events", "--since", "3d")) >= 2


async def test_a_watch_goes_on_behind_a_compaction(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs is told as changes, what is gone, too."""
    put(world, "a", event(1))
    put(world, "b", event(1))
    store = world.etcd.peer()
    prefix = world.layout.events_prefix
    listing = await store.list(prefix)
    real = store.watch
    put(world, "a", event(1), event(2))
    world.etcd.erase(world.layout.events_key(InstanceId("b")))

    def compacted(*args: object) -> object:
        monkeypatch.setattr(store, "watch", real)
        raise Compacted(9)

    monkeypatch.setattr(store, "watch", compacted)
    changes = following.follow(store, prefix, listing.kvs, listing.revision)
    found = await anext(changes)
    assert [(one.kv.key[-1:], one.deleted) for one in found] == [(b"a", False), (b"b", True)]
    put(world, "c", event(3))
    async with asyncio.timeout(5):
        assert [one.kv.key[-1:] for one in await anext(changes)] == [b"c"]
    await changes.aclose()


def test_following_prints_what_is_new(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each, as it comes: also as JSON."""
    put(world, "1", event(1))
    told: list[str] = []
    real = click.echo

    def echo(text: str, **more: object) -> None:
        real(text, **more)  # type: ignore[arg-type]
        if more.get("err"):
            raise KeyboardInterrupt
        told.append(text)
        if len(told) == 1:
            put(world, "2", event(7))
            put(world, "1", event(1), event(2), event(3))
            world.etcd.erase(world.layout.events_key(InstanceId("1")))

    monkeypatch.setattr(click, "echo", echo)
    world.run("events", "1", "--follow", "-o", "json")
    assert [json.loads(line)["epoch"] for line in told] == [1, 2, 3]
