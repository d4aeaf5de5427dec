"""The command line of QEMU: what stands in it, and that no value becomes an option of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.argv import (
    SANDBOX,
    Channels,
    HostSide,
    Identity,
    Provision,
    build_argv,
    host_problems,
    instance_uuid,
    logs_into_memory,
)
from kvmsupervisor.domain.flags import AllowedFlags
from kvmsupervisor.domain.hardware import Ceph, Handed, Nvram, Ovmf, TapFds, takes_viewers
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.spec import Disk, Display, Firmware, HugePages, Nic, RawValue, RbdDisk, Spec, spec_to_object
from kvmsupervisor.domain.storage import nvram_of
from kvmsupervisor.domain.user_network import USER, Forward

VM = InstanceId("vm-1")
IDENTITY = Identity(instance=VM, uuid=UUID("8b1cf5f6-4d2e-4b8a-9d5e-1f6a2a3c4d5e"))
HOST = HostSide(qemu="/usr/bin/qemu-system-x86_64", accel="kvm")
READY = Provision(run_dir="/run/k/vm-1", channels=Channels(qmp=7, spare=9, console=11, agent=13, console_log=15))
TINY = Spec(ram_mib=64)


def argv(spec: Spec, host: HostSide = HOST, **ready: Any) -> tuple[str, ...]:
    """The command line, with as many taps as the machine has NICs."""
    taps = tuple(TapFds(fd=20 + number) for number in range(len(spec.bridged_nics)))
    return build_argv(spec, identity=IDENTITY, host=host, provision=replace(READY, **{"taps": taps, **ready}))


def values_of(words: Sequence[str], option: str) -> list[str]:
    """The arguments of each `option`."""
    return [words[index + 1] for index, word in enumerate(words) if word == option]


def value_of(words: Sequence[str], option: str) -> str:
    (value,) = values_of(words, option)
    return value


def parts(value: str) -> list[str]:
    """An option's argument taken apart as QEMU does: two commas are one that does not separate."""
    return [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]


def test_tiny_diskless() -> None:
    """Law: this is the whole command line of the least machine; a change of it is seen by guests."""
    assert argv(TINY) == (
        "/usr/bin/qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-S"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-name", "guest=vm-1,debug-threads=on"),
        *("-uuid", "8b1cf5f6-4d2e-4b8a-9d5e-1f6a2a3c4d5e"),
        *("-machine", "q35,accel=kvm"),
        *("-cpu", "host"),
        *("-m", "size=64M"),
        *("-smp", "cpus=1"),
        *("-chardev", "socket,id=qmp0,fd=7,server=on,wait=off", "-mon", "chardev=qmp0,mode=control"),
        *("-chardev", "socket,id=qmp1,fd=9,server=on,wait=off", "-mon", "chardev=qmp1,mode=control"),
        *("-add-fd", "fd=15,set=97469746,opaque=/run/k/vm-1/console.log"),
        "-chardev",
        "socket,id=serial0,fd=11,server=on,wait=off,logfile=/dev/fdset/97469746,logappend=on",
        *("-serial", "chardev:serial0"),
        *("-chardev", "socket,id=agent0,fd=13,server=on,wait=off"),
        *("-device", "virtio-serial-pci,id=virtio-serial0,max_ports=4,addr=0x12"),
        *("-device", "virtserialport,id=agent0,bus=virtio-serial0.0,chardev=agent0,name=org.qemu.guest_agent.0"),
        *("-device", "virtio-rng-pci,id=rng0,addr=0x13"),
        *("-device", "virtio-balloon-pci,id=balloon0,guest-stats-polling-interval=60,addr=0x14"),
        *("-device", "pvpanic"),
        *("-vga", "none", "-display", "none"),
    )


def test_accelerator_decides_the_cpu() -> None:
    """Law: the CPU is the host's with KVM and all that TCG can do with TCG, unless the key says another."""
    assert value_of(argv(TINY, replace(HOST, accel="tcg")), "-cpu") == "max"
    assert value_of(argv(TINY, replace(HOST, accel="tcg")), "-machine") == "q35,accel=tcg"
    assert value_of(argv(replace(TINY, cpu="qemu64,+aes")), "-cpu") == "qemu64,+aes"


def test_sizes() -> None:
    """Law: memory, vCPUs and machine type are those of the keys."""
    words = argv(replace(TINY, ram_mib=4096, cpus=8, machine="pc-q35-7.2"))
    assert value_of(words, "-m") == "size=4096M"
    assert value_of(words, "-smp") == "cpus=8"
    assert value_of(words, "-machine") == "pc-q35-7.2,accel=kvm"


def test_room_to_grow() -> None:
    """§2: as far as its keys say and its host has memory; its disks have the queues of its start."""
    spec = replace(TINY, ram_max_mib=255, cpus=2, cpus_max=8, rbd=RbdDisk("p", "i"))
    words = argv(spec)
    assert value_of(words, "-m") == "size=64M,maxmem=256M", "whole blocks of 2 MiB"
    assert value_of(words, "-smp") == "cpus=2,maxcpus=8"
    device = "virtio-mem-pci,id=memory0,memdev=ram1,block-size=2097152,requested-size=0,addr=0x19"
    assert device in values_of(words, "-device")
    assert '{"qom-type":"memory-backend-ram","id":"ram1","size":201326592}' in values_of(words, "-object")
    assert values_of(words, "-device")[-1].endswith(",addr=0x11,num-queues=2")
    assert value_of(argv(spec, replace(HOST, memory_mib=100)), "-m") == "size=64M,maxmem=100M"
    assert value_of(argv(spec, replace(HOST, memory_mib=60)), "-m") == "size=64M"
    grown = replace(spec, ram_mib=97, plugged_mib=33, cpus=4, plugged_cpus=2, hugepages=HugePages.M2)
    words = argv(grown)
    assert value_of(words, "-m") == "size=64M,maxmem=256M"
    assert any("requested-size=35651584" in word and "prealloc=on" in word for word in values_of(words, "-device"))
    assert value_of(words, "-smp") == "cpus=4,maxcpus=8"
    assert values_of(words, "-device")[-1].endswith(",num-queues=2")


def test_an_emulated_guest_has_no_whole_number_of_64_pages() -> None:
    """Law 13: otherwise a live move from QEMU before 9.0 loses writes of an emulated guest. Not with KVM."""
    for ram_mib in (16, 64, 4096):
        size = value_of(argv(replace(TINY, ram_mib=ram_mib), replace(HOST, accel="tcg")), "-m")
        assert size == f"size={ram_mib * 1024 + 128}K"
        assert int(size[5:-1]) % 256 != 0
        assert value_of(argv(replace(TINY, ram_mib=ram_mib)), "-m") == f"size={ram_mib}M"


def test_nics() -> None:
    """Law: each NIC is a virtio one on a tap that is open already, with vhost-net where the host has it."""
    spec = replace(TINY, mac="52:54:00:12:34:56", nics=(Nic(3, "52:54:00:12:34:57", "br1"),))
    taps = (TapFds(fd=20, vhost_fd=21), TapFds(fd=22))
    words = argv(spec, replace(HOST, bridge_if="br0"), taps=taps)
    assert values_of(words, "-netdev") == ["tap,id=net0,fd=20,vhost=on,vhostfd=21", "tap,id=net3,fd=22"]
    assert {
        "virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:12:34:56,addr=0x10",
        "virtio-net-pci,id=nic3,netdev=net3,mac=52:54:00:12:34:57,bus=more0,addr=0x3",
    } < set(values_of(words, "-device"))
    assert replace(READY, taps=taps).descriptors == (7, 9, 11, 13, 15, 20, 22, 21)


def test_nics_on_qemus_own_network() -> None:
    """Law: `:user` needs no tap, and the forwards lead to the first NIC; taps go to the NICs on bridges."""
    forward = (Forward("tcp", "127.0.0.1", 2222, 22), Forward("udp", "0.0.0.0", 5353, 53))
    spec = replace(TINY, mac="52:54:00:12:34:56", bridge=USER, forward=forward)
    spec = replace(spec, nics=(Nic(1, "52:54:00:12:34:57", "br1"), Nic(2, "52:54:00:12:34:58", USER)))
    assert values_of(argv(spec), "-netdev") == [
        "user,id=net0,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp:0.0.0.0:5353-:53",
        "tap,id=net1,fd=20",
        "user,id=net2",
    ]
    assert host_problems(spec, HOST) == ()


@pytest.mark.parametrize(
    ("options", "keys"),
    [((), ["bridge", "nic/2/bridge"]), (("netdev",), []), (("device",), ["bridge", "nic/2/bridge"])],
)
def test_qemus_own_network_is_a_power_of_extra_flags(options: tuple[str, ...], keys: list[str]) -> None:
    """Law: where a host does not let keys give a NIC by `extra_flags`, `:user` does not, either."""
    spec = replace(TINY, mac="52:54:00:12:34:56", bridge=USER, nics=(Nic(2, "52:54:00:12:34:58", USER),))
    problems = host_problems(spec, replace(HOST, flags=AllowedFlags(frozenset(options))))
    assert [problem.key for problem in problems] == keys
    assert all("KVM_EXTRA_FLAGS" in problem.wanted for problem in problems)


def test_a_bridge_alone_makes_no_nic() -> None:
    """Law: without a MAC there is no NIC."""
    assert argv(replace(TINY, bridge="br0"), replace(HOST, bridge_if="br1")) == argv(TINY)


def test_nics_without_any_bridge() -> None:
    """Law: each NIC that has no bridge is a problem of this host, with its key and what would be right."""
    spec = replace(TINY, mac="52:54:00:12:34:56", nics=(Nic(1, "52:54:00:12:34:57"), Nic(2, "52:54:00:12:34:58", "b")))
    problems = host_problems(spec, HOST)
    assert [problem.key for problem in problems] == ["bridge", "nic/1/bridge"]
    assert all("BRIDGE_IF" in problem.wanted for problem in problems)
    assert host_problems(spec, replace(HOST, bridge_if="br0")) == ()


def json_of(words: Sequence[str], option: str) -> list[dict[str, Any]]:
    return [json.loads(value) for value in values_of(words, option) if value.startswith("{")]


def test_disks() -> None:
    """Law: RBD images are raw virtio disks, cached write-back, the first one booted; options reach their nodes.

    An I/O error stops the guest: it means that this QEMU was fenced.
    """
    spec = replace(
        TINY,
        rbd=RbdDisk("rbd", "vm1"),
        disks=(Disk(2, RbdDisk("p", "i", ro=True)), Disk(15, RbdDisk("p", "j", discard=True, iops=500))),
    )
    words = argv(spec, replace(HOST, ceph=Ceph(conf="/c", user="u")))
    cache = {"direct": False, "no-flush": False}
    ceph = {"conf": "/c", "user": "u"}
    first, second, third = json_of(words, "-blockdev")
    rbd = {"driver": "rbd", "pool": "rbd", "image": "vm1", "read-only": False, "cache": cache, **ceph}
    assert first == {"node-name": "disk0", **rbd}
    assert second == {"node-name": "disk2", **rbd, "pool": "p", "image": "i", "read-only": True}
    throttled = {**rbd, "pool": "p", "image": "j", "discard": "unmap"}
    assert third == {
        "node-name": "disk15",
        "driver": "throttle",
        "throttle-group": "disk15-limit",
        "read-only": False,
        "discard": "unmap",
        "file": throttled,
    }
    assert json_of(words, "-object") == [
        {"qom-type": "throttle-group", "id": "disk15-limit", "limits": {"iops-total": 500}}
    ]
    assert {
        "virtio-blk-pci,id=disk0-dev,drive=disk0,write-cache=on,werror=stop,rerror=stop,bootindex=10,addr=0x11",
        "pci-bridge,id=more0,chassis_nr=1,addr=0x16",
        "virtio-blk-pci,id=disk2-dev,drive=disk2,write-cache=on,werror=stop,rerror=stop,bus=more0,addr=0xa",
        "virtio-blk-pci,id=disk15-dev,drive=disk15,write-cache=on,werror=stop,rerror=stop,bus=more0,addr=0x17",
    } < set(values_of(words, "-device"))


def test_disks_of_a_client_with_a_key() -> None:
    """Law: the key comes from a file, and is not on the command line; what has no disk needs none."""
    spec = replace(TINY, rbd=RbdDisk("rbd", "vm1"), firmware=Firmware.UEFI)
    ceph = Ceph(user="vm", conf="/etc/ceph/ceph.conf")
    nvram = Nvram(rbd=RbdDisk("rbd", "vm1.nvram"))
    words = argv(spec, replace(HOST, ceph=ceph, ovmf=OVMF), ceph_key=21, nvram=nvram)
    (secret,) = json_of(words, "-object")
    assert secret == {"qom-type": "secret", "id": "ceph0", "file": "/proc/self/fd/21", "format": "base64"}
    _, variables, disk = json_of(words, "-blockdev")
    for node in (variables["file"], disk):
        assert (node["user"], node["conf"]) == ("vm", "/etc/ceph/ceph.conf")
        assert (node["key-secret"], node["auth-client-required"]) == ("ceph0", ["cephx"])
    assert "-object" not in argv(spec, replace(HOST, ceph=ceph, ovmf=OVMF), nvram=nvram)
    assert "-object" not in argv(TINY, replace(HOST, ceph=ceph), ceph_key=21)


def test_each_guest_has_a_client_of_its_own() -> None:
    """Law: `%i` is the instance's id, for every image of the machine; a namespace is told to QEMU as one."""
    spec = replace(TINY, rbd=RbdDisk("rbd", "disk", namespace="web"), firmware=Firmware.UEFI)
    ceph = Ceph(user="kvm-%i", conf="/etc/ceph/ceph.conf")
    words = argv(spec, replace(HOST, ceph=ceph, ovmf=OVMF), nvram=Nvram(rbd=nvram_of(spec)))
    _, variables, disk = json_of(words, "-blockdev")
    for node in (variables["file"], disk):
        assert (node["user"], node["pool"], node["namespace"]) == (f"kvm-{IDENTITY.instance}", "rbd", "web")
    assert variables["file"]["image"] == "disk.nvram"


def test_media_and_ignition() -> None:
    """Law: media are read-only virtio disks in slots of their own; Ignition goes by fw_cfg."""
    words = argv(TINY, media=(Handed(21, "/r/a,b.iso"), Handed(22, "/r/c.iso")), ignition=23)
    nodes = json_of(words, "-blockdev")
    file = {"driver": "file", "filename": "/dev/fdset/97471000", "read-only": True}
    assert nodes[0] == {"node-name": "medium0", "driver": "raw", "read-only": True, "file": file}
    assert {"virtio-blk-pci,id=medium0-dev,drive=medium0,addr=0x17"} < set(values_of(words, "-device"))
    assert value_of(words, "-fw_cfg") == "name=opt/com.coreos/config,file=/proc/self/fd/23"
    assert "fd=21,set=97471000,opaque=/r/a,,b.iso" in values_of(words, "-add-fd")


OVMF = Ovmf(code="/o/code.fd", variables="/o/vars.fd")


def test_uefi() -> None:
    """Law: UEFI is flash memory: code that is read only, and variables that are the machine's own."""
    spec = replace(TINY, firmware=Firmware.UEFI)
    words = argv(spec, replace(HOST, ovmf=OVMF), nvram=Nvram(file=Handed(21, "/s/nvram.fd")))
    assert value_of(words, "-machine") == "q35,accel=kvm,pflash0=firmware,pflash1=nvram"
    code, variables = json_of(words, "-blockdev")
    assert (code["read-only"], code["file"]["filename"]) == (True, "/o/code.fd")
    assert (variables["read-only"], variables["file"]["filename"]) == (False, "/dev/fdset/97472000")
    on_rbd = argv(spec, replace(HOST, ovmf=OVMF), nvram=Nvram(rbd=RbdDisk("p", "i.nvram")))
    assert json_of(on_rbd, "-blockdev")[1]["file"]["image"] == "i.nvram"


def test_uefi_without_firmware() -> None:
    """Law: a host without UEFI firmware says so, and what would bring it."""
    (problem,) = host_problems(replace(TINY, firmware=Firmware.UEFI), HOST)
    assert (problem.key, "OVMF" in problem.wanted) == ("firmware", True)


def test_huge_pages() -> None:
    """Law: memory of huge pages is a backend of its own, all of it taken at the start."""
    words = argv(replace(TINY, hugepages=HugePages.G1))
    (memory,) = json_of(words, "-object")
    assert (memory["size"], memory["hugetlbsize"], memory["prealloc"]) == (64 << 20, 1 << 30, True)
    assert value_of(words, "-machine") == "q35,accel=kvm,memory-backend=ram0"


def test_the_versioned_machine() -> None:
    """Law: a guest keeps the machine type that it was first started with."""
    assert value_of(argv(TINY, machine="pc-q35-7.2"), "-machine") == "pc-q35-7.2,accel=kvm"


def test_without_a_sandbox() -> None:
    """Law: QEMU is confined unless the host says otherwise."""
    assert value_of(argv(TINY), "-sandbox") == SANDBOX
    assert "-sandbox" not in argv(TINY, replace(HOST, sandbox=False))


def test_spice() -> None:
    """Law: a SPICE port makes the original's display, on the host's address, with a tablet as pointer."""
    words = argv(replace(TINY, spice_port=5901), replace(HOST, spice_addr="::1"))
    assert value_of(words, "-vga") == "qxl"
    assert value_of(words, "-spice") == "port=5901,addr=::1,disable-ticketing=on"
    assert value_of(words, "-k") == "en-us"
    assert {"qemu-xhci,id=usb0,addr=0x15", "usb-tablet,bus=usb0.0"} < set(values_of(words, "-device"))
    assert "-display" not in words
    assert value_of(words, "-vnc") == "none"
    own = argv(replace(TINY, spice_port=1, spice_addr="::"), spice_password=21)
    assert value_of(own, "-spice") == "port=1,addr=::,password-secret=spice0"
    assert json_of(own, "-object") == [{"qom-type": "secret", "id": "spice0", "file": "/proc/self/fd/21"}]


@pytest.mark.parametrize("display", [Display.STD, Display.VIRTIO, Display.QXL])
def test_a_display_of_its_own(display: Display) -> None:
    """Law: a VNC server that listens nowhere, keys that the guest makes characters of, a tablet; and no SPICE."""
    words = argv(replace(TINY, display=display))
    assert value_of(words, "-vga") == display.value
    assert value_of(words, "-vnc") == "none"
    assert {"qemu-xhci,id=usb0,addr=0x15", "usb-tablet,bus=usb0.0"} < set(values_of(words, "-device"))
    assert not {"-k", "-spice", "-display"} & set(words)
    beside = argv(replace(TINY, display=display, spice_port=5901))
    assert value_of(beside, "-spice").startswith("port=5901,")
    assert "-k" not in beside


def test_who_can_be_looked_at_is_told_by_the_command_line() -> None:
    """Law: a QEMU without a VNC server is known by its record: it would answer that it has taken a viewer."""
    assert not takes_viewers(argv(TINY))
    assert argv(replace(TINY, display=Display.NONE)) == argv(TINY)
    assert takes_viewers(argv(replace(TINY, display=Display.STD)))
    # That of a person is QEMU's first, which is the one that viewers are handed to.
    own = argv(replace(TINY, display=Display.STD, extra_flags=("-vnc", ":7,password=on")))
    assert values_of(own, "-vnc") == [":7,password=on"]
    assert takes_viewers(own)
    assert not takes_viewers(("qemu", "-vga", "qxl", "-spice", "port=1"))


def test_extra_flags_come_last() -> None:
    """Law: extra_flags follow all others, so that they can overrule them, unchanged."""
    assert argv(replace(TINY, extra_flags=("-m", "128,slots=2"))) == (*argv(TINY), "-m", "128,slots=2")


def test_slots_do_not_depend_on_what_else_there_is() -> None:
    """Law: a NIC keeps its PCI slot whatever else the machine has, and no two devices share one."""
    host = replace(HOST, bridge_if="br0")
    nic = replace(TINY, mac="52:54:00:12:34:56")
    more = replace(nic, nics=(Nic(1, "52:54:00:12:34:57", "b"),), disks=(Disk(1, RbdDisk("p", "j")),))
    full = argv(
        replace(more, rbd=RbdDisk(pool="p", image="i"), spice_port=5901),
        host,
        media=(Handed(21, "/a"), Handed(22, "/b")),
    )
    assert set(values_of(argv(nic, host), "-device")) < set(values_of(full, "-device"))
    places = [
        tuple(part for part in parts(value) if part.startswith(("addr=", "bus=more")))
        for value in values_of(full, "-device")
        if "addr=" in value
    ]
    assert len(places) == len(set(places)) == 11


def test_run_dir_with_a_comma() -> None:
    """Law: commas of the run directory are doubled."""
    words = argv(TINY, run_dir="/run/a,b")
    assert "opaque=/run/a,b/console.log" in parts(value_of(words, "-add-fd"))


def test_where_logs_go_is_told_by_the_command_line() -> None:
    """A successor cuts the files of a QEMU that opened them itself, and takes the memory of one that did not."""
    assert logs_into_memory(argv(TINY))
    assert not logs_into_memory(("qemu", "-chardev", "socket,id=serial0,logfile=/run/x/console.log", "-add-fd"))
    assert not logs_into_memory(("qemu", "-add-fd", "fd=3,set=1"))


def test_uuid_is_stable() -> None:
    """Law: the uuid depends on prefix and id alone, and is the same for ever."""
    assert instance_uuid("/kvm", VM) == UUID("cd71027d-a5d8-52ec-986e-ca228683dbc2")
    assert instance_uuid("/kvm", VM) != instance_uuid("/kvm2", VM)
    assert instance_uuid("/kvm", VM) != instance_uuid("/kvm", InstanceId("vm-2"))


_texts = st.text(st.sampled_from(",=:@\\/.-ab%\"'{}[] é"), max_size=12)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("bridge", "rbd", "disk/1", "nic/1/bridge", "machine", "spice_addr", "spice_password", "cpu"), _texts
        ),
    )
)
def test_no_value_becomes_an_option(texts: dict[str, str]) -> None:
    """Law: whatever text the parser lets through, the command line has the same options, each with the same parts."""
    sound = {"ram": "64", "mac": "52:54:00:00:00:01", "bridge": "B", "rbd": "P/I", "disk/1": "P/J", "spice_port": "1"}
    sound |= {"nic/1/mac": "52:54:00:00:00:02", "nic/1/bridge": "C", "machine": "M", "spice_addr": "::1"}
    sound |= {"spice_password": "secret", "cpu": "C"}
    usual = _spec_of(sound)
    assert usual is not None
    spec = _spec_of(sound | texts)
    if spec is None:
        return
    found, expected = argv(spec, spice_password=21), argv(usual, spice_password=21)
    for word, usual_word in zip(found, expected, strict=True):
        if usual_word.startswith("{"):
            assert json.loads(word).keys() == json.loads(usual_word).keys() | (
                {"discard", "namespace"} & json.loads(word).keys()
            )
        elif usual_word != "C":
            names, usual_names = ([part.partition("=")[0] for part in parts(w)] for w in (word, usual_word))
            assert len(names) == len(usual_names)
            assert names[1:] == usual_names[1:]


def test_no_secret_is_an_argument() -> None:
    """Law: the SPICE password is in a file that only QEMU reads, never among its arguments."""
    spec = _spec_of({"ram": "64", "spice_port": "1", "spice_password": "hush-hush"})
    assert spec is not None
    assert not any("hush-hush" in word for word in argv(spec, spice_password=21))
    assert "hush-hush" not in repr(spec)
    assert "hush-hush" not in json.dumps(spec_to_object(spec))


def _spec_of(texts: dict[str, str]) -> Spec | None:
    return parse_wish(VM, {name.encode(): RawValue(text.encode(), 1) for name, text in texts.items()}).spec
