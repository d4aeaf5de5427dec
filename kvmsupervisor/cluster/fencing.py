"""Laws 3, 4 and 5: finds the storage clients of a QEMU, and fences those of a QEMU that may still live.

A QEMU that was started with `-S` has its images open, so Ceph names it as a watcher, and it has written nothing.
Nothing in Ceph ties a watcher to a process: its port is 0 and its nonce random. So the client is found by elimination:
an image of an instance that is about to run has no other watcher. Another watcher is a person's tool, or another
machine on the same disk; then QEMU stays paused until that watcher is gone. This needs no listing from before the
start, which would cost time, and which a supervisor that adopts a paused QEMU does not have.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from typing import Any, Protocol

import structlog

from kvmsupervisor.adapters.ceph import Ceph, CephAway, CephError, NoSuchImage
from kvmsupervisor.aio import all_of, both
from kvmsupervisor.domain.ceph import Client, leaves_no_trace
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.lock import Lock, Storage
from kvmsupervisor.domain.spec import RbdDisk, spec_from_object
from kvmsupervisor.domain.storage import had_open, images_of

log = structlog.get_logger(__name__)


NEW_S = 10.0
"""For how long an image that was made here counts as new. Ceph lists a client that has opened an image until it closes
it, or for another 30 s after its death (`osd_client_watch_timeout`). So for so long nobody can hold its lock who
is not listed, and both features and lock need not be asked for."""


class NotFenced(Exception):
    """An address could not be confirmed as fenced, or this QEMU's own client could not be identified: do not go on.

    The message says why, and what would help. Try again later.
    """


class InUse(NotFenced):
    """Another client has an image open: another instance, a person's tool, or a QEMU that has just died.

    Attributes:
        clients: all that have it open, this QEMU's own included.
    """

    def __init__(self, message: str, clients: Collection[str]) -> None:
        super().__init__(message)
        self.clients = tuple(clients)


class StorageAway(NotFenced):
    """The storage does not answer: wait. No address could be looked up."""


Admit = Callable[[Collection[str]], Awaitable[None]]


class Fencing(Protocol):
    """What laws 3 and 4 need of storage: find the clients of a QEMU, and fence clients for good."""

    async def clients(
        self,
        record: Incarnation,
        known: Collection[str] = (),
        *,
        new: Collection[str] = (),
        admit: Admit | None = None,
    ) -> tuple[str, ...]:
        """The addresses of the (paused) QEMU's own storage clients, all of them.

        Args:
            record: of the living QEMU, which answers QMP: its disks are open then.
            known: addresses that are certainly not its own and may be there: those in the lock's `fence`, and in a
                live migration those of the source.
            new: names of images that this host has made a moment ago (`NEW_S`), under the lock that the QEMU has.
            admit: raises `NotFenced` where one of those who left an image locked must not be shut out.

        Raises:
            NotFenced: they cannot be identified, or the image must not be used (law 5).
        """
        ...

    async def fence(self, addresses: Collection[str]) -> None:
        """Fence each address, and read back that it is fenced.

        Raises:
            NotFenced: one address could not be fenced.
        """
        ...

    async def shut_out(self, addresses: Collection[str]) -> tuple[str, ...]:
        """Those of the addresses that are shut out now: their QEMUs never write again.

        Raises:
            NotFenced: that is not known.
        """
        ...

    async def users(self, images: Collection[RbdDisk]) -> tuple[str, ...]:
        """The clients that storage names as users of these images, for a takeover: live ones, and owners of a lock.

        Raises:
            NotFenced: storage does not say.
        """
        ...

    async def watchers(self, images: Collection[RbdDisk], lock: Lock | None = None) -> tuple[str, ...]:
        """The clients that are alive, or were 30 s ago: while there are any, a takeover waits (law 4).

        Args:
            images: those of its keys.
            lock: its holder's. Whoever is on record there and has another image open, which it names, is one of them.

        Raises:
            NotFenced: storage does not say.
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

    async def clients(
        self,
        record: Incarnation,
        known: Collection[str] = (),
        *,
        new: Collection[str] = (),
        admit: Admit | None = None,
    ) -> tuple[str, ...]:
        """See `Fencing`. QEMU connects once for each image, so each image has a client of its own."""
        if record.storage is Storage.NONE:
            return ()
        spec = spec_from_object(record.spec)
        if spec is None:
            raise NotFenced("what its disks are is not on record: this QEMU was started by another release; restart it")
        expected = frozenset(known)
        return await _union(self._own(image, expected, admit, is_new=image.name in new) for image in images_of(spec))

    async def fence(self, addresses: Collection[str]) -> None:
        """See `Fencing`. An entry lasts a year: a host that was frozen for so long does not come back."""
        try:
            await self._ceph.fence(addresses)
        except CephError as error:
            raise _not_fenced(error) from error

    async def shut_out(self, addresses: Collection[str]) -> tuple[str, ...]:
        """See `Fencing`: `ceph osd blocklist ls`."""
        if not addresses:
            return ()
        try:
            listed = await self._ceph.blocklist_ls()
        except CephError as error:
            raise _not_fenced(error) from error
        return tuple(address for address in addresses if address in listed)

    async def users(self, images: Collection[RbdDisk]) -> tuple[str, ...]:
        """See `Fencing`: `rbd status` and `rbd lock ls`."""
        ceph = self._ceph
        return await _union(ask(image) for image in images for ask in (ceph.watchers, ceph.lock_owners))

    async def watchers(self, images: Collection[RbdDisk], lock: Lock | None = None) -> tuple[str, ...]:
        """See `Fencing`: `rbd status`."""
        named = await _union(self._ceph.watchers(image) for image in images)
        if lock is None or not (had := had_open(lock, images)):
            return named
        # Others may have such an image by now.
        alive = frozenset(await _union(self._watchers_if_there(image) for image in had)) & frozenset(lock.living)
        return tuple(sorted({*named, *alive}))

    async def _watchers_if_there(self, image: RbdDisk) -> frozenset[Client]:
        try:
            return await self._ceph.watchers(image)
        except NoSuchImage:
            # Deleted since: Ceph deletes none that is open.
            return frozenset()

    async def _own(
        self, image: RbdDisk, known: frozenset[str], admit: Admit | None, *, is_new: bool
    ) -> frozenset[Client]:
        """The client of the QEMU that has just opened `image`; see the module. Whoever left it locked is shut out."""
        listed, owners = await self._users_of_new(image) if is_new else await self._users_by_law(image)
        name, own = image.name, listed - known
        if not own:
            raise NotFenced(f"Ceph does not name this QEMU as having {name} open: may {name} be read only for it?")
        if len(own) > 1:
            raise InUse(
                f"{name} is open elsewhere, too: of {', '.join(sorted(own))} one is this QEMU's. End the other; "
                "one that was killed is forgotten after 30 s",
                sorted(own),
            )
        if gone := owners - listed - known:
            await self._shut_out_gone(image, gone, admit)
        if self._ceph.access.guests_apart and (left := owners - listed):
            # Its guest may shut nobody out, so it cannot take the lock away. They are all shut out by now.
            await self._ceph.break_locks(image, left - await self._ceph.watchers(image))
        return own

    async def _users_by_law(self, image: RbdDisk) -> tuple[frozenset[Client], frozenset[Client]]:
        """Who has the image open, and who holds its lock, dead or alive (law 5: it has one)."""
        ceph = self._ceph
        (info, listed), owners = await both(both(ceph.image_info(image), ceph.watchers(image)), ceph.lock_owners(image))
        if not info.has_exclusive_lock and not self._allow_unfenced:
            raise NotFenced(leaves_no_trace(image.name))
        return listed, owners

    async def _users_of_new(self, image: RbdDisk) -> tuple[frozenset[Client], frozenset[Client]]:
        """The same for an image that was made a moment ago, with a lock. Whoever has opened it since is listed."""
        return await self._ceph.watchers(image), frozenset()

    async def _shut_out_gone(self, image: RbdDisk, owners: frozenset[Client], admit: Admit | None) -> None:
        """Shut out for good who holds the image's exclusive lock and has it open no more.

        Such a client is on nobody's record: a QEMU of another program whose host is dead, or frozen. librbd shuts it
        out when it breaks that lock, for an hour only: a host that wakes up later would write in turns with this one.
        """
        # Asked again: it may have opened the image and taken the lock between the two answers.
        gone = owners - await self._ceph.watchers(image)
        if gone:
            if admit is not None:
                await admit(gone)
            await self._ceph.fence(gone)
            log.warning("image.was_locked", image=image.name, addresses=sorted(gone))


async def _union(asked: Iterable[Coroutine[Any, Any, frozenset[Client]]]) -> tuple[str, ...]:
    """Ask all at once; return every client that an answer names, sorted.

    Raises:
        NotFenced: one question failed; the others are not waited for.
    """
    try:
        found = await all_of(asked)
    except CephError as error:
        raise _not_fenced(error) from error
    return tuple(sorted(frozenset[Client]().union(*found)))


def _not_fenced(error: CephError) -> NotFenced:
    return StorageAway(str(error)) if isinstance(error, CephAway) else NotFenced(str(error))
