"""The command line of QEMU: what stands in it, and that no value becomes an option of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.argv import HostSide, Identity, Unbuildable, build_argv, instance_uuid
from kvmsupervisor.domain.disk import CephSide
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import RawValue, RbdImage, Spec, parse_wish

VM = InstanceId("vm-1")
IDENTITY = Identity(instance=VM, uuid=UUID("8b1cf5f6-4d2e-4b8a-9d5e-1f6a2a3c4d5e"))
HOST = HostSide(qemu="/usr/bin/qemu-system-x86_64", accel="kvm", run_dir="/run/k/vm-1", qmp_fds=(7, 9))
TINY = Spec(ram_mib=64)


def argv(spec: Spec, host: HostSide = HOST) -> tuple[str, ...]:
    return build_argv(spec, identity=IDENTITY, host=host)


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
        *("-name", "guest=vm-1,debug-threads=on"),
        *("-uuid", "8b1cf5f6-4d2e-4b8a-9d5e-1f6a2a3c4d5e"),
        *("-machine", "q35,accel=kvm"),
        *("-cpu", "host"),
        *("-m", "size=64M"),
        *("-smp", "cpus=1"),
        *("-chardev", "socket,id=qmp0,fd=7,server=on,wait=off", "-mon", "chardev=qmp0,mode=control"),
        *("-chardev", "socket,id=qmp1,fd=9,server=on,wait=off", "-mon", "chardev=qmp1,mode=control"),
        "-chardev",
        "socket,id=serial0,path=/run/k/vm-1/console.sock,server=on,wait=off,"
        "logfile=/run/k/vm-1/console.log,logappend=on",
        *("-serial", "chardev:serial0"),
        *("-device", "virtio-serial-pci,id=virtio-serial0,addr=0x12"),
        *("-chardev", "socket,id=agent0,path=/run/k/vm-1/agent.sock,server=on,wait=off"),
        *("-device", "virtserialport,bus=virtio-serial0.0,chardev=agent0,name=org.qemu.guest_agent.0"),
        *("-device", "virtio-rng-pci,id=rng0,addr=0x13"),
        *("-device", "virtio-balloon-pci,id=balloon0,addr=0x14"),
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


def test_nic() -> None:
    """Law: a MAC makes a virtio NIC on its bridge, or else on the host's."""
    spec = replace(TINY, mac="52:54:00:12:34:56")
    on_host = argv(spec, replace(HOST, bridge_if="br0"))
    assert value_of(on_host, "-netdev") == "bridge,id=net0,br=br0"
    assert "virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:12:34:56,addr=0x10" in on_host
    own = argv(replace(spec, bridge="br,1"), replace(HOST, bridge_if="br0"))
    assert value_of(own, "-netdev") == "bridge,id=net0,br=br,,1"


def test_a_bridge_alone_makes_no_nic() -> None:
    """Law: without a MAC there is no NIC."""
    assert argv(replace(TINY, bridge="br0"), replace(HOST, bridge_if="br1")) == argv(TINY)


def test_nic_without_any_bridge() -> None:
    """Law: a NIC that has no bridge is refused, with the key and what would be right."""
    with pytest.raises(Unbuildable, match=r"^bridge: found nothing; .*BRIDGE_IF") as refused:
        argv(replace(TINY, mac="52:54:00:12:34:56"))
    assert refused.value.problem.key == "bridge"


def test_disk() -> None:
    """Law: the RBD image is a virtio disk, cached write-back, flushes honoured; an I/O error stops the guest."""
    words = argv(replace(TINY, rbd=RbdImage(pool="rbd", image="vm1")))
    assert json.loads(value_of(words, "-blockdev")) == {
        "driver": "rbd",
        "node-name": "disk0",
        "pool": "rbd",
        "image": "vm1",
        "cache": {"direct": False, "no-flush": False},
        "discard": "unmap",
    }
    assert "virtio-blk-pci,drive=disk0,write-cache=on,werror=stop,rerror=stop,addr=0x11" in words
    assert "-object" not in words


def test_disk_of_a_client_with_a_key() -> None:
    """Law: the key comes from a file, before the disk that needs it, and is not on the command line."""
    ceph = CephSide(user="vm", conf="/etc/ceph/ceph.conf", key_file="/run/a,b/ceph.key")
    words = argv(replace(TINY, rbd=RbdImage(pool="rbd", image="vm1")), replace(HOST, ceph=ceph))
    assert value_of(words, "-object") == "secret,id=ceph0,file=/run/a,,b/ceph.key,format=base64"
    assert words.index("-object") < words.index("-blockdev")
    disk = json.loads(value_of(words, "-blockdev"))
    assert (disk["user"], disk["conf"]) == ("vm", "/etc/ceph/ceph.conf")
    assert (disk["key-secret"], disk["auth-client-required"]) == ("ceph0", ["cephx"])
    assert argv(TINY, replace(HOST, ceph=ceph)) == argv(TINY)


def test_disk_names_cannot_become_options() -> None:
    """Law: what is special to QEMU's options or to JSON stays part of the name."""
    words = argv(replace(TINY, rbd=RbdImage(pool='a:b","x":"', image="c,d@e\\f:conf=/x")))
    disk = json.loads(value_of(words, "-blockdev"))
    assert (disk["pool"], disk["image"]) == ('a:b","x":"', "c,d@e\\f:conf=/x")
    assert set(disk) == {"driver", "node-name", "pool", "image", "cache", "discard"}


def test_spice() -> None:
    """Law: a SPICE port makes the original's display, on the host's address, with a tablet as pointer."""
    words = argv(replace(TINY, spice_port=5901), replace(HOST, spice_addr="::1"))
    assert value_of(words, "-vga") == "qxl"
    assert value_of(words, "-spice") == "port=5901,addr=::1,disable-ticketing=on"
    assert value_of(words, "-k") == "en-us"
    assert {"qemu-xhci,id=usb0,addr=0x15", "usb-tablet,bus=usb0.0"} < set(values_of(words, "-device"))
    assert "-display" not in words


def test_extra_flags_come_last() -> None:
    """Law: extra_flags follow all others, so that they can overrule them, unchanged."""
    assert argv(replace(TINY, extra_flags=("-m", "128,slots=2"))) == (*argv(TINY), "-m", "128,slots=2")


def test_slots_do_not_depend_on_what_else_there_is() -> None:
    """Law: a NIC keeps its PCI slot whatever else the machine has, and no two devices share one."""
    host = replace(HOST, bridge_if="br0")
    nic = replace(TINY, mac="52:54:00:12:34:56")
    full = argv(replace(nic, rbd=RbdImage(pool="p", image="i"), spice_port=5901), host)
    assert set(values_of(argv(nic, host), "-device")) < set(values_of(full, "-device"))
    slots = [part for value in values_of(full, "-device") for part in parts(value) if part.startswith("addr=")]
    assert len(slots) == len(set(slots)) == 6


def test_run_dir_with_a_comma() -> None:
    """Law: commas of the run directory are doubled."""
    words = argv(TINY, replace(HOST, run_dir="/run/a,b"))
    assert "logfile=/run/a,b/console.log" in parts(values_of(words, "-chardev")[2])


def test_uuid_is_stable() -> None:
    """Law: the uuid depends on prefix and id alone, and is the same for ever."""
    assert instance_uuid("/kvm", VM) == UUID("cd71027d-a5d8-52ec-986e-ca228683dbc2")
    assert instance_uuid("/kvm", VM) != instance_uuid("/kvm2", VM)
    assert instance_uuid("/kvm", VM) != instance_uuid("/kvm", InstanceId("vm-2"))


_SOUND = Spec(
    ram_mib=64,
    mac="52:54:00:00:00:01",
    bridge="B",
    rbd=RbdImage(pool="P", image="I"),
    spice_port=1,
    cpu="C",
    machine="M",
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.text(st.sampled_from(",=:@\\/.-ab%\"' é"), max_size=12) for name in ("bridge", "rbd", "machine")
        },
    )
)
def test_no_value_becomes_an_option(texts: dict[str, str]) -> None:
    """Law: whatever text the parser lets through, the command line has the same words and the same parts."""
    keys = {name.encode(): RawValue(text.encode(), 1) for name, text in texts.items()}
    spec = parse_wish(VM, {**keys, b"ram": RawValue(b"64", 1)}).spec
    if spec is None:
        return
    found = argv(
        replace(
            _SOUND,
            bridge=spec.bridge or _SOUND.bridge,
            rbd=spec.rbd or _SOUND.rbd,
            machine=spec.machine,
        )
    )
    for word, expected in zip(found, argv(_SOUND), strict=True):
        if expected.startswith("{"):
            assert json.loads(word).keys() == json.loads(expected).keys()
            continue
        names, expected_names = ([part.partition("=")[0] for part in parts(w)] for w in (word, expected))
        assert len(names) == len(expected_names)
        assert names[1:] == expected_names[1:]
