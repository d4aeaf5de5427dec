"""What new disks begin with: files of this host as whole copies of an image, images in Ceph as clones of one.

What takes long is done in the background by one job (`jobs.py`), whoever asks; an instance asks again until it is done.
A disk gets its name last, and with it comes a note for whom it was made, and of what. So a disk that is there is never
half made, and is told from one that has other content. See docs/decisions/0026-images.md.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from kvmsupervisor.adapters import disk_files, image_files, image_tools
from kvmsupervisor.adapters.ceph import CephError, CephFailed, CephImages, NoSuchImage, image_of
from kvmsupervisor.adapters.disk_files import FileTrouble, Threads
from kvmsupervisor.adapters.image_tools import ToolFailed
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.aio import Remembered, all_of, both
from kvmsupervisor.domain.ceph import ImageInfo, Trouble
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.images import (
    Image,
    Snapshot,
    leftover,
    local_file_of,
    missing,
    note_of,
    parent_of,
    refusal,
    remark,
    snapshot_of,
)
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk, size_text, too_small
from kvmsupervisor.domain.spec import Disk, RbdDisk, Spec
from kvmsupervisor.domain.storage import Unmade
from kvmsupervisor.domain.values import Unfit
from kvmsupervisor.failpoints import point
from kvmsupervisor.machine import duplicates
from kvmsupervisor.machine.duplicates import fits, steps
from kvmsupervisor.machine.images import DiskTrouble, Law5, trouble_of
from kvmsupervisor.machine.jobs import Jobs, Say, Underway
from kvmsupervisor.machine.leftovers import SWEEP_AFTER_S, Leftovers
from kvmsupervisor.machine.library import FLUSH_S, Library, Stored

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

    disks: tuple[Unmade, ...] = ()
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
        allow_unfenced: see `images.Disks`.
        sweep_after_s: see `leftovers.SWEEP_AFTER_S`.
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
        allow_unfenced: bool = False,
        sweep_after_s: float = SWEEP_AFTER_S,
        threads: Callable[[], Threads] = Threads,
    ) -> None:
        self._library = library
        self._jobs = jobs
        self._keys = keys
        self._imports = imports
        self._ceph = ceph
        self._folder = folder
        self._threads = threads()
        self._law = Law5(ceph.ceph, allow_unfenced=allow_unfenced)
        self._leftovers = Leftovers(ceph, jobs, sweep_after_s=sweep_after_s)
        # Bytes of images of the library in Ceph that are whole: they never change, and who misses one forgets it here.
        self._whole = Remembered[int | None](math.inf)
        # What was made for machines whose QEMU does not live yet: their own, and left by no earlier machine.
        self._fresh: dict[InstanceId, set[str]] = {}
        # Images that are missing and wait for a job: they are not looked at again until it has ended.
        self._waiting: dict[str, str] = {}

    async def close(self) -> None:
        """End what is being done. A successor goes on with it."""
        await self._jobs.close()

    def is_fresh(self, instance: InstanceId, name: str) -> bool:
        """Whether a disk was made a moment ago; implements `local_disks.Filling`."""
        return name in self._fresh.get(instance, ())

    def left(self, instance: InstanceId) -> None:
        """Note that its QEMU is proven gone: what was made for it is no longer new."""
        self._fresh.pop(instance, None)

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
            if local_file_of(file.origin) is not None:
                self._jobs.ask(f"disk {file} of {instance}", partial(self._duplicate, instance, key, file))
                return
            image = await self._entry(file.origin)
            name = f"disk {file} of {instance}: {image.content} {image.url}"
            self._jobs.ask(name, partial(self._fill, instance, key, file, image))

    async def open_medium(self, key: str, name: str) -> int:
        """A descriptor of an image of the library as a medium, for reading, to be closed by the caller.

        Raises:
            DiskTrouble: it cannot be had, or is being fetched.
            EtcdError: it is not known what it is.
        """
        with _told(key, None):
            image = await self._entry(name)
            stored = await self._library.look(image, DiskFormat.RAW)
            if stored is None:
                self._jobs.ask(f"medium {image.content}: {image.url}", partial(self._fetch, image))
                stored = await self._library.look(image, DiskFormat.RAW)
            if stored is None:
                raise DiskTrouble(f"image {name}: its file was removed as soon as it was there", RETRY_S)
        return stored.fd

    async def _fetch(self, image: Image, say: Say) -> None:
        (await self._library.get(image, DiskFormat.RAW, say)).close()

    async def _fill(self, instance: InstanceId, key: str, file: FileDisk, image: Image, say: Say) -> None:
        assert file.origin is not None
        with contextlib.closing(await self._library.get(image, file.format, say)) as source:
            fits(key, file, source.size)
            try:
                await self._copy(instance, file, source, note_of(instance, file.origin), say)
            except (ToolFailed, FileTrouble) as error:
                raise DiskTrouble(str(error), RETRY_S) from error
            except OSError as error:
                raise DiskTrouble(explain(error, self._folder / file.name), RETRY_S) from error

    async def _duplicate(self, instance: InstanceId, key: str, file: FileDisk, say: Say) -> None:
        made = partial(self._fresh.setdefault(instance, set()).add, file.title)
        where = self._folder, self._threads, self._library
        await duplicates.make_file(instance, key, file, say, *where, before_it_is_there=made)

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
            # Before it has its name, by which it may be found at once.
            self._fresh.setdefault(instance, set()).add(file.title)
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
        with _told(key, image.origin):
            self._jobs.wait_for(self._waiting.get(image.name))
        if self._waiting.pop(image.name, None) is not None and not is_known:
            # Missing a moment ago. Where it no longer is, what is made gets no name, and it is looked at anew.
            return await self._lacking(instance, disk, image)
        try:
            # One that the machine never ran with is missing, as a rule.
            info, note = await self._found(image, key, is_likely=is_known)
        except NoSuchImage as error:
            if is_known:
                raise DiskTrouble(
                    f"{key}: {error}; the machine ran with it, so it is not made anew: see `rbd trash ls "
                    f"{image.place}`, and for an empty disk give it another name",
                    RETRY_S,
                ) from error
            if image.origin is None and error.lacks_place:
                raise trouble_of(error, key) from error
            return await self._lacking(instance, disk, image)
        except CephError as error:
            raise trouble_of(error, key) from error
        if (said := too_small(key, image, info.size)) is not None:
            raise DiskTrouble(said, RETRY_S)
        remarks: tuple[str, ...] = ()
        if image.origin is not None:
            if not is_known and (said := refusal(key, image.name, image.origin, instance, note)) is not None:
                raise DiskTrouble(said, RETRY_S)
            remarks = tuple(filter(None, [remark(key, image.name, image.origin, note)]))
            if not is_known and not self.is_fresh(instance, image.name):
                remarks += tuple(filter(None, [leftover(key, image.name, instance, note)]))
        small = Unmade(disk=disk, image=image, has=info.size)
        return Lacking(disks=(small,) if (image.size or 0) > info.size else (), remarks=remarks)

    async def _lacking(self, instance: InstanceId, disk: Disk, image: RbdDisk) -> Lacking:
        """What a missing image is to begin with; brought in where it is not there."""
        if image.origin is None:
            return Lacking(disks=(Unmade(disk=disk, image=image),))
        with _told(disk.key, image.origin):
            parent, size = await self._parent(image)
            fits(disk.key, image, size)
            if image.copy:
                name = f"copy of {parent}: {image.name} of {instance}"
                try:
                    self._jobs.ask(name, partial(self._copy_image, instance, image, parent))
                except Underway:
                    self._waiting[image.name] = name
                    raise
        if image.copy:
            return await self._look(instance, disk, image, ())
        return Lacking(disks=(Unmade(disk=disk, image=image, parent=parent, parent_size=size),))

    async def _found(self, image: RbdDisk, key: str, *, is_likely: bool) -> tuple[ImageInfo, str | None]:
        """Info and note of an image, by law 5."""
        look = self._law.look(image, key, is_likely=is_likely)
        if image.origin is None:
            return await look, None
        if is_likely:
            return await both(look, self._ceph.note(image))
        return await look, await self._ceph.note(image)

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
        snapshot = parent_of(entry, image.pool, apart=bool(image.namespace))
        name = f"import {snapshot}: {entry.url}"
        # Twice where the import that is told of is an earlier one, and has been removed since.
        while (size := await self._size_once(snapshot)) is None:
            try:
                self._jobs.ask(name, partial(self._import, entry, snapshot))
            except Underway:
                self._waiting[image.name] = name
                raise
        return snapshot, size

    async def _size_once(self, snapshot: Snapshot) -> int | None:
        """`_size_if_whole`, asked once for all machines of this host."""
        size = await self._whole.get(snapshot, partial(self._size_if_whole, snapshot))
        if size is None:
            self._whole.forget(snapshot)
        return size

    async def _size_of(self, snapshot: Snapshot) -> int:
        """Bytes of a snapshot that people have made."""
        try:
            found = (await self._ceph.snapshots(image_of(snapshot))).get(snapshot.snap)
        except CephError as error:
            raise trouble_of(error) from error
        if found is None:
            raise DiskTrouble(missing(snapshot), RETRY_S)
        if not found.is_protected:
            raise DiskTrouble(
                f"the snapshot may be removed at any time, and its clones with it: `rbd snap protect {snapshot}`",
                RETRY_S,
            )
        return found.size

    async def _size_if_whole(self, snapshot: Snapshot) -> int | None:
        """Bytes of an image of the library in Ceph, None where it is not there. Whoever has the name has all of it."""
        try:
            found = (await self._ceph.snapshots(image_of(snapshot))).get(snapshot.snap)
        except NoSuchImage as error:
            # Its namespace in the library is made with the first import.
            if error.kind is Trouble.NO_POOL:
                raise DiskTrouble(str(error), RETRY_S) from error
            return None
        except CephError as error:
            raise trouble_of(error) from error
        if found is None or not found.is_protected:
            raise DiskTrouble(
                f"the image {image_of(snapshot).name} is there without its protected snapshot, so somebody has "
                "changed it: rename or remove it, and it is imported again",
                RETRY_S,
            )
        return found.size

    # --- the import ---------------------------------------------------------------------------------------------

    async def _import(self, entry: Image, snapshot: Snapshot, say: Say) -> None:
        """Bring an image of the library into a pool, once for all hosts."""
        whole = image_of(snapshot)
        async with self._imports.claim(whole.name) as other:
            if other is not None:
                raise Elsewhere(f"{other} imports it into the pool {whole.place}")
            if await self._size_if_whole(snapshot) is not None:
                return  # another host has, between our look and our claim
            with contextlib.closing(await self._library.get(entry, DiskFormat.RAW, say)) as source:
                with self._leftovers.aside(whole) as aside:
                    await self._ceph.make_namespace(whole)
                    say(f"imported into the pool {whole.place}, 0 %")
                    # By our descriptor: the file's name may go while it is read, when no key names it any more.
                    file = Path(f"/proc/{os.getpid()}/fd/{source.fd}")
                    await self._ceph.bring(
                        file, aside, size=source.size, hear=steps(say, f"imported into the pool {whole.place}")
                    )
                    await point("imported")
                    await self._ceph.freeze(aside, snapshot.snap)
                    await point("frozen")
                await self._named(aside, whole)

    async def _copy_image(self, instance: InstanceId, image: RbdDisk, parent: Snapshot, say: Say) -> None:
        async with self._imports.claim(image.name) as other:
            if other is not None:
                raise Elsewhere(f"{other} copies it")
            with self._leftovers.aside(image) as aside:
                note = note_of(instance, image.origin or "", mark=aside.image.rpartition("-")[2])
                await duplicates.make_image(self._ceph, parent, aside, note, say)
            self._fresh.setdefault(instance, set()).add(image.name)
            await self._named(aside, image, note)

    async def _named(self, aside: RbdDisk, image: RbdDisk, note: str | None = None) -> Mapping[str, str] | None:
        """Give what was made its name. Where there is one already, another one was first: None.

        Args:
            aside: what was made.
            image: what it is to be called.
            note: what was left with it and with no other; None for nothing.

        Returns:
            Its metadata, as far as it has a note.

        Raises:
            DiskTrouble: it has no name, or it is not known. Whoever makes the image next takes it away.
        """
        metadata: Mapping[str, str] | None = {}
        try:
            try:
                metadata = await self._ceph.rename(aside, image.image, note)
            except CephFailed:
                await self._ceph.ceph.image_info(image)
                metadata = None
        except CephError as error:
            raise trouble_of(error) from error
        self._leftovers.sweep_behind(image)
        return metadata

    # --- images in Ceph: under the instance's lock --------------------------------------------------------------

    async def make(self, instance: InstanceId, unmade: Unmade) -> None:
        """Make an image of a machine, or make it larger. The caller holds the instance's lock.

        What was found before there was a lock may be no longer so. Nothing depends on it: who makes an image that is
        there by now gets no name for it, and Ceph makes no image smaller.

        Raises:
            DiskTrouble: that is not done, or what was made may not be opened.
        """
        image, key = unmade.image, unmade.disk.key
        try:
            if unmade.has is not None:
                assert image.size is not None
                await self._ceph.grow(image, image.size)
                return
            with _told(key, image.origin):
                metadata = await self._make(instance, unmade)
                self._fresh.setdefault(instance, set()).add(image.name)
            await self._law.look_at_new(image, key, metadata)
        except CephError as error:
            raise trouble_of(error, key) from error

    async def _make(self, instance: InstanceId, unmade: Unmade) -> Mapping[str, str]:
        image, parent = unmade.image, unmade.parent
        with self._leftovers.aside(image) as aside:
            if parent is None:
                assert image.size is not None
                await self._ceph.create(aside, image.size)
            else:
                try:
                    await self._ceph.clone(parent, aside)
                except CephError:
                    self._whole.forget(parent)  # perhaps somebody has removed it
                    raise
                await point("cloned")
                if image.size is not None and image.size > unmade.parent_size:
                    await self._ceph.grow(aside, image.size)
            note = note_of(instance, image.origin or "nothing", mark=aside.image.rpartition("-")[2])
            await self._ceph.set_note(aside, note)
            await point("noted")
        metadata = await self._named(aside, image, note)
        if metadata is None:
            raise DiskTrouble(f"{image.name} was made by somebody else meanwhile: it is looked at anew", 0.0)
        return metadata


@contextlib.contextmanager
def _told(key: str, origin: str | None) -> Iterator[None]:
    """Say which key a trouble is about."""
    try:
        yield
    except DiskTrouble as error:
        # Several may be told of one failure, so each hears of its own key.
        said = f"{key}: {error}" if origin is None else f"{key}: from={origin}: {error}"
        raise (Underway(said) if isinstance(error, Underway) else DiskTrouble(said, error.retry_s)) from error
