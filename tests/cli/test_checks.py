"""`check`: machines that are not well, and values with characters that nobody sees."""

from __future__ import annotations

import pytest

from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import SINCE, World


@pytest.mark.parametrize("phase", [Phase.BACKOFF, Phase.WAITING])
def test_a_machine_that_does_not_run_is_found(world: World, phase: Phase) -> None:
    """One that should run and waits, or is started again and again: phase, host, since when and why; exit code 1."""
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
