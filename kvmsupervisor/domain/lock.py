"""The lock: its value, how it may change, and what a value in etcd means to one host (laws 2, 3, 8 and 9).

The lock has no lease: it never vanishes by itself. Each change of it is a compare-and-swap (`cluster/lock.py`), and one
row of the table `Change`. This module says which value to write, and how to read one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, replace
from enum import Enum, StrEnum, unique
from typing import NamedTuple, assert_never

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.records import Unfit, compact, parse
from kvmsupervisor.domain.words import is_name

VERSION = 1
"""Version of the lock's value. A reader leaves a newer one alone, as a stranger's."""


ANOTHER_HISTORY = "another history of etcd"
"""In `Lock.taken_from` in place of a host that is not known."""


class LockState(StrEnum):
    """How far the holder has come."""

    FENCING = "fencing"
    """Taken from a dead holder; the addresses in `fence` are not yet all proven fenced."""
    STARTING = "starting"
    """Taken; no QEMU of this incarnation has run its guest."""
    RUNNING = "running"
    """QEMU's addresses are on record: its guest may run."""
    BROKEN = "broken"
    """An operator said that nothing of the holder writes any more (law 7): the host where it is to run takes the
    lock."""


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
        storage: what it may write to; a lock without this field may write to anything.
        taken_from: the host that it was taken from (this one, on an earlier boot, as well), until its own guest may
            run: so long, clients that are not in `fence` may have its disks open.
        facts: the holder's `KVM_FACTS_PREFIX`, below which its session is; None in locks of earlier releases.
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
    facts: str | None = None
    version: int = VERSION

    def to_json(self) -> bytes:
        """The value of the lock's key."""
        return compact(self)

    @classmethod
    def from_json(cls, data: bytes) -> Lock | None:
        """Read a lock's value; None when it is not one that this release understands."""
        try:
            lock = parse(cls, data)
        except Unfit:
            return None
        # The incarnation's name becomes the name of a cgroup, and part of an environment.
        return lock if lock.version == VERSION and is_name(lock.incarnation) else None

    def recorded(self, *, pid: int, starttime: int, clients: tuple[str, ...]) -> Lock:
        """The lock that lets this process run its guest."""
        return replace(self, state=LockState.RUNNING, pid=pid, starttime=starttime, clients=clients, taken_from=None)

    def fenced(self, addresses: Iterable[str]) -> Lock:
        """The lock once all of `fence` are shut out for good; `addresses` stay on record."""
        return replace(self, state=LockState.STARTING, fence=tuple(addresses))

    def broken(self, *, forget_clients: bool = False) -> Lock:
        """The lock that the next host may take (law 7), with all addresses that are to be fenced.

        It does not say any more where its holder's session is to be looked for: a person has said that it is gone.

        Args:
            forget_clients: leave these addresses out: their storage is gone for good.
        """
        lock = replace(self, state=LockState.BROKEN, facts=None)
        return replace(lock, clients=(), fence=()) if forget_clients else lock

    def is_seen_from(self, facts: str) -> bool:
        """Whether a host with this `KVM_FACTS_PREFIX` sees the holder's session, if there is one."""
        return self.facts is None or self.facts == facts

    @property
    def is_unfenced(self) -> bool:
        """Whether addresses of earlier incarnations may not be shut out yet: then it is not released."""
        if self.state is LockState.BROKEN:
            return bool(self.fence)
        return self.state is LockState.FENCING


def take(
    previous: Lock | None,
    *,
    host: HostName,
    boot_id: str,
    facts: str,
    incarnation: str,
    storage: Storage,
    epoch_floor: int = 0,
    closed: bool = False,
    doubted: bool = False,
) -> Lock:
    """The value with which `host` takes a lock: a free one, its own dead incarnation's, or a dead host's (law 4).

    Every address ever recorded moves into `fence`, so a taker that dies before it has fenced loses none.

    Args:
        previous: the value that is replaced, None for an absent key.
        host: the taker.
        boot_id: of its kernel.
        facts: its `KVM_FACTS_PREFIX`.
        incarnation: name of the next QEMU process.
        storage: what that process may write to.
        epoch_floor: the last epoch known from elsewhere (the status key), for a lock that was deleted.
        doubted: a holder may be missing on record, because etcd has another history.
        closed: the process of `previous` is proven gone, and closed its disks in order: nothing is left to fence.
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
        facts=facts,
    )


def _taken_from(previous: Lock, host: HostName, boot_id: str) -> str | None:
    """The host that may still have the disks open. A lock of this boot, or one without disks, hands on its own."""
    if (previous.host, previous.boot_id) == (host, boot_id) or previous.storage is Storage.NONE:
        return previous.taken_from
    return previous.host


class Writer(Enum):
    """Who changes a lock."""

    RUNNER = "the host where the instance shall run"
    HOLDER = "the host that has the process, or had it"
    OPERATOR = "a person, by `break-lock`"


class Names(Enum):
    """Which incarnation the new value names."""

    NEW = "a new one, with a greater epoch"
    SAME = "the one that the old value names"
    LIVING = "the one that lives; the old value is older, or absent"
    NONE = "none: the lock is deleted"


class Compared(Enum):
    """What etcd compares in the transaction that changes a lock."""

    LOCK = "the lock is still the one that was read"
    SESSION = "the writer has its session"
    GROUND = "`host` and the placement are still those that were read (nothing, in single mode)"
    HOLDER_GONE = "the holder has no session"


class Transition(NamedTuple):
    """One row of the table: which state may follow which, by whom, under which compares. None: there is no lock."""

    writer: Writer
    before: frozenset[LockState | None]
    after: frozenset[LockState | None]
    names: Names
    compares: tuple[Compared, ...]


def _row(writer: Writer, before: str, after: str, names: Names, *compares: Compared) -> Transition:
    """A row from the names of its states; `free` is no lock."""
    return Transition(writer, _states(before), _states(after), names, (Compared.LOCK, *compares))


def _states(names: str) -> frozenset[LockState | None]:
    return frozenset(None if name == "free" else LockState(name) for name in names.split())


@unique
class Change(Enum):
    """The lock's state table. Each row compares the lock's revision, too: `Compared.LOCK`.

    The code writes by these rows, and `tests/domain/test_lock_model.py` searches them.
    """

    # fmt: off
    #                by               before                                  after               incarnation
    TAKE      = _row(Writer.RUNNER,   "free fencing starting running broken", "fencing starting", Names.NEW,
                     Compared.SESSION, Compared.GROUND)
    """It is free, or this host's own, of an incarnation that is dead."""
    TAKE_OVER = _row(Writer.RUNNER,   "fencing starting running broken",      "fencing starting", Names.NEW,
                     Compared.SESSION, Compared.GROUND, Compared.HOLDER_GONE)
    """It is another host's (law 4)."""
    FENCE     = _row(Writer.HOLDER,   "fencing broken",                       "starting",         Names.SAME,
                     Compared.SESSION, Compared.GROUND)
    """All addresses in `fence` are shut out (law 4)."""
    RECORD    = _row(Writer.HOLDER,   "fencing starting running",             "running",          Names.SAME,
                     Compared.SESSION, Compared.GROUND)
    """QEMU is there, paused, and this names it (law 3). Only a restored etcd says `fencing` then (law 11)."""
    REASSERT  = _row(Writer.HOLDER,   "free fencing starting running broken", "running",          Names.LIVING,
                     Compared.SESSION)
    """It was deleted or is older, and its QEMU lives (law 11)."""
    RENAME    = _row(Writer.HOLDER,   "fencing starting running",             "fencing starting running", Names.SAME,
                     Compared.SESSION)
    """This host has another name, or another facts prefix, by now (law 12). The state stays."""
    BREAK     = _row(Writer.OPERATOR, "fencing starting running broken",      "broken",           Names.SAME,
                     Compared.HOLDER_GONE)
    """A person says that nothing of its holder writes any more (law 7)."""
    RELEASE   = _row(Writer.HOLDER,   "starting running broken",              "free",             Names.NONE)
    """The process is proven gone (law 9), and no address is left to be fenced (law 4)."""
    # fmt: on

    def allows(self, before: Lock | None, after: Lock | None) -> bool:
        """Whether this change may lead from one value to the other; None is no lock."""
        row = self.value
        states = (lock and lock.state for lock in (before, after))
        if any(state not in cell for state, cell in zip(states, (row.before, row.after), strict=True)):
            return False
        if self is Change.RENAME and before is not None and after is not None and before.state is not after.state:
            return False
        match row.names:
            case Names.NEW:
                return after is not None and (before is None or before.epoch < after.epoch)
            case Names.SAME:
                assert before is not None
                assert after is not None
                return (before.incarnation, before.epoch) == (after.incarnation, after.epoch)
            case Names.LIVING:
                assert after is not None
                return before is None or (before.epoch, before.incarnation) < (after.epoch, after.incarnation)
            case Names.NONE:
                return before is not None and not before.is_unfenced
            case _:
                assert_never(row.names)


class Claim(Enum):
    """What a lock means to one host, which knows of one incarnation."""

    UNKNOWN = "not read yet"
    ABSENT = "free"
    MINE = "names my incarnation"
    RENAMED = "names my incarnation, under another identity of this host"
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
        as_of: the store revision of this view; the view with the greater one is newer.
        era: the history of etcd in which it was seen, as `Era.count` counts them.
        lock: `data` parsed, None when absent or unreadable.
    """

    known: bool = False
    data: bytes | None = None
    mod_revision: int = 0
    as_of: int = 0
    era: int = 0
    lock: Lock | None = field(init=False)

    def __post_init__(self) -> None:
        """Parse the value once: every decision asks for it."""
        lock = None if self.data is None else Lock.from_json(self.data)
        object.__setattr__(self, "lock", lock)

    def says_the_same_as(self, other: LockView) -> bool:
        """Whether it is the same value, of the same write: it was confirmed at most."""
        return (self.known, self.data, self.mod_revision) == (other.known, other.data, other.mod_revision)

    def claim(
        self, *, host: HostName, facts: str, boot_id: str, incarnation: str | None, last_ended: str | None = None
    ) -> Claim:
        """What this lock means to `host`, whose process is `incarnation` (None: none) after `last_ended` (likewise).

        An incarnation is a random name, given once: on its boot it is this process, whatever the host's name and its
        `KVM_FACTS_PREFIX` were when the lock was written (law 12).
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
            if not is_mine:
                return Claim.LEFTOVER
            return Claim.MINE if lock.is_seen_from(facts) else Claim.RENAMED
        if lock.boot_id == boot_id and is_mine:
            return Claim.RENAMED
        return Claim.LEFTOVER if lock.boot_id == boot_id and lock.incarnation == last_ended else Claim.STRANGER
