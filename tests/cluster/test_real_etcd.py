"""Session, informer and status writer on a real etcd: what only the server's own behaviour can show."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Set
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import Etcd, EtcdConfig, Page
from kvmsupervisor.adapters.etcd.api import Event, KeyValue
from kvmsupervisor.cluster.informer import Informer
from kvmsupervisor.cluster.session import HostnameTaken, Session
from kvmsupervisor.cluster.status_writer import StatusWriter
from kvmsupervisor.domain.grouping import Flat
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.status import Phase, Status
from tests.fakes.history import SameHistory
from tests.support.etcd import EtcdCluster, EtcdServer
from tests.support.invariants import Followed, Value

ME = HostSession(host="a", version="1", url="http://a:9746", boot_id="boot-1", machine="machine-a")
ONE = InstanceId("1")


@pytest.fixture
def server() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
async def etcd(server: EtcdServer) -> AsyncIterator[Etcd]:
    etcd = Etcd(EtcdConfig(endpoints=(server.endpoint,)))
    yield etcd
    await etcd.close()


def make_session(etcd: Etcd, folder: Path, value: HostSession = ME, ttl_s: int = 3) -> Session:
    folder.mkdir(exist_ok=True)
    return Session(store=etcd, clock=Clock(), layout=Layout(), value=value, run_dir=folder, ttl_s=ttl_s)


@asynccontextmanager
async def running(run: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    task = asyncio.create_task(run)
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def until(session: Session, *, held: bool) -> None:
    """Wait for the session to be won or lost, as told to its listeners."""
    turned = asyncio.Event()
    end = session.listen(turned.set)
    while session.held is not held:
        turned.clear()
        await turned.wait()
    end()


def proposals(server: EtcdServer) -> int:
    """What the member has put to the vote since its start: every write, and the ends of leases."""
    url = f"http://127.0.0.1:{server.member.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        found = re.search(rb"^etcd_server_proposals_committed_total (\S+)$", reply.read(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


async def test_an_idle_session_outlives_its_ttl_and_proposes_nothing(
    server: EtcdServer, etcd: Etcd, tmp_path: Path
) -> None:
    """Renewals keep the same key, and neither they nor the confirming transactions are written to the log."""
    session = make_session(etcd, tmp_path, ttl_s=2)
    async with running(session.run()):
        await until(session, held=True)
        before, revision = proposals(server), session.create_revision
        await asyncio.sleep(3)
        assert session.create_revision == revision > 0
        assert proposals(server) == before
        assert session.lost_count == 0


async def test_a_member_without_a_quorum_confirms_nothing(tmp_path: Path) -> None:
    """The session is lost though one member still listens; with the others it is back."""
    with EtcdCluster(3) as cluster:
        lonely, *others = [*cluster.followers(), cluster.leader()]
        etcd = Etcd(EtcdConfig(endpoints=(lonely.endpoint,)))
        session = make_session(etcd, tmp_path, ttl_s=2)
        async with running(session.run()):
            await until(session, held=True)
            for member in others:
                member.freeze()
            await until(session, held=False)
            for member in others:
                member.thaw()
            await until(session, held=True)
        await etcd.close()


async def test_resuming_and_rebooting(etcd: Etcd, tmp_path: Path) -> None:
    """The same boot goes on with the session, another boot of the machine replaces it; neither waits for a TTL."""
    session = make_session(etcd, tmp_path, ttl_s=60)
    async with running(session.run()):
        await until(session, held=True)
        revision = session.create_revision
    resumed = make_session(etcd, tmp_path, replace(ME, version="2"), ttl_s=60)
    async with running(resumed.run()):
        await until(resumed, held=True)
        assert resumed.create_revision == revision
    longer = make_session(etcd, tmp_path, replace(ME, version="2"), ttl_s=90)
    async with running(longer.run()):
        await until(longer, held=True)
        assert longer.create_revision == revision
        assert longer.remaining_s > 60
    rebooted = make_session(etcd, tmp_path / "fresh", replace(ME, boot_id="boot-2"), ttl_s=60)
    async with running(rebooted.run()):
        await until(rebooted, held=True)
        assert rebooted.create_revision > revision


async def test_a_frozen_etcd_loses_the_session_and_gives_it_back(
    server: EtcdServer, etcd: Etcd, tmp_path: Path
) -> None:
    """Every call ends by its deadline, so the loss is told; afterwards the session is there again."""
    session = make_session(etcd, tmp_path, ttl_s=2)
    async with running(session.run()):
        await until(session, held=True)
        server.member.freeze()
        await until(session, held=False)
        server.member.thaw()
        await until(session, held=True)
        assert session.lost_count == 1


async def test_a_living_namesake_is_found_and_a_dead_one_waited_out(etcd: Etcd, tmp_path: Path) -> None:
    """What etcd tells of a lease's rest is enough to tell the two apart."""
    first = make_session(etcd, tmp_path / "first", ttl_s=2)
    async with running(first.run()):
        await until(first, held=True)
        second = make_session(etcd, tmp_path / "second", replace(ME, machine="machine-b"))
        with pytest.raises(HostnameTaken, match="http://a:9746"):
            await second.run()
        assert first.lost_count == 0
    third = make_session(etcd, tmp_path / "third", replace(ME, machine="machine-b"))
    async with running(third.run()):
        await until(third, held=True)


async def test_the_mirror_after_a_compaction(server: EtcdServer, etcd: Etcd) -> None:
    """History that is gone before the watch begins: listed again, the difference told, then in step."""
    truth: list[Event] = []

    async def put(key: str, value: bytes) -> int:
        revision = await etcd.put(key, value)
        truth.append(Event(KeyValue(key.encode(), value, revision, 0), deleted=False))
        return revision

    await put("/p/a", b"1")
    await put("/p/b", b"1")
    real = etcd.pages
    told: list[set[bytes]] = []
    wrong: list[str] = []
    table = Flat()
    follows: Followed[bytes] = Followed(lambda key: key)
    news = asyncio.Event()

    def held(key: bytes) -> Value:
        entry = table.get(key)
        return None if entry is None else (entry.value, entry.mod_revision)

    def note(keys: Set[bytes], revision: int) -> None:
        events = [one for one in truth if follows.revision < one.kv.mod_revision <= revision]
        if len(told) < 2:
            wrong.extend(follows.told(keys, revision, events=events, held=held))
        told.append(set(keys))
        news.set()

    async def late(prefix: str, *, page: int = 10_000) -> AsyncGenerator[Page, None]:
        etcd.pages = real  # type: ignore[method-assign]
        async for listing in real(prefix, page=page):
            await put("/p/a", b"2")
            revision = await put("/p/c", b"1")
            await asyncio.to_thread(server.ctl, "compact", str(revision))
            yield listing

    etcd.pages = late  # type: ignore[method-assign]
    informer: Informer[bytes] = Informer(
        store=etcd, clock=Clock(), history=SameHistory(), prefix="/p/", table=table, on_change=note
    )
    async with running(informer.run()):
        while len(told) < 2:
            news.clear()
            await news.wait()
        assert told == [{b"/p/a", b"/p/b"}, {b"/p/a", b"/p/c"}]
        assert wrong == []
        news.clear()
        await asyncio.to_thread(server.ctl, "del", "--prefix", "/p/")
        await news.wait()
        assert told[2] == {b"/p/a", b"/p/b", b"/p/c"}
        assert table.entries == {}


async def test_the_publisher_writes_under_the_session_only(etcd: Etcd, tmp_path: Path) -> None:
    """Full transactions are accepted by a server with its default limits; the guard falls with the session."""
    session = make_session(etcd, tmp_path)
    status_writer = StatusWriter(store=etcd, clock=Clock(), layout=Layout(), host=HostName("a"), session=session)
    ids = [InstanceId(str(index)) for index in range(200)]
    async with running(session.run()), running(status_writer.run()):
        for instance in ids:
            reason = "x" * 30_000
            status_writer.set(instance, Status(id=instance, host="a", phase=Phase.RUNNING, reason=reason, since="now"))
        assert await status_writer.flush(60)
        assert len((await etcd.list(Layout().statuses_prefix)).kvs) == 200
        for instance in ids:
            status_writer.forget(instance)
        assert await status_writer.flush(60)
        assert (await etcd.list(Layout().statuses_prefix)).kvs == []
        revoked = await etcd.get(session.key)
        assert revoked is not None
        compare = session.compare()
        await etcd.revoke(revoked.lease)
        assert not (await etcd.txn([compare], [])).succeeded
