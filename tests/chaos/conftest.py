"""What the chaos tests share: a guest that writes, and keys and hosts of a cluster (`tests.support.cluster`)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain.spec import RbdDisk
from tests.chaos.guest import ChaosGuest, build, qemu_wrapper
from tests.support.ceph import CLIENT_CAPS, POOL, Ceph
from tests.support.cluster import hosts, keys

__all__ = ["hosts", "keys"]


@pytest.fixture(scope="session")
def chaos_folder() -> Iterator[Path]:
    """Where any user can read: QEMU may run as another one."""
    folder = Path(tempfile.mkdtemp(prefix="kvs"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def chaos_guest(chaos_folder: Path) -> ChaosGuest:
    """The guest."""
    return build(chaos_folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a machine needs whose guest writes.

    Attributes:
        guest: what its keys say of it.
        disk: it boots from this.
        settings: of its hosts.
    """

    guest: ChaosGuest
    disk: RbdDisk
    settings: Mapping[str, Any]


@pytest.fixture
def chaos_stage(chaos_guest: ChaosGuest, chaos_disk: RbdDisk, chaos_folder: Path, ceph: Ceph) -> Stage:
    """A guest, a disk, and settings with which QEMU may be any user's."""
    conf = chaos_folder / "ceph.conf"
    shutil.copy(ceph.conf, conf)
    conf.chmod(0o644)
    settings = {"CEPH_CONF": str(conf), "CEPH_ID": "vm", "KVM_QEMU": str(qemu_wrapper(chaos_folder))}
    return Stage(guest=chaos_guest, disk=chaos_disk, settings=settings)


@pytest.fixture
def chaos_disk(ceph: Ceph, ceph_image: str, chaos_guest: ChaosGuest) -> RbdDisk:
    """A disk that it boots from, and that no other test has."""
    ceph.new_client("vm", CLIENT_CAPS)
    image = RbdDisk(POOL, f"{ceph_image}-chaos")
    chaos_guest.make_disk(ceph, image)
    return image
