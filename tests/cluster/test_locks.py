"""Locks outside the wishes: those that concern this host are known and followed, and no others are heard of."""

from __future__ import annotations

from collections.abc import Set

import pytest

from kvmsupervisor.cluster.locks import READ_AT_ONCE, SPARE, Locks
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from tests.cluster.test_informer import Finding, running
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd
from tests.fakes.history import SameHistory

LAYOUT = Layout(lock="/locks/%i")
ONE, TWO, THREE = (InstanceId(name) for name in ("1", "2", "3"))


class Bench:
    def __init__(self) -> None:
        self.etcd = FakeEtcd()
        self.clock = FakeClock()
        self.history = SameHistory()
        self.near: set[InstanceId] = set()
        self.told: list[set[InstanceId]] = []
        self.locks = Locks(
            store=self.etcd,
            clock=self.clock,
            history=self.history,
            layout=LAYOUT,
            me=HostName("a"),
            concerns=lambda name: name in self.near,
            on_change=self._note,
            rand=lambda: 0.5,
        )

    def _note(self, names: Set[InstanceId], revision: int) -> None:
        self.told.append(set(names))

    def lock(self, name: InstanceId, value: str) -> int:
        self.etcd.write(LAYOUT.lock_key(name), value)
        return self.etcd.revision

    def come_near(self, *names: InstanceId) -> None:
        self.near.update(names)
        self.locks.heed(names)

    def value(self, name: InstanceId) -> bytes | None:
        entry = self.locks.lock_of(name)
        return None if entry is None else entry.value


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_only_the_locks_that_concern_this_host_are_heard_of(bench: Bench) -> None:
    """Those of its instances, and those that name it; an absent one is known to be absent. Others cost nothing."""
    bench.lock(ONE, "held by b")
    named = bench.lock(TWO, '{"host":"a"}')
    bench.come_near(ONE, THREE)
    async with running(bench.locks):
        assert bench.told == [{ONE, TWO, THREE}]
        assert bench.locks.in_step
        assert (bench.value(ONE), bench.value(TWO), bench.value(THREE)) == (b"held by b", b'{"host":"a"}', None)
        assert bench.locks.known_at(THREE) == named
        assert bench.locks.ids() == {ONE, TWO}
        assert bench.locks.naming(b"a") == {TWO}
        bench.told.clear()
        calls = bench.etcd.calls.copy()
        for number in range(100):
            bench.lock(InstanceId(f"other{number}"), "{}")
        await settle()
        assert bench.told == []
        assert bench.etcd.calls == calls
        assert bench.locks.known_at(InstanceId("other1")) is None
        revision = bench.lock(THREE, "new")
        await settle()
        assert bench.told == [{THREE}]
        assert bench.locks.known_at(THREE) == revision
        bench.etcd.erase(LAYOUT.lock_key(ONE))
        await settle()
        assert bench.value(ONE) is None
        assert bench.locks.known_at(ONE) == bench.etcd.revision


async def test_a_lock_that_comes_to_concern_this_host_is_read_and_followed(bench: Bench) -> None:
    """It is told of, also where it is absent: nobody may wait for a word that never comes."""
    bench.lock(ONE, "1")
    async with running(bench.locks):
        bench.told.clear()
        bench.come_near(ONE, TWO)
        assert not bench.locks.in_step
        await settle()
        assert bench.told == [{ONE, TWO}]
        assert bench.locks.in_step
        assert (bench.value(ONE), bench.value(TWO)) == (b"1", None)
        bench.lock(ONE, "2")
        bench.lock(TWO, "3")
        await settle()
        assert (bench.value(ONE), bench.value(TWO)) == (b"2", b"3")


async def test_what_happened_while_etcd_was_away_is_told_afterwards(bench: Bench) -> None:
    """Also of a lock that came to concern this host meanwhile, and also when the history of it was compacted."""
    bench.come_near(ONE)
    async with running(bench.locks):
        bench.etcd.away()
        await settle()
        assert not bench.locks.in_step
        bench.lock(ONE, "1")
        bench.lock(TWO, "2")
        bench.come_near(TWO)
        bench.etcd.back()
        await bench.clock.advance(10.0)
        assert (bench.value(ONE), bench.value(TWO)) == (b"1", b"2")
        assert bench.locks.in_step
        bench.etcd.away()
        await settle()
        bench.etcd.erase(LAYOUT.lock_key(ONE))
        bench.etcd.compact()
        lists = bench.etcd.calls["list"]
        bench.etcd.back()
        await bench.clock.advance(10.0)
        assert bench.value(ONE) is None
        assert bench.locks.in_step
        # The locks of others are not read again for that.
        assert bench.etcd.calls["list"] == lists
        bench.lock(ONE, "3")
        await settle()
        assert bench.value(ONE) == b"3"


async def test_another_history_is_read_whole(bench: Bench) -> None:
    """What was known counts no more, and a lock that names this host there is found (law 11)."""
    bench.lock(ONE, "1")
    bench.come_near(ONE)
    async with running(bench.locks):
        bench.history.era += 1
        other = FakeEtcd()
        other.write(LAYOUT.lock_key(TWO), '"a"')
        bench.told.clear()
        bench.etcd.restore(other.backup())
        await bench.clock.advance(10.0)
        assert bench.locks.era == bench.history.era
        assert bench.told[0] == {ONE, TWO}
        assert (bench.value(ONE), bench.value(TWO)) == (None, b'"a"')


async def test_a_list_that_began_in_a_former_history_is_read_again(bench: Bench) -> None:
    """Law 11: as an informer does."""
    there = FakeEtcd()
    there.write(LAYOUT.lock_key(TWO), '"a"')
    bench.lock(ONE, '"a"')
    bench.locks._history = Finding(bench.etcd, there)
    async with running(bench.locks):
        assert (bench.value(ONE), bench.value(TWO)) == (None, b'"a"')
        assert bench.told == [{TWO}]
        assert (bench.locks.era, bench.locks.in_step) == (1, True)


async def test_locks_that_concern_it_no_more_are_let_go(bench: Bench) -> None:
    """A host through which many instances pass does not watch their locks for ever; those it holds it keeps."""
    bench.lock(ONE, '"a"')
    bench.come_near(ONE)
    async with running(bench.locks):
        passing = [InstanceId(f"p{number}") for number in range(SPARE + READ_AT_ONCE)]
        bench.near.clear()
        for name in passing:
            bench.come_near(name)
            await settle()
            bench.near.discard(name)
        followed = sum(bench.locks.known_at(name) is not None for name in passing)
        assert followed < SPARE
        bench.lock(ONE, '"a" again')
        await bench.clock.advance(1.0)
        assert bench.value(ONE) == b'"a" again'
        assert bench.locks.in_step
