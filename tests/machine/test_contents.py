"""What files begin with: whole copies, made once, told from other disks, never half, and never written over."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest

from kvmsupervisor import failpoints
from kvmsupervisor.adapters import disk_files, image_files
from kvmsupervisor.domain.images import note_of
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk
from kvmsupervisor.domain.spec import Disk, Spec
from kvmsupervisor.machine.images import DiskTrouble
from kvmsupervisor.machine.jobs import Underway
from kvmsupervisor.machine.library import Limits
from tests.fakes.images import Stock
from tests.fakes.storage import local_disks
from tests.support.images import RAW, Parts, disk_of, image, qcow2_of
from tests.support.web import site

ONE, TWO = InstanceId("one"), InstanceId("two")
G = 1 << 30


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    async with site() as made:
        yield Parts(made, RAW)


class Host:
    """One host's disks and library."""

    def __init__(self, path: Path, parts: Parts, *, of: DiskFormat = DiskFormat.RAW) -> None:
        self.stock = Stock(path)
        self.said: list[str] = []
        self.disks = local_disks(self.stock.disks)
        self.stock.keys["debian"] = image(parts.url, parts.data, of=of)

    async def check(self, *files: FileDisk, instance: InstanceId = ONE, known: tuple[str, ...] = ()) -> tuple[str, ...]:
        spec = Spec(ram_mib=64, disks=tuple(Disk(number, file=file) for number, file in enumerate(files)))
        return await self.disks.check(instance, spec, dict.fromkeys(known, "here"), self.stock.contents)

    async def made(self, *files: FileDisk, instance: InstanceId = ONE) -> tuple[str, ...]:
        """Ask until it is done."""
        async with asyncio.timeout(30):
            while True:
                try:
                    return await self.check(*files, instance=instance)
                except Underway as underway:
                    self.said.append(str(underway))
                    await asyncio.sleep(0.005)

    async def refused(self, *files: FileDisk, instance: InstanceId = ONE, known: tuple[str, ...] = ()) -> str:
        async with asyncio.timeout(30):
            while True:
                try:
                    await self.check(*files, instance=instance, known=known)
                except Underway:
                    await asyncio.sleep(0.005)
                except DiskTrouble as trouble:
                    return str(trouble)
                else:
                    raise AssertionError("it was not refused")

    def names(self) -> list[str]:
        return sorted(path.name for path in self.stock.disks.iterdir())


@pytest.mark.parametrize("of", DiskFormat)
@pytest.mark.parametrize("to", DiskFormat)
async def test_a_disk_of_an_image(tmp_path: Path, parts: Parts, of: DiskFormat, to: DiskFormat) -> None:
    """Law: a new disk has all of its image, in the format of its ending, sparse, the supervisor's alone."""
    if of is DiskFormat.QCOW2:
        parts.data = qcow2_of(tmp_path, RAW)
    host, disk = Host(tmp_path, parts, of=of), FileDisk(f"a.{to.value}", size=G, origin="debian")
    assert await host.made(disk) == ()
    assert all(said.startswith("disk/0: from=debian: ") for said in host.said), host.said
    path = host.stock.disks / disk.name
    assert disk_of(path, to) == RAW
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_blocks * 512 < len(RAW) / 2
    assert os.getxattr(path, disk_files.NOTE).decode() == note_of(ONE, "debian")


async def test_its_own_disk_is_left_as_it_is(tmp_path: Path, parts: Parts) -> None:
    """Law: `from=` is first content only: what the guest wrote stays, after each restart, wherever etcd's status is."""
    host, disk = Host(tmp_path, parts), FileDisk("a.raw", origin="debian")
    await host.made(disk)
    path = host.stock.disks / "a.raw"
    with path.open("r+b") as file:
        file.write(b"by the guest")
    del host.stock.keys["debian"]
    assert await host.check(disk) == ()
    assert await host.check(disk, known=("file:a.raw",)) == ()
    (said,) = await host.check(FileDisk("a.raw", origin="fedora"))
    assert said.startswith("disk/0: file:a.raw began with debian; from=fedora is for a new disk only")
    assert path.read_bytes().startswith(b"by the guest")
    assert parts.offsets == [0]


@pytest.mark.parametrize("content", [b"", b"something", RAW])
async def test_a_disk_that_has_other_content(tmp_path: Path, parts: Parts, content: bytes) -> None:
    """Law: `from=` on a disk that was not made by it is refused, and nothing is written over."""
    host = Host(tmp_path, parts)
    path = host.stock.disks / "a.raw"
    path.write_bytes(content)
    told = await host.refused(FileDisk("a.raw", size=G, origin="debian"))
    assert told.startswith("disk/0: from=debian is what a new disk begins with, and file:a.raw is there already")
    assert "leave from= out" in told
    assert path.read_bytes() == content
    assert parts.offsets == []
    # Without the attribute, such as after a copy by hand, what the machine ran with is its own.
    assert await host.check(FileDisk("a.raw", origin="debian"), known=("file:a.raw",)) == ()


async def test_another_machines_disk(tmp_path: Path, parts: Parts) -> None:
    """Law: a disk that an earlier machine has left is no new disk of the next one."""
    host, disk = Host(tmp_path, parts), FileDisk("a.raw", origin="debian")
    await host.made(disk)
    assert "was made for instance one" in await host.refused(disk, instance=TWO)


async def test_what_an_earlier_machine_of_that_id_left(tmp_path: Path, parts: Parts) -> None:
    """Law: a machine that was deleted and is created again gets its old disk, and is told so; a new disk is its own."""
    host, disk = Host(tmp_path, parts), FileDisk("a.raw", origin="debian")
    assert await host.made(disk) == ()
    # As often as it is looked at until its QEMU lives, and when that ended before its status was written.
    assert await host.check(disk) == ()
    host.stock.contents.left(ONE)
    (said,) = await host.check(disk)
    assert said.startswith("disk/0: file:a.raw was there already, made of debian for one before, and is used as it is")
    assert await host.check(disk, known=("file:a.raw",)) == ()


async def test_a_disk_that_is_missing_is_not_made_anew(tmp_path: Path, parts: Parts) -> None:
    """Law: what a machine has run with is never replaced by an image."""
    host, disk = Host(tmp_path, parts), FileDisk("a.raw", size=G, origin="debian")
    assert "the machine ran with it on here" in await host.refused(disk, known=("file:a.raw",))
    assert host.names() == []


async def test_two_that_want_one_file(tmp_path: Path, parts: Parts) -> None:
    """Law: of two machines that name one new disk one has it, and the other is told."""
    host, disk = Host(tmp_path, parts), FileDisk("a.raw", origin="debian")
    results = await asyncio.gather(
        *(host.made(disk, instance=instance) for instance in (ONE, TWO)), return_exceptions=True
    )
    owner = os.getxattr(host.stock.disks / "a.raw", disk_files.NOTE).decode().split()[0]
    loser = results[0 if owner == "two" else 1]
    assert results[0 if owner == "one" else 1] == ()
    assert f"was made for instance {owner}" in str(loser)
    assert (host.stock.disks / "a.raw").read_bytes() == RAW
    assert host.names() == ["a.raw"]


async def test_cut_off_while_it_is_copied(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a copy has no name before it is whole; one that was cut off is begun anew by the next supervisor."""
    host, disk = Host(tmp_path, parts), FileDisk("a.raw", origin="debian")
    reached = asyncio.Event()

    def waits(name: str) -> Awaitable[object] | None:
        if name == "copied":
            reached.set()
            return asyncio.Event().wait()
        return None

    monkeypatch.setattr(failpoints, "reached", waits)
    task = asyncio.ensure_future(host.made(disk))
    async with asyncio.timeout(30):
        await reached.wait()
    assert host.names() == []
    task.cancel()
    await asyncio.wait({task})
    await host.stock.contents.close()
    assert host.names() == []
    monkeypatch.undo()
    await Host(tmp_path, parts).made(disk)
    assert (host.stock.disks / "a.raw").read_bytes() == RAW


@pytest.mark.parametrize(
    ("origin", "entry", "wanted"),
    [
        (
            "fedora",
            None,
            "disk/0: from=fedora: there is no image fedora in the library: `kvmsupervisor image add fedora",
        ),
        ("debian", 2 << 20, "disk/0: from=debian: size=2M is less than the 3M of the image: write size=3M"),
    ],
)
async def test_bad_wishes(tmp_path: Path, parts: Parts, origin: str, entry: int | None, wanted: str) -> None:
    """Law: what is wrong names the key, and what would be right; nothing is made."""
    host = Host(tmp_path, parts)
    told = await host.refused(FileDisk("a.raw", size=entry, origin=origin))
    assert told.startswith(wanted)
    assert host.names() == []


async def test_too_little_room_for_a_copy(tmp_path: Path, parts: Parts) -> None:
    """Law: a copy that does not fit is not begun, and the reason tells how much is lacking."""
    host = Host(tmp_path, parts)
    disk = FileDisk("a.raw", origin="debian")
    (await host.stock.library.get(host.stock.keys["debian"], DiskFormat.RAW, lambda _: None)).close()
    host.stock.library.limits = Limits(size_bytes=G, keep_bytes=1 << 60)
    told = await host.refused(disk)
    assert told.startswith("disk/0: from=debian: a copy of the image debian needs")
    assert host.names() == []


async def test_a_neighbour_goes_on(tmp_path: Path, parts: Parts) -> None:
    """Law: while one machine waits for its image, another one gets its own disk."""
    host = Host(tmp_path, parts)
    parts.held.clear()
    for _ in range(3):
        with pytest.raises(Underway):
            await host.check(FileDisk("a.raw", origin="debian"))
        await asyncio.sleep(0)
    assert await host.check(FileDisk("b.raw", size=1 << 20), instance=TWO) == ()
    assert host.names() == ["b.raw"]
    parts.held.set()
    await host.stock.contents.close()


async def test_a_file_system_without_attributes(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: where no note can be kept no disk is made that could not be told from others; its reason says so."""

    def refuses(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "setxattr", refuses)
    host, disk = Host(tmp_path, parts), FileDisk("a.raw", origin="debian")
    assert "file system without extended attributes" in await host.refused(disk)
    assert host.names() == []


def test_blocks_are_shared_where_that_can_be(tmp_path: Path) -> None:
    """Law: a file system without reflinks says so, and the file is as it was."""
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x" * 8192)
    with source.open("rb") as one, target.open("w+b") as other:
        shared = image_files.share(one.fileno(), other.fileno())
        assert other.read() == (b"x" * 8192 if shared else b"")
