"""Images in Ceph as they are made: imported, cloned, grown, named, taken away; and what is kept with one.

Each call is one tool, or a few in a row that say so; see `client.py` for deadlines and errors. An image gets its name
last, by `rename`, which fails where there is one of that name: who is cut off leaves something under a name that
nobody uses, and two that make one at the same instant make one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from kvmsupervisor.adapters.ceph.access import destined, located, placed
from kvmsupervisor.adapters.ceph.client import IMPORT_S, Ceph
from kvmsupervisor.adapters.ceph.errors import CephAway, CephFailed, NoSuchImage
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
        return (await self._metadata(image)).get(NOTE)

    async def _metadata(self, image: RbdDisk) -> Mapping[str, str]:
        return await self.ceph.ask(parse_metadata, "rbd", "image-meta", "list", *located(image), "--format", "json")

    async def names(self, image: RbdDisk) -> tuple[str, ...]:
        """The images in the pool and namespace of this one.

        Raises:
            NoSuchImage: there is no such pool, or no such namespace.
        """
        return await self.ceph.ask(parse_names, "rbd", "ls", *placed(image), "--format", "json")

    async def children(self, snapshot: Snapshot) -> tuple[str, ...]:
        """The clones of a snapshot, as people name them.

        Raises:
            NoSuchImage: it is not there.
        """
        where = (*_at(snapshot), "--format", "json")
        return await self.ceph.ask(parse_children, "rbd", "children", *where)

    # --- making -----------------------------------------------------------------------------------------------

    async def make_namespace(self, image: RbdDisk) -> None:
        """Make the namespace of an image, unless it is there.

        Raises:
            NoSuchImage: there is no such pool.
        """
        if not image.namespace:
            return
        try:
            await self.ceph.run("rbd", "namespace", "create", *placed(image), limit_s=IMPORT_S)
        except CephFailed as error:
            if not error.is_there:
                raise

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
        limit_s = IMPORT_S + size / SLOWEST
        where = (option("--path", str(file)), *destined(image))
        await self.ceph.run("rbd", "import", *_FEATURE_WORDS, *where, limit_s=limit_s, hear=_percents(hear))
        if (await self.ceph.image_info(image)).size < size:
            await self.grow(image, size)

    async def freeze(self, image: RbdDisk, snap: str) -> None:
        """Make a snapshot that stays, of which clones can be made."""
        snapshot = _snapshot(image, snap)
        await self.ceph.run("rbd", "snap", "create", "--no-progress", *_at(snapshot), limit_s=IMPORT_S)
        await self.ceph.run("rbd", "snap", "protect", *_at(snapshot), limit_s=IMPORT_S)

    async def clone(self, snapshot: Snapshot, image: RbdDisk) -> None:
        """Make a clone of a snapshot.

        Raises:
            NoSuchImage: the snapshot, or a pool, is not there.
        """
        # Across namespaces Ceph clones in its second format only, whatever the cluster's default is (rbd(8), clone).
        form = () if image.namespace == snapshot.namespace else ("--rbd-default-clone-format=2",)
        where = (*_at(snapshot), *destined(image))
        await self.ceph.run("rbd", "clone", *form, *_FEATURE_WORDS, *where, limit_s=IMPORT_S)

    async def flatten(self, image: RbdDisk, *, hear: Callable[[int], None]) -> None:
        """Make a clone an image of its own: what it has of its parent is copied.

        Args:
            image: which.
            hear: is told how much is done, percent.
        """
        size = (await self.ceph.image_info(image)).size
        await self.ceph.run("rbd", "flatten", *located(image), limit_s=IMPORT_S + size / SLOWEST, hear=_percents(hear))

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

    async def rename(self, image: RbdDisk, name: str, note: str | None = None) -> Mapping[str, str]:
        """Give an image its name.

        Of two that rename to one name at once both may be told that all went well (seen with Ceph 16.2.15: the
        cluster refuses the second, and librbd's `Operations::rename` says nothing of it). So it is looked which image
        has the name now: by a note that no other image has, or else by its id.

        Args:
            image: to be renamed.
            name: in the same pool and namespace.
            note: what `set_note` has left with this image alone; None for nothing.

        Returns:
            The image's metadata where it has a note, and else nothing.

        Raises:
            CephFailed: there is one of that name.
            NoSuchImage: the image is not there.
        """
        named = image.beside(name)
        ours = await self._id(image) if note is None else ""
        await self.ceph.run("rbd", "rename", *located(image), *destined(named), limit_s=IMPORT_S)
        metadata = {} if note is None else await self._metadata(named)
        is_ours = metadata.get(NOTE) == note if note is not None else await self._id(named) == ours
        if not is_ours:
            raise CephFailed(f"{named.name} is there already")
        return metadata

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
            snapshot = _snapshot(image, name)
            if clones := await self.children(snapshot):
                raise SnapshotInUse(f"{snapshot} has clones, which need it: {', '.join(clones)}")
        for name, one in found.items():
            where = _at(_snapshot(image, name))
            if one.is_protected:
                # Of a clone that was made meanwhile Ceph itself knows.
                await self.ceph.run("rbd", "snap", "unprotect", *where, limit_s=IMPORT_S)
            await self.ceph.run("rbd", "snap", "rm", "--no-progress", *where, limit_s=IMPORT_S)
        await self.ceph.run("rbd", "rm", "--no-progress", *located(image), limit_s=REMOVE_S)

    async def is_lost(self, image: RbdDisk, name: RbdDisk | None) -> bool:
        """Whether nobody has an image open, and none can give it a name any more: another image has that name.

        Whoever removed it without that could remove what has its name a moment later: the tool goes by the id that it
        found behind a name. A `rename` that is cut off leaves both names, for a moment or for good: to remove one
        removes both, so the ids are compared.

        Args:
            image: perhaps left over.
            name: that it was to get; None where nobody is left who would give it one.
        """
        if await self.ceph.watchers(image):
            return False
        if name is None:
            return True
        try:
            theirs = await self._id(name)
        except NoSuchImage:
            return False
        return await self._id(image) != theirs

    async def _id(self, image: RbdDisk) -> str:
        return await self.ceph.ask(parse_id, "rbd", "info", *located(image), "--format", "json")


def _percents(hear: Callable[[int], None]) -> Callable[[bytes], None]:
    """Hears how much is done in what a tool says."""

    def listen(said: bytes) -> None:
        if found := _PERCENT.findall(said):
            hear(min(100, int(found[-1])))

    return listen


_FEATURE_WORDS = tuple(word for name in FEATURES for word in ("--image-feature", name))


def image_of(snapshot: Snapshot) -> RbdDisk:
    """The image that a snapshot is of."""
    return RbdDisk(snapshot.pool, snapshot.image, namespace=snapshot.namespace)


def _snapshot(image: RbdDisk, name: str) -> Snapshot:
    return Snapshot(image.pool, image.image, name, namespace=image.namespace)


def _at(snapshot: Snapshot) -> tuple[str, ...]:
    return (*located(image_of(snapshot)), option("--snap", snapshot.snap))
