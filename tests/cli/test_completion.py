"""Shell completion: names from etcd, silence about everything else, and a real bash that uses it."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from kvmsupervisor.cli import common
from kvmsupervisor.cli.common import Tools
from kvmsupervisor.cli.completion import BASH_SCRIPT
from kvmsupervisor.cli.main import cli
from kvmsupervisor.config.settings import Settings
from tests.cli.conftest import World
from tests.fakes.etcd import FakeEtcd


def complete(world: World, *words: str, connect: object = None) -> list[str]:
    """What a shell is offered for the last word."""
    tools = Tools(environ=world.environ, connect=connect or (lambda settings: world.etcd.peer()))  # type: ignore[arg-type]
    completer = ShellComplete(cli, {"obj": tools}, "kvmsupervisor", "_KVMSUPERVISOR_COMPLETE")
    return [item.value for item in completer.get_completions(list(words[:-1]), words[-1])]


@pytest.fixture
def full(world: World) -> World:
    """Two hosts and some instances."""
    world.host("alpha", "beta")
    for instance in ("10", "9", "web1", "web2"):
        world.running(instance)
    world.etcd.write(b"/kvm/$(reboot)/ram", "1")
    return world


def test_commands_and_options_are_completed(full: World) -> None:
    """Commands by name, from the table; options of a command."""
    assert complete(full, "sta") == ["start"]
    assert complete(full, "list", "--out") == ["--output"]
    assert complete(full, "--ver") == ["--version"]
    assert complete(full, "console", "--r") == ["--read-only"]


def test_ids_are_completed_as_people_count_and_not_twice(full: World) -> None:
    """Valid ids only: a hostile key reaches no shell."""
    assert complete(full, "show", "") == ["9", "10", "web1", "web2"]
    assert complete(full, "start", "web1", "we") == ["web2"]
    assert complete(full, "console", "--lines", "5", "we") == ["web1", "web2"]
    assert complete(full, "spice", "-o", "x.vv", "we") == ["web1", "web2"]


def test_keys_and_hosts_are_completed(full: World) -> None:
    """Key names with their `=`, hosts with a session behind `host=`, bare names behind --unset."""
    assert complete(full, "create", "x", "ra") == ["ram=", "ram_max="]
    assert complete(full, "set", "9", "host=") == ["host=alpha", "host=beta"]
    assert complete(full, "set", "9", "--unset", "ma") == ["mac", "machine"]
    assert complete(full, "confirm-removal", "b") == ["beta"]
    assert complete(full, "completion", "f") == ["fish"]


def test_numbered_keys_and_values_are_completed(full: World) -> None:
    """Keys with a number once their kind is begun, and the values of wishes that have few."""
    assert complete(full, "set", "9", "di") == ["display=", "disk/"]
    assert complete(full, "set", "9", "disk/1")[:2] == ["disk/1=", "disk/10="]
    assert complete(full, "set", "9", "nic/2/") == ["nic/2/mac=", "nic/2/bridge=", "nic/2/link="]
    assert complete(full, "set", "9", "--unset", "nic/7/m") == ["nic/7/mac"]
    assert complete(full, "set", "9", "restart=o") == ["restart=on-failure"]
    assert complete(full, "create", "x", "power=of") == ["power=off", "power=off-now"]
    assert complete(full, "set", "9", "nic/2/link=") == ["nic/2/link=up", "nic/2/link=down"]
    assert complete(full, "set", "9", "hosts=b") == ["hosts=beta"]
    assert complete(full, "set", "9", "ram=") == []


def test_filters_are_completed(full: World) -> None:
    """Hosts, phases, and the keys for people that instances have; no value that a shell would split or expand."""
    full.keys("web1", **{"x-team": "shop", "x-$(reboot)": "a"})
    full.keys("web2", **{"x-team": "$(reboot)", "x-tier": "two words"})
    assert complete(full, "list", "--host", "b") == ["beta"]
    assert complete(full, "list", "--phase", "st") == ["starting", "stopping", "stopped"]
    assert complete(full, "list", "-l", "") == ["x-team=", "x-tier="]
    assert complete(full, "list", "-l", "x-team=") == ["x-team=shop"]
    assert complete(full, "list", "-l", "x-tier=") == []


def test_the_help_shows_no_escapes(world: World) -> None:
    """What the source needs to keep lines apart is not for people."""
    assert "\b" not in world.run("completion", "--help").stdout
    assert "bash: kvmsupervisor completion bash" in world.run("completion", "--help").stdout


def test_errors_are_silent(full: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Etcd away, rights missing, settings bad, too slow: nothing is offered and nothing is said."""

    def away(settings: Settings) -> FakeEtcd:
        client = full.etcd.peer()
        client.away()
        return client

    def slow(settings: Settings) -> FakeEtcd:
        client = full.etcd.peer()

        async def never(call: str) -> None:
            await asyncio.Event().wait()

        client.hook = never
        return client

    monkeypatch.setattr(common, "COMPLETION_DEADLINE_S", 0.01)
    assert complete(full, "show", "", connect=away) == []
    assert complete(full, "show", "", connect=slow) == []
    full.environ["KVM_NONSENSE"] = "1"
    assert complete(full, "show", "") == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_the_program(world: World, shell: str) -> None:
    """Each shell gets its own script."""
    result = world.run("completion", shell)
    assert result.exit_code == 0
    assert f"_KVMSUPERVISOR_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.parametrize(
    ("words", "position", "asked", "answer", "offered"),
    [
        ("kvmsupervisor create x r", 3, "kvmsupervisor create x r @3", "ram=", "compopt -o nospace\nram="),
        ("kvmsupervisor show w", 2, "kvmsupervisor show w @2", "web1", "web1"),
        ("kvmsupervisor show ''", 2, "kvmsupervisor show  @2", "web1", "web1"),
        ("kvmsupervisor set x host =", 4, "kvmsupervisor set x host= @3", "host=alpha", "alpha"),
        ("kvmsupervisor set x host = al", 5, "kvmsupervisor set x host=al @3", "host=alpha", "alpha"),
        (
            "kvmsupervisor set x ram = 1G ho",
            6,
            "kvmsupervisor set x ram=1G ho @4",
            "host=",
            "compopt -o nospace\nhost=",
        ),
        ("kvmsupervisor set x di", 3, "kvmsupervisor set x di @3", "disk/", "compopt -o nospace\ndisk/"),
    ],
)
def test_bash_completes_with_the_script(
    tmp_path: Path, *, words: str, position: int, asked: str, answer: str, offered: str
) -> None:
    """A real bash runs the script: words split at `=` are mended, `ram=` gets no space behind it."""
    # Stands in for the program: notes what it is asked, and answers as click does.
    program = tmp_path / "kvmsupervisor"
    program.write_text(
        f"#!/bin/sh\nprintf '%s' \"$COMP_WORDS @$COMP_CWORD\" | tr '\\n' ' ' > {tmp_path}/asked\n"
        f"printf 'plain,{answer}\\n'\n"
    )
    program.chmod(0o755)
    test = f"""
    compopt() {{ printf "compopt %s %s\\n" "$@"; }}
    PATH={tmp_path}:$PATH
    {BASH_SCRIPT}
    COMP_WORDS=({words}) COMP_CWORD={position}
    _kvmsupervisor_completion kvmsupervisor
    printf "%s\\n" "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "--norc", "-c", test], capture_output=True, text=True, timeout=30, check=True)
    assert (tmp_path / "asked").read_text() == asked
    assert (done.stdout, done.stderr) == (f"{offered}\n", "")
