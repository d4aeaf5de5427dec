"""A Ceph client for each guest, with real QEMUs on a real cluster: who may open what, fencing, changed keys."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor.adapters.ceph import Ceph, CephAccess, CephError, CephSnapshots
from kvmsupervisor.adapters.handed import sealed
from kvmsupervisor.cluster.fencing import CephFencing
from kvmsupervisor.domain import hardware
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import Firmware, RbdDisk, Spec
from kvmsupervisor.machine.images import Disks, DiskTrouble
from tests.cluster.test_fencing import record, until
from tests.support.ceph import CLIENT_CAPS, FEATURES, POOL
from tests.support.ceph import Ceph as Cluster
from tests.support.rbd_qemu import RbdQemu, count, make_writer_image

WEB1 = InstanceId("web1")
DISK = RbdDisk(POOL, "disk", namespace="web1")
SCRIPT = Path(__file__).resolve().parents[2] / "config" / "ceph-client"


def client(ceph: Cluster, *words: str) -> str:
    environment = {"PATH": os.environ["PATH"], "CEPH_CONF": str(ceph.conf)}
    return subprocess.run([SCRIPT, *words], env=environment, check=True, capture_output=True, text=True).stdout


def keep(ceph: Cluster, name: str, keyring: str) -> None:
    (ceph.folder / f"client.{name}.keyring").write_text(keyring)


@pytest.fixture(scope="module")
def ceph() -> Iterator[Cluster]:
    """A cluster of its own: its images and clients have names that other tests use, too."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def access(ceph: Cluster) -> CephAccess:
    """The hosts' client, and one for each guest."""
    ceph.new_client("vm", CLIENT_CAPS)
    for guest in ("web1", "web2"):
        keep(ceph, f"kvm-{guest}", client(ceph, "create", f"kvm-{guest}", f"{POOL}/{guest}"))
        ceph.rbd_create(f"{POOL}/{guest}/disk")
    ceph.rbd_create(f"{POOL}/old")
    return CephAccess(user="vm", conf=str(ceph.conf), guests="kvm-%i")


@pytest.fixture
def writer(ceph: Cluster, access: CephAccess, ceph_image: str, tmp_path: Path) -> RbdDisk:
    made = RbdDisk(POOL, f"{ceph_image}-writer", namespace="web1")
    make_writer_image(ceph, made, tmp_path)
    return made


def side(ceph: Cluster, key: str) -> hardware.Ceph:
    """How a QEMU reaches Ceph with this key, and with no keyring."""
    return hardware.Ceph(user="kvm-web1", conf=str(ceph.conf), key=sealed("ceph-key", key.encode()))


async def refusal(access: CephAccess, spec: Spec, instance: InstanceId = WEB1) -> str:
    with pytest.raises(DiskTrouble) as found:
        await Disks(Ceph(access)).check(instance, spec)
    return str(found.value)


async def test_a_guest_has_its_own_key_and_its_own_images(ceph: Cluster, access: CephAccess) -> None:
    """Law: the key that QEMU gets is its guest's; what its client may not open is refused, before any lock is taken."""
    disks = Disks(Ceph(access))
    key = await disks.check(WEB1, Spec(ram_mib=64, rbd=DISK))
    assert key == ceph.ceph("auth", "get-key", "client.kvm-web1").strip()
    assert await disks.check(WEB1, Spec(ram_mib=64, rbd=DISK, firmware=Firmware.UEFI)) == key
    made = RbdDisk(POOL, "new", namespace="web1", size=1 << 30, origin="debian")
    assert await disks.check(WEB1, Spec(ram_mib=64, rbd=made)) == key
    for stranger in (
        RbdDisk(POOL, "disk", namespace="web2"),
        RbdDisk(POOL, "old"),
        RbdDisk(POOL, "disk", namespace="web2", ro=True),
        # Images that are to be made, or to grow, with the supervisor's rights.
        RbdDisk(POOL, "new", namespace="web2", size=1 << 30),
        RbdDisk(POOL, "disk", namespace="web2", size=1 << 40),
        RbdDisk(POOL, "copy", namespace="web1", origin=f"{POOL}/web2/disk@s"),
        RbdDisk(POOL, "copy", namespace="web1", origin=f"{POOL}/old@s"),
    ):
        said = await refusal(access, Spec(ram_mib=64, rbd=stranger))
        assert "is not open to the guest of web1" in said
        assert "config/ceph-client show kvm-web1" in said
        assert f"{ceph.folder}/client.kvm-web1.keyring" in said


async def test_a_missing_or_wrong_key_is_named_with_file_and_command(ceph: Cluster, access: CephAccess) -> None:
    """Law: which file was looked for, and which command makes it."""
    spec = Spec(ram_mib=64, rbd=RbdDisk(POOL, "disk", namespace="web3"))
    said = await refusal(access, spec, InstanceId("web3"))
    assert f"{ceph.folder}/client.kvm-web3.keyring: No such file" in said
    assert f"`config/ceph-client create kvm-web3 {POOL}/web3`" in said
    ceph.rbd("namespace", "create", f"{POOL}/web3")
    ceph.rbd_create(f"{POOL}/web3/disk")
    keep(ceph, "kvm-web4", (ceph.folder / "client.kvm-web1.keyring").read_text().replace("kvm-web1", "kvm-web4"))
    said = await refusal(access, spec, InstanceId("web4"))
    assert "its key is wrong, or the cluster has no such client" in said
    assert f"{ceph.folder}/client.kvm-web4.keyring" in said


async def test_fencing_takes_no_rights_of_the_guest(ceph: Cluster, access: CephAccess, writer: RbdDisk) -> None:
    """Laws 3 and 4: a guest that may shut nobody out is found, shut out and followed by the next one, which writes.

    Without the supervisor's part the next one's first write fails: its client may not take the dead one's lock away.
    """
    key = await Disks(Ceph(access)).check(WEB1, Spec(ram_mib=64, rbd=writer))
    fencing = CephFencing(Ceph(access))
    async with RbdQemu(ceph, writer, side=side(ceph, key)) as first:
        (address,) = await fencing.clients(record(writer))
        await first.cont()
        await until(lambda: count(ceph, writer))
        assert await fencing.users([writer]) == (address,)
        first.freeze()
        await fencing.fence([address])
        async with RbdQemu(ceph, writer, side=side(ceph, key)) as second:
            # As for a client of which nothing is known: what the guest itself may do.
            ours = CephFencing(Ceph(CephAccess(user="vm", conf=str(ceph.conf))))
            (other,) = await ours.clients(record(writer), known=[address])
            await second.cont()
            await second.until_event("BLOCK_IO_ERROR")
            await fencing.fence([other])
        async with RbdQemu(ceph, writer, side=side(ceph, key)) as third:
            await fencing.clients(record(writer), known=[address, other])
            before = count(ceph, writer)
            await third.cont()
            await until(lambda: count(ceph, writer) != before)
            first.thaw()
            await first.until_event("BLOCK_IO_ERROR")
            assert "BLOCK_IO_ERROR" not in third.events


async def test_a_key_changes_while_its_guest_runs(ceph: Cluster, access: CephAccess, writer: RbdDisk) -> None:
    """Law: a guest whose key was changed goes on; the next start takes the new key, and the old one is no more."""
    spec = Spec(ram_mib=64, rbd=writer)
    old = await Disks(Ceph(access)).check(WEB1, spec)
    async with RbdQemu(ceph, writer, side=side(ceph, old)) as qemu:
        await qemu.cont()
        await until(lambda: count(ceph, writer))
        rotated = client(ceph, "rotate", "kvm-web1")
        # Hosts still have the old keyring: the reason says so.
        assert "its key is wrong" in await refusal(access, spec)
        keep(ceph, "kvm-web1", rotated)
        new = await Disks(Ceph(access)).check(WEB1, spec)
        assert new != old
        reached = count(ceph, writer)
        await until(lambda: count(ceph, writer) != reached)
        assert "BLOCK_IO_ERROR" not in qemu.events
        await qemu.quit()
    async with RbdQemu(ceph, writer, side=side(ceph, new)) as qemu:
        await CephFencing(Ceph(access)).clients(record(writer))
        reached = count(ceph, writer)
        await qemu.cont()
        await until(lambda: count(ceph, writer) != reached)


async def test_an_image_is_one_image_however_it_is_named(ceph: Cluster, access: CephAccess) -> None:
    """Law: the tools ask for the image in its namespace, not for one of the same name beside it."""
    tools = Ceph(access)
    ceph.rbd("create", f"{POOL}/disk", "--size", "4M", "--image-feature", FEATURES)
    assert (await tools.image_info(DISK)).size == 8 << 20
    assert (await tools.image_info(RbdDisk(POOL, "disk"))).size == 4 << 20
    async with RbdQemu(ceph, DISK):
        assert len(await tools.watchers(DISK)) == 1
        assert await tools.watchers(RbdDisk(POOL, "disk")) == frozenset()


async def test_a_guests_snapshots_are_made_with_its_own_rights(
    ceph: Cluster, access: CephAccess, writer: RbdDisk
) -> None:
    """Law: snapshots and rollbacks reach no images but the guest's own; with its rights alone they go, QEMU or not."""
    snapshots = CephSnapshots(Ceph(access)).of_guest(WEB1)
    key = await Disks(Ceph(access)).check(WEB1, Spec(ram_mib=64, rbd=writer))
    async with RbdQemu(ceph, writer, side=side(ceph, key)) as qemu:
        await qemu.cont()
        await until(lambda: count(ceph, writer))
        await snapshots.create(writer, "kvm-.s")
        await snapshots.rename(writer, "kvm-.s", "kvm-s")
        await snapshots.protect(writer, "kvm-s")
        assert (await snapshots.of(writer))["kvm-s"].is_protected
        assert await snapshots.users(writer)
        assert not await snapshots.clones(writer, "kvm-s")
    # It was killed, and has left its lock behind, which the guest's client may not break.
    await until(lambda: not ceph.watchers(writer.name))
    await snapshots.free(writer)
    await snapshots.roll_back(writer, "kvm-s", size=1 << 20)
    await snapshots.note_rolled_back(writer, "1")
    assert await snapshots.rolled_back(writer) == "1"
    await snapshots.remove(writer, "kvm-s", is_protected=True)
    ceph.rbd("snap", "create", f"{POOL}/old@kvm-s")
    for stranger in (RbdDisk(POOL, "disk", namespace="web2"), RbdDisk(POOL, "old")):
        for attempt in (
            snapshots.of(stranger),
            snapshots.free(stranger),
            snapshots.create(stranger, "kvm-s"),
            snapshots.roll_back(stranger, "kvm-s", size=1 << 20),
            snapshots.remove(stranger, "kvm-s", is_protected=False),
        ):
            with pytest.raises(CephError):
                await attempt
    assert "kvm-s" in ceph.rbd("snap", "ls", f"{POOL}/old")
    assert not ceph.rbd("snap", "ls", f"{POOL}/web2/disk")
