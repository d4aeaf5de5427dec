"""A guest as people run it: what its agent says, and its serial console, with a real guest in a real QEMU."""

from __future__ import annotations

import configparser
import json
import shlex
import urllib.request
from typing import Any

import pytest

from kvmsupervisor.domain.agent import GuestAddress
from kvmsupervisor.domain.status import Phase, Status
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.etcd import free_port
from tests.support.firmware import RAM_MIB, Puppet
from tests.support.spice import LinkResult, link
from tests.support.terminal import at_terminal


def told(host: Host) -> dict[str, Any]:
    """What `/api/v1/instances/web1` tells."""
    with urllib.request.urlopen(f"{host.url}/api/v1/instances/web1", timeout=30) as reply:  # noqa: S310 - our own
        found: dict[str, Any] = json.loads(reply.read())
    return found


def has_address(status: Status) -> bool:
    return status.agent is not None and bool(status.agent.addresses)


@pytest.mark.guest
def test_a_guest_with_an_agent(keys: Keys, hosts: Hosts, agent_options: list[str]) -> None:
    """Law: `show` tells address, system and last contact; a successor learns it anew; no shutdown waits for it.

    The event path is QEMU's own: the guest's agent opens its channel, and nothing was asked before.
    """
    host = hosts().start()
    keys.put("web1", host=host.name, ram=192, extra_flags=shlex.join(agent_options), shutdown_timeout=600)
    host.hears("web1", "HELLO")
    status = keys.wait_status("web1", has_address)
    assert status.agent is not None
    assert status.agent.addresses == (GuestAddress(interface="eth0", address="192.0.2.7"),)
    assert (status.agent.os, status.agent.hostname) == ("Small Linux 1.0", "inside")
    assert status.agent.version
    shown = " ".join(host.cli("show", "web1").stdout.split())
    assert "address 192.0.2.7 (eth0) os Small Linux 1.0 hostname inside" in shown
    assert "s ago" in shown.partition("last contact")[2][:10]
    assert "agent_seen" not in (keys.get(keys.layout.status_key(status.id)) or b"").decode()  # type: ignore[arg-type]

    # Adoption: the same guest, and the agent is asked again, although no event tells of its open channel.
    qemu = host.qemu("web1")
    assert host.stop() == 0
    host.start()
    eventually("the agent's answer", lambda: told(host)["agent_seen"])
    assert host.wait_for("web1", has_address).agent == status.agent
    assert host.qemu("web1") == qemu

    keys.put("web1", power="off")
    stopped = host.wait_for("web1", Phase.STOPPED)
    assert stopped.last_exit == "guest-shutdown"
    assert stopped.agent is None


def test_a_guest_s_console(keys: Keys, hosts: Hosts, puppet: Puppet) -> None:
    """Law: two people at one guest; the keyboard changes hands; a QEMU that starts again is followed."""
    host = hosts().start()
    keys.put("web1", host=host.name, ram=RAM_MIB, extra_flags=puppet.extra_flags(tag="web1"))
    host.hears("web1", "HELLO")
    with at_terminal("console", "web1", environ=host.environment) as first:
        first.sees("HELLO from web1")
        first.types("help\r")
        first.sees("words: poweroff reboot")
        with at_terminal("console", "web1", environ=host.environment) as second:
            second.sees("has the keyboard")
            assert "words: poweroff reboot" in second.seen
            second.types("\x1dt")
            second.sees("the keyboard is yours")
            first.sees("has taken the keyboard")
            second.types("deaf\r")
            second.sees("deaf: the power button does nothing now")
            first.sees("deaf: the power button does nothing now")

            before = second.seen.count("HELLO from web1")
            second.types("poweroff\r")
            second.sees("GOODBYE from web1")
            second.sees("QEMU was started again")
            while second.seen.count("HELLO from web1") == before:
                assert second.looks()
            second.types("help\r")
            first.sees("QEMU was started again")
            second.types("\x1dq")
            assert second.ends() == 0
            assert second.is_as_before
        first.sees("the keyboard is free")
        first.types("\x1d\x1d")
        assert first.ends() == 0
        assert first.is_as_before


def test_a_display(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: what `spice` writes leads to a SPICE server that lets its viewer in."""
    host = hosts().start()
    keys.machines(host.name, "web1", ram=32, extra_flags=tiny, spice_port=free_port())
    host.wait_running("web1")
    written = host.cli("spice", "web1")
    assert (written.returncode, written.stderr) == (0, "")
    file = configparser.RawConfigParser()
    file.read_string(written.stdout)
    assert link(file["virt-viewer"]["host"], int(file["virt-viewer"]["port"])) is LinkResult.OK
