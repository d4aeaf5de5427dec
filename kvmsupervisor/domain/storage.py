"""What a machine may write to, by its wishes (law 7).

The answer decides what a takeover needs, so it errs on the safe side: what is not known to be harmless counts as
unfenceable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.images import Snapshot
from kvmsupervisor.domain.local_disk import FileDisk
from kvmsupervisor.domain.lock import Lock, Storage
from kvmsupervisor.domain.spec import Disk, Firmware, RbdDisk, Spec


def storage_of(spec: Spec) -> Storage:
    """What QEMU may write to when it runs `spec`.

    `NONE` and `RBD` only when every option of `extra_flags` is known to open nothing that can be written, and no disk
    that is written to is a file. UEFI variables in a file of the host do not count: another host begins with fresh
    ones.
    """
    if pinning(spec) or not _all_harmless(spec.extra_flags):
        return Storage.UNFENCEABLE
    return Storage.NONE if all(disk.ro for disk in spec.all_disks) else Storage.RBD


def pinning(spec: Spec) -> dict[str, FileDisk]:
    """The disks that are files of one host and written to, by key: with them the instance stays on that host."""
    return {disk.key: file for disk, file in spec.files if not file.ro}


def images_of(spec: Spec) -> tuple[RbdDisk, ...]:
    """The RBD images that QEMU has open for writing when it runs `spec`: by them it is recognised, and fenced."""
    variables = nvram_of(spec)
    disks = tuple(image for _, image in spec.images if not image.ro)
    return disks if variables is None else (*disks, variables)


def had_open(lock: Lock | None, images: Collection[RbdDisk]) -> tuple[RbdDisk, ...]:
    """The images that the holder of a lock has open, and that are none of these: its keys have changed since."""
    known = {image.name for image in images}
    held = () if lock is None else (name for name in lock.images if name not in known and "/" in name)
    return tuple(map(RbdDisk.named, held))


def growable(spec: Spec) -> dict[str, RbdDisk]:
    """The images that may grow under a running machine, by the name of their block node (`hardware.disks`)."""
    return {node_of(disk): image for disk, image in spec.images if not image.ro}


def node_of(disk: Disk) -> str:
    """The name of a disk's block node in QEMU."""
    return f"disk{disk.number}"


def sized(running: Spec, wanted: Spec | None) -> dict[str, tuple[str, FileDisk | RbdDisk]]:
    """The disks of a machine that runs whose size people want, by block node: the key, and the disk as it is wanted.

    A disk of that number that is to be another file or image waits for a restart.
    """
    wishes = {} if wanted is None else {disk.number: disk for disk in wanted.all_disks}
    found = {node_of(disk): (wishes.get(disk.number), disk) for disk in running.all_disks if not disk.ro}
    return {
        node: (wish.key, wish.source)
        for node, (wish, disk) in found.items()
        if wish is not None and wish.name == disk.name and wish.source.size is not None
    }


@frozen(kw_only=True)
class Unmade:
    """An image in Ceph that is to be made, or to be made larger.

    Attributes:
        disk: of the machine.
        image: the same disk's.
        has: bytes that it has; None where it is missing.
        parent: what it is to be a clone of; None for an empty one.
        parent_size: bytes of that.
    """

    disk: Disk
    image: RbdDisk
    has: int | None = None
    parent: Snapshot | None = None
    parent_size: int = 0


def made(spec: Spec) -> tuple[str, ...]:
    """The images in Ceph that are made when they are missing: once the machine has run with one, never again."""
    return tuple(sorted(image.name for _, image in spec.images if image.may_be_made and not image.ro))


def origins_of(spec: Spec) -> dict[str, str]:
    """What its disks begin with, by key."""
    return {disk.key: disk.source.origin for disk in spec.all_disks if disk.source.origin is not None}


def library_images_of(spec: Spec) -> dict[str, str]:
    """What its keys name of the library, or in its place, by key: for its disks, and its CD-ROM drive."""
    medium = None if spec.cdrom is None else spec.cdrom.image
    return origins_of(spec) | ({} if medium is None else {"cdrom": medium})


def files_elsewhere(spec: Spec, files: Mapping[str, str] | None, host: str | None) -> dict[str, str]:
    """Which of its disks another host than `host` has, by key, as its status tells (`Status.files`)."""
    had = {key: (files or {}).get(file.title) for key, file in pinning(spec).items()}
    return {key: other for key, other in had.items() if other is not None and other != host}


def names_of(spec: Spec) -> tuple[str, ...]:
    """What QEMU writes to when it runs `spec`, images and files, by the names that keys and people give them."""
    return (*(image.name for image in images_of(spec)), *(file.title for file in pinning(spec).values()))


def nvram_of(spec: Spec) -> RbdDisk | None:
    """The RBD image of the machine's UEFI variables, beside its first disk; None when they lie on its host.

    Many machines may share a read-only first disk, but not one image of variables.
    """
    if spec.firmware is not Firmware.UEFI or spec.rbd is None or spec.rbd.ro:
        return None
    return spec.rbd.beside(f"{spec.rbd.image}.nvram")


def _all_harmless(words: Sequence[str]) -> bool:
    rest = iter(words)
    for word in rest:
        # QEMU takes `--option` for `-option`, and a word without a hyphen for a disk image.
        option = word[1:].removeprefix("-") if word.startswith("-") else ""
        if option in _BARE:
            continue
        judge = _WITH_ARGUMENT.get(option)
        argument = next(rest, None)
        if judge is None or argument is None or not judge(argument):
            return False
    return True


def _always(_argument: str) -> bool:
    return True


def _one_of(*names: str) -> Callable[[str], bool]:
    """Judge `NAME[,property=value…]` by its name. A second `driver=` would win over the first: refused."""

    def judge(argument: str) -> bool:
        name, *properties = argument.split(",")
        return name in names and not any(p.startswith(("driver=", "type=", "qom-type=")) for p in properties)

    return judge


def _network(argument: str) -> bool:
    """The host's end of a NIC, unless it shares a folder (`smb`) or runs a program on the host."""
    first, *properties = argument.split(",")
    risky = {"smb", "guestfwd", "script", "downscript", "helper", "type"}
    return first in {"user", "tap", "bridge", "none", "nic"} and not any(
        p.partition("=")[0] in risky and p not in {"script=no", "downscript=no"} for p in properties
    )


def _plain_path(argument: str) -> bool:
    """A path, or a URL, of a file that is only read: no other protocol (`fat:`, `json:`, `nbd:` …)."""
    return argument.startswith(("http://", "https://")) or ":" not in argument


_BARE = frozenset({"S", "enable-kvm", "no-acpi", "no-hpet", "no-reboot", "no-shutdown", "usb"})

_HARMLESS_DEVICES = (
    *("virtio-net-pci", "virtio-net", "e1000", "e1000e", "rtl8139", "vmxnet3"),
    *("virtio-rng-pci", "virtio-balloon-pci", "virtio-serial-pci", "virtserialport", "virtconsole"),
    *("VGA", "qxl", "qxl-vga", "virtio-vga", "virtio-gpu-pci", "bochs-display", "ramfb"),
    *("virtio-keyboard-pci", "virtio-mouse-pci", "virtio-tablet-pci"),
    *("qemu-xhci", "nec-usb-xhci", "usb-ehci", "usb-tablet", "usb-mouse", "usb-kbd"),
    *("intel-hda", "ich9-intel-hda", "hda-duplex", "hda-output", "AC97"),
    *("pvpanic", "pvpanic-pci", "i6300esb", "isa-debug-exit", "vmgenid", "vmcoreinfo"),
    *("pcie-root-port", "pci-bridge", "pcie-pci-bridge", "intel-iommu"),
)

_WITH_ARGUMENT: dict[str, Callable[[str], bool]] = {
    "M": _always,
    "accel": _always,
    "action": _always,
    "append": _always,
    "boot": _always,
    "cpu": _always,
    "initrd": _plain_path,
    "k": _always,
    "kernel": _plain_path,
    "m": _always,
    "machine": _always,
    "msg": _always,
    "name": _always,
    "overcommit": _always,
    "rtc": _always,
    "smp": _always,
    "vga": _always,
    "watchdog-action": _always,
    "bios": _plain_path,
    "cdrom": _plain_path,
    "device": _one_of(*_HARMLESS_DEVICES),
    "display": _one_of("none"),
    "net": _network,
    "netdev": _network,
    "nic": _network,
    "object": _one_of("rng-random", "rng-builtin", "iothread", "memory-backend-ram", "memory-backend-memfd"),
    "serial": _one_of("none", "null"),
    "parallel": _one_of("none", "null"),
    "monitor": _one_of("none", "null"),
}
"""Options of qemu-system-x86_64(1) with one argument, and which arguments open nothing that can be written.

A CD-ROM (`-cdrom`) is opened for reading only; kernel, initrd and BIOS are read into memory.
"""
