"""RBD images as a start needs them: checks them, makes those for UEFI variables, reads the key and their sizes.

All queries for one start run at the same time, before the lock is taken. So a start that cannot succeed takes no lock,
and one that can succeed waits for the slowest answer only. A machine without RBD disks asks Ceph nothing.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvmsupervisor.adapters.ceph import Ceph, CephAway, CephError, NoSuchImage
from kvmsupervisor.aio import all_of, both
from kvmsupervisor.domain.ceph import PRIMARIES, leaves_no_trace, reads_replicas
from kvmsupervisor.domain.spec import RbdDisk, Spec
from kvmsupervisor.domain.storage import growable, nvram_of

RETRY_S = 10.0
"""Pause before an unsuitable image is checked again. Arbitrary; whoever makes the image should not wait long."""

AWAY_RETRY_S = 2.0
"""The same when Ceph does not answer. Short, because each attempt already waits some seconds for an answer."""


class DiskTrouble(Exception):
    """An image, or Ceph, does not allow this start. The message says what was found and what would help.

    Attributes:
        retry_s: seconds until the next attempt.
    """

    def __init__(self, reason: str, retry_s: float = RETRY_S) -> None:
        super().__init__(reason)
        self.retry_s = retry_s


class Disks:
    """The images of all instances of one host.

    Args:
        ceph: the cluster.
        allow_unfenced: whether images without `exclusive-lock`, or of which replicas are read, are allowed
            (`KVM_ALLOW_UNFENCED`, law 5).
    """

    def __init__(self, ceph: Ceph, *, allow_unfenced: bool = False) -> None:
        self._ceph = ceph
        self._allow_unfenced = allow_unfenced

    async def check(self, spec: Spec) -> str:
        """Check that QEMU can and may open every image of `spec` (law 5); return the Ceph key, base64.

        One that is made when it is missing may be missing; `contents.py` looks at it.

        Raises:
            DiskTrouble: an image is missing or not allowed, or Ceph refuses this host or does not answer.
        """
        variables = nvram_of(spec)
        looks = [
            self._check(image, disk.key, is_written=not image.ro, may_be_missing=image.may_be_made)
            for disk, image in spec.images
        ]
        if variables is not None:
            looks.append(self._check(variables, "firmware", is_written=True, may_be_missing=True))
        try:
            key, _ = await both(self._ceph.key(), all_of(looks))
        except CephError as error:
            raise trouble_of(error) from error
        return key

    async def _check(self, image: RbdDisk, key: str, *, is_written: bool, may_be_missing: bool = False) -> None:
        is_fenced = is_written and not self._allow_unfenced
        try:
            if is_fenced:
                info, policy = await both(self._ceph.image_info(image), self._ceph.read_policy(image))
            else:
                info, policy = await self._ceph.image_info(image), PRIMARIES
        except NoSuchImage as error:
            if may_be_missing and "pool" not in str(error).partition(":")[0]:
                return
            raise DiskTrouble(f"{key}: {error}; `rbd create` makes one") from error
        if is_fenced and not info.has_exclusive_lock:
            raise DiskTrouble(f"{key}: {leaves_no_trace(image.name)}")
        if policy != PRIMARIES:
            raise DiskTrouble(f"{key}: {reads_replicas(image.name, policy)}")

    async def furnish_variables(self, image: RbdDisk, template: Path) -> None:
        """Make the image of UEFI variables from `template`, unless it exists. The caller holds the instance's lock.

        Raises:
            DiskTrouble: the image cannot be made.
        """
        try:
            await self._ceph.import_image(image, template)
        except CephError as error:
            raise trouble_of(error) from error

    async def sizes(self, spec: Spec) -> dict[str, int]:
        """Sizes in bytes of the images that can grow, by block node; without those that Ceph does not tell now."""
        found = growable(spec)
        sizes = await asyncio.gather(*(self._size(image) for image in found.values()))
        return {node: size for node, size in zip(found, sizes, strict=True) if size is not None}

    async def _size(self, image: RbdDisk) -> int | None:
        try:
            return (await self._ceph.image_info(image)).size
        except CephError:
            return None


def trouble_of(error: CephError, key: str | None = None) -> DiskTrouble:
    """What an error of Ceph's is for a start; `key` names the disk where it is one's."""
    said = str(error) if key is None else f"{key}: {error}"
    return DiskTrouble(said, AWAY_RETRY_S if isinstance(error, CephAway) else RETRY_S)
