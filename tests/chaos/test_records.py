"""The judge of the chaos tests: each law is broken by hand once, and two writers are found whatever they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState
from tests.chaos.records import (
    IMAGE_SIZE,
    LAWS,
    RECORD,
    REGION,
    SECTOR,
    SLOTS,
    TABLE_SECTOR,
    Head,
    History,
    Journal,
    Record,
    check,
    parse,
    parse_table,
)

A, B, C = "a" * 36, "b" * 36, "c" * 36
"""Owners, in order of their epochs."""

ADDRESS = {A: "127.0.0.1:0/1", B: "127.0.0.1:0/2", C: "127.0.0.1:0/3"}
EPOCH = {A: 1, B: 2, C: 3}


def chain(*owners: str) -> tuple[Record, ...]:
    """Records of these owners, one after the other, in order."""
    return tuple(
        Record(
            owner=owner,
            sequence=number,
            previous=number - 1,
            previous_owner=owners[number - 2] if number > 1 else "",
            index=owners[: number - 1].count(owner),
        )
        for number, owner in enumerate(owners, 1)
    )


def locks_of(owner: str, *, fence: tuple[str, ...] = (), state: LockState = LockState.RUNNING) -> Iterator[Lock]:
    """The values of one incarnation, up to that state."""
    lock = Lock(
        host=HostName("alpha"),
        boot_id="boot",
        epoch=EPOCH[owner],
        state=LockState.FENCING if fence else LockState.STARTING,
        incarnation=owner,
        fence=fence,
    )
    yield lock
    if fence:
        lock = lock.fenced(fence)
        yield lock
    if state is LockState.RUNNING:
        yield lock.recorded(pid=1, starttime=1, clients=(ADDRESS[owner],))


THREE = Journal(records=chain(A, A, B, B, B, C))
FENCED = History(
    locks=[*locks_of(A), *locks_of(B, fence=(ADDRESS[A],)), *locks_of(C, fence=(ADDRESS[A], ADDRESS[B]))],
    listed={ADDRESS[A]: 10.0, ADDRESS[B]: 20.0},
    written={A: 1.0, B: 11.0, C: 21.0},
)


def broken(journal: Journal, history: History = FENCED) -> list[str]:
    """The laws that do not hold."""
    return [violation.law for violation in check(journal, history)]


def changed(number: int, **changes: object) -> Journal:
    """`THREE` with one record changed."""
    records = list(THREE.records)
    records[number - 1] = replace(records[number - 1], **changes)  # type: ignore[arg-type]
    return Journal(records=tuple(records))


# --- the layout -----------------------------------------------------------------------------------------------


def image_of(*slots: tuple[int, list[Record], list[Record]]) -> bytes:
    """A disk: for each slot its number, its head if it has one, and its log."""
    disk = bytearray((1 + max(slot for slot, _, _ in slots) + 1) * REGION)
    for slot, heads, log in slots:
        for head in heads:
            at = (TABLE_SECTOR + slot) * SECTOR
            disk[at : at + RECORD.size] = head.to_bytes()
        for number, record in enumerate(log):
            at = (1 + slot) * REGION + number * RECORD.size
            disk[at : at + RECORD.size] = record.to_bytes()
    return bytes(disk)


def test_the_layout() -> None:
    """The table lies before the first log, and each log is one object of the image: 64 MiB in all."""
    assert (TABLE_SECTOR + SLOTS) * SECTOR <= REGION
    assert IMAGE_SIZE == 64 << 20
    assert SECTOR % RECORD.size == 0


def test_a_record_reads_as_it_was_written() -> None:
    """What the parser reads is what a writer wrote; zeros are no record."""
    record = Record(owner=A, sequence=7, previous=6, previous_owner=B, uptime_s=0.0, index=3)
    assert Record.from_bytes(record.to_bytes()) == record
    assert Record.from_bytes(bytes(RECORD.size)) is None
    assert Record.from_bytes(b"") is None
    late = Record.from_bytes(replace(record, uptime_s=60.0).to_bytes())
    assert late is not None
    assert late.uptime_s == pytest.approx(60.0, abs=0.1)


def test_parsing_a_disk() -> None:
    """All logs together, in order; a head that its writer did not come to put into its log counts, too."""
    one, two, three, four = chain(A, A, B, B)
    disk = image_of((5, [two], [one, two]), (0, [four], [three]))
    assert parse(disk) == Journal(records=(one, two, three, four))
    head = parse_table(disk[TABLE_SECTOR * SECTOR :])
    assert (head.owner, head.sequence, head.owners) == (B, 4, frozenset({A, B}))


def test_an_empty_disk() -> None:
    """Nothing was written: no records, no head, nothing to blame."""
    assert parse(b"") == Journal()
    assert (Head({}).owner, Head({}).sequence, Head({}).newest) == ("", 0, None)
    assert check(Journal(), History()) == []


def test_what_is_behind_a_hole_is_read() -> None:
    """A log with a hole is read to its end; the chain tells of the hole."""
    one, two, three = chain(A, A, A)
    disk = bytearray(image_of((0, [three], [one, two, three])))
    at = REGION + RECORD.size
    disk[at : at + RECORD.size] = bytes(RECORD.size)
    journal = parse(bytes(disk))
    assert journal.records == (one, three)
    assert broken(journal) == ["chain"]


# --- the laws -------------------------------------------------------------------------------------------------


def test_what_is_right() -> None:
    """Three owners, each fenced before the next one wrote: nothing to say."""
    assert broken(THREE) == []


BROKEN: Mapping[str, tuple[Journal, History]] = {
    "known": (THREE, replace(FENCED, locks=[*locks_of(A), *locks_of(B, fence=(ADDRESS[A],))])),
    "epoch": (Journal(records=chain(A, A, B, A, B, C)), FENCED),
    "chain": (Journal(records=THREE.records[:3] + THREE.records[4:]), FENCED),
    "slot": (replace(THREE, shared={4: frozenset({A, B})}), FENCED),
    "lock": (THREE, replace(FENCED, locks=[*FENCED.locks, *locks_of(B)])),
    "recorded": (
        THREE,
        replace(FENCED, locks=[one for one in FENCED.locks if one is None or one.incarnation != C or not one.clients]),
    ),
    "fenced": (THREE, replace(FENCED, listed={ADDRESS[A]: 10.0})),
}


def test_each_law_is_broken_somewhere() -> None:
    """None is without a history that breaks it."""
    assert tuple(BROKEN) == LAWS


@pytest.mark.parametrize("law", LAWS)
def test_a_broken_law(law: str) -> None:
    """Law: what breaks one law is told as a break of that law, in words that name who did it."""
    journal, history = BROKEN[law]
    found = check(journal, history)
    assert {violation.law for violation in found} == {law}
    assert any(owner in str(violation) for violation in found for owner in (A, B, C))


def test_a_gap_is_told_once() -> None:
    """Law: a record that is missing is named."""
    (gap,) = check(Journal(records=chain(A, A, A, A)[:1] + chain(A, A, A, A)[3:]), FENCED)
    assert "no record 2 to 3" in gap.text


def test_all_that_came_late_is_counted() -> None:
    """Law: every record of a lower epoch is late, not the first one alone."""
    late = [one for one in check(Journal(records=chain(A, B, A, A, A, A)), FENCED) if one.law == "epoch"]
    assert len(late) == 1
    assert "3 of a" in late[0].text
    assert "and 1 more" in late[0].text


@pytest.mark.parametrize("missing", [{"clients": ()}, {"state": LockState.STARTING}])
def test_a_guest_that_was_not_to_run(missing: Mapping[str, object]) -> None:
    """Law 3: who writes has its client on record, in a lock that says that it runs."""
    (first, last) = locks_of(A)
    history = History(locks=[first, replace(last, **missing)], written={A: 1.0})  # type: ignore[arg-type]
    assert broken(Journal(records=chain(A)), history) == ["recorded"]


@pytest.mark.parametrize(
    "journal",
    [
        pytest.param(changed(5, previous=3), id="another number"),
        pytest.param(changed(4, previous_owner=A), id="another owner"),
        pytest.param(changed(1, previous_owner=A), id="the first follows nobody"),
        pytest.param(Journal(records=THREE.records[1:]), id="the first is missing"),
    ],
)
def test_a_record_follows_what_is_not_there(journal: Journal) -> None:
    """Law: what a record says of the one before it is so."""
    assert broken(journal) == ["chain"]


def test_two_that_do_not_see_each_other() -> None:
    """Law: two records with one sequence are two writers, whichever of them is looked at first."""
    fork = [replace(record, owner=A) for record in THREE.records if record.owner == B]
    journal = Journal(
        records=tuple(sorted([*THREE.records, *fork], key=lambda record: (record.sequence, record.owner)))
    )
    forks = [violation for violation in check(journal, FENCED) if violation.law == "chain"]
    assert len(forks) == 1
    assert "3 times, first record 3" in forks[0].text


def test_which_of_two_came_first_is_not_known() -> None:
    """Law: of two records with one sequence none is said to have come after the other."""
    first, second = chain(A, B)
    for both in ((second, replace(second, owner=A)), (replace(second, owner=A), second)):
        assert broken(Journal(records=(first, *both))) == ["chain"]


def test_one_slot_for_two() -> None:
    """Law: a log in which two wrote is told of."""
    one, two = chain(A, B)
    assert "slot" in broken(parse(image_of((3, [two], [one, two]))))


def test_late_on_the_blocklist() -> None:
    """Law: an entry that comes after the first record is too late; one of the same look is in time."""
    (late,) = check(THREE, replace(FENCED, listed={**FENCED.listed, ADDRESS[B]: 21.5}))
    assert "0.50 s after" in late.text
    assert broken(THREE, replace(FENCED, listed={**FENCED.listed, ADDRESS[B]: 21.0})) == []


def test_what_was_owed_stays_owed() -> None:
    """Law: an earlier taker that never came to write, or to fence, does not make the debts of the one before go."""
    journal = Journal(records=chain(A, C))
    locks = [*locks_of(A), *list(locks_of(B, fence=(ADDRESS[A],)))[:1], *locks_of(C, fence=(ADDRESS[A],))]
    history = History(locks=locks, written={A: 1.0, C: 21.0})
    assert broken(journal, history) == ["fenced"]
    assert broken(journal, replace(history, listed={ADDRESS[A]: 20.0})) == []
    # Nor does a lock that does not tell of it any more.
    forgot = [*locks_of(A), *locks_of(C)]
    assert broken(journal, replace(history, locks=forgot)) == ["fenced"]


def test_what_was_found_to_fence() -> None:
    """Law: whatever a lock names to be fenced is, though nobody saw whose it was."""
    locks = list(locks_of(B, fence=(ADDRESS[A],)))
    history = History(locks=locks, written={B: 1.0})
    assert broken(Journal(records=chain(B)), history) == ["fenced"]


def test_who_ended_in_order_owes_nothing() -> None:
    """Law: a lock that was released, or an owner known to be gone for good before the next one wrote, need no fence."""
    journal = Journal(records=chain(A, A, B))
    locks = [*locks_of(A), *locks_of(B)]
    history = History(locks=locks, written={A: 1.0, B: 5.0})
    assert broken(journal, history) == ["fenced"]
    assert broken(journal, replace(history, closed={A: 4.0})) == []
    assert broken(journal, replace(history, closed={A: 6.0})) == ["fenced"]
    assert broken(journal, replace(history, locks=[*locks_of(A), None, *locks_of(B)])) == []


def test_a_lock_that_its_holder_wrote_again() -> None:
    """Law: a lock that was deleted while its holder lived and wrote it again is no end in order."""
    (*_, running) = locks_of(A)
    journal = Journal(records=chain(A, A, B))
    history = History(locks=[*locks_of(A), None, running, *locks_of(B)], written={A: 1.0, B: 5.0})
    assert broken(journal, history) == ["fenced"]


def test_an_operators_word() -> None:
    """Law 7: a broken lock keeps what there is to fence, unless the operator says that it is gone for good."""
    (*_, running) = locks_of(A)
    journal = Journal(records=chain(A, B))
    kept = History(locks=[*locks_of(A), running.broken(), *locks_of(B)], written={A: 1.0, B: 5.0})
    assert broken(journal, kept) == ["fenced"]
    (taken, *_) = locks_of(B, fence=(ADDRESS[A],))
    midway = replace(kept, locks=[*locks_of(A), taken.broken(), *locks_of(C)], written={A: 1.0, C: 5.0})
    assert broken(Journal(records=chain(A, C)), midway) == ["fenced"]
    gone = replace(kept, locks=[*locks_of(A), running.broken(forget_clients=True), *locks_of(B)])
    assert broken(journal, gone) == []


def test_nobody_looked() -> None:
    """Law: without the instant of a first record nothing is said to be in order."""
    assert broken(THREE, replace(FENCED, written={A: 1.0, B: 11.0})) == ["fenced"]


def test_one_incarnation_with_two_epochs() -> None:
    """Law 2: an incarnation has one epoch, and an epoch one incarnation."""
    (one, *_) = locks_of(A)
    assert broken(Journal(), History(locks=[one, replace(one, epoch=2)])) == ["lock"]
    assert broken(Journal(), History(locks=[one, replace(one, incarnation=B)])) == ["lock"]


# --- two writers ----------------------------------------------------------------------------------------------


class Writer:
    """`writer.S` in small: each step is one access to the disk.

    Args:
        disk: what has been written, by offset.
    """

    def __init__(self, disk: dict[int, bytes], owner: str) -> None:
        self.owner = owner
        self.did: list[str] = []
        self._disk = disk
        self._steps = self._run()

    def step(self) -> str:
        """One access to the disk; its name."""
        return next(self._steps)

    def _head(self) -> Head:
        table = b"".join(
            self._disk.get((TABLE_SECTOR + slot) * SECTOR, b"").ljust(SECTOR, b"\0") for slot in range(SLOTS)
        )
        return parse_table(table)

    def _run(self) -> Iterator[str]:
        slot = min(set(range(SLOTS)) - set(self._head().slots))
        # Two that start at once and choose the same place are the one hole; here each takes its own.
        slot += ord(self.owner[0]) - ord("a")
        index = 0
        while True:
            head = self._head()
            yield "read"
            record = Record(
                owner=self.owner,
                sequence=head.sequence + 1,
                previous=head.sequence,
                previous_owner=head.owner,
                index=index,
            )
            self._disk[(TABLE_SECTOR + slot) * SECTOR] = record.to_bytes()
            yield "head"
            self._disk[(1 + slot) * REGION + index * RECORD.size] = record.to_bytes()
            yield "log"
            index += 1


def journal_of(disk: Mapping[int, bytes]) -> Journal:
    def read(offset: int, length: int) -> bytes:
        found = bytearray(min(length, max(SLOTS * SECTOR, 64 * RECORD.size)))
        for at, data in disk.items():
            if offset <= at < offset + len(found):
                found[at - offset : at - offset + len(data)] = data
        return bytes(found)

    return parse(read)


IN_ORDER = replace(FENCED, closed={A: 0.0})


@given(st.lists(st.sampled_from([A, B]), max_size=40), st.integers(0, 9))
def test_two_writers_are_noticed(turns: list[str], alone: int) -> None:
    """Law: if the earlier owner's record comes after the later one has looked, and both write, that is noticed.

    And only then: an owner that was killed between any two of its writes leaves a clean disk.
    """
    disk: dict[int, bytes] = {}
    writers = {owner: Writer(disk, owner) for owner in (A, B)}
    done = [(owner, writers[owner].step()) for owner in [A] * alone + turns]
    began = done.index((B, "read")) if (B, "read") in done else len(done)
    stale = (A, "head") in done[began:]
    both = stale and (B, "head") in done
    found = check(journal_of(disk), IN_ORDER)
    assert bool(found) == both, (done, [str(violation) for violation in found])
    if both:
        assert {violation.law for violation in found} <= {"epoch", "chain"}


@given(st.lists(st.integers(0, 12), min_size=3, max_size=3))
def test_one_after_the_other(steps: list[int]) -> None:
    """Law: three owners in turn, each cut off anywhere, leave a clean disk."""
    disk: dict[int, bytes] = {}
    for owner, count in zip((A, B, C), steps, strict=True):
        writer = Writer(disk, owner)
        for _ in range(count):
            writer.step()
    assert broken(journal_of(disk)) == []
