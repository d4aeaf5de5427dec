"""The devices of a machine as words of QEMU's command line.

Values from keys are written as JSON where QEMU accepts it (`-blockdev`, `-object`), and escaped elsewhere, so no value
can become an option.

Sources: qemu-system-x86_64(1); `BlockdevOptionsRbd`, `BlockdevOptionsThrottle` and `MemoryBackendMemfdProperties` of
QEMU's QMP reference (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html), `BlockdevOptionsFile` and `-add-fd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk
from kvmsupervisor.domain.spec import RbdDisk, Spec
from kvmsupervisor.domain.storage import node_of
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

_FIRST_DISK_BOOTS = 10
"""Its place in the boot order. A `-kernel` gets 0 from QEMU, and devices of `extra_flags` may come before it, too."""

_BALLOON_STATISTICS = "guest-stats-polling-interval=60"
"""Seconds between two questions to the guest's driver about its memory: as often as QEMU itself is asked."""

# Behind the PCI bridge, which exists only for them: NIC n in slot n, disk n in slot 8 + n.
_MORE = "more0"
_MORE_DISKS = 8


@frozen(kw_only=True)
class TapFds:
    """The host's end of a NIC: descriptors of its tap device and, where the host has vhost-net, of its accelerator."""

    fd: int
    vhost_fd: int | None = None


DISK_SETS = 97470000
"""Number of the first disk's set of open files; the others' follow. Arbitrary, as `argv.LOG_SET`."""


@frozen(kw_only=True)
class Ovmf:
    """UEFI firmware: paths of its code, and of the variables that a new machine begins with."""

    code: str
    variables: str


@frozen(kw_only=True)
class Nvram:
    """Where a machine's UEFI variables are: in a file of this host, or in an RBD image."""

    file: str | None = None
    rbd: RbdDisk | None = None


@frozen(kw_only=True)
class Ceph:
    """How QEMU reaches Ceph; None for librbd's own defaults.

    Attributes:
        conf: path of ceph.conf, which QEMU's user must be able to read.
        user: its client's id, without `client.`.
        key_file: path of a file that holds the client's key in base64 and that QEMU's user can read; None for the
            keyring that ceph.conf names.
    """

    conf: str | None = None
    user: str | None = None
    key_file: str | None = None


OWN_DEFAULTS = Ceph()

_CEPH_KEY = "ceph0"
"""Name of QEMU's object that holds the key."""


def common() -> Iterator[str]:
    """The devices of every machine: the agent's channel, random numbers, a balloon, a device that reports a panic."""
    yield from ("-device", f"virtio-serial-pci,id=virtio-serial0,addr={_SERIAL_SLOT:#x}")
    agent = "virtserialport,id=agent0,bus=virtio-serial0.0,chardev=agent0,name=org.qemu.guest_agent.0"
    yield from ("-device", agent)
    yield from ("-device", f"virtio-rng-pci,id=rng0,addr={_RNG_SLOT:#x}")
    yield from ("-device", f"virtio-balloon-pci,id=balloon0,{_BALLOON_STATISTICS},addr={_BALLOON_SLOT:#x}")
    yield from ("-device", "pvpanic")


def bridge(spec: Spec) -> Iterator[str]:
    """Slots for more NICs and disks than the machine's own bus has."""
    if spec.nics or spec.disks:
        yield from ("-device", f"pci-bridge,id={_MORE},chassis_nr=1,addr={_BRIDGE_SLOT:#x}")


def nics(spec: Spec, taps: Sequence[TapFds]) -> Iterator[str]:
    """The NICs, on open taps: QEMU itself must not start a helper."""
    for nic, tap in zip(spec.all_nics, taps, strict=True):
        vhost = "" if tap.vhost_fd is None else f",vhost=on,vhostfd={tap.vhost_fd}"
        yield from ("-netdev", f"tap,id=net{nic.number},fd={tap.fd}{vhost}")
        place = f"bus={_MORE},addr={nic.number:#x}" if nic.number else f"addr={_NIC_SLOT:#x}"
        device = f"virtio-net-pci,id=nic{nic.number},netdev=net{nic.number},mac={nic.mac}"
        yield from ("-device", f"{device},{place}")


def ceph_key(ceph: Ceph) -> Iterator[str]:
    """The object that reads the key from its file, once, before any disk; the key is not on the command line."""
    if ceph.key_file is not None:
        secret = {"qom-type": "secret", "id": _CEPH_KEY, "file": ceph.key_file, "format": "base64"}
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
        name, source = node_of(disk), disk.source
        if isinstance(source, FileDisk):
            number = DISK_SETS + disk.number
            yield from ("-add-fd", f"fd={next(descriptors)},set={number},opaque={disk.key}")
            node = _local_node(source, number)
        else:
            node = _rbd_node(source, ceph)
        if source.iops is not None:
            limits = {"qom-type": "throttle-group", "id": f"{name}-limit", "limits": {"iops-total": source.iops}}
            yield from ("-object", json_option(limits))
            node = {"driver": "throttle", "throttle-group": f"{name}-limit", "read-only": source.ro, "file": node}
            if source.discard:
                node["discard"] = "unmap"
        yield from ("-blockdev", json_option({"node-name": name, **node}))
        place = f"bus={_MORE},addr={_MORE_DISKS + disk.number:#x}" if disk.number else f"addr={_DISK_SLOT:#x}"
        boot = "" if disk.number else f",bootindex={_FIRST_DISK_BOOTS}"
        yield from (
            "-device",
            f"virtio-blk-pci,id={name}-dev,drive={name},write-cache=on,werror=stop,rerror=stop{boot},{place}",
        )


def media(paths: Sequence[str]) -> Iterator[str]:
    """Read-only media, as virtio disks: a guest with a driver for its own disk has one for these."""
    for number, (path, slot) in enumerate(zip(paths, _MEDIA_SLOTS, strict=False)):
        yield from ("-blockdev", json_option({"node-name": f"medium{number}", **_file_node(path, read_only=True)}))
        yield from ("-device", f"virtio-blk-pci,id=medium{number}-dev,drive=medium{number},addr={slot:#x}")


def flash(ovmf: Ovmf, nvram: Nvram, ceph: Ceph) -> Iterator[dict[str, Any]]:
    """The block nodes of the firmware's code, which no guest can write to, and of its variables."""
    yield {"node-name": "firmware", **_file_node(ovmf.code, read_only=True)}
    if nvram.rbd is not None:
        yield {"node-name": "nvram", "driver": "raw", "file": _rbd_node(nvram.rbd, ceph)}
    else:
        assert nvram.file is not None
        yield {"node-name": "nvram", **_file_node(nvram.file, read_only=False)}


def huge_memory(spec: Spec) -> dict[str, Any]:
    """The memory backend of a guest on huge pages: the start takes all of it, or fails."""
    return {
        "qom-type": "memory-backend-memfd",
        "id": "ram0",
        "size": spec.ram_mib << 20,
        "hugetlb": True,
        "hugetlbsize": (1 << 30) if spec.hugepages == "1G" else (2 << 20),
        "prealloc": True,
    }


def display(spec: Spec, default_addr: str, password_file: str | None) -> Iterator[str]:
    """A SPICE server with a pointer that follows the viewer's, or no display at all."""
    if spec.spice_port is None:
        yield from ("-vga", "none", "-display", "none")
        return
    ticket = "disable-ticketing=on"
    if password_file is not None:
        yield from ("-object", json_option({"qom-type": "secret", "id": "spice0", "file": password_file}))
        ticket = "password-secret=spice0"
    yield from ("-vga", "qxl")
    addr = escaped(spec.spice_addr or default_addr)
    yield from ("-spice", f"port={spec.spice_port},addr={addr},{ticket}")
    yield from ("-k", "en-us")
    yield from ("-device", f"qemu-xhci,id=usb0,addr={_USB_SLOT:#x}", "-device", "usb-tablet,bus=usb0.0")


def _rbd_node(rbd: RbdDisk, ceph: Ceph) -> dict[str, Any]:
    node: dict[str, Any] = {
        "driver": "rbd",
        "pool": rbd.pool,
        "image": rbd.image,
        "read-only": rbd.ro,
        "cache": {"direct": False, "no-flush": False},
    }
    if rbd.discard:
        node["discard"] = "unmap"
    if ceph.conf is not None:
        node["conf"] = ceph.conf
    if ceph.user is not None:
        node["user"] = ceph.user
    if ceph.key_file is not None:
        node |= {"key-secret": _CEPH_KEY, "auth-client-required": ["cephx"]}
    return node


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
