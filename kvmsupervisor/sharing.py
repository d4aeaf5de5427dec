"""Two instances that name one image in Ceph: one of them runs, and the other waits without holding anything.

A mistake of the keys, such as a clone that kept its original's `rbd`. That never two write is storage's affair
(`fencing.py`): no guest runs while somebody else has its image open. Here is who gives way, so that one of them runs:

1. Who has no lock waits while an instance of the same image has one. So who had it on record goes first, also while its
   QEMU is being started anew, and who waits has neither lock nor QEMU.
2. Two that were started at the same instant find each other when theirs are ready and paused: who sees a client that is
   on another's record gives way; when nobody is on record, the one with the greater id does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from typing import Protocol

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import RawValue, Spec
from kvmsupervisor.domain.storage import images_of
from kvmsupervisor.domain.wishes import parse_wish
from kvmsupervisor.fencing import InUse
from kvmsupervisor.surroundings import Surroundings

ASK_EVERY_S = 5.0
"""How often one that waits for an image asks whether it is free. One short program each; arbitrary: a mistake of the
keys is mended by hand, which takes longer."""


class LockEntry(Protocol):
    """A lock's value as etcd holds it."""

    @property
    def value(self) -> bytes:
        """The value."""
        ...


class AllWishes(Protocol):
    """The keys and locks of all instances, as `mirror.Wishes` has them."""

    def ids(self) -> Set[InstanceId]:
        """Every instance."""
        ...

    def keys_of(self, instance: InstanceId) -> Mapping[bytes, RawValue]:
        """The keys of one."""
        ...

    def lock_of(self, instance: InstanceId) -> LockEntry | None:
        """The lock of one."""
        ...


def holders(wishes: AllWishes, me: InstanceId, images: Collection[str]) -> Iterator[InstanceId]:
    """The other instances whose keys name one of these images for writing, and which have a lock."""
    marks = [image.rpartition("/")[2].encode() for image in images]
    for name in wishes.ids() if marks else ():
        # Looking for the names costs less than reading the wishes of all.
        if name == me or wishes.lock_of(name) is None:
            continue
        keys = wishes.keys_of(name)
        if not any(mark in value.value for value in keys.values() for mark in marks):
            continue
        spec = parse_wish(name, keys).spec
        if spec is not None and any(image.name in images for image in images_of(spec)):
            yield name


class Sharing:
    """What one instance knows of others that name its images.

    Attributes:
        rival: for whom it waits, and what that is about, for people; None when for nobody.
        ask_at: when it is to be asked again whether the image is free.
    """

    def __init__(self, instance: InstanceId, *, around: Surroundings) -> None:
        self.rival: str | None = None
        self.ask_at = 0.0
        self._id = instance
        self._around = around

    def begin_anew(self) -> None:
        """Other keys, other images."""
        self.rival = None

    def has_to_wait(self, spec: Spec) -> bool:
        """Whether another instance has a lock for one of its images, while this one has none."""
        other = next(iter(self._holders(spec)), None)
        if other is not None:
            self._wait_for(other, spec)
        return other is not None

    async def gives_way(self, spec: Spec, conflict: InUse) -> bool:
        """Whether it is this instance's to give way, its QEMU being ready and paused, and an image open elsewhere, too.

        Raises:
            InUse: another one is to, and has not yet.
            EtcdError: it is not known whose clients those are.
        """
        holders = self._holders(spec)
        for client in conflict.clients:
            other = await self._around.recorded_for(client)
            if other not in {None, self._id}:
                self._wait_for(other, spec)
                return True
        other = min(holders, default=None)
        if other is None:
            return False
        if self._id < other:
            raise InUse(f"{conflict}. Instance {other} names it, too, and gives way to {self._id}", conflict.clients)
        self._wait_for(other, spec)
        return True

    async def ask(self, spec: Spec) -> None:
        """Look whether the images are free.

        Raises:
            NotFenced: storage does not say.
        """
        self.ask_at = self._around.clock.now() + ASK_EVERY_S
        if not self.has_to_wait(spec) and not await self._around.fencing.watchers(images_of(spec)):
            self.rival = None

    def _holders(self, spec: Spec) -> list[InstanceId]:
        return list(self._around.holders(self._id, [image.name for image in images_of(spec)]))

    def _wait_for(self, other: InstanceId | None, spec: Spec) -> None:
        images = " or ".join(image.name for image in images_of(spec))
        self.rival = (
            f"{images} is instance {other}'s, whose keys name it, too: no two instances can have one image; it waits "
            f"until {other} has let go of it, or until the keys of {self._id} or of {other} name another one"
        )
        self.ask_at = self._around.clock.now() + ASK_EVERY_S
