"""`check`: machines that are not well, and values with characters that nobody sees."""

from __future__ import annotations

import pytest

from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import SINCE, World


@pytest.mark.parametrize("phase", sorted(set(Phase) - {Phase.RUNNING, Phase.MIGRATING, Phase.INVALID}))
def test_a_machine_that_does_not_run_is_found(world: World, phase: Phase) -> None:
    """One that should run, in any phase in which it does not, or not for long: phase, host, since when and why; 1."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")
    world.status("1", "alpha", phase, reason="QEMU failed: no such image")
    result = world.run("check")
    assert result.exit_code == 1
    assert f"{phase.value} on alpha since {SINCE}: QEMU failed: no such image" in result.stdout


def test_what_its_host_lacks_is_found(world: World) -> None:
    """Keys that are sound, on a host that cannot do what they ask for."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G", mac="52:54:00:00:00:01")
    world.status("1", "alpha", Phase.INVALID, problems=("bridge: found nothing; set BRIDGE_IF",))
    result = world.run("check")
    assert result.exit_code == 1
    assert "invalid on alpha" in result.stdout
    assert "set BRIDGE_IF" in result.stdout


@pytest.mark.parametrize(
    ("restart", "drains", "status"),
    [("always", False, 1), ("never", False, 0), ("on-failure", False, 0), ("never", True, 1)],
)
def test_a_machine_that_ended_by_itself(world: World, restart: str, drains: bool, status: int) -> None:
    """With a policy that leaves it so it is well; not where its host stops all its guests."""
    session = HostSession(host="alpha", version="1", url="http://alpha:9746", boot_id="b", draining=drains)
    world.etcd.write(world.layout.session_key(HostName("alpha")), session.to_json())
    world.keys("1", host="alpha", ram="1G", restart=restart)
    world.status("1", "alpha", Phase.STOPPED, reason="it ended by itself")
    assert world.run("check").exit_code == status


def test_a_wall_that_is_missing(world: World) -> None:
    """Law: who runs guests on a host that cannot keep them apart is told so, with the reason."""
    gaps = ("etcd: nft is not installed (package nftables)",)
    session = HostSession(host="alpha", version="1", url="http://alpha:9746", boot_id="b", gaps=gaps)
    key = world.layout.session_key(HostName("alpha"))
    world.etcd.write(key, session.to_json())
    found = world.run("check")
    assert found.exit_code == 1
    assert f"a wall between guests is missing on alpha: {gaps[0]}" in found.stdout
    assert key in found.stdout


@pytest.mark.parametrize(
    ("keys", "since", "status"),
    [
        ({"power": "off"}, "2026-03-01T11:57:01Z", 0),
        ({"power": "off"}, "2026-03-01T11:56:59Z", 1),
        ({"power": "off", "shutdown_timeout": "600"}, "2026-03-01T11:49:01Z", 0),
        ({"power": "off", "shutdown_timeout": "600"}, "2026-03-01T11:48:59Z", 1),
        ({"power": "off"}, "2027-01-01T00:00:00Z", 0),
        ({"power": "off"}, "yesterday", 0),
        ({}, "2026-03-01T11:56:59Z", 1),
    ],
)
def test_a_shutdown_that_does_not_end(world: World, keys: dict[str, str], since: str, status: int) -> None:
    """Found a minute after QEMU should have been killed, also when no keys are left; before that all goes its way."""
    world.host("alpha")
    if keys:
        world.keys("1", host="alpha", ram="1G", **keys)
    world.status("1", "alpha", Phase.STOPPING, reason="QEMU is killed", since=since)
    result = world.run("check")
    assert result.exit_code == status
    assert (f"stopping on alpha since {since}: QEMU is killed" in result.stdout) == bool(status)


def test_a_status_of_a_host_that_is_gone_is_nothing_to_go_by(world: World) -> None:
    """Its new host lives, and has not said a word: that is found, though the last word was that it runs."""
    world.host("beta")
    world.keys("1", host="beta", ram="1G")
    world.status("1", "alpha", Phase.RUNNING)
    result = world.run("check")
    assert result.exit_code == 1
    assert "nothing newer than what alpha wrote, which has no session" in result.stdout
    assert "a status from host beta" in result.stdout


def test_a_container_in_single_mode_that_waits_is_found(world: World) -> None:
    """Where no supervisor runs beside it, too."""
    world.host("alpha/1")
    world.keys("1", host="alpha", ram="1G")
    world.status("1", "alpha/1", Phase.WAITING, reason="its lock is held")
    result = world.run("check")
    assert result.exit_code == 1
    assert f"waiting on alpha/1 since {SINCE}: its lock is held" in result.stdout


def test_a_machine_that_is_off_is_well(world: World) -> None:
    """What is as people want it is no finding."""
    world.host("alpha")
    world.running("1")
    world.keys("2", host="alpha", ram="1G", power="off")
    world.status("2", "alpha", Phase.STOPPED)
    assert world.run("check").exit_code == 0


@pytest.mark.parametrize("value", ["alpha\u00a0", "\u00a0alpha"])
def test_a_character_that_nobody_sees_is_named(world: World, value: str) -> None:
    """A no-break space behind a host's name, as it comes with copied text, by its code point."""
    world.host("alpha")
    world.running("1", host=value)
    world.status("1", "alpha", Phase.RUNNING, pid=1, run_state="running")
    result = world.run("check")
    assert result.exit_code == 1
    assert "U+00A0 NO-BREAK SPACE" in result.stdout


def test_a_problem_names_the_character(world: World) -> None:
    """Within a name it cannot be left out silently: the problem says what it is; of people's own keys nothing is."""
    world.host("alpha")
    world.running("1", description="a\u00a0b")
    assert world.run("check").exit_code == 0
    refused = world.run("set", "1", "host=al\u200bpha")
    assert refused.exit_code == 1
    assert "U+200B ZERO WIDTH SPACE" in refused.stderr


def test_local_disks(world: World) -> None:
    """A file of another host than the one to run it, and of one that others may take over, are named beforehand."""
    world.host("alpha", "beta")
    world.keys("1", host="alpha", ram="1G", hosts="beta", **{"disk/0": "file:a.raw", "disk/1": "file:b.raw ro"})
    world.status("1", "alpha", Phase.RUNNING, run_state="running", pid=1, files={"file:a.raw": "alpha"})
    found = world.run("check", "1").stdout
    assert "hosts" in found
    assert "disk/0 in a file of one host" in found
    assert "a file of alpha" not in found
    world.keys("1", host="beta")
    assert "a file of alpha, and `host` is beta" in world.run("check", "1").stdout
