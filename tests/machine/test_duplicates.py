"""Disks that are copies of other disks: whole or not there, of what nobody writes to, and nothing of a snapshot."""

from __future__ import annotations

import asyncio
import fcntl
import json
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvmsupervisor import failpoints
from kvmsupervisor.domain.images import aside_of
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk
from kvmsupervisor.domain.spec import RbdDisk
from tests.machine import test_contents, test_contents_ceph
from tests.machine.test_contents import Host, parts
from tests.machine.test_contents_ceph import access, fresh, hosts, names, nothing_beside, read
from tests.support.ceph import POOL
from tests.support.ceph import Ceph as Cluster
from tests.support.images import RAW, Parts

__all__ = ["access", "fresh", "hosts", "parts"]

M = 1 << 20
Cut = Callable[[str, Awaitable[object]], Awaitable[None]]


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Cut:
    """Does something, cut off where it comes to a point."""

    async def cut(name: str, work: Awaitable[object]) -> None:
        reached = asyncio.Event()

        def waits(point: str) -> Awaitable[object] | None:
            if point != name:
                return None
            reached.set()
            return asyncio.Event().wait()

        with monkeypatch.context() as patch:
            patch.setattr(failpoints, "reached", waits)
            task = asyncio.ensure_future(work)
            async with asyncio.timeout(60):
                await reached.wait()
            task.cancel()
            await asyncio.wait({task})

    return cut


def tool(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True, text=True).stdout


def source(host: Host, form: DiskFormat) -> FileDisk:
    """A disk with content; a qcow2 one has a snapshot as well, with other content."""
    path = host.stock.disks / f"a.{form}"
    raw = host.stock.disks.parent / "raw"
    raw.write_bytes(RAW)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form.value, raw, path], check=True)
    if form is DiskFormat.QCOW2:
        subprocess.run(["qemu-img", "snapshot", "-c", "kvm-old", path], check=True)
    return FileDisk(path.name)


@pytest.mark.parametrize("of", DiskFormat)
@pytest.mark.parametrize("to", DiskFormat)
async def test_a_copy_of_a_file(tmp_path: Path, parts: Parts, of: DiskFormat, to: DiskFormat) -> None:
    """The same bytes in either format, at the size that its key says, without the snapshots of the other disk."""
    host = Host(tmp_path, parts)
    disk = FileDisk(f"b.{to}", size=8 * M, origin=f"file:{source(host, of).name}")
    assert await host.made(disk) == ()
    found = json.loads(tool("info", "--output=json", "-f", to.value, host.stock.disks / disk.name))
    assert "snapshots" not in found
    assert (host.stock.disks / disk.name).stat().st_mode & 0o777 == 0o600
    raw = tmp_path / "out"
    tool("convert", "-O", "raw", "-f", to.value, host.stock.disks / disk.name, raw)
    assert raw.read_bytes().rstrip(b"\0") == RAW.rstrip(b"\0")
    assert any("are being copied" in said or "begins" in said for said in host.said)


async def test_what_is_in_use_is_waited_for(tmp_path: Path, parts: Parts) -> None:
    """A copy of what somebody writes to is of no instant: the reason says what to do, and it goes on by itself."""
    host = Host(tmp_path, parts)
    disk = FileDisk("b.raw", origin=f"file:{source(host, DiskFormat.RAW).name}")
    with (host.stock.disks / "a.raw").open() as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        assert "is in use: it is copied while the machine that has it is off" in await host.refused(disk)
    host = Host(tmp_path, parts)
    await host.made(disk)


@pytest.mark.parametrize(
    ("origin", "size", "said"),
    [
        ("file:none.qcow2", None, "there is no file"),
        ("file:a.qcow2", 1 * M, "size=1M is less than the 3M of the image"),
        ("file:a.raw", None, "there is no file"),
    ],
)
async def test_bad_wishes(tmp_path: Path, parts: Parts, origin: str, size: int | None, said: str) -> None:
    host = Host(tmp_path, parts)
    source(host, DiskFormat.QCOW2)
    told = await host.refused(FileDisk("b.raw", size=size, origin=origin))
    assert told.startswith(f"disk/0: from={origin}: ")
    assert said in told
    assert host.names() == ["a.qcow2"]


async def test_a_header_that_names_another_file_is_refused(tmp_path: Path, parts: Parts) -> None:
    """A guest that broke out may have written it: no file of the host gets into a copy."""
    host = Host(tmp_path, parts)
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * M)
    tool("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", host.stock.disks / "a.qcow2")
    assert "needs a backing file" in await host.refused(FileDisk("b.raw", origin="file:a.qcow2"))
    assert host.names() == ["a.qcow2"]


async def test_cut_off(  # noqa: PLR0917 - fixtures
    tmp_path: Path, parts: Parts, cut_at: Cut, ceph: Cluster, hosts: Callable[..., test_contents_ceph.Host], fresh: int
) -> None:
    """No half has the name, of either kind, and the next attempt leaves nothing behind."""
    host = Host(tmp_path, parts)
    disk = FileDisk("b.qcow2", origin=f"file:{source(host, DiskFormat.QCOW2).name}")
    await cut_at("file duplicated", host.made(disk))
    await host.stock.contents.close()
    assert host.names() == ["a.qcow2"]
    await test_contents.Host(tmp_path, parts).made(disk)
    assert host.names() == ["a.qcow2", "b.qcow2"]

    one, image = hosts(), RbdDisk(POOL, f"copy{fresh}", origin=f"{POOL}/of{fresh}@kvm-s", copy=True)
    ceph.rbd_create(f"{POOL}/of{fresh}", "8M", "layering,exclusive-lock")
    ceph.rbd("bench", "--io-type", "write", "--io-total", "4M", f"{POOL}/of{fresh}")
    ceph.rbd("snap", "create", "--no-progress", f"{POOL}/of{fresh}@kvm-s")
    assert "may be removed at any time" in await one.refused(image)
    ceph.rbd("snap", "protect", f"{POOL}/of{fresh}@kvm-s")
    await cut_at("image duplicated", one.look(image))
    await one.contents.close()
    assert image.image not in names(ceph)
    assert any(name.startswith(aside_of(image.image)) for name in names(ceph))
    assert (await hosts().look(image)).disks == (), "nothing is left to be made under the lock"
    assert read(ceph, image.name, tmp_path) == read(ceph, f"{POOL}/of{fresh}@kvm-s", tmp_path)
    assert "parent" not in test_contents_ceph.info(ceph, image.name)
    await nothing_beside(ceph)
