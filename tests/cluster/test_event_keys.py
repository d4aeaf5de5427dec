"""Events keys: written with the status, never by themselves, and no event is lost, doubled or anybody else's."""

from __future__ import annotations

from dataclasses import replace

from kvmsupervisor.adapters.etcd.api import Put
from kvmsupervisor.domain.events import RESET, Event, from_json, to_json
from kvmsupervisor.domain.keys import InstanceId, Layout
from tests.cluster.test_status_writer import ONE, TWO, Bench, bench, status
from tests.fakes.clock import settle

__all__ = ["bench"]


def event(n: int, name: str = "instance.ended", reason: str = "crashed (signal 9)", host: str = "a") -> Event:
    return Event(at=f"2026-01-01T00:00:{n:02}Z", host=host, event=name, epoch=n, reason=reason)


def told(bench: Bench, instance: InstanceId = ONE) -> tuple[Event, ...]:
    return from_json(bench.etcd.data.get(Layout().events_key(instance), b""))


async def test_events_go_with_a_status_in_one_transaction(bench: Bench) -> None:
    """What has happened is never written by itself; and a repetition is not written again."""
    async with bench.running() as status_writer:
        status_writer.note(ONE, event(1))
        await settle()
        assert bench.etcd.writes == []
        status_writer.set(ONE, status(ONE))
        await settle()
        assert told(bench) == (event(1),)
        assert [type(op) for op in bench.etcd.writes] == [Put, Put]
        revisions = {kv.mod_revision for kv in bench.etcd._server.select("/kvmsupervisor/", prefix=True)}
        assert len(revisions) == 2  # of the session, and of this transaction
        status_writer.set(ONE, status(ONE))
        await bench.clock.advance(3600)
        assert len(bench.etcd.writes) == 2


async def test_what_a_status_does_not_show_is_written_all_the_same(bench: Bench) -> None:
    """A guest that rebooted itself; but nothing for what a new supervisor does to all its machines at once."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        await settle()
        status_writer.note(ONE, event(1, "instance.adopted"))
        await settle()
        assert told(bench) == ()
        status_writer.note(ONE, event(2, "instance.guest_reset"))
        await settle()
        assert told(bench) == (event(1, "instance.adopted"), event(2, "instance.guest_reset"))


async def test_another_hosts_history_goes_on(bench: Bench) -> None:
    """Before a move, and after one that came between two writes."""
    key = Layout().events_key(ONE)
    bench.etcd.write(key, to_json([event(1, host="b")])[0])
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        status_writer.note(ONE, event(2))
        await settle()
        assert told(bench) == (event(1, host="b"), event(2))
        away = [Put(Layout().status_key(ONE), status(ONE, host="b").to_json())]
        await bench.etcd.txn([], [*away, Put(key, to_json([event(3, host="b")])[0])])
        status_writer.set(ONE, status(ONE, "back"))
        status_writer.note(ONE, event(4))
        await settle()
        assert told(bench) == (event(3, host="b"), event(4))


async def test_a_lost_reply_loses_no_event_and_doubles_none(bench: Bench) -> None:
    """The key is read again."""
    async with bench.running() as status_writer:
        status_writer.note(ONE, event(1))
        status_writer.set(ONE, status(ONE))
        await settle()
        bench.etcd.lose_next_reply()
        status_writer.note(ONE, event(2))
        status_writer.set(ONE, status(ONE, "later"))
        await bench.clock.advance(60)
        assert told(bench) == (event(1), event(2))
        assert bench.value(ONE) == status(ONE, "later").to_json()


async def test_an_event_during_a_write_follows_it(bench: Bench) -> None:
    """And is not taken for one that was written."""
    async with bench.running() as status_writer:

        async def meanwhile(call: str) -> None:
            if call == "txn":
                bench.etcd.hook = None
                status_writer.note(ONE, event(2, RESET))

        bench.etcd.hook = meanwhile
        status_writer.note(ONE, event(1))
        status_writer.set(ONE, status(ONE))
        await settle()
        assert told(bench) == (event(1), event(2, RESET))


async def test_a_release_writes_what_is_not_written_yet(bench: Bench) -> None:
    """In its own transaction; the writer's is late then, and changes nothing."""
    bench.session.turn(held=False)
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE, "older"))
        status_writer.note(ONE, event(1))
        put = await status_writer.events_of(ONE)
        assert put is not None
        value = status(ONE, "newer").to_json()
        done = await bench.etcd.txn([], [Put(Layout().status_key(ONE), value), put.op])
        status_writer.wrote(ONE, value, done.revision, put)
        assert await status_writer.events_of(ONE) is None
        bench.etcd.writes.clear()
        bench.session.turn(held=True)
        await settle()
        assert bench.etcd.writes == []
        assert told(bench) == (event(1),)


async def test_another_history_of_etcd_gets_what_it_lacks(bench: Bench) -> None:
    """A restored backup has neither the status nor the last events; what it has stays (law 11)."""
    async with bench.running() as status_writer:
        status_writer.set(ONE, status(ONE))
        status_writer.note(ONE, event(1))
        status_writer.note(ONE, event(2))
        await settle()
        bench.etcd.write(Layout().events_key(ONE), to_json([event(1)])[0])
        bench.etcd.erase(Layout().status_key(ONE))
        status_writer.begin_anew()
        status_writer.set(ONE, status(ONE))
        await settle()
        assert told(bench) == (event(1), event(2))
        assert bench.value(ONE) == status(ONE).to_json()


async def test_the_events_of_a_removed_instance_go_with_its_status(bench: Bench) -> None:
    """And a last status takes the last events with it."""
    async with bench.running() as status_writer:
        for one in (ONE, TWO):
            status_writer.set(one, replace(status(one), pid=7))
            status_writer.note(one, event(1))
        await settle()
        status_writer.forget(ONE)
        status_writer.note(TWO, event(2))
        status_writer.leave(TWO, status(TWO, "last"))
        await settle()
        assert Layout().events_key(ONE) not in bench.etcd.data
        assert told(bench, TWO) == (event(1), event(2))


async def test_etcd_without_space_for_a_week_fills_no_memory(bench: Bench) -> None:
    """What could not be written is bounded, too, and is written then."""
    async with bench.running() as status_writer:
        bench.etcd.away()
        status_writer.set(ONE, status(ONE))
        for n in range(1000):
            status_writer.note(ONE, Event(at=str(n), host="a", event="instance.ended", epoch=n, reason="crashed"))
        await bench.clock.advance(60)
        bench.etcd.back()
        await bench.clock.advance(600)
        assert sum(one.times for one in told(bench)) == 1000
        assert told(bench)[-1].epoch == 999
