"""A guest on a real bridge, from its keys to an answer, its QEMU confined; and what stands in the way of one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.net import Lan

MAC = "52:54:00:91:07:01"
NOBODY = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the supervisor of a guest on a bridge runs as root")


@pytest.fixture
def host(hosts: Hosts, lan: Lan) -> Host:
    """A supervisor, to be started, whose bridge helper is on the test's network."""
    host = hosts()
    host.around = lan.around
    return host


def proc_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: rest.strip() for name, _, rest in (line.partition(":") for line in lines)}


def descriptors(pid: int) -> list[str]:
    """What a process has open, by kind: numbers of sockets, pipes and files of memory differ from time to time."""
    links = (str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir())
    return sorted(re.sub(r":.*", "", link) for link in links)


@pytest.mark.guest
def test_a_guest_gets_an_address_and_answers(keys: Keys, lan: Lan, host: Host, guest: Guest) -> None:
    """`mac` and `bridge` are enough: the network's DHCP server knows the MAC, the guest answers, QEMU is confined."""
    host.settings["KVM_QEMU_USER"] = "nobody"
    host.start()
    flags = guest.extra_flags(tag="net", dhcp=True)
    keys.put("net", mac=MAC, bridge=lan.bridge, ram=96, extra_flags=flags, shutdown_timeout=10, host=host.name)
    pid = host.wait_running("net")["net"].pid
    assert pid is not None
    console = host.run_dir / "net" / "console.log"
    found = eventually("an address", lambda: re.search(r"DHCP (\S+)", console.read_text(errors="replace")))
    assert f"{found[1]} {MAC}" in lan.log.read_text()
    lan.ping(found[1])
    assert len(lan.inside.run("bridge", "link", "show").splitlines()) == 2

    status = proc_status(pid)
    assert status["Uid"].split() == [str(NOBODY)] * 4
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), int(status["CapInh"], 16)) == (0, 0, 0)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    # The tap is the only thing of the host's that it holds beside its own sockets, logs and the like.
    kinds = set(descriptors(pid))
    assert "/dev/net/tun" in kinds
    own = {"/dev/null", "/room/dev/null", "/dev/net/tun", "socket", "pipe", "anon_inode", "/memfd"}
    logs = {str(host.run_dir / "net" / "qemu.log"), str(console)}
    assert {kind for kind in kinds - own - logs if not kind.startswith(("/memfd", "/dev/ptmx"))} == set()

    keys.put("net", power="off")
    eventually("that the tap is gone", lambda: len(lan.inside.run("bridge", "link", "show").splitlines()) == 1)


def test_a_missing_bridge_is_waited_for(keys: Keys, lan: Lan, host: Host, tiny: str) -> None:
    """What is missing on the host is named, and the instance starts by itself once it is there."""
    host.start()
    keys.put("net", mac=MAC, bridge="br-none", ram=16, extra_flags=tiny, host=host.name)
    waiting = host.wait_for("net", lambda status: status.phase is Phase.WAITING and "br-none" in status.reason)
    assert "bridge" in waiting.reason
    lan.inside.run("ip", "link", "add", "br-none", "type", "bridge")
    lan.inside.run("ip", "link", "set", "br-none", "up")
    host.wait_running("net")


def test_a_denied_bridge_is_waited_for(keys: Keys, lan: Lan, host: Host, tiny: str) -> None:
    """An administrator's word in bridge.conf counts, and is named."""
    lan.inside.bridge_conf.write_text(f"deny {lan.bridge}\n")
    host.start()
    keys.put("net", mac=MAC, bridge=lan.bridge, ram=16, extra_flags=tiny, host=host.name)
    host.wait_for("net", lambda status: status.phase is Phase.WAITING and "bridge.conf" in status.reason)
    lan.inside.bridge_conf.write_text("# open\n")
    host.wait_running("net")
    assert own_lines(lan, host) == [lan.bridge]
    assert lan.inside.bridge_conf.read_text().startswith("# open\n# kvmsupervisor ")


def own_lines(lan: Lan, host: Host) -> list[str]:
    """The bridges that bridge.conf allows by lines of this host's supervisor."""
    owner = f"{host.keys.layout.facts}/hosts/{host.name}"
    text = lan.inside.bridge_conf.read_text() if lan.inside.bridge_conf.exists() else ""
    found = re.findall(r"^# kvmsupervisor (\S+) wants (\S+):\nallow (\S+)$", text, flags=re.MULTILINE)
    return [bridge for its, bridge, allowed in found if its == owner and bridge == allowed]


def test_lines_of_bridge_conf_come_and_go(keys: Keys, lan: Lan, host: Host, tiny: str) -> None:
    """None before the bridge is there; own ones go with the last instance that wants them; people's stay for ever."""
    theirs = "# of people\nallow br-theirs\n# kvmsupervisor /other/hosts/b wants br-two:\nallow br-two\n"
    lan.inside.bridge_conf.write_text(theirs)
    host.start()
    for name, bridge, mac in (
        ("one", "br-two", MAC),
        ("two", "br-two", MAC[:-1] + "8"),
        ("three", "br-three", MAC[:-1] + "9"),
    ):
        keys.put(name, mac=mac, bridge=bridge, ram=16, extra_flags=tiny, shutdown_timeout=0, host=host.name)
    host.wait_for("three", lambda status: "there is no bridge br-three" in status.reason)
    assert lan.inside.bridge_conf.read_text() == theirs
    for bridge in ("br-two", "br-three"):
        lan.inside.run("ip", "link", "add", bridge, "type", "bridge")
    host.wait_running("one", "two", "three")
    assert sorted(own_lines(lan, host)) == ["br-three", "br-two"]

    # A stopped machine wants its bridge, a removed one does not; of two, one is enough to want it.
    keys.put("one", power="off")
    host.wait_for("one", lambda status: status.phase is Phase.STOPPED)
    keys.delete("two")
    keys.delete("three")
    eventually("br-three to go", lambda: own_lines(lan, host) == ["br-two"])
    keys.delete("one")
    eventually("br-two to go", lambda: own_lines(lan, host) == [])
    assert lan.inside.bridge_conf.read_text() == theirs


def test_lines_that_a_killed_supervisor_left_go(keys: Keys, lan: Lan, host: Host, tiny: str) -> None:
    """What is ours is told by the file itself: the next supervisor takes away what nobody wants by then."""
    host.start()
    keys.put("net", mac=MAC, bridge=lan.bridge, ram=16, extra_flags=tiny, shutdown_timeout=0, host=host.name)
    host.wait_running("net")
    keys.put("net", power="off")
    host.wait_for("net", lambda status: status.phase is Phase.STOPPED)
    host.kill9()
    assert own_lines(lan, host) == [lan.bridge]
    keys.delete("net")
    host.start()
    eventually("its line to go", lambda: own_lines(lan, host) == [])


def test_two_nics(keys: Keys, lan: Lan, host: Host, tiny: str) -> None:
    """Each NIC has a tap of its own on its own bridge."""
    lan.inside.run("ip", "link", "add", "br-two", "type", "bridge")
    host.start()
    keys.put("net", **{"nic/1/mac": "52:54:00:91:07:02", "nic/1/bridge": "br-two"}, mac=MAC, bridge=lan.bridge, ram=16,
             extra_flags=tiny, host=host.name)  # fmt: skip
    host.wait_running("net")
    taps = lan.inside.run("bridge", "link", "show").splitlines()
    bridges = {line.partition("master ")[2].split()[0] for line in taps if "tap" in line}
    assert bridges == {lan.bridge, "br-two"}
