"""The lock of a QEMU with options of its own, in virtual time: whoever may take it, and replies that get lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from kvmsupervisor.adapters.etcd import Unavailable
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.instance.assembly import Holder
from kvmsupervisor.single.identity import LET_GO_S, Stand
from kvmsupervisor.single.lock import Held, Lost, SingleLock
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemus
from tests.fakes.storage import FakeStorage
from tests.support.host import LAYOUT, FakeSession, LockStore
from tests.support.outside import outside

KEY, STATUS_KEY = "/kvm/1/lock", "/kvmsupervisor/instances/1"
ME = HostName("a/1")
BETA = Lock(host=HostName("b"), boot_id="boot-b", epoch=5, state=LockState.RUNNING, incarnation="x")


class HeldSession(FakeSession):
    """With a reason to give."""

    problem = ""


class Bench:
    """One lock over a fake etcd; `begin` follows it."""

    def __init__(self, path: Path, *options: str) -> None:
        self.clock = FakeClock()
        self.etcd = FakeEtcd(self.clock.now)
        self.store = LockStore(self.etcd)
        self.session = HeldSession(self.etcd, ME)
        stand = Stand(
            name=InstanceId("1"),
            holder=Holder(name=ME, boot_id="boot-a", layout=replace(LAYOUT, lock=KEY), run_dir=path),
            run_dir=RunDir(path),
        )
        wake = asyncio.Event()
        settings = load_settings({}, default_config=path / "none.toml")
        member = stand.join(
            settings, outside(FakeQemus(self.clock), self.etcd.peer), store=self.etcd.peer(), on_hosts=wake.set
        )
        member.session, member.store = cast("Session", self.session), self.store
        self.lock = SingleLock(
            stand=stand,
            member=member,
            clock=self.clock,
            options=options,
            fencing=FakeStorage(),
            processes=FakeQemus(self.clock),
            wake=wake,
        )
        self._following: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        self._following = asyncio.create_task(self.lock.run())
        await settle()

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def taking(self, *, wait: bool = True, virtual_s: float = 30.0) -> bool:
        """Try to take it for a while; return whether that went well."""
        task = asyncio.create_task(self.lock.take(wait=wait))
        await self.clock.advance(virtual_s)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return False
        await task
        return True

    @property
    def stored(self) -> Lock | None:
        data = self.etcd.data.get(KEY)
        return None if data is None else Lock.from_json(data)

    @property
    def status(self) -> Status | None:
        data = self.etcd.data.get(STATUS_KEY)
        return None if data is None else Status.from_json(data)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    await made.close()


async def test_it_goes_from_taken_to_recorded_to_released(bench: Bench) -> None:
    """Laws 2, 3 and 9, and the epoch stays in the status."""
    await bench.begin()
    assert await bench.taking()
    assert bench.stored is not None
    assert (bench.stored.host, bench.stored.epoch, bench.stored.state) == (ME, 1, LockState.STARTING)
    assert bench.status is None
    await bench.lock.record(pid=7, starttime=8)
    assert (bench.stored.state, bench.stored.pid) == (LockState.RUNNING, 7)
    assert bench.status is not None
    assert (bench.status.phase, bench.status.host, bench.status.pid) == (Phase.RUNNING, ME, 7)
    await bench.lock.let_go()
    assert bench.stored is None
    assert (bench.status.phase, bench.status.pid, bench.status.epoch) == (Phase.STOPPED, None, 1)


@pytest.mark.parametrize("fault", ["lost reply", "lost request", Unavailable("away")])
@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_lost_reply_is_settled_by_reading(bench: Bench, fault: str, number: int) -> None:
    """Law 2: whichever write is cut off, the end is the same, with one incarnation."""
    bench.store.faults[number] = fault
    await bench.begin()
    assert await bench.taking()
    recording = asyncio.create_task(bench.lock.record(pid=7, starttime=8))
    await bench.clock.advance(5.0)
    await recording
    assert bench.stored is not None
    assert (bench.stored.pid, bench.stored.epoch, bench.stored.incarnation) == (7, 1, bench.lock.incarnation)
    letting_go = asyncio.create_task(bench.lock.let_go())
    await bench.clock.advance(5.0)
    await letting_go
    assert bench.stored is None


async def test_a_stranger_is_waited_for(bench: Bench) -> None:
    """Law 2: while it is there; then it is taken, with the next epoch. Without waiting, its name is told."""
    bench.etcd.write(KEY, BETA.to_json())
    bench.etcd.write(LAYOUT.session_key(HostName("b")), "{}")
    await bench.begin()
    with pytest.raises(Held, match="b holds its lock"):
        await bench.taking(wait=False)
    assert not await bench.taking()
    assert bench.stored == BETA
    last = Status(id="1", host="b", phase=Phase.STOPPED, reason="", since="", epoch=5, machine="pc-q35-7.2")
    bench.etcd.write(STATUS_KEY, last.to_json())
    bench.etcd.erase(KEY)
    assert await bench.taking()
    assert bench.stored is not None
    assert bench.stored.epoch == 6
    await bench.lock.record(pid=7, starttime=8)
    assert bench.status is not None
    # What an earlier host found out of the machine stays.
    assert (bench.status.host, bench.status.machine) == (ME, "pc-q35-7.2")


@pytest.mark.parametrize(
    ("storage", "clients", "taken"),
    [(Storage.NONE, (), True), (Storage.UNFENCEABLE, (), False), (Storage.RBD, ("1.2.3.4:0/5",), False)],
)
async def test_only_what_has_nothing_to_protect_is_taken_over(
    bench: Bench, storage: Storage, clients: tuple[str, ...], taken: bool
) -> None:
    """Law 7: from a holder whose session is gone; what may be written to stays his."""
    lock = replace(BETA, storage=storage, clients=clients)
    bench.etcd.write(KEY, lock.to_json())
    await bench.begin()
    assert await bench.taking() is taken
    assert (bench.stored == lock) is not taken


async def test_no_write_without_a_session_and_none_over_a_status_that_tells_of_a_process(bench: Bench) -> None:
    """Law 2, and a lock that was deleted by hand under a running QEMU."""
    bench.session.turn(held=False)
    await bench.begin()
    assert not await bench.taking()
    bench.session.turn(held=True)
    running = Status(id="1", host="b", phase=Phase.RUNNING, reason="", since="", pid=9, epoch=3)
    bench.etcd.write(STATUS_KEY, running.to_json())
    assert not await bench.taking()
    with pytest.raises(Held, match="says that it runs on b"):
        await bench.taking(wait=False)
    assert bench.stored is None
    assert bench.store.writes_begun == 0


async def test_what_was_lost_before_the_guest_ran_is_not_recorded(bench: Bench) -> None:
    """Law 3: a lock that has gone to another, or was deleted, lets no guest run."""
    await bench.begin()
    assert await bench.taking()
    bench.etcd.erase(KEY)
    await settle()
    with pytest.raises(Lost, match="was deleted"):
        await bench.lock.record(pid=7, starttime=8)
    bench.etcd.write(KEY, BETA.to_json())
    await settle()
    with pytest.raises(Lost, match="gone to b"):
        await bench.lock.record(pid=7, starttime=8)
    await bench.lock.let_go()
    assert bench.stored == BETA


async def test_a_guard_writes_it_again_and_tells_when_it_is_lost(bench: Bench) -> None:
    """Law 6: deleted is not lost; read to be another's is; losing the session is nothing."""
    await bench.begin()
    assert await bench.taking()
    await bench.lock.record(pid=7, starttime=8)
    guard = asyncio.create_task(bench.lock.guard(pid=7, starttime=8))
    bench.session.turn(held=False)
    await bench.clock.advance(60.0)
    assert not guard.done()
    bench.session.turn(held=True)
    bench.etcd.erase(KEY)
    await bench.clock.advance(5.0)
    assert bench.stored is not None
    assert (bench.stored.pid, bench.stored.state) == (7, LockState.RUNNING)
    bench.etcd.write(KEY, BETA.to_json())
    await bench.clock.advance(5.0)
    with pytest.raises(Lost, match="gone to b, epoch 5"):
        await guard


async def test_what_is_not_fenced_stays_locked(bench: Bench) -> None:
    """Law 4: stopped before it has fenced, it keeps the lock: a free one would tell the next holder of no client."""
    theirs = replace(BETA, state=LockState.BROKEN, clients=("192.0.2.1:0/1",))
    bench.etcd.write(KEY, theirs.to_json())
    await bench.begin()
    assert not await bench.taking()
    await bench.lock.let_go()
    assert bench.stored is not None
    assert (bench.stored.host, bench.stored.state, bench.stored.fence) == (ME, LockState.FENCING, theirs.clients)


async def test_a_holder_that_comes_back_is_not_robbed(bench: Bench) -> None:
    """Law 4: etcd itself tells, in the step that takes a lock over, that its holder has no session."""
    bench.etcd.write(KEY, replace(BETA, state=LockState.BROKEN).to_json())
    await bench.begin()
    bench.store.before = lambda number: bench.etcd.write(LAYOUT.session_key(HostName("b")), "{}")
    assert not await bench.taking()
    assert bench.stored is not None
    assert bench.stored.host == "b"


async def test_a_broken_lock_ends_it_and_stays_broken(bench: Bench) -> None:
    """Decision 0012: whoever reads an operator's word that another may run it lets no guest run, and writes no more."""
    await bench.begin()
    assert await bench.taking()
    assert bench.stored is not None
    broken = bench.stored.broken()
    bench.etcd.write(KEY, broken.to_json())
    await settle()
    with pytest.raises(Lost, match="broken by an operator"):
        await bench.lock.record(pid=7, starttime=8)
    await bench.lock.let_go()
    assert bench.stored == broken


async def test_a_lock_that_is_broken_while_the_guest_runs(bench: Bench) -> None:
    """Decision 0012: the guard tells, so that QEMU is killed; the lock is whose turn it is."""
    await bench.begin()
    assert await bench.taking()
    await bench.lock.record(pid=7, starttime=8)
    guard = asyncio.create_task(bench.lock.guard(pid=7, starttime=8))
    await settle()
    assert bench.stored is not None
    broken = bench.stored.broken()
    bench.etcd.write(KEY, broken.to_json())
    await bench.clock.advance(5.0)
    assert guard.done()
    with pytest.raises(Lost, match="broken by an operator"):
        await guard
    await bench.lock.let_go()
    assert bench.stored == broken


async def test_a_full_etcd_ends_no_guest(bench: Bench) -> None:
    """Law 6: without space the guest runs on; what was to be written is, once there is some."""
    await bench.begin()
    assert await bench.taking()
    bench.etcd.fill()
    recording = asyncio.create_task(bench.lock.record(pid=7, starttime=8))
    await bench.clock.advance(60.0)
    assert not recording.done()
    bench.etcd.make_space()
    await bench.clock.advance(2.0)
    await recording
    guard = asyncio.create_task(bench.lock.guard(pid=7, starttime=8))
    bench.etcd.fill()
    bench.etcd.erase(KEY)
    await bench.clock.advance(60.0)
    assert not guard.done()
    bench.etcd.make_space()
    await bench.clock.advance(2.0)
    assert bench.stored is not None
    assert bench.stored.pid == 7
    guard.cancel()


async def test_the_end_does_not_wait_for_etcd_for_ever(bench: Bench) -> None:
    """Law: a lock that cannot be released stays, and its holder ends."""
    await bench.begin()
    assert await bench.taking()
    for number in range(100):
        bench.store.faults[bench.store.writes_begun + number] = Unavailable("away")
    letting_go = asyncio.create_task(bench.lock.let_go())
    await bench.clock.advance(LET_GO_S + 5.0)
    assert letting_go.done()
    await letting_go
    assert bench.stored is not None


async def test_an_older_lock_is_no_loss(bench: Bench) -> None:
    """Law 11: a lower epoch, of a stranger or of an earlier container, was restored; it is written over, with ours."""
    bench.etcd.write(KEY, replace(stranger(), epoch=7, state=LockState.BROKEN).to_json())
    await bench.begin()
    assert await bench.taking()
    await bench.lock.record(pid=7, starttime=8)
    ours = bench.stored
    assert ours is not None
    assert ours.epoch == 8
    guard = asyncio.create_task(bench.lock.guard(pid=7, starttime=8))
    for older in (replace(stranger(), epoch=3), replace(ours, incarnation="earlier", epoch=7)):
        bench.etcd.write(KEY, older.to_json())
        await bench.clock.advance(5.0)
        assert not guard.done()
        assert bench.stored is not None
        assert (bench.stored.incarnation, bench.stored.epoch) == (ours.incarnation, 8)
    bench.etcd.write(KEY, replace(stranger(), epoch=9).to_json())
    await bench.clock.advance(5.0)
    assert isinstance(guard.exception(), Lost)


def stranger() -> Lock:
    return Lock(host=HostName("b"), boot_id="boot-b", epoch=1, state=LockState.RUNNING, incarnation="y")
