"""Laws 3, 4 and 7 in virtual time: who is waited for, who is fenced, and when. The world is that of `test_worker`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import replace

import pytest

from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage, clients_to_json
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.instance.disks import GROWTH_EVERY_S
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemus
from tests.fakes.storage import address_of
from tests.support.host import LAYOUT, ONE, Host, as_written

LOCK_KEY = LAYOUT.lock_key(ONE)
IMAGE = "rbd/vm"
OLD, OLDER, UNKNOWN = "192.0.2.1:0/1", "192.0.2.1:0/2", "192.0.2.1:0/3"

MakeHost = Callable[[str], Host]


@pytest.fixture
async def make() -> AsyncIterator[MakeHost]:
    """Makes hosts of one cluster."""
    etcd, clock = FakeEtcd(), FakeClock()
    qemus = FakeQemus(clock)
    hosts: list[Host] = []

    def make(name: str) -> Host:
        host = Host(etcd, clock, qemus, name=name)
        if hosts:
            host.fencing = hosts[0].fencing
        hosts.append(host)
        return host

    yield make
    for host in hosts:
        await host.close()


@pytest.fixture
def host(make: MakeHost) -> Host:
    return make("a")


def theirs(**changes: object) -> Lock:
    """The lock of host `b`, which has no session unless a test says so."""
    lock = Lock(
        host=HostName("b"), boot_id="boot-b", epoch=7, state=LockState.RUNNING, incarnation="i7", pid=5, starttime=5,
        clients=(OLD,), fence=(OLDER,), storage=Storage.RBD,
    )  # fmt: skip
    return replace(lock, **changes)  # type: ignore[arg-type]


def orphan(host: Host, lock: Lock | None = None) -> None:
    """A machine of `host` whose lock a dead host has, as that host wrote it."""
    lock = lock or theirs()
    host.etcd.write(LOCK_KEY, lock.to_json())
    host.etcd.write(LAYOUT.clients_key(ONE), clients_to_json((*lock.clients, *lock.fence)))
    host.wish(rbd=IMAGE)


async def test_who_has_the_disks_open_is_waited_for(host: Host) -> None:
    """Law 4: for `KVM_TAKEOVER_WAIT` and no longer; the reason says until when, and is said once."""
    orphan(host)
    host.fencing.watching[IMAGE] = {OLD}
    host.begin()
    await host.clock.advance(59.0)
    assert host.lock == theirs()
    assert host.fencing.fenced == []
    assert (host.status.phase, OLD in host.status.reason) == (Phase.WAITING, True)
    assert host.status.reason.endswith("it is taken over at 2026-01-01T00:17:40Z if that stays so")
    await host.told()
    written = as_written(host.etcd, LAYOUT.status_key(ONE))
    assert sum("disks are in use" in status["reason"] for status in written) <= 1
    await host.runs(5.0)
    assert set(host.fencing.fenced) == {OLD, OLDER}
    assert host.lock is not None
    assert (host.lock.epoch, host.lock.state) == (8, LockState.RUNNING)
    assert set(host.lock.fence) == {OLD, OLDER}


async def test_the_disks_are_those_that_its_qemu_has_open(host: Host) -> None:
    """Law 4: the lock names them, and the keys may name others since; who else has them open by now does not matter."""
    orphan(host, theirs(images=("rbd/former",)))
    host.fencing.watching["rbd/former"] = {OLD, UNKNOWN}
    host.begin()
    await host.clock.advance(50.0)
    assert host.lock == theirs(images=("rbd/former",))
    host.fencing.watching["rbd/former"].discard(OLD)
    await host.runs(4.0)
    assert host.lock is not None
    assert host.lock.images == (IMAGE,)


async def test_who_is_gone_is_not_waited_for(host: Host) -> None:
    """Law 4: without a watcher the lock is taken at once; whoever storage alone names is fenced, too, and recorded."""
    orphan(host)
    host.fencing.users_of[IMAGE] = {UNKNOWN}
    host.begin()
    await host.runs(2.0)
    assert set(host.fencing.fenced) == {OLD, OLDER, UNKNOWN}
    assert host.lock is not None
    assert set(host.lock.fence) == {OLD, OLDER, UNKNOWN}
    metrics = host.context.metrics.render("")[0]
    assert b"kvmsupervisor_takeovers_total 1.0" in metrics
    assert b"kvmsupervisor_fences_total 3.0" in metrics


async def test_a_watcher_that_goes_ends_the_wait(host: Host) -> None:
    """Law 4: storage is asked all the time."""
    orphan(host)
    host.fencing.watching[IMAGE] = {OLD}
    host.begin()
    await host.clock.advance(20.0)
    host.fencing.watching[IMAGE].clear()
    await host.runs(4.0)


async def test_a_host_that_is_back_in_time(host: Host) -> None:
    """Law 4: the wait is over, nothing is fenced; were it to go again, the wait would begin anew."""
    orphan(host)
    host.fencing.watching[IMAGE] = {OLD}
    host.begin()
    await host.clock.advance(50.0)
    host.sessions = {"a", "b"}
    host.instance.notify()
    await host.clock.advance(50.0)
    assert "waits until b has stopped it" in host.status.reason
    host.sessions = {"a"}
    host.instance.notify()
    await host.clock.advance(50.0)
    assert host.lock == theirs()
    assert host.fencing.fenced == []


async def test_etcd_itself_is_asked_for_the_session(host: Host, make: MakeHost) -> None:
    """Law 4: a holder whose session is there in that very step keeps its lock, whatever was seen before."""
    make("b")  # its session is in etcd
    orphan(host)
    host.begin()
    await host.clock.advance(30.0)
    assert host.lock == theirs()
    assert host.fencing.fenced == []


async def test_without_storage_nothing_is_taken(host: Host) -> None:
    """Law 4: storage that does not answer is not "nobody": no takeover; when it is back there is one soon."""
    orphan(host)
    host.fencing.away = True
    host.begin()
    await host.clock.advance(59.0)
    assert host.lock == theirs()
    assert "Ceph does not answer" in host.status.reason
    host.fencing.away = False
    await host.runs(5.0)


async def test_storage_that_goes_away_in_between(host: Host) -> None:
    """Law 4: taken, but not fenced: no start, and the next taker has the whole list."""
    orphan(host)
    host.fencing.refused = "no"
    host.begin()
    await host.clock.advance(120.0)
    assert host.qemus.all == []
    assert host.lock is not None
    assert (host.lock.state, host.lock.fence, host.lock.taken_from) == (LockState.FENCING, (OLDER, OLD), "b")


async def test_a_taker_that_dies_is_followed_by_another(host: Host, make: MakeHost) -> None:
    """Law 4: whoever takes over from a taker fences all that ever was on record, and what storage names."""
    other = make("c")
    orphan(host)
    host.fencing.refused = "not yet"
    host.begin()
    await host.clock.advance(20.0)
    await host.die()
    host.etcd.erase(host.session.key)
    other.sessions = {"c"}
    host.fencing.refused = None
    host.fencing.users_of[IMAGE] = {UNKNOWN}
    other.wish()
    other.begin()
    await other.runs()
    assert set(host.fencing.fenced) == {OLD, OLDER, UNKNOWN}
    assert other.lock is not None
    assert other.lock.epoch == 9


async def test_a_reboot_takes_its_own_back_at_once(host: Host) -> None:
    """Law 4: another boot id of this very host: its memory is gone, its addresses are fenced, nobody is waited for."""
    orphan(host, theirs(host=HostName("a"), boot_id="an earlier boot"))
    host.fencing.watching[IMAGE] = {OLD}
    host.begin()
    await host.runs(2.0)
    assert set(host.fencing.fenced) == {OLD, OLDER}


async def test_a_crash_is_fenced_and_an_end_in_order_is_not(host: Host) -> None:
    """Law 4: a crashed QEMU's own address is fenced before the next starts, then forgotten: it is proven gone."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    first.end(WaitStatus(signal=9))
    second = await host.runs()
    assert host.fencing.fenced == [address_of(first.pid)]
    assert host.lock is not None
    assert (host.lock.clients, host.lock.fence) == ((address_of(second.pid),), ())
    second.shut_down()
    third = await host.runs()
    assert third is not second
    assert host.fencing.fenced == [address_of(first.pid)]


async def test_a_crash_asks_nobody_else_to_go(host: Host) -> None:
    """Law 4: after a crash of our own QEMU only its address is fenced: a backup may have the image open."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    host.fencing.users_of[IMAGE] = {UNKNOWN}
    first.end(WaitStatus(signal=9))
    await host.runs()
    assert host.fencing.fenced == [address_of(first.pid)]


async def test_who_lets_go_shuts_out_its_dead(host: Host) -> None:
    """Law 9: a lock whose QEMU crashed is released fenced, so that nobody waits 30 s for the dead one's watch."""
    host.wish(rbd=IMAGE)
    host.begin()
    qemu = await host.runs()
    qemu.crash()
    host.sessions = {"a", "b"}
    host.put(host="b")
    await host.until(lambda: host.gone)
    assert host.lock is None
    assert host.fencing.fenced == [address_of(qemu.pid)]
    assert b"kvmsupervisor_fences_total 1.0" in host.context.metrics.render("")[0]


async def test_who_cannot_shut_out_its_dead_lets_go_all_the_same(host: Host) -> None:
    """Law 9: the process is proven gone, which is all that a release needs; an outage of storage keeps nobody."""
    host.wish(rbd=IMAGE)
    host.begin()
    (await host.runs()).crash()
    host.fencing.away = True
    host.sessions = {"a", "b"}
    host.put(host="b")
    await host.until(lambda: host.gone)
    assert (host.lock, host.fencing.fenced) == (None, [])


async def test_a_lock_that_is_taken_over_meanwhile_is_not_released(host: Host) -> None:
    """Laws 2 and 9: while storage shuts out the dead, another host may take the lock: that is not ours to delete."""
    host.wish(rbd=IMAGE)
    host.begin()
    (await host.runs()).crash()
    meanwhile, fence = theirs(epoch=9), host.fencing.fence

    async def takes_long(addresses: Collection[str]) -> None:
        await fence(addresses)
        host.fencing.fence = fence  # type: ignore[method-assign]
        host.etcd.write(LOCK_KEY, meanwhile.to_json())
        await host.clock.sleep(1.0)

    host.fencing.fence = takes_long  # type: ignore[method-assign]
    host.sessions = {"a", "b"}
    host.put(host="b")
    await host.until(lambda: host.gone)
    assert host.lock == meanwhile


@pytest.mark.parametrize("shut_out", [True, False])
async def test_a_lock_is_not_written_again_for_who_was_shut_out(host: Host, shut_out: bool) -> None:
    """Laws 4 and 8: a guest whose lock is gone, and which another host has shut out meanwhile, never writes again."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    await host.die()
    if shut_out:
        await host.fencing.fence([address_of(first.pid)])
    # Taken over, let go of and removed there, then wished for here again: nothing is left that tells of it.
    host.etcd.erase(LOCK_KEY, LAYOUT.status_key(ONE))
    host.begin()
    again = await host.runs()
    assert (again is first) is not shut_out
    assert host.lock is not None
    assert host.lock.clients == (address_of(again.pid),)


async def test_who_holds_the_lock_and_lives_speaks_until_it_is_written_again(host: Host) -> None:
    """Its status stays while a host finds that lock older than its own QEMU, and then ends that, which is shut out.

    Otherwise the status of a QEMU that is gone stood there with a greater epoch for ever (simulation, seed 550).
    """
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    assert host.lock is not None
    await host.fencing.fence([address_of(first.pid)])
    host.sessions = {"a", "b"}
    theirs = replace(host.status, host="b", pid=7, incarnation="y").to_json()
    began = replace(host.lock, host=HostName("b"), boot_id="b", incarnation="y", state=LockState.STARTING, pid=None)
    values = [theirs]
    host.etcd.write(LAYOUT.status_key(ONE), theirs)
    host.etcd.write(LOCK_KEY, began.to_json())
    for _ in range(100):
        await host.clock.advance(0.1)
        values.append(host.etcd.data[LAYOUT.status_key(ONE)])
    assert not first.alive
    assert set(values) == {theirs}


async def test_who_closed_its_disks_is_not_fenced_at_the_release(host: Host) -> None:
    """Law 9: an end in order leaves nothing, so a stop asks nothing of storage."""
    host.wish(rbd=IMAGE)
    host.begin()
    await host.runs()
    asked = host.fencing.asked
    host.put(power="off")
    await host.until(lambda: host.lock is None)
    assert host.fencing.asked == asked


async def test_a_holder_that_was_back_is_waited_for_anew(host: Host) -> None:
    """Law 4: also where storage gave no answer for so long that nobody saw that it was back (seed 2352)."""
    orphan(host)
    host.fencing.watching[IMAGE] = {OLD}
    ask = host.fencing.watchers

    async def takes_long(*told: object) -> tuple[str, ...]:
        host.fencing.watchers = ask  # type: ignore[method-assign]
        await host.clock.sleep(70.0)
        host.gone_since = host.clock.now()
        return (OLD,)

    host.fencing.watchers = takes_long  # type: ignore[method-assign, assignment]
    host.begin()
    await host.clock.advance(125.0)
    assert host.lock == theirs()
    await host.until(lambda: host.lock != theirs(), 10.0)


async def test_who_has_heard_nothing_waits_anew(host: Host) -> None:
    """Law 4: while this host had no session the holder may have been back (simulation, seed 585)."""
    orphan(host)
    host.fencing.watching[IMAGE] = {OLD}
    host.begin()
    await host.clock.advance(50.0)
    host.session.turn(held=False)
    await host.clock.advance(30.0)
    host.session.lease += 1
    host.session.turn(held=True)
    await host.clock.advance(55.0)
    assert host.lock == theirs()
    await host.until(lambda: host.lock != theirs(), 10.0)


async def test_the_qemu_of_a_later_taker_is_not_fenced(host: Host) -> None:
    """Law 4: frozen while it asks storage, a host shuts out nobody once another one has the lock (seed 582)."""
    orphan(host)
    meanwhile, users = theirs(epoch=9), host.fencing.users

    async def takes_long(images: Collection[RbdDisk]) -> tuple[str, ...]:
        host.fencing.users = users  # type: ignore[method-assign]
        host.sessions = {"a", "b"}
        host.etcd.write(LOCK_KEY, meanwhile.to_json())
        host.fencing.users_of[IMAGE] = {UNKNOWN}
        return await users(images)

    host.fencing.users = takes_long  # type: ignore[method-assign]
    host.begin()
    await host.clock.advance(90.0)
    assert host.fencing.users is users
    assert UNKNOWN not in host.fencing.fenced
    assert (host.lock, host.qemus.all) == (meanwhile, [])


async def test_another_instance_is_not_fenced(host: Host) -> None:
    """Law 4: two instances with one image are a mistake of the keys: neither loses its QEMU for it."""
    orphan(host)
    host.fencing.users_of[IMAGE] = {UNKNOWN}
    host.recorded_for = lambda client: InstanceId("2") if client == UNKNOWN else None
    host.begin()
    await host.clock.advance(90.0)
    assert UNKNOWN not in host.fencing.fenced
    assert host.qemus.all == []
    assert "the QEMU of instance 2" in host.status.reason


@pytest.mark.parametrize("lives", [True, False])
async def test_one_that_just_starts_is_not_fenced(host: Host, lives: bool) -> None:
    """Law 4: nor is the QEMU of another instance with that image before it is on record: whose it is cannot be told.

    Who is gone, and has only left the image locked, is none (simulation, seed 5162).
    """
    orphan(host)
    host.fencing.users_of[IMAGE] = {UNKNOWN}
    host.fencing.watching[IMAGE] = {UNKNOWN} if lives else set()
    for name, value in {"host": "c", "ram": "64", "rbd": IMAGE}.items():
        host.etcd.write(LAYOUT.wish_key(InstanceId("2"), name), value)
    host.begin()
    await host.clock.advance(90.0)
    if not lives:
        assert UNKNOWN in host.fencing.fenced
        return
    assert UNKNOWN not in host.fencing.fenced
    assert host.qemus.all == []
    assert "the keys of instance 2 name the same image" in host.status.reason


async def test_two_takers(host: Host, make: MakeHost) -> None:
    """Law 2: whoever writes first has it; the other finds a stranger's lock, and lets go with the key."""
    other = make("c")
    orphan(host)
    for one in (host, other):
        one.sessions = {"a", "c"}

    def move(number: int) -> None:
        if number == 0:
            host.put(host="c")
            other.begin()

    host.store.before = move
    host.begin()
    await host.until(lambda: host.gone)
    await other.runs()
    assert len(host.qemus.all) == 1
    assert other.lock is not None
    assert (other.lock.host, other.lock.epoch) == ("c", 8)


async def test_a_wish_that_ends_while_it_fences(host: Host) -> None:
    """Laws 4 and 9: the lock is not let go of before what it names is fenced."""
    orphan(host)
    host.fencing.refused = "not yet"
    host.begin()
    await host.clock.advance(20.0)
    host.put(power="off")
    await host.clock.advance(20.0)
    assert host.lock is not None
    assert host.lock.state is LockState.FENCING
    host.fencing.refused = None
    await host.until(lambda: host.lock is None)
    assert {OLD, OLDER} <= set(host.fencing.fenced)
    assert host.qemus.all == []


async def test_what_cannot_be_fenced_waits_for_a_word(host: Host) -> None:
    """Law 7: pinned until its lock is broken; then it is taken, with all that is to fence after all."""
    orphan(host, theirs(storage=Storage.UNFENCEABLE))
    host.begin()
    await host.clock.advance(200.0)
    assert host.lock == theirs(storage=Storage.UNFENCEABLE)
    assert "kvmsupervisor break-lock 1" in host.status.reason
    host.etcd.write(LOCK_KEY, theirs(storage=Storage.UNFENCEABLE).broken().to_json())
    await host.runs(5.0)
    assert set(host.fencing.fenced) == {OLD, OLDER}


async def test_a_broken_lock_under_a_living_qemu(host: Host) -> None:
    """Law 7: whoever held it kills its QEMU when it reads that the lock was broken; as its keys say, it starts anew."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    assert host.lock is not None
    host.etcd.write(LOCK_KEY, host.lock.broken().to_json())
    await host.until(lambda: not first.alive)
    second = await host.runs()
    assert host.fencing.fenced == [address_of(first.pid)]
    assert host.is_on_record(second)


async def test_a_supervisor_may_die_before_any_write_of_a_takeover(host: Host) -> None:
    """Law 4: at whatever write it is cut off, its successor fences all before a guest runs."""
    for number in itertools.count():
        host.fencing.fenced.clear()
        orphan(host, theirs(epoch=100 * (number + 1)))
        died: list[int] = []

        def die(at: int, number: int = number, died: list[int] = died) -> None:
            if at == number:
                died.append(at)
                host.loop.cancel()

        host.store.writes_begun, host.store.before = 0, die
        host.begin()
        with contextlib.suppress(AssertionError):
            await host.until(lambda died=died: died or host.running, 30.0)  # type: ignore[misc]
        await host.die()
        host.store.before = lambda at: None
        host.begin()
        qemu = await host.runs()
        assert {OLD, OLDER} <= set(host.fencing.fenced)
        assert host.is_on_record(qemu)
        host.put(power="off")
        qemu.deaf = False
        await host.until(lambda: host.lock is None)
        await host.die()
        host.drop("power")
        if not died:
            break
    assert number >= 3


CUTS = [
    pytest.param(0, "b", LockState.RUNNING, id="before the takeover"),
    pytest.param(1, "a", LockState.FENCING, id="before the fence is on record"),
    pytest.param(2, "a", LockState.STARTING, id="before its QEMU is on record"),
    pytest.param(3, "a", LockState.RUNNING, id="while its guest runs"),
]


@pytest.mark.parametrize(("number", "holder", "state"), CUTS)
async def test_a_taker_may_die_before_any_write_and_another_follows(
    host: Host, make: MakeHost, number: int, holder: str, state: LockState
) -> None:
    """Law 4: at whatever write a taker is cut off, the next host fences all before its guest runs.

    The first taker's QEMU goes on, as that of a host that only seems dead: it is among the fenced if its guest runs.
    """
    other = make("c")
    orphan(host)

    def die(at: int) -> None:
        if at == number:
            host.loop.cancel()

    host.store.before = die
    host.begin()
    with contextlib.suppress(AssertionError):
        await host.until(lambda: host.loop.done() or host.running)
    await host.die()
    host.etcd.erase(host.session.key)
    before = host.lock
    assert before is not None
    assert (before.host, before.state) == (holder, state)
    other.sessions = {"c"}
    other.fencing.fenced.clear()
    other.wish(rbd=IMAGE)
    other.begin()
    qemu = await other.runs()
    assert other.is_on_record(qemu)
    assert {OLD, OLDER} <= set(other.fencing.fenced)
    assert {address_of(one.pid) for one in other.qemus.running if one is not qemu} <= set(other.fencing.fenced)
    assert other.lock is not None
    assert other.lock.epoch == before.epoch + 1
    # What is not proven dead stays on record, for whoever comes next.
    assert set(other.fencing.fenced) == set(other.lock.fence)


async def test_images_are_looked_at(host: Host) -> None:
    """An image that is missing starts nothing and takes nothing; what is wrong is told."""
    host.disks.trouble = "rbd: there is no such image"
    host.wish(rbd=IMAGE)
    host.begin()
    await host.clock.advance(30.0)
    assert (host.lock, host.qemus.all) == (None, [])
    assert host.status.reason == "rbd: there is no such image"
    host.disks.trouble = None
    await host.runs()


async def test_a_machine_without_a_disk_asks_nothing(host: Host) -> None:
    """No question to Ceph for a machine that has nothing there, nor for its end."""
    host.wish()
    host.begin()
    (await host.runs()).end(WaitStatus(signal=9))
    await host.runs()
    assert host.fencing.asked == 0


async def test_growth_is_looked_for_rarely(host: Host) -> None:
    """By itself every ten minutes, at once when a key of the instance was written."""
    host.wish(rbd=IMAGE)
    host.begin()
    qemu = await host.runs()
    host.disks.bytes_of[IMAGE] = 1 << 30
    await host.clock.advance(GROWTH_EVERY_S - 10.0)
    assert "query-block" not in qemu.commands
    await host.clock.advance(20.0)
    assert qemu.commands.count("query-block") == 1
    host.put(description="grown")
    await host.clock.advance(1.0)
    assert qemu.commands.count("query-block") == 2


async def test_what_the_other_host_knew_of_the_machine(host: Host, other: Host) -> None:
    """Its guest keeps the machine type that it was installed on, although the new host says that it waits meanwhile."""
    host.wish(rbd="rbd/a")
    host.begin()
    qemu = await host.runs()
    await host.told()
    assert host.published is not None
    told = replace(host.published, machine="pc-q35-5.0", images=("rbd/a",), files={"file:b.raw": "a"})
    host.etcd.write(LAYOUT.status_key(ONE), told.to_json())
    await host.die()
    qemu.crash()
    host.put(host="b")
    host.sessions = other.sessions = {"b"}
    host.etcd.erase(LAYOUT.session_key(host.me))
    other.begin()
    running = await other.runs(120)
    assert (other.status.machine, other.status.images) == ("pc-q35-5.0", ("rbd/a",))
    assert any("pc-q35-5.0" in word for word in running.argv)
