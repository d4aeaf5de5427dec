"""Machines on a real Ceph, real supervisors, QEMUs whose guests do nothing but write: who writes, and who cannot.

What a guest wrote is read from its image; no list of processes is asked who is right. Fixture, to be imported by a
conftest: `farm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.spec import RbdDisk
from tests.support.ceph import CLIENT_CAPS, POOL, Ceph
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.rbd_qemu import WRITES_PER_S, count, make_writer_image

TTL_S = 2
"""Of a host's session: the shortest that is allowed."""


COUNT_S = 0.3
"""Between two looks at what a guest has written."""

WATCH_S = 12
"""After which Ceph forgets a client that died, here; 30 by default. Clients tell of themselves every 5 s."""


class Farm:
    """Hosts of one Ceph and one etcd, and images from which guests boot that count on them.

    Args:
        keys: of the cluster.
        hosts: makes its hosts.
        ceph: with an image for each of `images`, and the client `vm`.
        images: of the machines; the first is that of instance `1`.
    """

    def __init__(self, keys: Keys, hosts: Hosts, ceph: Ceph, *images: RbdDisk) -> None:
        self.keys, self.hosts, self.ceph = keys, hosts, ceph
        self.images = images

    @property
    def image(self) -> RbdDisk:
        """Of instance `1`."""
        return self.images[0]

    def host(self, name: str, **more: str) -> Host:
        """A host that has started."""
        settings: dict[str, Any] = {
            "CEPH_CONF": str(self.ceph.conf),
            "CEPH_ID": "vm",
            "KVM_QEMU_USER": "",
            "KVM_EXTRA_FLAGS": "any",
            "KVM_SESSION_TTL": f"{TTL_S}",
            "KVM_SHUTDOWN_TIMEOUT": "0",
            **more,
        }
        return self.hosts(name, keys=self.keys, **settings).start()

    def pair(self, wait_s: int) -> tuple[Host, Host]:
        """Two hosts whose takeovers wait so long for disks that are in use."""
        return self.host("alpha", KVM_TAKEOVER_WAIT=f"{wait_s}"), self.host("beta", KVM_TAKEOVER_WAIT=f"{wait_s}")

    def machine(self, host: str, instance: str = "1", **wishes: object) -> None:
        """A machine that boots from its image: `1` from the first, `2` from the second."""
        image = self.images[int(instance) - 1]
        self.keys.machines(host, instance, **{"ram": 16, "rbd": f"{image.name} iops={WRITES_PER_S}", **wishes})

    def writes(self, instance: str = "1") -> None:
        """Wait until the guest has written more than it had."""
        image = self.images[int(instance) - 1]
        before = count(self.ceph, image)
        eventually(f"a write to {image.name}", lambda: count(self.ceph, image) != before, poll_s=COUNT_S)

    def lock(self, instance: str = "1") -> Lock:
        """The instance's lock."""
        found = eventually(f"a lock of {instance}", lambda: self.keys.lock(instance))
        assert isinstance(found, Lock)
        return found

    @property
    def address(self) -> str:
        """The one storage client of instance `1` on record."""
        (found,) = self.lock().clients
        return found


def writer_image(ceph: Ceph, name: str, folder: Path) -> RbdDisk:
    """An image from which a guest boots that counts on it; the client `vm` is there."""
    ceph.new_client("vm", CLIENT_CAPS)
    made = RbdDisk(POOL, name)
    make_writer_image(ceph, made, folder)
    return made


@pytest.fixture(scope="session")
def brisk_ceph(ceph: Ceph) -> Ceph:
    """The cluster of this worker, which forgets the dead soon."""
    ceph.ceph("tell", "osd.0", "config", "set", "osd_client_watch_timeout", str(WATCH_S))
    return ceph


@pytest.fixture
def farm(keys: Keys, hosts: Hosts, brisk_ceph: Ceph, ceph_image: str, tmp_path: Path) -> Farm:
    """A Ceph with one image, and hosts on the etcd that others use too."""
    return Farm(keys, hosts, brisk_ceph, writer_image(brisk_ceph, f"{ceph_image}-writer", tmp_path))
