"""Consoles of the page, without a browser: real etcd, supervisor, QEMU and guest; people with passwords."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor.adapters.console import KeyboardLock
from kvmsupervisor.cli.demo.guest import Guest
from tests.support.cluster import Host, Hosts, Keys
from tests.support.page import Page
from tests.support.people import Person, give_roles, people
from tests.support.websocket import Client


@contextlib.contextmanager
def page_of(keys: Keys, host: Host, folder: Path, **roles: str) -> Iterator[Page]:
    """The page of a cluster, which knows some people."""
    with Page(keys, host, **people(folder, **roles)) as page:
        Person(page, "bob").in_step()
        yield page


@pytest.mark.guest
def test_a_serial_console(keys: Keys, hosts: Hosts, guest: Guest, tmp_path: Path) -> None:
    """Requirement 9: the log first; what is typed arrives; browsers and a terminal give way to each other by name.

    It goes on over a rotation, a restart of the supervisor, and one of QEMU.
    """
    host = hosts(KVM_LOG_MAX_BYTES="4K").start()
    flags = shlex.join(guest.options(tag="one", heartbeat_s=60))
    keys.machines(host.name, "one", ram=128, extra_flags=flags, shutdown_timeout=0)
    host.wait_running("one")
    host.hears("one", "HB 1 ")
    folder = host.run_dir / "one"
    with page_of(keys, host, tmp_path, alice="console", bob="operator") as page:
        alice, bob = Person(page, "alice"), Person(page, "bob")
        with alice.console("serial", "one") as first, bob.console("serial", "one") as second:
            for client in (first, second):
                client.until(b"HELLO from one")
            first.hears(**{"is": "keyboard", "yours": True})
            second.hears(**{"is": "keyboard", "holder": "alice (in a browser)"})
            # What is typed without the keyboard is dropped.
            second.send(b"never\n")
            first.send(b"marco\n")
            for client in (first, second):
                client.until(b"marco: no such word")
                assert b"never" not in client.seen
            second.send('{"take": true}')
            second.hears(**{"is": "keyboard", "yours": True})
            assert first.hears(**{"is": "keyboard"})["lost"] == "bob (in a browser)"

            # A person at a terminal, on the host.
            terminal = KeyboardLock(folder, who="carol (process 1)")
            terminal.want()
            assert second.hears(**{"is": "keyboard"})["lost"] == "carol (process 1)"
            assert terminal.take()
            first.hears(**{"is": "keyboard", "holder": "carol (process 1)"})
            terminal.release()
            first.send('{"take": true}')
            first.hears(**{"is": "keyboard", "yours": True})

            # Enough for several logs.
            before = (folder / "console.log").stat().st_ino
            for number in range(150):
                first.send(f"{number}-{'x' * 60}\n".encode())
                for client in (first, second):
                    client.until(f"{number}-{'x' * 60}: no such word".encode())
            assert (folder / "console.log").stat().st_ino != before

            host.kill9()
            for client in (first, second):
                client.hears(**{"is": "supervisor"})
            host.start()
            for client in (first, second):
                client.hears(**{"is": "qemu"})
            (holder,) = {"first", "second"} - {_without(first, second)}
            client = first if holder == "first" else second
            client.send(b"polo\n")
            for client in (first, second):
                client.until(b"polo: no such word")

            keys.put("one", restart_request="now")
            for client in (first, second):
                client.hears(**{"is": "qemu"})
                while client.seen.count(b"HELLO from one") < 2:
                    client.more()
    told = [json.loads(line) for line in page._log.read_text().splitlines()]
    opened = [one for one in told if one["event"] == "web.console_opened"]
    assert {(one["who"], one["instance"], one["console"]) for one in opened} == {
        ("alice", "one", "serial"),
        ("bob", "one", "serial"),
    }
    assert sum(one["event"] == "web.console_closed" for one in told) == 2
    assert "ticket" not in page._log.read_text() + host.log


def _without(first: Client, second: Client) -> str:
    """Which of the two reads only, after a supervisor came back and both asked anew."""
    for name, client in (("first", first), ("second", second)):
        told = client.hears(**{"is": "keyboard"})
        if told.get("holder"):
            return name
    raise AssertionError("nobody reads only")


def test_a_display(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path) -> None:
    """Requirement 10: two viewers, who both want to be alone; a supervisor's end cuts none.

    A role that is taken away ends them, and what has no display says so.
    """
    host = hosts().start()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, display="std", shutdown_timeout=0)
    keys.machines(host.name, "two", ram=16, extra_flags=tiny)
    host.wait_running("one", "two")
    with page_of(keys, host, tmp_path, alice="console", bob="operator") as page:
        alice, bob = Person(page, "alice"), Person(page, "bob")
        with alice.console("display", "two") as none:
            ended = none.the_end()
            assert (ended.code, ended.reason.partition(":")[0]) == (4000, "it has no display")
        with alice.console("display", "one") as first, bob.console("display", "one") as second:
            for client in (first, second):
                client.until(b"RFB 003.008\n")
                # "Only me", in pieces.
                client.send(b"RFB 003.008\n")
                client.until(b"\x01\x01")
                client.send(b"\x01")
                client.send(b"\x00")
                client.until(b"QEMU (one)")
            host.kill9()
            # A whole picture, of both.
            for client in (first, second):
                size = len(client.seen)
                client.send(b"\x03\x00" + bytes(4) + b"\x00\x10\x00\x10")
                while len(client.seen) < size + 16 * 16 * 4:
                    client.more()
            host.start()
            host.wait_running("one")
            give_roles(tmp_path, bob="operator")
            assert first.the_end().reason == "you may have no console any more"
            second.send(b"\x03\x00" + bytes(4) + b"\x00\x10\x00\x10")
            size = len(second.seen)
            while len(second.seen) < size + 16 * 16 * 4:
                second.more()
            keys.put("one", power="off")
            assert second.the_end().reason == "its QEMU has ended this connection"
        with bob.console("display", "one") as off:
            assert off.the_end().reason == "its QEMU does not run"
