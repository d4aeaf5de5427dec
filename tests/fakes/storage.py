"""Ceph as the loop of an instance sees it, in memory: who has an image open, who is shut out, and outages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from kvmsupervisor.adapters.ceph import Ceph, CephAccess
from kvmsupervisor.adapters.disk_files import Threads
from kvmsupervisor.cluster.fencing import Admit, InUse, NotFenced, StorageAway
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Lock, Storage
from kvmsupervisor.domain.spec import RbdDisk, Spec, spec_from_object
from kvmsupervisor.domain.storage import growable, had_open, images_of
from kvmsupervisor.machine.images import Disks, DiskTrouble
from kvmsupervisor.machine.local_disks import FileAccess, LocalDisks

T = TypeVar("T")


def address_of(pid: int) -> str:
    """The storage client of a QEMU."""
    return f"192.0.2.9:0/{pid}"


class FakeStorage:
    """A `Fencing`, shared by the hosts of a test.

    Attributes:
        users_of: by image, whom storage names as using it.
        watching: by image, who of them is alive.
        elsewhere: by image, who else has it open when a QEMU's own client is asked for.
        fenced: in order, also those that were fenced again.
        away: it does not answer.
        refused: what it says instead of fencing.
        asked: how many questions there were, fences included.
    """

    def __init__(self) -> None:
        self.users_of: dict[str, set[str]] = {}
        self.watching: dict[str, set[str]] = {}
        self.elsewhere: dict[str, set[str]] = {}
        self.fenced: list[str] = []
        self.away = False
        self.refused: str | None = None
        self.asked = 0

    async def clients(
        self,
        record: Incarnation,
        known: Collection[str] = (),
        *,
        new: Collection[str] = (),
        admit: Admit | None = None,
    ) -> tuple[str, ...]:
        if record.storage is Storage.NONE:
            return ()
        self._ask()
        spec = spec_from_object(record.spec)
        assert spec is not None
        assert record.pid is not None
        if others := {client for image in images_of(spec) for client in self.elsewhere.get(image.name, ())}:
            raise InUse("the image is open elsewhere, too", sorted({address_of(record.pid), *others}))
        return tuple(address_of(record.pid) for _ in images_of(spec)[:1])

    async def fence(self, addresses: Collection[str]) -> None:
        if not addresses:
            return
        self._ask()
        if self.refused is not None:
            raise NotFenced(self.refused)
        self.fenced += addresses
        for names in self.watching.values():
            names.difference_update(addresses)

    async def shut_out(self, addresses: Collection[str]) -> tuple[str, ...]:
        if not addresses:
            return ()
        self._ask()
        return tuple(address for address in addresses if address in self.fenced)

    async def users(self, images: Collection[RbdDisk]) -> tuple[str, ...]:
        return self._named(self.users_of, images)

    async def watchers(self, images: Collection[RbdDisk], lock: Lock | None = None) -> tuple[str, ...]:
        had = () if lock is None else self._named(self.watching, had_open(lock, images))
        own = {address for address in had if lock is not None and address in lock.clients}
        return tuple(sorted({*self._named(self.watching, images), *own}))

    def _named(self, table: dict[str, set[str]], images: Collection[RbdDisk]) -> tuple[str, ...]:
        if not images:
            return ()
        self._ask()
        return tuple(sorted({name for image in images for name in table.get(image.name, ())}))

    def _ask(self) -> None:
        self.asked += 1
        if self.away:
            raise StorageAway("Ceph does not answer")


class FakeDisks(Disks):
    """Images that are all there, unless a test says otherwise.

    Attributes:
        trouble: what is wrong with them, None for nothing.
        bytes_of: sizes that are known, by image.
    """

    def __init__(self) -> None:
        super().__init__(Ceph(CephAccess()))
        self.trouble: str | None = None
        self.bytes_of: dict[str, int] = {}

    async def check(self, instance: InstanceId, spec: Spec, *, but_made: bool = False) -> str:
        if self.trouble is not None:
            raise DiskTrouble(self.trouble)
        return "AQBe"

    async def sizes(self, spec: Spec, tell: Callable[[str], None]) -> dict[str, int]:
        if self.trouble is not None:
            tell(self.trouble)
            return {}
        return {
            node: self.bytes_of[image.name] for node, image in growable(spec).items() if image.name in self.bytes_of
        }


class AtOnce(Threads):
    """No threads: what is called is done at once, so that virtual time need not wait for it."""

    async def call(
        self, name: str, work: Callable[[], T], *, deadline_s: float = 0.0, undo: Callable[[T], None] = lambda _: None
    ) -> T:
        return work()


def local_disks(folder: Path, room: Callable[[], int] = lambda: 1 << 40) -> LocalDisks:
    """Real files in a folder of the test's, on a file system that has as much room as a test says."""
    access = FileAccess(threads=AtOnce, room=lambda folder, as_root: room())
    return LocalDisks(folder, is_own=True, as_root=True, access=access)
