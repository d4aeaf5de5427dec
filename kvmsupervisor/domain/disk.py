"""QEMU's arguments for a disk on RBD.

Sources: BlockdevOptionsRbd of the QMP reference (QEMU ≥ 7.2), "Providing secret data to QEMU" in QEMU's system
documentation, and for `werror` docs/decisions/0010-ceph-by-its-tools.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvmsupervisor.domain.spec import RbdImage

SECRET_ID = "ceph0"  # noqa: S105 - the name of an object in QEMU, not a secret
"""Name of QEMU's object that holds the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CephSide:
    """How QEMU reaches Ceph.

    Attributes:
        user: its client's id, without `client.`; None for Ceph's default, `admin`.
        conf: path of ceph.conf, which QEMU's user must be able to read; None for where Ceph looks by itself.
        key_file: path of a file that holds the client's key in base64 and that QEMU's user can read; None for the
            keyring that ceph.conf names.
    """

    user: str | None = None
    conf: str | None = None
    key_file: str | None = None


def secret(side: CephSide) -> Iterator[str]:
    """The object that reads the key, once, before any disk: it is not on the command line."""
    if side.key_file is not None:
        file = side.key_file.replace(",", ",,")
        yield from ("-object", f"secret,id={SECRET_ID},file={file},format=base64")


def rbd_disk(image: RbdImage, side: CephSide, *, name: str, slot: int) -> Iterator[str]:
    """A virtio disk on an image; it needs `secret` before it.

    librbd caches writes back, and a flush of the guest's reaches the image. An I/O error stops the guest (`io-error`):
    Ceph does not fail but waits while it is away, so an error means that this QEMU was fenced, and must not go on as
    if it lived, or that an object is damaged, where a guest that is stopped loses nothing.
    """
    options: dict[str, Any] = {
        "driver": "rbd",
        "node-name": name,
        "pool": image.pool,
        "image": image.image,
        "cache": {"direct": False, "no-flush": False},
        "discard": "unmap",
    }
    if side.conf is not None:
        options["conf"] = side.conf
    if side.user is not None:
        options["user"] = side.user
    if side.key_file is not None:
        options |= {"key-secret": SECRET_ID, "auth-client-required": ["cephx"]}
    yield from ("-blockdev", json.dumps(options, separators=(",", ":")))
    yield from ("-device", f"virtio-blk-pci,drive={name},write-cache=on,werror=stop,rerror=stop,addr={slot:#x}")
