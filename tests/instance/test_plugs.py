"""A guest's NIC that loses its bridge, in virtual time: told at once, and plugged in again when that is possible."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.domain.nics import BRIDGE, TUN, Link
from kvmsupervisor.domain.status import Phase
from tests.fakes.clock import settle
from tests.support.host import Host

BR0 = Link(index=3, name="br0", kind=BRIDGE)
TAP = Link(index=7, name="tap7", kind=TUN, master=3)
UNPLUGGED = replace(TAP, master=0)


@pytest.fixture
async def host(host: Host) -> Host:
    """Its one machine has a NIC on br0, the interface 7 of this host."""
    host.wish(mac="52:54:00:00:00:01", bridge="br0")
    host.begin()
    await host.runs()
    host.links.set(BR0, TAP)
    await settle()
    return host


def plugged(host: Host) -> list[bool]:
    return [plug.plugged for plug in host.instance.plugs.seen]


async def test_a_bridge_that_is_made_again_gets_its_ports_back(host: Host) -> None:
    """Deleted and made again, it has none: the guest has no network, that is said, and mended without a restart."""
    (qemu,) = host.qemus.all
    assert (host.status.reason, host.status.unplugged, plugged(host)) == ("runs", (), [True])
    host.links.set(UNPLUGGED)
    await settle()
    assert host.status.phase is Phase.RUNNING
    assert "its nic0 (tap7) has no network: there is no bridge br0" in host.status.reason
    assert (len(host.status.unplugged), plugged(host), host.links.plugged) == (1, [False], [])
    await host.clock.advance(3600.0)
    assert host.links.plugged == []
    with capture_logs() as logs:
        host.links.set(replace(BR0, index=13), UNPLUGGED)
        await settle()
    assert host.links.plugged == [(7, "br0")]
    assert [(one["nic"], one["bridge"]) for one in logs if one["event"] == "instance.nic_plugged_in"] == [
        ("nic0", "br0")
    ]
    assert (host.status.reason, host.status.unplugged, plugged(host)) == ("runs", (), [True])
    assert host.qemus.all == [qemu]


async def test_what_the_kernel_refuses_is_told_and_tried_again(host: Host) -> None:
    """No privilege, or a bridge that takes no more: the reason has the kernel's words; no loop."""
    host.links.refuses = OSError(errno.EPERM, os.strerror(errno.EPERM))
    host.links.set(BR0, UNPLUGGED)
    await settle()
    assert "nic0 cannot be plugged in again: Operation not permitted" in host.status.reason
    host.links.refuses = None
    await host.clock.advance(6.0)
    assert (host.status.reason, host.links.plugged) == ("runs", [(7, "br0")])


async def test_an_administrators_deny_counts_here_too(host: Host) -> None:
    """bridge.conf keeps guests off a bridge for good, those as well that were there before."""
    host.qemus.network.denied["br0"] = "an administrator denies br0 in bridge.conf line 1"
    host.links.set(BR0, UNPLUGGED)
    await host.clock.advance(60.0)
    assert "nic0 is not plugged in again: an administrator denies br0 in bridge.conf line 1" in host.status.reason
    assert host.links.plugged == []


async def test_what_a_person_has_moved_is_left_there(host: Host) -> None:
    """Another bridge, or the tap set down: told, and nobody's hand is forced."""
    host.links.set(BR0, Link(index=4, name="br1", kind=BRIDGE), replace(TAP, master=4))
    await settle()
    assert (host.status.reason, plugged(host)) == ("its nic0 (tap7) is in br1, not in br0", [True])
    host.links.set(BR0, replace(TAP, up=False))
    await host.clock.advance(60.0)
    assert "tap7 is down" in host.status.reason
    assert (plugged(host), host.links.plugged) == ([False], [])


async def test_a_successor_finds_what_happened_meanwhile(host: Host) -> None:
    """Nobody has heard the kernel tell: the record says which interface it was, and on which bridge."""
    host.links.all = {3: BR0, 7: UNPLUGGED}
    await host.die()
    host.begin()
    await host.until(lambda: host.links.plugged == [(7, "br0")])
    await settle()
    assert host.status.reason == "runs"


async def test_others_interfaces_wake_nobody(host: Host) -> None:
    """A host may have hundreds of containers whose interfaces come and go."""
    assert not host.instance.plugs.concern({100, 101})
    assert host.instance.plugs.concern({7})
    assert host.instance.plugs.concern({3})
    host.links.set(BR0, UNPLUGGED, Link(index=100, name="veth0"))
