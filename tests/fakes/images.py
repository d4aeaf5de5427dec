"""The image library as a host sees it, on real files: its keys are a dictionary, and no other host imports anything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvmsupervisor.adapters import fetch
from kvmsupervisor.adapters.ceph import Ceph, CephAccess, CephImages
from kvmsupervisor.domain.images import Image
from kvmsupervisor.machine.contents import Contents
from kvmsupervisor.machine.image_download import Download
from kvmsupervisor.machine.jobs import Jobs
from kvmsupervisor.machine.library import Library, Limits, Sources


class FakeKeys(dict[str, Image]):
    """The entries of the library, by name."""

    async def get(self, name: str) -> Image | None:  # type: ignore[override]
        return super().get(name)

    async def sums(self) -> frozenset[str]:
        return frozenset(image.sha256 for image in self.values())


class FakeImports:
    """Who imports what.

    Attributes:
        others: the host that does, by what.
        claimed: what this one has claimed, in order.
    """

    def __init__(self) -> None:
        self.others: dict[str, str] = {}
        self.claimed: list[str] = []

    @asynccontextmanager
    async def claim(self, what: str) -> AsyncIterator[str | None]:
        self.claimed.append(what)
        yield self.others.get(what)


class Stock:
    """A host's library and all that belongs to it, below one folder.

    Attributes:
        keys: of the library.
        imports: who imports what.
        disks: the folder of disks.
        images: the folder of images.
        library: of this host.
        contents: of this host.
    """

    def __init__(
        self,
        path: Path,
        *,
        limits: Limits | None = None,
        sources: Sources | None = None,
        download: Download = fetch.download,
        ceph: Ceph | None = None,
        imports: FakeImports | None = None,
        keys: FakeKeys | None = None,
    ) -> None:
        self.keys = FakeKeys() if keys is None else keys
        self.imports = imports or FakeImports()
        self.disks, self.images = path / "disks", path / "images"
        self.disks.mkdir(parents=True, exist_ok=True)
        self.jobs = Jobs()
        self.library = Library(
            self.images,
            is_own=True,
            limits=limits or Limits(size_bytes=1 << 30, keep_bytes=0),
            sources=sources or Sources(file_root=path),
            user=None,
            jobs=self.jobs,
            kept=self.keys.sums,
            download=download,
        )
        self.contents = Contents(
            library=self.library,
            jobs=self.jobs,
            keys=self.keys,
            imports=self.imports,
            ceph=CephImages(ceph or Ceph(CephAccess())),
            folder=self.disks,
            sweep_after_s=0.0,
        )
