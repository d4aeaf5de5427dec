"""A real guest's NIC that loses its bridge: told by everything that tells, and plugged in again without a restart."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.status import Phase, Status
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.etcd import EtcdServer
from tests.support.net import Lan

MAC = "52:54:00:91:07:03"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the supervisor of a guest on a bridge runs as root")


@pytest.fixture
def host(lan: Lan, etcd_prefix: str) -> Iterator[Host]:
    """A supervisor in the network that its bridge is in, as on any real host; its etcd is there, too."""
    with lan.inside.entered(), EtcdServer() as etcd:
        hosts = Hosts(Keys(etcd, etcd_prefix))
        try:
            made = hosts()
            made.around = lan.around
            yield made.start()
        finally:
            hosts.close()


def port_of(lan: Lan, tap: str) -> str | None:
    """The bridge that a tap is a port of."""
    found = re.search(r"master (\S+)", lan.inside.run("ip", "-o", "link", "show", tap))
    return found and found[1]


def tap_of(lan: Lan) -> str:
    (tap,) = re.findall(r"^\d+: (tap\d+)", lan.inside.run("ip", "-o", "link"), flags=re.MULTILINE)
    return str(tap)


def wired(status: Status) -> bool:
    return status.phase is Phase.RUNNING and not status.unplugged


def test_a_bridge_that_is_made_again(lan: Lan, host: Host, tiny: str) -> None:
    """Deleted: reason, `check` and metric say so. Made again, as network managers do it: the NIC is back in it."""
    host.keys.put("net", mac=MAC, bridge="br9", ram=16, extra_flags=tiny, host=host.name)
    host.wait_for("net", lambda status: "there is no bridge br9" in status.reason)
    lan.inside.run("ip", "link", "add", "br9", "up", "type", "bridge")
    qemu = host.wait_running("net")["net"]
    tap = tap_of(lan)
    eventually("the NIC to be seen", lambda: "instance_nic_plugged{" in host.metrics())
    assert host.metric("instance_nic_plugged", instance="net", nic="nic0") == 1
    eventually("nothing to find", lambda: host.cli("check").returncode == 0)

    lan.inside.run("ip", "link", "del", "br9")
    status = host.wait_for("net", lambda status: bool(status.unplugged))
    assert status.phase is Phase.RUNNING
    assert f"its nic0 ({tap}) has no network: there is no bridge br9" in status.reason
    assert host.metric("instance_nic_plugged", instance="net", nic="nic0") == 0
    host.keys.wait_status("net", lambda status: bool(status.unplugged))
    found = host.cli("check")
    assert found.returncode == 1
    assert "there is no bridge br9" in found.stdout

    lan.inside.run("ip", "link", "add", "br9", "type", "bridge")
    eventually("the tap to be a port again", lambda: port_of(lan, tap) == "br9")
    status = host.wait_for("net", lambda status: "br9 is down" in status.reason)
    lan.inside.run("ip", "link", "set", "br9", "up")
    host.wait_for("net", wired)
    assert host.metric("instance_nic_plugged", instance="net", nic="nic0") == 1
    assert host.qemu("net") == qemu

    # Whatever happens while no supervisor looks is found by the next one.
    host.kill9()
    lan.inside.run("ip", "link", "set", tap, "nomaster")
    host.start()
    eventually("the tap to be a port again", lambda: port_of(lan, tap) == "br9")
    host.wait_for("net", wired)
    assert host.qemu("net") == qemu


def test_a_persons_hand_is_not_forced(lan: Lan, host: Host, tiny: str) -> None:
    """A tap in another bridge, or set down, stays so and is told; one on a bridge that is denied by now stays out."""
    host.keys.put("net", mac=MAC, bridge=lan.bridge, ram=16, extra_flags=tiny, host=host.name)
    host.wait_running("net")
    tap = tap_of(lan)
    lan.inside.run("ip", "link", "add", "br9", "up", "type", "bridge")
    lan.inside.run("ip", "link", "set", tap, "master", "br9")
    host.wait_for("net", lambda status: f"its nic0 ({tap}) is in br9, not in {lan.bridge}" in status.reason)
    assert host.metric("instance_nic_plugged", instance="net", nic="nic0") == 1
    lan.inside.run("ip", "link", "set", tap, "down")
    host.wait_for("net", lambda status: f"{tap} is down" in status.reason)
    assert host.metric("instance_nic_plugged", instance="net", nic="nic0") == 0
    assert port_of(lan, tap) == "br9"

    lan.inside.bridge_conf.write_text(f"deny {lan.bridge}\n")
    lan.inside.run("ip", "link", "set", tap, "nomaster", "up")
    host.wait_for("net", lambda status: "an administrator denies" in status.reason)
    assert port_of(lan, tap) is None
    lan.inside.bridge_conf.write_text(f"allow {lan.bridge}\n")
    host.wait_for("net", wired)
    assert port_of(lan, tap) == lan.bridge


@pytest.mark.guest
def test_a_guest_answers_again(lan: Lan, host: Host, guest: Guest) -> None:
    """What counts: the guest is reached again, and has noticed nothing but silence."""
    flags = guest.extra_flags(tag="net", dhcp=True)
    host.keys.put("net", mac=MAC, bridge=lan.bridge, ram=96, extra_flags=flags, shutdown_timeout=10, host=host.name)
    qemu = host.wait_running("net")["net"]
    console = host.run_dir / "net" / "console.log"
    address = eventually("an address", lambda: re.search(r"DHCP (\S+)", console.read_text(errors="replace")))[1]
    lan.ping(address)
    lan.inside.run("ip", "link", "del", lan.bridge)
    host.wait_for("net", lambda status: bool(status.unplugged))
    lan.inside.run("ip", "link", "add", lan.bridge, "type", "bridge")
    lan.inside.run("ip", "link", "set", lan.bridge, "up")
    lan.inside.run("ip", "link", "set", "router", "master", lan.bridge)
    host.wait_for("net", wired)
    lan.ping(address)
    assert host.qemu("net") == qemu
