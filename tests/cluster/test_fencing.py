"""Laws 3, 4 and 5 with real QEMUs on a real Ceph cluster: whose clients are whose, and who can write no more."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kvmsupervisor.adapters.ceph import FENCE_MIN_S, Ceph, CephAccess, NoSuchImage
from kvmsupervisor.adapters.handed import sealed
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.cluster.fencing import CephFencing, InUse, NotFenced, StorageAway
from kvmsupervisor.domain import hardware
from kvmsupervisor.domain.ceph import Client
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.spec import RbdDisk, Spec, spec_to_object
from tests.support.ceph import CLIENT_CAPS, POOL
from tests.support.ceph import Ceph as Cluster
from tests.support.rbd_qemu import LIMIT_S, UNPRIVILEGED, RbdQemu, count, make_writer_image

# In the order in which the loop of an instance uses it: a QEMU is up, its clients are told, it runs, it is fenced.


@pytest.fixture(scope="module")
def access(ceph: Cluster) -> CephAccess:
    """The client that docs/ceph.md tells operators to make; QEMU uses the same."""
    ceph.new_client("vm", CLIENT_CAPS)
    return CephAccess(user="vm", conf=str(ceph.conf))


@pytest.fixture
def fencing(access: CephAccess) -> CephFencing:
    return CephFencing(Ceph(access))


@pytest.fixture
def image(access: CephAccess, ceph_image: str) -> RbdDisk:
    return RbdDisk(pool=POOL, image=ceph_image)


@pytest.fixture
def writer(ceph: Cluster, access: CephAccess, ceph_image: str, tmp_path: Path) -> RbdDisk:
    """An image from which a guest boots that does nothing but write."""
    made = RbdDisk(pool=POOL, image=f"{ceph_image}-writer")
    make_writer_image(ceph, made, tmp_path)
    return made


def record(image: RbdDisk | None, storage: Storage = Storage.RBD) -> Incarnation:
    return Incarnation(
        instance="1", incarnation="x", epoch=1, boot_id="b", argv=(), spec=spec_to_object(Spec(ram_mib=64, rbd=image)),
        storage=storage, accelerator="tcg", restart_request=None, revision=7, log_offset=0, spawned_at=1.0,
    )  # fmt: skip


async def until(true: Callable[[], object]) -> None:
    """Poll what only the image knows."""
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110 - Ceph has no events for us
            await asyncio.sleep(0.01)


# --- whose client is whose (law 3) ----------------------------------------------------------------------------


async def test_a_paused_qemu_has_one_client(ceph: Cluster, fencing: CephFencing, image: RbdDisk) -> None:
    """Law 3: before its guest runs, and before it has taken any lock, its address is there to be recorded."""
    async with RbdQemu(ceph, image) as qemu:
        (client,) = await fencing.clients(record(image))
        assert {client} == ceph.watchers(str(image))
        assert await Ceph(CephAccess(user="vm", conf=str(ceph.conf))).lock_owners(image) == frozenset()
        assert await qemu.status() == "prelaunch"
        assert await fencing.clients(record(image)) == (client,)
        assert await fencing.watchers([image]) == (client,)


async def test_without_its_qemu_nothing_is_told(fencing: CephFencing, image: RbdDisk) -> None:
    """Law 3: no address is no record, so no `cont`."""
    with pytest.raises(NotFenced, match="does not name this QEMU"):
        await fencing.clients(record(image))


async def test_two_on_one_image_are_never_mixed_up(ceph: Cluster, fencing: CephFencing, image: RbdDisk) -> None:
    """Law 3: while another has the image open neither is continued, and both addresses are named; then it goes on."""
    async with RbdQemu(ceph, image):
        (client,) = await fencing.clients(record(image))
        async with RbdQemu(ceph, image):
            for address in ceph.watchers(str(image)):
                with pytest.raises(NotFenced, match=rf"{image} is open elsewhere, too: .*{address}"):
                    await fencing.clients(record(image))
            # The target of a live migration: the source is there, and known.
            (target,) = await fencing.clients(record(image), known=[client])
            assert target != client
            assert await fencing.clients(record(image), known=[target]) == (client,)
        await fencing.fence([target])
        assert await fencing.clients(record(image)) == (client,)


async def test_of_a_new_image_it_is_asked_who_has_it_open(
    ceph: Cluster, fencing: CephFencing, image: RbdDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 3: features and lock of an image that was just made are known; who else has it open is asked all the same."""
    monkeypatch.setattr(fencing._ceph, "image_info", None)
    monkeypatch.setattr(fencing._ceph, "lock_owners", None)
    async with RbdQemu(ceph, image):
        (client,) = await fencing.clients(record(image), new=[image.name])
        assert {client} == ceph.watchers(str(image))
        async with RbdQemu(ceph, image):
            with pytest.raises(InUse):
                await fencing.clients(record(image), new=[image.name])


async def test_what_has_no_disk_has_no_client(fencing: CephFencing) -> None:
    """Law 7: nothing is asked for a machine without a disk."""
    assert await fencing.clients(record(None, Storage.NONE)) == ()


async def test_a_machine_that_is_not_understood_is_not_continued(fencing: CephFencing) -> None:
    """Law 3: whose disks are not on record has no known clients, which is not the same as none."""
    odd = record(None)
    object.__setattr__(odd, "spec", {"ram": "?"})
    with pytest.raises(NotFenced, match="not on record"):
        await fencing.clients(odd)


# --- images that leave no trace (law 5) -----------------------------------------------------------------------


async def test_an_image_without_exclusive_lock_is_refused(
    ceph: Cluster, access: CephAccess, fencing: CephFencing, image: RbdDisk
) -> None:
    """Law 5: unless the operator allows it; the message says what would be right."""
    bare = RbdDisk(pool=POOL, image=f"{image.image}-bare")
    ceph.rbd_create(str(bare), features="layering")
    async with RbdQemu(ceph, bare):
        with pytest.raises(
            NotFenced, match=rf"{bare} lacks .*rbd feature enable {bare} exclusive-lock.*ALLOW_UNFENCED"
        ):
            await fencing.clients(record(bare))
        allowed = CephFencing(Ceph(access), allow_unfenced=True)
        assert set(await allowed.clients(record(bare))) == ceph.watchers(str(bare))


# --- shut out (law 4) -----------------------------------------------------------------------------------------


async def test_a_fenced_qemu_cannot_begin(ceph: Cluster, fencing: CephFencing, writer: RbdDisk) -> None:
    """Law 4: fenced while it was paused, it reads nothing and writes nothing when it is continued."""
    async with RbdQemu(ceph, writer) as qemu:
        await fencing.fence(await fencing.clients(record(writer)))
        await qemu.cont()
        await qemu.until_event("BLOCK_IO_ERROR")
        await qemu.until_event("STOP")
        assert await qemu.status() == "io-error"
    assert count(ceph, writer) == 0


async def test_a_frozen_writer_cannot_write_when_it_wakes_up(
    ceph: Cluster, fencing: CephFencing, writer: RbdDisk
) -> None:
    """Laws 3 and 4: a host that freezes while its guest writes, is fenced and wakes up; the successor writes alone."""
    async with RbdQemu(ceph, writer) as old:
        (address,) = await fencing.clients(record(writer))
        await old.cont()
        await until(lambda: count(ceph, writer))
        assert await fencing.users([writer]) == (address,)
        old.freeze()
        before = count(ceph, writer)
        old.thaw()
        # Without a fence it goes on where it was.
        await until(lambda: count(ceph, writer) != before)
        old.freeze()
        await fencing.fence([address])
        # Fenced clients watch no more, at once; the lock that it left still names it.
        assert await fencing.watchers([writer]) == ()
        assert await fencing.users([writer]) == (address,)
        before = count(ceph, writer)
        old.thaw()
        await old.until_event("BLOCK_IO_ERROR")
        await old.until_event("STOP")
        assert await old.status() == "io-error"
        await old.cont()
        assert count(ceph, writer) == before
        # An entry for one nonce does not hurt a new client of the same host, which takes the lock over at once.
        async with RbdQemu(ceph, writer) as new:
            (other,) = await fencing.clients(record(writer), known=[address])
            assert other != address
            await new.cont()
            await until(lambda: count(ceph, writer) not in {0, before})
            seen = count(ceph, writer)
            await until(lambda: count(ceph, writer) != seen)
            assert await new.status() == "running"
            assert await fencing.users([writer]) == (other,)
        assert await old.status() == "io-error"


async def test_a_killed_qemu_does_not_hold_up_the_next(ceph: Cluster, fencing: CephFencing, writer: RbdDisk) -> None:
    """Law 4: SIGKILL leaves a watcher for 30 s; fenced first, the next QEMU is told and writes without waiting."""
    async with RbdQemu(ceph, writer) as old:
        clients = await fencing.clients(record(writer))
        await old.cont()
        await until(lambda: count(ceph, writer))
        await old.kill()
        assert await fencing.watchers([writer]) == clients
    await fencing.fence(clients)
    before = count(ceph, writer)
    async with RbdQemu(ceph, writer) as new:
        assert await fencing.clients(record(writer)) != clients
        await new.cont()
        # Far below the 30 s that the lock of a dead client would last.
        async with asyncio.timeout(15):
            await until(lambda: count(ceph, writer) != before)


async def test_who_left_the_image_locked_is_shut_out_for_good(
    ceph: Cluster, fencing: CephFencing, writer: RbdDisk
) -> None:
    """Law 4: a client that is on no record, frozen for longer than its watch lasts, never writes again.

    librbd alone would shut it out for an hour: when it woke up after that, the two wrote in turns.
    """
    async with RbdQemu(ceph, writer) as old:
        (zombie,) = await fencing.clients(record(writer))
        await old.cont()
        await until(lambda: count(ceph, writer))
        old.freeze()
        await until(lambda: zombie not in ceph.watchers(str(writer)))

        async def admit(clients: Collection[str]) -> None:
            raise NotFenced(f"{sorted(clients)} is another instance's")

        async with RbdQemu(ceph, writer) as new:
            with pytest.raises(NotFenced, match=rf"{zombie}'\] is another instance's"):
                await fencing.clients(record(writer), admit=admit)
            assert zombie not in ceph.blocklist()
            (own,) = await fencing.clients(record(writer))
            assert own != zombie
            (entry,) = [
                line for line in ceph.ceph("osd", "blocklist", "ls").splitlines() if line.startswith(f"{zombie} ")
            ]
            until_when = datetime.strptime(entry.split()[1], "%Y-%m-%dT%H:%M:%S.%f%z")
            assert until_when - datetime.now(UTC) > timedelta(seconds=FENCE_MIN_S)
            await new.cont()
            before = count(ceph, writer)
            await until(lambda: count(ceph, writer) != before)
            # The lock is this QEMU's now: nothing is left to be shut out.
            assert await fencing.users([writer]) == (own,)
            old.thaw()
            await old.until_event("BLOCK_IO_ERROR")
            assert await new.status() == "running"


async def test_without_ceph_nothing_is_known(ceph: Cluster, access: CephAccess, image: RbdDisk) -> None:
    """Law 4: Ceph unreachable is "wait" for every question: no start, no fence, no "nobody"."""
    fencing = CephFencing(Ceph(access, answer_s=0.3))
    ceph.stop_mon()
    try:
        for ask in (
            fencing.clients(record(image)),
            fencing.fence(["192.0.2.1:0/1"]),
            fencing.users([image]),
            fencing.watchers([image]),
        ):
            with pytest.raises(StorageAway, match="does not answer"):
                await ask
    finally:
        ceph.cont_mon()


class Told(Ceph):
    """Images and who has them open, as a test says; no other image is there."""

    def __init__(self, images: dict[str, set[str]]) -> None:
        super().__init__(CephAccess())
        self._images = images

    async def watchers(self, image: RbdDisk) -> frozenset[Client]:
        if image.name not in self._images:
            raise NoSuchImage(f"{image.name} does not exist")
        return frozenset(map(Client, self._images[image.name]))


async def test_an_image_that_the_keys_name_no_more() -> None:
    """Law 4: it counts while the holder has it open; others may have it, or have deleted it."""
    running = record(RbdDisk("rbd", "former")).as_lock(HostName("z"), facts="/f", ran=True)
    lock = replace(running, clients=("own",))
    assert lock.images == ("rbd/former",)
    now = RbdDisk("rbd", "now")
    images = {"rbd/now": {"any"}, "rbd/former": {"own", "another"}}
    assert await CephFencing(Told(images)).watchers([now], lock) == ("any", "own")
    assert await CephFencing(Told(images)).watchers([now]) == ("any",)
    del images["rbd/former"]
    assert await CephFencing(Told(images)).watchers([now], lock) == ("any",)
    del images["rbd/now"]
    with pytest.raises(NotFenced, match="does not exist"):
        await CephFencing(Told(images)).watchers([now], lock)


async def test_what_ceph_refuses_is_told(fencing: CephFencing, image: RbdDisk) -> None:
    """Law 4: what waiting does not mend is not "away"."""
    gone = RbdDisk(pool=POOL, image=f"{image.image}-gone")
    for ask in (fencing.clients(record(gone)), fencing.users([image, gone]), fencing.fence(["127.0.0.1"])):
        with pytest.raises(NotFenced) as refused:
            await ask
        assert not isinstance(refused.value, StorageAway)


# --- the key of an unprivileged QEMU --------------------------------------------------------------------------


async def test_an_unprivileged_qemu_gets_its_key_from_a_file(
    ceph: Cluster, access: CephAccess, fencing: CephFencing, writer: RbdDisk
) -> None:
    """DESIGN §5: no root, everything denied, no keyring that it can read, no key on its command line; yet it writes."""
    folder = InstanceDir(Path("/tmp") / f"kvs-{writer.image}")
    folder.create()
    try:
        await _write_as_somebody_else(ceph, access, fencing, writer, folder)
    finally:
        folder.remove()


async def _write_as_somebody_else(
    ceph: Cluster, access: CephAccess, fencing: CephFencing, writer: RbdDisk, folder: InstanceDir
) -> None:
    root = os.geteuid() == 0
    key = await Ceph(access).key()
    key_file = sealed("ceph-key", key.encode())
    # It must be able to read ceph.conf, in whose folder it may not look around.
    conf = folder.path / "ceph.conf"
    shutil.copy(ceph.conf, conf)
    conf.chmod(0o644)
    side = hardware.Ceph(user="vm", conf=str(conf), key=key_file)
    async with RbdQemu(ceph, writer, side=side, prefix=UNPRIVILEGED if root else ()) as qemu:
        of_process = Path(f"/proc/{qemu.process.pid}")
        status = (of_process / "status").read_text()
        if root:
            assert "Uid:\t0" not in status
            assert "CapEff:\t0000000000000000" in status
        assert "Seccomp:\t2" in status
        assert key.encode() not in (of_process / "cmdline").read_bytes()
        os.close(key_file)
        (client,) = await fencing.clients(record(writer))
        await qemu.cont()
        await until(lambda: count(ceph, writer))
        await fencing.fence([client])
        await qemu.until_event("BLOCK_IO_ERROR")
