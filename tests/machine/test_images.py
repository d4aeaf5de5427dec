"""What is looked at before a start, on a real Ceph cluster: images, pools, features, the key, and each way to fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.adapters.ceph import Ceph, CephAccess
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import Disk, Firmware, RbdDisk, Spec
from kvmsupervisor.machine.images import AWAY_RETRY_S, RETRY_S, Disks, DiskTrouble
from tests.support.ceph import CLIENT_CAPS, POOL
from tests.support.ceph import Ceph as Cluster

ONE = InstanceId("one")


@pytest.fixture(scope="module")
def access(ceph: Cluster) -> CephAccess:
    """The client that docs/ceph.md tells operators to make."""
    ceph.new_client("vm", CLIENT_CAPS)
    return CephAccess(user="vm", conf=str(ceph.conf))


@pytest.fixture
def image(ceph_image: str) -> RbdDisk:
    return RbdDisk(POOL, ceph_image)


async def trouble(disks: Disks, spec: Spec) -> DiskTrouble:
    with pytest.raises(DiskTrouble) as found:
        await disks.check(ONE, spec)
    return found.value


async def test_what_is_there_comes_with_the_key(ceph: Cluster, access: CephAccess, image: RbdDisk) -> None:
    """All images of a machine are there: the key for QEMU is what the cluster has. Variables are made later."""
    disks = Disks(Ceph(access))
    key = ceph.ceph("auth", "get-key", "client.vm").strip()
    assert await disks.check(ONE, Spec(ram_mib=64, rbd=image)) == key
    assert await disks.check(ONE, Spec(ram_mib=64, rbd=image, firmware=Firmware.UEFI)) == key


async def test_what_is_not_there_is_named_by_its_key(access: CephAccess, image: RbdDisk) -> None:
    """The reason names the key, what was looked for, and what helps; it is looked at again soon."""
    disks, gone = Disks(Ceph(access)), RbdDisk(POOL, "gone")
    found = await trouble(disks, Spec(ram_mib=64, rbd=image, disks=(Disk(1, gone),)))
    assert str(found).startswith("disk/1: there is no such image: ")
    assert str(found).endswith("`rbd create` makes one")
    assert found.retry_s == RETRY_S
    found = await trouble(disks, Spec(ram_mib=64, rbd=RbdDisk("lake", "x"), firmware=Firmware.UEFI))
    assert "there is no such pool" in str(found)


async def test_an_image_that_leaves_no_trace_is_refused(ceph: Cluster, access: CephAccess, image: RbdDisk) -> None:
    """Law 5: without `exclusive-lock` only what is not written to, or on the operator's word."""
    bare = f"{image.image}-bare"
    ceph.rbd_create(f"{POOL}/{bare}", features="layering")
    spec = Spec(ram_mib=64, rbd=RbdDisk(POOL, bare))
    found = await trouble(Disks(Ceph(access)), spec)
    assert f"rbd feature enable {POOL}/{bare} exclusive-lock" in str(found)
    assert await Disks(Ceph(access), allow_unfenced=True).check(ONE, spec)
    assert await Disks(Ceph(access)).check(ONE, Spec(ram_mib=64, rbd=RbdDisk(POOL, bare, ro=True)))


async def test_an_image_of_which_replicas_are_read_is_refused(
    ceph: Cluster, access: CephAccess, image: RbdDisk
) -> None:
    """Law 5: unless it is not written to, or on the operator's word; what the message advises is enough.

    Why: tests/cluster/test_late_osd.py.
    """
    spec = Spec(ram_mib=64, rbd=image)
    ceph.rbd("config", "image", "set", image.name, "rbd_read_from_replica_policy", "localize")
    found = await trouble(Disks(Ceph(access)), spec)
    assert "rbd: rbd_read_from_replica_policy is localize" in str(found)
    assert await Disks(Ceph(access), allow_unfenced=True).check(ONE, spec)
    assert await Disks(Ceph(access)).check(ONE, Spec(ram_mib=64, rbd=replace(image, ro=True)))
    advice = str(found).partition("`rbd ")[2].partition("`")[0]
    ceph.rbd(*advice.split(), name="vm")
    assert await Disks(Ceph(access)).check(ONE, spec)


async def test_a_cluster_without_quorum_is_waited_for(ceph: Cluster, access: CephAccess, image: RbdDisk) -> None:
    """No answer is no verdict on the image: it is told, and asked again sooner than what an operator has to mend."""
    disks = Disks(Ceph(access, answer_s=0.3))
    ceph.stop_mon()
    try:
        found = await trouble(disks, Spec(ram_mib=64, rbd=image))
        assert "Ceph does not answer" in str(found)
        assert found.retry_s == AWAY_RETRY_S < RETRY_S
        told: list[str] = []
        assert await disks.sizes(Spec(ram_mib=64, rbd=image), told.append) == {}
        assert [why for why in told if image.name in why and "Ceph does not answer" in why] == told != []
    finally:
        ceph.cont_mon()
    assert await Disks(Ceph(access)).check(ONE, Spec(ram_mib=64, rbd=image))


async def test_who_may_not_is_told(ceph: Cluster, image: RbdDisk) -> None:
    """A client that the cluster does not know, or not well enough, has its own reason."""
    found = await trouble(Disks(Ceph(CephAccess(user="nobody", conf=str(ceph.conf)))), Spec(ram_mib=64, rbd=image))
    assert "client.nobody" in str(found)
    assert found.retry_s == RETRY_S


async def test_sizes_of_what_may_grow(ceph: Cluster, access: CephAccess, image: RbdDisk) -> None:
    """By block node, of disks that are written to; a missing one does not hide the others."""
    ceph.rbd("resize", "--no-progress", "--size", "16M", image.name)
    spec = Spec(
        ram_mib=64, rbd=image, disks=(Disk(1, RbdDisk(POOL, "gone")), Disk(2, RbdDisk(POOL, image.image, ro=True)))
    )
    told: list[str] = []
    assert await Disks(Ceph(access)).sizes(spec, told.append) == {"disk0": 16 << 20}
    assert len(told) == 1
    assert f"{POOL}/gone" in told[0]
