"""The key `hosts` in virtual time: which of several hosts takes an orphan, and when; fencing as in any takeover."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import MISSING, fields, replace

import pytest

from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.failover import STEP_S
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage, clients_to_json, take
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.supervisor.failover import Failover
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemus
from tests.fakes.storage import FakeStorage, address_of
from tests.support.host import LAYOUT, ONE, Host

IMAGE = "rbd/vm"
OLD = "192.0.2.1:0/1"
HELD = Lock(
    host=HostName("z"), boot_id="boot-z", epoch=7, state=LockState.RUNNING, incarnation="i7", pid=5, starttime=5,
    clients=(OLD,), storage=Storage.RBD,
)  # fmt: skip


def placed_on(host: str, of: int) -> bytes:
    return Placement(host=HostName(host), why="failover", since="", of=of).to_json()


class Candidate:
    """A host that may take over; its instance's loop begins when the key names it, as a supervisor begins it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.begin()
        self.failover = Failover(host.context, host.wishes)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self.host.wishes.wait_synced()
        await self.failover.run()

    async def end(self) -> None:
        """As SIGKILL would."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        if not self.host.dead:
            await self.host.die()

    async def close(self) -> None:
        await self.end()
        await self.host.close()


@pytest.fixture
async def candidates() -> AsyncIterator[Callable[[], list[Candidate]]]:
    """Two hosts, a and b, and an orphan of z that both are candidates for."""
    etcd, clock = FakeEtcd(), FakeClock()
    qemus = FakeQemus(clock)
    made: list[Candidate] = []

    def make(**wishes: str) -> list[Candidate]:
        hosts = [Host(etcd, clock, qemus, name=name) for name in "ab"]
        etcd.write(LAYOUT.lock_key(ONE), HELD.to_json())
        etcd.write(LAYOUT.clients_key(ONE), clients_to_json(HELD.clients))
        hosts[0].put(ram="64", rbd=IMAGE, host="z", **wishes)
        hosts[1].fencing = hosts[0].fencing
        for host in hosts:
            host.sessions = {"a", "b"}
        made.extend(map(Candidate, hosts))
        return made

    yield make
    for one in made:
        await one.close()


async def taken(one: Candidate, limit_s: float, *, of: str = "z") -> Lock:
    await one.host.until(lambda: one.host.lock is not None and one.host.lock.host != of, limit_s)
    assert one.host.lock is not None
    return one.host.lock


async def test_the_first_takes_lock_and_placement_at_once(candidates: Callable[..., list[Candidate]]) -> None:
    """Law 4: one transaction; what was on record goes on to be fenced before anything starts."""
    first, second = candidates(hosts="b a")
    lock = await taken(second, STEP_S - 1.0)
    assert (lock.host, lock.epoch, lock.state, lock.fence) == ("b", 8, LockState.FENCING, (OLD,))
    assert lock.taken_from == "z"
    etcd = first.host.etcd
    assert etcd.data[LAYOUT.wish_key(ONE, "host")] == b"z"
    placement = Placement.from_json(etcd.data[LAYOUT.placement_key(ONE)])
    assert placement is not None
    assert (placement.host, placement.why) == ("b", "failover")
    assert b"kvmsupervisor_takeovers_total 1.0" in second.host.context.metrics.render("")[0]
    await first.host.clock.advance(60.0)
    assert first.host.lock is not None
    assert first.host.lock.host == "b"


async def test_who_takes_over_says_so_in_the_same_step(candidates: Callable[..., list[Candidate]]) -> None:
    """A host that dies right after a takeover leaves no status that speaks of the former host's QEMU."""
    first, _ = candidates(hosts="a")
    before = Status(
        id=ONE, host="z", phase=Phase.RUNNING, reason="runs", since="12:00", pid=5, epoch=7, machine="q35-7"
    )
    first.host.etcd.write(LAYOUT.status_key(ONE), before.to_json())

    await first.host.until(lambda: first.host.lock is not None and first.host.lock.host == "a")
    await first.end()
    found = Status.from_json(first.host.etcd.data[LAYOUT.status_key(ONE)])
    assert found is not None
    assert (found.host, found.phase, found.pid, found.epoch) == ("a", Phase.WAITING, None, 8)
    assert found.machine == "q35-7"


async def test_then_it_is_fenced_and_runs(candidates: Callable[..., list[Candidate]]) -> None:
    """Law 4: the loop of the instance does the rest, like after any takeover; what storage names is fenced, too."""
    first, _ = candidates(hosts="a")
    first.host.fencing.users_of[IMAGE] = {"192.0.2.1:0/9"}
    await taken(first, 5.0)
    await first.host.die()
    first.host.begin()
    qemu = await first.host.runs()
    assert set(first.host.fencing.fenced) == {OLD, "192.0.2.1:0/9"}
    assert first.host.is_on_record(qemu)


async def test_without_the_key_nobody_does(candidates: Callable[..., list[Candidate]]) -> None:
    """Off unless the key is there."""
    first, _ = candidates()
    await first.host.clock.advance(300.0)
    assert first.host.lock == HELD
    assert first.host.fencing.asked == 0


async def test_a_host_without_room_leaves_it_to_the_next(candidates: Callable[..., list[Candidate]]) -> None:
    """Who lacks memory does not take; the next one has its turn some seconds later."""
    first, second = candidates(hosts="a b")
    object.__setattr__(first.host.context, "admission", Admission(4, 10))
    await first.host.clock.advance(STEP_S - 1.0)
    assert first.host.lock == HELD
    assert (await taken(second, 5.0)).host == "b"


async def test_a_host_that_drains_does_not_take(candidates: Callable[..., list[Candidate]]) -> None:
    """Who is being emptied takes nothing."""
    first, second = candidates(hosts="a b")
    object.__setattr__(first.host.context, "draining", lambda: True)
    assert (await taken(second, 2 * STEP_S)).host == "b"


async def test_disks_in_use_are_waited_for(candidates: Callable[..., list[Candidate]]) -> None:
    """Law 4: a host that lost etcd only is not robbed before `KVM_TAKEOVER_WAIT`; away storage is not "nobody"."""
    first, _ = candidates(hosts="a")
    storage = first.host.fencing
    storage.watching[IMAGE] = {OLD}
    await first.host.clock.advance(30.0)
    assert first.host.lock == HELD
    storage.away = True
    await first.host.clock.advance(60.0)
    assert first.host.lock == HELD
    storage.away = False
    assert (await taken(first, 5.0)).host == "a"


async def test_a_host_that_was_back_is_waited_for_anew(candidates: Callable[..., list[Candidate]]) -> None:
    """Law 4: also where storage gave no answer for so long that nobody saw that it was back (seed 2352)."""
    first, _ = candidates(hosts="a")
    storage, host, ask = first.host.fencing, first.host, first.host.fencing.watchers
    storage.watching[IMAGE] = {OLD}

    async def takes_long(*told: object) -> tuple[str, ...]:
        storage.watchers = ask  # type: ignore[method-assign]
        await host.clock.sleep(70.0)
        host.gone_since = host.clock.now()
        return (OLD,)

    storage.watchers = takes_long  # type: ignore[method-assign, assignment]
    await host.clock.advance(125.0)
    assert host.lock == HELD
    assert (await taken(first, 10.0)).host == "a"


async def test_who_has_heard_nothing_waits_anew(candidates: Callable[..., list[Candidate]]) -> None:
    """Law 4: while this host had no session the holder may have been back (simulation, seed 585)."""
    first, _ = candidates(hosts="a")
    first.host.fencing.watching[IMAGE] = {OLD}
    await first.host.clock.advance(50.0)
    first.host.session.lease += 1
    await first.host.clock.advance(55.0)
    assert first.host.lock == HELD
    assert (await taken(first, 10.0)).host == "a"


async def test_disks_that_the_keys_name_no_more_are_waited_for(candidates: Callable[..., list[Candidate]]) -> None:
    """Law 4: `rbd` was written while the guest ran, and waits for a restart: its disks are those that its lock names.

    Who else has such an image open by now is another one's.
    """
    first, _ = candidates(hosts="a b")
    storage = first.host.fencing
    first.host.etcd.write(LAYOUT.lock_key(ONE), replace(HELD, images=("rbd/former",)).to_json())
    storage.watching["rbd/former"] = {OLD, "192.0.2.1:0/9"}
    await first.host.clock.advance(50.0)
    assert first.host.lock is not None
    assert first.host.lock.host == "z"
    storage.watching["rbd/former"].discard(OLD)
    assert (await taken(first, 5.0)).host == "a"


async def test_the_order_holds_when_disks_are_free_again(candidates: Callable[..., list[Candidate]]) -> None:
    """After a power cut Ceph names its clients for 30 s, longer than all candidates give each other."""
    last, first = candidates(hosts="b a")
    # The last one is the first to hear that they are free.
    seen_by_last = FakeStorage()
    object.__setattr__(last.host.context, "fencing", seen_by_last)
    seen_by_last.watching[IMAGE] = first.host.fencing.watching[IMAGE] = {OLD}
    await last.host.clock.advance(30.0)
    seen_by_last.watching.clear()
    await last.host.clock.advance(STEP_S - 2.5)
    assert last.host.lock == HELD
    first.host.fencing.watching.clear()
    assert (await taken(first, 2.4)).host == "b"


@pytest.mark.parametrize("what", ["lock", "host", "hosts", "placement"])
async def test_two_candidates_at_the_same_moment(candidates: Callable[..., list[Candidate]], what: str) -> None:
    """Law 2: the transaction compares lock, `host`, `hosts` and placement: who comes second has nothing of it."""
    first, second = candidates(hosts="b a")
    etcd = first.host.etcd
    other = take(HELD, host=HostName("a"), boot_id="boot-a", facts=LAYOUT.facts, incarnation="i8", storage=Storage.RBD)
    before = {
        "lock": (LAYOUT.lock_key(ONE), other.to_json()),
        "host": (LAYOUT.wish_key(ONE, "host"), b"y"),
        "hosts": (LAYOUT.wish_key(ONE, "hosts"), b"y"),
        "placement": (LAYOUT.placement_key(ONE), placed_on("y", 10**6)),
    }
    key, value = before[what]

    def be_first(at: int) -> None:
        second.host.store.before = lambda at: None
        etcd.write(key, value)

    second.host.store.before = be_first
    first.host.sessions = second.host.sessions = {"a", "b", "y"}
    await second.host.until(lambda: second.host.store.writes_begun)
    await second.host.clock.advance(30.0)
    found = {name: etcd.data[name] for name, _ in before.values() if name in etcd.data}
    assert found == {
        LAYOUT.lock_key(ONE): HELD.to_json(),
        LAYOUT.wish_key(ONE, "host"): b"z",
        LAYOUT.wish_key(ONE, "hosts"): b"b a",
        key: value,
    }
    assert b"kvmsupervisor_takeovers_total 0.0" in second.host.context.metrics.render("")[0]


@pytest.mark.parametrize(
    ("number", "holder", "state"),
    [
        pytest.param(0, "z", LockState.RUNNING, id="before the takeover"),
        pytest.param(1, "a", LockState.FENCING, id="before it is taken for a start"),
        pytest.param(2, "a", LockState.FENCING, id="before the fence is on record"),
        pytest.param(3, "a", LockState.STARTING, id="before its QEMU is on record"),
        pytest.param(4, "a", LockState.RUNNING, id="while its guest runs"),
    ],
)
async def test_a_candidate_may_die_before_any_write(
    candidates: Callable[..., list[Candidate]], number: int, holder: str, state: LockState
) -> None:
    """Law 4: the next candidate takes from one that died, and fences whatever ever was on record.

    The first one's QEMU goes on, as that of a host that only seems dead.
    """
    first, second = candidates(hosts="a b")
    host = first.host

    def die(at: int) -> None:
        if at == number:
            first.task.cancel()
            host.loop.cancel()

    host.store.before = die
    await host.until(lambda: first.task.done() or (host.lock is not None and host.lock.host == "a"))
    if not first.task.done():
        # Now that it is placed there, its supervisor has a loop for the instance.
        await host.die()
        host.begin()
        await host.until(lambda: host.loop.done() or host.running)
    await first.end()
    host.etcd.erase(host.session.key)
    before = host.lock
    assert before is not None
    assert (before.host, before.state) == (holder, state)
    host.fencing.fenced.clear()
    second.host.sessions = {"b"}
    second.failover.look()
    await taken(second, 60.0, of=holder)
    await second.host.die()
    second.host.begin()
    qemu = await second.host.runs()
    assert second.host.is_on_record(qemu)
    fenced = set(second.host.fencing.fenced)
    assert {OLD, *before.clients} <= fenced
    assert {address_of(one.pid) for one in host.qemus.running if one is not qemu} <= fenced


async def test_a_candidate_that_is_named_later(candidates: Callable[..., list[Candidate]]) -> None:
    """Only the instances for which a host may be a candidate are looked at; news of their keys says which."""
    first, second = candidates(hosts="c")
    await first.host.clock.advance(1.0)
    first.host.put(hosts="c b")
    await first.host.clock.advance(1.0)
    for one in (first, second):
        one.failover.heard({ONE})
    assert (await taken(second, 60.0)).host == "b"


async def test_a_session_that_is_there_after_all(candidates: Callable[..., list[Candidate]]) -> None:
    """Law 4: etcd is asked for the holder's session in the very step."""
    first, _ = candidates(hosts="a b")
    first.host.etcd.write(LAYOUT.session_key(HostName("z")), "{}")
    await first.host.clock.advance(60.0)
    assert first.host.lock == HELD


def test_no_hook_of_safety_has_a_quiet_default() -> None:
    """Laws 4 and 12: whoever runs instances says who may be fenced and what may be touched; nothing is "nobody"."""
    quiet = [one.name for one in fields(InstanceContext) if one.default is not MISSING]
    assert quiet == []
