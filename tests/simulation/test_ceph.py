"""What the simulation's Ceph and a real one both do with clients: who is named, who owns the lock, who is shut out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from kvmsupervisor.adapters.ceph import FENCE_MIN_S, Ceph, CephAccess
from kvmsupervisor.domain.ceph import Client
from kvmsupervisor.domain.spec import RbdDisk
from tests.simulation import loop as sim
from tests.simulation.ceph import CephCluster, SimCeph
from tests.simulation.chance import Chance
from tests.support.ceph import CLIENT_CAPS, POOL
from tests.support.ceph import Ceph as Cluster
from tests.support.rbd_qemu import LIMIT_S, RbdQemu, make_writer_image

LOOK_S = 0.1


class Place(Protocol):
    """A cluster with one image, and QEMUs that have it open."""

    ceph: Ceph
    image: RbdDisk

    async def start(self) -> Client:
        """Another QEMU opens the image, paused."""
        ...

    async def run(self, client: Client) -> None:
        """Its guest runs, and writes."""
        ...

    async def quit(self, client: Client) -> None:
        """It ends in order."""
        ...

    async def kill(self, client: Client) -> None:
        """It ends without a word."""
        ...

    async def bar(self, client: Client, seconds: int) -> None:
        """A person shuts it out for a while."""
        ...


class Simulated:
    """The simulation's."""

    def __init__(self, loop: sim.SimLoop) -> None:
        self._cluster = CephCluster(loop.time, Chance(1).of("ceph"))
        self.image = RbdDisk(POOL, "r1")
        self.ceph: Ceph = SimCeph(self._cluster, reach=lambda: True, tell=lambda said: None)
        self._clients = iter(range(1, 9))

    async def start(self) -> Client:
        client = Client(f"192.0.2.1:0/{next(self._clients)}")
        self._cluster.open(self.image.name, client)
        return client

    async def run(self, client: Client) -> None:
        self._cluster.write(self.image.name, client)

    async def quit(self, client: Client) -> None:
        self._cluster.close(client)

    async def kill(self, client: Client) -> None:
        self._cluster.vanish(client)

    async def bar(self, client: Client, seconds: int) -> None:
        self._cluster.bar(client, self._cluster.now + timedelta(seconds=seconds))


class Real:
    """Real QEMUs on a real cluster."""

    def __init__(self, cluster: Cluster, image: RbdDisk, stack: AsyncExitStack) -> None:
        cluster.new_client("vm", CLIENT_CAPS)
        self._cluster = cluster
        self.image = image
        self.ceph = Ceph(CephAccess(user="vm", conf=str(cluster.conf)))
        self._stack = stack
        self._qemus: dict[Client, RbdQemu] = {}

    async def start(self) -> Client:
        before = await self.ceph.watchers(self.image)
        qemu = await self._stack.enter_async_context(RbdQemu(self._cluster, self.image))
        (client,) = await self.ceph.watchers(self.image) - before
        self._qemus[client] = qemu
        return client

    async def run(self, client: Client) -> None:
        await self._qemus[client].cont()

    async def quit(self, client: Client) -> None:
        await self._qemus[client].quit()

    async def kill(self, client: Client) -> None:
        await self._qemus[client].kill()

    async def bar(self, client: Client, seconds: int) -> None:
        await asyncio.to_thread(self._cluster.ceph, "osd", "blocklist", "add", client, str(seconds))


async def _comes(ask: Callable[[], Awaitable[Any]], wanted: object) -> None:
    """Ask until it is so."""
    async with asyncio.timeout(LIMIT_S):
        while await ask() != wanted:  # noqa: ASYNC110 - Ceph has no events for us
            await asyncio.sleep(LOOK_S)


async def story(place: Place) -> None:
    """One after the other; each step begins where the one before ended."""
    ceph, image = place.ceph, place.image

    async def watchers() -> set[Client]:
        return set(await ceph.watchers(image))

    async def owners() -> set[Client]:
        return set(await ceph.lock_owners(image))

    assert (await ceph.image_info(image)).has_exclusive_lock
    # Paused it is named, and owns nothing yet.
    first = await place.start()
    assert (await watchers(), await owners()) == ({first}, set[Client]())
    # Who writes owns the lock.
    await place.run(first)
    await _comes(owners, {first})
    # A second one is named beside it, and takes nothing from it while it is paused; an end in order leaves nothing.
    second = await place.start()
    assert (await watchers(), await owners()) == ({first, second}, {first})
    await place.quit(second)
    await _comes(watchers, {first})
    # An end without a word leaves both for a while.
    await place.kill(first)
    assert (await watchers(), await owners()) == ({first}, {first})
    # Who is shut out is named no more, whatever it left. What a person did for too short a time is replaced.
    await place.bar(first, 60)
    await _comes(watchers, set())
    begun = (await ceph.blocklist_ls())[first]
    await ceph.fence([first])
    assert (await ceph.blocklist_ls())[first] - begun > timedelta(seconds=FENCE_MIN_S - 120)
    assert await owners() <= {first}


def test_the_simulations() -> None:
    """Nastier than the world it must not be, nor kinder."""
    sim.run(lambda loop: story(Simulated(loop)))


async def test_a_real_one(ceph: Cluster, ceph_image: str, tmp_path: Path) -> None:
    """The same, with QEMU 7.2 and Ceph 16.2, or what there is."""
    image = RbdDisk(POOL, f"{ceph_image}-story")
    make_writer_image(ceph, image, tmp_path)
    async with AsyncExitStack() as stack:
        await story(Real(ceph, image, stack))
