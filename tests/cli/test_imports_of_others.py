"""`import`: what libvirt and Proxmox VE say of a machine, as keys; what has none is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.cli.imports import libvirt, proxmox
from kvmsupervisor.cli.imports.found import Machine, NotThat
from kvmsupervisor.cli.wish_files.reading import read_files
from tests.cli.conftest import World

DOMAIN = """<?xml version='1.0' encoding='utf-8'?>
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>db 1</name>
  <uuid>00000000-0000-0000-0000-000000000001</uuid>
  <title>The shop's database</title>
  <memory unit='KiB'>4194304</memory>
  <currentMemory unit='KiB'>2097152</currentMemory>
  <vcpu placement='static'>4</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os>
  <features><acpi/><apic/></features>
  <cpu mode='custom'><model>Skylake-Server</model><feature policy='require' name='aes'/></cpu>
  <clock offset='localtime'/>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>restart</on_crash>
  <memoryBacking><hugepages><page size='1' unit='GiB'/></hugepages></memoryBacking>
  <cputune><shares>512</shares><vcpupin vcpu='0' cpuset='1'/></cputune>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file="/var/lib/my images/db'1.img"/>
      <target dev='vda' bus='virtio'/>
      <iotune><total_iops_sec>500</total_iops_sec></iotune>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='rbd' name='rbd/db1-data'><host name='10.0.0.1' port='6789'/></source>
      <target dev='sdb' bus='scsi'/><readonly/>
    </disk>
    <disk type='block' device='disk'><source dev='/dev/vg/data'/><target dev='vdc' bus='virtio'/></disk>
    <disk type='network' device='disk'><source protocol='nbd'/><target dev='vdd' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/Debian 13.img'/><target dev='sda' bus='sata'/></disk>
    <disk type='file' device='cdrom'><target dev='sdc' bus='sata'/></disk>
    <interface type='bridge'><mac address='52:54:00:AA:00:01'/><source bridge='br0'/><model type='virtio'/></interface>
    <interface type='network'><source network='default'/><model type='e1000'/></interface>
    <graphics type='spice' port='5901' autoport='no' listen='127.0.0.1' passwd='hidden'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <video><model type='qxl'/></video>
    <hostdev mode='subsystem' type='pci'/>
    <tpm model='tpm-crb'/>
    <memballoon model='virtio'/>
  </devices>
  <qemu:commandline><qemu:arg value='-secret=hidden'/></qemu:commandline>
</domain>
"""

CONFIG = """#The shop%27s web server
agent: 1
boot: order=scsi1;ide2
cores: 2
sockets: 2
cpu: host,flags=+aes
ide2: local:iso/debian-13.iso,media=cdrom,size=600M
ide3: lvm:vm-101-cloudinit,media=cdrom
memory: 4096
name: web1
net1: e1000=BC:24:11:00:00:02,bridge=vmbr1,tag=20,firewall=1
net0: virtio=BC:24:11:00:00:01,bridge=vmbr0
ostype: win11
scsi0: local:101/vm-101-disk-0.qcow2,size=32G,discard=on,iops=300
scsi1: ceph-vm:vm-101-disk-1,size=100G
virtio0: local-lvm:vm-101-disk-2,size=8G,ro=1
machine: q35
bios: ovmf
sshkeys: ssh-ed25519%20AAAAhidden
cipassword: hidden
hostpci0: 0000:01:00,pcie=1
smbios1: uuid=00000000-0000-0000-0000-000000000002
something: new
tags: shop;web

[before]
memory: 1024
"""


def read(text: str) -> Machine:
    if text.startswith("<"):
        (machine,) = libvirt.read(text)
        return machine
    return proxmox.read(text, ceph={"ceph-vm": "rbd"}, vmid="101")


def left(machine: Machine) -> str:
    return "\n".join(machine.left)


def test_a_domain() -> None:
    """Law: what has a key gets it; disks keep their order, and two programs' habits are told apart (a power-off)."""
    machine = read(DOMAIN)
    assert machine.id == "db-1"
    assert machine.keys == {
        "ram": "4096", "cpus": "4", "cpu": "Skylake-Server", "machine": "pc-q35-7.2", "firmware": "uefi",
        "restart": "on-failure", "hugepages": "1G", "cpu_shares": "512", "description": "The shop's database",
        "disk/0": "file:db-1.qcow2 discard iops=500", "disk/1": "rbd/db1-data ro", "disk/2": "file:db-1-2.raw",
        "cdrom": "file:Debian-13.iso", "mac": "52:54:00:aa:00:01", "bridge": "br0", "nic/1/mac": "auto",
        "nic/1/bridge": "virbr0", "spice_port": "5901",
    }  # fmt: skip


@pytest.mark.parametrize(
    "part",
    [
        "name 'db 1'", "cpu feature aes", "nvram: ", "vcpupin: ", "disk sdb: it is a virtio disk", "commandline: ",
        "disk vdd: its source", "disk sdc: a machine has one CD-ROM", "in network default: ", "e1000: ", "video qxl: ",
        "graphics spice passwd: ", "hostdev: ", "tpm: ", "uuid: ", "features: ", "clock: ",
    ],
)  # fmt: skip
def test_what_a_domain_has_and_keys_have_not(part: str) -> None:
    """Law: each part that is not brought over is named; secrets are not."""
    assert part in left(read(DOMAIN))
    assert "hidden" not in left(read(DOMAIN))


def test_a_configuration() -> None:
    """Law: the disk that is booted comes first; a storage of Ceph's keeps its images; snapshots do not count."""
    machine = read(CONFIG)
    assert machine.id == "web1"
    assert machine.keys == {
        "ram": "4096", "cpus": "4", "firmware": "uefi", "restart": "on-failure", "description": "The shop's web server",
        "x-tags": "shop;web", "disk/0": "rbd/vm-101-disk-1 size=100G", "disk/1": "file:web1-1.raw ro",
        "disk/2": "file:web1-2.qcow2 size=32G discard iops=300", "cdrom": "file:debian-13.iso",
        "mac": "bc:24:11:00:00:01", "bridge": "vmbr0", "nic/1/mac": "bc:24:11:00:00:02", "nic/1/bridge": "vmbr1",
    }  # fmt: skip


@pytest.mark.parametrize(
    "part",
    [
        "snapshot before: ", "cpu flags=+aes", "ostype win11: ", "scsi0: it is a virtio disk",
        "ide3: a medium of cloud-init", "net1 e1000: ", "net1 tag=20: ",
        "net1 firewall=1: ", "sshkeys: write user-data", "cipassword: ", "hostpci0 ",
        "smbios1 ", "something new: there is no such key",
    ],
)  # fmt: skip
def test_what_a_configuration_has_and_keys_have_not(part: str) -> None:
    """Law: each part that is not brought over is named; keys and passwords are not."""
    assert part in left(read(CONFIG))
    assert "hidden" not in left(read(CONFIG))


def test_the_smallest() -> None:
    """Law: defaults of the other system are said, where ours are others."""
    assert read("memory: 512\n").keys == {
        "ram": "512", "cpu": "kvm64", "machine": "pc", "restart": "on-failure",
    }  # fmt: skip
    assert read("memory: 512\n").id == "vm101"
    small = read("<domain><name>a</name><memory unit='GiB'>1</memory></domain>")
    assert small.keys == {"ram": "1024", "restart": "never"}


def test_the_disk_that_is_booted_comes_first() -> None:
    """Law: by its order, not by its place."""
    disks = "".join(
        f"<disk type='file'><source file='/{name}'/><target dev='{name}'/>{boot}</disk>"
        for name, boot in (("vda", ""), ("vdb", "<boot order='2'/>"), ("vdc", "<boot order='1'/>"))
    )
    machine = read(f"<domain><name>a</name><memory>1</memory><devices>{disks}</devices></domain>")
    assert [one.partition(":")[0] for one in machine.left if "qemu-img" in one] == ["disk vdc", "disk vdb", "disk vda"]


def test_paths_are_words_of_a_shell() -> None:
    """Law: a command that people paste does what it says, whatever a file's name is."""
    assert """qemu-img convert -O qcow2 '/var/lib/my images/db'"'"'1.img' db-1.qcow2""" in left(read(DOMAIN))
    hostile = read("memory: 1\nscsi0: local:1/x;reboot.raw\nname: $(reboot)\n")
    assert "$(pvesm path 'local:1/x;reboot.raw') reboot.raw" in left(hostile)
    assert hostile.keys["disk/0"] == "file:reboot.raw"


def test_more_than_a_machine_has() -> None:
    """Law: what is one too many is named."""
    text = "memory: 1\n" + "".join(f"scsi{n}: s:d{n}\nnet{n}: virtio,bridge=b\n" for n in range(20))
    machine = read(text)
    assert sum(key.startswith("disk/") for key in machine.keys) == 16
    assert "scsi19: a machine has at most 16 disks" in left(machine)
    assert "net19: a machine has at most 8 NICs" in left(machine)


@pytest.mark.parametrize(
    "text",
    [
        "<domain>", "<pool><name>x</name></pool>", "<capabilities><domain type='kvm'/></capabilities>", "words", "",
        "<!DOCTYPE a [<!ENTITY b 'c'>]><domain><name>&b;</name></domain>",
    ],
)  # fmt: skip
def test_what_is_no_machine(text: str) -> None:
    """Law: it is refused with what was found; no document type declares entities."""
    with pytest.raises(NotThat):
        libvirt.read(text) if text.startswith("<") else proxmox.read(text, ceph={}, vmid="1")


def test_several_that_follow_each_other() -> None:
    """Law: what `virsh dumpxml` printed of several, one after the other, is all of them."""
    assert [one.id for one in libvirt.read(DOMAIN + DOMAIN.replace("db 1", "db2"))] == ["db-1", "db2"]


LINES = st.lists(
    st.tuples(
        st.sampled_from(["memory", "scsi0", "virtio1", "net0", "cpu", "machine", "boot", "vcpus", "name", "ide2", "x"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    ),
    min_size=1,
)


@given(LINES)
def test_any_configuration(lines: list[tuple[str, str]]) -> None:
    """Law: whatever the values are, there is a machine with an id, or a refusal."""
    try:
        machine = read("memory: 1\n" + "".join(f"{name}: {value}\n" for name, value in lines))
    except NotThat:
        return
    assert machine.id


def test_the_command_s_file_is_applied(world: World, tmp_path: Path) -> None:
    """Law: what it prints is a file for `apply`, the rest comments; what is wrong with a value is said in it."""
    world.host("alpha")
    (tmp_path / "101.conf").write_text(CONFIG)
    (tmp_path / "db.xml").write_text(DOMAIN)
    told = world.run(
        "import", str(tmp_path / "101.conf"), str(tmp_path / "db.xml"), "--host", "alpha", "--ceph", "ceph-vm=rbd"
    )
    assert told.exit_code == 0, told.output
    assert "has to be mended" not in told.stdout
    (tmp_path / "both.yaml").write_text(told.stdout)
    assert set(read_files([str(tmp_path / "both.yaml")]).instances) == {"web1", "db-1"}
    done = world.run("apply", "-f", str(tmp_path / "both.yaml"), "--yes")
    assert done.exit_code == 0, done.output
    assert world.value("web1", "disk/0") == "rbd/vm-101-disk-1 size=100G"
    bad = world.run("import", "-", input_text="memory: lots\nname: web2\n")
    assert "# has to be mended:\n#   ram: found 'lots'" in bad.stdout
    assert yaml.safe_load(bad.stdout)["web2"]["ram"] == "lots"


def test_what_it_cannot_read(world: World, tmp_path: Path) -> None:
    """Law: file and reason; exit code 1."""
    (tmp_path / "image.qcow2").write_bytes(b"QFI\xfb" + bytes(99))
    for name, said in (("image.qcow2", "no text"), ("none.conf", "cannot be read")):
        told = world.run("import", str(tmp_path / name))
        assert told.exit_code == 1
        assert said in told.stderr
    assert world.run("import", str(tmp_path), "--ceph", "=x").exit_code == 2
