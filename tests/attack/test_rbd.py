"""A machine with disks in Ceph inside all walls: librbd finds in its view what it needs, and its threads are few."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor.domain.limits import TASKS
from tests.support.ceph import POOL
from tests.support.farm import Farm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has other users, and raises walls")

DISKS = 4


@pytest.fixture
def conf(farm: Farm) -> Iterator[Path]:
    """Ceph's configuration where everybody may read it, as /etc/ceph/ceph.conf is."""
    path = Path("/tmp") / f"kvs-{farm.image.image}.conf"
    shutil.copy(farm.ceph.conf, path)
    path.chmod(0o644)
    yield path
    path.unlink()


def test_disks_in_ceph_in_a_view(farm: Farm, conf: Path) -> None:
    """Law: with each wall in its place it writes; each disk takes few of the threads that it may have."""
    host = farm.hosts("alpha", keys=farm.keys, CEPH_CONF=str(conf), CEPH_ID="vm", KVM_SHUTDOWN_TIMEOUT="0").start()
    assert [host.metric("wall", wall=wall) for wall in ("user", "view", "landlock")] == [1, 1, 1]
    farm.machine("alpha")
    host.wait_running("1")
    farm.writes()
    one = host.metric("instance_threads", instance="1")
    farm.keys.delete("1")
    host.wait_forgotten("1")
    more = {f"disk/{number}": f"{POOL}/{farm.image.image}-{number} size=16M" for number in range(1, DISKS)}
    farm.machine("alpha", **more)
    host.wait_running("1")
    farm.writes()
    many = host.metric("instance_threads", instance="1")
    print(f"threads: {one:.0f} with one disk, {many:.0f} with {DISKS}")  # noqa: T201 - for docs/security.md
    assert many + 12 * (many - one) / (DISKS - 1) < TASKS / 2
