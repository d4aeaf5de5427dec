"""Images in Ceph as they are made: imported, cloned, grown, named, taken away; and what is kept with one.

Each call is one tool, or a few in a row that say so; see `client.py` for deadlines and errors. An image gets its name
last, by `rename`, which fails where there is one of that name: who is cut off leaves something under a name that
nobody uses, and two that make one at the same instant make one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from kvmsupervisor.adapters.ceph.client import IMPORT_S, Ceph, CephAway, NoSuchImage, located
from kvmsupervisor.domain.ceph import (
    EXCLUSIVE_LOCK,
    SnapshotInfo,
    parse_children,
    parse_id,
    parse_metadata,
    parse_names,
    parse_snapshots,
)
from kvmsupervisor.domain.images import Snapshot
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.domain.words import option

FEATURES = ("layering", EXCLUSIVE_LOCK, "object-map", "fast-diff", "deep-flatten")
"""Of images that are made: Ceph's own defaults, said, as a cluster may have others and law 5 needs one of them."""

NOTE = "kvmsupervisor.made"
"""The entry of an image's metadata that tells for whom it was made, and of what (`images.note_of`)."""

SLOWEST = 4 << 20
"""Bytes a second that an import takes at least. Arbitrary: a cluster that recovers."""

REMOVE_S = 600.0
"""How long it may take to remove what somebody left half made: it has an object for each 4 MiB."""

_PERCENT = re.compile(rb"([0-9]{1,3})% complete")


class SnapshotInUse(CephAway):
    """A snapshot has clones."""


class CephImages:
    """The cluster's images, as one client makes them.

    Args:
        ceph: the cluster.
    """

    def __init__(self, ceph: Ceph) -> None:
        self.ceph = ceph

    # --- looking ----------------------------------------------------------------------------------------------

    async def snapshots(self, image: RbdDisk) -> dict[str, SnapshotInfo]:
        """The snapshots of an image, by name.

        Raises:
            NoSuchImage: it, or its pool, is not there.
        """
        return await self.ceph.ask(parse_snapshots, "rbd", "snap", "ls", *located(image), "--format", "json")

    async def note(self, image: RbdDisk) -> str | None:
        """What `set_note` has left with an image; None for nothing.

        Raises:
            NoSuchImage: it, or its pool, is not there.
        """
        found = await self.ceph.ask(parse_metadata, "rbd", "image-meta", "list", *located(image), "--format", "json")
        return found.get(NOTE)

    async def names(self, pool: str) -> tuple[str, ...]:
        """The images of a pool.

        Raises:
            NoSuchImage: there is no such pool.
        """
        return await self.ceph.ask(parse_names, "rbd", "ls", option("--pool", pool), "--format", "json")

    async def children(self, snapshot: Snapshot) -> tuple[str, ...]:
        """The clones of a snapshot, as people name them.

        Raises:
            NoSuchImage: it is not there.
        """
        where = (*_at(snapshot), "--format", "json")
        return await self.ceph.ask(parse_children, "rbd", "children", *where)

    # --- making -----------------------------------------------------------------------------------------------

    async def bring(self, file: Path, image: RbdDisk, *, size: int, hear: Callable[[int], None]) -> None:
        """Import a file, the bytes of a disk.

        Args:
            file: its path.
            image: to be made.
            size: bytes of the disk; the file may lack a part of the last sector.
            hear: is told how much is done, percent.

        Raises:
            NoSuchImage: there is no such pool.
        """

        def listen(said: bytes) -> None:
            if found := _PERCENT.findall(said):
                hear(min(100, int(found[-1])))

        limit_s = IMPORT_S + size / SLOWEST
        where = (option("--path", str(file)), *_destined(image))
        await self.ceph.run("rbd", "import", *_FEATURE_WORDS, *where, limit_s=limit_s, hear=listen)
        if (await self.ceph.image_info(image)).size < size:
            await self.grow(image, size)

    async def freeze(self, image: RbdDisk, snap: str) -> None:
        """Make a snapshot that stays, of which clones can be made."""
        snapshot = Snapshot(image.pool, image.image, snap)
        await self.ceph.run("rbd", "snap", "create", "--no-progress", *_at(snapshot), limit_s=IMPORT_S)
        await self.ceph.run("rbd", "snap", "protect", *_at(snapshot), limit_s=IMPORT_S)

    async def clone(self, snapshot: Snapshot, image: RbdDisk) -> None:
        """Make a clone of a snapshot.

        Raises:
            NoSuchImage: the snapshot, or a pool, is not there.
        """
        await self.ceph.run("rbd", "clone", *_FEATURE_WORDS, *_at(snapshot), *_destined(image), limit_s=IMPORT_S)

    async def create(self, image: RbdDisk, size: int) -> None:
        """Make an empty image.

        Raises:
            NoSuchImage: there is no such pool.
        """
        words = (*located(image), option("--size", f"{size}B"))
        await self.ceph.run("rbd", "create", *_FEATURE_WORDS, *words, limit_s=IMPORT_S)

    async def grow(self, image: RbdDisk, size: int) -> None:
        """Make an image larger. Ceph itself refuses to make one smaller."""
        words = (*located(image), option("--size", f"{size}B"))
        await self.ceph.run("rbd", "resize", "--no-progress", *words, limit_s=IMPORT_S)

    async def set_note(self, image: RbdDisk, note: str) -> None:
        """Leave a note with an image, instead of one that is there: a clone begins with that of its parent."""
        await self.ceph.run("rbd", "image-meta", "set", *located(image), NOTE, note, limit_s=IMPORT_S)

    async def rename(self, image: RbdDisk, name: str) -> None:
        """Give an image its name.

        Raises:
            CephFailed: there is one of that name.
            NoSuchImage: the image is not there.
        """
        await self.ceph.run("rbd", "rename", *located(image), *_destined(RbdDisk(image.pool, name)), limit_s=IMPORT_S)

    # --- taking away ------------------------------------------------------------------------------------------

    async def remove(self, image: RbdDisk) -> None:
        """Take an image away, with its snapshots. Nothing is lost of one that has clones, or that somebody has open.

        Raises:
            NoSuchImage: it is not there.
            SnapshotInUse: a snapshot has clones; nothing was taken away.
            CephAway: somebody has it open.
        """
        found = await self.snapshots(image)
        for name in found:
            snapshot = Snapshot(image.pool, image.image, name)
            if clones := await self.children(snapshot):
                raise SnapshotInUse(f"{snapshot} has clones, which need it: {', '.join(clones)}")
        for name, one in found.items():
            where = _at(Snapshot(image.pool, image.image, name))
            if one.is_protected:
                # Of a clone that was made meanwhile Ceph itself knows.
                await self.ceph.run("rbd", "snap", "unprotect", *where, limit_s=IMPORT_S)
            await self.ceph.run("rbd", "snap", "rm", "--no-progress", *where, limit_s=IMPORT_S)
        await self.ceph.run("rbd", "rm", "--no-progress", *located(image), limit_s=REMOVE_S)

    async def is_idle(self, image: RbdDisk, other_than: RbdDisk) -> bool:
        """Whether nobody has an image open, and it is not another one under a second name.

        A `rename` that is cut off leaves both names for a moment, or for good: to remove one removes both.
        """
        if await self.ceph.watchers(image):
            return False
        try:
            theirs = await self._id(other_than)
        except NoSuchImage:
            return True
        return await self._id(image) != theirs

    async def _id(self, image: RbdDisk) -> str:
        return await self.ceph.ask(parse_id, "rbd", "info", *located(image), "--format", "json")


_FEATURE_WORDS = tuple(word for name in FEATURES for word in ("--image-feature", name))


def _at(snapshot: Snapshot) -> tuple[str, ...]:
    return (*located(RbdDisk(snapshot.pool, snapshot.image)), option("--snap", snapshot.snap))


def _destined(image: RbdDisk) -> tuple[str, str]:
    return option("--dest-pool", image.pool), option("--dest", image.image)
