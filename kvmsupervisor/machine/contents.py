"""What new disks begin with: files of this host as whole copies of an image, images in Ceph as clones of one.

What takes long is done in the background by one job (`jobs.py`), whoever asks; an instance asks again until it is done.
A disk gets its name last, and with it comes a note for whom it was made, and of what. So a disk that is there is never
half made, and is told from one that has other content. See docs/decisions/0026-images.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from kvmsupervisor.adapters import disk_files, image_files, image_tools
from kvmsupervisor.adapters.ceph import CephError, CephFailed, CephImages, NoSuchImage
from kvmsupervisor.adapters.disk_files import FileTrouble, Threads
from kvmsupervisor.adapters.image_tools import ToolFailed
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.aio import all_of
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.images import Image, Snapshot, aside_of, note_of, parent_of, refusal, remark, snapshot_of
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk, Sized, size_text, too_small
from kvmsupervisor.domain.spec import Disk, RbdDisk, Spec
from kvmsupervisor.domain.values import Unfit
from kvmsupervisor.failpoints import point
from kvmsupervisor.machine.images import DiskTrouble, trouble_of
from kvmsupervisor.machine.jobs import Jobs, Say, Underway
from kvmsupervisor.machine.library import FLUSH_S, STEP, Library, Stored

DROP_TRIES, DROP_EVERY_S = 20, 3.0
"""How often, and at what pauses, it is tried to take away an image that was made in vain: twice as long as Ceph takes a
client that died for a living one (`osd_client_watch_timeout`, 30 s)."""

RETRY_S = 5.0
"""Pause before it is looked again for what people have to mend: a key, a file, an image."""


class Keys(Protocol):
    """The entries of the library; see `cluster.image_keys.ImageKeys`."""

    async def get(self, name: str) -> Image | None:
        """One of them; see there."""
        ...


class Imports(Protocol):
    """Who imports an image; see `cluster.image_keys.Imports`."""

    def claim(self, what: str) -> contextlib.AbstractAsyncContextManager[str | None]:
        """Be the one who does; see there."""
        ...


class Elsewhere(DiskTrouble):
    """Another host is doing it."""

    hold_s = 2.0

    def __init__(self, reason: str) -> None:
        super().__init__(reason, self.hold_s)


@frozen(kw_only=True)
class Lacking:
    """What was found of the images in Ceph that may be made.

    Attributes:
        disks: those that are missing, or smaller than their keys say.
        remarks: what a person should know.
    """

    disks: tuple[Disk, ...] = ()
    remarks: tuple[str, ...] = ()


class Contents:
    """What the disks of one host's machines begin with.

    Args:
        library: of this host.
        jobs: of this host.
        keys: of the library.
        imports: which host imports an image.
        ceph: the cluster.
        folder: of the disks that are files.
        threads: makes what runs calls that may block.
    """

    def __init__(
        self,
        *,
        library: Library,
        jobs: Jobs,
        keys: Keys,
        imports: Imports,
        ceph: CephImages,
        folder: Path,
        threads: Callable[[], Threads] = Threads,
    ) -> None:
        self._library = library
        self._jobs = jobs
        self._keys = keys
        self._imports = imports
        self._ceph = ceph
        self._folder = folder
        self._threads = threads()

    async def close(self) -> None:
        """End what is being done. A successor goes on with it."""
        await self._jobs.close()

    async def _entry(self, name: str) -> Image:
        """The entry of the library that a key names.

        Raises:
            DiskTrouble: there is none, or it cannot be used.
        """
        try:
            found = await self._keys.get(name)
        except Unfit as unfit:
            raise DiskTrouble(str(unfit), RETRY_S) from unfit
        if found is None:
            raise DiskTrouble(
                f"there is no image {name} in the library: `kvmsupervisor image add {name} URL --sha256 …` adds it, "
                "`kvmsupervisor image list` shows which there are",
                RETRY_S,
            )
        return found

    # --- files ------------------------------------------------------------------------------------------------

    async def fill(self, instance: InstanceId, key: str, file: FileDisk) -> None:
        """Make a file that is missing; implements `local_disks.Filling`."""
        assert file.origin is not None
        with _told(key, file.origin):
            image = await self._entry(file.origin)
            name = f"disk {file} of {instance}: {image.content} {image.url}"
            self._jobs.ask(name, partial(self._fill, instance, key, file, image))

    async def _fill(self, instance: InstanceId, key: str, file: FileDisk, image: Image, say: Say) -> None:
        assert file.origin is not None
        with contextlib.closing(await self._library.get(image, file.format, say)) as source:
            _fits(key, file, source.size)
            try:
                await self._copy(instance, file, source, note_of(instance, file.origin), say)
            except (ToolFailed, FileTrouble) as error:
                raise DiskTrouble(str(error), RETRY_S) from error
            except OSError as error:
                raise DiskTrouble(explain(error, self._folder / file.name), RETRY_S) from error

    async def _copy(self, instance: InstanceId, file: FileDisk, source: Stored, note: str, say: Say) -> None:
        name = f"{file.name} of {instance}"
        begun = await self._threads.call(
            name, partial(disk_files.begin, self._folder, file, note), undo=disk_files.NewFile.close
        )
        with contextlib.closing(begun):
            if not await self._threads.call(name, partial(image_files.share, source.fd, begun.fd), deadline_s=FLUSH_S):
                taken = image_files.allocated(source.fd)
                await self._library.need_room(self._folder, taken, f"a copy of the image {file.origin}")
                say(f"{size_text(source.size)} are being copied")
                await self._library.with_room(self._folder, image_tools.copy(source.fd, begun.fd, size=source.size))
            await point("copied")
            await self._threads.call(name, begun.finish, deadline_s=FLUSH_S)

    # --- images in Ceph: before there is a lock -----------------------------------------------------------------

    async def look(self, instance: InstanceId, spec: Spec, known: Collection[str]) -> Lacking:
        """Look at the images of `spec` that may be made; bring in what they are to begin with.

        Args:
            instance: whose.
            spec: of the machine.
            known: the images that the instance has run with: none of them is made anew.

        Raises:
            DiskTrouble: one cannot be had, or what it begins with is not there yet.
            EtcdError: it is not known what one begins with.
        """
        found = await all_of(
            [self._look(instance, disk, image, known) for disk, image in spec.images if image.may_be_made]
        )
        return Lacking(
            disks=tuple(disk for lacking in found for disk in lacking.disks),
            remarks=tuple(said for lacking in found for said in lacking.remarks),
        )

    async def _look(self, instance: InstanceId, disk: Disk, image: RbdDisk, known: Collection[str]) -> Lacking:
        key, is_known = disk.key, image.name in known
        try:
            size = (await self._ceph.ceph.image_info(image)).size
            note = None if image.origin is None else await self._ceph.note(image)
        except NoSuchImage as error:
            if is_known:
                raise DiskTrouble(
                    f"{key}: {error}; the machine ran with it, so it is not made anew: see `rbd trash ls "
                    f"{image.pool}`, and for an empty disk give it another name",
                    RETRY_S,
                ) from error
            if image.origin is not None:
                with _told(key, image.origin):
                    _, size = await self._parent(image)
                    _fits(key, image, size)
            elif "pool" in str(error).partition(":")[0]:
                raise trouble_of(error, key) from error
            return Lacking(disks=(disk,))
        except CephError as error:
            raise trouble_of(error, key) from error
        if (said := too_small(key, image, size)) is not None:
            raise DiskTrouble(said, RETRY_S)
        remarks: tuple[str, ...] = ()
        if image.origin is not None:
            if not is_known and (said := refusal(key, image.name, image.origin, instance, note)) is not None:
                raise DiskTrouble(said, RETRY_S)
            remarks = tuple(filter(None, [remark(key, image.name, image.origin, note)]))
        return Lacking(disks=(disk,) if (image.size or 0) > size else (), remarks=remarks)

    async def _parent(self, image: RbdDisk) -> tuple[Snapshot, int]:
        """The snapshot that an image is to be a clone of, and its bytes. An image of the library is imported.

        Raises:
            DiskTrouble: it is not there, or not yet.
        """
        assert image.origin is not None
        snapshot = snapshot_of(image.origin)
        if snapshot is not None:
            return snapshot, await self._size_of(snapshot)
        entry = await self._entry(image.origin)
        snapshot = parent_of(entry, image.pool)
        size = await self._size_if_whole(snapshot)
        if size is None:
            name = f"import {snapshot}: {entry.url}"
            self._jobs.ask(name, partial(self._import, entry, snapshot))
            size = await self._size_if_whole(snapshot)
        if size is None:
            raise DiskTrouble(f"{snapshot} was removed as soon as it was there", RETRY_S)
        return snapshot, size

    async def _size_of(self, snapshot: Snapshot) -> int:
        """Bytes of a snapshot that people have made."""
        try:
            found = (await self._ceph.snapshots(RbdDisk(snapshot.pool, snapshot.image))).get(snapshot.snap)
        except CephError as error:
            raise trouble_of(error) from error
        if found is None:
            raise DiskTrouble(f"there is no such snapshot: `rbd snap create {snapshot}` makes one", RETRY_S)
        if not found.is_protected:
            raise DiskTrouble(
                f"the snapshot may be removed at any time, and its clones with it: `rbd snap protect {snapshot}`",
                RETRY_S,
            )
        return found.size

    async def _size_if_whole(self, snapshot: Snapshot) -> int | None:
        """Bytes of an image of the library in Ceph, None where it is not there. Whoever has the name has all of it."""
        try:
            found = (await self._ceph.snapshots(RbdDisk(snapshot.pool, snapshot.image))).get(snapshot.snap)
        except NoSuchImage as error:
            if "pool" in str(error).partition(":")[0]:
                raise DiskTrouble(str(error), RETRY_S) from error
            return None
        except CephError as error:
            raise trouble_of(error) from error
        if found is None or not found.is_protected:
            raise DiskTrouble(
                f"the image {snapshot.pool}/{snapshot.image} is there without its protected snapshot, so somebody has "
                "changed it: rename or remove it, and it is imported again",
                RETRY_S,
            )
        return found.size

    # --- the import ---------------------------------------------------------------------------------------------

    async def _import(self, entry: Image, snapshot: Snapshot, say: Say) -> None:
        """Bring an image of the library into a pool, once for all hosts."""
        whole = RbdDisk(snapshot.pool, snapshot.image)
        async with self._imports.claim(f"{snapshot.pool}/{snapshot.image}") as other:
            if other is not None:
                raise Elsewhere(f"{other} imports it into the pool {snapshot.pool}")
            if await self._size_if_whole(snapshot) is not None:
                return  # another host has, between our look and our claim
            with contextlib.closing(await self._library.get(entry, DiskFormat.RAW, say)) as source:
                try:
                    aside = await self._aside(whole)
                    say(f"imported into the pool {snapshot.pool}, 0 %")
                    # By our descriptor: the file's name may go while it is read, when no key names it any more.
                    file = Path(f"/proc/{os.getpid()}/fd/{source.fd}")
                    await self._ceph.bring(file, aside, size=source.size, hear=_steps(say, snapshot.pool))
                    await point("imported")
                    await self._ceph.freeze(aside, snapshot.snap)
                    await point("frozen")
                    await self._named(aside, whole)
                except CephError as error:
                    raise trouble_of(error) from error

    async def _aside(self, image: RbdDisk) -> RbdDisk:
        """A name that nobody else has or will have, for an image that is being made; what others left is removed."""
        prefix = aside_of(image.image)
        for name in await self._ceph.names(image.pool):
            left = RbdDisk(image.pool, name)
            if name.startswith(prefix):
                self._drop_behind(left, image)
        return RbdDisk(image.pool, f"{prefix}{uuid4().hex[:8]}")

    async def _named(self, aside: RbdDisk, image: RbdDisk) -> bool:
        """Give what was made its name. Where there is one already, another one was first, and this one goes: False."""
        try:
            await self._ceph.rename(aside, image.image)
        except CephFailed:
            await self._ceph.ceph.image_info(image)
            self._drop_behind(aside, image)
            return False
        return True

    def _drop_behind(self, aside: RbdDisk, image: RbdDisk) -> None:
        self._jobs.begin(f"drop {aside.name}", lambda _: self._drop(aside, image))

    async def _drop(self, aside: RbdDisk, image: RbdDisk) -> None:
        """Take away what was made in vain. Ceph names a tool that was killed for another 30 s as having it open."""
        for _ in range(DROP_TRIES):
            try:
                if await self._ceph.is_idle(aside, image):
                    await self._ceph.remove(aside)
                    return
            except NoSuchImage:
                return
            except CephError:
                pass  # one that has a clone stays: it is in nobody's way
            await asyncio.sleep(DROP_EVERY_S)

    # --- images in Ceph: under the instance's lock --------------------------------------------------------------

    async def make(self, instance: InstanceId, disk: Disk) -> None:
        """Make an image of a machine, or make it larger. The caller holds the instance's lock.

        Raises:
            DiskTrouble: that is not done.
            EtcdError: it is not known what it begins with.
        """
        image = disk.rbd
        assert image is not None
        try:
            size = (await self._ceph.ceph.image_info(image)).size
        except NoSuchImage:
            with _told(disk.key, image.origin):
                await self._make(instance, image)
            return
        except CephError as error:
            raise trouble_of(error, disk.key) from error
        if image.size is not None and image.size > size:
            await _done(self._ceph.grow(image, image.size), disk.key)

    async def _make(self, instance: InstanceId, image: RbdDisk) -> None:
        parent = None if image.origin is None else await self._parent(image)
        try:
            aside = await self._aside(image)
            if parent is None:
                assert image.size is not None
                await self._ceph.create(aside, image.size)
                await self._ceph.set_note(aside, note_of(instance, "nothing"))
            else:
                assert image.origin is not None
                snapshot, size = parent
                await self._ceph.clone(snapshot, aside)
                await point("cloned")
                if image.size is not None and image.size > size:
                    await self._ceph.grow(aside, image.size)
                await self._ceph.set_note(aside, note_of(instance, image.origin))
            await point("noted")
            if not await self._named(aside, image):
                raise DiskTrouble(f"{image.name} was made by somebody else meanwhile: it is looked at anew", 0.0)
        except CephError as error:
            raise trouble_of(error) from error


def _steps(say: Say, pool: str) -> Callable[[int], None]:
    """Tell of some steps only: each is a write of a status key."""
    said = 0

    def hear(percent: int) -> None:
        nonlocal said
        if percent // STEP > said:
            said = percent // STEP
            say(f"imported into the pool {pool}, {said * STEP} %")

    return hear


def _fits(key: str, disk: Sized, size: int) -> None:
    """Make sure that a disk is to be as large as what it begins with.

    Raises:
        DiskTrouble: it is to be smaller.
    """
    if disk.size is not None and disk.size < size:
        right = f"write size={size_text(size)}, or leave size= out" if size % (1 << 20) == 0 else "leave size= out"
        raise DiskTrouble(
            f"size={size_text(disk.size)} is less than the {size_text(size)} of the image: {right}", RETRY_S
        )


async def _done(step: Awaitable[None], key: str) -> None:
    try:
        await step
    except CephError as error:
        raise trouble_of(error, key) from error


@contextlib.contextmanager
def _told(key: str, origin: str | None) -> Iterator[None]:
    """Say which key a trouble is about."""
    try:
        yield
    except DiskTrouble as error:
        # Several may be told of one failure, so each hears of its own key.
        said = f"{key}: {error}" if origin is None else f"{key}: from={origin}: {error}"
        raise (Underway(said) if isinstance(error, Underway) else DiskTrouble(said, error.retry_s)) from error
