"""The watch against a server that does what real ones do once a year."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvmsupervisor.adapters.etcd import Compacted, Denied, Etcd, EtcdConfig, Event, KeyValue, Rejected, Watch
from kvmsupervisor.adapters.etcd import watch as watch_module
from kvmsupervisor.adapters.etcd.messages import event
from kvmsupervisor.adapters.etcd.protocol import rpc
from tests.adapters.etcd.scripted import Script, ScriptedEtcd, Stream
from tests.adapters.etcd.traffic import SOON_S, client

PERMISSION_DENIED = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
"""As etcd 3.4.23 phrases it."""


@asynccontextmanager
async def watching(*scripts: Script, start: int = 10) -> AsyncIterator[tuple[Watch, ScriptedEtcd]]:
    async with (
        asyncio.timeout(SOON_S),
        ScriptedEtcd(*scripts).running() as server,
        client([server.url]) as etcd,
        etcd.watch("/", start) as watch,
    ):
        yield watch, server


async def revisions(watch: Watch, batches: int) -> list[list[int]]:
    """The revisions of the events of the next batches."""
    found: list[list[int]] = []
    async for batch in watch:
        assert batch.revision == batch.events[-1].kv.mod_revision
        found.append([event.kv.mod_revision for event in batch.events])
        if len(found) == batches:
            break
    return found


async def test_old_events_are_dropped() -> None:
    """Events older than asked for, which a lagging member may send, are not handed on."""

    async def lagging(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(8, 9)
        await stream.send_puts(9, 10, 11)
        await stream.send_puts(11, 12)
        await stream.silence()

    async with watching(lagging) as (watch, _):
        assert await revisions(watch, 2) == [[10, 11], [12]]


async def test_a_watch_resumes_behind_the_last_event() -> None:
    """After a break the next stream begins behind the last event, whatever progress was reported."""
    starts: list[int] = []

    async def breaking(stream: Stream) -> None:
        await stream.accept(revision=20)
        starts.append(stream.start_revision)
        await stream.send_puts(12)
        await stream.send(header=rpc.ResponseHeader(revision=500), watch_id=-1)

    async def going_on(stream: Stream) -> None:
        await stream.accept(revision=500)
        starts.append(stream.start_revision)
        await stream.send_puts(12, 13)
        await stream.silence()

    async with watching(breaking, going_on) as (watch, _):
        assert await revisions(watch, 2) == [[12], [13]]
    assert starts == [10, 13]


async def test_fragments_never_split_a_revision() -> None:
    """A revision that goes on in the next fragment is held back; one that never ends is asked for again."""

    async def fragmenting(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10, 11, 11, fragment=True)
        await stream.send_puts(11, fragment=True)
        await stream.send_puts(11, 12)
        await stream.send_puts(13, 14, fragment=True)

    async def finishing(stream: Stream) -> None:
        await stream.accept(revision=20)
        assert stream.start_revision == 14
        await stream.send_puts(14, 14)
        await stream.silence()

    async with watching(fragmenting, finishing) as (watch, _):
        assert await revisions(watch, 4) == [[10], [11, 11, 11, 11, 12], [13], [14, 14]]


async def test_a_refused_watch_is_refused_though_it_says_created() -> None:
    """`canceled` counts before `created`: the user may not read the prefix."""

    async def refusing(stream: Stream) -> None:
        await stream.take()
        await stream.send(created=True, canceled=True, watch_id=-1, cancel_reason=PERMISSION_DENIED)

    async with watching(refusing) as (watch, _):
        with pytest.raises(Denied, match="permission denied"):
            await anext(aiter(watch))
        assert not watch.connected


async def test_a_denial_is_believed_with_a_fresh_token_only(tmp_path: Path) -> None:
    """A watch that is denied logs in anew and tries once more: some members say so of an expired token."""

    async def refusing(stream: Stream) -> None:
        await stream.take()
        await stream.send(created=True, canceled=True, watch_id=-1, cancel_reason=PERMISSION_DENIED)

    async def serving(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10)

    file = tmp_path / "password"
    file.write_text("x")
    async with ScriptedEtcd(refusing, serving, refusing, refusing).running() as server:
        etcd = Etcd(EtcdConfig(endpoints=(server.url,), username="me", password_file=file))
        async with asyncio.timeout(SOON_S), etcd.watch("/", 10) as watch:
            assert await revisions(watch, 1) == [[10]]
            assert server.logins == 2
            with pytest.raises(Denied):
                await anext(aiter(watch))
            assert server.logins == 3
        await etcd.close()


async def test_a_member_that_calls_have_given_up_is_left_by_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gets no answer takes the watch along to the next endpoint, however lively it seems."""
    monkeypatch.setattr(watch_module, "_SILENCE_S", 10 * SOON_S)

    async def quiet(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10)
        await stream.silence()

    async def serving(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(11)
        await stream.silence()

    async with (
        ScriptedEtcd(quiet).running() as one,
        ScriptedEtcd(serving).running() as two,
        client([one.url, two.url]) as etcd,
        etcd.watch("/", 10) as watch,
        asyncio.timeout(SOON_S),
    ):
        assert await revisions(watch, 1) == [[10]]
        one.mute = True
        await etcd.get("/a")
        assert await revisions(watch, 1) == [[11]]


async def test_an_unexplained_cancellation_is_tried_again() -> None:
    """A watch that a member cancels, for a cause that is not final, is created anew."""

    async def cancelling(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send(canceled=True, cancel_reason="some new reason")

    async def serving(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10)
        await stream.silence()

    async with watching(cancelling, serving) as (watch, _):
        assert await revisions(watch, 1) == [[10]]


async def test_compaction_surfaces_behind_the_events_before_it() -> None:
    """What came before the history broke is handed on first; then `Compacted` says where it begins."""

    async def compacting(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10)
        await stream.send(canceled=True, compact_revision=17)

    async with watching(compacting) as (watch, _):
        assert await revisions(watch, 1) == [[10]]
        with pytest.raises(Compacted) as caught:
            await anext(aiter(watch))
        assert caught.value.revision == 17


async def test_silence_is_probed_and_then_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent member is asked for a sign of life; one that gives it stays, one that does not is left."""
    monkeypatch.setattr(watch_module, "_SILENCE_S", 0.05)
    monkeypatch.setattr(watch_module, "_ANSWER_S", 0.5)
    answered = 0

    async def answering_twice(stream: Stream) -> None:
        nonlocal answered
        await stream.accept(revision=20)
        for _ in range(2):
            assert (await stream.take()).HasField("progress_request")
            await stream.send(watch_id=-1)
            answered += 1
        await stream.silence()

    async def serving(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10)
        await stream.silence()

    async with watching(answering_twice, serving) as (watch, server):
        assert await revisions(watch, 1) == [[10]]
        assert server.served == 2
    assert answered == 2


async def test_a_client_that_renews_a_lease_has_its_calls_tell_of_the_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long its session: a watch that asks between two renewals costs etcd more than they do."""
    monkeypatch.setattr(watch_module, "_SILENCE_S", 0.01)
    asked = asyncio.Event()

    async def quiet(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10)
        await stream.take()
        asked.set()

    async with ScriptedEtcd(quiet).running() as server:
        etcd = Etcd(EtcdConfig(endpoints=(server.url,), renewed_every_s=1000.0))
        async with etcd.watch("/", 10) as watch:
            assert await revisions(watch, 1) == [[10]]
            await asyncio.sleep(0.3)
            assert not asked.is_set()
        await etcd.close()


async def test_a_member_that_never_creates_the_watch_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that accepts the stream and says nothing does not hold the watch."""
    monkeypatch.setattr(watch_module, "_ANSWER_S", 0.1)

    async def serving(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10)
        await stream.silence()

    async with watching(Stream.silence, serving) as (watch, _):
        assert await revisions(watch, 1) == [[10]]


async def test_a_restored_etcd_is_noticed_by_its_revision() -> None:
    """A store older than what was seen, by a quorum's word, is another history: list again."""

    async def restored(stream: Stream) -> None:
        await stream.accept(revision=5)
        await stream.silence()

    async with watching(restored) as (watch, _):
        with pytest.raises(Compacted):
            await anext(aiter(watch))


async def test_a_restored_etcd_is_noticed_by_its_cluster_id() -> None:
    """Another cluster at the same address is another history, whatever its revision."""

    async def before(stream: Stream) -> None:
        await stream.accept(revision=20, cluster_id=1)

    async def after(stream: Stream) -> None:
        await stream.accept(revision=20, cluster_id=2)
        await stream.silence()

    async with watching(before, after) as (watch, _):
        with pytest.raises(Compacted):
            await anext(aiter(watch))


async def test_a_member_that_lags_is_no_restored_etcd() -> None:
    """A member behind the revision asked for is waited for, when a quorum knows that revision."""

    async def lagging(stream: Stream) -> None:
        await stream.accept(revision=5)
        await stream.send_puts(10)
        await stream.silence()

    server = ScriptedEtcd(lagging)
    server.revision = 20
    async with server.running(), client([server.url]) as etcd, etcd.watch("/", 10) as watch:
        assert await revisions(watch, 1) == [[10]]


def test_what_waits_for_the_consumer_is_bounded() -> None:
    """The reader is told to stop when enough is held, and to go on when that is taken."""
    buffer = watch_module._Buffer(1)
    value = bytes(1 << 20)
    revision = 0
    while buffer.room.is_set():
        revision += 1
        buffer.add([Event(KeyValue(b"/k", value, revision, 1), deleted=False)], unfinished=False)
    assert revision <= 1 + watch_module._BUFFER_BYTES // len(value)
    assert asyncio.run(buffer.get()) is not None
    assert buffer.room.is_set()


async def test_a_slow_consumer_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that wait at the server, because the reader stopped, all come when the consumer reads."""
    monkeypatch.setattr(watch_module, "_BUFFER_BYTES", 1)
    sent = asyncio.Event()
    read = 0

    async def flooding(stream: Stream) -> None:
        await stream.accept(revision=20)
        for revision in range(10, 510):
            await stream.send_puts(revision)
        sent.set()
        await stream.silence()

    def count(message: object) -> Event:
        nonlocal read
        read += 1
        return event(message)

    monkeypatch.setattr(watch_module, "event", count)
    async with watching(flooding) as (watch, _):
        await sent.wait()
        # Time for a reader that does not stop to be found out; one that stops needs none.
        await asyncio.sleep(0.1)
        assert read == 1
        assert await revisions(watch, 500) == [[revision] for revision in range(10, 510)]


async def test_an_event_beyond_all_limits_is_said_to_be_rejected() -> None:
    """A message larger than this client receives ends the watch with words, not with an endless loop."""

    async def huge(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send(events=[{"kv": {"key": b"/k", "value": b"x" * (65 << 20), "mod_revision": 10}}])
        await stream.silence()

    async with watching(huge) as (watch, _):
        with pytest.raises(Rejected, match="larger"):
            await anext(aiter(watch))


async def test_a_bug_in_the_reader_reaches_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expected is raised to who iterates; the watch does not fall silent."""

    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(watch_module, "event", broken)

    async def serving(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10)
        await stream.silence()

    async with watching(serving) as (watch, _):
        with pytest.raises(ZeroDivisionError):
            await anext(aiter(watch))


async def test_leaving_a_watch_ends_its_stream() -> None:
    """The end of the `async with` ends the stream at the server as well."""
    ended = asyncio.Event()

    async def serving(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.send_puts(10)
        try:
            await stream.silence()
        finally:
            ended.set()

    async with ScriptedEtcd(serving).running() as server, client([server.url]) as etcd:
        async with etcd.watch("/", 10) as watch:
            assert await revisions(watch, 1) == [[10]]
        async with asyncio.timeout(SOON_S):
            await ended.wait()


@pytest.mark.timeout(60)
async def test_a_watch_can_be_left_at_any_step_of_its_beginning() -> None:
    """Law: however little of its stream there is, its end does not wait for a beginning that never comes."""

    async def serving(stream: Stream) -> None:
        await stream.accept(revision=20)
        await stream.silence()

    async with ScriptedEtcd(serving).running() as server, client([server.url]) as etcd:
        await etcd.get("/a")
        for turns in range(40):
            async with asyncio.timeout(SOON_S):
                async with etcd.watch("/", 10):
                    for _ in range(turns):
                        await asyncio.sleep(0)
