"""The informer holds what etcd holds; every change is told, none is lost, none is applied twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from typing import Any, Protocol

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.etcd.api import Batch, Compacted, Denied, Event, KeyValue, Listing, Unavailable
from kvmsupervisor.cluster.informer import SLICE, Informer, Proof
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.grouping import Flat
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.parse_keys import VALUE_LIMIT
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd
from tests.fakes.history import SameHistory

ONE = InstanceId("1")


class Runs(Protocol):
    async def run(self) -> Any: ...


@asynccontextmanager
async def running(what: Runs) -> AsyncIterator[None]:
    """Run an informer's task; at the end it is cancelled and must not have failed."""
    task = asyncio.create_task(what.run())
    await settle()
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


class Bench:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.etcd = FakeEtcd(self.clock.now)
        self.table = Flat()
        self.told: list[tuple[set[bytes], int]] = []

    def informer(self, etcd: FakeEtcd | None = None, *, history: Proof | None = None) -> Informer[bytes]:
        return Informer(
            store=etcd or self.etcd,
            clock=self.clock,
            history=history or SameHistory(),
            prefix="/p/",
            table=self.table,
            on_change=self.note,
            rand=lambda: 0.5,
        )

    def note(self, keys: Set[bytes], revision: int) -> None:
        self.told.append((set(keys), revision))

    def held(self) -> dict[str, bytes]:
        return {key.decode(): entry.value for key, entry in self.table.entries.items()}

    def truth(self) -> dict[str, bytes]:
        return {key: value for key, value in self.etcd.data.items() if key.startswith("/p/")}


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_lists_then_watches(bench: Bench) -> None:
    """What was there comes as one change, then each batch as one, with its revision."""
    bench.etcd.write("/p/a", "1")
    bench.etcd.write("/p/b", "1")
    bench.etcd.write("/q/x", "1")
    informer = bench.informer()
    assert not informer.in_step
    assert not informer.synced.is_set()
    assert "first list" in informer.problem
    async with running(informer):
        assert informer.synced.is_set()
        assert informer.in_step
        assert informer.problem == ""
        assert informer.revision == bench.etcd.revision
        assert bench.told == [({b"/p/a", b"/p/b"}, bench.etcd.revision)]
        bench.etcd.write("/p/c", "2")
        bench.etcd.erase("/p/a", "/p/b")
        await settle()
        assert bench.held() == {"/p/c": b"2"}
        assert set().union(*(keys for keys, _ in bench.told[1:])) == {b"/p/a", b"/p/b", b"/p/c"}
        assert informer.revision == bench.etcd.revision == bench.told[-1][1]
    assert not informer.in_step


class Turning(SameHistory):
    """Another connection finds another history, now and then."""

    def __init__(self) -> None:
        self.era, self.turn = 0, asyncio.Event()

    async def turned(self, era: int) -> None:
        if self.era == era:
            await self.turn.wait()


async def test_another_history_that_is_found_beside_a_quiet_watch_is_listed(bench: Bench) -> None:
    """Law 11: otherwise tables of two histories stand beside each other, and no key is told (simulation, seed 4867)."""
    history = Turning()
    informer = bench.informer(history=history)
    async with running(informer):
        history.era, turn, history.turn = 1, history.turn, asyncio.Event()
        turn.set()
        await bench.clock.advance(5.0)
        assert (informer.era, informer.in_step) == (1, True)


class Finding(SameHistory):
    """A proof that finds another history, once: that of `there`, a moment after the list."""

    def __init__(self, etcd: FakeEtcd, there: FakeEtcd) -> None:
        self.era = 0
        self._etcd, self._there = etcd, there

    async def prove(self) -> None:
        if self.era == 0:
            self._etcd.restore(self._there)
            self.era = 1


async def test_a_list_that_began_in_a_former_history_is_read_again(bench: Bench) -> None:
    """Law 11: it is that history's, or is older than the name of the new one (simulation, seed 3443)."""
    there = FakeEtcd()
    there.write("/p/there", "1")
    bench.etcd.write("/p/here", "1")
    informer = bench.informer(history=Finding(bench.etcd, there))
    async with running(informer):
        assert bench.held() == {"/p/there": b"1"}
        assert bench.told == [({b"/p/there"}, bench.etcd.revision)]
        assert (informer.era, informer.in_step) == (1, True)


async def test_an_empty_prefix_is_in_step_and_tells_of_nothing(bench: Bench) -> None:
    """Nobody is called for nothing, yet the first sync is signalled."""
    informer = bench.informer()
    async with running(informer):
        assert informer.synced.is_set()
        assert informer.in_step
        assert bench.told == []


async def test_a_change_between_list_and_watch_is_not_lost(bench: Bench) -> None:
    """The watch begins right behind the list."""
    bench.etcd.write("/p/a", "1")
    real = bench.etcd.list

    async def late(prefix: str, *, page: int = 10_000) -> Listing:
        listing = await real(prefix)
        bench.etcd.write("/p/a", "2")
        bench.etcd.write("/p/b", "1")
        return listing

    bench.etcd.list = late  # type: ignore[method-assign]
    async with running(bench.informer()):
        assert bench.held() == {"/p/a": b"2", "/p/b": b"1"}


async def test_the_whole_batch_is_there_when_it_is_told_of(bench: Bench) -> None:
    """However many slices it took, and nobody saw a part of it."""
    count = 3 * SLICE + 1
    seen: list[int] = []
    told = asyncio.Event()

    def note(keys: Set[bytes], _: int) -> None:
        seen.extend((len(keys), len(bench.table.entries)))
        told.set()

    informer: Informer[bytes] = Informer(
        store=bench.etcd, clock=bench.clock, history=SameHistory(), prefix="/p/", table=bench.table, on_change=note
    )
    sizes: set[int] = set()

    async def onlooker() -> None:
        while True:
            sizes.add(len(bench.table.entries))
            await asyncio.sleep(0)

    looking = asyncio.create_task(onlooker())
    for index in range(count):
        bench.etcd.write(f"/p/{index}", "1")
    task = asyncio.create_task(informer.run())
    await informer.synced.wait()
    told.clear()
    bench.etcd.erase(*(f"/p/{index}" for index in range(count)))
    await told.wait()
    looking.cancel()
    task.cancel()
    assert seen == [count, count, count, 0]
    assert sizes == {0, count}


async def test_values_are_cut(bench: Bench) -> None:
    """1 MiB values cost no more than the limit."""
    bench.etcd.write("/p/a", b"x" * 2**20)
    async with running(bench.informer()):
        assert len(bench.held()["/p/a"]) == VALUE_LIMIT + 1


async def test_etcd_away_leaves_everything_in_place(bench: Bench) -> None:
    """Out of step, with the table as it was; back in step without a new list."""
    bench.etcd.write("/p/a", "1")
    informer = bench.informer()
    async with running(informer):
        bench.etcd.away()
        bench.etcd.write("/p/b", "1")
        await bench.clock.advance(60)
        assert not informer.in_step
        assert informer.problem
        assert bench.held() == {"/p/a": b"1"}
        bench.etcd.back()
        await bench.clock.advance(1)
        assert informer.in_step
        assert bench.held() == bench.truth()
        assert bench.etcd.calls["list"] == 1


async def test_a_compaction_while_cut_off_lists_again_and_tells_what_differs(bench: Bench) -> None:
    """Changed, new and deleted keys, each once; the unchanged one not."""
    for name in "abc":
        bench.etcd.write(f"/p/{name}", "1")
    informer = bench.informer()
    async with running(informer):
        bench.told.clear()
        bench.etcd.away()
        await settle()
        bench.etcd.write("/p/b", "2")
        bench.etcd.erase("/p/c")
        bench.etcd.write("/p/d", "2")
        bench.etcd.write("/p/e", "gone again")
        bench.etcd.erase("/p/e")
        bench.etcd.compact()
        bench.etcd.back()
        await bench.clock.advance(1)
        assert bench.told == [({b"/p/b", b"/p/c", b"/p/d"}, bench.etcd.revision)]
        assert bench.held() == bench.truth()
        assert informer.in_step
        bench.etcd.write("/p/a", "3")
        await settle()
        assert bench.held() == bench.truth()


async def test_a_compaction_between_two_pages_begins_the_list_again(bench: Bench) -> None:
    """At once the first time, and with a pause when it happens again and again."""
    bench.etcd.write("/p/a", "1")
    for _ in range(3):
        bench.etcd.fail_next(Compacted(7), "list")
    informer = bench.informer()
    async with running(informer):
        assert bench.etcd.calls["list"] == 2
        await bench.clock.advance(1)
        assert informer.in_step
        assert bench.held() == {"/p/a": b"1"}


async def test_troubles_are_told_once_and_waited_out(bench: Bench) -> None:
    """One line when it begins, another when it turns into something else, one when it is over."""
    informer = bench.informer()
    with capture_logs() as logs:
        bench.etcd.away()
        async with running(informer):
            await bench.clock.advance(60)
            assert "cannot be read" in informer.problem
            assert bench.etcd.calls["list"] < 25
            bench.etcd.back()
            bench.etcd.deny()
            await bench.clock.advance(60)
            assert "permission denied" in informer.problem
            bench.etcd.allow()
            await bench.clock.advance(6)
            assert informer.in_step
            assert informer.problem == ""
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("mirror.away", "warning"),
        ("mirror.denied", "error"),
        ("mirror.back", "info"),
    ]


async def test_a_watch_that_is_denied_goes_on_where_it_was(bench: Bench) -> None:
    """What was written meanwhile is told once the right is back, without a new list."""
    informer = bench.informer()
    async with running(informer):
        bench.etcd.deny()
        await bench.clock.advance(60)
        assert not informer.in_step
        assert "permission denied" in informer.problem
        bench.etcd.write("/p/a", "1")
        bench.etcd.allow()
        await bench.clock.advance(6)
        assert bench.held() == {"/p/a": b"1"}
        assert bench.etcd.calls["list"] == 1


async def test_a_watch_that_ends_is_begun_again_without_haste(bench: Bench) -> None:
    """A closed store must not make the loop spin."""
    async with running(bench.informer()):
        await bench.etcd.close()
        bench.etcd.calls.clear()
        await bench.clock.advance(60)
        assert 10 < bench.etcd.calls["watch"] < 30


async def test_an_hour_of_health_makes_the_next_trouble_a_first_one(bench: Bench) -> None:
    """The pause grows within one row of failures only."""
    async with running(bench.informer()):
        bench.etcd.deny()
        await bench.clock.advance(60)
        bench.etcd.allow()
        await bench.clock.advance(3600)
        bench.etcd.deny()
        await settle()
        bench.etcd.allow()
        bench.etcd.write("/p/a", "1")
        await bench.clock.advance(0.2)
        assert bench.held() == {"/p/a": b"1"}


async def test_a_stop_in_the_middle_of_a_large_list_leaves_no_half(bench: Bench) -> None:
    """Cancelled while it is being applied, it was not applied."""
    for index in range(3 * SLICE):
        bench.etcd.write(f"/p/{index}", "1")
    task = asyncio.create_task(bench.informer().run())
    for _ in range(4):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.held() == {}
    assert bench.told == []


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_the_changes_told_add_up_to_the_truth(bench: Bench, seed: int) -> None:
    """Random writes, cuts, denials and compactions: a copy kept by the told changes alone equals etcd."""
    dice = random.Random(seed)
    copy: dict[bytes, bytes] = {}

    def follow(keys: Set[bytes], _: int) -> None:
        for key in keys:
            entry = bench.table.get(key)
            if entry is None:
                copy.pop(key, None)
            else:
                copy[key] = entry.value

    etcd = bench.etcd.peer()
    informer: Informer[bytes] = Informer(
        store=etcd, clock=bench.clock, history=SameHistory(), prefix="/p/", table=bench.table, on_change=follow
    )
    async with running(informer):
        for _ in range(300):
            match dice.randrange(12):
                case 0:
                    etcd.away()
                case 1:
                    etcd.deny()
                case 2 | 3:
                    etcd.back()
                    etcd.allow()
                case 4:
                    bench.etcd.compact(dice.randint(0, bench.etcd.revision))
                case 5:
                    await bench.clock.advance(dice.choice([0.1, 5]))
                case 6:
                    etcd.fail_next(dice.choice([Unavailable("x"), Denied("x"), Compacted(1)]))
                case 7 | 8:
                    bench.etcd.erase(f"/p/{dice.randrange(6)}", f"/p/{dice.randrange(6)}")
                case _:
                    bench.etcd.write(f"/p/{dice.randrange(6)}", str(dice.random()))
        etcd.back()
        etcd.allow()
        await bench.clock.advance_until(lambda: informer.in_step, 3600)
        assert bench.held() == bench.truth() == {key.decode(): value for key, value in copy.items()}


def wishes_on(etcd: FakeEtcd, clock: FakeClock, layout: Layout) -> tuple[Wishes, list[set[str]]]:
    told: list[set[str]] = []

    def note(ids: Set[InstanceId], _: int) -> None:
        told.append(set(ids))
        wishes.heed(ids)

    wishes = Wishes(
        store=etcd,
        clock=clock,
        layout=layout,
        history=SameHistory(),
        me=HostName("a"),
        concerns=lambda name: True,
        on_change=note,
        on_anew=lambda: None,
    )
    return wishes, told


@pytest.mark.parametrize("template", ["/kvm/%i/lock", "/locks/%i", "/%i/lock"])
async def test_wishes_and_locks_wherever_the_template_puts_them(bench: Bench, template: str) -> None:
    """One view of both; a change of either is told by the instance's id."""
    layout = Layout(lock=template)
    bench.etcd.write("/kvm/1/ram", "512")
    bench.etcd.write("/kvm/../ram", "512")
    # A lock that names this host concerns it, whatever the keys say.
    bench.etcd.write(layout.lock_key(InstanceId("2")), '{"host":"a"}')
    wishes, told = wishes_on(bench.etcd, bench.clock, layout)
    assert not wishes.synced
    async with running(wishes):
        await wishes.wait_synced()
        assert wishes.synced
        assert wishes.in_step
        assert wishes.problem == ""
        assert wishes.ids() == {"1", "2"}
        assert wishes.revision == bench.etcd.revision
        assert set().union(*told) == {"1", "2"}
        assert wishes.keys_of(ONE)[b"ram"].value == b"512"
        assert wishes.keys_of(InstanceId("2")) == {}
        assert wishes.lock_of(ONE) is None
        assert list(wishes.foreign()) == [b"/kvm/../ram"]
        told.clear()
        bench.etcd.write(layout.lock_key(ONE), "{}")
        await settle()
        assert told == [{"1"}]
        lock = wishes.lock_of(ONE)
        assert lock is not None
        assert lock.mod_revision == bench.etcd.revision == wishes.locks_revision
        bench.etcd.write("/kvm/..", "x")
        await settle()
        assert told == [{"1"}]
        bench.etcd.away()
        await settle()
        assert not wishes.in_step
        assert wishes.problem


async def test_ten_thousand_unknown_keys_of_one_instance_hurt_no_other(bench: Bench) -> None:
    """Each lands with its instance; the others are not told."""
    bench.etcd.write("/kvm/2/ram", "1")
    wishes, told = wishes_on(bench.etcd, bench.clock, Layout())
    async with running(wishes):
        told.clear()
        for index in range(10_000):
            bench.etcd.write(f"/kvm/1/{index}".encode() + b"\xff", b"\xff" * 10)
        await settle()
        assert set().union(*told) == {"1"}
        assert len(wishes.keys_of(ONE)) == 10_000


async def test_a_crowd_lists_again_one_after_the_other(bench: Bench) -> None:
    """What makes one host list again makes all: each waits a random part of what all need. A first list does not."""
    history = SameHistory()
    history.hosts = 101

    async def slow(call: str) -> None:
        if call == "list":
            await bench.clock.sleep(0.1)

    bench.etcd.hook = slow
    informer = Informer(
        store=bench.etcd,
        clock=bench.clock,
        history=history,
        prefix="/p/",
        table=Flat(),
        on_change=lambda keys, revision: None,
        rand=lambda: 0.5,
    )
    async with running(informer):
        await bench.clock.advance(0.1)
        assert informer.in_step
        bench.etcd.away()
        await settle()
        for value in "12":
            bench.etcd.write("/p/a", value)
        bench.etcd.compact()
        bench.etcd.back()
        await bench.clock.advance(4.9)
        assert bench.etcd.calls["list"] == 1
        await bench.clock.advance(0.3)
        assert bench.etcd.calls["list"] == 2
        assert informer.in_step


async def test_batches_need_not_come_from_the_fake() -> None:
    """A batch with several events of one key: the last one counts."""
    table = Flat()
    told: list[tuple[set[bytes], int]] = []

    class Once:
        connected = True

        async def __aiter__(self) -> AsyncIterator[Batch]:
            put = Event(KeyValue(b"/p/a", b"1", 5, 5), deleted=False)
            gone = Event(KeyValue(b"/p/a", b"", 6, 0), deleted=True)
            again = Event(KeyValue(b"/p/a", b"2", 7, 7), deleted=False)
            yield Batch([put, gone], 6)
            yield Batch([again, gone, again], 7)
            await asyncio.Event().wait()

    etcd = FakeEtcd()

    @asynccontextmanager
    async def watch(prefix: str, start_revision: int, *, prove: object) -> AsyncIterator[Once]:
        yield Once()

    etcd.watch = watch  # type: ignore[method-assign,assignment]
    informer: Informer[bytes] = Informer(
        store=etcd,
        clock=FakeClock(),
        history=SameHistory(),
        prefix="/p/",
        table=table,
        on_change=lambda keys, revision: told.append((set(keys), revision)),
    )
    async with running(informer):
        assert told == [({b"/p/a"}, 6), ({b"/p/a"}, 7)]
        entry = table.get(b"/p/a")
        assert entry is not None
        assert (entry.value, entry.create_revision) == (b"2", 7)
