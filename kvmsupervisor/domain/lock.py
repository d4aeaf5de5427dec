"""The lock: its value, how it may change, and what a value in etcd means to one host (laws 2, 3, 8 and 9).

The lock has no lease: it never vanishes by itself. Each change of it is a compare-and-swap (`cluster/lock.py`), and one
row of the table `Change`. This module says which value to write, and how to read one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import field, replace
from enum import Enum, StrEnum, unique
from functools import lru_cache
from typing import NamedTuple, assert_never

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.records import Unfit, compact, parse
from kvmsupervisor.domain.words import is_name

VERSION = 1
"""Version of the lock's value. A reader leaves a newer one alone, as a stranger's."""

MOVING_VERSION = 2
"""Version of the value during a live move: a release that does not know live moves leaves that one alone."""


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
    MIGRATING = "migrating"
    """The same; and `to` names the QEMU to which its guest is being transferred (law 13)."""
    GIVEN = "given"
    """Handed over: the QEMU that is on record has all of the guest and has not gone on with it yet (law 13)."""
    BROKEN = "broken"
    """An operator said that nothing of the holder writes any more (law 7): the host where it is to run takes the
    lock."""


class Storage(StrEnum):
    """What an incarnation may write to, which decides what a takeover needs (law 7)."""

    NONE = "none"
    RBD = "rbd"
    UNFENCEABLE = "unfenceable"


NOT_YET_RUN = frozenset({LockState.FENCING, LockState.STARTING})
"""The states in which no guest of the lock's incarnation has run."""

MOVING = frozenset({LockState.MIGRATING, LockState.GIVEN})
"""The states of a live move."""


@frozen(kw_only=True)
class Destination:
    """The QEMU at a live move's target, which waits for the guest. The fields are those of `Lock`."""

    host: HostName
    boot_id: str
    incarnation: str
    pid: int
    starttime: int
    clients: tuple[str, ...] = ()
    facts: str | None = None
    machine: str | None = None


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
        images: the images in Ceph that it has open for writing, as `POOL/IMAGE`: its keys may name others by now.
            Locks of earlier releases do not say.
        fence: addresses of earlier incarnations that are not proven dead.
        storage: what it may write to; a lock without this field may write to anything.
        taken_from: the host that it was taken from (this one, on an earlier boot, as well), until its own guest may
            run: so long, clients that are not in `fence` may have its disks open.
        facts: the holder's `KVM_FACTS_PREFIX`, below which its session is; None in locks of earlier releases.
        history: the name of the history of etcd that the holder wrote it in; None in a cluster's first history.
        machine: the holder's machine, as `HostSession.machine`; None where that is not known, and in locks of earlier
            releases.
        to: while it is `migrating`, the QEMU at the target: its clients have the disks open, too.
        paused: once it is `given`, whether a person had paused the guest, which stays so.
        stopped_ms: once it is `given`, how long QEMU says that the guest was stopped; None where it does not say.
    """

    host: HostName
    boot_id: str
    epoch: int
    state: LockState
    incarnation: str
    pid: int | None = None
    starttime: int | None = None
    clients: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    fence: tuple[str, ...] = ()
    storage: Storage = Storage.UNFENCEABLE
    taken_from: str | None = None
    facts: str | None = None
    history: str | None = None
    machine: str | None = None
    to: Destination | None = None
    paused: bool = False
    stopped_ms: int | None = None
    version: int = VERSION

    def to_json(self) -> bytes:
        """The value of the lock's key."""
        return compact(self)

    @classmethod
    def from_json(cls, data: bytes) -> Lock | None:
        """Read a lock's value; None when it is not one that this release understands."""
        # A long value is none of ours, and is not worth being remembered.
        return (_read if len(data) <= REMEMBERED_BYTES else _read.__wrapped__)(data)

    def recorded(self, *, pid: int, starttime: int, clients: tuple[str, ...], images: tuple[str, ...] = ()) -> Lock:
        """The lock that lets this process run its guest."""
        running = replace(self, state=LockState.RUNNING, pid=pid, starttime=starttime, taken_from=None, version=VERSION)
        return replace(running, clients=clients, images=images)

    def fenced(self, addresses: Iterable[str]) -> Lock:
        """The lock once all of `fence` are shut out for good; `addresses` stay on record."""
        return replace(self, state=LockState.STARTING, fence=tuple(addresses), paused=False, version=VERSION)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every address that may have to be fenced."""
        return tuple(dict.fromkeys((*self.fence, *self.living)))

    @property
    def living(self) -> tuple[str, ...]:
        """The addresses of the processes that are on record: its QEMU's and, in a live move, those of the target's."""
        return self.clients if self.to is None else (*self.clients, *self.to.clients)

    def broken(self, *, forget_clients: bool = False, mark: str | None = None) -> Lock:
        """The lock that the next host may take (law 7), with all addresses that are to be fenced.

        It does not say any more where its holder's session is to be looked for: a person has said that it is gone.

        Args:
            forget_clients: leave these addresses out: their storage is gone for good.
            mark: the history in which the person says so, as `Era.mark`.
        """
        lock = replace(self, state=LockState.BROKEN, facts=None, history=mark or None, clients=self.living)
        lock = replace(lock, to=None, paused=False, version=VERSION)
        return replace(lock, clients=(), fence=()) if forget_clients else lock

    def is_seen_from(self, facts: str) -> bool:
        """Whether a host with this `KVM_FACTS_PREFIX` sees the holder's session, if there is one."""
        return self.facts is None or self.facts == facts

    def is_namesakes(self, host: HostName, *, boot_id: str, machine: str | None) -> bool:
        """Whether another machine took it under this host's name, so that its QEMU may live there (law 12).

        A machine that is not known counts as this one, which has rebooted.
        """
        if self.host != host or self.boot_id == boot_id or not self.machine or not machine:
            return False
        return self.machine != machine

    @property
    def is_unfenced(self) -> bool:
        """Whether addresses of earlier incarnations may not be shut out yet: then it is not released."""
        if self.state in {LockState.BROKEN, LockState.GIVEN}:
            return bool(self.fence)
        return self.state is LockState.FENCING


REMEMBERED_BYTES = 4096
"""The longest value whose lock is remembered. Arbitrary: a lock with ten clients has less than 1 KiB."""


@lru_cache(maxsize=256)
def _read(data: bytes) -> Lock | None:
    """`Lock.from_json`. Up to five places of a supervisor read each value, one after the other."""
    try:
        lock = parse(Lock, data)
    except Unfit:
        return None
    named = (lock.incarnation,) if lock.to is None else (lock.incarnation, lock.to.incarnation)
    moving = lock.state in MOVING
    is_whole = lock.version == (MOVING_VERSION if moving else VERSION) and (
        (lock.to is not None) == (lock.state is LockState.MIGRATING)
    )
    # The incarnation's name becomes the name of a cgroup, and part of an environment.
    return lock if is_whole and all(map(is_name, named)) else None


def clients_to_json(addresses: Iterable[str]) -> bytes:
    """The value of `Layout.clients_key`."""
    return json.dumps(sorted(set(addresses)), separators=(",", ":")).encode()


def clients_from_json(data: bytes) -> frozenset[str]:
    """Read a value of `Layout.clients_key`; none when it is no such value."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(one for one in found if isinstance(one, str)) if isinstance(found, list) else frozenset()


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
    mark: str = "",
    machine: str | None = None,
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
        closed: the process of `previous` is proven gone, and closed its disks in order: nothing is left to fence.
        doubted: another host may run it that is not on record, because etcd has another history (`doubt.py`).
        mark: the history in which it is written, as `Era.mark`.
        machine: the taker's, as `HostSession.machine`.
    """
    unproven: tuple[str, ...] = ()
    if previous is not None:
        # The QEMU at a live move's target is another process: it has closed nothing.
        done = previous.clients if closed else ()
        unproven = tuple(address for address in previous.addresses if address in previous.fence or address not in done)
    taken_from = None if previous is None else _taken_from(previous, host, boot_id)
    if doubted or (previous is not None and previous.taken_from == ANOTHER_HISTORY):
        # Nobody who lives is shut out for it, whoever comes to fence.
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
        history=mark or None,
        machine=machine or None,
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
    TARGET = "the target's offer, which its session keeps alive, is the one that was read"


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
    TAKE      = _row(Writer.RUNNER,   "free fencing starting running migrating given broken", "fencing starting",
                     Names.NEW, Compared.SESSION, Compared.GROUND)
    """It is free, or this host's own, of an incarnation that is dead."""
    TAKE_OVER = _row(Writer.RUNNER,   "fencing starting running migrating given broken", "fencing starting",
                     Names.NEW, Compared.SESSION, Compared.GROUND, Compared.HOLDER_GONE)
    """It is another host's (law 4)."""
    FENCE     = _row(Writer.HOLDER,   "fencing broken given",                 "starting",         Names.SAME,
                     Compared.SESSION, Compared.GROUND)
    """All addresses in `fence` are shut out (law 4)."""
    ENLIST    = _row(Writer.HOLDER,   "fencing broken given", "fencing broken given", Names.SAME, Compared.SESSION)
    """Storage names more clients that have the disks open: they are shut out next (law 4). The state stays."""
    RECORD    = _row(Writer.HOLDER,   "fencing starting running",             "running",          Names.SAME,
                     Compared.SESSION, Compared.GROUND)
    """QEMU is there, paused, and this names it (law 3). Only a restored etcd says `fencing` then (law 11)."""
    ANNOUNCE  = _row(Writer.HOLDER,   "running",                              "migrating",        Names.SAME,
                     Compared.SESSION, Compared.GROUND, Compared.TARGET)
    """The target's QEMU waits for the guest, and this names it, before the transfer begins (law 13)."""
    CALL_OFF  = _row(Writer.HOLDER,   "migrating",                            "running",          Names.SAME)
    """The transfer came to nothing. From here on the target's QEMU gets the guest no more, whatever is late."""
    GIVE      = _row(Writer.HOLDER,   "migrating",                            "given",            Names.NEW,
                     Compared.SESSION, Compared.GROUND, Compared.TARGET)
    """The transfer has completed: the guest is the target's (law 13). The one hand-over of a live move."""
    ARRIVE    = _row(Writer.HOLDER,   "given",                                "running",          Names.SAME,
                     Compared.SESSION)
    """The guest goes on at the target."""
    REASSERT  = _row(Writer.HOLDER,   "free fencing starting running migrating given broken", "running",
                     Names.LIVING, Compared.SESSION)
    """It was deleted or is older, and its QEMU lives (law 11)."""
    RENAME    = _row(Writer.HOLDER,   "fencing starting running migrating given",
                     "fencing starting running migrating given", Names.SAME, Compared.SESSION)
    """This host has another name, or another facts prefix, by now (law 12), or etcd has another history (law 11). The
    state stays."""
    BREAK     = _row(Writer.OPERATOR, "fencing starting running migrating given broken", "broken", Names.SAME,
                     Compared.HOLDER_GONE)
    """A person says that nothing of its holder writes any more (law 7)."""
    RELEASE   = _row(Writer.HOLDER,   "starting running migrating given broken", "free",          Names.NONE)
    """The process is proven gone (law 9), and no address is left to be fenced (law 4)."""
    # fmt: on

    def allows(self, before: Lock | None, after: Lock | None) -> bool:
        """Whether this change may lead from one value to the other; None is no lock."""
        row = self.value
        states = (lock and lock.state for lock in (before, after))
        if any(state not in cell for state, cell in zip(states, (row.before, row.after), strict=True)):
            return False
        stays = self in {Change.ENLIST, Change.RENAME}
        if stays and before is not None and after is not None and before.state is not after.state:
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
    RENAMED = "names my incarnation, under another identity of this host or in a former history"
    LEFTOVER = "names an earlier incarnation of this host"
    STRANGER = "names another host, or another machine under this host's name"
    BROKEN = "was broken by an operator"
    UNREADABLE = "is no lock that this release understands"
    NEWER = "was written by a newer release"


@frozen(kw_only=True)
class _Versioned:
    version: int


def _is_newer(data: bytes) -> bool:
    """Whether a value that cannot be read says that a newer release has written it."""
    try:
        return parse(_Versioned, data).version > VERSION
    except Unfit:
        return False


@frozen
class LockView:
    """A lock as last seen.

    Attributes:
        known: False until it was read for the first time.
        data: the raw value, None when the key is absent.
        mod_revision: of the key, 0 when it is absent: what the next compare-and-swap compares with.
        as_of: the store revision of this view; the view with the greater one is newer.
        era: the history of etcd in which it was seen, as `Era.count` counts them.
        lock: `data` parsed, None when absent or unreadable; whoever has parsed it already passes it on.
    """

    known: bool = False
    data: bytes | None = None
    mod_revision: int = 0
    as_of: int = 0
    era: int = 0
    lock: Lock | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Parse the value once: every decision asks for it."""
        if self.lock is None and self.data is not None:
            object.__setattr__(self, "lock", Lock.from_json(self.data))

    def says_the_same_as(self, other: LockView) -> bool:
        """Whether it is the same value, of the same write: it was confirmed at most."""
        return (self.known, self.data, self.mod_revision) == (other.known, other.data, other.mod_revision)

    def claim(
        self,
        *,
        host: HostName,
        facts: str,
        boot_id: str,
        incarnation: str | None,
        last_ended: str | None = None,
        mark: str = "",
        machine: str | None = None,
    ) -> Claim:
        """What this lock means to `host`, whose process is `incarnation` (None: none) after `last_ended` (likewise).

        An incarnation is a random name, given once: on its boot it is this process, whatever the host's name and its
        `KVM_FACTS_PREFIX` were when the lock was written (law 12). `mark` is the history of etcd that it has to name.
        Another `machine` under this host's name is a stranger.
        """
        if not self.known:
            return Claim.UNKNOWN
        if self.data is None:
            return Claim.ABSENT
        lock = self.lock
        if lock is None:
            return Claim.NEWER if _is_newer(self.data) else Claim.UNREADABLE
        if lock.state is LockState.BROKEN:
            return Claim.BROKEN
        is_mine = lock.incarnation == incarnation
        if lock.host == host:
            if not is_mine:
                namesakes = lock.is_namesakes(host, boot_id=boot_id, machine=machine)
                return Claim.STRANGER if namesakes else Claim.LEFTOVER
            is_present = lock.is_seen_from(facts) and (not mark or lock.history == mark)
            return Claim.MINE if is_present else Claim.RENAMED
        if lock.boot_id == boot_id and is_mine:
            return Claim.RENAMED
        return Claim.LEFTOVER if lock.boot_id == boot_id and lock.incarnation == last_ended else Claim.STRANGER
