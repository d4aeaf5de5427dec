"""The keys of a clone: the original's, without what no two machines may have, with disks that begin as its. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import SCHEME, FileDisk
from kvmsupervisor.domain.snapshots import KEY, ROLLBACK, stored
from kvmsupervisor.domain.spec import Disk, RbdDisk, Spec

OWN = frozenset({"spice_port", "forward", "power", "restart_request", ROLLBACK})
"""Keys that a clone does not get: ports that the original has, and orders that were given to it."""

AUTO = "auto"
"""In place of a MAC address: the command line writes one that no NIC has."""

_MAC = re.compile(r"mac|nic/[0-9]+/mac")


class Unclonable(ValueError):
    """It cannot be cloned so. The message says why, and what would help."""


@frozen(kw_only=True)
class Clone:
    """What is to be written.

    Attributes:
        keys: of the new instance.
        images: the disks that begin with the original's snapshot, by key.
        files: the disks that are copies of files of the original's host, by key: the original's names of them.
    """

    keys: Mapping[str, str]
    images: Mapping[str, str]
    files: Mapping[str, str]


def clone(
    source: InstanceId,
    new: InstanceId,
    *,
    keys: Mapping[str, str],
    spec: Spec,
    given: Mapping[str, str],
    snapshot: str,
    full: bool,
    taken: Collection[str],
) -> Clone:
    """What a clone's keys are.

    Args:
        source: the original.
        new: the clone.
        keys: the original's, its secrets included.
        spec: the machine that they describe.
        given: what people want otherwise: these win.
        snapshot: of the original, with which images in Ceph begin.
        full: whether they are copies, and no clones.
        taken: the disks that keys of other machines name, by title.

    Raises:
        Unclonable: a new disk would have a name that another machine's has.
    """
    found = {name: value for name, value in keys.items() if name not in OWN and not name.startswith(KEY)}
    found |= {name: AUTO for name in found if _MAC.fullmatch(name)}
    images: dict[str, str] = {}
    files: dict[str, str] = {}
    for disk in spec.all_disks:
        if disk.ro or disk.key in given or _other_key(disk) in given:
            # Many may read one disk.
            if disk.key not in given and _other_key(disk) in given:
                del found[disk.key]
            continue
        wanted = _disk(disk, source, new, snapshot=snapshot, full=full)
        if wanted.title in taken:
            raise Unclonable(
                f"{disk.key} would be {wanted.title}, which is a disk of another instance: give it a name of its own "
                f"by {disk.key}='…'"
            )
        found[disk.key] = str(wanted)
        (images if disk.file is None else files)[disk.key] = disk.name
    return Clone(keys=found | dict(given), images=images, files=files)


def _other_key(disk: Disk) -> str:
    """The other name of the first disk's key."""
    return {"rbd": "disk/0", "disk/0": "rbd"}.get(disk.key, "")


def _disk(disk: Disk, source: InstanceId, new: InstanceId, *, snapshot: str, full: bool) -> RbdDisk | FileDisk:
    number = f"-{disk.number}" if disk.number else ""
    if disk.file is not None:
        stem, dot, ending = disk.file.name.rpartition(".")
        name = f"{_renamed(stem, source, new, f'{new}{number}')}{dot}{ending}"
        return replace(disk.file, name=name, origin=f"{SCHEME}{disk.file.name}")
    image = disk.rbd
    assert image is not None
    namespace = _renamed(image.namespace, source, new, image.namespace)
    # In a namespace of its own it need not have another name.
    otherwise = f"{new}{number}" if namespace == image.namespace else image.image
    name = _renamed(image.image, source, new, otherwise)
    return replace(image, image=name, namespace=namespace, origin=f"{image.name}@{stored(snapshot)}", copy=full)


def _renamed(name: str, source: str, new: str, otherwise: str) -> str:
    """A name with the original's id replaced where it has that as a word; `otherwise` where it has not."""
    renamed, times = re.subn(rf"(?<![A-Za-z0-9]){re.escape(source)}(?![A-Za-z0-9])", new.replace("\\", r"\\"), name)
    return renamed if times else otherwise
