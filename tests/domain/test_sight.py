"""What a QEMU needs to see of its host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.domain.hardware import Ovmf
from kvmsupervisor.domain.sight import CEPH_CONF, NAME_FILES, Sight, sight_of
from kvmsupervisor.domain.spec import Firmware, Nic, RbdDisk, Spec
from kvmsupervisor.domain.user_network import USER, forwards

TINY = Spec(ram_mib=64)


def sight(spec: Spec, *, accel: str = "tcg", ceph_conf: str | None = None) -> Sight:
    return sight_of(spec, accel=accel, ceph_conf=ceph_conf, ovmf=Ovmf(code="/o/code.fd", variables="/o/vars.fd"))


def flagged(*words: str) -> Sight:
    return sight(replace(TINY, extra_flags=words))


def test_a_plain_machine_needs_nothing() -> None:
    """Law: no path, no network, no port; with KVM its device."""
    assert sight(TINY) == Sight(needs_network=False, listens=(), connects=False)
    assert sight(TINY, accel="kvm").writable == ("/dev/kvm",)
    bridged = replace(TINY, mac="52:54:00:00:00:01", nics=(Nic(1, "52:54:00:00:00:02"),))
    assert not sight(bridged).needs_network


def test_what_keys_need() -> None:
    """Law: Ceph its configuration and a network, a display its port, firmware its file."""
    ceph = sight(replace(TINY, rbd=RbdDisk("rbd", "vm1")))
    assert (ceph.files, ceph.needs_network, ceph.listens, ceph.connects) == ((CEPH_CONF, *NAME_FILES), True, (), True)
    assert sight(replace(TINY, rbd=RbdDisk("rbd", "vm1")), ceph_conf="/c").files[0] == "/c"
    spice = sight(replace(TINY, spice_port=5901))
    assert (spice.needs_network, spice.listens, spice.connects) == (True, (5901,), False)
    user = replace(TINY, mac="52:54:00:00:00:01", bridge=USER, forward=forwards("tcp:2222:22 udp:5353:53"))
    assert (sight(user).listens, sight(user).connects) == ((2222,), True)
    assert "/o/code.fd" in sight(replace(TINY, firmware=Firmware.UEFI)).files


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (("-kernel", "/boot/vmlinuz", "-append", "root=/dev/vda init=/bin/sh"), ["/boot/vmlinuz"]),
        (("-drive", "file=/srv/a,,b.qcow2,format=qcow2"), ["/srv/a,b.qcow2"]),
        (("-blockdev", '{"driver":"raw","file":{"driver":"file","filename":"/srv/{x}"}}'), ["/srv/{x}"]),
        (("/srv/disk.img",), ["/srv/disk.img"]),
        (("-chardev", "file,id=c,path=/srv/log", "-serial", "file:/srv/serial"), ["/srv/log", "/srv/serial"]),
        (("-serial", "unix:/srv/sock,server=on"), ["/srv/sock"]),
        (("--device", "vfio-pci,host=01:00.0"), ["/dev/vfio", "/sys"]),
        (("-drive", "file=/srv/x,snapshot=on"), ["/srv/x", "/var/tmp"]),
        (("-netdev", "tap,id=n,ifname=tap0"), ["/dev/net/tun"]),
        (("-no-reboot", "-smbios", "type=1,serial=/etc/shadow"), []),
        (("-blockdev", "{broken"), []),
    ],
)
def test_paths_in_extra_flags(words: tuple[str, ...], paths: list[str]) -> None:
    """Law: what options name is seen, in every form that QEMU takes; text for the guest names nothing."""
    assert list(flagged(*words).writable) == paths


@pytest.mark.parametrize(
    "words",
    [
        ("-kernel", "/boot/vmlinuz", "-append", "a=http://x:1", "-no-reboot", "-device", "vfio-pci,host=01:00.0"),
        ("-drive", "file=/srv/a:b.img,if=virtio", "-rtc", "base=2026-01-01T00:00:00", "-smp", "2"),
        ("-blockdev", '{"driver":"qcow2","file":{"driver":"file","filename":"/x"}}', "-serial", "file:/x"),
    ],
)
def test_options_without_a_network(words: tuple[str, ...]) -> None:
    """Law: where no option can need it, there is none."""
    found = flagged(*words)
    assert (found.needs_network, found.listens, found.connects) == (False, (), False)


@pytest.mark.parametrize(
    "words",
    [
        ("-netdev", "user,id=n"),
        ("-kernel", "http://h/vmlinuz"),
        ("-drive", "file=nbd:10.0.0.1:10809"),
        ("-drive", "file.driver=nbd,file.host=h"),
        ("-blockdev", '{"driver":"nbd","server":{"type":"inet"}}'),
        ("-blockdev", "driver=nbd,node-name=x"),
        ("-chardev", "socket,host=h,port=1,id=c"),
        ("-serial", "tcp::4444,server"),
        ("-vnc", ":1"),
        ("-gdb", "tcp::1234"),
        ("-s",),
        ("-option-of-a-later-release",),
    ],
)
def test_options_that_may_need_a_network(words: tuple[str, ...]) -> None:
    """Law: what may need it has it, with every port: a guest never fails for what nobody could know."""
    found = flagged(*words)
    assert (found.needs_network, found.listens, found.connects) == (True, None, True)
