"""A guest on a real bridge, from its keys to an answer."""

from __future__ import annotations

import os
import re

import pytest

from kvmsupervisor.cli.demo_guest import Guest
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.net import Lan

MAC = "52:54:00:91:07:01"


@pytest.mark.guest
@pytest.mark.skipif(os.geteuid() != 0, reason="the supervisor of a guest on a bridge runs as root")
def test_a_guest_gets_an_address_and_answers(keys: Keys, lan: Lan, hosts: Hosts, guest: Guest) -> None:
    """The keys `mac` and `bridge` are enough: the network's DHCP server knows the MAC, and the guest answers."""
    lan.inside.bridge_conf.write_text(f"allow {lan.bridge}\n")
    host = hosts()
    host.around = lan.around
    host.start()
    flags = guest.extra_flags(tag="net", dhcp=True)
    keys.put("net", mac=MAC, bridge=lan.bridge, ram=96, extra_flags=flags, shutdown_timeout=10, host=host.name)
    host.wait_running("net")
    console = host.run_dir / "net" / "console.log"
    found = eventually("an address", lambda: re.search(r"DHCP (\S+)", console.read_text(errors="replace")))
    assert f"{found[1]} {MAC}" in lan.log.read_text()
    lan.ping(found[1])
    assert len(lan.inside.run("bridge", "link", "show").splitlines()) == 2

    keys.put("net", power="off")
    eventually("that the tap is gone", lambda: len(lan.inside.run("bridge", "link", "show").splitlines()) == 1)
