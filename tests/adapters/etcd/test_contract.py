"""What every `Store` does: the same laws for the fake and for the real client on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvmsupervisor.adapters.etcd import (
    Ahead,
    Batch,
    Compacted,
    Compare,
    Delete,
    Etcd,
    EtcdConfig,
    Event,
    Get,
    KeyValue,
    LeaseGone,
    Listing,
    Put,
    Rejected,
    Store,
    Target,
    Unavailable,
    Watch,
)
from tests.fakes.etcd import FakeEtcd
from tests.support.etcd import EtcdServer

SOON_S = 20.0
"""Far above what anything here takes; only a hang reaches it."""


@pytest.fixture(params=["fake", "real"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    made: Store
    if request.param == "fake":
        made = FakeEtcd()
    else:
        server: EtcdServer = request.getfixturevalue("etcd_server")
        made = Etcd(EtcdConfig(endpoints=server.endpoints))
    yield made
    await made.close()


async def batches_until(watch: Watch, revision: int) -> list[Batch]:
    """Read a watch up to and including `revision`."""
    batches: list[Batch] = []
    async with asyncio.timeout(SOON_S):
        async for batch in watch:
            batches.append(batch)
            if batch.revision >= revision:
                break
    return batches


def events_of(batches: list[Batch]) -> list[tuple[str, bytes, bool, int]]:
    return [
        (event.kv.key.decode(), event.kv.value, event.deleted, event.kv.mod_revision)
        for batch in batches
        for event in batch.events
    ]


def versions(found: KeyValue | None) -> tuple[bytes, int, int]:
    assert found is not None
    return found.value, found.create_revision, found.mod_revision


async def test_a_key_is_read_as_it_was_written(store: Store, etcd_prefix: str) -> None:
    """`get` shows the last write with its revisions; an absent key is None."""
    key = f"{etcd_prefix}/a"
    assert await store.get(key) is None
    first = await store.put(key, b"1")
    second = await store.put(key, b"\xff\x00")
    assert second > first
    assert versions(await store.get(key)) == (b"\xff\x00", first, second)


async def test_several_keys_are_read_at_one_revision(store: Store, etcd_prefix: str) -> None:
    """`read` shows all keys as they were at one revision, in the order asked for; an absent one is None."""
    one, two = f"{etcd_prefix}/1", f"{etcd_prefix}/2"
    first = await store.put(one, b"1")
    second = await store.put(two, b"2")
    reading = await store.read(two, f"{etcd_prefix}/none", one)
    assert [None if kv is None else versions(kv) for kv in reading.kvs] == [
        (b"2", second, second),
        None,
        (b"1", first, first),
    ]
    assert reading.revision >= second


async def test_a_listing_is_one_revision_in_key_order(store: Store, etcd_prefix: str) -> None:
    """`list` returns what begins with the prefix, sorted by key, whatever the page size."""
    for name in ("b", "a", "c/d", "c"):
        await store.put(f"{etcd_prefix}/x/{name}", name.encode())
    last = await store.put(f"{etcd_prefix}/xy", b"not below")
    for page in (1, 2, 10_000):
        listing = await store.list(f"{etcd_prefix}/x/", page=page)
        names = [kv.key.decode().removeprefix(f"{etcd_prefix}/x/") for kv in listing.kvs]
        assert names == ["a", "b", "c", "c/d"]
        assert listing.revision >= last
    assert (await store.list(f"{etcd_prefix}/nothing/")).kvs == []


async def test_a_watch_from_a_listing_misses_nothing(store: Store, etcd_prefix: str) -> None:
    """Everything after the listing's revision comes as an event, once, in order; nothing before it does."""
    await store.put(f"{etcd_prefix}/old", b"0")
    listing: Listing = await store.list(f"{etcd_prefix}/")
    one = await store.put(f"{etcd_prefix}/a", b"1")
    async with store.watch(f"{etcd_prefix}/", listing.revision + 1) as watch:
        two = await store.put(f"{etcd_prefix}/a", b"2")
        await store.put(f"{etcd_prefix}elsewhere", b"x")
        gone = (await store.txn([], [Delete(f"{etcd_prefix}/old")])).revision
        seen = events_of(await batches_until(watch, gone))
        assert watch.connected
    assert seen == [
        (f"{etcd_prefix}/a", b"1", False, one),
        (f"{etcd_prefix}/a", b"2", False, two),
        (f"{etcd_prefix}/old", b"", True, gone),
    ]


async def test_a_transaction_is_one_revision_and_one_batch(store: Store, etcd_prefix: str) -> None:
    """All writes of a transaction share a revision, and a watch never shows half of them."""
    async with store.watch(f"{etcd_prefix}/", 1 + (await store.list(etcd_prefix)).revision) as watch:
        puts = [Put(f"{etcd_prefix}/{number}", b"x") for number in range(50)]
        result = await store.txn([], puts)
        batches = await batches_until(watch, result.revision)
    assert len(batches) == 1
    assert {revision for *_, revision in events_of(batches)} == {result.revision}
    assert len(batches[0].events) == 50


async def test_compares_decide_which_branch_runs(store: Store, etcd_prefix: str) -> None:
    """Every compare must hold for `success`; otherwise `failure` runs, and reads show what it saw."""
    key = f"{etcd_prefix}/k"
    made = await store.txn([Compare(key, Target.CREATE_REVISION, 0)], [Put(key, b"1")], [Get(key)])
    assert made.succeeded
    assert made.reads == []
    again = await store.txn([Compare(key, Target.CREATE_REVISION, 0)], [Put(key, b"2")], [Get(key)])
    assert not again.succeeded
    assert [versions(kv) for kv in again.reads[0]] == [(b"1", made.revision, made.revision)]

    swap = await store.txn(
        [
            Compare(key, Target.MOD_REVISION, made.revision),
            Compare(key, Target.VALUE, b"1"),
            Compare(key, Target.LEASE, 0),
        ],
        [Put(key, b"3"), Get(key), Delete(f"{etcd_prefix}/absent")],
    )
    assert swap.succeeded
    assert [versions(kv) for kv in swap.reads[0]] == [(b"3", made.revision, swap.revision)]

    both = await store.txn([Compare(key, Target.VALUE, b"3"), Compare(key, Target.MOD_REVISION, 1)], [Delete(key)])
    assert not both.succeeded
    assert both.revision >= swap.revision
    assert await store.get(key) is not None


async def test_an_absent_key_compares_as_zero_and_has_no_value(store: Store, etcd_prefix: str) -> None:
    """Revisions and lease of an absent key are 0; comparing its value fails, with the empty one too."""
    key = f"{etcd_prefix}/absent"
    for target in (Target.CREATE_REVISION, Target.MOD_REVISION, Target.LEASE):
        assert (await store.txn([Compare(key, target, 0)], [])).succeeded
    assert not (await store.txn([Compare(key, Target.VALUE, b"")], [])).succeeded


async def test_a_transaction_without_operations_returns_no_reads(store: Store, etcd_prefix: str) -> None:
    """A transaction that only compares says whether it held, and nothing else."""
    result = await store.txn([], [])
    assert result.succeeded
    assert result.reads == []


async def test_reads_keep_their_order(store: Store, etcd_prefix: str) -> None:
    """`reads` has one entry per `Get`, in order, empty for absent keys, all keys for a prefix."""
    await store.put(f"{etcd_prefix}/a", b"1")
    await store.put(f"{etcd_prefix}/b", b"2")
    result = await store.txn(
        [],
        [Get(f"{etcd_prefix}/b"), Get(f"{etcd_prefix}/none"), Get(f"{etcd_prefix}/", prefix=True)],
    )
    assert [[kv.value for kv in read] for read in result.reads] == [[b"2"], [], [b"1", b"2"]]


async def test_what_cannot_be_done_is_rejected_and_changes_nothing(store: Store, etcd_prefix: str) -> None:
    """A key twice in one transaction, or no key, is `Rejected`, and the other writes did not happen."""
    with pytest.raises(Rejected):
        await store.txn([], [Put(f"{etcd_prefix}/a", b"1"), Put(f"{etcd_prefix}/a", b"2")])
    with pytest.raises(Rejected):
        await store.put("", b"1")
    assert await store.get(f"{etcd_prefix}/a") is None


async def test_deleting_a_prefix_deletes_all_below_it(store: Store, etcd_prefix: str) -> None:
    """One `Delete` with `prefix` removes every key that begins with it, in one revision, and no other."""
    for name in ("x/1", "x/2", "y"):
        await store.put(f"{etcd_prefix}/{name}", b"1")
    async with store.watch(f"{etcd_prefix}/", 1 + (await store.list(etcd_prefix)).revision) as watch:
        result = await store.txn([], [Delete(f"{etcd_prefix}/x/", prefix=True)])
        seen = events_of(await batches_until(watch, result.revision))
    assert seen == [(f"{etcd_prefix}/x/{number}", b"", True, result.revision) for number in (1, 2)]
    assert [kv.key.decode() for kv in (await store.list(etcd_prefix)).kvs] == [f"{etcd_prefix}/y"]


async def test_a_lease_ends_with_its_keys(store: Store, etcd_prefix: str) -> None:
    """Revoking deletes the keys attached, in one revision; the lease is gone then, and that is no error."""
    lease = await store.grant(60)
    assert await store.keep_alive(lease) == 60
    assert 0 < await store.time_to_live(lease) <= 60
    await store.put(f"{etcd_prefix}/a", b"1", lease=lease)
    last = (await store.txn([], [Put(f"{etcd_prefix}/b", b"2", lease)])).revision
    assert (await store.txn([Compare(f"{etcd_prefix}/b", Target.LEASE, lease)], [])).succeeded
    async with store.watch(f"{etcd_prefix}/", last + 1) as watch:
        await store.revoke(lease)
        seen = events_of(await batches_until(watch, last + 1))
    assert [(key, deleted) for key, _, deleted, _ in seen] == [
        (f"{etcd_prefix}/a", True),
        (f"{etcd_prefix}/b", True),
    ]
    await store.revoke(lease)
    assert await store.keep_alive(lease) == 0
    assert await store.time_to_live(lease) <= 0


async def test_writing_without_a_lease_detaches_the_key(store: Store, etcd_prefix: str) -> None:
    """A key that was written again without its lease outlives it."""
    key = f"{etcd_prefix}/a"
    lease = await store.grant(60)
    await store.put(key, b"1", lease=lease)
    await store.put(key, b"2")
    await store.revoke(lease)
    found = await store.get(key)
    assert found is not None
    assert (found.value, found.lease) == (b"2", 0)


async def test_a_lease_that_does_not_exist_is_said_to_be_gone(store: Store, etcd_prefix: str) -> None:
    """Writing with an unknown lease raises `LeaseGone` and writes nothing."""
    with pytest.raises(LeaseGone):
        await store.put(f"{etcd_prefix}/a", b"1", lease=12345)
    with pytest.raises(LeaseGone):
        await store.txn([], [Put(f"{etcd_prefix}/b", b"1"), Put(f"{etcd_prefix}/a", b"1", 12345)])
    assert (await store.list(f"{etcd_prefix}/")).kvs == []


async def test_a_deletion_event_has_no_value_and_its_own_revision(store: Store, etcd_prefix: str) -> None:
    """For a deletion `kv.value` is empty and `mod_revision` that of the deletion."""
    key = f"{etcd_prefix}/a"
    start = await store.put(key, b"1")
    gone = (await store.txn([], [Delete(key)])).revision
    async with store.watch(key, start + 1) as watch:
        [batch] = await batches_until(watch, gone)
    assert batch == Batch([Event(KeyValue(key.encode(), b"", gone, 0), deleted=True)], gone)


async def test_closing_ends_watches_and_calls(store: Store, etcd_prefix: str) -> None:
    """After `close` a watch ends its iteration, and a call raises `Unavailable`."""
    async with store.watch(f"{etcd_prefix}/", 1 + await store.put(f"{etcd_prefix}/a", b"1")) as watch:
        reading = asyncio.create_task(batches_until(watch, 2**62))
        await asyncio.sleep(0)
        await store.close()
        assert await reading == []
    with pytest.raises(Unavailable):
        await store.get("a")


@pytest.mark.parametrize("kind", ["fake", "real"])
async def test_history_that_is_gone_is_said_to_be_compacted(kind: str, request: pytest.FixtureRequest) -> None:
    """A watch that begins before the compaction raises `Compacted`; one that begins at it sees all."""
    store: Store = FakeEtcd()
    alone: EtcdServer | None = None
    if kind == "real":
        alone = request.getfixturevalue("etcd_alone")
        store = Etcd(EtcdConfig(endpoints=alone.endpoints))
    try:
        first = await store.put("/a", b"1")
        second = await store.put("/a", b"2")
        last = await store.put("/a", b"3")
        if isinstance(store, FakeEtcd):
            store.compact(second)
        else:
            assert alone is not None
            await asyncio.to_thread(alone.ctl, "compact", str(second))
        async with store.watch("/", first) as watch:
            with pytest.raises(Compacted) as caught:
                await batches_until(watch, last)
        assert caught.value.revision == second
        async with store.watch("/", second) as watch:
            assert [value for _, value, *_ in events_of(await batches_until(watch, last))] == [b"2", b"3"]
    finally:
        await store.close()


@pytest.mark.parametrize("kind", ["fake", "real"])
async def test_a_key_is_read_as_it_was(kind: str, request: pytest.FixtureRequest) -> None:
    """At its own revision, before it, after its deletion, ahead of the store, and behind a compaction."""
    store: Store = FakeEtcd()
    alone: EtcdServer | None = None
    if kind == "real":
        alone = request.getfixturevalue("etcd_alone")
        store = Etcd(EtcdConfig(endpoints=alone.endpoints))
    try:
        first = await store.put("/a", b"1")
        second = await store.put("/a", b"2")
        gone = (await store.txn([], [Delete("/a")])).revision
        assert versions(await store.get_at("/a", first)) == (b"1", first, first)
        assert versions(await store.get_at("/a", second)) == (b"2", first, second)
        assert await store.get_at("/a", first - 1) is None
        assert await store.get_at("/a", gone) is None
        with pytest.raises(Ahead):
            await store.get_at("/a", gone + 1)
        if isinstance(store, FakeEtcd):
            store.compact(second)
        else:
            assert alone is not None
            await asyncio.to_thread(alone.ctl, "compact", str(second))
        with pytest.raises(Compacted):
            await store.get_at("/a", first)
        assert versions(await store.get_at("/a", second)) == (b"2", first, second)
    finally:
        await store.close()


async def test_a_watch_is_proven_before_it_tells_anything(store: Store, etcd_prefix: str) -> None:
    """Law 11: the proof is asked for once a connection; what it raises ends the watch, but for an etcd that is away."""
    first = await store.put(f"{etcd_prefix}/a", b"1")
    asked: list[str] = []
    answers: list[Exception | None] = [Unavailable("away"), None]

    async def prove() -> None:
        asked.append("proof")
        if (answer := answers.pop(0)) is not None:
            raise answer

    async with store.watch(f"{etcd_prefix}/", first, prove=prove) as watch:
        await batches_until(watch, first)
        assert watch.connected
        last = await store.put(f"{etcd_prefix}/a", b"2")
        await batches_until(watch, last)
    assert asked == ["proof", "proof"]
    answers.append(Rejected("another history"))
    async with store.watch(f"{etcd_prefix}/", first, prove=prove) as watch, asyncio.timeout(SOON_S):
        with pytest.raises(Rejected):
            await anext(aiter(watch))
        assert not watch.connected


async def test_keys_are_watched_each_by_itself(store: Store, etcd_prefix: str) -> None:
    """Events of the keys that were added, each from its own revision on, and of no neighbour; keys may come later."""
    a, b, c = (f"{etcd_prefix}/{name}" for name in "abc")
    first = await store.put(a, b"1")
    second = await store.put(b, b"1")
    await store.put(c, b"1")
    async with store.watch_keys() as watch:
        watch.add(a, first + 1)
        watch.add(b, second)
        assert events_of(await batches_until(watch, second)) == [(b, b"1", False, second)]
        await store.put(c, b"2")
        await store.put(f"{a}a", b"no")
        third = await store.put(a, b"2")
        assert events_of(await batches_until(watch, third)) == [(a, b"2", False, third)]
        assert watch.connected
        watch.add(c, third)
        await store.txn([], [Delete(a)])
        last = await store.put(c, b"3")
        # Those of two keys come in any order.
        batches: list[Batch] = []
        while sum(len(batch.events) for batch in batches) < 2:
            batches += await batches_until(watch, 0)
        assert sorted(events_of(batches)) == [(a, b"", True, last - 1), (c, b"3", False, last)]


@pytest.mark.parametrize("kind", ["fake", "real"])
async def test_a_key_whose_history_is_gone_ends_the_watch_of_keys(kind: str, request: pytest.FixtureRequest) -> None:
    """What happened to it in between can be read only, whatever else is watched."""
    store: FakeEtcd | Etcd = FakeEtcd()
    if kind == "real":
        alone: EtcdServer = request.getfixturevalue("etcd_alone")
        store = Etcd(EtcdConfig(endpoints=alone.endpoints))
    old = await store.put("/k/a", b"1")
    now = await store.put("/k/b", b"1")
    if isinstance(store, FakeEtcd):
        store.compact()
    else:
        await asyncio.to_thread(alone.ctl, "compact", str(now))
    async with store.watch_keys() as watch:
        watch.add("/k/b", now + 1)
        watch.add("/k/a", old)
        with pytest.raises(Compacted):
            await batches_until(watch, now + 1)
    await store.close()
