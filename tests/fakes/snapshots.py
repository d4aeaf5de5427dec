"""Snapshots of images in Ceph, in memory, shared by the hosts of a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvmsupervisor.adapters.ceph import Ceph, CephAccess, CephAway, CephFailed, CephSnapshots, SnapshotInUse
from kvmsupervisor.domain.ceph import SnapshotInfo
from kvmsupervisor.domain.spec import RbdDisk


class FakeSnapshots(CephSnapshots):
    """A cluster's.

    Attributes:
        held: by image, its snapshots by name.
        clones_of: by `IMAGE@SNAP`, its clones.
        open_by: by image, who has it open.
        contents: by image, what is on it; a snapshot keeps what was.
        requests: by image, for which request it was rolled back.
        done: every change, in order, as `rbd` words.
        before: called before each change, with its words; may raise.
        away: it does not answer.
    """

    def __init__(self) -> None:
        super().__init__(Ceph(CephAccess()))
        self.held: dict[str, dict[str, SnapshotInfo]] = {}
        self.clones_of: dict[str, tuple[str, ...]] = {}
        self.open_by: dict[str, tuple[str, ...]] = {}
        self.contents: dict[str, str] = {}
        self.kept: dict[tuple[str, str], str] = {}
        self.requests: dict[str, str] = {}
        self.done: list[str] = []
        self.before: Callable[[str], None] = lambda words: None
        self.away = False

    async def of(self, image: RbdDisk) -> Mapping[str, SnapshotInfo]:
        if self.away:
            raise CephAway("Ceph does not answer")
        return dict(self._of(image))

    def _of(self, image: RbdDisk) -> dict[str, SnapshotInfo]:
        return self.held.setdefault(image.name, {})

    async def clones(self, image: RbdDisk, snap: str) -> tuple[str, ...]:
        return self.clones_of.get(f"{image.name}@{snap}", ())

    def _change(self, *words: str) -> None:  # type: ignore[override]
        if self.away:
            raise CephAway("Ceph does not answer")
        said = " ".join(words)
        self.before(said)
        self.done.append(said)

    async def create(self, image: RbdDisk, snap: str) -> None:
        self._change("create", f"{image.name}@{snap}")
        if snap in self._of(image):
            raise CephFailed("File exists", is_there=True)
        self._of(image)[snap] = SnapshotInfo(8 << 20, False)
        self.kept[image.name, snap] = self.contents.get(image.name, "")

    async def rename(self, image: RbdDisk, snap: str, name: str) -> None:
        self._change("rename", f"{image.name}@{snap}", name)
        held = self._of(image)
        if name in held:
            raise CephFailed("File exists", is_there=True)
        held[name] = held.pop(snap)
        self.kept[image.name, name] = self.kept.pop((image.name, snap), "")

    async def protect(self, image: RbdDisk, snap: str) -> None:
        self._change("protect", f"{image.name}@{snap}")
        held = self._of(image)
        held[snap] = SnapshotInfo(held[snap].size, True)

    async def remove(self, image: RbdDisk, snap: str, *, is_protected: bool) -> None:
        self._change("rm", f"{image.name}@{snap}")
        if clones := self.clones_of.get(f"{image.name}@{snap}"):
            raise SnapshotInUse(f"{image.name}@{snap} has clones: {', '.join(clones)}")
        del self._of(image)[snap]

    async def users(self, image: RbdDisk) -> tuple[str, ...]:
        return self.open_by.get(image.name, ())

    async def roll_back(self, image: RbdDisk, snap: str, *, size: int) -> None:
        self._change("rollback", f"{image.name}@{snap}")
        self.contents[image.name] = self.kept.get((image.name, snap), "")

    async def rolled_back(self, image: RbdDisk) -> str | None:
        return self.requests.get(image.name)

    async def note_rolled_back(self, image: RbdDisk, request: str) -> None:
        self._change("note", image.name, request)
        self.requests[image.name] = request
