"""`list --watch`: changes as they come, and nothing read while nothing changes."""

from __future__ import annotations

import asyncio
import json

import click
import pytest

from kvmsupervisor.cli import list_watch, watching
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World


async def test_a_cluster_is_followed_by_watches_alone(world: World) -> None:
    """Wishes, locks, statuses, sessions; each change is seen, and etcd is asked for nothing again."""
    world.host("alpha")
    world.running("1")
    store = world.etcd.peer()
    found = watching.clusters(store, world.layout, gather_s=0)
    try:
        async with asyncio.timeout(10):
            assert list((await anext(found)).instances) == ["1"]
            world.running("2")
            while len((now := await anext(found)).instances) < 2 or now.instances[InstanceId("2")].status is None:
                pass
            world.etcd.erase(world.layout.session_key("alpha"))  # type: ignore[arg-type]
            while (await anext(found)).sessions:
                pass
            assert store.calls == {"list": 4, "watch": 4}
    finally:
        await found.aclose()


async def test_locks_elsewhere_are_followed_too(world: World) -> None:
    """`LOCK` may lie outside the wishes' prefix."""
    layout = world.layout = Layout(lock="/locks/%i")
    world.running("1")
    found = watching.clusters(world.etcd.peer(), layout, gather_s=0, again_s=0.01)
    try:
        async with asyncio.timeout(10):
            lock = (await anext(found)).instances[InstanceId("1")].lock
            assert lock is not None
            world.lock("1", "beta", epoch=2)
            while (lock := (await anext(found)).instances[InstanceId("1")].lock) is None or "beta" not in str(lock):
                pass
    finally:
        await found.aclose()


def watched(world: World, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """What is printed while an instance is stopped and removed."""
    world.host("alpha")
    world.running("1")
    world.running("22")
    monkeypatch.setattr(watching, "LEAST_S", 0)
    told: list[str] = []
    real = list_watch._Lines.show
    turns = 0

    def show(self: list_watch._Lines, *args: object) -> None:
        nonlocal turns
        turns += 1
        real(self, *args)  # type: ignore[arg-type]
        if turns == 1:
            world.status("1", "alpha", Phase.STOPPED, "`power` is off")
        elif "stopped" in "".join(told) and "gone" not in "".join(told):
            world.etcd.erase(*(key for key in world.etcd.data if "/22" in key))
        if "gone" in "".join(told):
            raise KeyboardInterrupt

    monkeypatch.setattr(list_watch._Lines, "show", show)
    monkeypatch.setattr(click, "echo", lambda text="", **more: told.append(str(text)))
    world.run("list", "--watch", *words)
    return told


def test_in_a_pipe_each_row_that_differs_is_printed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The titles once; a removed instance is told."""
    lines = [line.split(maxsplit=7) for line in watched(world, monkeypatch)]
    assert lines[0][0] == "ID"
    assert [line[0] for line in lines[1:3]] == ["1", "22"]
    assert [line[2] for line in lines if line[0] == "1"][-1] == "stopped"
    assert [line[2] for line in lines if line[0] == "22"][-1] == "gone"
    assert sum(line[0] == "ID" for line in lines) == 1


def test_for_programs_each_change_is_an_object(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a line."""
    found = [json.loads(line) for line in watched(world, monkeypatch, "-o", "json")]
    assert [one["phase"] for one in found if one["id"] == "1"] == ["running", "stopped"]
    assert found[-1] == {"id": "22", "phase": "gone"}
