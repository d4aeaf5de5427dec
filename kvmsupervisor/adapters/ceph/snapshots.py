"""Snapshots of images in Ceph: taken, named, kept from being removed, taken away, rolled back to.

While QEMU has an image open, `rbd` asks its client to take or rename a snapshot: what the guest has written before is
in it. `rbd snap rollback` takes the image's lock from whoever has it, a running QEMU included, so its caller must know
that nobody runs. Sources: rbd(8); tried with Ceph 16.2 and QEMU 7.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from kvmsupervisor.adapters.ceph.access import destined, located
from kvmsupervisor.adapters.ceph.client import Ceph
from kvmsupervisor.adapters.ceph.errors import CephAway
from kvmsupervisor.adapters.ceph.images import SnapshotInUse
from kvmsupervisor.domain.ceph import SnapshotInfo, parse_children, parse_metadata, parse_snapshots
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.domain.words import option

CHANGE_S = 60.0
"""How long a change may take that nobody waits for with a guest that stands still."""

ROLLBACK_S, SLOWEST = 600.0, 32 << 20
"""How long a rollback may take: so many seconds, and one more for each so many bytes. It asks for each object of 4 MiB,
some ten at once."""

ROLLED_BACK = "kvmsupervisor.rollback"
"""The entry of an image's metadata that holds the last request for which it was rolled back."""

_CEPH_TIME = "%a %b %d %H:%M:%S %Y"


class CephSnapshots:
    """The snapshots of one cluster's images, as one client sees them.

    Args:
        ceph: the cluster.
        host: the cluster as the supervisor's client sees it, where that is another one.
    """

    def __init__(self, ceph: Ceph, *, host: Ceph | None = None) -> None:
        self._ceph = ceph
        self._host = host

    def of_guest(self, instance: str) -> CephSnapshots:
        """As the guest of an instance sees them: those of no images that it may not write to."""
        guest = self._ceph.of_guest(instance)
        return self if guest is None else CephSnapshots(guest, host=self._ceph)

    async def free(self, image: RbdDisk) -> None:
        """Shut out for good who has left an image locked and has it open no more: a guest's own client may not.

        Only for an image that the guest may open, and while nobody runs it.
        """
        if self._host is None:
            return
        await self.of(image)
        # Owners first: whoever takes the lock after that has the image open.
        owners = await self._host.lock_owners(image)
        if dead := owners - await self._host.watchers(image):
            await self._host.fence(dead)
            await self._host.break_locks(image, dead)

    async def of(self, image: RbdDisk) -> Mapping[str, SnapshotInfo]:
        """Those of an image, by name.

        Raises:
            NoSuchImage: it, or its pool, is not there.
        """
        return await self._ceph.ask(parse_snapshots, "rbd", "snap", "ls", *located(image), "--format", "json")

    async def clones(self, image: RbdDisk, snap: str) -> tuple[str, ...]:
        """The clones of one, as people name them."""
        where = (*_at(image, snap), "--format", "json")
        return await self._ceph.ask(parse_children, "rbd", "children", *where)

    async def create(self, image: RbdDisk, snap: str) -> None:
        """Take one.

        Raises:
            CephFailed: there is one of that name, or Ceph is full.
        """
        await self._change("create", "--no-progress", *_at(image, snap))

    async def rename(self, image: RbdDisk, snap: str, name: str) -> None:
        """Give one another name.

        Raises:
            CephFailed: there is one of that name.
        """
        await self._change("rename", *_at(image, snap), *destined(image), option("--dest-snap", name))

    async def protect(self, image: RbdDisk, snap: str) -> None:
        """Keep one from being removed, so that clones of it can be made."""
        await self._change("protect", *_at(image, snap))

    async def remove(self, image: RbdDisk, snap: str, *, is_protected: bool) -> None:
        """Take one away.

        Raises:
            SnapshotInUse: it has clones by now; nothing was done.
        """
        if is_protected:
            try:
                await self._change("unprotect", *_at(image, snap))
            except CephAway as error:
                if clones := await self.clones(image, snap):
                    raise SnapshotInUse(f"{image.name}@{snap} has clones: {', '.join(clones)}") from error
                raise
        await self._change("rm", "--no-progress", *_at(image, snap))

    async def users(self, image: RbdDisk) -> tuple[str, ...]:
        """The clients that have an image open, in order."""
        return tuple(sorted(await self._ceph.watchers(image)))

    async def roll_back(self, image: RbdDisk, snap: str, *, size: int) -> None:
        """Give an image the content and the size that it had; nobody else may have it open.

        Args:
            image: which.
            snap: to which.
            size: bytes of the image, by which its time is bounded.
        """
        limit_s = ROLLBACK_S + size / SLOWEST
        await self._ceph.run("rbd", "snap", "rollback", "--no-progress", *_at(image, snap), limit_s=limit_s)

    async def rolled_back(self, image: RbdDisk) -> str | None:
        """The last request for which an image was rolled back; None without one."""
        where = (*located(image), "--format", "json")
        return (await self._ceph.ask(parse_metadata, "rbd", "image-meta", "list", *where)).get(ROLLED_BACK)

    async def note_rolled_back(self, image: RbdDisk, request: str) -> None:
        """Keep with an image the request for which it was rolled back."""
        await self._ceph.run("rbd", "image-meta", "set", *located(image), ROLLED_BACK, request, limit_s=CHANGE_S)

    async def _change(self, *words: str) -> None:
        await self._ceph.run("rbd", "snap", *words, limit_s=CHANGE_S)


def made_at(info: SnapshotInfo) -> str:
    """When one was made, RFC 3339 in UTC; empty where Ceph does not say. `rbd` prints this host's local time."""
    try:
        return datetime.strptime(info.made, _CEPH_TIME).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return ""


def _at(image: RbdDisk, snap: str) -> tuple[str, ...]:
    return (*located(image), option("--snap", snap))
