"""KVM, and hosts without it: what `KVM_ACCEL` comes to, where it is told, and device nodes that are made."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cluster import Host, Hosts, Keys
from tests.support.net import Lan

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes, or hides them")

BARE_DEV = """
mount -t tmpfs -o mode=755 tmpfs "$0" && mkdir "$0/dev" && printf %s "$1" >"$0/misc" &&
for node in null zero full random urandom tty ptmx; do
    touch "$0/dev/$node" && mount --bind "/dev/$node" "$0/dev/$node" || exit
done && ln -s /proc/self/fd "$0/dev/fd" && mount --rbind "$0/dev" /dev &&
if [ -n "$1" ]; then mount --bind "$0/misc" /proc/misc; fi && shift && exec "$@"
"""
"""Gives a program a /dev with little in it, as a container has. `$0` is an empty folder, the first word what the
program shall find in /proc/misc, nothing for what the kernel has."""


def bare(host: Host, misc: str = "") -> Callable[..., list[str]]:
    """`Host.around` that starts the supervisor with such a /dev."""
    place = host.folder / "dev"
    place.mkdir()
    return lambda *argv: [
        *("unshare", "--mount", "--propagation=private", "sh", "-c", BARE_DEV, str(place), misc),
        *map(str, argv),
    ]


def kvm_opens() -> bool:
    """Whether this machine has KVM."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError:
        return False
    return True


def named(keys: Keys, host: Host, instance: str) -> set[str | None]:
    """Every accelerator that is named for the instance: by status key, HTTP, log, metric, and its command line."""
    qemu = host.wait_running(instance)[instance]
    (spawned,) = host.events("instance.spawned", instance=instance)
    status = keys.wait_status(instance, lambda s: s.pid == qemu.pid)
    told = {status.accelerator, host.instances()[instance].accelerator, spawned["accelerator"]}
    labels = {"instance": instance, "accelerator": str(status.accelerator), "machine": str(status.machine)}
    assert host.metric("instance_info", **labels) == 1
    (machine,) = [word for word in qemu.argv if word.startswith(f"{status.machine},accel=")]
    return told | {machine.partition("accel=")[2].partition(",")[0]}


def test_kvm_that_is_demanded_and_missing(hosts: Hosts) -> None:
    """Law: with KVM_ACCEL=kvm a host without KVM refuses to start, and says what is missing and what would help."""
    host = hosts(KVM_ACCEL="kvm")
    host.around = bare(host, "200 tun\n")
    host.launch()
    assert host.wait_ended() != 0
    assert "KVM_ACCEL is kvm, but /dev/kvm is missing, and /proc/misc lists no kvm" in host.log
    assert "modprobe kvm_intel" in host.log
    assert "set KVM_ACCEL=auto or tcg" in host.log
    assert "Traceback" not in host.log
    assert host.events("supervisor.started") == []


def test_kvm_that_is_something_else(hosts: Hosts) -> None:
    """Law: a node that is another device is not taken for KVM."""
    host = hosts(KVM_ACCEL="kvm")
    around = bare(host, "232 kvm\n200 tun\n")
    script = 'mknod /dev/kvm c 1 3 && exec "$@"'
    host.around = lambda *argv: around("sh", "-c", script, "sh", *argv)
    host.launch()
    assert host.wait_ended() != 0
    assert "/dev/kvm has the numbers 1, 3, and kvm has 10, 232 now" in host.log


def test_auto_without_kvm(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: `auto` takes TCG where there is no KVM, says why, and every view of the instance names it."""
    host = hosts(KVM_ACCEL="auto")
    host.around = bare(host, "200 tun\n")
    host.start()
    (started,) = host.events("supervisor.started")
    assert started["accelerator"] == "tcg"
    assert "/dev/kvm is missing, and /proc/misc lists no kvm" in started["why_no_kvm"]
    keys.machines(host.name, "one", ram=16, extra_flags=tiny)
    assert named(keys, host, "one") == {"tcg"}


def test_auto_on_this_machine(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: `auto` takes KVM where it opens; every view names what the QEMU really got."""
    host = hosts(KVM_ACCEL="auto").start()
    expected = "kvm" if kvm_opens() else "tcg"
    (started,) = host.events("supervisor.started")
    assert started["accelerator"] == expected
    assert (started["why_no_kvm"] is None) == (expected == "kvm")
    # The model that every KVM has: `host` needs more of a machine than some virtual ones give.
    keys.machines(host.name, "one", ram=16, cpu="qemu64", extra_flags=tiny)
    assert named(keys, host, "one") == {expected}


def test_missing_nodes_are_made(keys: Keys, hosts: Hosts, lan: Lan, tiny: str) -> None:
    """Law: nodes that a container lacks are made for what the kernel has: for a guest with a NIC /dev/net/tun."""
    host = hosts()
    around = bare(host)
    host.around = lambda *argv: lan.around(*around(*argv))
    host.start()
    node = Path(f"/proc/{host.pid}/root/dev/net/tun")
    assert not node.exists()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, mac="52:54:00:91:07:01", bridge=lan.bridge)
    host.wait_running("one")
    found = node.stat()
    assert stat.S_ISCHR(found.st_mode)
    assert found.st_rdev == Path("/dev/net/tun").stat().st_rdev
