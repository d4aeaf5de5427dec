"""A machine of which every key says something."""

from __future__ import annotations

from kvmsupervisor.domain.spec import Disk, Display, Firmware, HugePages, Nic, RbdDisk, Secret, Spec

FULL = Spec(
    ram_mib=2048,
    mac="52:54:00:12:34:56",
    bridge="br0",
    nics=(Nic(2, "52:54:00:12:34:57", "br1"), Nic(7, "52:54:00:12:34:58")),
    rbd=RbdDisk(pool="rbd", image="vm1", discard=True),
    disks=(Disk(1, RbdDisk("rbd", "vm2", ro=True)), Disk(15, RbdDisk("p", "i", discard=True, iops=500))),
    display=Display.VIRTIO,
    spice_port=5901,
    spice_addr="::1",
    spice_password=Secret.of("hush hush"),
    extra_flags=("-device", "virtio-rng-pci"),
    cloud_config="https://h/user-data",
    cpus=4,
    cpu="qemu64,+aes",
    machine="pc-q35-7.2",
    firmware=Firmware.UEFI,
    hugepages=HugePages.M2,
    cpu_shares=2048,
    memory_limit_mib=4096,
)
