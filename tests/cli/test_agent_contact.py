"""What `show` tells of the guest, and how it asks the guest's host."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvmsupervisor.cli.agent_contact import agent_seen
from kvmsupervisor.domain.agent import GuestAddress, GuestFacts
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World

ONE = InstanceId("1")
SEEN = "2026-03-01T11:59:30Z"
AGENT = GuestFacts(
    addresses=(
        GuestAddress(interface="eth0", address="192.0.2.7"),
        GuestAddress(interface="eth0", address="2001:db8::7"),
    ),
    os="Debian GNU/Linux 12 (bookworm)",
    hostname="web1",
    version="7.2.1",
)


@contextmanager
def serving(body: bytes, status: int = 200) -> Iterator[tuple[str, list[str]]]:
    """A host that answers everything so; its URL, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_host_is_asked() -> None:
    """Law: one GET of the instance's object; the time in it is what counts."""
    with serving(json.dumps({"id": "1", "agent_seen": SEEN}).encode()) as (url, asked):
        assert agent_seen(url, ONE, timeout_s=20) == SEEN
    assert asked == ["/api/v1/instances/1"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"[" * 100_000, b'{"agent_seen": 7}', b'{"agent_seen": "\\u001b[31m"}', b"\xff" * 999]
)
def test_nonsense_is_no_contact(body: bytes) -> None:
    """Law: what is no time is not shown."""
    with serving(body) as (url, _):
        assert agent_seen(url, ONE, timeout_s=20) is None


def test_nobody_there_is_no_contact() -> None:
    """Law: nothing is said of a host that does not answer; nor is anything but HTTP asked, or a redirect followed."""
    for url in ("", "http://", "file:///etc/passwd", "http://127.0.0.1:99999999", "http://[::", "http://127.0.0.1:1"):
        assert agent_seen(url, ONE) is None
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert agent_seen(f"http://127.0.0.1:{silent.getsockname()[1]}", ONE, timeout_s=0.05) is None
    with serving(b"", status=302) as (url, asked):
        assert agent_seen(url, ONE, timeout_s=20) is None
    assert len(asked) == 1


@pytest.fixture
def told(world: World) -> World:
    """A running machine whose agent was heard."""
    world.host("alpha")
    world.running("1")
    world.status("1", "alpha", Phase.RUNNING, pid=4321, agent=AGENT)
    return world


def test_show_tells_the_guest(told: World) -> None:
    """Law: addresses, system, name and last contact, for people and for programs."""
    told.agents_seen["http://alpha:9746", "1"] = SEEN
    shown = " ".join(told.run("show", "1").stdout.split())
    assert (
        "Guest (as its agent tells) address 192.0.2.7 (eth0) address 2001:db8::7 (eth0) "
        "os Debian GNU/Linux 12 (bookworm) hostname web1 agent version 7.2.1 last contact 30s ago"
    ) in shown
    found = told.json("show", "1")
    assert found["agent_seen"] == SEEN
    assert found["status"]["agent"]["addresses"][0] == {"interface": "eth0", "address": "192.0.2.7"}


def test_show_without_contact(told: World) -> None:
    """Law: a host that cannot be asked takes nothing from what its status key tells; a host that is gone is not."""
    assert "last contact not known" in " ".join(told.run("show", "1").stdout.split())
    told.etcd.erase("/kvmsupervisor/hosts/alpha")
    assert "192.0.2.7" in told.run("show", "1").stdout
    assert told.json("show", "1")["agent_seen"] is None


def test_show_without_an_agent(world: World) -> None:
    """Law: nobody is asked, and nothing is said of a guest that says nothing."""
    world.host("alpha")
    world.running("1")
    world.agents_seen["http://alpha:9746", "1"] = SEEN
    assert "Guest" not in world.run("show", "1").stdout
    assert world.json("show", "1")["agent_seen"] is None
