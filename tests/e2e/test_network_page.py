"""The way from an empty bridge to a guest with an address, as README.md and docs/network.md show it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.net import Lan, Namespace
from tests.support.pages import commands

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="bridges take root, and so does the supervisor here")

WAYS = {
    "README.md": ("From an empty bridge to a guest with an address",),
    "docs/network.md": ("Guests in a network behind the host", "The guest"),
}
"""Sections whose commands lead there, one after the other."""


@pytest.fixture
def bare_host(netns: Namespace) -> Iterator[Namespace]:
    """A network without a bridge, whose daemons write nothing into this machine's folders, and end with the test."""
    for folder in ("/run", "/var/lib/misc"):
        netns.run("mount", "-t", "tmpfs", "tmpfs", folder)
    yield netns
    for pid_file in Path(f"/proc/{netns.pid}/root/run").glob("**/dnsmasq.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid_file.read_text()), signal.SIGTERM)


@pytest.mark.guest
@pytest.mark.parametrize("page", WAYS)
def test_what_the_page_says_leads_to_an_address(
    page: str, keys: Keys, hosts: Hosts, bare_host: Namespace, guest: Guest
) -> None:
    """Law: its commands, as they stand there, give a guest an address, and show it."""
    told = [command for section in WAYS[page] for command in commands(page, section)]
    host = hosts("alpha")
    lan = Lan(bridge="br0", inside=bare_host, router=bare_host, subnet="10.20.0", log=Path("/dev/null"))
    host.around = lan.around
    host.start()
    # What a disk would bring, and (on the page of networks alone) the keys that make it run.
    keys.put("web1", ram=96, extra_flags=guest.extra_flags(tag="web1", dhcp=True), shutdown_timeout=0)
    looks = [command for command in told if " show " in command]
    for command in told:
        if found := re.fullmatch(r"etcdctl put /kvm/web1/(\S+) (\S+)", command):
            keys.put("web1", **{found[1]: found[2]})
        elif command not in looks:
            bare_host.run("sh", "-c", command)
    keys.put("web1", host="alpha")
    host.wait_running("web1")
    eventually("an address", lambda: "DHCP 10.20.0.1" in host.console("web1"))
    found_address = re.search(r"DHCP (\S+)", host.console("web1"))
    assert found_address is not None
    lan.ping(found_address[1])
    shown = {command: bare_host.run("sh", "-c", command) for command in looks}
    neighbours = shown["ip neigh show dev br0"]
    assert re.search(rf"{re.escape(found_address[1])} lladdr 52:54:00:12:34:56", neighbours), neighbours
    if "bridge link show" in shown:
        assert "master br0" in shown["bridge link show"]
        assert "52:54:00:12:34:56" in shown["bridge fdb show br br0"]
