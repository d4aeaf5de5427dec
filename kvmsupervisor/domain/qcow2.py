"""Headers of qcow2 images: what they say is read before QEMU sees the file, and new ones are made. Pure.

Whoever can write a file here may name another file in its header: a backing file, or one that holds the data. QEMU
would open that by its name. Source: docs/interop/qcow2.txt of QEMU
(https://www.qemu.org/docs/master/interop/qcow2.html).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from kvmsupervisor.domain.frozen import frozen

MAGIC = b"QFI\xfb"

HEADER_BYTES = 64 << 10
"""How much of a file `read` wants: header and extensions lie in the first cluster, and those of all images that QEMU
makes are far shorter."""

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")

_CORRUPT, _EXTERNAL_DATA = 1 << 1, 1 << 2
_KNOWN_INCOMPATIBLE = 0b11111
_EXTENSION_END, _EXTENSION_DATA_FILE, _EXTENSION_ENCRYPTION = 0, 0x44415441, 0x0537BE77

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_REFCOUNT_ORDER = 4
_L2_COVERS = _CLUSTER * (_CLUSTER // 8)
"""Bytes of the disk that one table of the second level maps."""


_SNAPSHOT = struct.Struct(">QIHHIIQII")
_SNAPSHOT_SIZES = struct.Struct(">QQ")

SNAPSHOT_BYTES = 256
"""Bytes that one entry of the table of snapshots takes at most, where QEMU has written it for a name of ours."""

MOST_SNAPSHOTS = 4096
"""Snapshots of an image that are read. Arbitrary: QEMU itself takes 65536."""


class Refused(ValueError):
    """The file is no image that may be opened. The message says why, as a clause whose subject is the file."""


@frozen
class Internal:
    """A snapshot within an image: its name, seconds since 1970 when it was taken, and bytes of the disk then."""

    name: str
    at: int
    size: int


def table_of(head: bytes) -> tuple[int, int]:
    """Where the table of snapshots begins in the file, and how many entries it has; of an image that may be opened."""
    *_, count, offset = _V2.unpack_from(head)
    return offset, min(count, MOST_SNAPSHOTS)


def snapshots(table: bytes, count: int) -> tuple[Internal, ...]:
    """The entries of a table of snapshots; those that are not whole in `table` are left out."""
    found, at = [], 0
    for _ in range(count):
        if at + _SNAPSHOT.size > len(table):
            break
        _, _, id_length, length, seconds, _, _, _, more = _SNAPSHOT.unpack_from(table, at)
        sizes, name_at = at + _SNAPSHOT.size, at + _SNAPSHOT.size + more + id_length
        if name_at + length > len(table):
            break
        size = _SNAPSHOT_SIZES.unpack_from(table, sizes)[1] if more >= _SNAPSHOT_SIZES.size else 0
        found.append(Internal(table[name_at : name_at + length].decode(errors="replace"), seconds, size))
        at = (name_at + length + 7) & ~7
    return tuple(found)


def virtual_size(head: bytes) -> int:
    """Bytes of the disk, of an image that is whole in itself.

    Args:
        head: the beginning of the file, `HEADER_BYTES` or all of it.

    Raises:
        Refused: it is no qcow2 image, or one that needs another file or a secret.
    """
    if len(head) < _V2.size or head[:4] != MAGIC:
        raise Refused("is no qcow2 image, as its name says: name it .raw if it is the bytes of a disk, or convert it")
    _, version, backing, _, bits, size, encryption, *_ = _V2.unpack_from(head)
    if version not in {2, 3}:
        raise Refused(f"is a qcow2 image of version {version}; 2 and 3 are known")
    if backing:
        raise Refused(
            "needs a backing file, which could be any file of this host: make it whole by `qemu-img convert -O qcow2`, "
            "where that file is one that you know"
        )
    if encryption:
        raise Refused(_ENCRYPTED)
    length = _V2.size if version == 2 else _look_at_features(head)
    if not 9 <= bits <= 21 or not _V2.size <= length <= len(head):
        raise Refused(_SENSELESS)
    for kind in _extensions(head[: 1 << bits], length):
        if kind == _EXTENSION_DATA_FILE:
            raise Refused(_ELSEWHERE)
        if kind == _EXTENSION_ENCRYPTION:
            raise Refused(_ENCRYPTED)
    return int(size)


def _look_at_features(head: bytes) -> int:
    """The length of a header of version 3.

    Raises:
        Refused: it has a feature with which the image cannot be opened here.
    """
    if len(head) < _V2.size + _V3.size:
        raise Refused(_SENSELESS)
    incompatible, _, _, _, length = _V3.unpack_from(head, _V2.size)
    if incompatible & _EXTERNAL_DATA:
        raise Refused(_ELSEWHERE)
    if incompatible & _CORRUPT:
        raise Refused("is marked as corrupt: see `qemu-img check`")
    if incompatible & ~_KNOWN_INCOMPATIBLE:
        raise Refused(f"has features that are not known here (incompatible features {incompatible:#x})")
    return int(length)


_SENSELESS = "has a header that makes no sense"
_ENCRYPTED = "is encrypted, and there is no key for it"
_ELSEWHERE = (
    "keeps its data in another file, which could be any file of this host: make it whole by `qemu-img convert -O qcow2`"
)


def _extensions(head: bytes, at: int) -> Iterator[int]:
    """The kinds of the header's extensions.

    Raises:
        Refused: one reaches beyond the cluster.
    """
    while at + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, at)
        if kind == _EXTENSION_END:
            return
        yield kind
        at += _EXTENSION.size + (length + 7) // 8 * 8
        if at > len(head):
            raise Refused(_SENSELESS)


def empty(size: int) -> bytes:
    """The file of a disk of `size` bytes that holds nothing yet: header, reference counts, and an empty map.

    The layout is that of `qemu-img create`: clusters of 64 KiB, counts of 16 bits.
    """
    entries = -(-size // _L2_COVERS)
    map_clusters = -(-entries * 8 // _CLUSTER) or 1
    clusters = 3 + map_clusters
    header = _V2.pack(MAGIC, 3, 0, 0, _CLUSTER_BITS, size, 0, entries, 3 * _CLUSTER, _CLUSTER, 1, 0, 0)
    header += _V3.pack(0, 0, 0, _REFCOUNT_ORDER, _V2.size + _V3.size)
    table = struct.pack(">Q", 2 * _CLUSTER)
    counts = struct.pack(">H", 1) * clusters
    return b"".join(part.ljust(_CLUSTER, b"\0") for part in (header, table, counts)) + bytes(map_clusters * _CLUSTER)
