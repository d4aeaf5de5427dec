"""The image library of one host: fetched once, checked, kept (`KVM_IMAGE_DIR`), and turned into another format.

What is here is whole and was checked. A fetch that is cut off goes on where it was; what it comes to is judged by the
sum of all of it, so nothing that a server says has to be believed. See docs/decisions/0026-images.md.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kvmsupervisor.adapters import disk_files, image_files, image_tools
from kvmsupervisor.adapters.disk_files import FileTrouble, Threads
from kvmsupervisor.adapters.image_files import Digest
from kvmsupervisor.adapters.image_tools import ToolFailed
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.adapters.users import QemuUser
from kvmsupervisor.config.settings import IMAGE_DIR, Settings
from kvmsupervisor.domain import qcow2
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.images import Image
from kvmsupervisor.domain.local_disk import DiskFormat, size_text
from kvmsupervisor.domain.media import shown_url
from kvmsupervisor.machine.images import DiskTrouble
from kvmsupervisor.machine.jobs import FAILED_S, Hopeless, Jobs, Say

if TYPE_CHECKING:
    from kvmsupervisor.machine.image_download import Download

T = TypeVar("T")

KEEP_BYTES = 1 << 30
"""Room that no image takes away: machines with disks on the same file system stop when it is full. Arbitrary."""

LOOK_EVERY_S = 1.0
"""How often it is looked whether there is room left while a tool writes."""

FLUSH_S = 3600.0
"""How long a file system may take to have an image on the disk. Arbitrary: a slow one has gigabytes to write."""

STEP = 5
"""Percent between two words on how far it is: each is a write of a status key."""


class NotOne(FileTrouble):
    """A file is none that a disk may be made of."""


class NoRoom(DiskTrouble):
    """There is too little room for an image."""


@frozen(kw_only=True)
class Limits:
    """What bounds the library.

    Attributes:
        size_bytes: the largest image, and the largest disk that one expands to (`KVM_IMAGE_MAX_BYTES`).
        keep_bytes: room that stays free.
    """

    size_bytes: int
    keep_bytes: int = KEEP_BYTES


@frozen(kw_only=True)
class Sources:
    """Where images may come from; see `fetch.download`."""

    file_root: Path | None = None
    ca_file: Path | None = None
    follow_inward: bool = False


@frozen(kw_only=True)
class Stored:
    """A file of the library, open.

    Attributes:
        fd: its descriptor.
        path: where it is.
        size: bytes of the disk in it.
    """

    fd: int
    path: Path
    size: int

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


class Library:
    """The images of one host.

    Args:
        folder: where they are.
        is_own: whether the folder is made when it is missing; see `LocalDisks`.
        limits: what bounds them.
        sources: where they may come from.
        user: that QEMU runs as, and what converts images; None for our own.
        jobs: of this host.
        kept: the SHA-256 of each image that the keys name; None where that is not known now.
        download: fetches one; None for `fetch.download`.
        threads: makes what runs calls that may block.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_own: bool,
        limits: Limits,
        sources: Sources,
        user: QemuUser | None,
        jobs: Jobs,
        kept: Callable[[], Awaitable[Collection[str] | None]],
        download: Download | None = None,
        threads: Callable[[], Threads] = Threads,
    ) -> None:
        self.folder = folder
        self.limits = limits
        self._is_own = is_own
        self.sources = sources
        self._user = user
        self._jobs = jobs
        self._kept = kept
        self._download = download
        self._threads = threads()
        # Several jobs ask at once, and `Threads` takes one call of a name at a time.
        self._looking, self._measuring = asyncio.Lock(), asyncio.Lock()

    # --- what others ask for ----------------------------------------------------------------------------------

    async def get(self, image: Image, form: DiskFormat, say: Say) -> Stored:
        """An image as a disk of that format, open, to be closed by the caller. Waits until it is there.

        Raises:
            DiskTrouble: it cannot be had.
        """
        found = await self.look(image, form)
        if found is not None:
            return found
        # By its URL, too: once that was corrected, what became of the former one is no answer.
        await self._jobs.join(
            f"image {image.content} as {form.value}: {image.url}", partial(self._provide, image, form), say
        )
        found = await self.look(image, form)
        if found is None:
            raise DiskTrouble(f"image {image.name}: its file in {self.folder} was removed as soon as it was there")
        return found

    async def look(self, image: Image, form: DiskFormat) -> Stored | None:
        """The same where it is there already; None otherwise.

        Raises:
            DiskTrouble: it cannot be told, or may not be used.
        """
        with self._told(image):
            async with self._looking:
                return await self._threads.call("looking", partial(self._look, image, form), undo=_close)

    def _look(self, image: Image, form: DiskFormat) -> Stored | None:
        name = _name_of(image, form)
        fd = image_files.open_whole(self.folder, name)
        if fd is None:
            return None
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            found = Stored(fd=fd, path=self.folder / name, size=self._size(image, fd, form))
            undo.pop_all()
        return found

    async def _call(
        self,
        image: Image,
        work: Callable[[], T],
        *,
        deadline_s: float = disk_files.DEADLINE_S,
        undo: Callable[[T], None] = lambda _: None,
    ) -> T:
        """Do what may block, of one job."""
        return await self._threads.call(f"image {image.content}", work, deadline_s=deadline_s, undo=undo)

    async def write(self, image: Image, work: Callable[[], None]) -> None:
        """Do what writes to a part."""
        await self._call(image, work)

    @contextmanager
    def _told(self, image: Image) -> Iterator[None]:
        """Say which image an error is about."""
        try:
            yield
        except (FileTrouble, ToolFailed) as error:
            raise DiskTrouble(f"image {image.name}: {error}", FAILED_S) from error
        except OSError as error:
            raise DiskTrouble(f"image {image.name}: {explain(error, self.folder)}", FAILED_S) from error

    # --- making it --------------------------------------------------------------------------------------------

    async def _provide(self, image: Image, form: DiskFormat, say: Say) -> None:
        with self._told(image):
            await self._call(image, self._make_folder)
            if form is image.format:
                await self._fetch(image, say)
                return
            # Only one of this host converts it, and the image itself is fetched once for both formats.
            with closing(await self.get(image, image.format, say)) as source:
                await self._convert(image, source, form, say)

    def _make_folder(self) -> None:
        if self._is_own:
            image_files.make_folder(self.folder)
        elif not self.folder.is_dir():
            raise FileTrouble(
                f"the folder for images, {self.folder} (KVM_IMAGE_DIR), is not there: mount its file system, or make it"
            )
        if not image_files.is_private(self.folder):
            raise FileTrouble(f"others may enter the folder for images, {self.folder} (KVM_IMAGE_DIR): `chmod 700` it")

    async def _fetch(self, image: Image, say: Say) -> None:
        if (kept := await self._kept()) is not None:
            await self._call(image, partial(image_files.sweep, self.folder, {*kept, image.sha256}))
        fd = await self._part(image, _name_of(image, image.format), anew=False)
        try:
            digest = Digest(fd)
            say("what is there of it is looked at")
            await self._call(image, digest.read, deadline_s=FLUSH_S)
            if digest.hex() != image.sha256:
                await self._fetch_rest(image, digest, say)
            await self._check(image, fd, digest)
            say("it is being written to the disk")
            await self._call(
                image, partial(image_files.finish, self.folder, _name_of(image, image.format), fd), deadline_s=FLUSH_S
            )
        finally:
            os.close(fd)

    async def _part(self, image: Image, name: str, *, anew: bool) -> int:
        try:
            return await self._call(image, partial(image_files.open_part, self.folder, name, anew=anew), undo=os.close)
        except BlockingIOError:
            raise DiskTrouble(f"image {image.name}: another program of this host is fetching it", 2.0) from None

    async def _fetch_rest(self, image: Image, digest: Digest, say: Say) -> None:
        # Imported here: a supervisor whose machines have their disks does without HTTP and TLS.
        from kvmsupervisor.machine.image_download import fetch_rest  # noqa: PLC0415

        await fetch_rest(self, image, digest, say, download=self._download)

    async def _check(self, image: Image, fd: int, digest: Digest) -> None:
        """Refuse what is not the image, and what no disk may be made of."""
        found, size = digest.hex(), digest.size
        if found != image.sha256:
            await self._call(image, digest.drop)
            raise Hopeless(
                f"image {image.name}: what {shown_url(image.url)} gives has the wrong checksum: sha256={found} "
                f"({size} bytes), and its key says sha256={image.sha256}; correct the one that is wrong, URL or sum"
            )
        try:
            await self._call(image, partial(self._size, image, fd, image.format))
        except NotOne as error:
            raise Hopeless(f"image {image.name}: {error}") from error

    def _size(self, image: Image, fd: int, form: DiskFormat) -> int:
        """Bytes of the disk in a file."""
        if form is DiskFormat.RAW:
            size = -(-os.fstat(fd).st_size // disk_files.SECTOR) * disk_files.SECTOR
        else:
            try:
                size = qcow2.virtual_size(os.pread(fd, qcow2.HEADER_BYTES, 0))
            except qcow2.Refused as refused:
                raise NotOne(f"its file {refused}") from None
        if not 0 < size <= self.limits.size_bytes:
            raise NotOne(
                f"it is a disk of {size_text(size)}, and this host takes up to {size_text(self.limits.size_bytes)} "
                "(KVM_IMAGE_MAX_BYTES): raise that, or give a smaller image"
            )
        return size

    async def _convert(self, image: Image, source: Stored, form: DiskFormat, say: Say) -> None:
        name = _name_of(image, form)
        fd = await self._part(image, name, anew=True)
        try:
            await self._call(image, partial(self._empty, fd, form, source.size))

            def progress(percent: int) -> None:
                say(f"converted to {form.value}, {percent // STEP * STEP} %")

            progress(0)
            await self.with_room(
                self.folder,
                image_tools.convert(
                    *(source.fd, image.format, fd, form),
                    size=source.size,
                    become=() if self._user is None else self._user.become(),
                    progress=progress,
                ),
            )
            await self._call(image, partial(image_files.finish, self.folder, name, fd), deadline_s=FLUSH_S)
        except (ToolFailed, DiskTrouble):
            await self._call(image, partial(image_files.drop_part, self.folder, name))
            raise
        finally:
            os.close(fd)

    def _empty(self, fd: int, form: DiskFormat, size: int) -> None:
        """An empty disk of that size, for the user that converts."""
        if form is DiskFormat.QCOW2:
            os.pwrite(fd, qcow2.empty(size), 0)
        else:
            os.ftruncate(fd, size)
        if self._user is not None:
            os.fchown(fd, self._user.uid, self._user.gid)

    # --- room -------------------------------------------------------------------------------------------------

    async def room(self, folder: Path) -> int:
        """Bytes that an image may take on the file system of a folder.

        Raises:
            FileTrouble, OSError: it cannot be told.
        """
        async with self._measuring:
            found = await self._threads.call("measuring", partial(disk_files.room, folder, as_root=False))
        return found - self.limits.keep_bytes

    async def need_room(self, folder: Path, more: int, what: str) -> None:
        """Make sure that there is room for so many bytes.

        Raises:
            NoRoom: there is not.
            FileTrouble, OSError: it cannot be told.
        """
        left = await self.room(folder)
        if left < more:
            raise NoRoom(
                f"{what} needs {more >> 20} MiB in {folder}, {max(0, left) >> 20} MiB can be had there, and "
                f"{self.limits.keep_bytes >> 20} MiB stay free for machines: make room there",
                FAILED_S,
            )

    async def with_room(self, folder: Path, work: Awaitable[T]) -> T:
        """What `work` returns; it is cancelled once no room is left.

        Raises:
            NoRoom: that was so.
            FileTrouble, OSError: it cannot be told.
        """
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_EVERY_S))[0]:
                await self.need_room(folder, 0, "the rest of it")
        finally:
            task.cancel()
            await asyncio.wait({task})
        return task.result()


def library_of(
    settings: Settings,
    *,
    user: QemuUser | None,
    jobs: Jobs,
    kept: Callable[[], Awaitable[Collection[str] | None]],
    threads: Callable[[], Threads] = Threads,
) -> Library:
    """The library of a host with these settings; see `Library`."""
    return Library(
        settings.image_dir,
        is_own=settings.image_dir == IMAGE_DIR,
        limits=Limits(size_bytes=settings.image_max_bytes),
        sources=Sources(
            file_root=settings.media_root,
            ca_file=settings.media_cacert,
            follow_inward=settings.media_inward_redirects,
        ),
        user=user,
        jobs=jobs,
        kept=kept,
        threads=threads,
    )


def _name_of(image: Image, form: DiskFormat) -> str:
    return image.sha256 if form is image.format else f"{image.content}.{form.value}"


def _close(late: Stored | None) -> None:
    if late is not None:
        late.close()
