"""RBD images as a start needs them: checks them, makes those for UEFI variables, reads the key and their sizes.

All queries for one start run at the same time, before the lock is taken. So a start that cannot succeed takes no lock,
and one that can succeed waits for the slowest answer only. A machine without RBD disks asks Ceph nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from kvmsupervisor.adapters.ceph import Ceph, CephAway, CephError, CephRefused, NoSuchImage, image_of
from kvmsupervisor.aio import Remembered, all_of, both
from kvmsupervisor.domain.ceph import PRIMARIES, READ_POLICY_OF_IMAGE, ImageInfo, leaves_no_trace, reads_replicas
from kvmsupervisor.domain.images import LIBRARY_NAMESPACE, snapshot_of
from kvmsupervisor.domain.keys import InstanceId
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


POLICY_S = 10.0
"""For how long it is remembered from which OSDs a pool is read, for images that were just made in it. As little as a
start may take between its own look and its guest's first read: people may change it at any time."""


class Law5:
    """Which images may be opened: looks at them by law 5.

    Args:
        ceph: the cluster.
        allow_unfenced: see `Disks`.
    """

    def __init__(self, ceph: Ceph, *, allow_unfenced: bool = False) -> None:
        self._ceph = ceph
        self._allow_unfenced = allow_unfenced
        self._policies = Remembered[str](POLICY_S)

    async def look(self, image: RbdDisk, key: str, *, is_likely: bool = True) -> ImageInfo:
        """Look at an image.

        Args:
            image: as the machine has it.
            key: of the disk.
            is_likely: whether it most likely is there: then all that is asked is asked at once.

        Raises:
            NoSuchImage: it, or its pool, is not there.
            CephError: it is not known.
            DiskTrouble: it may not be opened.
        """
        policy = PRIMARIES
        if image.ro or self._allow_unfenced:
            return await self._ceph.image_info(image)
        if is_likely:
            info, policy = await both(self._ceph.image_info(image), self._ceph.read_policy(image))
        else:
            info = await self._ceph.image_info(image)
            policy = await self._ceph.read_policy(image)
        if not info.has_exclusive_lock:
            raise DiskTrouble(f"{key}: {leaves_no_trace(image.name)}")
        _judge(image, key, policy)
        return info

    async def look_at_new(self, image: RbdDisk, key: str, metadata: Mapping[str, str]) -> None:
        """The same for an image that was just made with the features that it has to have, with this metadata.

        A clone begins with the metadata of its parent, settings included.

        Raises:
            CephError: it is not known.
            DiskTrouble: it may not be opened.
        """
        if image.ro or self._allow_unfenced:
            return
        policy = metadata.get(READ_POLICY_OF_IMAGE)
        if policy is None:
            policy = await self._policies.get(image.pool, lambda: self._ceph.pool_policy(image.pool))
        _judge(image, key, policy)


def _judge(image: RbdDisk, key: str, policy: str) -> None:
    if policy != PRIMARIES:
        raise DiskTrouble(f"{key}: {reads_replicas(image.name, policy)}")


class Disks:
    """The images of all instances of one host.

    Args:
        ceph: the cluster.
        allow_unfenced: whether images without `exclusive-lock`, or of which replicas are read, are allowed
            (`KVM_ALLOW_UNFENCED`, law 5).
    """

    def __init__(self, ceph: Ceph, *, allow_unfenced: bool = False) -> None:
        self._ceph = ceph
        self._law = Law5(ceph, allow_unfenced=allow_unfenced)

    @property
    def guests_apart(self) -> bool:
        """Whether guests have Ceph clients of their own."""
        return self._ceph.access.guests_apart

    async def check(self, instance: InstanceId, spec: Spec, *, but_made: bool = False) -> str:
        """Check that QEMU can and may open every image of `spec` (law 5); return its Ceph key, base64.

        One that is made when it is missing may be missing; `contents.py` looks at it. Where the guest has a client of
        its own, that one looks, too: nothing is done for an instance with an image that is not its guest's.

        Args:
            instance: whose.
            spec: of the machine.
            but_made: leave out the images that are made when they are missing, because `contents.py` looks at them
                by the same law. The guest's client looks at all.

        Raises:
            DiskTrouble: an image is missing or not allowed, or Ceph refuses this host or does not answer.
        """
        guest = self._ceph.of_guest(instance)
        variables = nvram_of(spec)
        looks = [
            self._check(image, disk.key, may_be_missing=image.may_be_made)
            for disk, image in spec.images
            if not (but_made and image.may_be_made)
        ]
        if variables is not None:
            looks.append(self._check(variables, "firmware", may_be_missing=True))
        try:
            if guest is None:
                key, _ = await both(self._ceph.key(), all_of(looks))
            else:
                key, _ = await both(_admitted(guest, instance, spec), all_of(looks))
        except CephError as error:
            raise trouble_of(error) from error
        return key

    async def admit(self, instance: InstanceId, spec: Spec) -> None:
        """Check that the guest's own client, where it has one, may open what its machine names.

        Raises:
            DiskTrouble: it may not, or Ceph does not say.
        """
        guest = self._ceph.of_guest(instance)
        if guest is not None:
            try:
                await _admitted(guest, instance, spec)
            except CephError as error:
                raise trouble_of(error) from error

    async def _check(self, image: RbdDisk, key: str, *, may_be_missing: bool = False) -> None:
        try:
            await self._law.look(image, key)
        except NoSuchImage as error:
            if may_be_missing and not error.lacks_place:
                return
            helps = "" if error.lacks_place else "; `rbd create` makes one"
            raise DiskTrouble(f"{key}: {error}{helps}") from error

    async def furnish_variables(self, image: RbdDisk, template: Path) -> None:
        """Make the image of UEFI variables from `template`, unless it exists. The caller holds the instance's lock.

        Raises:
            DiskTrouble: the image cannot be made.
        """
        try:
            await self._ceph.import_image(image, template)
        except CephError as error:
            raise trouble_of(error) from error

    async def sizes(self, spec: Spec, tell: Callable[[str], None]) -> dict[str, int]:
        """Sizes in bytes of the images that can grow, by block node; without those that Ceph does not tell now.

        Args:
            spec: the machine.
            tell: is told why, for people, of each of those.
        """
        found = growable(spec)
        sizes = await asyncio.gather(*(self._size(image, tell) for image in found.values()))
        return {node: size for node, size in zip(found, sizes, strict=True) if size is not None}

    async def _size(self, image: RbdDisk, tell: Callable[[str], None]) -> int | None:
        try:
            return (await self._ceph.image_info(image)).size
        except CephError as error:
            tell(f"whether {image.name} has grown is not known: {error}")
            return None


async def _admitted(guest: Ceph, instance: InstanceId, spec: Spec) -> str:
    """Check that the guest's own client may open what its machine names; return its key.

    Raises:
        CephError: it has no key, or may not. The message says what would help.
    """
    user = guest.access.user
    try:
        path, key = await guest.keyring()
    except CephRefused as error:
        made = f"`config/ceph-client create {user} {_place(spec)}` makes client and keyring"
        raise CephRefused(f"{error}. The guest of {instance} has a client of its own here (CEPH_ID): {made}") from error

    async def look(image: RbdDisk) -> None:
        try:
            await guest.image_info(image)
        except NoSuchImage:
            pass  # where it has to be there, the supervisor's own look says so
        except CephRefused as error:
            raise CephRefused(
                f"{image.name} is not open to the guest of {instance}: {error}. Its keyring is {path}: "
                f"`config/ceph-client show {user}` prints that which Ceph has, and what it may open"
            ) from error

    await all_of(map(look, _opened_by(spec)))
    return key


def _place(spec: Spec) -> str:
    return spec.images[0][1].place if spec.images else "POOL/NAMESPACE"


def _opened_by(spec: Spec) -> set[RbdDisk]:
    """The images that QEMU opens when it runs `spec`, and those that they begin with."""
    opened = {RbdDisk.named(image.name) for _, image in spec.images}
    if (variables := nvram_of(spec)) is not None:
        opened.add(variables)
    for _, image in spec.images:
        snapshot = None if image.origin is None else snapshot_of(image.origin)
        if snapshot is not None:
            opened.add(image_of(snapshot))
        elif image.origin is not None and image.namespace:
            # Whichever it is: what counts is the namespace.
            opened.add(RbdDisk(image.pool, image.origin, namespace=LIBRARY_NAMESPACE))
    return opened


def trouble_of(error: CephError, key: str | None = None) -> DiskTrouble:
    """What an error of Ceph's is for a start; `key` names the disk where it is one's."""
    said = str(error) if key is None else f"{key}: {error}"
    return DiskTrouble(said, AWAY_RETRY_S if isinstance(error, CephAway) else RETRY_S)
