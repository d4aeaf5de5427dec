"""What the guests of the chaos tests write to their disk, and the judge of it.

The layout is made so that no writer can wipe out another's trace, in whatever order their writes come:

- the *table*: a sector for each of `SLOTS` writers, from sector `TABLE_SECTOR` on, which holds its newest record (its
  head). A writer takes a free one when it starts and writes to no other.
- the *logs*: a region of `REGION_SECTORS` for each slot, beginning with the second one of the disk, to which its writer
  appends every record.

Before each record a writer reads the whole table from the disk. The record with the highest sequence there is the
previous one; the new one has the sequence after it, and names it and its owner. It is written to the head first, to the
log then: so whoever can have read it there has it on record for ever, and a writer that is killed between the two
leaves a head alone, which is its last record.

So in order the sequences of all owners together are 1, 2, 3 and so on, each of them once. A writer that goes on
although another has begun either sees that one's records, then it names a later epoch as the previous one, or it does
not, then two records have one sequence. Nothing else is possible, and both stay on the disk: each in its writer's own
sectors. What the next one has seen before it began was written before it began.

Two holes are left, both of one instant. Two that start at once, and whose search for a free place begins at the same
one, may both take it; the log shows that, unless the one's sectors are all written over by the other. And a writer that
was held up between its two writes, and is shut out right after the second, is not told from one that made both in time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvmsupervisor.domain.lock import Lock, LockState
from tests.support.invariants import Debts, Epochs, Writers

SECTOR = 512
SLOTS = 63
TABLE_SECTOR = 64
REGION_SECTORS = 2048
REGION = REGION_SECTORS * SECTOR
IMAGE_SIZE = (1 + SLOTS) * REGION

MAGIC = b"CHS1"
OWNER_SIZE = 40
RECORD = struct.Struct(f"<4s4x{OWNER_SIZE}s{OWNER_SIZE}sIIII24x")
OWNER_AT, PREVIOUS_OWNER_AT, SEQUENCE_AT, PREVIOUS_AT, UPTIME_AT, INDEX_AT = 8, 48, 88, 92, 96, 100

TICKS_PER_S = 1193182 / 65536
"""Of the BIOS's clock: the PC's timer, divided by as much as it can be."""

SIGHT = 3
"""How many examples a violation shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record.

    Attributes:
        owner: the incarnation that wrote it.
        sequence: its own, one more than that of `previous`.
        previous: sequence of the newest record that was found on the disk before it was written; 0 for none.
        previous_owner: who wrote that; empty for none.
        uptime_s: of the guest.
        index: which of its writer's own records it is, from 0 on.
    """

    owner: str
    sequence: int
    previous: int
    previous_owner: str
    uptime_s: float = 0.0
    index: int = 0

    def to_bytes(self) -> bytes:
        """As it lies on the disk."""
        owners = (self.owner.encode(), self.previous_owner.encode())
        ticks = round(self.uptime_s * TICKS_PER_S)
        return RECORD.pack(MAGIC, *owners, self.sequence, self.previous, ticks, self.index)

    @classmethod
    def from_bytes(cls, data: bytes) -> Record | None:
        """None where there is none."""
        if len(data) < RECORD.size or not data.startswith(MAGIC):
            return None
        _, owner, previous_owner, sequence, previous, ticks, index = RECORD.unpack_from(data)
        return cls(
            owner=_text(owner),
            sequence=sequence,
            previous=previous,
            previous_owner=_text(previous_owner),
            uptime_s=ticks / TICKS_PER_S,
            index=index,
        )

    def __str__(self) -> str:
        return f"{self.sequence} of {self.owner}"


def _text(owner: bytes) -> str:
    return owner.rstrip(b"\0").decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Head:
    """The table as it was at one instant: the newest record of each slot that is taken."""

    slots: Mapping[int, Record]

    @property
    def newest(self) -> Record | None:
        """The record with the highest sequence; None while nothing was written."""
        return max(self.slots.values(), key=lambda record: record.sequence, default=None)

    @property
    def owner(self) -> str:
        """Of the newest record; empty while nothing was written."""
        return self.newest.owner if self.newest else ""

    @property
    def sequence(self) -> int:
        """Of the newest record; 0 while nothing was written."""
        return self.newest.sequence if self.newest else 0

    @property
    def owners(self) -> frozenset[str]:
        """All who ever wrote."""
        return frozenset(record.owner for record in self.slots.values())


def parse_table(table: bytes) -> Head:
    """Read the table: the sectors from `TABLE_SECTOR` on, as many as were ever written."""
    found = ((slot, Record.from_bytes(table[slot * SECTOR :][: RECORD.size])) for slot in range(SLOTS))
    return Head({slot: record for slot, record in found if record is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """All records of one disk.

    Attributes:
        records: in order of their sequences.
        shared: slots in which more than one owner wrote, with their owners.
    """

    records: tuple[Record, ...] = ()
    shared: Mapping[int, frozenset[str]] = field(default_factory=dict)

    @property
    def owners(self) -> tuple[str, ...]:
        """Who wrote, each once, in order of their first records."""
        return tuple(dict.fromkeys(record.owner for record in self.records))


Read = Callable[[int, int], bytes]
"""Reads an offset and a length of a disk; shorter than that, or empty, where nothing was ever written."""


def parse(image: bytes | Read) -> Journal:
    """Read all records. The table before the logs: so a disk may be read while a guest writes."""
    read: Read = (lambda offset, length: image[offset : offset + length]) if isinstance(image, bytes) else image
    found: set[Record] = set()
    shared = {}
    for slot, head in parse_table(read(TABLE_SECTOR * SECTOR, SLOTS * SECTOR)).slots.items():
        log = read((1 + slot) * REGION, REGION)
        records = {head, *_in_log(log)}
        owners = frozenset(record.owner for record in records)
        if len(owners) > 1:
            shared[slot] = owners
        found |= records
    return Journal(records=tuple(sorted(found, key=lambda r: (r.sequence, r.owner, r.index))), shared=shared)


def _in_log(log: bytes) -> Iterator[Record]:
    # To its end, whatever lies between: a hole is told by the chain.
    for offset in range(0, len(log), RECORD.size):
        record = Record.from_bytes(log[offset : offset + RECORD.size])
        if record is not None:
            yield record


# --- the judge ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What else was seen while the disk was written to. Instants are seconds of the test's CLOCK_BOOTTIME.

    Attributes:
        locks: every value of the instance's lock in order of etcd's revisions; None where the key was deleted.
        listed: when each address was first seen on Ceph's blocklist.
        written: when the first record of each owner was first seen on the disk. Whoever looks at the disk, then at the
            blocklist, and gives both one instant, sees nothing too late that was in time.
        closed: when each owner was known to have ended in order, and to have left nothing: its process exited with
            status 0 and Ceph names its client no more. A release of the lock needs not be told here.
    """

    locks: Sequence[Lock | None] = ()
    listed: Mapping[str, float] = field(default_factory=dict)
    written: Mapping[str, float] = field(default_factory=dict)
    closed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Violation:
    """A law that was broken.

    Attributes:
        law: its name, one of those in `LAWS`.
        text: what was found, for people.
    """

    law: str
    text: str

    def __str__(self) -> str:
        return f"{self.law}: {self.text}"


LAWS = ("known", "epoch", "chain", "slot", "lock", "recorded", "fenced")


def check(journal: Journal, history: History) -> list[Violation]:
    """Hold what is on the disk against the laws; an empty list when all hold.

    - known: each owner was named by the lock.
    - epoch: no record of a lower epoch comes after one of a higher.
    - chain: each record's sequence follows that of the previous one, which is on the disk, and no two follow one.
    - slot: no two owners wrote to one slot.
    - lock: epochs only grow, and one incarnation has one.
    - recorded: who wrote had a lock that was `running` and named its client (law 3).
    - fenced: each address on record of an earlier epoch, of one that did not end in order, was on the blocklist before
      the first record of a later one.
    """
    laws = (_known, _epochs, _chain, _slots, _lock, _recorded, _fenced)
    return [Violation(law, text) for law, judge in zip(LAWS, laws, strict=True) for text in judge(journal, history)]


def _epoch_of(history: History) -> dict[str, int]:
    return {lock.incarnation: lock.epoch for lock in history.locks if lock is not None}


def _known(journal: Journal, history: History) -> Iterator[str]:
    known = _epoch_of(history)
    for owner in journal.owners:
        if owner not in known:
            records = [record for record in journal.records if record.owner == owner]
            yield f"no lock ever named {owner}, which wrote {_few(records)}"


def _epochs(journal: Journal, history: History) -> Iterator[str]:
    epoch_of = _epoch_of(history)
    late: dict[tuple[str, str], list[Record]] = {}
    writers = Writers()
    for record in journal.records:
        epoch = epoch_of.get(record.owner)
        if epoch is None:
            continue
        # Which of two with one sequence came first is not known.
        later = writers.wrote("its disk", record.owner, rank=epoch, at=record.sequence)
        if later is not None:
            late.setdefault((record.owner, later), []).append(record)
    for (owner, later), found in late.items():
        told = f"{later} (epoch {epoch_of[later]})"
        yield f"{owner} (epoch {epoch_of[owner]}) wrote after {told} had written: {_few(found)}"


def _chain(journal: Journal, history: History) -> Iterator[str]:
    by_sequence: dict[int, list[Record]] = {}
    for record in journal.records:
        by_sequence.setdefault(record.sequence, []).append(record)
    yield from _forks(by_sequence)
    expected = 1
    for sequence, found in by_sequence.items():
        if sequence != expected:
            missing = str(expected) if sequence == expected + 1 else f"{expected} to {sequence - 1}"
            yield f"no record {missing} is there, and there is {_few(found)}"
        expected = sequence + 1
    for record in journal.records:
        before = {one.owner for one in by_sequence.get(record.previous, ())} if record.previous else {""}
        if record.previous != record.sequence - 1:
            yield f"record {record} says that it follows {record.previous}"
        elif before and record.previous_owner not in before:
            yield f"record {record} follows one of {record.previous_owner or 'nobody'}, and that is not there"


def _forks(by_sequence: Mapping[int, Sequence[Record]]) -> Iterator[str]:
    forks: dict[tuple[str, ...], list[int]] = {}
    for sequence, found in by_sequence.items():
        if len(found) > 1:
            forks.setdefault(tuple(record.owner for record in found), []).append(sequence)
    for owners, at in forks.items():
        yield f"{' and '.join(owners)} wrote as if the other were not there, {len(at)} times, first record {at[0]}"


def _slots(journal: Journal, history: History) -> Iterator[str]:
    for slot, owners in journal.shared.items():
        yield f"{' and '.join(sorted(owners))} wrote to one slot, {slot}"


def _lock(journal: Journal, history: History) -> Iterator[str]:
    epochs = Epochs()
    for lock in history.locks:
        if lock is not None:
            yield from epochs.saw(lock)


def _recorded(journal: Journal, history: History) -> Iterator[str]:
    running = {lock.incarnation for lock in history.locks if lock and lock.state is LockState.RUNNING and lock.clients}
    for owner in journal.owners:
        if owner not in running and owner in _epoch_of(history):
            yield f"{owner} wrote, and no lock says that it was running, with the address of its client"


def _fenced(journal: Journal, history: History) -> Iterator[str]:
    """Each owner that wrote, and what had to be shut out before it did.

    What a lock has on record is owed until its end in order: it was released (the process is proven gone then), or it
    is in `closed`. An address once owed and not closed is owed before every later owner's first record.
    """
    writers = set(journal.owners)
    debts = Debts()
    seen: set[str] = set()
    for lock in history.locks:
        debts.saw(lock)
        if lock is not None and lock.incarnation in writers and lock.incarnation not in seen:
            seen.add(lock.incarnation)
            yield from _not_fenced(lock.incarnation, debts.before(lock.incarnation), history)


def _not_fenced(owner: str, owed: Mapping[str, str], history: History) -> Iterator[str]:
    first = history.written.get(owner)
    if first is None:
        if owed:
            yield f"nobody saw when the first record of {owner} came: was {', '.join(owed)} shut out before?"
        return
    for address, whose in owed.items():
        if history.closed.get(whose, first) < first:
            continue
        listed = history.listed.get(address)
        if listed is None:
            yield f"{address} of {whose} was never on the blocklist, and {owner} wrote"
        elif listed > first:
            yield f"{address} of {whose} was on the blocklist {listed - first:.2f} s after {owner} had written"


def _few(records: Sequence[Record] | Iterable[Record]) -> str:
    listed = list(records)
    more = f" and {len(listed) - SIGHT} more" if len(listed) > SIGHT else ""
    return "record " + ", ".join(str(record) for record in listed[:SIGHT]) + more
