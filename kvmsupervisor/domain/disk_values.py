"""Disks as the values of their keys write them: where the disk is, then its options. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from kvmsupervisor.domain import values
from kvmsupervisor.domain.local_disk import SCHEME, FileDisk, disk_size, file_name
from kvmsupervisor.domain.spec import FIRST_DISK, RbdDisk
from kvmsupervisor.domain.values import Unfit, show

_iops = values.integer(1, 10**9, "iops")

_RBD_NAME = r"[^-/@\s\x00-\x1f\x7f][^/@\s\x00-\x1f\x7f]*"
"""None begins with a hyphen: Ceph's own tools would take it for an option, whoever types it."""

_RBD = re.compile(f"/?({_RBD_NAME})/({_RBD_NAME})")


def rbd_disk(text: str) -> RbdDisk:
    """An image in Ceph, `[/]POOL/IMAGE`, and its options."""
    name, *options = text.split()
    if name.startswith(SCHEME):
        raise Unfit(f"it is an image in Ceph, POOL/IMAGE; a file of the host is the first disk by the key {FIRST_DISK}")
    match = _RBD.fullmatch(name)
    if match is None or not name.isprintable():
        raise Unfit(
            "it is /POOL/IMAGE or POOL/IMAGE, without a snapshot (@), no name beginning with '-'; options follow after "
            "white space: ro, discard, iops=N"
        )
    given = _disk_options(options)
    if "size" in given:
        raise Unfit("size= is of disks that are files; an image in Ceph is made by `rbd create`, grown by `rbd resize`")
    return RbdDisk(match[1], match[2], ro="ro" in given, discard="discard" in given, iops=given.get("iops"))


def any_disk(text: str) -> RbdDisk | FileDisk:
    """An image in Ceph, or a file of the host, `file:NAME.qcow2` or `file:NAME.raw`, and its options."""
    name, *options = text.split()
    if not name.startswith(SCHEME):
        return rbd_disk(text)
    file, given = file_name(name.removeprefix(SCHEME)), _disk_options(options)
    if "ro" in given and "size" in given:
        raise Unfit("a disk that is only read (ro) is neither made nor grown: leave size= out, or ro")
    return FileDisk(
        file, size=given.get("size"), ro="ro" in given, discard="discard" in given, iops=given.get("iops")
    )  # fmt: skip


def _disk_options(options: Iterable[str]) -> dict[str, int]:
    """What stands behind a disk's name, by the option's name: the same words for every kind of disk."""
    given: dict[str, int] = {}
    for option in options:
        word, equals, value = option.partition("=")
        if word in given:
            raise Unfit(f"each option is given once, {word} is there twice")
        if (word, equals) in {("ro", ""), ("discard", "")}:
            given[word] = True
        elif (word, equals) == ("iops", "="):
            given[word] = _iops(value)
        elif (word, equals) == ("size", "="):
            given[word] = disk_size(value)
        else:
            raise Unfit(
                "behind the disk stand the options ro, discard, iops=N and, of a file, size=20G, separated by white "
                f"space; {show(word)} is none of them"
            )
    return given
