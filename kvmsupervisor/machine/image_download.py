"""An image as it comes from its server into its part: gone on with, counted, with room for it.

Imported when an image is fetched, and not before.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

from kvmsupervisor.adapters import fetch
from kvmsupervisor.adapters.disk_files import FileTrouble
from kvmsupervisor.adapters.fetch import FetchFailed, RangeRefused
from kvmsupervisor.adapters.image_files import Digest
from kvmsupervisor.domain.images import Image
from kvmsupervisor.domain.media import shown_url
from kvmsupervisor.machine.jobs import Say
from kvmsupervisor.machine.library import STEP, Library

LOOK_EVERY_BYTES = 64 << 20
"""How much of an image is fetched before it is looked again whether there is room left."""


class Download(Protocol):
    """Fetches an image, as `fetch.download` does."""

    async def __call__(
        self,
        url: str,
        into: fetch.Sink,
        *,
        have: int,
        limit_bytes: int,
        file_root: Path | None,
        ca_file: Path | None,
        follow_inward: bool,
    ) -> None:
        """Fetch it; see there."""
        ...


async def fetch_rest(library: Library, image: Image, digest: Digest, say: Say, *, download: Download | None) -> None:
    """Fetch what a part lacks of an image. What it comes to is not judged here.

    Args:
        library: whose part it is.
        image: which.
        digest: of the part.
        say: is told how far it is.
        download: fetches it.

    Raises:
        FileTrouble: it could not be had.
        DiskTrouble: there is no room for it.
    """
    resumed = digest.size > 0
    sink = _Filling(library, image, digest, say)
    get = fetch.download if download is None else download
    try:
        try:
            await _from_server(library, image, sink, digest.size, get)
        except RangeRefused:
            await _from_server(library, image, sink, 0, get)
        if digest.hex() != image.sha256 and resumed:
            # What was there was no beginning of it: the server has another file now, or a power cut left holes.
            await _from_server(library, image, sink, 0, get)
    except FetchFailed as error:
        raise FileTrouble(str(error)) from error


async def _from_server(library: Library, image: Image, sink: _Filling, have: int, download: Download) -> None:
    sources = library.sources
    await download(
        image.url,
        sink,
        have=have,
        limit_bytes=library.limits.size_bytes,
        file_root=sources.file_root,
        ca_file=sources.ca_file,
        follow_inward=sources.follow_inward,
    )
    await sink.flush()


class _Filling:
    """Takes what a server sends, a mebibyte at a time, and sees to room. Implements `fetch.Sink`."""

    def __init__(self, library: Library, image: Image, digest: Digest, say: Say) -> None:
        self._library = library
        self._image = image
        self._digest = digest
        self._say = say
        self._whole: int | None = None
        self._buffer = bytearray()
        self._looked_at = 0
        self._said = -1

    async def begin(self, at: int, whole: int | None) -> None:
        self._whole = whole
        self._buffer.clear()
        if at == 0:
            await self._library.write(self._image, self._digest.drop)
        await self._library.need_room(self._library.folder, (whole or at) - at, f"image {self._image.name}")
        self._looked_at = at
        self._tell()

    async def take(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= fetch.FILE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write what has come."""
        if not self._buffer:
            return
        data = bytes(self._buffer)
        self._buffer.clear()
        await self._library.write(self._image, partial(self._digest.append, data))
        if self._digest.size - self._looked_at >= LOOK_EVERY_BYTES:
            self._looked_at = self._digest.size
            await self._library.need_room(self._library.folder, 0, f"image {self._image.name}")
        self._tell()

    def _tell(self) -> None:
        if self._whole:
            step = self._digest.size * 100 // self._whole // STEP * STEP
            said = f"fetched {step} % of {size_for_people(self._whole)}"
        else:
            step = self._digest.size // LOOK_EVERY_BYTES
            said = f"fetched {size_for_people(step * LOOK_EVERY_BYTES)}, of a size that its server does not tell"
        if step != self._said:
            self._said = step
            self._say(f"{said} from {shown_url(self._image.url)}")


def size_for_people(size: int) -> str:
    """Bytes, roughly."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"
