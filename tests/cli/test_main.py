"""The entry point: quick, lazy, and with the exit codes of its page."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import click
import pytest

from kvmsupervisor import __version__
from kvmsupervisor.adapters.etcd.api import Denied, Rejected
from kvmsupervisor.cli import main
from kvmsupervisor.cli.common import Tools
from kvmsupervisor.cli.main import COMMANDS
from kvmsupervisor.cli.unknown import ELSEWHERE
from tests.cli.conftest import World


def loaded_by(*args: str) -> tuple[str, set[str]]:
    """Run the program; return what it printed, and the modules that it had loaded at its end."""
    code = (
        "import sys, atexit; "
        "atexit.register(lambda: print('MODULES', *sys.modules, file=sys.stderr)); "
        f"sys.argv = ['kvmsupervisor', *{args!r}]; "
        "from kvmsupervisor.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, set(done.stderr.partition("MODULES")[2].split())


@pytest.mark.parametrize("args", [("--version",), ("--help",)])
def test_version_and_help_import_nothing_heavy(args: tuple[str, ...]) -> None:
    """`--version` and `--help` are quick: no gRPC, rich, asyncio, nor any command."""
    _, modules = loaded_by(*args)
    assert not modules & {"grpc", "rich", "asyncio", "structlog", "kvmsupervisor.cli.common"}


def test_version_names_the_release() -> None:
    """`--version` prints the program's name and release."""
    assert loaded_by("--version")[0] == f"kvmsupervisor, version {__version__}\n"


def test_help_lists_every_command_as_the_command_itself_does() -> None:
    """The table from which `--help` is printed names modules, commands and help that are really there."""
    for name, entry in main.COMMANDS.items():
        if entry.module in {"run", "demo"}:
            continue
        command = getattr(import_module(f"kvmsupervisor.cli.{entry.module}"), entry.attribute)
        assert isinstance(command, click.Command)
        assert command.name == name
        assert command.help is not None


def test_unknown_command_is_a_usage_error(world: World) -> None:
    """A command that is none: exit code 2."""
    assert world.run("lits").exit_code == 2


def test_etcd_away_exits_3_and_names_what_was_tried(world: World) -> None:
    """Unreachable etcd: exit code 3, the endpoints named, no traceback."""

    def away(settings: object) -> object:
        client = world.etcd.peer()
        client.away()
        return client

    world.environ["ETCD_ENDPOINTS"] = "http://10.0.0.1:2379,http://10.0.0.2:2379"
    tools = Tools(environ=world.environ, connect=away)  # type: ignore[arg-type]
    result = click.testing.CliRunner().invoke(main.cli, ["list"], obj=tools)
    assert result.exit_code == 3
    # A real client's words name each endpoint.
    assert result.stderr == "Error: etcd is unreachable (ETCD_ENDPOINTS): the fake etcd is away\n"


@pytest.mark.parametrize("error", [Denied("permission denied"), Rejected("no space")])
def test_etcd_refusing_exits_1(world: World, error: Exception) -> None:
    """An etcd that answers, and refuses: exit code 1 and its words."""
    client = world.etcd.peer()
    client.fail_next(error)  # type: ignore[arg-type]
    tools = Tools(environ=world.environ, connect=lambda settings: client)
    result = click.testing.CliRunner().invoke(main.cli, ["list"], obj=tools)
    assert result.exit_code == 1
    assert str(error) in result.stderr


def test_lost_reply_exits_3_and_says_that_it_may_have_happened(world: World) -> None:
    """A write whose answer was lost is neither called done nor called undone."""
    world.running("1")
    client = world.etcd.peer()
    client.lose_next_reply()
    tools = Tools(environ=world.environ, connect=lambda settings: client)
    result = click.testing.CliRunner().invoke(main.cli, ["stop", "1"], obj=tools)
    assert result.exit_code == 3
    assert "may or may not have been made" in result.stderr


def test_bad_settings_are_all_named(world: World) -> None:
    """Settings with problems: exit code 1, every problem named, whatever the command."""
    world.environ |= {"KVM_ACEL": "kvm", "KVM_SESSION_TTL": "soon"}
    result = world.run("list")
    assert result.exit_code == 1
    assert "KVM_ACEL" in result.stderr
    assert "KVM_SESSION_TTL" in result.stderr


def test_no_etcd_at_all_ends_with_one_line() -> None:
    """The real program with nobody listening: exit code 3, one line, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "kvmsupervisor", "list"],
        env={"PATH": os.environ["PATH"], "KVM_HOSTNAME": "alpha", "ETCD_ENDPOINTS": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1
    assert "http://127.0.0.1:1" in done.stderr


@pytest.mark.parametrize(
    ("typed", "meant"), [("lsit", "list"), ("chek", "check"), ("confirm-removl", "confirm-removal")]
)
def test_a_command_that_is_none_gets_a_suggestion(world: World, typed: str, meant: str) -> None:
    """A typo is usage, exit code 2, and what was probably meant is named; nonsense gets no suggestion."""
    result = world.run(typed)
    assert result.exit_code == 2
    assert f"did you mean {meant}?" in result.stderr
    assert "did you mean" not in world.run("xyzzy").stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["xyzzy"], "found 'xyzzy', which is no command of `kvmsupervisor`; `kvmsupervisor --help` lists them"),
        (["LIST"], "did you mean list?"),
        (["check_config"], "did you mean check-config?"),
        (["image", "ad"], "found 'ad', which is no command of `kvmsupervisor image`; did you mean add?"),
        (["w" * 5000], "(5000 characters)"),
        (["\x1b[2J"], "found '\\x1b[2J'"),
        (["stop", "1", "--wiat"], "found '--wiat', which is no option of `kvmsupervisor stop`; did you mean --wait?"),
        (["list", "--json"], "did you mean -o json?"),
        (["delete", "1", "--force"], "did you mean --yes?"),
        (["argv", "1", "--xyzzy"], "its options are --output, --shell, --help"),
        (
            ["--wait", "stop"],
            "no option of `kvmsupervisor`; its options are --version, --help; those of a command stand",
        ),
        (["stop", "1", "-z"], "found '-z', which is no option of `kvmsupervisor stop`"),
        (
            ["set", "1", "ram", "2G"],
            "found 'ram', which is no KEY=VALUE; a key and its value are one word, such as ram=2G",
        ),
        (["set", "1", "rma=2G"], "unknown key: found 'rma' (did you mean ram?); the keys are host, "),
    ],
)
def test_a_mistyped_word_is_told_in_three_parts(world: World, args: list[str], said: str) -> None:
    """Law: what was found, what is wrong with it, what would be right; nothing is written, no option is guessed."""
    world.running("1")
    before = world.etcd.revision
    result = world.run(*args)
    assert (result.exit_code in {1, 2}, world.etcd.revision) == (True, before)
    assert said in " ".join(result.stderr.split()), result.stderr


@pytest.mark.parametrize("typed", [*ELSEWHERE, "DESTROY"])
def test_the_words_of_other_tools_are_told_and_never_run(world: World, typed: str) -> None:
    """`destroy` is a power cut in virsh and a removal elsewhere: our command is named, nothing is written."""
    world.running("1")
    before = world.etcd.revision
    result = world.run(typed, "1")
    assert result.exit_code == 2
    assert f"did you mean {ELSEWHERE[typed.lower()]}?" in result.stderr
    assert world.etcd.revision == before
    assert typed not in COMMANDS
    assert ELSEWHERE[typed.lower()].split()[0] in COMMANDS


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ('"$@" completion bash | true; exit ${PIPESTATUS[0]}', {0, 1}, ""),
        ('"$@" completion bash >&-', {0}, ""),
        ('"$@" completion bash >/dev/full', {1}, "Error: the output cannot be written: No space left on device\n"),
        ('"$@" list 2>&-', {3}, ""),
        ('"$@" list >&-', {3}, "Error: etcd is unreachable"),
        ('"$@" delete 1 <&-', {2}, "There is no terminal to ask on: give --yes."),
        ('LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$@" show größe', {2}, " is no id: "),
    ],
)
def test_streams_that_are_closed_full_or_ascii_are_no_traceback(line: str, status: set[int], said: str) -> None:
    """The real program in a shell whose pipe ends early, whose streams are closed, whose disk is full, in locale C."""
    done = subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, "-m", "kvmsupervisor"],
        env={"PATH": os.environ["PATH"], "KVM_HOSTNAME": "alpha", "ETCD_ENDPOINTS": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert said in done.stderr
