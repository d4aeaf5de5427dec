"""`hosts`: who is there, who drains, and who is gone and still holds locks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World


def session(world: World, host: str, **fields: object) -> None:
    value = HostSession(host=host, version="1.2", url=f"http://{host}:9746", boot_id="b", cpus=8, memory_mib=32768)
    value = replace(value, started="2026-03-01T09:00:00Z", **fields)  # type: ignore[arg-type]
    world.etcd.write(world.layout.session_key(HostName(host)), value.to_json())


def test_each_host_with_what_it_runs(world: World) -> None:
    """Guests that run, memory by its locks; a halted guest does not run."""
    session(world, "alpha", notice="one core is slow")
    session(world, "beta", draining=True)
    for name in ("1", "2"):
        world.running(name)
        world.status(name, "alpha", Phase.RUNNING, pid=1, run_state="running" if name == "1" else "io-error")
    found = world.run("hosts")
    assert found.exit_code == 0
    assert [line.split(maxsplit=8) for line in found.stdout.splitlines()] == [
        ["HOST", "STATE", "SINCE", "RUNNING", "PROMISED", "MEMORY", "CPUS", "RELEASE", "NOTICE"],
        ["alpha", "up", "3h", "1", "2048M", "32768M", "8", "1.2", "one core is slow"],
        ["beta", "draining", "3h", "0", "0M", "32768M", "8", "1.2", "-"],
    ]
    (alpha, _) = world.json("hosts")
    assert (alpha["running"], alpha["locks"], alpha["promised_mib"]) == (["1"], ["1", "2"], 2048)
    assert "http://alpha:9746" in world.run("hosts", "-o", "wide").stdout


def test_a_host_that_is_gone_and_what_it_holds(world: World) -> None:
    """Its locks are named; what only told of a process, too. It may run them: nobody says that it does not."""
    world.running("web1", host="gone")
    world.keys("left", ram="1G")
    world.status("left", "older", Phase.RUNNING, pid=1)
    world.status("idle", "clean", Phase.STOPPED)
    rows = world.rows("hosts")
    assert set(rows) == {"gone", "older"}
    assert rows["gone"][0] == "no session"
    assert rows["gone"][-1] == "it holds the locks of web1, and may run them"
    assert "remove-host" in rows["older"][-1]
    assert {one["state"] for one in world.json("hosts")} == {"no session"}


@pytest.mark.parametrize("value", ["", "{}", "\x1b[2J"])
def test_a_session_of_another_release_is_one(world: World, value: str) -> None:
    """The key itself is the session."""
    world.etcd.write(world.layout.session_key(HostName("new")), value)
    found = world.run("hosts")
    assert "unreadable" in found.stdout
    assert "\x1b" not in found.stdout


def test_nobody_is_there(world: World) -> None:
    """An empty cluster is no error."""
    found = world.run("hosts")
    assert (found.exit_code, found.stdout) == (0, "")
    assert "no host has a session" in found.stderr
    assert world.json("hosts") == []


def test_another_tools_name_for_it_is_told(world: World) -> None:
    """Kubectl has nodes."""
    assert "did you mean hosts?" in world.run("nodes").stderr
