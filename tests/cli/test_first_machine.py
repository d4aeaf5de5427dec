"""What `create` and `set` write for a first machine: an address that nobody has, the text of a file."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pytest

from kvmsupervisor.cli import reach
from kvmsupervisor.cli.common import ASSIGNMENT
from kvmsupervisor.cli.value_files import Unreadable, completions, value_of
from kvmsupervisor.cluster.acts.mac_auto import unused
from kvmsupervisor.domain.agent import GuestAddress, GuestFacts
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.parse_keys import VALUE_LIMIT, parse_wish
from kvmsupervisor.domain.spec import RawValue, Spec
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.domain.user_network import forwards
from kvmsupervisor.domain.values import mac_address
from tests.cli.conftest import SINCE, World

YAML = "#cloud-config\nhostname: web1\n"


# --- mac=auto -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto", ["auto", "AUTO", " Auto "])
def test_an_address_is_chosen_and_told(world: World, auto: str) -> None:
    """Law: it is unicast, locally administered, and nobody's; each NIC gets its own."""
    world.host("alpha")
    result = world.run("create", "web1", "ram=1G", "bridge=:user", f"mac={auto}", f"nic/1/mac={auto}")
    assert result.exit_code == 0, result.stderr
    chosen = [world.value("web1", name) or "" for name in ("mac", "nic/1/mac")]
    assert all(re.fullmatch(r"[0-9a-f]2(:[0-9a-f]{2}){5}", mac) for mac in chosen)
    assert chosen[0] != chosen[1]
    assert all(f"is {mac}" in result.stderr for mac in chosen)


def test_a_taken_address_is_not_chosen() -> None:
    """Law: what others have is drawn again."""
    drawn = {unused(()) for _ in range(50)}
    assert len(drawn) == 50
    assert all(mac_address(mac) == mac for mac in drawn)
    assert unused(drawn) not in drawn


def test_an_address_that_nobody_else_has_stays(world: World) -> None:
    """Law: `set mac=auto` twice is no new NIC; a doubled address, however it is written, is replaced."""
    world.keys("1", ram="1G", mac="52:54:00:00:00:01")
    kept = world.run("set", "1", "mac=auto")
    assert world.value("1", "mac") == "52:54:00:00:00:01"
    assert "`mac` stays 52:54:00:00:00:01" in kept.stderr
    world.keys("2", ram="1G", **{"nic/3/mac": "52-54-00-00-00-01"})
    assert world.run("set", "1", "mac=auto").exit_code == 0
    assert world.value("1", "mac") != "52:54:00:00:00:01"


def test_auto_is_the_command_lines_word(world: World) -> None:
    """Law: in a key it is a problem that names the way; in any other key it is text like any other."""
    (problem,) = parse_wish(InstanceId("1"), {b"ram": RawValue(b"64", 1), b"mac": RawValue(b"auto", 1)}).problems
    assert "the commands `create` and `set` choose one for mac=auto" in str(problem)
    assert world.run("create", "1", "ram=1G", "description=auto", "mac=automatic").exit_code == 1
    assert world.run("create", "1", "ram=1G", "description=auto").exit_code == 0
    assert world.value("1", "description") == "auto"


# --- user-data=@FILE ------------------------------------------------------------------------------------------


def test_a_file_is_read(world: World, tmp_path: Path) -> None:
    """Law: its text is the value, and shown nowhere."""
    (tmp_path / "a").write_text(YAML)
    assert world.run("create", "1", "ram=1G", f"user-data=@{tmp_path}/a").exit_code == 0
    assert world.value("1", "user-data") == YAML
    shown = world.run("show", "1").stdout + world.run("show", "1", "-o", "json").stdout
    assert "web1" not in shown
    assert "(not shown)" in shown


def test_standard_input_is_read(world: World) -> None:
    """Law: `@-` is what comes in."""
    assert value_of("user-data", "@-", lambda most: YAML.encode()[:most]) == YAML


def test_only_user_data_comes_from_files() -> None:
    """Law: other values that begin with @ are what they say."""
    assert value_of("description", "@/etc/passwd") == "@/etc/passwd"
    assert value_of("user-data", "#!/bin/sh @x") == "#!/bin/sh @x"


def test_a_pipe_is_read(tmp_path: Path) -> None:
    """Law: a shell's `<(…)` has no size and is read to its end."""
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=(tmp_path / "fifo").write_text, args=(YAML,))
    writer.start()
    assert value_of("user-data", f"@{tmp_path}/fifo") == YAML
    writer.join()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"#cloud-config\n" + b"#" * VALUE_LIMIT, f"more than {VALUE_LIMIT} bytes"),
        (b"#" * (1 << 20), "its URL into cloud-config"),
        (b"\x1f\x8b\xff", "is no text (not UTF-8 at byte 1)"),
        (b"hostname: x\n", "user-data: found YAML without a first line that says what it is; cloud-config begins with"),
        (b"https://h/x\n", "found a URL; a URL belongs into the key cloud-config"),
        (b"#cloud-config\0\n", "found a NUL character"),
        (b"", "a value is not empty"),
        (b"\xef\xbb\xbf#cloud-config\n", "a byte order mark"),
        (b"<html>", "an HTML page"),
    ],
)
def test_what_is_no_user_data_is_refused(world: World, tmp_path: Path, content: bytes | None, said: str) -> None:
    """Law: nothing is written, the reason says what was found, and no word of the file is repeated."""
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    result = world.run("create", "1", "ram=1G", f"user-data=@{tmp_path}/a")
    assert result.exit_code in {1, 2}
    assert said in " ".join(result.stderr.split()), result.stderr
    assert world.value("1", "ram") is None


@pytest.mark.parametrize("word", ["@", "@/", "@/nowhere/x", "@a\0b"])
def test_names_that_are_no_file(word: str) -> None:
    """Law: each is told, and none is a traceback."""
    with pytest.raises(Unreadable):
        value_of("user-data", word)


def test_both_kinds_of_user_data(world: World) -> None:
    """Law: one of the two keys goes; a running guest would go on."""
    world.keys("1", ram="1G", **{"cloud-config": "http://h/x"})
    result = world.run("set", "1", f"user-data={YAML}")
    assert result.exit_code == 1
    assert "user-data: found a value that is not shown, and cloud-config beside it; they are both" in result.stderr
    assert world.run("set", "1", f"user-data={YAML}", "--unset", "cloud-config").exit_code == 0


def test_nothing_is_read_to_complete_a_later_word(tmp_path: Path) -> None:
    """Law: the Tab key waits for no file: neither for standard input nor for a pipe that nobody writes."""
    os.mkfifo(tmp_path / "fifo")
    with click.Context(click.Command("set"), resilient_parsing=True) as ctx:
        for word in ("@-", f"@{tmp_path}/fifo"):
            assert ASSIGNMENT.convert(f"user-data={word}", None, ctx) == ("user-data", word)


def test_files_are_completed(tmp_path: Path) -> None:
    """Law: behind the @ stand files and folders, and none that a shell would take apart."""
    for name in ("web1.yaml", "web 2", "other"):
        (tmp_path / name).touch()
    (tmp_path / "webs").mkdir()
    assert completions("user-data=") == ["user-data=@"]
    assert completions(f"user-data=@{tmp_path}/we") == [f"user-data=@{tmp_path}/{n}" for n in ("web1.yaml", "webs/")]
    assert completions(f"user-data=@{tmp_path}/nowhere/") == []
    assert completions("description=@") == []


# --- the way in -----------------------------------------------------------------------------------------------

AGENT = GuestFacts(addresses=(GuestAddress(interface="eth0", address="10.20.0.7"),))
STATUS = Status(id="1", host="alpha", phase=Phase.RUNNING, reason="runs", since=SINCE, agent=AGENT)


@pytest.mark.parametrize(
    ("bridge", "forward", "said"),
    [
        ("br0", "", "; its addresses: 10.20.0.7"),
        (":user", "", ""),
        (":user", "tcp:2222:22", "; on alpha: ssh -p 2222 USER@127.0.0.1"),
        (":user", "tcp:0.0.0.0:2222:22", "; on alpha: ssh -p 2222 USER@alpha"),
        (":user", "tcp:8080:80", "; on alpha: tcp port 8080 of 127.0.0.1 leads to its port 80"),
    ],
)
def test_the_way_in(bridge: str, forward: str, said: str) -> None:
    """Law: an address of QEMU's own network leads nowhere and is not told; a forward is."""
    spec = Spec(ram_mib=64, mac="52:54:00:00:00:01", bridge=bridge, forward=forwards(forward))
    assert reach.clause(spec, STATUS, lambda macs: {}) == said


@pytest.mark.parametrize("agent", [AGENT, None])
def test_the_agents_word_comes_first(agent: GuestFacts | None) -> None:
    """Law: what this machine has heard of is told where there is no agent, with what tells of it."""
    spec = Spec(ram_mib=64, mac="52:54:00:00:00:01", bridge="br0")
    heard = {"10.20.0.9": "DHCP lease"}
    said = reach.clause(spec, replace(STATUS, agent=agent), lambda macs: heard if spec.mac in macs else {})
    assert said == ("; its addresses: 10.20.0.9 (DHCP lease)" if agent is None else "; its addresses: 10.20.0.7")


def created(world: World, *, mac: str, timeout: str) -> str:
    """Create one whose host runs it at once, and wait; what the command printed."""
    wishes = ["host=alpha", "ram=1G", "bridge=br0", *([f"mac={mac}"] if mac else [])]
    result = world.run("create", "1", *wishes, "--wait", "--timeout", timeout)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("mac", "heard", "said"),
    [
        ("52:54:00:00:00:01", "52:54:00:00:00:01", "; its addresses: 10.20.0.9 (neighbour)"),
        ("52:54:00:00:00:01", "52:54:00:00:00:02", "; its address is not known here yet: see `show 1`"),
        ("", "52:54:00:00:00:01", ""),
    ],
)
def test_create_waits_for_an_address(
    world: World, acting: Callable[[Callable[[str], None]], None], mac: str, heard: str, said: str
) -> None:
    """Law: the address is told once it is known; a guest that runs is a success without one, within --timeout."""
    world.host("alpha")
    world.heard["10.20.0.9"] = (heard, "neighbour")

    def act(call: str) -> None:
        if call != "txn" and world.value("1", "ram") is not None:
            world.lock("1", "alpha")
            world.status("1", "alpha", Phase.RUNNING, pid=4321, epoch=1, incarnation="i1")

    acting(act)
    assert created(world, mac=mac, timeout="11").rstrip().endswith(f"running on alpha, pid 4321{said}")
