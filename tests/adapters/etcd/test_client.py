"""The client against one real member: what is lost on the way, pages, compaction, size."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.adapters.etcd import (
    Ambiguous,
    Compacted,
    Compare,
    EtcdConfig,
    Get,
    Put,
    Rejected,
    Target,
    Unavailable,
)
from kvmsupervisor.adapters.etcd.auth import Metadata
from kvmsupervisor.adapters.etcd.caller import Caller
from kvmsupervisor.adapters.etcd.channel import Endpoint
from kvmsupervisor.adapters.etcd.config import split_endpoint
from tests.adapters.etcd.traffic import SOON_S, client, follow
from tests.simulation.scale_real import proxied
from tests.support.etcd import EtcdServer, free_port
from tests.support.proxy import Proxy


@pytest.fixture
async def proxy(etcd_alone: EtcdServer) -> AsyncIterator[Proxy]:
    """A proxy before a member of this test's own."""
    async with Proxy().running() as made:
        made.target = etcd_alone.member.client_port
        yield made


def url(proxy: Proxy) -> str:
    return f"http://127.0.0.1:{proxy.port}"


async def test_a_lost_reply_is_ambiguous_and_never_repeated(etcd_alone: EtcdServer, proxy: Proxy) -> None:
    """A write that etcd did and never confirmed is `Ambiguous`, and was done once."""
    async with client([url(proxy)], call_timeout_s=1.0) as etcd, client(etcd_alone.endpoints) as other:
        assert await etcd.get("/lock") is None
        proxy.lose_replies()
        free = [Compare("/lock", Target.CREATE_REVISION, 0)]
        with pytest.raises(Ambiguous):
            await etcd.txn(free, [Put("/lock", b"mine, and nobody else's")])
        with pytest.raises(Ambiguous):
            await etcd.put("/other", b"1")
        proxy.heal()
        found = await etcd.get("/lock", timeout_s=SOON_S)
        assert found is not None
        assert found.value == b"mine, and nobody else's"
        last = await other.put("/last", b"")
        keys = [key for key, *_ in await follow(other, "/", 1, last)]
    assert keys == [b"/lock", b"/other", b"/last"]


async def test_a_lost_reply_to_a_read_is_not_ambiguous(proxy: Proxy) -> None:
    """What cannot write is `Unavailable` when no answer comes, transactions that only read included."""
    async with client([url(proxy)], call_timeout_s=0.5) as etcd:
        await etcd.get("/a")
        proxy.lose_replies()
        for reading in (etcd.get("/a"), etcd.txn([], [Get("/a")]), etcd.txn([], []), etcd.grant(60)):
            with pytest.raises(Unavailable) as caught:
                await reading
            assert not isinstance(caught.value, Ambiguous)


async def test_a_write_that_never_left_is_retried() -> None:
    """Where no connection could be made a write was certainly not done: the next endpoint gets it."""
    nobody = f"http://127.0.0.1:{free_port()}"
    with EtcdServer() as server:
        async with client([nobody, server.endpoint]) as etcd:
            assert await etcd.put("/a", b"1") > 0
        async with client([nobody], call_timeout_s=0.3) as etcd:
            with pytest.raises(Unavailable, match="refused") as caught:
                await etcd.put("/a", b"1")
            assert not isinstance(caught.value, Ambiguous)


async def test_a_lost_reply_to_a_grant_does_not_fail_it(etcd_alone: EtcdServer, proxy: Proxy) -> None:
    """A lease whose grant was not confirmed is found to exist by the next attempt, and is one lease."""
    async with Proxy().running() as losing:
        losing.target = etcd_alone.member.client_port
        async with client([url(losing), url(proxy)]) as etcd:
            await etcd.get("/a")
            losing.lose_replies()
            lease = await etcd.grant(60)
            leases = await asyncio.to_thread(etcd_alone.ctl, "lease", "list")
    assert leases.split() == ["found", "1", "leases", f"{lease:016x}"]


async def test_a_cancelled_call_ends_at_once(proxy: Proxy) -> None:
    """Cancelling a call that waits for an answer, or for a connection, raises just that."""
    async with client([url(proxy)], call_timeout_s=SOON_S) as etcd:
        await etcd.get("/a")
        proxy.hole()
        for _ in range(2):
            waiting = asyncio.create_task(etcd.get("/a"))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            proxy.cut()
        proxy.heal()
        await etcd.get("/a")


async def test_a_compaction_while_cut_off_surfaces(etcd_alone: EtcdServer, proxy: Proxy) -> None:
    """A watch that missed history which no longer exists says so, instead of going on behind it."""
    async with client([url(proxy)]) as etcd, client(etcd_alone.endpoints) as other:
        first = await other.put("/a", b"1")
        async with etcd.watch("/", first) as watch, asyncio.timeout(SOON_S):
            batches = aiter(watch)
            await anext(batches)
            proxy.hole()
            await other.put("/a", b"2")
            last = await other.put("/a", b"3")
            await asyncio.to_thread(etcd_alone.ctl, "compact", str(last))
            proxy.cut()
            proxy.heal()
            with pytest.raises(Compacted) as caught:
                await anext(batches)
        assert caught.value.revision == last
        listing = await etcd.list("/")
        assert [kv.value for kv in listing.kvs] == [b"3"]


async def test_a_compaction_in_the_middle_of_a_listing_surfaces(
    etcd_alone: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing whose revision goes away between two pages raises `Compacted`, never a mixture."""
    async with client(etcd_alone.endpoints) as etcd, client(etcd_alone.endpoints) as other:
        await other.txn([], [Put(f"/k/{number:03}", b"1") for number in range(100)])
        pages = 0
        read_page = etcd._range

        async def compact_after_the_third(what: str, message: Any, timeout_s: float | None) -> Any:
            nonlocal pages
            pages += 1
            reply = await read_page(what, message, timeout_s)
            if pages == 3:
                last = await other.put("/k/000", b"2")
                await asyncio.to_thread(etcd_alone.ctl, "compact", str(last))
            return reply

        monkeypatch.setattr(etcd, "_range", compact_after_the_third)
        with pytest.raises(Compacted):
            await etcd.list("/k/", page=10)
        assert len((await etcd.list("/k/", page=10)).kvs) == 100


async def test_large_values_make_pages_smaller(etcd_alone: EtcdServer) -> None:
    """A page that no reply can hold is asked for in smaller ones, and nothing is missing."""
    async with client(etcd_alone.endpoints) as etcd:
        for number in range(70):
            await etcd.put(f"/big/{number:02}", bytes(1 << 20))
        listing = await etcd.list("/big/")
        assert [kv.key.decode() for kv in listing.kvs] == [f"/big/{number:02}" for number in range(70)]
        with pytest.raises(Rejected, match="at once"):
            await etcd.txn([], [Get("/big/", prefix=True)])


async def test_a_value_that_is_too_large_is_rejected(etcd_server: EtcdServer, etcd_prefix: str) -> None:
    """The limit (1.5 MiB by default) is the caller's to keep, and no reason to call etcd away."""
    async with client(etcd_server.endpoints) as etcd:
        for size in (1800 << 10, 4 << 20):
            with pytest.raises(Rejected, match=f"put {etcd_prefix}/a: .*too large"):
                await etcd.put(f"{etcd_prefix}/a", bytes(size))
        assert etcd.up


async def test_up_tells_how_the_last_request_went(proxy: Proxy) -> None:
    """`up` is false before the first answer, true after one, false after none, and true again."""
    async with client([url(proxy)], call_timeout_s=0.3) as etcd:
        assert not etcd.up
        await etcd.get("/a")
        assert etcd.up
        proxy.hole()
        with pytest.raises(Unavailable):
            await etcd.get("/a")
        assert not etcd.up
        proxy.heal()
        await etcd.get("/a", timeout_s=SOON_S)
        assert etcd.up


async def test_calls_in_flight_end_when_the_client_is_closed(proxy: Proxy) -> None:
    """`close` ends what waits, with `Unavailable` (a write: `Ambiguous`) and not with a cancellation."""
    async with client([url(proxy)], call_timeout_s=SOON_S) as etcd:
        await etcd.get("/a")
        proxy.hole()
        waiting = [asyncio.create_task(etcd.get("/a")), asyncio.create_task(etcd.put("/a", b"1"))]
        await asyncio.wait(waiting, timeout=0.1)
        await etcd.close()
        async with asyncio.timeout(SOON_S):
            reading, writing = await asyncio.gather(*waiting, return_exceptions=True)
    assert type(reading) is Unavailable
    assert type(writing) is Ambiguous


@pytest.mark.parametrize(("repeatable", "kind"), [(True, Unavailable), (False, Ambiguous)])
async def test_a_stream_that_grpc_gives_up_is_a_failure(
    etcd_alone: EtcdServer, *, repeatable: bool, kind: type[Exception]
) -> None:
    """Law: nobody asked the task to end, so it does not: a session's was gone in silence, for good."""
    caller = Caller(EtcdConfig(endpoints=tuple(etcd_alone.endpoints)))

    async def send(endpoint: Endpoint, metadata: Metadata, timeout_s: float) -> None:
        stream = endpoint.lease.LeaseKeepAlive(metadata=metadata, timeout=timeout_s)
        stream.cancel()
        async for _ in stream:
            pass

    try:
        with pytest.raises(kind, match=r"gRPC gave the call up|unknown whether etcd did it"):
            await caller.call("renew a lease", send, timeout_s=0.3, repeatable=repeatable)
    finally:
        await caller.close()


async def test_a_lease_is_renewed_through_etcds_grpc_proxy(etcd_alone: EtcdServer, tmp_path: Path) -> None:
    """Law: each renewal is answered. The proxy takes its time, and forgets who has closed the stream before."""
    with proxied(etcd_alone, tmp_path) as (_, endpoint):
        async with client([endpoint]) as etcd:
            lease = await etcd.grant(60)
            assert [await etcd.keep_alive(lease, timeout_s=10.0) for _ in range(3)] == [60, 60, 60]


MANY_KEYS = 80_000


async def test_many_keys_take_little_memory_and_leave_the_loop_free(etcd_alone: EtcdServer) -> None:
    """80,000 keys (8 MB) stay below 100 MB in a process of its own, whose loop turns between the pages."""
    async with client(etcd_alone.endpoints) as etcd:
        for begin in range(0, MANY_KEYS, 100):
            await etcd.txn(
                [], [Put(f"/kvm/{number // 8:06}/{number % 8}", bytes(80)) for number in range(begin, begin + 100)]
            )
    program = textwrap.dedent(
        f"""
        import asyncio
        from kvmsupervisor.adapters.etcd import Etcd, EtcdConfig

        async def main():
            turns = 0
            async def turn():
                nonlocal turns
                while True:
                    await asyncio.sleep(0.001)
                    turns += 1
            etcd = Etcd(EtcdConfig(endpoints=("{etcd_alone.endpoint}",)))
            turning = asyncio.create_task(turn())
            listing = await etcd.list("/kvm/")
            assert len(listing.kvs) == {MANY_KEYS}
            turning.cancel()
            await etcd.close()
            # VmHWM begins anew with exec; getrusage's figure begins with that of the parent.
            status = open("/proc/self/status").read()
            print(turns, int(status.split("VmHWM:")[1].split()[0]) // 1024)

        asyncio.run(main())
        """
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    turns, megabytes = map(int, done.stdout.split())
    assert turns >= MANY_KEYS // 10_000
    assert megabytes < 100


@pytest.mark.parametrize(
    "bad",
    ["127.0.0.1:2379", "ftp://a:1", "http://a", "http://:2379", "http://a:x", "http://a:1/path", ""],
)
def test_an_endpoint_that_is_no_url_is_refused(bad: str) -> None:
    """An endpoint must be `http://host:port` or `https://host:port`; the message shows what was found."""
    with pytest.raises(ValueError):
        EtcdConfig(endpoints=("http://127.0.0.1:2379", bad))


def test_half_a_credential_is_refused() -> None:
    """A certificate without its key, a user without a password file, or no endpoint, is a mistake."""
    with pytest.raises(ValueError, match="key"):
        EtcdConfig(endpoints=("http://a:1",), cert=__file__)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="password file"):
        EtcdConfig(endpoints=("http://a:1",), username="me")
    with pytest.raises(ValueError, match="endpoint"):
        EtcdConfig(endpoints=())


def test_ipv6_endpoints_keep_their_brackets() -> None:
    """`http://[::1]:2379` reaches gRPC as `[::1]:2379`."""
    assert split_endpoint("http://[::1]:2379") == ("[::1]:2379", False)
    assert split_endpoint("https://etcd.example:2379/") == ("etcd.example:2379", True)


async def test_a_page_that_was_asked_for_ahead_is_read_once(etcd_server: EtcdServer, etcd_prefix: str) -> None:
    """It is of the moment at which it was asked for; the watch goes on from there. Other prefixes are not touched."""
    async with client(etcd_server.endpoints) as etcd:
        before = await etcd.put(f"{etcd_prefix}/a", b"1")
        etcd.ask_ahead(f"{etcd_prefix}/")
        await etcd._ahead[f"{etcd_prefix}/"][1]
        after = await etcd.put(f"{etcd_prefix}/b", b"2")
        assert len((await etcd.list(f"{etcd_prefix}/")).kvs) == 1
        etcd.ask_ahead(f"{etcd_prefix}/a")
        listing = await etcd.list(f"{etcd_prefix}/")
        assert (before, after) == (listing.kvs[0].mod_revision, listing.kvs[1].mod_revision)


async def test_a_page_that_nobody_reads_in_time_is_old_news(etcd_server: EtcdServer, etcd_prefix: str) -> None:
    async with client(etcd_server.endpoints) as etcd:
        etcd.ask_ahead(f"{etcd_prefix}/")
        _, page = etcd._ahead[f"{etcd_prefix}/"]
        await page
        await etcd.put(f"{etcd_prefix}/a", b"1")
        etcd._ahead[f"{etcd_prefix}/"] = (asyncio.get_running_loop().time() - 1, page)
        assert len((await etcd.list(f"{etcd_prefix}/")).kvs) == 1


async def test_a_failure_is_told_to_who_reads() -> None:
    async with client(["http://127.0.0.1:1"]) as etcd:
        etcd.ask_ahead("/a/")
        with pytest.raises(Unavailable, match="nothing listens"):
            await etcd.list("/a/")
        etcd.ask_ahead("/b/")  # closed with the client
