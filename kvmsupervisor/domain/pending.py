"""Which wishes a running machine differs in from what its keys want. Pure."""

from __future__ import annotations

from dataclasses import fields, replace

from kvmsupervisor.domain.cdrom import Cdrom
from kvmsupervisor.domain.spec import Disk, Nic, RbdDisk, Spec


def pending(running: Spec, wanted: Spec) -> tuple[str, ...]:
    """Names of the wishes in which the running machine differs from the wanted one.

    Neither the size of a disk, which grows while its machine runs, nor what it began with is one of them, nor the
    medium in its drive.
    """
    names: list[str] = []
    for one in fields(Spec):
        before, after = getattr(running, one.name), getattr(wanted, one.name)
        if before == after or not one.compare:
            continue
        if one.name == "nics":
            names += _differing_nics(before, after)
        elif one.name == "disks":
            names += sorted({disk.key for disk in {*map(_as_it_stays, before)} ^ {*map(_as_it_stays, after)}})
        elif one.name == "cdrom":
            if is_another_drive(before, after):
                names.append("cdrom")
        elif one.name == "rbd":
            if None in {before, after} or _of_restarts(before) != _of_restarts(after):
                names.append(running.rbd_key if wanted.rbd is None else wanted.rbd_key)
        else:
            names.append(_KEY_OF_FIELD.get(one.name, one.name))
    return tuple(dict.fromkeys(names))


def is_another_drive(before: Cdrom | None, after: Cdrom | None) -> bool:
    """Whether it is another drive: that waits for a restart. One that is wanted no more is just empty."""
    return after is not None and (before is None or before.boot != after.boot)


def _as_it_stays(disk: Disk) -> Disk:
    if disk.file is not None:
        return replace(disk, file=replace(disk.file, size=None, origin=None))
    assert disk.rbd is not None
    return replace(disk, rbd=_of_restarts(disk.rbd))


def _of_restarts(image: RbdDisk) -> RbdDisk:
    """An image without what is no matter of a restart."""
    return replace(image, size=None, origin=None, copy=False)


_KEY_OF_FIELD = {
    "ram_mib": "ram",
    "cloud_config": "cloud-config",
    "user_data": "user-data",
    "memory_limit_mib": "memory_limit",
    "ram_max_mib": "ram_max",
    "link_down": "link",
}


def _differing_nics(before: tuple[Nic, ...], after: tuple[Nic, ...]) -> list[str]:
    old, new = ({nic.number: nic for nic in nics} for nics in (before, after))
    names = []
    for number in sorted(old.keys() | new.keys()):
        one, other = old.get(number), new.get(number)
        differing = (n for n in ("mac", "bridge") if getattr(one, n, None) != getattr(other, n, None))
        names += [f"nic/{number}/{name}" for name in differing]
        if getattr(one, "down", False) != getattr(other, "down", False):
            names.append(f"nic/{number}/link")
    return names
