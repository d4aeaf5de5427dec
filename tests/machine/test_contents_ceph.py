"""What images in Ceph begin with, on a real cluster with the capabilities that the documentation gives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor import failpoints
from kvmsupervisor.adapters.ceph import Ceph, CephAccess, CephFailed, CephImages
from kvmsupervisor.domain.images import Image, aside_of, note_of, parent_of
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import DiskFormat
from kvmsupervisor.domain.spec import Disk, RbdDisk, Spec
from kvmsupervisor.domain.storage import Unmade
from kvmsupervisor.machine.contents import Lacking
from kvmsupervisor.machine.images import DiskTrouble
from kvmsupervisor.machine.jobs import Underway
from tests.fakes.images import FakeImports, Stock
from tests.support.ceph import CLIENT_CAPS, POOL
from tests.support.ceph import Ceph as Cluster
from tests.support.images import RAW, Parts, image, qcow2_of
from tests.support.web import site

ONE, TWO = InstanceId("one"), InstanceId("two")
M = 1 << 20
NUMBERS = count()


@pytest.fixture(scope="module")
def access(ceph: Cluster) -> CephAccess:
    ceph.new_client("vm", CLIENT_CAPS)
    return CephAccess(user="vm", conf=str(ceph.conf))


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    async with site() as made:
        yield Parts(made, RAW)


class Host:
    """One host with its library, on the cluster."""

    def __init__(self, path: Path, parts: Parts, access: CephAccess, imports: FakeImports | None = None) -> None:
        # Another content for each test: images of the library are named by it.
        self.stock = Stock(path, ceph=Ceph(access), imports=imports)
        self.contents = self.stock.contents
        self.entry: Image = image(parts.url, parts.data)
        self.stock.keys["debian"] = self.entry

    async def look(self, disk: RbdDisk, instance: InstanceId = ONE, known: tuple[str, ...] = ()) -> Lacking:
        """Look until nothing is being done."""
        async with asyncio.timeout(60):
            while True:
                try:
                    return await self.contents.look(instance, Spec(ram_mib=64, rbd=disk), known)
                except Underway:
                    await asyncio.sleep(0.01)

    async def make(self, disk: RbdDisk, instance: InstanceId = ONE) -> None:
        for one in (await self.look(disk, instance)).disks:
            await self.contents.make(instance, one)

    async def refused(self, disk: RbdDisk, instance: InstanceId = ONE, known: tuple[str, ...] = ()) -> str:
        with pytest.raises(DiskTrouble) as caught:
            await self.look(disk, instance, known)
        return str(caught.value)


@pytest.fixture
def fresh(parts: Parts) -> int:
    """A content that no other test has."""
    number = next(NUMBERS)
    parts.data = RAW + f"{number}".encode()
    return number


@pytest.fixture
async def hosts(tmp_path: Path, parts: Parts, access: CephAccess, fresh: int) -> AsyncIterator[Callable[..., Host]]:
    """Makes hosts, each with a folder of its own, and ends what goes on behind their machines."""
    made: list[Host] = []

    def new(imports: FakeImports | None = None) -> Host:
        made.append(Host(tmp_path / f"host{len(made)}", parts, access, imports))
        return made[-1]

    yield new
    for one in made:
        await one.contents.close()


@pytest.fixture
def host(hosts: Callable[..., Host]) -> Host:
    return hosts()


@pytest.fixture
def disk(fresh: int) -> RbdDisk:
    return RbdDisk(POOL, f"web{fresh}", origin="debian")


def read(ceph: Cluster, name: str, tmp_path: Path) -> bytes:
    out = tmp_path / "exported"
    ceph.rbd("export", "--no-progress", name, str(out))
    found = out.read_bytes()
    out.unlink()
    return found


def names(ceph: Cluster) -> set[str]:
    found: list[str] = json.loads(ceph.rbd("ls", POOL, "--format", "json"))
    return set(found)


async def nothing_beside(ceph: Cluster) -> None:
    """Wait until what was made in vain is gone: that goes on behind a machine that has its disk."""
    async with asyncio.timeout(60):
        while [name for name in names(ceph) if name.startswith("kvm-new-")]:  # noqa: ASYNC110 - Ceph tells nobody
            await asyncio.sleep(0.1)


def info(ceph: Cluster, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(ceph.rbd("info", name, "--format", "json"))
    return found


async def test_a_machine_is_a_clone(ceph: Cluster, host: Host, disk: RbdDisk, parts: Parts, tmp_path: Path) -> None:
    """Law: the image is imported once, kept as a protected snapshot; a machine is a clone of it, of the wanted size."""
    whole = parent_of(host.entry, POOL)
    await host.make(RbdDisk(POOL, disk.image, origin="debian", size=16 * M))
    found = info(ceph, disk.name)
    assert found["size"] == 16 * M
    assert found["parent"]["image"] == whole.image  # type: ignore[index]
    assert {"exclusive-lock", "layering"} <= set(found["features"])  # type: ignore[call-overload]
    assert read(ceph, disk.name, tmp_path).rstrip(b"\0") == parts.data
    (snap,) = json.loads(ceph.rbd("snap", "ls", f"{POOL}/{whole.image}", "--format", "json"))
    assert (snap["name"], snap["protected"], snap["size"] % 512) == ("image", "true", 0)
    await host.make(RbdDisk(POOL, f"{disk.image}b", origin="debian"), TWO)
    assert info(ceph, f"{disk.name}b")["size"] == snap["size"]
    assert parts.offsets == [0]
    await nothing_beside(ceph)


class Asked(Ceph):
    """A way to the cluster that writes down what it is asked.

    Attributes:
        asked: the tools' words, in order.
    """

    def __init__(self, access: CephAccess) -> None:
        super().__init__(access)
        self.asked: list[str] = []

    async def run(
        self, program: str, *args: str, limit_s: float = 0.0, hear: Callable[[bytes], None] | None = None
    ) -> tuple[bytes, bytes]:
        self.asked.append(" ".join(word for word in args[:2] if not word.startswith("--")))
        return await super().run(program, *args, limit_s=limit_s, hear=hear)


async def test_each_further_machine_asks_little(access: CephAccess, host: Host, disk: RbdDisk) -> None:
    """Law: each tool costs a tenth of a start, so nothing is asked twice: not of the image, the pool or the machine."""
    await host.make(disk)
    ceph = host.contents._ceph.ceph = host.contents._law._ceph = Asked(access)
    machines = [RbdDisk(POOL, f"{disk.image}-{number}", origin="debian", size=16 * M) for number in range(3)]
    await asyncio.gather(*(host.make(one, InstanceId(f"vm{number}")) for number, one in enumerate(machines)))
    each = {word: ceph.asked.count(word) for word in ("info", "clone", "resize", "image-meta set", "rename")}
    assert each == dict.fromkeys(each, 3)
    assert ceph.asked.count("image-meta list") == 3
    others = [word for word in ceph.asked if word not in {*each, "image-meta list", "ls"}]
    assert others in ([], ["config pool"])  # that of the first machine counts for some seconds


async def test_an_image_of_which_replicas_are_read_is_not_made_to_run(
    ceph: Cluster, host: Host, disk: RbdDisk, access: CephAccess
) -> None:
    """Law 5: a new image is read as its pool is, or as its parent was: a clone begins with its settings."""
    setting = "rbd_read_from_replica_policy"
    base = f"{disk.name}-base"
    ceph.rbd_create(base)
    ceph.rbd("config", "image", "set", base, setting, "balance")
    ceph.rbd("snap", "create", "--no-progress", f"{base}@s")
    ceph.rbd("snap", "protect", f"{base}@s")
    with pytest.raises(DiskTrouble, match=rf"^rbd: {setting} is balance for the image {disk.name}"):
        await host.make(RbdDisk(POOL, disk.image, origin=f"{base}@s"))
    ceph.rbd("config", "pool", "set", POOL, setting, "localize")
    try:
        with pytest.raises(DiskTrouble, match=f"^rbd: {setting} is localize"):
            await host.make(RbdDisk(POOL, f"{disk.image}-empty", size=M))
    finally:
        ceph.rbd("config", "pool", "rm", POOL, setting)


async def test_an_image_of_the_library_that_is_gone_is_imported_again(
    ceph: Cluster, host: Host, disk: RbdDisk, parts: Parts, tmp_path: Path
) -> None:
    """Law: that it was there a moment ago is no more than a reason to try: the next attempt looks for it."""
    await host.make(disk)
    whole = parent_of(host.entry, POOL)
    ceph.rbd("rm", "--no-progress", disk.name)
    ceph.rbd("snap", "unprotect", str(whole))
    ceph.rbd("snap", "rm", "--no-progress", str(whole))
    ceph.rbd("rm", "--no-progress", f"{POOL}/{whole.image}")
    with pytest.raises(DiskTrouble, match=r"^rbd: from=debian: "):
        await host.make(disk)
    await host.make(disk)
    assert read(ceph, disk.name, tmp_path).rstrip(b"\0") == parts.data
    await nothing_beside(ceph)


async def test_a_qcow2_image(ceph: Cluster, host: Host, disk: RbdDisk, parts: Parts, tmp_path: Path) -> None:
    """Law: in Ceph is what a guest reads, whatever the format of the file is."""
    data = parts.data.ljust(4 * M, b"\0")
    parts.data = qcow2_of(tmp_path, data, "-c")
    host.stock.keys["debian"] = image(parts.url, parts.data, of=DiskFormat.QCOW2)
    await host.make(disk)
    assert read(ceph, disk.name, tmp_path) == data


async def test_first_content_only(ceph: Cluster, host: Host, disk: RbdDisk, tmp_path: Path) -> None:
    """Law: a disk that was made by its key is left as it is, also without parent or library; others are refused."""
    await host.make(disk)
    before = read(ceph, disk.name, tmp_path)
    ceph.rbd("flatten", "--no-progress", disk.name)
    del host.stock.keys["debian"]
    assert await host.look(disk) == Lacking()
    host.contents.left(ONE)
    (said,) = (await host.look(disk)).remarks
    assert said.startswith(f"rbd: {disk.name} was there already, made of debian for one before")
    assert await host.look(disk, known=(disk.name,)) == Lacking()
    assert "was made for instance one" in await host.refused(disk, TWO)
    (said,) = (await host.look(RbdDisk(POOL, disk.image, origin="fedora"), known=(disk.name,))).remarks
    assert "began with debian" in said
    ceph.rbd_create(f"{disk.name}-other")
    other = RbdDisk(POOL, f"{disk.image}-other", origin="debian", size=16 * M)
    told = await host.refused(other)
    assert told.startswith(f"rbd: from=debian is what a new disk begins with, and {other.name} is there already")
    assert await host.look(other, known=(other.name,)) == Lacking(
        disks=(Unmade(disk=Disk(0, other, key="rbd"), image=other, has=8 * M),)
    )
    assert read(ceph, disk.name, tmp_path) == before
    # A clone begins with its parent's note: it is another machine's all the same.
    ceph.rbd("snap", "create", "--no-progress", f"{disk.name}@s")
    ceph.rbd("snap", "protect", f"{disk.name}@s")
    ceph.rbd("clone", f"{disk.name}@s", f"{disk.name}-clone")
    assert "was made for instance one" in await host.refused(RbdDisk(POOL, f"{disk.image}-clone", origin="x"), TWO)


async def test_sizes(ceph: Cluster, host: Host, disk: RbdDisk) -> None:
    """Law: made when missing, grown when smaller, never made smaller, never made anew; without `from=` it is empty."""
    empty = RbdDisk(POOL, f"{disk.image}e", size=8 * M)
    await host.make(empty)
    assert info(ceph, empty.name)["size"] == 8 * M
    assert await host.look(empty) == Lacking()
    await host.make(RbdDisk(POOL, empty.image, size=12 * M))
    assert info(ceph, empty.name)["size"] == 12 * M
    told = await host.refused(empty)
    assert (
        told == f"rbd: size=8M is less than the 12M that {empty.name} has, and a disk is never made smaller: write "
        "size=12M, or leave size= out"
    )
    ceph.rbd("rm", "--no-progress", empty.name)
    assert "not made anew" in await host.refused(empty, known=(empty.name,))
    assert "size=1M is less than the" in await host.refused(RbdDisk(POOL, disk.image, origin="debian", size=M))


async def test_what_is_missing(ceph: Cluster, host: Host, disk: RbdDisk) -> None:
    """Law: pool, library image, snapshot: each reason names the key and what would be right."""
    for missing, wanted in {
        RbdDisk("lake", "a", origin="debian"): "rbd: from=debian: there is no such pool",
        RbdDisk("lake", "a", size=M): "rbd: there is no such pool",
        RbdDisk(POOL, "a", origin="nothing"): "rbd: from=nothing: there is no image nothing in the library",
        RbdDisk(POOL, "a", origin=f"{POOL}/gone@s"): f"rbd: from={POOL}/gone@s: there is no such image",
    }.items():
        assert (await host.refused(missing)).startswith(wanted)
    ceph.rbd_create(f"{disk.name}-base")
    lacks = RbdDisk(POOL, disk.image, origin=f"{disk.name}-base@s")
    assert f"`rbd snap create {disk.name}-base@s`" in await host.refused(lacks)
    ceph.rbd("snap", "create", "--no-progress", f"{disk.name}-base@s")
    assert f"`rbd snap protect {disk.name}-base@s`" in await host.refused(lacks)
    ceph.rbd("snap", "protect", f"{disk.name}-base@s")
    await host.make(lacks)
    assert info(ceph, disk.name)["parent"]["image"] == f"{disk.image}-base"  # type: ignore[index]
    assert host.stock.imports.claimed == []


async def test_hosts_that_ask_at_the_same_instant(
    ceph: Cluster, parts: Parts, hosts: Callable[..., Host], tmp_path: Path, disk: RbdDisk
) -> None:
    """Law: even where each takes itself for the one that imports, there is one image, whole, and nothing beside it."""
    await asyncio.gather(
        *(
            host.make(RbdDisk(POOL, f"{disk.image}-{number}", origin="debian"), InstanceId(f"vm{number}"))
            for number, host in enumerate(hosts() for _ in range(3))
        )
    )
    for number in range(3):
        assert read(ceph, f"{disk.name}-{number}", tmp_path).rstrip(b"\0") == parts.data
    await nothing_beside(ceph)


async def test_another_host_imports_it(
    ceph: Cluster, parts: Parts, hosts: Callable[..., Host], tmp_path: Path, disk: RbdDisk
) -> None:
    """Law: a host whose neighbour imports the image says so, fetches nothing, and goes on once it is there."""
    imports = FakeImports()
    host, other = hosts(imports), hosts()
    whole = parent_of(host.entry, POOL)
    imports.others[f"{POOL}/{whole.image}"] = "beta"
    assert "beta imports it into the pool rbd" in await host.refused(disk)
    assert parts.offsets == []
    await other.make(RbdDisk(POOL, f"{disk.image}o", origin="debian"), TWO)
    await host.make(disk)
    assert parts.offsets == [0]
    assert read(ceph, disk.name, tmp_path).rstrip(b"\0") == parts.data


@pytest.fixture(params=["imported", "frozen", "cloned", "noted"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.Event]:
    """Set when a point is reached, behind which nothing goes on."""
    reached = asyncio.Event()

    def waits(name: str) -> Awaitable[object] | None:
        if name == request.param:
            reached.set()
            return asyncio.Event().wait()
        return None

    monkeypatch.setattr(failpoints, "reached", waits)
    yield reached
    monkeypatch.undo()


async def test_cut_off(host: Host, cut: asyncio.Event, ceph: Cluster, disk: RbdDisk, tmp_path: Path) -> None:
    """Law: wherever import or clone is cut off, no half has the name, and the next attempt leaves nothing behind."""
    task = asyncio.ensure_future(host.make(disk))
    async with asyncio.timeout(60):
        await cut.wait()
    task.cancel()
    await asyncio.wait({task})
    await host.contents.close()
    failpoints.reached = None
    left = names(ceph)
    assert disk.image not in left
    assert any(name.startswith((aside_of(disk.image), aside_of(parent_of(host.entry, POOL).image))) for name in left)
    await host.make(disk)
    assert read(ceph, disk.name, tmp_path).rstrip(b"\0").startswith(RAW.rstrip(b"\0"))
    await nothing_beside(ceph)


async def test_a_second_name_is_no_leftover(ceph: Cluster, host: Host, disk: RbdDisk, tmp_path: Path) -> None:
    """Law: a rename that was cut off leaves two names of one image; taking away what is left over takes neither."""
    await host.make(disk)
    found = info(ceph, disk.name)["id"]
    aside = f"{aside_of(disk.image)}01234567"
    # As the tool leaves it between its two steps: the new name's object is there, and the list still has the old one.
    data = tmp_path / "id"
    ceph._run("rados", "--conf", str(ceph.conf), "-p", POOL, "get", f"rbd_id.{disk.image}", str(data))
    ceph._run("rados", "--conf", str(ceph.conf), "-p", POOL, "put", f"rbd_id.{aside}", str(data))
    assert info(ceph, f"{POOL}/{aside}")["id"] == found
    assert not await host.contents._ceph.is_lost(RbdDisk(POOL, aside), disk)
    assert info(ceph, disk.name)["id"] == found


async def test_what_a_killed_tool_left_goes_later(ceph: Cluster, host: Host, disk: RbdDisk) -> None:
    """Law: what Ceph still names as open, of a tool that was killed, holds nobody up, and goes once it does not."""
    aside = RbdDisk(POOL, f"{aside_of(disk.image)}01234567")
    ceph.rbd_create(aside.name)
    null = asyncio.subprocess.DEVNULL
    holder = await asyncio.create_subprocess_exec(
        "rbd", "--conf", str(ceph.conf), "watch", aside.name, stdout=null, stderr=null, stdin=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            while not ceph.watchers(aside.name):  # noqa: ASYNC110 - Ceph tells nobody
                await asyncio.sleep(0.1)
        await host.make(disk)
        assert aside.image in names(ceph)
    finally:
        holder.kill()
        await holder.wait()
    await nothing_beside(ceph)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two that make an image have both made it before one of them gives it its name."""
    both = asyncio.Barrier(2)
    monkeypatch.setattr(failpoints, "reached", lambda name: both.wait() if name == "noted" else None)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("together")
async def test_somebody_made_it_meanwhile(ceph: Cluster, host: Host, disk: RbdDisk) -> None:
    """Law: of two that make one image one has it; the other says so, and leaves nothing behind."""
    (lacking,) = (await host.look(disk)).disks
    results = await asyncio.gather(
        *(host.contents.make(instance, lacking) for instance in (ONE, TWO)), return_exceptions=True
    )
    note = await host.contents._ceph.note(disk)
    assert note is not None
    lost = results[1 if note.startswith(f"{note_of(ONE, 'debian')} ") else 0]
    assert isinstance(lost, DiskTrouble)
    assert "by somebody else" in str(lost)
    await nothing_beside(ceph)


async def test_a_rename_that_only_says_that_it_won(
    host: Host, disk: RbdDisk, access: CephAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: whose image has the name is looked at, not believed: librbd may tell two that they renamed."""
    await host.make(disk)
    ceph = Ceph(access)
    images, aside = CephImages(ceph), RbdDisk(POOL, f"{aside_of(disk.image)}01234567")
    await images.create(aside, M)
    note = note_of(TWO, "nothing", mark="01234567")
    await images.set_note(aside, note)
    real = ceph.run

    async def run(program: str, *args: str, **more: Any) -> tuple[bytes, bytes]:
        return (b"", b"") if args[0] == "rename" else await real(program, *args, **more)

    monkeypatch.setattr(ceph, "run", run)
    for told in (note, None):
        with pytest.raises(CephFailed, match="is there already"):
            await images.rename(aside, disk.image, told)
    await images.remove(aside)


async def test_what_may_get_its_name_yet_is_no_leftover(ceph: Cluster, host: Host, disk: RbdDisk) -> None:
    """Law: what another one is making of an image stays until the name is taken: it may be named at any moment."""
    aside = RbdDisk(POOL, f"{aside_of(disk.image)}01234567")
    ceph.rbd_create(aside.name)
    assert not await host.contents._ceph.is_lost(aside, disk)
    await host.make(disk)
    assert await host.contents._ceph.is_lost(aside, disk)
    await nothing_beside(ceph)


async def test_a_step_fails(ceph: Cluster, host: Host, monkeypatch: pytest.MonkeyPatch, disk: RbdDisk) -> None:
    """Law: what came to nothing is taken away by who made it, whether or not anybody tries again."""

    async def fails() -> None:
        raise CephFailed("no room")

    monkeypatch.setattr(failpoints, "reached", lambda name: fails() if name == "cloned" else None)
    with pytest.raises(DiskTrouble, match=r"^rbd: from=debian: no room$"):
        await host.make(disk)
    assert disk.image not in names(ceph)
    await nothing_beside(ceph)


async def test_a_changed_image_of_the_library(ceph: Cluster, host: Host, disk: RbdDisk) -> None:
    """Law: an image without its protected snapshot is no whole one: nobody clones it, and its name tells what to do."""
    whole = parent_of(host.entry, POOL)
    ceph.rbd_create(f"{POOL}/{whole.image}")
    told = await host.refused(disk)
    assert "without its protected snapshot" in told
    assert "rename or remove it" in told


async def test_ceph_is_away(ceph: Cluster, host: Host, disk: RbdDisk, access: CephAccess) -> None:
    """Law: while the cluster does not answer the machine waits, and its reason says so."""
    host.contents._ceph.ceph = host.contents._law._ceph = Ceph(access, answer_s=0.5)
    ceph.stop_mon()
    try:
        told = await host.refused(disk)
    finally:
        ceph.cont_mon()
    assert told.startswith("rbd: Ceph does not answer")
    assert disk.image not in names(ceph)


async def test_disks_in_a_namespace(ceph: Cluster, host: Host, disk: RbdDisk, parts: Parts, tmp_path: Path) -> None:
    """Law: a disk in a namespace is a clone of the library's image in the library's own namespace, made once."""
    apart = parent_of(host.entry, POOL, apart=True)
    for name in ("guest1", "guest2"):
        ceph.rbd("namespace", "create", f"{POOL}/{name}{disk.image}")
    first = RbdDisk(POOL, "root", namespace=f"guest1{disk.image}", origin="debian", size=16 * M)
    await host.make(first)
    await host.make(RbdDisk(POOL, "root", namespace=f"guest2{disk.image}", origin="debian"), TWO)
    found = info(ceph, first.name)
    assert found["size"] == 16 * M
    parent = found["parent"]
    assert isinstance(parent, dict)
    assert (parent["pool_namespace"], parent["image"]) == (apart.namespace, apart.image)
    assert read(ceph, first.name, tmp_path).rstrip(b"\0") == parts.data
    assert parts.offsets == [0]
    assert apart.image not in names(ceph)
    # Made from a snapshot of a machine in a namespace, and an empty one.
    ceph.rbd("snap", "create", f"{first.name}@s")
    ceph.rbd("snap", "protect", f"{first.name}@s")
    copy = RbdDisk(POOL, "copy", namespace=first.namespace, origin=f"{first.name}@s")
    await host.make(copy)
    assert read(ceph, copy.name, tmp_path).rstrip(b"\0") == parts.data
    await host.make(RbdDisk(POOL, "data", namespace=first.namespace, size=8 * M))
    lost = RbdDisk(POOL, "root", namespace="nowhere", size=8 * M)
    assert "there is no such namespace" in await host.refused(lost)
