"""The lock's value: read back as it was written, never misread, its epoch growing by one."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.handover import announced, arrived, called_off
from kvmsupervisor.domain.handover import given as given_away
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import (
    ANOTHER_HISTORY,
    MOVING,
    VERSION,
    Change,
    Claim,
    Compared,
    Destination,
    Lock,
    LockState,
    LockView,
    Names,
    Storage,
    Writer,
    take,
)

ME, OTHER = HostName("a"), HostName("b")
LOCK = Lock(host=ME, boot_id="boot-1", epoch=3, state=LockState.RUNNING, incarnation="x", pid=42, starttime=9)

_texts = st.text(max_size=20)
_addresses = st.lists(_texts, max_size=4).map(tuple)
_numbers = st.none() | st.integers(1, 2**31 - 1)
_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", fullmatch=True)
_plain = st.builds(
    Lock,
    host=_texts.map(HostName),
    boot_id=_texts,
    epoch=st.integers(1, 2**63 - 1),
    state=st.sampled_from([state for state in LockState if state not in MOVING]),
    incarnation=_names,
    pid=_numbers,
    starttime=_numbers,
    clients=_addresses,
    fence=_addresses,
    storage=st.sampled_from(Storage),
)
_waiting = st.builds(
    Destination, host=_texts.map(HostName), boot_id=_texts, incarnation=_names, pid=st.integers(1),
    starttime=st.integers(1), clients=_addresses,
)  # fmt: skip
locks = (
    _plain
    | st.builds(announced, _plain, _waiting)
    | st.builds(announced, _plain, _waiting).map(lambda lock: given_away(lock, paused=True, mark=""))
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)


@given(locks)
def test_a_lock_is_read_as_it_was_written(lock: Lock) -> None:
    """Law: the value survives etcd."""
    assert Lock.from_json(lock.to_json()) == lock


@given(st.binary(max_size=200) | _json.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_no_lock_is_none(data: bytes) -> None:
    """Law: any bytes are read without an error; what is no lock is not taken for one."""
    assert Lock.from_json(data) is None


@given(locks, st.sampled_from(sorted(asdict(LOCK))), _json)
def test_a_field_of_another_type_spoils_the_lock(lock: Lock, name: str, value: object) -> None:
    """Law: a lock that is read has every field in its own type, so that nobody stumbles over it later."""
    found = Lock.from_json(json.dumps({**json.loads(lock.to_json()), name: value}).encode())
    if found is not None:
        assert Lock.from_json(found.to_json()) == found
        assert [type(each) for each in (found.host, found.boot_id, found.incarnation)] == [str] * 3
        assert type(found.epoch) is int
        assert all(each is None or type(each) is int for each in (found.pid, found.starttime))
        assert all(type(each) is str for each in (*found.clients, *found.fence))


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000])
def test_deep_and_long_values_are_none(data: bytes) -> None:
    """Law: no value hurts its reader, however it was made up."""
    assert Lock.from_json(data) is None


@pytest.mark.parametrize("name", ["host", "boot_id", "epoch", "state", "incarnation"])
def test_a_lock_without_a_needed_field_is_none(name: str) -> None:
    """Law: half a lock is none, and counts as held."""
    value = json.loads(LOCK.to_json())
    del value[name]
    assert Lock.from_json(json.dumps(value).encode()) is None


def test_a_value_is_parsed_once_unless_it_is_long() -> None:
    """What anybody writes is not kept in memory for its length."""
    value = LOCK.to_json()
    assert Lock.from_json(value) is Lock.from_json(value)
    long = value + b" " * 5000
    assert Lock.from_json(long) == Lock.from_json(value)
    assert Lock.from_json(long) is not Lock.from_json(long)


def test_a_newer_lock_is_left_alone_and_new_fields_are_passed_over() -> None:
    """Law: another version is a stranger's; a field that this release does not know changes nothing."""
    value = json.loads(LOCK.to_json())
    assert Lock.from_json(json.dumps({**value, "version": VERSION + 1}).encode()) is None
    assert Lock.from_json(json.dumps({**value, "mood": "good"}).encode()) == LOCK


def test_a_lock_without_storage_counts_as_unfenceable() -> None:
    """Law: what is not known to be harmless needs an operator's word."""
    value = json.loads(LOCK.to_json())
    del value["storage"]
    found = Lock.from_json(json.dumps(value).encode())
    assert found is not None
    assert found.storage is Storage.UNFENCEABLE


def taken(previous: Lock | None, floor: int = 0) -> Lock:
    return take(
        previous,
        host=ME,
        boot_id="boot-2",
        facts="/kvmsupervisor",
        incarnation="y",
        storage=Storage.RBD,
        epoch_floor=floor,
    )


@given(st.none() | locks, st.integers(0, 2**40))
def test_taking_grows_the_epoch_by_one(previous: Lock | None, floor: int) -> None:
    """Law 2: the epoch grows by one with each incarnation, also over a lock that was deleted by hand."""
    last = max(previous.epoch if previous else 0, floor)
    assert taken(previous, floor).epoch == last + 1


@given(locks)
def test_no_address_is_forgotten_before_it_is_fenced(previous: Lock) -> None:
    """Law 4: every address that was ever recorded and not proven dead is to be fenced, each once."""
    lock = taken(previous)
    assert set(lock.fence) == {*previous.fence, *previous.living}
    assert len(lock.fence) == len(set(lock.fence))
    fences = lock.fence or lock.taken_from is not None
    assert lock.state is (LockState.FENCING if fences else LockState.STARTING)
    assert (lock.pid, lock.starttime, lock.clients) == (None, None, ())


@given(st.lists(st.sampled_from([(), ("a",), ("b", "c")]), max_size=6))
def test_a_row_of_incarnations_keeps_all_addresses(clients: list[tuple[str, ...]]) -> None:
    """Law 4: taking again before the fencing was done loses no address; epochs have no gap."""
    lock: Lock | None = None
    for number, addresses in enumerate(clients, start=1):
        lock = replace(taken(lock), clients=addresses)
        assert lock.epoch == number
    assert set(taken(lock).fence) == {address for addresses in clients for address in addresses}


ANY = [*LockState, None]
TO = Destination(host=OTHER, boot_id="boot-2", incarnation="q", pid=7, starttime=8)
IN_STATE = {state: state and replace(LOCK, state=state, fence=()) for state in ANY}
IN_STATE[LockState.MIGRATING] = announced(LOCK, TO)
LIVING = Incarnation(
    instance="1", incarnation="x", epoch=9, boot_id="boot-1", argv=(), spec={}, storage=Storage.RBD, accelerator="tcg",
    restart_request=None, revision=1, log_offset=0, spawned_at=1.0, pid=42, starttime=9,
).as_lock(ME, facts="/kvmsupervisor", ran=True)  # fmt: skip


def written(change: Change, before: Lock | None) -> list[Lock | None]:  # noqa: C901, PLR0912 - a table
    """Every value that the code writes with this change over `before`, where `before` is what the change is for."""
    match change:
        case Change.TAKE | Change.TAKE_OVER:
            return [taken(before), taken(before and replace(before, storage=Storage.NONE))]
        case Change.REASSERT:
            return [LIVING]
        case Change.RELEASE:
            return [None]
    if before is None:
        return []
    match change:
        case Change.FENCE:
            return [before.fenced(["c"])]
        case Change.ENLIST:
            return [replace(before, fence=(*before.fence, "c"))]
        case Change.RECORD:
            return [before.recorded(pid=1, starttime=2, clients=("c",))]
        case Change.RENAME:
            return [replace(before, host=OTHER)]
        case Change.BREAK:
            return [before.broken()]
        case Change.ANNOUNCE:
            return [announced(before, TO)]
        case Change.ARRIVE:
            return [arrived(before)]
    moving = before if before.to is not None else replace(before, to=TO)
    match change:
        case Change.CALL_OFF:
            return [called_off(moving)]
        case Change.GIVE:
            return [given_away(moving, paused=False, mark="")]
    raise AssertionError(change)


@pytest.mark.parametrize("change", Change)
def test_a_change_leads_where_the_table_says(change: Change) -> None:
    """Law 2: from each state that a row names the code's value is allowed; from each other one nothing is."""
    row, reached = change.value, set()
    for state, before in IN_STATE.items():
        for after in written(change, before):
            assert change.allows(before, after) is (state in row.before), (state, after)
            if state in row.before:
                reached.add(after and after.state)
    assert reached == row.after


@pytest.mark.parametrize("change", Change)
def test_a_change_leads_nowhere_else(change: Change) -> None:
    """Law 2: a state that the row does not name is never written, nor another incarnation's value."""
    for before, after in itertools.product(IN_STATE.values(), IN_STATE.values()):
        if (after and after.state) not in change.value.after:
            assert not change.allows(before, after)
        if before is not None and after is not None and change.value.names is Names.SAME:
            assert not change.allows(before, replace(after, incarnation="y"))
            assert not change.allows(before, replace(after, epoch=before.epoch + 1))
        if before is not None and after is not None and change.value.names in {Names.NEW, Names.LIVING}:
            assert not change.allows(before, replace(after, epoch=before.epoch))
            assert not change.allows(before, replace(after, epoch=before.epoch - 1))


def test_a_renamed_lock_keeps_its_state() -> None:
    """Law 12: another name is no step on the way to `cont`."""
    assert not Change.RENAME.allows(IN_STATE[LockState.STARTING], IN_STATE[LockState.RUNNING])


def test_what_is_not_fenced_is_not_released() -> None:
    """Law 4: a broken lock with addresses in `fence` is not let go of."""
    assert Change.RELEASE.allows(LOCK.broken(), None)
    assert not Change.RELEASE.allows(replace(LOCK, fence=("a",)).broken(), None)


def test_what_each_change_compares() -> None:
    """Laws 2, 4, 7 and 9: always the lock; session and `host` up to `cont`; the holder's session where it is robbed."""
    row = {change: set(change.value.compares) for change in Change}
    assert all(Compared.LOCK in compares for compares in row.values())
    moves = {Change.ANNOUNCE, Change.GIVE}
    to_cont = {Change.TAKE, Change.TAKE_OVER, Change.FENCE, Change.RECORD, *moves}
    assert {change for change in Change if Compared.TARGET in row[change]} == moves
    assert {change for change in Change if Compared.GROUND in row[change]} == to_cont
    assert {change for change in Change if Compared.SESSION in row[change]} == {
        *to_cont,
        Change.ARRIVE,
        Change.ENLIST,
        Change.REASSERT,
        Change.RENAME,
    }
    assert {change for change in Change if Compared.HOLDER_GONE in row[change]} == {Change.TAKE_OVER, Change.BREAK}
    assert {change for change in Change if change.value.writer is Writer.OPERATOR} == {Change.BREAK}
    assert {change for change in Change if change.value.writer is Writer.RUNNER} == {Change.TAKE, Change.TAKE_OVER}


def test_what_closed_its_disks_is_not_fenced() -> None:
    """Law 4: an end in order leaves nothing to fence but what was to be fenced before it."""
    previous = replace(LOCK, clients=("c",), fence=("f",))
    again = take(
        previous, host=ME, boot_id="boot-1", facts="/kvmsupervisor", incarnation="y", storage=Storage.RBD, closed=True
    )
    assert again.fence == ("f",)


def test_in_another_history_a_free_lock_is_doubted() -> None:
    """Law 11: others may have its disks open, until its own guest may run."""
    lock = take(
        None, host=ME, boot_id="boot-1", facts="/kvmsupervisor", incarnation="y", storage=Storage.RBD, doubted=True
    )
    assert (lock.taken_from, lock.state) == (ANOTHER_HISTORY, LockState.FENCING)
    assert lock.fenced([]).taken_from == ANOTHER_HISTORY
    assert lock.fenced([]).recorded(pid=1, starttime=2, clients=("c",)).taken_from is None


def test_a_taker_without_disks_forgets_nobody() -> None:
    """Law 4: which host may still have the disks open is known to the next taker, too, on another boot as well."""
    robbed = taken(replace(LOCK, host=OTHER, storage=Storage.RBD))
    diskless = replace(robbed, storage=Storage.NONE)
    again = take(diskless, host=ME, boot_id="boot-3", facts="/kvmsupervisor", incarnation="z", storage=Storage.RBD)
    assert (robbed.taken_from, again.taken_from, again.state) == (OTHER, OTHER, LockState.FENCING)


def test_recorded_is_what_lets_a_guest_run() -> None:
    """Law 3: pid and addresses in one value, with the state that says so."""
    lock = taken(LOCK).recorded(pid=7, starttime=8, clients=("c",))
    assert (lock.state, lock.pid, lock.starttime, lock.clients) == (LockState.RUNNING, 7, 8, ("c",))
    assert (lock.epoch, lock.incarnation) == (4, "y")


@pytest.mark.parametrize(
    ("view", "incarnation", "claim"),
    [
        (LockView(), "x", Claim.UNKNOWN),
        (LockView(known=True), "x", Claim.ABSENT),
        (LockView(known=True, data=LOCK.to_json()), "x", Claim.MINE),
        (LockView(known=True, data=LOCK.to_json()), "y", Claim.LEFTOVER),
        (LockView(known=True, data=LOCK.to_json()), None, Claim.LEFTOVER),
        (LockView(known=True, data=replace(LOCK, host=OTHER).to_json()), "y", Claim.STRANGER),
        (LockView(known=True, data=replace(LOCK, host=OTHER).to_json()), None, Claim.STRANGER),
        (LockView(known=True, data=replace(LOCK, host=OTHER).to_json()), "x", Claim.RENAMED),
        (LockView(known=True, data=replace(LOCK, host=OTHER, boot_id="z").to_json()), "x", Claim.STRANGER),
        (LockView(known=True, data=b"?"), "x", Claim.UNREADABLE),
        (LockView(known=True, data=b""), "x", Claim.UNREADABLE),
    ],
)
def test_what_a_value_means_to_one_host(view: LockView, incarnation: str | None, claim: Claim) -> None:
    """Laws 2 and 12: our incarnation, on our boot, is ours under whatever name; what cannot be read is nobody's."""
    assert view.claim(host=ME, boot_id=LOCK.boot_id, facts="/kvmsupervisor", incarnation=incarnation) is claim


@pytest.mark.parametrize(
    ("boot_id", "theirs", "ours", "claim"),
    [
        ("z", "first", "second", Claim.STRANGER),
        ("z", "first", "first", Claim.LEFTOVER),
        (LOCK.boot_id, "first", "second", Claim.LEFTOVER),
        ("z", None, "second", Claim.LEFTOVER),
        ("z", "first", "", Claim.LEFTOVER),
    ],
)
def test_another_machine_under_our_name(boot_id: str, theirs: str | None, ours: str, claim: Claim) -> None:
    """Law 12: a name proves no process gone; this machine's own reboot does, and what is not known counts as that."""
    view = LockView(known=True, data=replace(LOCK, machine=theirs).to_json())
    assert view.claim(host=ME, boot_id=boot_id, facts="/kvmsupervisor", incarnation="y", machine=ours) is claim


def test_what_was_buried_under_another_name_is_a_leftover() -> None:
    """Law 12: the lock of our own dead process is ours to release, under whatever name it was taken."""
    former = replace(LOCK, host=OTHER)
    view = LockView(known=True, data=former.to_json())
    assert (
        view.claim(host=ME, boot_id=LOCK.boot_id, facts="/kvmsupervisor", incarnation=None, last_ended="x")
        is Claim.LEFTOVER
    )
    assert (
        view.claim(host=ME, boot_id=LOCK.boot_id, facts="/kvmsupervisor", incarnation="planned", last_ended="x")
        is Claim.LEFTOVER
    )
    assert (
        view.claim(host=ME, boot_id=LOCK.boot_id, facts="/kvmsupervisor", incarnation=None, last_ended="y")
        is Claim.STRANGER
    )
    assert view.claim(host=ME, boot_id="z", facts="/kvmsupervisor", incarnation=None, last_ended="x") is Claim.STRANGER
