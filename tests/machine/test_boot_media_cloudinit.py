"""Media as cloud-init itself reads them: Debian's package, unpacked."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.media import instance_id
from kvmsupervisor.machine.boot_media import Media, furnish
from tests.support.cloudinit import CloudInit, unpack_cloud_init

ROOT = Path(__file__).resolve().parents[2]
MACHINE = UUID("0c8b3f0e-9a3c-4ef4-a1f2-0d3f6f2f7a55")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def cloud_init() -> CloudInit:
    """cloud-init, fetched once for this and all later runs below `.cache/cloud-init` of the checkout."""
    return unpack_cloud_init(ROOT / ".cache" / "cloud-init")


async def made(folder: Path, data: bytes, *, instance: str = "web1", network_config: bytes | None = None) -> Media:
    (folder / "given").write_bytes(data)
    return await furnish(
        f"file://{folder}/given",
        directory=folder,
        instance=InstanceId(instance),
        uuid=MACHINE,
        file_root=folder,
        network_config=network_config,
    )


def contents(media: Media) -> list[tuple[str, dict[str, bytes]]]:
    """Both media as `CloudInit.read` wants them: their files by path, as `isoinfo` reads them."""
    return [(kind, content(medium)) for kind, medium in zip(("nocloud", "config_drive"), media.cdroms, strict=True)]


def content(medium: Path) -> dict[str, bytes]:
    def isoinfo(*args: str) -> bytes:
        return subprocess.run(
            ["isoinfo", "-R", "-i", medium, *args], check=True, capture_output=True, timeout=30
        ).stdout

    files = {name.removeprefix("/"): isoinfo("-x", name) for name in isoinfo("-f").decode().split()}
    # Of a folder there is nothing to extract.
    return {name: data for name, data in files.items() if data}


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"#cloud-config\npackages: [a]\n", [["text/cloud-config", "#cloud-config\npackages: [a]\n"]]),
        (b"#!/bin/sh\necho hello\n", [["text/x-shellscript", "#!/bin/sh\necho hello\n"]]),
        (gzip.compress(b"#cloud-config\n{}\n", mtime=0), [["text/cloud-config", "#cloud-config\n{}\n"]]),
        (b"#cloud-boothook\necho\n", [["text/cloud-boothook", "#cloud-boothook\necho\n"]]),
        (
            b"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\n"
            b"--b\nContent-Type: text/cloud-config\n\na: 1\n"
            b"--b\nContent-Type: text/x-shellscript\n\n#!/bin/sh\n--b--\n",
            [["text/cloud-config", "a: 1"], ["text/x-shellscript", "#!/bin/sh"]],
        ),
    ],
    ids=["cloud-config", "script", "gzip", "boothook", "multi-part"],
)
async def test_cloud_init_takes_both_media(
    tmp_path: Path, cloud_init: CloudInit, data: bytes, parts: list[list[str]]
) -> None:
    """Law: from either medium cloud-init takes the data for what it is, with the same instance id and host name."""
    media = await made(tmp_path, data)
    wanted = {"instance_id": str(instance_id(MACHINE, data)), "hostname": "web1", "parts": parts, "network": None}
    assert cloud_init.read(*contents(media)) == [wanted, wanted]


async def test_every_id_stays_a_text(tmp_path: Path, cloud_init: CloudInit) -> None:
    """Law: an id that YAML would take for something else is the host name all the same."""
    ids = ["1", "1e3", "null", "web-1.example.org"]
    media = []
    for instance in ids:
        media += contents(await made(tmp_path, b"#!/bin/sh\n", instance=instance))
    assert [found["hostname"] for found in cloud_init.read(*media)] == [name for name in ids for _ in range(2)]


async def test_a_network_config_is_read(tmp_path: Path, cloud_init: CloudInit) -> None:
    """Law: network-config on the NoCloud medium is what cloud-init configures."""
    media = await made(tmp_path, b"#!/bin/sh\n", network_config=b"version: 2\nethernets: {}\n")
    assert cloud_init.read(*contents(media))[0]["network"] == {"version": 2, "ethernets": {}}


async def test_the_media_are_found_by_their_labels(tmp_path: Path, cloud_init: CloudInit) -> None:
    """Law: cloud-init's generator, told by blkid what is there, finds each medium, and both together."""
    media = await made(tmp_path, b"#!/bin/sh\n")
    seed, drive = media.cdroms
    assert cloud_init.identify(seed) == ["NoCloud"]
    assert cloud_init.identify(drive) == ["ConfigDrive"]
    assert set(cloud_init.identify(seed, drive)) == {"NoCloud", "ConfigDrive"}
