"""What a disk is made of on file systems of other kinds: each on a loop device of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvmsupervisor.adapters import disk_files
from kvmsupervisor.domain.images import note_of
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk
from tests.machine.test_contents import ONE, G, Host
from tests.support.images import RAW, Parts, disk_of, qcow2_of
from tests.support.web import site

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")

SIZE = 512 << 20
"""The least that mkfs.xfs takes is 300 MiB. The file has holes."""

MAKE = {
    "xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q"),
    "ext4": ("mkfs.ext4", "-q"),
}
"""How each is made."""

REFLINKS = ("xfs", "btrfs")


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    async with site() as made:
        yield Parts(made, RAW)


@pytest.fixture
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty file system of the kind that the test names."""
    make = MAKE[request.param]
    device, place = tmp_path / "device", tmp_path / "mounted"
    with device.open("wb") as file:
        file.truncate(SIZE)
    place.mkdir()
    subprocess.run([*make, device], check=True, timeout=120)
    done = subprocess.run(["mount", "-o", "loop", device, place], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{request.param} cannot be mounted by a loop device: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True, timeout=120)


def extents(path: Path) -> list[str]:
    """The flags of a file's extents, as filefrag(8) names them: FIEMAP_EXTENT_SHARED is `shared`."""
    done = subprocess.run(["filefrag", "-s", "-v", path], capture_output=True, text=True, check=True, timeout=60)
    rows = [line.split(":") for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    return [row[-1].strip() for row in rows]


@pytest.mark.parametrize("mounted", REFLINKS, indirect=True)
@pytest.mark.parametrize("of", DiskFormat)
async def test_blocks_are_shared(mounted: Path, parts: Parts, tmp_path: Path, of: DiskFormat) -> None:
    """Law: where the file system has reflinks a disk is made of the image's own blocks; what is written is its own."""
    if of is DiskFormat.QCOW2:
        parts.data = qcow2_of(tmp_path, RAW)
    host, disk = Host(mounted, parts, of=of), FileDisk(f"a.{of.value}", size=G, origin="debian")
    await host.made(disk)
    path = mounted / "disks" / disk.name
    assert disk_of(path, of) == RAW
    assert os.getxattr(path, disk_files.NOTE).decode() == note_of(ONE, "debian")
    found = extents(path)
    assert found
    assert all("shared" in flags for flags in found), found
    # The image is as it was, whatever a guest does.
    (whole,) = [one for one in (mounted / "images").iterdir() if one.is_file()]
    before = whole.read_bytes()
    with path.open("r+b") as file:
        file.write(b"by its guest" * 1000)
    assert whole.read_bytes() == before
    assert any("shared" not in flags for flags in extents(path))


@pytest.mark.parametrize("mounted", ["ext4"], indirect=True)
async def test_blocks_are_copied_elsewhere(mounted: Path, parts: Parts) -> None:
    """Law: where it has none a disk is a copy with the image's holes, and nothing is shared."""
    host, disk = Host(mounted, parts), FileDisk("a.raw", size=G, origin="debian")
    await host.made(disk)
    path = mounted / "disks" / disk.name
    assert path.read_bytes()[: len(RAW)] == RAW
    assert path.stat().st_blocks * 512 < len(RAW) / 2
    assert not any("shared" in flags for flags in extents(path))
