"""The devices of a machine as words of QEMU's command line.

Values from keys are written as JSON where QEMU accepts it (`-blockdev`, `-object`), and escaped elsewhere, so no value
can become an option.

Sources: qemu-system-x86_64(1); `BlockdevOptionsRbd`, `BlockdevOptionsThrottle` and `MemoryBackendMemfdProperties` of
QEMU's QMP reference (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html), `BlockdevOptionsFile` and `-add-fd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from kvmsupervisor.domain import cdrom as medium
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk
from kvmsupervisor.domain.spec import Disk, Display, Nic, RbdDisk, Spec
from kvmsupervisor.domain.storage import node_of
from kvmsupervisor.domain.user_network import Forward
from kvmsupervisor.domain.words import escaped, json_option

# PCI slots are fixed, so that a later display or disk does not rename the guest's NIC. They begin above those that QEMU
# itself assigns, from the lowest, to `-vga` and to the devices of extra_flags.
_NIC_SLOT = 0x10
_DISK_SLOT = 0x11
_SERIAL_SLOT = 0x12
_RNG_SLOT = 0x13
_BALLOON_SLOT = 0x14
_USB_SLOT = 0x15
_BRIDGE_SLOT = 0x16
_MEDIA_SLOTS = (0x17, 0x18)
_MEMORY_SLOT = 0x19

_FIRST_DISK_BOOTS = 10
_CDROM_BOOTS_FIRST, _CDROM_BOOTS = 9, 11
"""Its place in the boot order. A `-kernel` gets 0 from QEMU, and devices of `extra_flags` may come before it, too."""

_BALLOON_STATISTICS = "guest-stats-polling-interval=60"
"""Seconds between two questions to the guest's driver about its memory: as often as QEMU itself is asked."""

# Behind the PCI bridge, where ACPI lets devices come and go: NIC n in slot n, disk n in slot 8 + n.
MORE = "more0"
_MORE_DISKS = 8


@frozen(kw_only=True)
class TapFds:
    """The host's end of a NIC: descriptors of its tap device and, where the host has vhost-net, of its accelerator."""

    fd: int
    vhost_fd: int | None = None


DISK_SETS, MEDIA_SETS, NVRAM_SET, CDROM_SETS = 97470000, 97471000, 97472000, 97473000
"""Numbers of sets of open files: the first disk's and the first medium's, which the others' follow, that of the UEFI
variables, and those of the media of the CD-ROM drive, which take turns. Arbitrary, as `argv.LOG_SET`."""

CDROM_TURNS = 4
"""While one medium is taken out the next one is there already. QEMU closes an open file of a guest that is paused only
once that goes on, so there are a few more than two."""


@frozen
class Handed:
    """A file that QEMU inherits open: its descriptor, and its path on the host, which is for people only."""

    fd: int
    path: str


@frozen(kw_only=True)
class Ovmf:
    """UEFI firmware: paths of its code, and of the variables that a new machine begins with."""

    code: str
    variables: str


@frozen(kw_only=True)
class Nvram:
    """Where a machine's UEFI variables are: in a file of this host, or in an RBD image."""

    file: Handed | None = None
    rbd: RbdDisk | None = None


@frozen(kw_only=True)
class Ceph:
    """How QEMU reaches Ceph; None for librbd's own defaults.

    Attributes:
        conf: path of ceph.conf, which QEMU's user must be able to read.
        user: its client's id, without `client.`; `%i` in it stands for the instance's.
        key: descriptor of a file that holds the client's key in base64; None for the keyring that ceph.conf names.
    """

    conf: str | None = None
    user: str | None = None
    key: int | None = None


OWN_DEFAULTS = Ceph()

_PORTS = 4
"""Ports of the serial bus: one that QEMU keeps for a console, the agent's, and two for `extra_flags`, such as SPICE's
agent. QEMU's default is 31. Each has two queues, for which QEMU's main loop asks the kernel at every turn: with 31 a
guest's write of 4 KiB to a disk takes half as long again (`python -m bench --only disk`)."""

CEPH_KEY = "ceph0"
"""Name of QEMU's object that holds the key."""


def inherited(fd: int) -> str:
    """The name of an inherited file for options of QEMU that take a name only (proc_pid_fd(5))."""
    return f"/proc/self/fd/{fd}"


def common() -> Iterator[str]:
    """The devices of every machine: the agent's channel, random numbers, a balloon, a device that reports a panic."""
    yield from ("-device", f"virtio-serial-pci,id=virtio-serial0,max_ports={_PORTS},addr={_SERIAL_SLOT:#x}")
    agent = "virtserialport,id=agent0,bus=virtio-serial0.0,chardev=agent0,name=org.qemu.guest_agent.0"
    yield from ("-device", agent)
    yield from ("-device", f"virtio-rng-pci,id=rng0,addr={_RNG_SLOT:#x}")
    yield from ("-device", f"virtio-balloon-pci,id=balloon0,{_BALLOON_STATISTICS},addr={_BALLOON_SLOT:#x}")
    yield from ("-device", "pvpanic")


def bridge(spec: Spec) -> Iterator[str]:
    """Slots for more NICs and disks than the machine's own bus has, for those that come while it runs, too."""
    if spec.has_bus:
        yield from ("-device", f"pci-bridge,id={MORE},chassis_nr=1,addr={_BRIDGE_SLOT:#x}")


def nics(spec: Spec, taps: Sequence[TapFds]) -> Iterator[str]:
    """The NICs, on open taps, because QEMU itself must not start a helper, or on QEMU's own network."""
    for nic, tap in _with_taps(spec, taps):
        if tap is None:
            ports = "" if nic.number else "".join(map(_forwarded, spec.forward))
            yield from ("-netdev", f"user,id=net{nic.number}{ports}")
        else:
            vhost = "" if tap.vhost_fd is None else f",vhost=on,vhostfd={tap.vhost_fd}"
            yield from ("-netdev", f"tap,id=net{nic.number},fd={tap.fd}{vhost}")
        yield from ("-device", words(nic_device(nic)))


def nic_device(nic: Nic) -> dict[str, str]:
    """A NIC as the guest sees it."""
    place = {"bus": MORE, "addr": f"{nic.number:#x}"} if nic.number else {"addr": f"{_NIC_SLOT:#x}"}
    name = nic_name(nic)
    return {"driver": "virtio-net-pci", "id": name, "netdev": netdev_name(nic), "mac": nic.mac, **place}


def nic_name(nic: Nic) -> str:
    """The name of a NIC in QEMU."""
    return f"nic{nic.number}"


def netdev_name(nic: Nic) -> str:
    """The name of the host's end of a NIC in QEMU."""
    return f"net{nic.number}"


def words(device: Mapping[str, str]) -> str:
    """A device as the argument of `-device`."""
    driver, *properties = device.items()
    return ",".join([driver[1], *(f"{name}={value}" for name, value in properties)])


def _with_taps(spec: Spec, taps: Sequence[TapFds]) -> Iterator[tuple[Nic, TapFds | None]]:
    of_bridged = dict(zip(spec.bridged_nics, taps, strict=True))
    return ((nic, of_bridged.get(nic)) for nic in spec.all_nics)


def _forwarded(one: Forward) -> str:
    return f",hostfwd={one.protocol}:{one.address}:{one.port}-:{one.guest_port}"


def ceph_key(ceph: Ceph) -> Iterator[str]:
    """The object that reads the key from its file, once, before any disk; the key is not on the command line."""
    if ceph.key is not None:
        secret = {"qom-type": "secret", "id": CEPH_KEY, "file": inherited(ceph.key), "format": "base64"}
        yield from ("-object", json_option(secret))


def disks(spec: Spec, ceph: Ceph, files: Sequence[int]) -> Iterator[str]:
    """The disks. Writes are cached, and a guest's flush reaches the image or the file. The first disk boots.

    An I/O error stops the guest (`io-error`). While Ceph is away a request waits and does not fail. So an error means
    that this QEMU was fenced and must not go on, or that an object is damaged, where a stopped guest loses nothing
    (docs/decisions/0014-ceph-by-its-tools.md). A file's error mostly is a full file system: its guest goes on when
    there is room (machine/room.py).

    Args:
        spec: of the machine.
        ceph: how images are reached.
        files: descriptors of the disks that are files, in their order.
    """
    descriptors = iter(files)
    for disk in spec.all_disks:
        if isinstance(disk.source, FileDisk):
            yield from _file_set(next(descriptors), disk_set(disk), disk.key)
        if (limit := disk_limit(disk)) is not None:
            yield from ("-object", json_option(limit))
        yield from ("-blockdev", json_option(disk_node(disk, ceph)))
        yield from ("-device", words(disk_device(disk, spec)))


def disk_set(disk: Disk) -> int:
    """The number of the set of open files that holds a disk that is a file."""
    return DISK_SETS + disk.number


def limit_name(disk: Disk) -> str:
    """The name of QEMU's object that limits a disk's requests, where it was there from the disk's start on."""
    return f"{node_of(disk)}-limit"


def limits(iops: int | None) -> dict[str, int]:
    """What such an object says; without a limit it lets everything pass."""
    return {"iops-total": iops or 0}


def disk_limit(disk: Disk) -> dict[str, Any] | None:
    """That object; None for a disk without limit."""
    iops = disk.source.iops
    return None if iops is None else {"qom-type": "throttle-group", "id": limit_name(disk), "limits": limits(iops)}


def disk_node(disk: Disk, ceph: Ceph) -> dict[str, Any]:
    """The block node of a disk."""
    source = disk.source
    node = _local_node(source, disk_set(disk)) if isinstance(source, FileDisk) else _rbd_node(source, ceph)
    if source.iops is not None:
        node = {"driver": "throttle", "throttle-group": limit_name(disk), "read-only": source.ro, "file": node}
        if source.discard:
            node["discard"] = "unmap"
    return {"node-name": node_of(disk), **node}


def disk_name(disk: Disk) -> str:
    """The name of a disk's device in QEMU."""
    return f"{node_of(disk)}-dev"


def disk_device(disk: Disk, spec: Spec) -> dict[str, str]:
    """A disk of a machine as the guest sees it."""
    place = {"bus": MORE, "addr": f"{_MORE_DISKS + disk.number:#x}"} if disk.number else {"addr": f"{_DISK_SLOT:#x}"}
    return {
        "driver": "virtio-blk-pci",
        "id": disk_name(disk),
        "drive": node_of(disk),
        "write-cache": "on",
        "werror": "stop",
        "rerror": "stop",
        **({} if disk.number else {"bootindex": str(_FIRST_DISK_BOOTS)}),
        **place,
        **_queues(spec),
    }


def _queues(spec: Spec) -> dict[str, str]:
    """QEMU gives a disk a queue for each processor. Where these may become more, the number is that of the start.

    Otherwise a disk that is older than a processor would have another number at the target of a live move.
    """
    return {} if spec.cpus_max is None else {"num-queues": str(spec.cpus - spec.plugged_cpus)}


def media(spec: Spec, files: Sequence[Handed]) -> Iterator[str]:
    """Read-only media, as virtio disks: a guest with a driver for its own disk has one for these."""
    for number, (file, slot) in enumerate(zip(files, _MEDIA_SLOTS, strict=False)):
        yield from _file_set(file.fd, MEDIA_SETS + number, file.path)
        node = _file_node(f"/dev/fdset/{MEDIA_SETS + number}", read_only=True)
        yield from ("-blockdev", json_option({"node-name": f"medium{number}", **node}))
        device = {"driver": "virtio-blk-pci", "id": f"medium{number}-dev", "drive": f"medium{number}"}
        yield from ("-device", words({**device, "addr": f"{slot:#x}", **_queues(spec)}))


def cdrom_node(turn: int) -> dict[str, Any]:
    """The block node of a medium, which QEMU has got as an open file: see `CDROM_TURNS`."""
    return {
        "node-name": f"{medium.DEVICE}-{turn}",
        **_file_node(f"/dev/fdset/{CDROM_SETS + turn}", read_only=True),
    }


def cdrom(spec: Spec, machine: str, file: Handed | None) -> Iterator[str]:
    """The CD-ROM drive, on the bus for which every operating system and firmware has a driver: SATA, or IDE.

    It is the last one to boot from, so that a new disk, on which nothing is yet, lets its medium boot; or the first one
    (`boot`). Of its buses q35 leaves the last to it, so that it moves none of `extra_flags`' own.

    Args:
        spec: of the machine.
        machine: its type.
        file: the medium; None for an empty drive.
    """
    if spec.cdrom is None:
        return
    device = f"ide-cd,id={medium.DEVICE},bootindex={_CDROM_BOOTS_FIRST if spec.cdrom.boot else _CDROM_BOOTS}"
    if "q35" in machine:
        device += ",bus=ide.5"
    if file is not None:
        yield from _file_set(file.fd, CDROM_SETS, file.path)
        yield from ("-blockdev", json_option(cdrom_node(0)))
        device += f",drive={medium.DEVICE}-0"
    yield from ("-device", device)


def flash(ovmf: Ovmf, nvram: Nvram, ceph: Ceph) -> Iterator[str]:
    """The firmware's code, which no guest can write to, and its variables."""
    firmware = {"node-name": "firmware", **_file_node(ovmf.code, read_only=True)}
    yield from ("-blockdev", json_option(firmware))
    if nvram.rbd is not None:
        node = {"driver": "raw", "file": _rbd_node(nvram.rbd, ceph)}
    else:
        assert nvram.file is not None
        yield from _file_set(nvram.file.fd, NVRAM_SET, nvram.file.path)
        node = _file_node(f"/dev/fdset/{NVRAM_SET}", read_only=False)
    yield from ("-blockdev", json_option({"node-name": "nvram", **node}))


MEMORY_DEVICE = "memory0"
"""The name of the device by which a guest gets more memory, or less, while it runs."""


def memory_block(spec: Spec) -> int:
    """Bytes by which that device's memory grows. Said, so that it is the same on every host of a live move."""
    return (1 << 30) if spec.hugepages == "1G" else (2 << 20)


def plugged(spec: Spec) -> int:
    """Bytes that the guest is asked to have beside those that it started with: whole blocks."""
    return -(-(spec.plugged_mib << 20) // memory_block(spec)) * memory_block(spec)


ODD_KIB = 128
"""What an emulated guest has above whole MiB: half of 64 pages. See `_first_kib`."""


def _first_kib(spec: Spec, *, is_emulated: bool) -> int:
    """What the guest starts with; an emulated guest has a little more, so that no live move loses a write.

    Before QEMU 9.0 a source that emulates its guest (TCG) takes the marks of written pages away word by word, 64 pages
    at a time, and forgets to tell the emulated processor, whose further writes to these pages are marked no more: they
    do not come to the target. It does that only where the size is a multiple of 64 pages; otherwise it goes page by
    page, and tells it (QEMU's include/exec/ram_addr.h, cpu_physical_memory_sync_dirty_bitmap; mended by "physmem: Fix
    migration dirty bitmap coherency with TCG memory access", 2024). With QEMU 7.2 and a whole MiB each of some moves
    lost writes, with the odd size none.
    """
    odd = ODD_KIB if is_emulated and spec.hugepages is None else 0
    return (spec.ram_mib - spec.plugged_mib << 10) + odd


def _size(kib: int) -> str:
    return f"{kib}K" if kib % 1024 else f"{kib >> 10}M"


def memory(spec: Spec, host_mib: int | None, *, is_emulated: bool) -> Iterator[str]:
    """The guest's memory, and the device by which it changes, as far as it may (`ram_max`) and the host has it.

    QEMU does not start with a device that is larger than the host's memory, however little of it the guest is to have.
    """
    first_kib = _first_kib(spec, is_emulated=is_emulated)
    most = spec.ram_max_mib or 0
    if (more := min(most, host_mib or most) - (first_kib >> 10)) <= 0:
        yield from ("-m", f"size={_size(first_kib)}")
        return
    block = memory_block(spec)
    size = -(-(more << 20) // block) * block
    yield from ("-m", f"size={_size(first_kib)},maxmem={_size(first_kib + (size >> 10))}")
    kind: dict[str, Any] = {"qom-type": "memory-backend-ram"}
    if spec.hugepages is not None:
        # Without `reserve` no page is set aside for what the guest does not have yet. Of ordinary memory none is, and
        # QEMU would look for /proc/sys, which it does not see.
        kind = {"qom-type": "memory-backend-memfd", "hugetlb": True, "hugetlbsize": block, "reserve": False}
    yield from ("-object", json_option({**kind, "id": "ram1", "size": size}))
    device = {"driver": "virtio-mem-pci", "id": MEMORY_DEVICE, "memdev": "ram1", "block-size": str(block)}
    if spec.hugepages is not None:
        device["prealloc"] = "on"
    yield from ("-device", words({**device, "requested-size": str(plugged(spec)), "addr": f"{_MEMORY_SLOT:#x}"}))


def processors(spec: Spec) -> tuple[str, str]:
    """The guest's vCPUs, and how many there may be (`cpus_max`)."""
    most = "" if spec.cpus_max is None else f",maxcpus={max(spec.cpus_max, spec.cpus)}"
    return "-smp", f"cpus={spec.cpus}{most}"


def huge_memory(spec: Spec) -> dict[str, Any]:
    """The memory backend of a guest on huge pages: the start takes all of it, or fails."""
    return {
        "qom-type": "memory-backend-memfd",
        "id": "ram0",
        "size": (spec.ram_mib - spec.plugged_mib) << 20,
        "hugetlb": True,
        "hugetlbsize": (1 << 30) if spec.hugepages == "1G" else (2 << 20),
        "prealloc": True,
    }


def display(spec: Spec, default_addr: str, password: int | None) -> Iterator[str]:
    """A display with a pointer that follows the viewer's, and its servers; or none at all.

    The VNC server listens nowhere. Its viewers come as connections that the supervisor hands to QEMU (`add_client`).

    With `-k` QEMU takes the characters that a VNC viewer types for keys of a US keyboard, and leaves out those that it
    lacks. Without, it takes the keys themselves, and the guest's own layout makes characters of them. SPICE viewers
    send keys in any case. So `-k`, which machines without the key `display` always had, is not there with it.
    """
    screen = spec.screen
    if screen is Display.NONE:
        yield from ("-vga", "none", "-display", "none")
        return
    ticket = "disable-ticketing=on"
    if password is not None:
        yield from ("-object", json_option({"qom-type": "secret", "id": "spice0", "file": inherited(password)}))
        ticket = "password-secret=spice0"
    yield from ("-vga", screen)
    if spec.spice_port is not None:
        addr = escaped(spec.spice_addr or default_addr)
        yield from ("-spice", f"port={spec.spice_port},addr={addr},{ticket}")
    if not takes_viewers(spec.extra_flags):
        # QEMU takes viewers for its first VNC server only, and a person's own one is to be that.
        yield from ("-vnc", "none")
    if spec.display is None:
        yield from ("-k", "en-us")
    yield from ("-device", f"qemu-xhci,id=usb0,addr={_USB_SLOT:#x}", "-device", "usb-tablet,bus=usb0.0")


def takes_viewers(argv: Sequence[str]) -> bool:
    """Whether a QEMU with these options has a VNC server: one without answers `add_client` as if it had."""
    return any(option in {"-vnc", "--vnc"} for option, _ in pairwise(argv))


def _rbd_node(rbd: RbdDisk, ceph: Ceph) -> dict[str, Any]:
    node: dict[str, Any] = {
        "driver": "rbd",
        "pool": rbd.pool,
        "image": rbd.image,
        "read-only": rbd.ro,
        "cache": {"direct": False, "no-flush": False},
    }
    if rbd.namespace:
        node["namespace"] = rbd.namespace
    if rbd.discard:
        node["discard"] = "unmap"
    if ceph.conf is not None:
        node["conf"] = ceph.conf
    if ceph.user is not None:
        node["user"] = ceph.user
    if ceph.key is not None:
        node |= {"key-secret": CEPH_KEY, "auth-client-required": ["cephx"]}
    return node


def _file_set(fd: int, number: int, told: str) -> Iterator[str]:
    """A file that QEMU has open already, as `/dev/fdset/<number>`; `told` is what it is, for people."""
    yield from ("-add-fd", f"fd={fd},set={number},opaque={escaped(told)}")


def _local_node(disk: FileDisk, number: int) -> dict[str, Any]:
    """A file that QEMU has open already: it opens none by name, so its user needs no right to one.

    The lock is QEMU's own, by which its tools know that the image is in use. A name in the header is not followed
    (`backing`), should there be one after all.
    """
    more: dict[str, Any] = {"read-only": disk.ro}
    if disk.discard:
        more["discard"] = "unmap"
    file = {"driver": "file", "filename": f"/dev/fdset/{number}", "locking": "on", **more}
    return {
        "driver": disk.format.value,
        **({"backing": None} if disk.format is DiskFormat.QCOW2 else {}),
        **more,
        "file": file,
    }


def _file_node(path: str, *, read_only: bool) -> dict[str, Any]:
    file = {"driver": "file", "filename": path, "read-only": read_only}
    return {"driver": "raw", "read-only": read_only, "file": file}
