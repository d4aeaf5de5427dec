"""What a running machine can become while it runs: the steps from what it is to what its keys want. Pure.

Whatever is no step waits for a restart, as `spec.pending` tells. Each step is about one device, by whose name attempts
and records are kept; it may be cut off anywhere and is decided anew from what is observed (decision 0042).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from itertools import pairwise
from typing import TypeVar

from kvmsupervisor.domain import hardware
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.spec import Disk, Nic, Spec
from kvmsupervisor.domain.storage import node_of
from kvmsupervisor.domain.user_network import USER

_T = TypeVar("_T", Nic, Disk)

PROCESSORS, MEMORY = "cpus", "ram"
"""The names under which attempts at these two are kept, which are no single device: those of their keys."""


class Kind(Enum):
    """What a step does."""

    UNPLUG = "ask the guest to let go of a device"
    PLUG = "give it a device"
    LIMIT = "limit a disk's requests"
    BRIDGE = "put the tap of a NIC into another bridge"
    LINK = "pull out the cable of a NIC, or plug it in"
    PROCESSORS = "give it more processors"
    MEMORY = "give it more memory, or ask for some back"


@frozen(kw_only=True)
class Step:
    """One change.

    Attributes:
        kind: what is done.
        device: to which; `disk1`, `nic2`, `cpus`, `ram`.
        key: that asks for it, for people.
        disk: as it is now (`UNPLUG`), or as it is wanted; None for another device.
        nic: likewise.
    """

    kind: Kind
    device: str
    key: str
    disk: Disk | None = None
    nic: Nic | None = None


@frozen(kw_only=True)
class Attempt:
    """What is known of the last attempt at a device.

    Attributes:
        at: when the next one is due, CLOCK_BOOTTIME; infinite: not before something changes.
        said: why the last one came to nothing, for people; None for no reason.
        asked: whether it is the guest's turn until then.
    """

    at: float = 0.0
    said: str | None = None
    asked: bool = False


def steps(running: Spec, wanted: Spec, *, argv: Sequence[str], takes: bool) -> tuple[Step, ...]:
    """What can be done now, in the order in which it is done: what leaves makes room for what comes.

    Args:
        running: the machine as it is.
        wanted: as its keys want it.
        argv: QEMU's command line: what it cannot reach since its start it cannot be given.
        takes: whether anything may be taken from the guest, or be made another thing (`View.takes`); otherwise it only
            gets more.
    """
    if running == wanted:
        return ()
    return tuple(_steps(running, wanted, argv, takes=takes))


def _steps(running: Spec, wanted: Spec, argv: Sequence[str], *, takes: bool) -> Iterator[Step]:
    if running.has_bus:
        if takes:
            yield from _unplugs(running, wanted)
        yield from _plugs(running, wanted, argv)
    if takes:
        yield from _limits(running, wanted)
        yield from _of_nics_that_stay(running, wanted)
    if running.cpus < wanted.cpus <= (running.cpus_max or 0):
        yield Step(kind=Kind.PROCESSORS, device=PROCESSORS, key=PROCESSORS)
    least = running.ram_mib - running.plugged_mib if takes else running.ram_mib
    if wanted.ram_mib != running.ram_mib and least <= wanted.ram_mib <= (running.ram_max_mib or 0):
        yield Step(kind=Kind.MEMORY, device=MEMORY, key=MEMORY)


def _limits(running: Spec, wanted: Spec) -> Iterator[Step]:
    disks = _by_number(wanted.all_disks)
    for disk in running.all_disks:
        other = disks.get(disk.number)
        if other is None or other.source.iops == disk.source.iops:
            continue
        if _without_limit(disk) == _without_limit(other):
            yield Step(kind=Kind.LIMIT, device=node_of(disk), key=other.key, disk=other)


def _unplugs(running: Spec, wanted: Spec) -> Iterator[Step]:
    """What leaves, or makes room for another one of its number. The first of each is not on the bus for that."""
    nics, disks = _by_number(wanted.nics), _by_number(wanted.all_disks)
    for nic in running.nics:
        if not _is_same_nic(nic, nics.get(nic.number)):
            yield Step(kind=Kind.UNPLUG, device=hardware.nic_name(nic), key=f"{nic.key}mac", nic=nic)
    for disk in running.all_disks:
        other = disks.get(disk.number)
        if disk.number and (other is None or other.name != disk.name):
            yield Step(kind=Kind.UNPLUG, device=node_of(disk), key=disk.key, disk=disk)


def _of_nics_that_stay(running: Spec, wanted: Spec) -> Iterator[Step]:
    wanted_nics = _by_number(wanted.all_nics)
    for nic in running.all_nics:
        now = wanted_nics.get(nic.number)
        if now is None or now.mac != nic.mac:
            continue
        device = hardware.nic_name(nic)
        if nic.bridge != now.bridge and USER not in {nic.bridge, now.bridge}:
            yield Step(kind=Kind.BRIDGE, device=device, key=f"{nic.key}bridge", nic=replace(now, down=nic.down))
        if nic.down != now.down:
            yield Step(kind=Kind.LINK, device=device, key=f"{nic.key}link", nic=now)


def _plugs(running: Spec, wanted: Spec, argv: Sequence[str]) -> Iterator[Step]:
    """What comes to a place that is free, and is nowhere else in the machine."""
    numbers, addresses = {nic.number for nic in running.all_nics}, {nic.mac for nic in running.all_nics}
    for nic in wanted.nics:
        if nic.number not in numbers and nic.mac not in addresses and nic.bridge != USER:
            yield Step(kind=Kind.PLUG, device=hardware.nic_name(nic), key=f"{nic.key}mac", nic=nic)
    places, names = {disk.number for disk in running.all_disks}, {disk.name for disk in running.all_disks}
    for disk in wanted.all_disks:
        reachable = disk.rbd is None or reaches_ceph(argv)
        if disk.number and disk.number not in places and disk.name not in names and reachable:
            yield Step(kind=Kind.PLUG, device=node_of(disk), key=disk.key, disk=disk)


def _by_number(devices: Sequence[_T]) -> Mapping[int, _T]:
    return {device.number: device for device in devices}


def _is_same_nic(nic: Nic, wanted: Nic | None) -> bool:
    """Whether a NIC can become the one that is wanted without leaving its place."""
    if wanted is None or wanted.mac != nic.mac:
        return False
    return nic.bridge == wanted.bridge or USER not in {nic.bridge, wanted.bridge}


def _without_limit(disk: Disk) -> Disk:
    if disk.file is not None:
        return replace(disk, file=replace(disk.file, iops=None, size=None, origin=None))
    assert disk.rbd is not None
    return replace(disk, rbd=replace(disk.rbd, iops=None, size=None, origin=None))


def reaches_ceph(argv: Sequence[str]) -> bool:
    """Whether a QEMU was started with an image in Ceph: only then it sees Ceph's settings, and the network to it."""
    return any('"driver":"rbd"' in word for word in argv)


def has_ceph_key(argv: Sequence[str]) -> bool:
    """Whether it was given the key to Ceph; otherwise librbd finds it by itself."""
    return any(option == "-object" and f'"id":"{hardware.CEPH_KEY}"' in value for option, value in pairwise(argv))


# --- what a running machine has become ------------------------------------------------------------------------


def with_disk(spec: Spec, disk: Disk) -> Spec:
    """The machine with that disk, in place of one of that number."""
    others = (one for one in spec.disks if one.number != disk.number)
    return replace(spec, disks=tuple(sorted((*others, disk), key=lambda one: one.number)))


def without_disk(spec: Spec, number: int) -> Spec:
    """The machine without a disk. Its bus stays."""
    return replace(spec, disks=tuple(disk for disk in spec.disks if disk.number != number), pluggable=True)


def with_nic(spec: Spec, nic: Nic) -> Spec:
    """The machine with that NIC, in place of one of that number."""
    if nic.number == 0:
        return replace(spec, mac=nic.mac, bridge=nic.bridge, link_down=nic.down)
    others = (one for one in spec.nics if one.number != nic.number)
    return replace(spec, nics=tuple(sorted((*others, nic), key=lambda one: one.number)))


def without_nic(spec: Spec, number: int) -> Spec:
    """The machine without a NIC. Its bus stays."""
    return replace(spec, nics=tuple(nic for nic in spec.nics if nic.number != number), pluggable=True)


def with_limit(spec: Spec, disk: Disk) -> Spec:
    """The machine whose disk of that number has the limit of `disk`, and is the same otherwise."""
    iops = disk.source.iops
    if disk.number == 0 and spec.rbd is not None:
        return replace(spec, rbd=replace(spec.rbd, iops=iops))
    now = next(one for one in spec.disks if one.number == disk.number)
    if now.file is not None:
        return with_disk(spec, replace(now, file=replace(now.file, iops=iops)))
    assert now.rbd is not None
    return with_disk(spec, replace(now, rbd=replace(now.rbd, iops=iops)))


def with_memory(spec: Spec, ram_mib: int) -> Spec:
    """The machine with so much memory, by the device that it was started with."""
    return replace(spec, ram_mib=ram_mib, plugged_mib=spec.plugged_mib + ram_mib - spec.ram_mib)


def with_processors(spec: Spec, cpus: int) -> Spec:
    """The machine with so many processors."""
    return replace(spec, cpus=cpus, plugged_cpus=spec.plugged_cpus + cpus - spec.cpus)


def only_disk(spec: Spec, disk: Disk) -> Spec:
    """A machine with that disk and no other, nor a NIC: what has to be made ready for it alone."""
    return Spec(ram_mib=spec.ram_mib, disks=(disk,))


def disk_of(spec: Spec, device: str) -> Disk | None:
    """The machine's disk of that name."""
    return next((disk for disk in spec.disks if node_of(disk) == device), None)


def nic_of(spec: Spec, device: str) -> Nic | None:
    """The machine's NIC of that name, beyond the first."""
    return next((nic for nic in spec.nics if hardware.nic_name(nic) == device), None)


def key_of(device: str) -> str:
    """The key that says that a disk or NIC of that name is there."""
    kind, number = device.rstrip("0123456789"), device.lstrip("abcdefghijklmnopqrstuvwxyz")
    return f"disk/{number}" if kind == "disk" else f"nic/{number}/mac"


_DEVICE = re.compile(r"-device virtio-(?:net-pci,id=(nic\d+)|blk-pci,id=(disk\d+)-dev),")
_BRIDGE = f"-device pci-bridge,id={hardware.MORE},"
_MEMORY = f"-device virtio-mem-pci,id={hardware.MEMORY_DEVICE},"


def seen_now(seen: Sequence[str], spec: Spec) -> tuple[str, ...]:
    """What a guest sees of its machine, as a command line would say it that makes the machine as it is now.

    What it was started with stays as it was said, by an earlier release maybe.

    Args:
        seen: the same of the command line that QEMU was started with (`move_checks.seen_by_guest`).
        spec: the machine as it is now.
    """
    devices = list(_devices_now(seen, spec))
    begins = next((place for place, word in enumerate(seen) if word.startswith(_BRIDGE)), None)
    if begins is None:
        # It has no bus: nothing has come, and nothing has left.
        return tuple(_sized(word, spec) for word in seen)
    before, after = seen[: begins + 1], (word for word in seen[begins + 1 :] if not _DEVICE.match(word))
    return tuple(_sized(word, spec) for word in (*before, *devices, *after))


def _devices_now(seen: Sequence[str], spec: Spec) -> Iterator[str]:
    """The NICs and disks, in the order of a command line."""
    known = {match[1] or match[2]: word for word in seen if (match := _DEVICE.match(word))}
    for nic in spec.all_nics:
        word = known.get(hardware.nic_name(nic), "")
        yield word if f",mac={nic.mac}," in word else f"-device {hardware.words(hardware.nic_device(nic))}"
    for disk in spec.all_disks:
        yield known.get(node_of(disk)) or f"-device {hardware.words(hardware.disk_device(disk, spec))}"


def _sized(word: str, spec: Spec) -> str:
    """A word with as much memory, and as many processors, as there are now."""
    if word.startswith(_MEMORY):
        return re.sub(r"\brequested-size=\d+", f"requested-size={hardware.plugged(spec)}", word)
    return re.sub(r"^-smp cpus=\d+", f"-smp cpus={spec.cpus}", word)
