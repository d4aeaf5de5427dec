"""Images in Ceph while they are made, under names that nobody uses, and the taking away of those that came to nothing.

See docs/decisions/0026-images.md for what is left where it is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from uuid import uuid4

from kvmsupervisor.adapters.ceph import CephError, CephImages, NoSuchImage
from kvmsupervisor.domain.images import aside_of
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.machine.images import trouble_of
from kvmsupervisor.machine.jobs import Jobs

DROP_TRIES, DROP_EVERY_S = 20, 3.0
"""How often, and at what pauses, it is tried to take away an image that was made in vain: twice as long as Ceph takes a
client that died for a living one (`osd_client_watch_timeout`, 30 s)."""

SWEEP_AFTER_S = 5.0
"""How long it is waited for further images before a pool is listed. Arbitrary: what is left over is in nobody's way."""


class Leftovers:
    """What is being made in Ceph, or was and came to nothing.

    Args:
        ceph: the cluster.
        jobs: of this host: what is taken away goes behind the machines.
        sweep_after_s: see `SWEEP_AFTER_S`.
    """

    def __init__(self, ceph: CephImages, jobs: Jobs, *, sweep_after_s: float = SWEEP_AFTER_S) -> None:
        self._ceph = ceph
        self._jobs = jobs
        self._sweep_after_s = sweep_after_s
        # By pool and namespace: images that have their names since it was last listed.
        self._named: dict[str, list[RbdDisk]] = {}

    @contextlib.contextmanager
    def aside(self, image: RbdDisk) -> Iterator[RbdDisk]:
        """A name that nobody else has or will have, for an image that is being made. What comes to nothing goes.

        Raises:
            DiskTrouble: it came to nothing.
        """
        aside = image.beside(f"{aside_of(image.image)}{uuid4().hex[:8]}")
        try:
            yield aside
        except CephError as error:
            self._drop_behind(aside, None)
            raise trouble_of(error) from error

    def sweep_behind(self, image: RbdDisk) -> None:
        """Take away what is left unfinished of an image that has its name now: what is left can get none any more."""
        self._named.setdefault(image.place, []).append(image)
        self._jobs.begin(f"sweep {image.place}", lambda _: self._sweep(image.place))

    async def _sweep(self, place: str) -> None:
        while place in self._named:
            # Of many machines that start at once one list tells all.
            await asyncio.sleep(self._sweep_after_s)
            named = self._named.pop(place)
            by_prefix = {aside_of(image.image): image for image in named}
            with contextlib.suppress(CephError):
                for name in await self._ceph.names(named[0]):
                    if (image := by_prefix.get(f"{name.rpartition('-')[0]}-")) is not None:
                        self._drop_behind(image.beside(name), image)

    def _drop_behind(self, aside: RbdDisk, image: RbdDisk | None) -> None:
        self._jobs.begin(f"drop {aside.name}", lambda _: self._drop(aside, image))

    async def _drop(self, aside: RbdDisk, image: RbdDisk | None) -> None:
        """Take away what was made in vain, of which `image` was to become; None where nobody goes on with it.

        Ceph names a tool that was killed for another 30 s as having it open.
        """
        for _ in range(DROP_TRIES):
            try:
                if await self._ceph.is_lost(aside, image):
                    await self._ceph.remove(aside)
                    return
            except NoSuchImage:
                return
            except CephError:
                pass  # one that has a clone stays: it is in nobody's way
            await asyncio.sleep(DROP_EVERY_S)
