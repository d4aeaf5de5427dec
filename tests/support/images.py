"""Images of tests, and a server that sends parts of one, or does so badly."""

from __future__ import annotations

import asyncio
import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from kvmsupervisor.domain.images import Image
from kvmsupervisor.domain.local_disk import DiskFormat
from tests.support.web import Answer, Site

MARK = b"first content of a disk "

RAW = b"".join(MARK + str(number).encode() for number in range(3000)).ljust(3 << 20, b"\0")
"""A raw image of 3 MiB, most of it zeros."""


def image(url: str, data: bytes, *, name: str = "debian", of: DiskFormat = DiskFormat.RAW) -> Image:
    """The entry of the library for some bytes."""
    return Image(name=name, url=url, sha256=hashlib.sha256(data).hexdigest(), format=of)


def qcow2_of(folder: Path, data: bytes, *options: str) -> bytes:
    """A qcow2 image with these bytes as its disk, made by QEMU."""
    raw, made = folder / "made.raw", folder / "made.qcow2"
    raw.write_bytes(data)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(made)], check=True, timeout=60
    )
    raw.unlink()
    found = made.read_bytes()
    made.unlink()
    return found


def disk_of(path: Path, of: DiskFormat) -> bytes:
    """What a guest would read."""
    if of is DiskFormat.RAW:
        return path.read_bytes()
    out = path.with_name(f"{path.name}.read")
    subprocess.run(["qemu-img", "convert", "-f", of.value, "-O", "raw", str(path), str(out)], check=True, timeout=60)
    found = out.read_bytes()
    out.unlink()
    return found


class Parts:
    """Serves some bytes at `/image`, also from the middle.

    Attributes:
        data: the bytes.
        cut_at: how many it sends before it closes the connection; None for all.
        ranges: whether it knows ranges.
        held: set while it may send on.
        offsets: from where each request wanted it.
    """

    def __init__(self, site: Site, data: bytes) -> None:
        self.data = data
        self.cut_at: int | None = None
        self.ranges = True
        self.held = asyncio.Event()
        self.held.set()
        self.hold_at = 0
        self.offsets: list[int] = []
        self._site = site
        site.answers["/image"] = self.answer

    @property
    def url(self) -> str:
        return self._site.url("/image")

    async def answer(self, writer: asyncio.StreamWriter) -> None:
        found = re.search(r"\r\nRange: bytes=([0-9]+)-\r\n", self._site.requests[-1])
        at = int(found[1]) if found and self.ranges else 0
        self.offsets.append(int(found[1]) if found else 0)
        whole = len(self.data)
        if at >= whole:
            writer.write(f"HTTP/1.1 416 No\r\nContent-Range: bytes */{whole}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {whole}\r\n\r\n"
        if at:
            head = (
                f"HTTP/1.1 206 Partial\r\nContent-Range: bytes {at}-{whole - 1}/{whole}\r\n"
                f"Content-Length: {whole - at}\r\n\r\n"
            )
        writer.write(head.encode())
        end = whole if self.cut_at is None else self.cut_at
        writer.write(self.data[at : self.hold_at])
        await writer.drain()
        await self.held.wait()
        writer.write(self.data[max(at, self.hold_at) : end])


def chunked_for_ever(piece: bytes) -> Answer:
    """A body without an end, of a length that is not told."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()

    return answer


async def until_done(ask: Callable[[], object], *, limit_s: float = 60.0) -> object:
    """Ask again while it is being done; what it came to."""
    from kvmsupervisor.machine.jobs import Underway  # noqa: PLC0415

    async with asyncio.timeout(limit_s):
        while True:
            try:
                found = ask()
                return await found if asyncio.iscoroutine(found) else found
            except Underway:
                await asyncio.sleep(0.01)
