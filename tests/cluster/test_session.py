"""Law 1: one leased session per host, judged by this host's own clock, resumed on the same boot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.etcd.api import Delete, Put, Rejected, Target, Unavailable
from kvmsupervisor.cluster.session import FILE_NAME, HostnameTaken, Session
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import Layout
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd

KEY = "/kvmsupervisor/hosts/a"
ME = HostSession(host="a", version="1", url="http://a:9746", boot_id="boot-1", machine="machine-a", started="now")


@dataclass
class Bench:
    """One etcd and one clock, and supervisors of one host on them."""

    run_dir: Path
    clock: FakeClock = field(default_factory=FakeClock)
    etcd: FakeEtcd = field(init=False)

    def __post_init__(self) -> None:
        self.etcd = FakeEtcd(self.clock.now)

    def session(
        self, value: HostSession = ME, etcd: FakeEtcd | None = None, run_dir: str = "", ttl_s: int = 15
    ) -> Session:
        folder = self.run_dir / run_dir
        folder.mkdir(exist_ok=True)
        return Session(
            store=etcd or self.etcd,
            clock=self.clock,
            layout=Layout(),
            value=value,
            run_dir=folder,
            ttl_s=ttl_s,
            rand=lambda: 0.5,
        )

    @asynccontextmanager
    async def running(self, session: Session | None = None) -> AsyncIterator[Session]:
        """Run a session's task; at the end it is cancelled, as at a normal stop, and must not have failed."""
        session = session or self.session()
        task = asyncio.create_task(session.run())
        await settle()
        try:
            yield session
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    def lease_of_key(self) -> int:
        return self.etcd._server.keys[KEY.encode()].lease

    def create_revision(self) -> int:
        return self.etcd._server.keys[KEY.encode()].create_revision


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_a_free_name_is_won_at_once(bench: Bench) -> None:
    """Without an earlier session there is nothing to wait for."""
    async with bench.running() as session:
        assert session.held
        assert session.remaining_s == 15
        assert session.key == KEY
        assert HostSession.from_json(bench.etcd.data[KEY]) == ME
        assert session.create_revision == bench.create_revision()
        assert bench.etcd.leases == {bench.lease_of_key(): 15}


async def test_renewals_come_every_fifth_of_the_ttl_and_write_nothing(bench: Bench) -> None:
    """Law 1: at idle, per 3 s one keepalive and one linearizable read, and the store's revision stands still."""
    async with bench.running() as session:
        revision = bench.etcd.revision
        bench.etcd.calls.clear()
        await bench.clock.advance(30)
        assert bench.etcd.calls == {"keep_alive": 10, "get": 10}
        assert bench.etcd.revision == revision
        assert session.held
        assert session.lost_count == 0


async def test_a_full_etcd_takes_no_session(bench: Bench) -> None:
    """Law 1: an etcd without space keeps the session, also through a restart, and the key is mended when it has some.

    etcd 3.5.0 to 3.5.6 refuse every transaction then; a renewal needs none.
    """
    async with bench.running() as session:
        bench.etcd.fill()
        await bench.clock.advance(60)
        assert session.held
        assert session.lost_count == 0
    newer = replace(ME, version="2")
    async with bench.running(bench.session(newer)) as session:
        assert session.held
        await bench.clock.advance(60)
        assert session.held
        assert session.lost_count == 0
        assert HostSession.from_json(bench.etcd.data[KEY]) == ME
        bench.etcd.make_space()
        await bench.clock.advance(3)
        assert HostSession.from_json(bench.etcd.data[KEY]) == newer
        assert session.held


async def test_a_full_etcd_gives_no_session_until_it_has_space(bench: Bench) -> None:
    """What needs a write waits, says why, and comes by itself."""
    bench.etcd.fill()
    async with bench.running() as session:
        await bench.clock.advance(30)
        assert not session.held
        assert "database space exceeded" in session.problem
        bench.etcd.make_space()
        await bench.clock.advance(5)
        assert session.held


async def test_another_ttl_waits_for_space(bench: Bench) -> None:
    """A changed `KVM_SESSION_TTL` needs a new lease; until there is space the session goes on with the old one."""
    async with bench.running():
        pass
    bench.etcd.fill()
    async with bench.running(bench.session(ttl_s=30)) as session:
        assert 0 < session.remaining_s <= 15
        await bench.clock.advance(60)
        assert session.held
        assert session.lost_count == 0


async def test_a_slow_renewal_is_dated_from_before_it_was_sent(bench: Bench) -> None:
    """Law 1: however late the reply, the session ends 15 s after the request left."""
    async with bench.running() as session:

        async def slow(call: str) -> None:
            await bench.clock.sleep(2)

        bench.etcd.hook = slow
        sent = bench.clock.now() + 3
        await bench.clock.advance(7)
        assert session.remaining_s == pytest.approx(sent + 15 - bench.clock.now())


async def test_who_follows_it_is_told_until_when_it_holds(bench: Bench) -> None:
    """Law 7: after each renewal that a quorum confirmed, dated from before it was sent; of no other."""
    told: list[float] = []
    async with bench.running() as session:
        session.follow(told.append)

        async def slow(call: str) -> None:
            await bench.clock.sleep(1)

        bench.etcd.hook = slow
        sent = bench.clock.now() + 3
        await bench.clock.advance(5.5)
        assert told == [pytest.approx(sent + 15)]

        async def away(call: str) -> None:
            raise Unavailable("cut off")

        bench.etcd.hook = away
        await bench.clock.advance(60)
        assert not session.held
        assert len(told) == 1


async def test_keepalive_alone_does_not_count(bench: Bench) -> None:
    """Law 1: a leader without a quorum may answer keepalives; without the read the session is lost."""
    async with bench.running() as session:

        async def no_quorum(call: str) -> None:
            if call == "get":
                raise Unavailable("no quorum")

        bench.etcd.hook = no_quorum
        await bench.clock.advance(14.9)
        assert session.held
        await bench.clock.advance(0.1)
        assert not session.held
        assert bench.etcd.calls["keep_alive"] > 4


async def test_etcd_away_loses_the_session_at_the_deadline_and_tells(bench: Bench) -> None:
    """Listeners hear of it at the deadline, not at the next attempt; back means held again, the same session."""
    async with bench.running() as session:
        told: list[tuple[float, bool]] = []
        session.listen(lambda: told.append((bench.clock.now(), session.held)))
        won = bench.clock.now()
        revision = session.create_revision
        compare = session.compare()
        bench.etcd.away()
        await bench.clock.advance(14)
        assert told == []
        assert session.held
        assert "does not answer" in session.problem
        await bench.clock.advance(1)
        assert told == [(won + 15, False)]
        assert session.create_revision == 0
        assert session.remaining_s == 0
        assert session.lost_count == 1
        bench.etcd._server.leases[bench.lease_of_key()].renewed += 60  # A cluster without a leader ends no lease.
        bench.etcd.back()
        await bench.clock.advance(3)
        assert [held for _, held in told] == [False, True]
        assert session.create_revision == revision
        assert session.compare() == compare
        assert session.problem == ""


async def test_a_lease_that_ran_out_makes_a_new_session(bench: Bench) -> None:
    """TTL 0 is the loss, whatever the clock says; the new session has another create revision."""
    async with bench.running() as session:
        first = session.create_revision
        told: list[bool] = []
        session.listen(lambda: told.append(session.held))
        bench.etcd.expire(bench.lease_of_key())
        await bench.clock.advance(3)
        assert told == [False, True]
        assert session.create_revision > first
        assert session.lost_count == 1


async def test_a_lease_that_is_over_counts_before_its_key_has_vanished(bench: Bench) -> None:
    """TTL 0 is told up to half a second before the keys vanish: the session moves to a new lease."""
    async with bench.running() as session:
        told: list[bool] = []
        session.listen(lambda: told.append(session.held))
        old = bench.lease_of_key()
        real = bench.etcd.keep_alive

        async def keep_alive(lease: int, *, timeout_s: float | None = None) -> int:
            return 0 if lease == old else await real(lease)

        bench.etcd.keep_alive = keep_alive  # type: ignore[method-assign]
        await bench.clock.advance(3)
        assert told == [False, True]
        assert bench.lease_of_key() != old
        bench.etcd.expire(old)
        await bench.clock.advance(30)
        assert session.lost_count == 1


async def test_a_lease_shorter_than_asked_for_is_not_overrated(bench: Bench) -> None:
    """What etcd says that a renewal is worth counts, when it is less."""
    async with bench.running() as session:

        async def keep_alive(lease: int, *, timeout_s: float | None = None) -> int:
            return 4

        bench.etcd.keep_alive = keep_alive  # type: ignore[method-assign]
        await bench.clock.advance(3)
        assert session.remaining_s == 4


async def test_no_call_outlasts_the_session(bench: Bench) -> None:
    """Each call's time limit ends by the deadline, and is never nothing."""
    async with bench.running() as session:
        limits: list[tuple[float, float | None]] = []

        async def hang(lease: int, *, timeout_s: float | None = None) -> int:
            limits.append((session.remaining_s, timeout_s))
            await bench.clock.sleep(timeout_s or 0)
            raise Unavailable("timed out")

        bench.etcd.keep_alive = hang  # type: ignore[method-assign]
        told: list[float] = []
        lost_at = bench.clock.now() + 15
        session.listen(lambda: told.append(bench.clock.now()))
        await bench.clock.advance(30)
        assert told == [lost_at]
        assert all(0.1 <= (limit or 0) <= max(0.1, min(3, left)) for left, limit in limits if left)
        assert all(limit == 3 for left, limit in limits if not left)


async def test_a_deleted_key_is_a_lost_session_though_the_lease_lives(bench: Bench) -> None:
    """Others judge by the key. It is made again with the same lease."""
    async with bench.running() as session:
        first, lease = session.create_revision, bench.lease_of_key()
        bench.etcd.erase(KEY)
        await bench.clock.advance(3)
        assert session.held
        assert session.create_revision > first
        assert session.lost_count == 1
        assert bench.lease_of_key() == lease


async def test_a_key_that_was_written_over_is_a_lost_session(bench: Bench) -> None:
    """Without its lease the key would outlive this host, and nobody would ever take over what it ran."""
    async with bench.running() as session:
        before = bench.create_revision()
        bench.etcd.write(KEY, b"nonsense")
        await bench.clock.advance(10)
        assert session.held
        assert session.lost_count == 1
        assert bench.create_revision() > before
        assert bench.etcd.data[KEY] == ME.to_json()
        assert bench.lease_of_key()


async def test_a_frozen_supervisor_knows_at_once(bench: Bench) -> None:
    """`held` and `remaining_s` go by the clock: no task has to run first. Listeners hear of both turns."""
    async with bench.running() as session:
        told: list[bool] = []
        session.listen(lambda: told.append(session.held))
        bench.clock.jump(15)
        assert not session.held
        assert session.create_revision == 0
        bench.etcd._server.leases[bench.lease_of_key()].renewed += 15  # The other side did not see it so.
        await bench.clock.advance(0)
        assert told == [False, True]


@pytest.mark.parametrize(("slept", "told", "limit"), [(20, [False], 3), (14.95, [], 0.1)])
async def test_after_a_freeze_the_loss_is_told_before_etcd_is_asked(
    bench: Bench, slept: float, told: list[bool], limit: float
) -> None:
    """Listeners do not wait for a call that may hang; one that is sent in the last moment gets a moment."""
    async with bench.running() as session:
        heard: list[bool] = []
        limits: list[float | None] = []
        session.listen(lambda: heard.append(session.held))

        async def hang(lease: int, *, timeout_s: float | None = None) -> int:
            limits.append(timeout_s)
            await asyncio.Event().wait()
            raise AssertionError

        bench.etcd.keep_alive = hang  # type: ignore[method-assign]
        bench.clock.jump(slept)
        await bench.clock.advance(0)
        assert heard == told
        assert limits == [limit]


async def test_a_reply_after_the_deadline_tells_of_the_loss_first(bench: Bench) -> None:
    """Whoever saw `held` false by the clock is woken when it is true again."""
    async with bench.running() as session:
        told: list[float] = []
        session.listen(lambda: told.append(session.remaining_s))
        gate = asyncio.Event()

        async def stuck(call: str) -> None:
            if call == "keep_alive":
                bench.etcd.hook = None
                await gate.wait()

        bench.etcd.hook = stuck
        await bench.clock.advance(14)
        bench.etcd._server.leases[bench.lease_of_key()].renewed += 1  # Not yet over on the other side.
        bench.clock.jump(1)
        gate.set()
        await settle()
        # Dated from when it was sent, 3 s after the first: 3 s are left of it.
        assert told == [0, 3]
        # A renewal is long overdue, and was made at once.
        assert session.remaining_s == 15


async def test_without_a_session_its_condition_never_holds(bench: Bench) -> None:
    """In particular it must not read "the key is absent"."""
    bench.etcd.away()
    async with bench.running() as session:
        compare = session.compare()
        assert compare.target is Target.CREATE_REVISION
        bench.etcd.back()
        assert not (await bench.etcd.txn([compare], [])).succeeded


async def test_listening_can_be_ended(bench: Bench) -> None:
    """An instance that is gone is not called any more."""
    async with bench.running() as session:
        told: list[int] = []
        end = session.listen(lambda: told.append(1))
        end()
        bench.etcd.expire(bench.lease_of_key())
        await bench.clock.advance(3)
        assert told == []


async def test_losses_are_told_but_not_on_and_on(bench: Bench) -> None:
    """One line when it begins, then at most one a minute, one when it is over; for a denial too."""
    async with bench.running() as session:
        with capture_logs() as logs:
            bench.etcd.deny()
            await bench.clock.advance(180)
            assert not session.held
            assert "does not let" in session.problem
            denied = [line for line in logs if line["event"] == "session.denied"]
            assert 3 <= len(denied) <= 4
            assert all(line["log_level"] == "error" for line in denied)
            bench.etcd.allow()
            await bench.clock.advance(20)
        assert session.held
        assert [line["event"] for line in logs if line["event"] in ("session.lost", "session.back", "session.won")] == [
            "session.lost",
            "session.back",
            "session.won",
        ]


async def test_retries_are_spread_and_capped(bench: Bench) -> None:
    """A day without etcd costs no more than a request every 1.5 s to 3 s."""
    async with bench.running():
        bench.etcd.away()
        await bench.clock.advance(60)
        bench.etcd.calls.clear()
        await bench.clock.advance(3600)
        assert 1200 <= bench.etcd.calls.total() <= 2400


async def test_a_successor_on_the_same_boot_resumes(bench: Bench) -> None:
    """Law 1: same lease, same create revision, new value; a stop revokes nothing."""
    async with bench.running() as first:
        revision, lease = first.create_revision, bench.lease_of_key()
    await bench.clock.advance(5)
    newer = replace(ME, version="2", started="later")
    with capture_logs() as logs:
        async with bench.running(bench.session(newer)) as second:
            assert second.create_revision == revision
            assert bench.lease_of_key() == lease
            assert HostSession.from_json(bench.etcd.data[KEY]) == newer
            assert second.remaining_s == 15
    assert "session.resumed" in [line["event"] for line in logs]
    assert len(bench.etcd.leases) == 1


async def test_an_unchanged_value_is_not_written_again(bench: Bench) -> None:
    """A session that comes back by itself writes nothing."""
    async with bench.running():
        pass
    bench.etcd.writes.clear()
    async with bench.running() as session:
        assert session.held
        assert bench.etcd.writes == []


async def test_a_successor_finds_the_lease_gone(bench: Bench) -> None:
    """After more than the TTL it is a new session."""
    async with bench.running() as first:
        revision = first.create_revision
    await bench.clock.advance(16)
    async with bench.running() as second:
        assert second.held
        assert second.create_revision > revision


async def test_a_changed_ttl_moves_the_session_to_a_new_lease(bench: Bench) -> None:
    """KVM_SESSION_TTL holds after a restart, and the session goes on; also when that write's reply got lost."""
    async with bench.running() as first:
        revision, lease = first.create_revision, bench.lease_of_key()
    bench.etcd.lose_next_reply()
    async with bench.running(bench.session(ttl_s=30)) as second:
        await bench.clock.advance(5)
        assert second.create_revision == revision
        assert bench.lease_of_key() != lease
        assert bench.etcd.leases[bench.lease_of_key()] == 30
        assert 20 < second.remaining_s <= 30


async def test_a_move_to_a_new_lease_that_never_happened_is_made_again(bench: Bench) -> None:
    """The key still hangs on the old lease, which is ours too: no waiting for it to run out."""
    async with bench.running() as first:
        revision = first.create_revision
    bench.etcd.lose_next_request()
    async with bench.running(bench.session(ttl_s=30)) as second:
        await bench.clock.advance(5)
        assert second.create_revision == revision
        assert bench.etcd.leases[bench.lease_of_key()] == 30


@pytest.mark.parametrize("applied", [True, False])
async def test_a_lost_reply_to_the_creation(bench: Bench, applied: bool) -> None:
    """What was written is recognised by its lease; what was not is written again. Neither waits for a TTL."""
    bench.etcd.lose_next_reply() if applied else bench.etcd.lose_next_request()
    async with bench.running() as session:
        assert not session.held
        await bench.clock.advance(1)
        assert session.held
        assert session.create_revision == bench.create_revision()
        assert len(bench.etcd.leases) == 1


async def test_killed_between_lease_and_key(bench: Bench) -> None:
    """The lease is on file before any key has it, so the successor finds either no key or its own."""

    async def die(call: str) -> None:
        if call == "txn":
            raise Rejected("killed here")

    bench.etcd.hook = die
    async with bench.running():
        assert KEY not in bench.etcd.data
    bench.etcd.hook = None
    assert json.loads((bench.run_dir / FILE_NAME).read_text())["lease"] in bench.etcd.leases
    async with bench.running() as session:
        assert session.held
        assert len(bench.etcd.leases) == 1


async def test_a_lease_that_vanishes_before_the_creation(bench: Bench) -> None:
    """Another lease is asked for."""

    async def expire(call: str) -> None:
        if call == "txn":
            bench.etcd.hook = None
            for lease in list(bench.etcd.leases):
                bench.etcd.expire(lease)

    bench.etcd.hook = expire
    async with bench.running() as session:
        await bench.clock.advance(1)
        assert session.held


async def test_a_rebooted_machine_replaces_its_old_session_at_once(bench: Bench) -> None:
    """Same machine, another boot id: nobody can be alive behind it. The create revision changes."""
    async with bench.running() as first:
        revision = first.create_revision
    rebooted = replace(ME, boot_id="boot-2")
    async with bench.running(bench.session(rebooted, run_dir="after")) as second:
        await bench.clock.advance(0.1)
        assert second.held
        assert second.create_revision > revision
        assert [type(op) for op in bench.etcd.writes] == [Put, Delete, Put]


async def test_a_run_directory_that_survived_the_reboot_is_not_believed(bench: Bench) -> None:
    """A lease of another boot is not resumed: its machines are gone, so the session must be a new one."""
    async with bench.running() as first:
        revision = first.create_revision
    async with bench.running(bench.session(replace(ME, boot_id="boot-2"))) as second:
        await bench.clock.advance(0.1)
        assert second.create_revision > revision


@pytest.mark.parametrize(
    "value",
    [
        ME.to_json(),
        replace(ME, boot_id="boot-2", machine="").to_json(),
        replace(ME, boot_id="boot-2", machine="other").to_json(),
        b"\xff not a session",
    ],
)
async def test_an_old_session_of_unknown_fate_is_waited_for(bench: Bench, value: bytes) -> None:
    """It may be alive: only its lease's end proves that it is not. Then the name is ours."""
    lease = await bench.etcd.grant(15)
    await bench.etcd.put(KEY, value, lease=lease)
    # A name of no machine must not match the empty name of another.
    async with bench.running(
        bench.session(replace(ME, machine="" if b'"machine":""' in value else ME.machine))
    ) as session:
        await bench.clock.advance(14)
        assert not session.held
        assert "earlier session" in session.problem
        await bench.clock.advance(2)
        assert session.held


async def test_a_session_key_without_a_lease_is_replaced(bench: Bench) -> None:
    """Written by hand, it would stay for ever and stands for nobody."""
    bench.etcd.write(KEY, ME.to_json())
    async with bench.running() as session:
        await bench.clock.advance(0.1)
        assert session.held
        assert session.create_revision == bench.create_revision() > 2


async def test_a_living_namesake_is_named_and_left_alone(bench: Bench) -> None:
    """The second supervisor under one name ends with who holds it and what to do; the first notices nothing."""
    other = replace(ME, boot_id="boot-9", machine="machine-b", url="http://b:9746")
    async with bench.running(bench.session(other, run_dir="b")) as first:
        second = bench.session(etcd=bench.etcd.peer())
        task = asyncio.create_task(second.run())
        await bench.clock.advance_until(task.done, 40)
        with pytest.raises(HostnameTaken, match=r"http://b:9746, boot id boot-9.*'a'.*KVM_HOSTNAME"):
            await task
        assert first.held
        assert first.lost_count == 0
        assert HostSession.from_json(bench.etcd.data[KEY]) == other


async def test_two_clones_do_not_take_the_name_from_each_other_on_and_on(bench: Bench) -> None:
    """Same machine id, another boot id, but alive: who held the name already stays away from it, loudly.

    Losing it is never fatal: the machines of the first one run on.
    """
    async with bench.running() as first:
        clone = replace(ME, boot_id="boot-2")
        async with bench.running(bench.session(clone, etcd=bench.etcd.peer(), run_dir="clone")) as second:
            await bench.clock.advance(60)
            assert second.held
            assert second.lost_count == 0
            assert not first.held
            assert first.lost_count == 1
            assert "another supervisor" in first.problem
        # The clone is gone for good: the first gets its name back when the lease has run out.
        await bench.clock.advance(20)
        assert first.held


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1}', '{"version": "x", "key": 1, "boot_id": 2, "lease": 3}', "\x00\xff"]
)
async def test_a_broken_file_is_replaced(bench: Bench, content: str) -> None:
    """Whatever is in it: a new session, and a file that can be read again."""
    (bench.run_dir / FILE_NAME).write_text(content)
    with capture_logs() as logs:
        async with bench.running() as session:
            assert session.held
    assert "session.file_invalid" in [line["event"] for line in logs]
    assert json.loads((bench.run_dir / FILE_NAME).read_text())["version"] == 1


async def test_the_file_of_a_newer_release_is_left_alone(bench: Bench) -> None:
    """Treated as absent, with a line in the log, and not overwritten."""
    newer = json.dumps({"version": 2, "key": KEY, "boot_id": "boot-1", "lease": "another form"})
    (bench.run_dir / FILE_NAME).write_text(newer)
    with capture_logs() as logs:
        async with bench.running() as session:
            assert session.held
    assert "session.file_newer" in [line["event"] for line in logs]
    assert (bench.run_dir / FILE_NAME).read_text() == newer


async def test_a_lease_noted_for_another_name_is_not_used(bench: Bench) -> None:
    """After a change of KVM_HOSTNAME the new name gets its own session."""
    async with bench.running():
        old = bench.lease_of_key()
    async with bench.running(bench.session(replace(ME, host="z"))) as session:
        assert session.held
        assert bench.etcd._server.keys[b"/kvmsupervisor/hosts/z"].lease != old


async def test_an_unwritable_run_directory_costs_only_the_resumption(bench: Bench) -> None:
    """The session is won without its file."""
    (bench.run_dir / f"{FILE_NAME}.new").mkdir()
    with capture_logs() as logs:
        async with bench.running() as session:
            assert session.held
    assert "session.file_unwritable" in [line["event"] for line in logs]


@pytest.mark.parametrize("call", ["grant", "txn", "get", "keep_alive", "time_to_live"])
async def test_no_error_of_etcd_ends_the_session_task(bench: Bench, call: str) -> None:
    """Whatever fails once, anywhere, is tried again."""
    lease = await bench.etcd.grant(4)
    await bench.etcd.put(KEY, b"somebody", lease=lease)
    async with bench.running() as session:
        for error in (Unavailable("gone"), Rejected("etcdserver: mvcc: database space exceeded")):
            bench.etcd.fail_next(error, call)
        await bench.clock.advance(30)
        assert session.held
