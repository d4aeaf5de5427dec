"""The lock: its value, and what a value found in etcd means to one host (laws 2, 3, 8 and 9).

The lock has no lease: it never vanishes by itself. Every change of it is a compare-and-swap, done in
`instance/worker.py`; this module says which value to write and how to read one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, replace
from enum import Enum, StrEnum

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.records import Unfit, compact, parse
from kvmsupervisor.domain.words import is_name

VERSION = 1
"""Version of the lock's value. A reader leaves a newer one alone, as a stranger's."""


ANOTHER_HISTORY = "another history of etcd"
"""Stands for a host in `Lock.taken_from` where nobody knows which."""


class LockState(StrEnum):
    """How far the holder has come."""

    FENCING = "fencing"
    """Taken from a dead holder; the addresses in `fence` are not yet all proven fenced."""
    STARTING = "starting"
    """Taken; no QEMU of this incarnation has run its guest."""
    RUNNING = "running"
    """QEMU's addresses are on record: its guest may run."""
    BROKEN = "broken"
    """An operator has said that nothing of the holder writes any more (law 7): whoever shall run it takes the lock."""


class Storage(StrEnum):
    """What an incarnation may write to, which decides what a takeover needs (law 7)."""

    NONE = "none"
    RBD = "rbd"
    UNFENCEABLE = "unfenceable"


@frozen(kw_only=True)
class Lock:
    """The value of `/kvm/<id>/lock`.

    Attributes:
        host: the holder.
        boot_id: of the holder's kernel when it took the lock.
        epoch: grows by one with each incarnation.
        state: how far the holder has come.
        incarnation: names one QEMU process, before it exists.
        pid: of that process, once it is on record.
        starttime: of that process, in clock ticks since boot (field 22 of /proc/<pid>/stat, proc(5)).
        clients: its Ceph client addresses, all on record before the guest runs.
        fence: addresses of earlier incarnations that are not proven dead.
        storage: what it may write to; a value that does not say may write to anything.
        taken_from: whom it was taken from, host or earlier boot of this one, until its own guest may run: for so long,
            others than those in `fence` may have its disks open.
    """

    host: HostName
    boot_id: str
    epoch: int
    state: LockState
    incarnation: str
    pid: int | None = None
    starttime: int | None = None
    clients: tuple[str, ...] = ()
    fence: tuple[str, ...] = ()
    storage: Storage = Storage.UNFENCEABLE
    taken_from: str | None = None
    version: int = VERSION

    def to_json(self) -> bytes:
        """As the lock's key holds it."""
        return compact(self)

    @classmethod
    def from_json(cls, data: bytes) -> Lock | None:
        """Read a lock's value; None when it is not one that this release understands."""
        try:
            lock = parse(cls, data)
        except Unfit:
            return None
        # The incarnation's name becomes that of a cgroup, and a variable of an environment.
        return lock if lock.version == VERSION and is_name(lock.incarnation) else None

    def recorded(self, *, pid: int, starttime: int, clients: tuple[str, ...]) -> Lock:
        """The value that says "this process may run its guest"."""
        return replace(self, state=LockState.RUNNING, pid=pid, starttime=starttime, clients=clients, taken_from=None)

    def fenced(self, addresses: Iterable[str]) -> Lock:
        """The value that says "all of `fence` are shut out for good", with `addresses` as those still on record."""
        return replace(self, state=LockState.STARTING, fence=tuple(addresses))

    def broken(self, *, forget_clients: bool = False) -> Lock:
        """The value that says "whoever shall run it may take this" (law 7), with all that there is to fence.

        Args:
            forget_clients: leave out what there is to fence: that storage is gone for good.
        """
        lock = replace(self, state=LockState.BROKEN)
        return replace(lock, clients=(), fence=()) if forget_clients else lock

    @property
    def is_unfenced(self) -> bool:
        """Whether addresses of earlier incarnations may not have been shut out yet: it is not to be let go of."""
        if self.state is LockState.BROKEN:
            return bool(self.fence)
        return self.state is LockState.FENCING


def take(
    previous: Lock | None,
    *,
    host: HostName,
    boot_id: str,
    incarnation: str,
    storage: Storage,
    epoch_floor: int = 0,
    closed: bool = False,
    doubted: bool = False,
) -> Lock:
    """The value with which `host` takes a lock: a free one, its own dead incarnation's, or a dead host's (law 4).

    Every address that was ever recorded goes on with it, so a taker that dies before it has fenced loses none.

    Args:
        previous: the value that is replaced, None for an absent key.
        host: who takes it.
        boot_id: of its kernel.
        incarnation: name of the QEMU process to come.
        storage: what that process may write to.
        epoch_floor: the last epoch known from elsewhere (the status key), for a lock that was deleted.
        doubted: whoever had it since may not be on record, because etcd has another history.
        closed: the process of `previous` is proven gone, and has closed its disks in order: nothing of it is left.
    """
    unproven = (
        () if previous is None else tuple(dict.fromkeys((*previous.fence, *(() if closed else previous.clients))))
    )
    taken_from = None if previous is None else _taken_from(previous, host, boot_id)
    if taken_from is None and doubted:
        taken_from = ANOTHER_HISTORY
    last = epoch_floor if previous is None else max(previous.epoch, epoch_floor)
    return Lock(
        host=host,
        boot_id=boot_id,
        epoch=last + 1,
        state=LockState.FENCING if unproven or taken_from is not None else LockState.STARTING,
        incarnation=incarnation,
        fence=unproven,
        storage=storage,
        taken_from=taken_from,
    )


def _taken_from(previous: Lock, host: HostName, boot_id: str) -> str | None:
    """Whose disks may still be open; None when `previous` had none, or was this boot's own."""
    if (previous.host, previous.boot_id) == (host, boot_id):
        return previous.taken_from
    return None if previous.storage is Storage.NONE else previous.host


class Claim(Enum):
    """What a lock's value means to one host and the incarnation that it knows of."""

    UNKNOWN = "not read yet"
    ABSENT = "free"
    MINE = "names my incarnation"
    RENAMED = "names my incarnation, under another name of this host"
    LEFTOVER = "names an earlier incarnation of this host"
    STRANGER = "names another host"
    BROKEN = "was broken by an operator"
    UNREADABLE = "is no lock that this release understands"


@frozen
class LockView:
    """A lock as last seen.

    Attributes:
        known: False until it was read for the first time.
        data: the raw value, None when the key is absent.
        mod_revision: of the key, 0 when it is absent: what the next compare-and-swap compares with.
        as_of: the store revision at which this was true; the greater one of two views is the newer.
        lock: `data` as read, None when absent or unreadable.
    """

    known: bool = False
    data: bytes | None = None
    mod_revision: int = 0
    as_of: int = 0
    lock: Lock | None = field(init=False)

    def __post_init__(self) -> None:
        """Read the value once: a view is asked for it in every decision."""
        lock = None if self.data is None else Lock.from_json(self.data)
        object.__setattr__(self, "lock", lock)

    def claim(self, *, host: HostName, boot_id: str, incarnation: str | None, buried: str | None = None) -> Claim:
        """What this lock means to `host`, which knows of `incarnation` (None: of none), and has `buried` one before.

        An incarnation is a random name, given once: on the boot that it belongs to it is this process, whatever the
        host was called when the lock was written (law 12).
        """
        if not self.known:
            return Claim.UNKNOWN
        if self.data is None:
            return Claim.ABSENT
        lock = self.lock
        if lock is None:
            return Claim.UNREADABLE
        if lock.state is LockState.BROKEN:
            return Claim.BROKEN
        is_mine = lock.incarnation == incarnation
        if lock.host == host:
            return Claim.MINE if is_mine else Claim.LEFTOVER
        if lock.boot_id == boot_id and is_mine:
            return Claim.RENAMED
        return Claim.LEFTOVER if lock.boot_id == boot_id and lock.incarnation == buried else Claim.STRANGER
