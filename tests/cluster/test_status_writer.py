"""Status keys: what is wanted gets there, once, and never over another owner's head."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.etcd.api import Compare, Delete, KeyValue, Put, Rejected, Target, Unavailable
from kvmsupervisor.cluster.batches import BURST, BYTES_PER_TXN, OPS_PER_TXN
from kvmsupervisor.cluster.status_writer import StatusWriter
from kvmsupervisor.domain.events import RESET, made
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.status import VALUE_BYTES, Phase, Status
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd

SESSION_KEY = "/kvmsupervisor/hosts/a"
ONE, TWO = InstanceId("1"), InstanceId("2")


class FakeSession:
    """Held or not, by the test's word; the key in etcd is another matter."""

    def __init__(self, etcd: FakeEtcd) -> None:
        etcd.write(SESSION_KEY, "{}")
        self._revision = etcd.revision
        self.held = True
        self.listeners: list[Callable[[], None]] = []

    def compare(self) -> Compare:
        return Compare(SESSION_KEY, Target.CREATE_REVISION, self._revision)

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def turn(self, held: bool) -> None:
        self.held = held
        for listener in self.listeners:
            listener()


class Bench:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.etcd = FakeEtcd(self.clock.now)
        self.session = FakeSession(self.etcd)
        self.status_writer = self.make()

    def make(self, gather_s: float = 0.0, spread_s: float = 0.0) -> StatusWriter:
        return StatusWriter(
            store=self.etcd,
            clock=self.clock,
            layout=Layout(),
            host=HostName("a"),
            session=self.session,
            gather_s=gather_s,
            spread_s=spread_s,
            rand=lambda: 0.5,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StatusWriter]:
        task = asyncio.create_task(self.status_writer.run())
        await settle()
        try:
            yield self.status_writer
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    def value(self, instance: InstanceId) -> bytes | None:
        return self.etcd.data.get(Layout().status_key(instance))

    def listed(self) -> list[KeyValue]:
        return self.etcd._server.select(Layout().statuses_prefix, prefix=True)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def status(
    instance: InstanceId, reason: str = "", *, host: str = "a", problems: tuple[str, ...] = (), epoch: int = 0
) -> Status:
    return Status(
        id=instance, host=host, phase=Phase.RUNNING, reason=reason, since="now", problems=problems, epoch=epoch
    )


async def test_a_status_is_written_once(bench: Bench) -> None:
    """And not again while it is the same."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        await settle()
        assert bench.value(ONE) == status(ONE).to_json()
        status_writer.set(ONE, status(ONE))
        await bench.clock.advance(600)
        assert len(bench.etcd.writes) == 1
        assert bench.etcd.calls == {"txn": 1}
        assert status_writer.ids() == {ONE}


async def test_what_the_key_held_at_the_start_is_not_written_again(bench: Bench) -> None:
    """A new supervisor that finds everything as it was writes nothing."""
    bench.etcd.write(Layout().status_key(ONE), status(ONE).to_json())
    bench.etcd.write(Layout().status_key(TWO), status(TWO, host="b").to_json())
    bench.etcd.write("/kvmsupervisor/instances/..", status(TWO).to_json())
    bench.etcd.write("/kvmsupervisor/instances/x", b'\xff"a"')
    bench.status_writer.prime(bench.listed())
    assert bench.status_writer.ids() == {ONE}
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        await settle()
        assert bench.etcd.calls.total() == 0
        status_writer.set(TWO, status(TWO))
        await settle()
        assert bench.value(TWO) == status(TWO).to_json()


@pytest.mark.parametrize("only", [None, ONE])
async def test_what_the_keys_hold_is_learnt_as_soon_as_etcd_says(bench: Bench, only: InstanceId | None) -> None:
    """This host's statuses, and that there are others'; while etcd is away it is asked again, not in a loop."""
    bench.etcd.write(Layout().status_key(ONE), status(ONE).to_json())
    bench.etcd.write(Layout().status_key(TWO), status(TWO, host="b").to_json())
    bench.etcd.away()
    learning = asyncio.create_task(bench.status_writer.learn(only))
    await bench.clock.advance(60)
    assert not learning.done()
    assert 1 < bench.etcd.calls.total() < 30
    bench.etcd.back()
    await bench.clock.advance(60)
    others = {TWO: None} if only is None else {}
    assert await learning == {ONE: status(ONE), **others}
    assert bench.status_writer.ids() == {ONE}
    assert await bench.status_writer.learn(TWO) == {TWO: None}


async def test_changes_wait_for_each_other(bench: Bench) -> None:
    """What changes shortly after another change is written with it, once: a start has five statuses in a moment."""
    bench.status_writer = bench.make(gather_s=0.05)
    async with bench.running() as status_writer:
        for turn in range(3):
            status_writer.set(ONE, status(ONE, str(turn)))
            status_writer.set(TWO, status(TWO, str(turn)))
            await bench.clock.advance(0.02)
        assert bench.value(ONE) == status(ONE, "2").to_json()
        assert bench.value(TWO) == status(TWO, "2").to_json()
        assert bench.etcd.calls == {"txn": 1}


async def test_many_changes_are_written_now_and_then(bench: Bench) -> None:
    """Law: a few writes in a row need no pause; then each waits for its turn, and holds the last value."""
    bench.status_writer = bench.make(gather_s=0.05, spread_s=0.25)
    async with bench.running() as status_writer:
        for turn in range(BURST):
            status_writer.set(ONE, status(ONE, f"early {turn}"))
            await bench.clock.advance(0.05)
            assert bench.value(ONE) == status(ONE, f"early {turn}").to_json()
        for turn in range(3):
            status_writer.set(ONE, status(ONE, str(turn)))
            await bench.clock.advance(0.04)
        assert bench.value(ONE) == status(ONE, f"early {BURST - 1}").to_json()
        await bench.clock.advance(0.05)
        assert bench.value(ONE) == status(ONE, "2").to_json()
        assert bench.etcd.calls == {"txn": BURST + 1}
        await bench.clock.advance(2.0)
        status_writer.set(ONE, status(ONE, "later"))
        await bench.clock.advance(0.05)
        assert bench.value(ONE) == status(ONE, "later").to_json()


async def test_what_fills_a_transaction_waits_for_nothing(bench: Bench) -> None:
    """Law: the pause after a write is there to gather; a full transaction has gathered."""
    ids = [InstanceId(str(index)) for index in range(2 * OPS_PER_TXN)]
    bench.status_writer = bench.make(spread_s=0.25)
    async with bench.running() as status_writer:
        for instance in ids:
            status_writer.set(instance, status(instance, "x"))
        await settle()
        assert all(bench.value(i) == status(i, "x").to_json() for i in ids)


async def test_a_flush_waits_for_nothing(bench: Bench) -> None:
    """Law: whoever stops does not wait for changes to come."""
    bench.status_writer = bench.make(gather_s=0.05, spread_s=0.25)
    async with bench.running() as status_writer:
        for turn in range(BURST):
            status_writer.set(ONE, status(ONE, str(turn)))
            await bench.clock.advance(0.05)
        status_writer.set(ONE, status(ONE, "last"))
        await settle()
        begun = bench.clock.now()
        assert await status_writer.flush(2.0)
        assert bench.clock.now() == begun
        assert bench.value(ONE) == status(ONE, "last").to_json()


async def test_a_burst_becomes_few_transactions_with_the_latest_values(bench: Bench) -> None:
    """Coalesced per instance; at most 64 in a transaction."""
    ids = [InstanceId(str(index)) for index in range(130)]
    async with bench.running() as status_writer:
        for turn in range(5):
            for instance in ids:
                status_writer.set(instance, status(instance, str(turn)))
        await settle()
        assert [bench.value(i) for i in ids] == [status(i, "4").to_json() for i in ids]
        assert len(bench.etcd.writes) == 130
        assert bench.etcd.calls["txn"] == -(-130 // OPS_PER_TXN)


async def test_large_values_make_smaller_transactions(bench: Bench) -> None:
    """A request stays far below what etcd accepts."""
    sizes: list[int] = []
    real = bench.etcd.txn

    async def txn(compare: object, ops: list[Put], *args: object, **kwargs: object) -> object:
        sizes.append(sum(len(op.value) for op in ops))
        return await real(compare, ops)  # type: ignore[arg-type]

    bench.etcd.txn = txn  # type: ignore[method-assign,assignment]
    async with bench.running() as status_writer:
        for index in range(40):
            status_writer.set(InstanceId(str(index)), status(InstanceId(str(index)), "x" * 60_000))
        await settle()
        assert len(bench.listed()) == 40
        assert max(sizes) <= BYTES_PER_TXN


async def test_ten_thousand_problems_are_cut_to_what_fits(bench: Bench) -> None:
    """The first ones and how many there are besides."""
    problems = tuple(f"key{index}: found 'é'; unknown key" for index in range(10_000))
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE, problems=problems))
        await settle()
        value = bench.value(ONE)
        assert value is not None
        assert len(value) <= VALUE_BYTES
        kept = Status.from_json(value)
        assert kept is not None
        assert kept.problems[:3] == problems[:3]
        left = 10_000 - (len(kept.problems) - 1)
        assert kept.problems[-1] == f"and {left} more problems, see `kvmsupervisor check`"


async def test_values_set_during_a_write_follow_it(bench: Bench) -> None:
    """The latest value wins, in the end."""
    async with bench.running() as status_writer:

        async def meanwhile(call: str) -> None:
            bench.etcd.hook = None
            status_writer.set(ONE, status(ONE, "second"))

        bench.etcd.hook = meanwhile
        status_writer.set(ONE, status(ONE, "first"))
        await settle()
        assert bench.value(ONE) == status(ONE, "second").to_json()


async def test_without_a_session_nothing_is_asked(bench: Bench) -> None:
    """It waits, and goes on when the session is won."""
    bench.session.turn(held=False)
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        await bench.clock.advance(60)
        assert bench.etcd.calls.total() == 0
        bench.session.turn(held=True)
        await settle()
        assert bench.value(ONE) == status(ONE).to_json()
    assert bench.session.listeners == []


async def test_a_frozen_hosts_late_write_changes_nothing(bench: Bench) -> None:
    """Its session is gone in etcd, though it does not know yet; neither does it ask in a hurry."""
    theirs = status(ONE, host="b").to_json()
    async with bench.running() as status_writer:
        status_writer.set(TWO, status(TWO))
        await settle()
        bench.etcd.erase(SESSION_KEY)
        bench.etcd.write(Layout().status_key(ONE), theirs)
        status_writer.set(ONE, status(ONE))
        status_writer.forget(TWO)
        await bench.clock.advance(60)
        assert bench.value(ONE) == theirs
        assert bench.value(TWO) == status(TWO).to_json()
        assert bench.etcd.calls["txn"] < 30


async def test_etcd_away_is_waited_out(bench: Bench) -> None:
    """One line in the log, growing pauses, and then the latest value."""
    with capture_logs() as logs:
        async with bench.running() as status_writer:
            bench.etcd.away()
            status_writer.set(ONE, status(ONE, "first"))
            await bench.clock.advance(60)
            status_writer.set(ONE, status(ONE, "second"))
            await bench.clock.advance(60)
            assert bench.etcd.calls["txn"] < 60
            bench.etcd.back()
            await bench.clock.advance(6)
            assert bench.value(ONE) == status(ONE, "second").to_json()
            assert len(bench.etcd.writes) == 1
    assert [line["event"] for line in logs] == ["publisher.away", "publisher.back"]


@pytest.mark.parametrize("applied", [True, False])
async def test_after_a_lost_reply_the_key_is_written_again(bench: Bench, applied: bool) -> None:
    """Also when the value is back at what was known before: the key may hold the other one."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE, "old"))
        await settle()
        bench.etcd.lose_next_reply() if applied else bench.etcd.lose_next_request()
        status_writer.set(ONE, status(ONE, "new"))
        await settle()
        status_writer.set(ONE, status(ONE, "old"))
        await bench.clock.advance(1)
        assert bench.value(ONE) == status(ONE, "old").to_json()
        assert await status_writer.flush(0)


async def test_what_the_key_held_before_a_lost_reply_is_written_again(bench: Bench) -> None:
    """While a write is on its way, what the key held before it is wanted again; then its reply is lost (seed 4161)."""
    bench.status_writer.set(ONE, status(ONE, "before"))
    async with bench.running() as status_writer:
        await bench.clock.advance(5)

        async def meanwhile(call: str) -> None:
            bench.etcd.hook = None
            status_writer.set(ONE, status(ONE, "before"))

        bench.etcd.hook = meanwhile
        bench.etcd.lose_next_reply()
        status_writer.set(ONE, status(ONE, "for a moment"))
        await bench.clock.advance(60)
        assert bench.value(ONE) == status(ONE, "before").to_json()


async def test_a_list_from_before_a_write_is_not_believed(bench: Bench) -> None:
    """A write of the former history's time comes after the list of the keys, which is read while another is under way.

    Simulation, seed 2475: the status of before stayed although another one was wanted.
    """
    bench.status_writer.set(ONE, status(ONE, "wanted"))
    async with bench.running() as status_writer:
        await settle()
        listed = bench.listed()
        bench.etcd.write(Layout().status_key(ONE), status(ONE, "of a moment").to_json())
        status_writer.begin_anew()

        async def meanwhile(call: str) -> None:
            bench.etcd.hook = None
            status_writer.prime(listed)

        bench.etcd.hook = meanwhile
        status_writer.set(ONE, status(ONE, "wanted"))
        await bench.clock.advance(60)
        assert bench.value(ONE) == status(ONE, "wanted").to_json()


async def test_forgetting_deletes_what_is_ours(bench: Bench) -> None:
    """One of this host's statuses, written by this process or an earlier one; once."""
    bench.etcd.write(Layout().status_key(ONE), status(ONE).to_json())
    bench.status_writer.prime(bench.listed())
    async with bench.running() as status_writer:
        status_writer.set(TWO, status(TWO))
        await settle()
        status_writer.forget(ONE)
        status_writer.forget(TWO)
        await settle()
        assert bench.listed() == []
        assert status_writer.ids() == set()
        bench.etcd.calls.clear()
        status_writer.forget(ONE)
        await settle()
        assert await status_writer.flush(0)
        assert bench.etcd.calls.total() == 0


@pytest.mark.parametrize("theirs", [status(ONE, host="b").to_json(), b"written by hand", None])
async def test_forgetting_leaves_anothers_value(bench: Bench, theirs: bytes | None) -> None:
    """The next owner's status stays; a key that is gone already is no trouble."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        status_writer.set(TWO, status(TWO))
        await settle()
        if theirs is None:
            bench.etcd.erase(Layout().status_key(ONE))
        else:
            bench.etcd.write(Layout().status_key(ONE), theirs)
        status_writer.forget(ONE)
        status_writer.forget(TWO)
        await settle()
        assert bench.value(ONE) == theirs
        assert bench.value(TWO) is None
        assert await status_writer.flush(0)


async def test_a_value_written_between_look_and_deletion_stays(bench: Bench) -> None:
    """The deletion compares what was looked at."""
    theirs = status(ONE, host="b").to_json()
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        await settle()
        calls = 0

        async def between(call: str) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                bench.etcd.write(Layout().status_key(ONE), theirs)

        bench.etcd.hook = between
        status_writer.forget(ONE)
        await bench.clock.advance(5)
        assert bench.value(ONE) == theirs
        assert await status_writer.flush(0)


RUNS = replace(status(ONE, "runs", epoch=3), pid=7)
LAST = replace(status(ONE, "its `host` is b", epoch=3), phase=Phase.STOPPED)
THEIRS = status(ONE, "waits", host="b", epoch=3)


@pytest.mark.parametrize("wanted", [RUNS, LAST], ids=["told of it", "was to tell of its end"])
@pytest.mark.parametrize("theirs", [None, THEIRS], ids=["ours", "another host's"])
async def test_what_leaves_is_not_said_to_live_here(bench: Bench, wanted: Status, theirs: Status | None) -> None:
    """Nobody else may correct a status of this host: it is written for the last time, when etcd has space again."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, RUNS)
        await settle()
        bench.etcd.fill()
        status_writer.set(ONE, wanted)
        status_writer.leave(ONE, LAST)
        await bench.clock.advance(60)
        assert bench.value(ONE) == RUNS.to_json()
        if theirs is not None:
            bench.etcd.write(Layout().status_key(ONE), theirs.to_json())
        bench.etcd.make_space()
        await bench.clock.advance(60)
        assert bench.value(ONE) == (theirs or LAST).to_json()
        assert status_writer.ids() == set()
        assert await status_writer.flush(0)


async def test_what_left_with_its_lock_has_said_so(bench: Bench) -> None:
    """Nothing is asked: the release has written the last status. Wanted again, it is written again."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, RUNS)
        await settle()
        bench.etcd.write(Layout().status_key(ONE), LAST.to_json())
        status_writer.wrote(ONE, LAST.to_json(), bench.etcd.revision)
        bench.etcd.calls.clear()
        status_writer.leave(ONE, replace(LAST, reason="in other words"))
        await settle()
        assert bench.etcd.calls.total() == 0
        assert status_writer.ids() == set()
        status_writer.set(ONE, RUNS)
        status_writer.leave(ONE, LAST)
        status_writer.set(ONE, RUNS)
        status_writer.forget(ONE)
        await bench.clock.advance(1)
        assert bench.value(ONE) == LAST.to_json()


async def test_forgotten_and_wanted_again(bench: Bench) -> None:
    """The last word counts, at whatever moment it comes."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        status_writer.forget(ONE)
        await settle()
        assert bench.etcd.writes == []
        for steps in range(6):
            status_writer.set(ONE, status(ONE))
            await settle()
            status_writer.forget(ONE)
            for _ in range(steps):
                await asyncio.sleep(0)
            status_writer.set(ONE, status(ONE))
            await settle()
            assert bench.value(ONE) == status(ONE).to_json()
            status_writer.set(ONE, status(ONE, "other"))
            for _ in range(steps):
                await asyncio.sleep(0)
            status_writer.forget(ONE)
            await settle()
            assert bench.value(ONE) is None


async def test_what_another_host_may_have_written_is_written_over(bench: Bench) -> None:
    """A key in doubt gets the next status although it is the one that was written last; a deletion stays wanted."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        await settle()
        bench.etcd.write(Layout().status_key(ONE), b"another host's")
        status_writer.doubt(ONE)
        status_writer.set(ONE, status(ONE))
        await bench.clock.advance(1)
        assert bench.value(ONE) == status(ONE).to_json()
        status_writer.forget(ONE)
        status_writer.doubt(ONE)
        await bench.clock.advance(1)
        assert bench.value(ONE) is None


@pytest.mark.parametrize("others", [b"another host's", None])
async def test_what_was_written_while_the_session_was_lost_is_written_over(bench: Bench, others: bytes | None) -> None:
    """Others may speak for a host that has no session. Once it has one again, its own word counts (seed 559)."""
    names = [InstanceId(f"i{number}") for number in range(2 * OPS_PER_TXN)]
    async with bench.running() as status_writer:
        for name in names:
            status_writer.set(name, status(name))
        await bench.clock.advance(60)
        bench.session.turn(held=False)
        if others is None:
            bench.etcd.erase(Layout().status_key(names[-1]))
        else:
            bench.etcd.write(Layout().status_key(names[-1]), others)
        revision = bench.etcd.revision
        bench.etcd.fail_next(Unavailable("not now"))
        bench.session.turn(held=True)
        await bench.clock.advance(60)
        assert bench.value(names[-1]) == status(names[-1]).to_json()
        assert bench.etcd.revision == revision + 1


@pytest.mark.parametrize("cause", ["an event", "the session"])
async def test_what_another_host_speaks_for_is_left_alone(bench: Bench, cause: str) -> None:
    """Neither an event nor a session that is back writes an old status over another host's (seed 1734)."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        await bench.clock.advance(5)
        bench.etcd.write(Layout().status_key(ONE), b"another host's")
        status_writer.cede(ONE)
        if cause == "an event":
            status_writer.note(ONE, made(RESET, status(ONE), at="now"))
        else:
            bench.session.turn(held=False)
            bench.session.turn(held=True)
        await bench.clock.advance(60)
        assert bench.value(ONE) == b"another host's"
        assert await status_writer.flush(0)
        status_writer.set(ONE, status(ONE))
        await bench.clock.advance(60)
        assert bench.value(ONE) == status(ONE).to_json()


@pytest.mark.parametrize("ours", ["unknown", "written before", "on its way"])
async def test_a_later_epoch_stays(bench: Bench, ours: str) -> None:
    """Law 2: it alone says how far the instance came while nobody holds its lock. Who is behind is told, once."""
    theirs = status(ONE, host="b", epoch=3)
    told: list[str] = []

    async def meanwhile(call: str) -> None:
        bench.etcd.hook = None
        bench.etcd.write(Layout().status_key(ONE), theirs.to_json())

    async with bench.running() as status_writer:
        if ours == "written before":
            status_writer.set(ONE, status(ONE, epoch=1))
            await settle()
        if ours == "on its way":
            bench.etcd.hook = meanwhile
        else:
            await meanwhile("")
        status_writer.set(ONE, status(ONE, "late", epoch=2), overtaken=lambda: told.append("once"))
        status_writer.set(TWO, status(TWO))
        await settle()
        assert bench.value(ONE) == theirs.to_json()
        assert bench.value(TWO) == status(TWO).to_json()
        status_writer.set(ONE, status(ONE, "later still", epoch=2), overtaken=lambda: told.append("again"))
        await bench.clock.advance(60)
        assert bench.value(ONE) == theirs.to_json()
        assert told == ["once"]
        status_writer.set(ONE, status(ONE, epoch=3))
        await settle()
        assert bench.value(ONE) == status(ONE, epoch=3).to_json()
        assert await status_writer.flush(0)


async def test_a_key_that_was_deleted_is_written(bench: Bench) -> None:
    """By hand, say: what is not there tells of no epoch."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE, epoch=2))
        await settle()
        bench.etcd.erase(Layout().status_key(ONE))
        status_writer.set(ONE, status(ONE, "again", epoch=2))
        await settle()
        assert bench.value(ONE) == status(ONE, "again", epoch=2).to_json()


@pytest.mark.parametrize("fault", ["none", "reply", "request", "rejected"])
async def test_an_abandoned_key_is_left_to_its_next_owner(bench: Bench, fault: str) -> None:
    """Neither written nor deleted any more, at whatever moment it is abandoned."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        await settle()
        status_writer.abandon(ONE)
        assert status_writer.ids() == set()
        status_writer.forget(ONE)
        await settle()
        assert bench.value(ONE) == status(ONE).to_json()

        async def meanwhile(call: str) -> None:
            bench.etcd.hook = None
            status_writer.abandon(TWO)

        bench.etcd.hook = meanwhile
        match fault:
            case "reply":
                bench.etcd.lose_next_reply()
            case "request":
                bench.etcd.lose_next_request()
            case "rejected":
                bench.etcd.fail_next(Rejected("too large"))
        status_writer.set(TWO, status(TWO))
        assert not await status_writer.flush(0)
        await settle()
        assert status_writer.ids() == set()
        assert await status_writer.flush(0)
        bench.etcd.calls.clear()
        await bench.clock.advance(60)
        assert bench.etcd.calls.total() == 0
        status_writer.set(TWO, status(TWO, "again"))
        await bench.clock.advance(6)
        assert bench.value(TWO) == status(TWO, "again").to_json()


async def test_a_value_written_by_another_transaction_is_known(bench: Bench) -> None:
    """It replaces what waited to be written, and is not written again."""
    bench.session.turn(held=False)
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE, "older"))
        value = status(ONE, "newer").to_json()
        revision = await bench.etcd.put(Layout().status_key(ONE), value)
        status_writer.wrote(ONE, value, revision)
        bench.etcd.writes.clear()
        bench.session.turn(held=True)
        await settle()
        assert bench.etcd.writes == []
        status_writer.set(ONE, status(ONE, "newer"))
        await settle()
        assert bench.etcd.writes == []
        status_writer.forget(ONE)
        await settle()
        assert [type(op) for op in bench.etcd.writes] == [Delete, Delete]  # its status, and its events


async def test_a_write_on_its_way_does_not_undo_what_another_transaction_wrote(bench: Bench) -> None:
    """Whichever of the two etcd took last, the key ends with the newer status."""
    async with bench.running() as status_writer:
        value = status(ONE, "newer").to_json()

        async def overtaken(call: str) -> None:
            bench.etcd.hook = None
            bench.etcd.write(Layout().status_key(ONE), value)
            status_writer.wrote(ONE, value, bench.etcd.revision)

        bench.etcd.hook = overtaken
        status_writer.set(ONE, status(ONE, "older"))
        await settle()
        assert bench.value(ONE) == value


async def test_a_late_reply_does_not_hide_what_was_written_after(bench: Bench) -> None:
    """The revisions say which value the key holds, not the order in which replies come in."""
    async with bench.running() as status_writer:
        value = status(ONE, "newer").to_json()
        real = bench.etcd.txn

        async def late(*args: object, **kwargs: object) -> object:
            result = await real(*args, **kwargs)  # type: ignore[arg-type]
            bench.etcd.txn = real  # type: ignore[method-assign]
            bench.etcd.write(Layout().status_key(ONE), value)
            status_writer.wrote(ONE, value, bench.etcd.revision)
            return result

        bench.etcd.txn = late  # type: ignore[method-assign,assignment]
        status_writer.set(ONE, status(ONE, "older"))
        await settle()
        assert bench.value(ONE) == value
        assert len(bench.etcd.writes) == 1
        assert await status_writer.flush(0)


async def test_one_refused_value_does_not_stop_the_others(bench: Bench) -> None:
    """It is found by halving, told once, and tried again for ever without haste."""
    ids = [InstanceId(str(index)) for index in range(100)]
    real = bench.etcd.txn
    mended = False

    async def picky(compare: object, ops: list[Put], *args: object, **kwargs: object) -> object:
        if not mended and any(op.key.endswith("/13") for op in ops):
            bench.etcd.calls["refused"] += 1
            raise Rejected("etcdserver: request is too large")
        return await real(compare, ops)  # type: ignore[arg-type]

    bench.etcd.txn = picky  # type: ignore[method-assign,assignment]
    with capture_logs() as logs:
        async with bench.running() as status_writer:
            for instance in ids:
                status_writer.set(instance, status(instance))
            await bench.clock.advance(60)
            assert {kv.key.decode().rpartition("/")[2] for kv in bench.listed()} == set(ids) - {"13"}
            assert bench.etcd.calls["refused"] < 40
            assert not await status_writer.flush(0)
            assert any(line["event"] == "publisher.rejected" for line in logs)
            mended = True
            await bench.clock.advance(6)
            assert len(bench.listed()) == 100
            assert await status_writer.flush(0)
            # Large transactions again, once all is well.
            bench.etcd.calls.clear()
            for instance in ids:
                status_writer.set(instance, status(instance, "later"))
            await settle()
            assert bench.etcd.calls["txn"] < 10


async def test_flush_waits_until_all_is_written_or_the_time_is_up(bench: Bench) -> None:
    """For an orderly stop."""
    async with bench.running() as status_writer:
        assert await status_writer.flush(0)
        bench.etcd.fail_next(Unavailable("for a moment"))
        status_writer.set(ONE, status(ONE))
        flushed = asyncio.create_task(status_writer.flush(5))
        await bench.clock.advance(4)
        assert flushed.result() is True
        assert bench.value(ONE) is not None
        bench.etcd.away()
        status_writer.set(ONE, status(ONE, "x"))
        flushed = asyncio.create_task(status_writer.flush(5))
        await bench.clock.advance(4)
        assert not flushed.done()
        await bench.clock.advance(1)
        assert flushed.result() is False


def test_the_host_is_told_from_its_namesakes() -> None:
    """Only the status's own `host` says whose it is, not a reason that mentions the name."""
    bench = Bench()
    theirs = status(ONE, 'lock is held by "a"', host="b").to_json()
    assert json.loads(theirs)["host"] == "b"
    bench.status_writer.prime([KeyValue(Layout().status_key(ONE).encode(), theirs, 2, 2)])
    assert bench.status_writer.ids() == set()
