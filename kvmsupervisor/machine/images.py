"""RBD images as a start needs them: looked at before it, made for UEFI variables, the key to them, and their growth.

All that is asked of Ceph for one start is asked at once, before a lock is taken: a start that cannot succeed takes
nothing, and one that can waits for the slowest answer only. Nothing is asked for a machine without such a disk.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvmsupervisor.adapters.ceph import Ceph, CephAway, CephError, NoSuchImage
from kvmsupervisor.aio import all_of, both
from kvmsupervisor.domain.ceph import leaves_no_trace
from kvmsupervisor.domain.spec import RbdDisk, Spec
from kvmsupervisor.domain.storage import growable, nvram_of

RETRY_S = 10.0
"""Pause before an image is looked at again that is not as it must be: how late one is noticed that was made."""

AWAY_RETRY_S = 2.0
"""The same when Ceph does not answer. Each attempt waits for an answer for some seconds already."""


class DiskTrouble(Exception):
    """An image, or Ceph, is not as this start needs it. The message says what, and what would help.

    Attributes:
        retry_s: how soon it is worth looking again.
    """

    def __init__(self, reason: str, retry_s: float = RETRY_S) -> None:
        super().__init__(reason)
        self.retry_s = retry_s


class Disks:
    """The images of one host's machines.

    Args:
        ceph: the cluster.
        allow_unfenced: whether images without `exclusive-lock` may be written to (`KVM_ALLOW_UNFENCED`, law 5).
    """

    def __init__(self, ceph: Ceph, *, allow_unfenced: bool = False) -> None:
        self._ceph = ceph
        self._allow_unfenced = allow_unfenced

    async def check(self, spec: Spec) -> str:
        """Look whether QEMU could open every image of `spec`, and may (law 5); return the key for it, base64.

        Raises:
            DiskTrouble: an image is missing or refused, Ceph refuses this host, or does not answer.
        """
        variables = nvram_of(spec)
        looks = [self._check(image, disk.key, needs_lock=not image.ro) for disk, image in spec.images]
        if variables is not None:
            looks.append(self._check(variables, "firmware", needs_lock=True, may_be_missing=True))
        try:
            key, _ = await both(self._ceph.key(), all_of(looks))
        except CephError as error:
            raise _trouble(error) from error
        return key

    async def _check(self, image: RbdDisk, key: str, *, needs_lock: bool, may_be_missing: bool = False) -> None:
        try:
            info = await self._ceph.image_info(image)
        except NoSuchImage as error:
            if may_be_missing and "pool" not in str(error).partition(":")[0]:
                return
            raise DiskTrouble(f"{key}: {error}; `rbd create` makes one") from error
        if needs_lock and not info.has_exclusive_lock and not self._allow_unfenced:
            raise DiskTrouble(f"{key}: {leaves_no_trace(image.name)}")

    async def furnish_variables(self, image: RbdDisk, template: Path) -> None:
        """Make the image of UEFI variables of `template` unless there is one. Only for who holds the instance's lock.

        Raises:
            DiskTrouble: it cannot be made.
        """
        try:
            await self._ceph.import_image(image, template)
        except CephError as error:
            raise _trouble(error) from error

    async def sizes(self, spec: Spec) -> dict[str, int]:
        """How many bytes the images have that may grow, by block node; those are left out that cannot be told now."""
        found = growable(spec)
        sizes = await asyncio.gather(*(self._size(image) for image in found.values()))
        return {node: size for node, size in zip(found, sizes, strict=True) if size is not None}

    async def _size(self, image: RbdDisk) -> int | None:
        try:
            return (await self._ceph.image_info(image)).size
        except CephError:
            return None


def _trouble(error: CephError) -> DiskTrouble:
    return DiskTrouble(str(error), AWAY_RETRY_S if isinstance(error, CephAway) else RETRY_S)
