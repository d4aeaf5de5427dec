"""`logs`: what supervisor and QEMU have said of one instance; bounded, harmless, and elsewhere it says where."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from kvmsupervisor.cli import logs_command
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World


@pytest.fixture
def folder(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run directory of this host, which has web1; no journal. Its path is short, as sockets want it."""
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setattr(shutil, "which", lambda program: None)
    time.tzset()
    with tempfile.TemporaryDirectory(prefix="kvl") as name:
        path = Path(name)
        world.environ["KVM_RUN_DIR"] = name
        world.running("web1")
        (path / "web1").mkdir()
        (path / "web1" / "qemu.log").write_text("".join(f"qemu {n}\n" for n in range(100)))
        yield path


def line(instance: str, event: str, **more: object) -> str:
    at = "2026-03-01T11:57:00.123Z"
    return json.dumps({"timestamp": at, "level": "info", "event": event, "instance": instance, **more}) + "\n"


def test_both_logs_of_one_instance(world: World, folder: Path) -> None:
    """The last lines of each, under its name; nothing of others, whose ids or reasons are alike."""
    (folder / "_supervisor.log").write_text(
        line("web1", "instance.ended", reason="crashed (signal 9)", epoch=3, incarnation="x")
        + line("web10", "instance.ended", reason="web1 took its port")
        + 'web1 is no JSON\n[1, "web1"]\n'
    )
    found = world.run("logs", "web1", "-n", "2")
    assert found.exit_code == 0, found.stderr
    assert found.stdout.splitlines() == [
        f"==> supervisor ({folder}/_supervisor.log) <==",
        "2026-03-01 11:57:00 info instance.ended reason=crashed (signal 9) epoch=3",
        "",
        f"==> QEMU ({folder}/web1/qemu.log) <==",
        "qemu 98",
        "qemu 99",
    ]
    assert world.run("logs", "web1", "-n", "0").stdout == ""


def test_what_qemu_says_harms_no_terminal(world: World, folder: Path) -> None:
    """Escape sequences, a line of a megabyte, no end of line, no UTF-8."""
    (folder / "web1" / "qemu.log").write_bytes(b"\x1b]0;x\x07\x1b[2J\xff\n" + b"y" * 900_000 + b"\nlast")
    found = world.run("logs", "web1")
    assert "\x1b" not in found.stdout
    assert "\\xff" in found.stdout
    assert len(found.stdout) < 3 * logs_command.LINE_LENGTH
    assert found.stdout.endswith("\nlast\n")


@pytest.mark.parametrize("name", ["qemu.log", "qemu.log.1"])
@pytest.mark.parametrize("obstacle", ["a pipe", "a link"])
def test_root_waits_at_no_pipe_and_follows_no_link(world: World, folder: Path, name: str, obstacle: str) -> None:
    """A QEMU of an earlier release owns its log, and may put anything in its place."""
    path = folder / "web1" / name
    path.unlink(missing_ok=True)
    secret = folder / "secret"
    secret.write_text("secret\n")
    if obstacle == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(secret)
    found = world.run("logs", "web1", "-n", "200")
    assert "secret\n" not in found.stdout
    assert found.exit_code == (1 if name == "qemu.log" and obstacle == "a link" else 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["web2"], "the logs of web2 are on host beta: ssh beta kvmsupervisor logs web2"),
        (["dead"], "host gone, which has no session; `kvmsupervisor events dead` says what happened"),
        (["new"], "new has no log here: "),
        (["wbe1"], "there is no instance wbe1 (did you mean web1?)"),
    ],
)
def test_elsewhere_it_says_where_to_look(world: World, folder: Path, words: list[str], said: str) -> None:
    """The host, and the command to run there."""
    world.host("alpha", "beta")
    world.running("web2", host="beta")
    world.running("dead", host="gone")
    world.keys("new", host="alpha", ram="1G")
    world.status("new", "alpha", Phase.WAITING)
    found = world.run("logs", *words)
    assert found.exit_code == 1
    assert said in found.stderr


def test_where_the_supervisor_logs_elsewhere_it_says_so(world: World, folder: Path) -> None:
    """In a container, say: QEMU's log is shown all the same."""
    found = world.run("logs", "web1", "-n", "1")
    assert "docker logs kvmsupervisor" in found.stderr
    assert "qemu 99" in found.stdout


def test_the_journal_is_searched(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the supervisor is a unit."""
    journalctl = folder / "journalctl"
    journalctl.write_text(f"#!/bin/sh\ncat {folder}/journal\n")
    journalctl.chmod(0o755)
    (folder / "journal").write_text(line("web1", "instance.started") + line("other", "instance.started"))
    monkeypatch.setattr(shutil, "which", lambda program: str(journalctl))
    found = world.run("logs", "web1", "-n", "1")
    assert "2026-03-01 11:57:00 info instance.started\n" in found.stdout
    assert found.stdout.count("instance.started") == 1


def test_following_shows_what_comes_across_a_rotation(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole lines only, of either log."""
    log, own = folder / "web1" / "qemu.log", folder / "_supervisor.log"
    own.write_text("")

    def rotate() -> None:
        log.rename(log.with_name("qemu.log.1"))
        log.write_text("rotated\n")

    steps: list[Callable[[], object]] = [
        lambda: log.write_text(log.read_text() + "begun, "),
        lambda: log.write_text(log.read_text() + "ended\n"),
        rotate,
        lambda: own.write_text(line("web1", "instance.stopping")),
        *[lambda: None] * 5,
    ]

    def sleep(seconds: float) -> None:
        if not steps:
            raise click.Abort
        steps.pop(0)()

    monkeypatch.setattr(time, "sleep", sleep)
    found = world.run("logs", "web1", "-f", "-n", "1")
    told = [one for one in found.stdout.splitlines() if one and not one.startswith("==>")]
    assert told == ["qemu 99", "begun, ended", "rotated", "2026-03-01 11:57:00 info instance.stopping"]
