"""Laws 3, 4 and 5: which storage clients a QEMU has, and shutting out those of a QEMU that may still live.

A QEMU that was started with `-S` has its images open, so Ceph names it as a watcher, and has written nothing. Nothing
in Ceph ties a watcher to a process: its port is 0 and its nonce random. So it is told by elimination: an image of an
instance that is about to run is open for nobody else. Whoever else has it open is somebody's tool, or another machine
on the same disk; then nothing is continued until they are gone. That needs no listing from before the start, which
would cost time there, and which a supervisor that adopts a paused QEMU would not have.
"""

from __future__ import annotations

from collections.abc import Collection, Coroutine, Iterable
from typing import Any, Protocol

from kvmsupervisor.adapters.ceph import Ceph, CephAway, CephError
from kvmsupervisor.aio import all_of, both
from kvmsupervisor.domain.ceph import Client, leaves_no_trace
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.spec import RbdDisk, spec_from_object
from kvmsupervisor.domain.storage import images_of


class NotFenced(Exception):
    """An address could not be proven fenced, or a QEMU's own not be told: no start, or no `cont`.

    The message says why, and what would help. Try again later.
    """


class InUse(NotFenced):
    """An image is open elsewhere, too: by another instance, by somebody's tool, or by a QEMU that has just died.

    Attributes:
        clients: who has it open, this QEMU among them.
    """

    def __init__(self, message: str, clients: Collection[str]) -> None:
        super().__init__(message)
        self.clients = tuple(clients)


class StorageAway(NotFenced):
    """The storage does not answer: wait. Nothing is known of anybody's address."""


class Fencing(Protocol):
    """What storage offers to law 3 and 4: which clients a QEMU has, and to shut some out for good."""

    async def clients(self, record: Incarnation, known: Collection[str] = ()) -> tuple[str, ...]:
        """The addresses of the (paused) QEMU's own storage clients, all of them.

        Args:
            record: of the living QEMU, which answers QMP: its disks are open then.
            known: addresses that are certainly not its own and may be there: those in the lock's `fence`, and in a
                live migration those of the source.

        Raises:
            NotFenced: they cannot be told, or are not to run (law 5).
        """
        ...

    async def fence(self, addresses: Collection[str]) -> None:
        """Shut out each address, and verify it.

        Raises:
            NotFenced: one of them could not be.
        """
        ...

    async def users(self, images: Collection[RbdDisk]) -> tuple[str, ...]:
        """Whom storage itself names as using these images, for a takeover: live ones, and dead ones that left a lock.

        Raises:
            NotFenced: that is not known.
        """
        ...

    async def watchers(self, images: Collection[RbdDisk]) -> tuple[str, ...]:
        """Who of them is alive, or was 30 s ago: while there are any, a takeover waits (law 4).

        Raises:
            NotFenced: that is not known.
        """
        ...


class CephFencing:
    """Fencing by Ceph's blocklist.

    Args:
        ceph: the cluster.
        allow_unfenced: whether images without `exclusive-lock` may run (`KVM_ALLOW_UNFENCED`, law 5).
    """

    def __init__(self, ceph: Ceph, *, allow_unfenced: bool = False) -> None:
        self._ceph = ceph
        self._allow_unfenced = allow_unfenced

    async def clients(self, record: Incarnation, known: Collection[str] = ()) -> tuple[str, ...]:
        """See `Fencing`. Each image has a client of its own: QEMU connects once for each."""
        if record.storage is Storage.NONE:
            return ()
        spec = spec_from_object(record.spec)
        if spec is None:
            raise NotFenced("what its disks are is not on record: this QEMU was started by another release; restart it")
        expected = frozenset(known)
        return await _union(self._own(image, expected) for image in images_of(spec))

    async def fence(self, addresses: Collection[str]) -> None:
        """See `Fencing`. The entries last a year: longer than any host that is frozen and wakes up."""
        try:
            await self._ceph.fence(addresses)
        except CephError as error:
            raise _not_fenced(error) from error

    async def users(self, images: Collection[RbdDisk]) -> tuple[str, ...]:
        """See `Fencing`: `rbd status` and `rbd lock ls`."""
        ceph = self._ceph
        return await _union(ask(image) for image in images for ask in (ceph.watchers, ceph.lock_owners))

    async def watchers(self, images: Collection[RbdDisk]) -> tuple[str, ...]:
        """See `Fencing`: `rbd status`."""
        return await _union(self._ceph.watchers(image) for image in images)

    async def _own(self, image: RbdDisk, known: frozenset[str]) -> frozenset[Client]:
        """The one client by which the QEMU that has just opened `image` did so; see the module."""
        info, listed = await both(self._ceph.image_info(image), self._ceph.watchers(image))
        if not info.has_exclusive_lock and not self._allow_unfenced:
            raise NotFenced(leaves_no_trace(image.name))
        name, own = image.name, listed - known
        if not own:
            raise NotFenced(f"Ceph does not name this QEMU as having {name} open: may {name} be read only for it?")
        if len(own) > 1:
            raise InUse(
                f"{name} is open elsewhere, too: of {', '.join(sorted(own))} one is this QEMU's. End the other; "
                "one that was killed is forgotten after 30 s",
                sorted(own),
            )
        return own


async def _union(asked: Iterable[Coroutine[Any, Any, frozenset[Client]]]) -> tuple[str, ...]:
    """Ask all at once; what they name together, in order.

    Raises:
        NotFenced: one of them failed; the others are not waited for.
    """
    try:
        found = await all_of(asked)
    except CephError as error:
        raise _not_fenced(error) from error
    return tuple(sorted(frozenset[Client]().union(*found)))


def _not_fenced(error: CephError) -> NotFenced:
    return StorageAway(str(error)) if isinstance(error, CephAway) else NotFenced(str(error))
