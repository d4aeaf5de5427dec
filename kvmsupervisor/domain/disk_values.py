"""Disks as the values of their keys write them: where the disk is, then its options. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypedDict

from kvmsupervisor.domain import values
from kvmsupervisor.domain.images import is_of_library, local_file_of, origin, snapshot_of
from kvmsupervisor.domain.local_disk import SCHEME, FileDisk, disk_size, file_name
from kvmsupervisor.domain.spec import FIRST_DISK, RbdDisk
from kvmsupervisor.domain.values import Unfit, show

_iops = values.integer(1, 10**9, "iops")

_RBD_NAME = r"[^-/@\s\x00-\x1f\x7f][^/@\s\x00-\x1f\x7f]*"
"""None begins with a hyphen: Ceph's own tools would take it for an option, whoever types it."""

_RBD = re.compile(f"/?({_RBD_NAME})/(?:({_RBD_NAME})/)?({_RBD_NAME})")


def rbd_disk(text: str) -> RbdDisk:
    """An image in Ceph, `[/]POOL[/NAMESPACE]/IMAGE`, and its options."""
    name, *options = text.split()
    if name.startswith(SCHEME):
        raise Unfit(f"it is an image in Ceph, POOL/IMAGE; a file of the host is the first disk by the key {FIRST_DISK}")
    match = _RBD.fullmatch(name)
    if match is None or not name.isprintable():
        raise Unfit(
            "it is POOL/IMAGE or POOL/NAMESPACE/IMAGE, a slash before it or none, without a snapshot (@), no name "
            "beginning with '-'; options follow after white space: size=, from=, copy, ro, discard, iops=N"
        )
    given, copy = _disk_options(options)
    if given["origin"] is not None and local_file_of(given["origin"]) is not None:
        raise Unfit("a disk in Ceph begins with an image of the library, from=NAME, or a snapshot, POOL/IMAGE@SNAP")
    return RbdDisk(match[1], match[3], namespace=match[2] or "", copy=copy, **given)


def any_disk(text: str) -> RbdDisk | FileDisk:
    """An image in Ceph, or a file of the host, `file:NAME.qcow2` or `file:NAME.raw`, and its options."""
    name, *options = text.split()
    if not name.startswith(SCHEME):
        return rbd_disk(text)
    file, (given, copy) = file_name(name.removeprefix(SCHEME)), _disk_options(options)
    if given["origin"] is not None and snapshot_of(given["origin"]) is not None:
        raise Unfit(
            "a file begins with an image of the library, from=NAME, or with another file of its host, from=file:NAME; "
            "a snapshot is for disks in Ceph"
        )
    if given["origin"] is not None and local_file_of(given["origin"]) == file:
        raise Unfit("a disk does not begin with itself: from= names another file")
    if copy:
        raise Unfit("a file is always a whole copy of what it begins with: leave copy out")
    return FileDisk(file, **given)


class _Options(TypedDict):
    size: int | None
    origin: str | None
    ro: bool
    discard: bool
    iops: int | None


def _disk_options(options: Iterable[str]) -> tuple[_Options, bool]:
    """What stands behind a disk's name: the same words for every kind of disk; and whether `copy` does."""
    copy = False
    found = _Options(size=None, origin=None, ro=False, discard=False, iops=None)
    seen: set[str] = set()
    for option in options:
        word, equals, value = option.partition("=")
        if word in seen:
            raise Unfit(f"each option is given once, {word} is there twice")
        seen.add(word)
        match word, equals:
            case "ro", "":
                found["ro"] = True
            case "discard", "":
                found["discard"] = True
            case "copy", "":
                copy = True
            case "iops", "=":
                found["iops"] = _iops(value)
            case "size", "=":
                found["size"] = disk_size(value)
            case "from", "=":
                found["origin"] = origin(value)
            case _:
                raise Unfit(
                    "behind the disk stand the options size=20G, from=IMAGE, copy, ro, discard and iops=N, separated "
                    f"by white space; {show(word)} is none of them"
                )
    if found["ro"] and not (found["size"] is None and found["origin"] is None):
        raise Unfit("a disk that is only read (ro) is neither made nor grown: leave size= and from= out, or ro")
    if copy and (found["origin"] is None or is_of_library(found["origin"])):
        raise Unfit("copy is for a disk in Ceph that begins with a snapshot, from=POOL/IMAGE@SNAP: it is no clone then")
    return found, copy
