"""Local disks as wishes name them: `file:NAME.qcow2` or `file:NAME.raw`, a file of the host. Pure.

The name's ending is the format. What the file holds never is: a guest that wrote another format's header to its own
disk would choose what QEMU reads (https://www.qemu.org/docs/master/system/images.html, on `raw` that is probed).
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Protocol

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.values import MIB_PER_UNIT, Unfit

SCHEME = "file:"
"""What the value of a disk's key begins with when the disk is a file."""

MEDIUM = "iso"
"""The ending of a file that is no disk but a medium: its bytes, as those of a raw disk."""

NAME_LENGTH = 128
"""Characters of a file's name. Arbitrary: half of what file systems allow, so that there is room for more beside it."""

SIZE_MAX = 64 << 40
"""64 TiB. Arbitrary: no host has such a file system, and each program counts as far."""

SIZE_RULE = "a disk's size is a whole number with the unit M, G or T, such as 512M or 20G, from 1M to 64T"

_NAME = re.compile(rf"(?=.{{1,{NAME_LENGTH}}}\Z)[A-Za-z0-9_][A-Za-z0-9_+.-]*\.(?:qcow2|raw)")
_SIZE = re.compile(r"([0-9]{1,12})([MGT])(?:iB)?", re.IGNORECASE)


class Sized(Protocol):
    """A disk of any kind whose key may say how large it is."""

    @property
    def size(self) -> int | None:
        """Bytes that it has at least; None for those that it has."""
        ...

    @property
    def title(self) -> str:
        """As the key names it."""
        ...


class DiskFormat(StrEnum):
    """How a file holds a disk. The values are QEMU's drivers, and the endings of names."""

    QCOW2 = "qcow2"
    RAW = "raw"


@frozen
class FileDisk:
    """A file of the host as a disk of the machine.

    Attributes:
        name: of the file, below the host's `KVM_DISK_DIR`.
        size: bytes that the disk has at least; None for those that it has.
        ro: the guest cannot write to it.
        discard: what the guest discards is given back to the file system.
        iops: most requests per second, None for no limit.
        origin: the image of the library that it begins with; None for an empty disk.
    """

    name: str
    size: int | None = None
    ro: bool = False
    discard: bool = False
    iops: int | None = None
    origin: str | None = None

    def __str__(self) -> str:
        options = (
            *((f"size={size_text(self.size)}",) if self.size is not None else ()),
            *((f"from={self.origin}",) if self.origin is not None else ()),
            *(("ro",) if self.ro else ()),
            *(("discard",) if self.discard else ()),
            *((f"iops={self.iops}",) if self.iops is not None else ()),
        )
        return " ".join((self.title, *options))

    @property
    def title(self) -> str:
        """As the key names it."""
        return f"{SCHEME}{self.name}"

    @property
    def format(self) -> DiskFormat:
        """What the name's ending says."""
        ending = self.name.rpartition(".")[2]
        return DiskFormat.RAW if ending == MEDIUM else DiskFormat(ending)


def file_name(text: str) -> str:
    """The name of a disk's file, checked.

    Raises:
        Unfit: it could lead out of the folder, be taken for an option, or does not say which format it has.
    """
    if not _NAME.fullmatch(text) or ".." in text:
        raise Unfit(
            "a file is file:NAME.qcow2 or file:NAME.raw, below the host's KVM_DISK_DIR: letters, digits and . _ + -, "
            f"beginning with a letter or digit, without a slash or '..', at most {NAME_LENGTH} characters; options "
            "follow after white space: size=, from=, ro, discard, iops="
        )
    return text


def disk_size(text: str) -> int:
    """Bytes, from `512M`, `20G`, `20GiB`, `1T`.

    Without a unit it is refused: `rbd` takes such a number for MiB, `qemu-img` for bytes.
    """
    match = _SIZE.fullmatch(text)
    size = 0 if match is None else int(match[1]) * MIB_PER_UNIT[match[2].lower()] << 20
    if not 0 < size <= SIZE_MAX:
        raise Unfit(SIZE_RULE)
    return size


def size_text(size: int) -> str:
    """`size` bytes as `disk_size` reads them; a size that is no whole number of MiB as bytes, for people."""
    for unit, shift in (("T", 40), ("G", 30), ("M", 20)):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return f"{size} bytes"


def too_small(key: str, disk: Sized, found: int) -> str | None:
    """What is wrong with a size that is less than the disk has; None when nothing is."""
    if disk.size is None or disk.size >= found:
        return None
    right = f"write size={size_text(found)}, or leave size= out" if found % (1 << 20) == 0 else "leave size= out"
    return (
        f"{key}: size={size_text(disk.size)} is less than the {size_text(found)} that {disk.title} has, and a disk is "
        f"never made smaller: {right}"
    )
