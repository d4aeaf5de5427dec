"""What must hold whatever happens: pure checkers, each told what was observed, each answering what must not be.

The simulation (`tests.simulation.judge`) feeds them after every step, from memory. The chaos runs feed them from disks,
etcd, logs and run directories. Tests on a real etcd feed them what a watch has handed on. How long something may take,
or be untrue, is in `tests.support.bounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from kvmsupervisor.adapters.etcd.api import Batch, Event
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.status import Phase, Status

KeyT = TypeVar("KeyT", bound=Hashable)

# --- storage ------------------------------------------------------------------------------------------------------


class Writers:
    """Storage never lets two QEMUs write: nobody writes to a disk behind one that came after him."""

    def __init__(self) -> None:
        # By disk: the latest writer and its rank; the same before the present instant; that instant.
        self._latest: dict[str, tuple[str, float]] = {}
        self._before: dict[str, tuple[str, float]] = {}
        self._at: dict[str, float] = {}

    def wrote(self, disk: str, writer: str, *, rank: float, at: float) -> str | None:
        """Whoever had written before although it came later; None when nobody had.

        Args:
            disk: to which.
            writer: an incarnation.
            rank: grows from one writer of a disk to the next: its epoch, or when it was let run.
            at: when, in any unit; which of two writes of one instant came first is not known.
        """
        if self._at.get(disk) != at:
            self._at[disk] = at
            if disk in self._latest:
                self._before[disk] = self._latest[disk]
        if rank > self._latest.get(disk, ("", float("-inf")))[1]:
            self._latest[disk] = writer, rank
        later, highest = self._before.get(disk, ("", float("-inf")))
        return later if rank < highest and later != writer else None


class Debts:
    """What is to be shut out before the next QEMU of an instance runs (laws 3 and 4), by the values of its lock.

    What a lock has on record is owed until it is let go of: the process is proven gone then. The caller leaves out who
    has ended in order since.
    """

    def __init__(self) -> None:
        self._owed: dict[str, str] = {}

    def saw(self, lock: Lock | None) -> None:
        """Take the next value of the lock; None where it was deleted."""
        if lock is None or _is_forgotten(lock):
            self._owed.clear()
            return
        # What it found to fence is an earlier one's, whose own value may not have been seen.
        for address in lock.fence:
            self._owed.setdefault(address, "an earlier one")
        self._owed.update(dict.fromkeys(lock.clients, lock.incarnation))
        if lock.to is not None:
            # It may have all of the guest (law 13).
            self._owed.update(dict.fromkeys(lock.to.clients, lock.to.incarnation))

    def before(self, incarnation: str) -> dict[str, str]:
        """Address → whose it is: all that has to be shut out before this one runs."""
        return {address: whose for address, whose in self._owed.items() if whose != incarnation}

    def lost_by(self, lock: Lock) -> dict[str, str]:
        """What a new incarnation's lock does not tell of: if this one dies now, nobody fences it any more."""
        return {address: whose for address, whose in self.before(lock.incarnation).items() if address not in lock.fence}


def _is_forgotten(lock: Lock) -> bool:
    """Whether it is an operator's word that there is nothing to fence any more: that storage is gone for good."""
    return lock.state is LockState.BROKEN and not lock.clients and not lock.fence


# --- epochs -------------------------------------------------------------------------------------------------------


class Epochs:
    """No epoch goes back, and none is used twice, within one history of etcd (law 2): one instance's lock."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self._whose: dict[int, str] = {}
        self._highest = 0
        # Incarnations of former histories: one that lives may need a greater epoch than a backup's lock has.
        self._left: set[str] = set()

    def saw(self, lock: Lock) -> Iterator[str]:
        """What is wrong with the next value of the lock."""
        if lock.incarnation in self._left and lock.epoch > self.of[lock.incarnation]:
            self._left.remove(lock.incarnation)
            self.of[lock.incarnation] = lock.epoch
        epoch = self.of.setdefault(lock.incarnation, lock.epoch)
        if epoch != lock.epoch:
            yield f"the lock named {lock.incarnation} with epoch {epoch} and with epoch {lock.epoch}"
        elif lock.epoch < self._highest:
            yield f"the lock went back from epoch {self._highest} to {lock.epoch} of {lock.incarnation} on {lock.host}"
        elif self._whose.setdefault(epoch, lock.incarnation) != lock.incarnation:
            yield f"the lock named {lock.incarnation} with epoch {epoch}, which was another's"
        self._highest = max(self._highest, lock.epoch)

    def begin_again(self, *, from_one: bool = False) -> None:
        """Etcd has another history: older locks may be in it. An incarnation may get one other epoch, a greater one.

        Args:
            from_one: nothing in it tells of a former history, so that epochs may be used again.
        """
        self._highest = 0
        self._left = set(self.of)
        if from_one:
            self._whose.clear()


# --- ends ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Plight:
    """A QEMU that its supervisor ends.

    Attributes:
        ran: its guest was let run.
        stands: its guest does not run any more, by itself.
        lost: its lock has gone to a later incarnation, or an operator broke it.
        shut_out: storage takes no write of it.
        ordered: a person gave an order that ends it, or starts it again.
        elsewhere: people want it elsewhere, or not at all.
    """

    ran: bool = True
    stands: bool = False
    lost: bool = False
    shut_out: bool = False
    ordered: bool = False
    elsewhere: bool = False


class Right(Enum):
    """Why a supervisor may end a QEMU."""

    NEVER_RAN = "it never ran"
    STANDS = "its guest has stopped by itself"
    LOST = "its lock was taken over, or broken"
    SHUT_OUT = "it is shut out"
    ORDERED = "a person said so"
    ELSEWHERE = "people want it elsewhere, or not at all"


ASKED_FIRST = frozenset({Right.ORDERED, Right.ELSEWHERE})
"""For these a guest is asked to shut down first."""


def right_to_end(plight: Plight) -> Right | None:
    """Why this one may be ended; None when it may not."""
    rows = (
        (not plight.ran, Right.NEVER_RAN),
        (plight.stands, Right.STANDS),
        (plight.lost, Right.LOST),
        (plight.shut_out, Right.SHUT_OUT),
        (plight.ordered, Right.ORDERED),
        (plight.elsewhere, Right.ELSEWHERE),
    )
    return next((right for is_so, right in rows if is_so), None)


# --- records ------------------------------------------------------------------------------------------------------


def unrecorded(living: Iterable[str], recorded: Container[str]) -> list[str]:
    """Incarnations that live, and whose record was deleted: nobody would adopt them."""
    return sorted(one for one in living if one not in recorded)


# --- what is untrue for too long -----------------------------------------------------------------------------------


class Lasting(Generic[KeyT]):
    """What may be untrue for a while, and not for longer."""

    def __init__(self) -> None:
        self._since: dict[KeyT, tuple[object, float]] = {}

    def see(self, key: KeyT, what: object | None, *, now: float, bound_s: float) -> float | None:
        """For how long the same has been untrue, where that is too long; then it counts anew.

        Args:
            key: of whom.
            what: is untrue; None when nothing is.
            now: seconds.
            bound_s: how long it may be.
        """
        if what is None:
            self._since.pop(key, None)
            return None
        known = self._since.get(key)
        if known is None or known[0] != what:
            self._since[key] = what, now
            return None
        lasted_s = now - known[1]
        if lasted_s <= bound_s:
            return None
        self._since[key] = what, now
        return lasted_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What is so of an instance.

    Attributes:
        living: pids of its QEMUs on the host that its status names.
        running: those of them whose guest runs.
        lock: its lock.
        newest: the revision of the newest of its keys; 0 when it is not known, or that host need not heed them.
        sessions: the hosts that have a session, and take machines in.
    """

    living: Collection[int]
    running: Collection[int]
    lock: Lock | None = None
    newest: int = 0
    sessions: Container[str] = ()


def untrue(status: Status, fact: Fact) -> str | None:
    """What a status claims that is not so; None when all is so.

    What nobody may believe is no claim: a reader shows a status as `unknown` whose host has no session.
    """
    lock = fact.lock
    if status.pid is not None and status.pid not in fact.living:
        return f"{status.phase}: QEMU {status.pid} lives on {status.host}"
    if status.pid is None and fact.living:
        return f"{status.phase}: no QEMU lives on {status.host}"
    if status.up and status.pid not in fact.running:
        return f"the guest of {status.pid} runs"
    if status.phase is Phase.RUNNING and status.halted is not None and status.pid in fact.running:
        return f"the guest of {status.pid} is {status.halted}"
    if lock is not None and (lock.host, lock.pid) == (status.host, status.pid) and lock.epoch != status.epoch:
        return f"its epoch is {status.epoch}, which is {lock.epoch}"
    if status.awaited_host is not None and status.awaited_host in fact.sessions:
        return f"{status.awaited_host} has no session, or takes nobody in"
    if status.revision < fact.newest:
        return f"its keys are those of revision {status.revision}, which are of {fact.newest}"
    return None


def unexplained(status: Status | None) -> str | None:
    """What a person would miss in the status of an instance that does not run; None when the status explains it."""
    if status is None:
        return "it has no status"
    if status.phase is Phase.RUNNING and status.run_state == "running":
        return f"its status says that it runs on {status.host}"
    if not status.reason.strip() or status.reason == NOT_LOOKED:
        return f"it is {status.phase}, and its status says no reason: {status.reason!r}"
    return None


NOT_LOOKED = "not looked at yet"
"""The reason in a status before the first look (`instance.status`), which explains nothing."""


# --- what is tried again ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    began: float
    last: float
    count: int = 0
    is_told: bool = False


class Tries:
    """Nothing is tried again for ever in silence: of each row of tries that fail, something is told within a bound.

    Args:
        bound_s: how long tries may go on without a word. Tries that lie further apart are no row.
    """

    LEAST = 3
    """How many tries are a row. Who waits for his first answer, or asks again once, has nothing to tell yet."""

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._rows: dict[tuple[str, str], _Row] = {}

    def failed(self, who: str, subject: str, *, at: float) -> None:
        """A try about `subject` failed."""
        row = self._rows.get((who, subject))
        if row is None or at - row.last > self._bound_s:
            row = self._rows[who, subject] = _Row(began=at, last=at)
        row.last = at
        row.count += 1

    def went_well(self, who: str, subject: str) -> None:
        """It is no row any more."""
        self._rows.pop((who, subject), None)

    def told(self, who: str, subject: str) -> None:
        """Something was logged about it, counted, or written into a status."""
        row = self._rows.get((who, subject))
        if row is not None:
            row.is_told = True

    def over(self, who: str) -> None:
        """It has ended."""
        for key in [key for key in self._rows if key[0] == who]:
            del self._rows[key]

    def silent(self) -> Iterator[str]:
        """Rows of which nothing was told for too long; each once."""
        for (who, subject), row in self._rows.items():
            lasted_s = row.last - row.began
            if not row.is_told and row.count >= self.LEAST and lasted_s > self._bound_s:
                row.is_told = True
                yield f"{who} has tried {subject} {row.count} times in {lasted_s:.0f} s, and told nobody"


# --- watches ------------------------------------------------------------------------------------------------------


class WatchLog:
    """What a watch hands on has etcd's guarantees (https://etcd.io/docs/v3.5/learning/api_guarantees/#watch-apis).

    Ordered: revisions grow. Unique: no event comes twice. Atomic: all of a revision come in one batch. Resumable:
    nothing is missing, however often the stream broke. Bookmarkable: a batch's revision is that of its last event.
    """

    def __init__(self, start: int) -> None:
        self.events: list[Event] = []
        self._next = start

    def handed(self, batch: Batch) -> Iterator[str]:
        """What is wrong with the next batch, by itself and behind the former ones."""
        revisions = [event.kv.mod_revision for event in batch.events]
        if not revisions:
            yield "an empty batch was handed on"
            return
        if revisions != sorted(revisions):
            yield f"ordered: a batch with the revisions {revisions}"
        if batch.revision != revisions[-1]:
            yield f"bookmarkable: a batch up to {revisions[-1]} says {batch.revision}"
        if min(revisions) < self._next:
            known = {(event.kv.key, event.kv.mod_revision) for event in self.events}
            again = [one.kv for one in batch.events if (one.kv.key, one.kv.mod_revision) in known]
            law = "unique" if again else "atomic" if min(revisions) == self._next - 1 and self.events else "ordered"
            yield f"{law}: revision {min(revisions)} behind {self._next - 1}"
        pairs = [(event.kv.key, event.kv.mod_revision) for event in batch.events]
        if len(set(pairs)) < len(pairs):
            yield f"unique: a batch has an event twice: {pairs}"
        self.events += batch.events
        self._next = max(self._next, *(revision + 1 for revision in revisions))

    def lacks(self, truth: Iterable[Event]) -> Iterator[str]:
        """What is missing, or was made up, up to the last revision that was handed on.

        Args:
            truth: all that happened below the prefix since the watch began, in order.
        """
        true = [event for event in truth if event.kv.mod_revision < self._next]
        if self.events != true:
            lost = [f"{one.kv.key!r}@{one.kv.mod_revision}" for one in true if one not in self.events]
            more = [f"{one.kv.key!r}@{one.kv.mod_revision}" for one in self.events if one not in true]
            yield f"resumable: lost {lost}, made up {more}, of {len(true)}"


Value = tuple[bytes, int] | None
"""A key: its value and `mod_revision`; None when it is absent."""


@dataclass(slots=True)
class Followed(Generic[KeyT]):
    """What an informer tells, held against etcd's own history: each change once, in order, whole, and none is lost.

    Args:
        label: of a key, by which changes are told; None for a key of which nothing is told.
    """

    label: Callable[[bytes], KeyT | None]
    revision: int = 0
    known: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)

    def told(
        self,
        changed: Collection[KeyT],
        revision: int,
        *,
        events: Sequence[Event],
        held: Callable[[bytes], Value],
        anew: bool = False,
    ) -> list[str]:
        """What is wrong with what was told. Where nothing is, it counts as told.

        Args:
            changed: labels of what differs.
            revision: of etcd, up to which the informer says that it has everything.
            events: what happened below the prefix behind the last revision that was told, up to this one, in order;
                `anew`: from the beginning of the history.
            held: a key as the informer's table has it now.
            anew: the informer began again, with another history.
        """
        if not anew and changed and revision <= self.revision:
            return [f"ordered: told of {revision} behind {self.revision}: {sorted(map(str, changed))}"]
        now = {} if anew else dict(self.known)
        touched: set[bytes] = set()
        for event in events:
            touched.add(event.kv.key)
            if event.deleted:
                now.pop(event.kv.key, None)
            else:
                now[event.kv.key] = event.kv.value, event.kv.mod_revision
        if anew:
            touched |= self.known.keys()
        labels = {key: self.label(key) for key in sorted(touched)}
        wrong = [
            f"whole: the table holds {held(key)}, and etcd {now.get(key)}, of {key!r} at {revision}"
            for key, label in labels.items()
            if label is not None and held(key) != now.get(key)
        ]
        differs = {label for key, label in labels.items() if now.get(key) != self.known.get(key)}
        if lost := differs - {None} - set(changed):
            wrong.append(f"resumable: nothing was told of {sorted(map(str, lost))} up to {revision}")
        if more := set(changed) - set(labels.values()):
            wrong.append(f"unique: told of {sorted(map(str, more))} at {revision}, where nothing happened")
        if not wrong:
            self.known, self.revision = now, revision
        return wrong

    def begin_at(self, events: Iterable[Event], revision: int) -> None:
        """Take for told whatever happened up to this revision, from the beginning of the history."""
        self.known.clear()
        for event in events:
            self.known.pop(event.kv.key, None)
            if not event.deleted:
                self.known[event.kv.key] = event.kv.value, event.kv.mod_revision
        self.revision = revision


# --- liveness -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """An instance that is to run once all is healed: what may hold it up, and for how long.

    Attributes:
        causes: why, for people, each with its bound in seconds (`tests.support.bounds`).
    """

    causes: Mapping[str, float]

    @property
    def bound_s(self) -> float:
        """For how long all of them together may."""
        return sum(self.causes.values())

    def late(self, took_s: float) -> str | None:
        """What to say of an instance that took so long; None when that is within its bound."""
        if took_s <= self.bound_s:
            return None
        told = ", ".join(f"{why} {seconds:g} s" for why, seconds in self.causes.items())
        return f"not within {self.bound_s:g} s ({told})"
