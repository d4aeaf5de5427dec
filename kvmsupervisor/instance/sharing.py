"""Two instances that name one image in Ceph: one of them runs, and the other waits without holding anything.

A mistake of the keys, such as a clone that kept its original's `rbd`. That never two write is storage's affair
(`cluster/fencing.py`): no guest runs while somebody else has its image open. Here is who gives way, so that one of them
runs:

1. Who has no lock waits while an instance of the same image has one. So who had it on record goes first, also while its
   QEMU is being started anew, and who waits has neither lock nor QEMU.
2. Two that were started at the same instant find each other when theirs are ready and paused: who sees a client that is
   on another's record gives way; when nobody is on record, the one with the greater id does.

Who runs says so, too, whatever host the other one is on: it is the keys of either that are to be mended.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import Protocol

from kvmsupervisor.cluster.fencing import InUse
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.spec import RawValue, Spec
from kvmsupervisor.domain.storage import images_of, names_of
from kvmsupervisor.domain.values import some
from kvmsupervisor.instance.context import InstanceContext

ASK_EVERY_S = 5.0
"""How often one that waits for an image asks whether it is free. One short program each; arbitrary: a mistake of the
keys is mended by hand, which takes longer."""


SHOWN = 3
"""How many others are named. Arbitrary: one line."""


class LockEntry(Protocol):
    """A lock's value as etcd holds it."""

    @property
    def value(self) -> bytes:
        """The value."""
        ...


class AllWishes(Protocol):
    """The keys and locks of all instances, as `informer.Wishes` has them."""

    def ids(self) -> Set[InstanceId]:
        """Every instance."""
        ...

    def keys_of(self, instance: InstanceId) -> Mapping[bytes, RawValue]:
        """The keys of one."""
        ...

    def lock_of(self, instance: InstanceId) -> LockEntry | None:
        """The lock of one."""
        ...


class Namesakes:
    """Which instances name which images, told by the images' names alone: so that few keys have to be read.

    Args:
        wishes: of the whole cluster. `heard` is to be told of every change of them.
        me: this host, whose files are not those of others.
    """

    def __init__(self, wishes: AllWishes, me: HostName) -> None:
        self._wishes = wishes
        self._me = me
        # Tuples, because most have one element: a set of one takes four times the memory, and a cluster has thousands.
        self._named: dict[InstanceId, tuple[bytes, ...]] = {}
        self._naming: dict[bytes, tuple[InstanceId, ...]] = {}

    def heard(self, changed: Set[InstanceId]) -> Set[InstanceId]:
        """Take note of these instances' keys; return the others for which something may differ by that."""
        concerned: set[InstanceId] = set()
        for one in changed:
            before, now = self._named.get(one, ()), _named(self._wishes.keys_of(one))
            if now == before:
                continue
            if now:
                self._named[one] = now
            else:
                self._named.pop(one, None)
            for name in set(before) ^ set(now):
                others = tuple(other for other in self._naming.pop(name, ()) if other != one)
                concerned.update(others)
                if name in now or others:
                    self._naming[name] = (*others, one) if name in now else others
        return concerned

    def beside(self, names: Set[InstanceId]) -> Set[InstanceId]:
        """The others that may name an image of one of these: told by the text of their keys."""
        images = {image for name in names for image in self._named.get(name, ())}
        return {other for image in images for other in self._naming.get(image, ())} - names

    def heard_anew(self) -> None:
        """All keys are another history's."""
        self.heard(self._named.keys() | self._wishes.ids())

    def holders(self, me: InstanceId, images: Collection[str]) -> list[InstanceId]:
        """Those of `of` that have a lock."""
        return [one for one in self.of(me, images) if self._wishes.lock_of(one) is not None]

    def of(self, me: InstanceId, images: Collection[str]) -> list[InstanceId]:
        """The other instances whose keys name one of these images for writing, whether they have a lock or none."""
        found = []
        for name in {one for image in images for one in self._naming.get(image.encode(), ()) if one != me}:
            wish = parse_wish(name, self._wishes.keys_of(name))
            if wish.spec is None:
                continue
            # Another host's file of that name is another file.
            names = names_of(wish.spec) if wish.host == self._me else [image.name for image in images_of(wish.spec)]
            if any(image in images for image in names):
                found.append(name)
        return sorted(found)


def _named(keys: Mapping[bytes, RawValue]) -> tuple[bytes, ...]:
    """The names of all images, in Ceph or elsewhere, that these keys name; each once, in order.

    Whole names: many images share the last part of theirs, such as `root` in the pool of each customer.
    """
    values = [raw.value.decode(errors="replace") for key, raw in keys.items() if key == b"rbd" or key[:5] == b"disk/"]
    return tuple(sorted({words[0].removeprefix("/").encode() for value in values if (words := value.split(None, 1))}))


class Sharing:
    """What one instance knows of others that name its images.

    Attributes:
        rival: for whom it waits, and what that is about, for people; None when for nobody.
        ask_at: when it is to be asked again whether the image is free.
    """

    def __init__(self, instance: InstanceId, *, context: InstanceContext) -> None:
        self.rival: str | None = None
        self.ask_at = 0.0
        self._id = instance
        self._context = context

    def begin_anew(self) -> None:
        """Other keys, other images."""
        self.rival = None

    def shared(self, spec: Spec | None) -> str | None:
        """What is to be said of a machine that runs, where others name its images, too; None where none does."""
        mine = () if spec is None else names_of(spec)
        others = list(self._context.namesakes(self._id, mine))
        if not others:
            return None
        return f"{' or '.join(mine)} is named by the keys of {some(others, SHOWN)}, too: only one of them can run"

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
        others = await self._context.recorded_for(conflict.clients, besides=self._id)
        if (other := next(iter(others.values()), None)) is not None:
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
        self.ask_at = self._context.clock.now() + ASK_EVERY_S
        if not self.has_to_wait(spec) and not await self._context.fencing.watchers(images_of(spec)):
            self.rival = None

    def _holders(self, spec: Spec) -> list[InstanceId]:
        return list(self._context.holders(self._id, names_of(spec)))

    def _wait_for(self, other: InstanceId | None, spec: Spec) -> None:
        images = " or ".join(names_of(spec))
        self.rival = (
            f"{images} is instance {other}'s, whose keys name it, too: no two instances can have one image; it waits "
            f"until {other} has let go of it, or until the keys of {self._id} or of {other} name another one"
        )
        self.ask_at = self._context.clock.now() + ASK_EVERY_S
