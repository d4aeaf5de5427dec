"""Keys by instance: nothing below the prefix can hurt anything, and changes are told exactly."""

from __future__ import annotations

from collections.abc import Iterable, Set

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.grouping import Entry, Flat, Groups
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.parse_keys import VALUE_LIMIT
from kvmsupervisor.domain.spec import RawValue

Write = tuple[bytes, bytes, int]


def fill(table: Groups, writes: Iterable[Write], *, fresh: bool = False) -> Set[InstanceId]:
    stage = table.begin(fresh=fresh)
    for key, value, revision in writes:
        stage.put(key, value, revision, revision, 0)
    return stage.commit()


def erase(table: Groups, *keys: bytes) -> Set[InstanceId]:
    stage = table.begin(fresh=False)
    for key in keys:
        stage.delete(key)
    return stage.commit()


def one(key: bytes, layout: Layout | None = None) -> Groups:
    table = Groups(layout or Layout())
    fill(table, [(key, b"x", 5)])
    return table


@pytest.mark.parametrize(
    ("key", "instance", "name"),
    [
        (b"/kvm/1/ram", "1", b"ram"),
        (b"/kvm/a/b/c", "a", b"b/c"),
        (b"/kvm/a/b/lock", "a", b"b/lock"),
        (b"/kvm/a/", "a", b""),
        (b"/kvm/a//", "a", b"/"),
        (b"/kvm/a/\xff\xfe", "a", b"\xff\xfe"),
        (b"/kvm/a/lock/", "a", b"lock/"),
        (b"/kvm/lock/ram", "lock", b"ram"),
        (b"/kvm/" + b"a" * 63 + b"/ram", "a" * 63, b"ram"),
    ],
)
def test_wish_keys_go_to_their_instance(key: bytes, instance: str, name: bytes) -> None:
    """All that follows the id's slash is the name, slashes and strange bytes included."""
    table = one(key)
    assert table.ids() == {instance}
    assert dict(table.keys_of(InstanceId(instance))) == {name: RawValue(b"x", 5)}
    assert table.lock_of(InstanceId(instance)) is None
    assert table.foreign() == {}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (b"/kvm/", "begin with /kvm/<id>/"),
        (b"/kvm/ram", "begin with /kvm/<id>/"),
        (b"/kvm//ram", "empty"),
        (b"/kvm//lock", "empty"),
        (b"/kvm/../ram", "'..' is no instance's id"),
        (b"/kvm/./lock", "'.' is no instance's id"),
        (b"/kvm/-a/ram", "'-a' is no instance's id"),
        (b"/kvm/a b/ram", "'a b'"),
        (b"/kvm/\xff/ram", r"xff"),
        (b"/kvm/\xd9\xa1/ram", "is no instance's id"),
        (b"/kvm/a\n/ram", "is no instance's id"),
        (b"/kvm/a\x00/ram", "is no instance's id"),
        (b"/kvm/" + b"a" * 64 + b"/ram", "at most 63"),
    ],
)
def test_keys_of_no_instance_are_set_aside_with_the_reason(key: bytes, reason: str) -> None:
    """They are nobody's wishes; their values are not kept."""
    table = one(key)
    assert table.ids() == set()
    assert list(table.foreign()) == [key]
    assert reason in table.foreign()[key]
    assert erase(table, key) == set()
    assert table.foreign() == {}


@pytest.mark.parametrize(
    ("template", "key"),
    [
        ("/kvm/%i/lock", b"/kvm/7/lock"),
        ("/kvm/%i/my/lock", b"/kvm/7/my/lock"),
        ("/kvm/locks/%i", b"/kvm/locks/7"),
        ("/locks/%i", b"/locks/7"),
        ("/kvm/%i", b"/kvm/7"),
    ],
)
def test_locks_are_told_apart_from_wishes(template: str, key: bytes) -> None:
    """Wherever the template puts them; a lock alone makes its instance known."""
    table = one(key, Layout(lock=template))
    assert table.ids() == {"7"}
    assert table.keys_of(InstanceId("7")) == {}
    assert table.lock_of(InstanceId("7")) == Entry(b"x", 5, 5, 0)
    assert erase(table, key) == {"7"}
    assert table.ids() == set()


def test_values_are_cut() -> None:
    """One byte more than the limit is kept, to tell that it was too long."""
    table = Groups(Layout())
    fill(table, [(b"/kvm/1/ram", b"x" * 2**20, 2), (b"/kvm/1/lock", b"x" * 2**20, 3), (b"/kvm/bad", b"x" * 2**20, 4)])
    lock = table.lock_of(InstanceId("1"))
    assert lock is not None
    assert len(table.keys_of(InstanceId("1"))[b"ram"].value) == len(lock.value) == VALUE_LIMIT + 1


def test_nothing_is_seen_before_the_commit_and_what_was_seen_stays() -> None:
    """A reader never sees half a batch, and may keep what it was given across an await."""
    table = one(b"/kvm/1/ram")
    before = table.keys_of(InstanceId("1"))
    stage = table.begin(fresh=False)
    stage.put(b"/kvm/1/host", b"h", 6, 6, 0)
    stage.delete(b"/kvm/1/ram")
    assert dict(table.keys_of(InstanceId("1"))) == {b"ram": RawValue(b"x", 5)}
    assert stage.commit() == {"1"}
    assert dict(table.keys_of(InstanceId("1"))) == {b"host": RawValue(b"h", 6)}
    assert dict(before) == {b"ram": RawValue(b"x", 5)}


def test_a_new_list_tells_exactly_what_differs() -> None:
    """Rewritten, added, gone, lock gone, instance gone: named. Unchanged: not named, and not copied."""
    table = Groups(Layout())
    fill(table, [(f"/kvm/{i}/{name}".encode(), b"x", 2) for i in range(8) for name in ("ram", "host", "lock")])
    kept = table.keys_of(InstanceId("0"))[b"ram"]
    now: dict[bytes, tuple[bytes, int]] = {
        f"/kvm/{i}/{name}".encode(): (b"x", 2) for i in range(7) for name in ("ram", "host", "lock")
    }
    now[b"/kvm/1/ram"] = (b"x", 9)  # Rewritten with the same value.
    now[b"/kvm/2/mac"] = (b"m", 9)
    del now[b"/kvm/3/ram"]
    del now[b"/kvm/4/lock"]
    now[b"/kvm/5/ram"] = (b"y", 2)  # Another value under the same revision: a restored store.
    now[b"/kvm/6/lock"] = (b"x", 9)
    assert fill(table, [(k, v, r) for k, (v, r) in now.items()], fresh=True) == {"1", "2", "3", "4", "5", "6", "7"}
    assert table.keys_of(InstanceId("0"))[b"ram"] is kept
    assert fill(table, [(k, v, r) for k, (v, r) in now.items()], fresh=True) == set()


def test_who_names_a_host_is_found() -> None:
    """By the key `host`, white space aside, or by the name's place in the lock; by no other key, and no part of one."""
    table = Groups(Layout())
    values = {
        "1/host": b"a",
        "2/host": b" a\n",
        "3/host": b"ab",
        "4/lock": b'{"host":"a"}',
        "5/ram": b"a",
        "6/host": b"b",
    }
    fill(table, [(f"/kvm/{key}".encode(), value, 2) for key, value in values.items()])
    fill(table, [(b"/kvm/host", b"a", 3)])
    assert table.naming(b"a") == {"1", "2", "4"}
    assert table.naming(b"c") == set()


def test_a_name_swapped_for_another_is_a_change() -> None:
    """The count of keys stays, the keys do not."""
    table = one(b"/kvm/1/ram")
    assert fill(table, [(b"/kvm/1/host", b"x", 6)], fresh=True) == {"1"}
    assert list(table.keys_of(InstanceId("1"))) == [b"host"]


KEYS = st.one_of(
    st.binary(max_size=20).map(lambda tail: b"/kvm/" + tail),
    st.sampled_from(
        [b"/kvm/1/ram", b"/kvm/1/host", b"/kvm/1/lock", b"/kvm/2/lock", b"/kvm/2/x", b"/kvm/../x", b"/kvm/y"]
    ),
)
STEPS = st.lists(st.lists(st.tuples(KEYS, st.binary(max_size=3), st.booleans()), max_size=8), max_size=6)


@given(STEPS)
def test_batches_and_lists_come_to_the_same(steps: list[list[tuple[bytes, bytes, bool]]]) -> None:
    """Any bytes below the prefix, applied as batches or listed anew: the same table, and true labels."""
    watched, truth, revision = Groups(Layout()), dict[bytes, tuple[bytes, int]](), 1
    for step in steps:
        stage = watched.begin(fresh=False)
        before = snapshot(watched)
        for key, value, delete in step:
            revision += 1
            if delete:
                truth.pop(key, None)
                stage.delete(key)
            else:
                truth[key] = (value, revision)
                stage.put(key, value, revision, revision, 0)
        changed = stage.commit()
        after = snapshot(watched)
        assert {i for i in before.keys() | after.keys() if before.get(i) != after.get(i)} <= changed
    listed = Groups(Layout())
    fill(listed, [(key, value, mod) for key, (value, mod) in truth.items()], fresh=True)
    assert snapshot(listed) == snapshot(watched)
    assert listed.foreign() == watched.foreign()
    kept = sum(len(listed.keys_of(i)) + (listed.lock_of(i) is not None) for i in listed.ids())
    assert kept + len(listed.foreign()) == len(truth)


LAYOUTS = st.sampled_from(["/kvm/%i/lock", "/kvm/%i/x", "/kvm/1/%i", "/kvm/%i", "/locks/%i", "%i"]).map(
    lambda lock: Layout(lock=lock)
)
ENTRIES = st.lists(st.tuples(KEYS, st.binary(max_size=3), st.integers(1, 3), st.just(1), st.just(0)), max_size=12)


@given(LAYOUTS, st.booleans(), st.lists(st.tuples(st.booleans(), ENTRIES), max_size=3))
def test_many_keys_at_once_come_to_the_same_as_one_by_one(
    layout: Layout, ordered: bool, stages: list[tuple[bool, list[tuple[bytes, bytes, int, int, int]]]]
) -> None:
    """Law: `put_all` is `put` for each, wherever locks lie, in whatever order, on an empty table or a full one."""
    one_by_one, at_once = (Groups(layout) for _ in range(2))
    for fresh, entries in stages:
        first, second = (table.begin(fresh=fresh) for table in (one_by_one, at_once))
        listed = sorted(entries) if ordered else entries
        for entry in listed:
            first.put(*entry)
        second.put_all(listed)
        assert first.commit() == second.commit()
        assert snapshot(one_by_one) == snapshot(at_once)
        assert one_by_one.foreign() == at_once.foreign()


def snapshot(table: Groups) -> dict[str, tuple[dict[bytes, RawValue], bytes | None]]:
    found = {}
    for i in table.ids():
        lock = table.lock_of(i)
        found[str(i)] = dict(table.keys_of(i)), None if lock is None else lock.value
    return found


def test_a_flat_table() -> None:
    """Keys by themselves: batches, lists, and what differs."""
    table = Flat()
    stage = table.begin(fresh=True)
    for key in (b"a", b"b", b"c"):
        stage.put(key, b"1", 2, 2, 9)
    assert table.entries == {}
    assert stage.commit() == {b"a", b"b", b"c"}
    assert table.get(b"a") == Entry(b"1", 2, 2, 9)
    stage = table.begin(fresh=False)
    stage.delete(b"a")
    stage.put(b"a", b"2", 3, 3, 0)
    stage.put(b"d", b"2", 3, 3, 0)
    stage.delete(b"d")
    stage.delete(b"b")
    assert stage.commit() == {b"a", b"b", b"d"}
    assert {key: entry.value for key, entry in table.entries.items()} == {b"a": b"2", b"c": b"1"}
    stage = table.begin(fresh=True)
    stage.put(b"c", b"1", 2, 2, 9)
    stage.put(b"e", b"1", 4, 4, 9)
    stage.delete(b"e")
    assert stage.commit() == {b"a", b"e"}
    assert list(table.entries) == [b"c"]


def test_instances_are_found_by_a_key() -> None:
    """Those that have it now, whatever it holds; a lock is no wish, and a stranger's key is nobody's."""
    table = Groups(Layout())
    fill(
        table,
        [(b"/kvm/1/hosts", b"a", 5), (b"/kvm/2/host", b"a", 5), (b"/kvm/3/lock", b"{}", 5), (b"/kvm/hosts", b"", 5)],
    )
    assert table.having(b"hosts") == {"1"}
    assert table.having(b"lock") == set()
    erase(table, b"/kvm/1/hosts")
    assert table.having(b"hosts") == set()
