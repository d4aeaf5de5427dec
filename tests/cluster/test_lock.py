"""The lock in etcd: every compare guards, a lost reply is settled by reading, old news changes nothing (law 2)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.adapters.etcd import Ambiguous, Compare, Target, Unavailable
from kvmsupervisor.cluster.lock import InstanceLock, SwapFailed, compares
from kvmsupervisor.domain.history import FIRST_ERA, Era
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Change, Compared, Lock, LockState, Storage, clients_from_json, clients_to_json
from kvmsupervisor.domain.placement import Ground
from kvmsupervisor.domain.status import Phase, Status
from tests.fakes.etcd import FakeEtcd

ONE = InstanceId("1")
LOCK_KEY, HOST_KEY, STATUS_KEY = "/kvm/1/lock", "/kvm/1/host", "/kvmsupervisor/instances/1"
SESSION_KEY = "/kvmsupervisor/hosts/a"
MINE = Lock(host=HostName("a"), boot_id="boot-1", epoch=1, state=LockState.STARTING, incarnation="x")
PLACEMENT_KEY = "/kvmsupervisor/placements/1"
NEXT = MINE.recorded(pid=7, starttime=8, clients=())
THEIRS = replace(MINE, host=HostName("b"), epoch=2, incarnation="y")
LAST = Status(id="1", host="a", phase=Phase.STOPPED, reason="it has no `host`", since="now", epoch=1)
RECORD = Incarnation(
    instance="1", incarnation="x", epoch=1, boot_id="boot-1", argv=(), spec={}, storage=Storage.NONE,
    accelerator="tcg", restart_request=None, revision=1, log_offset=0, spawned_at=1.0,
)  # fmt: skip


class Bench:
    """One lock over a fake etcd in which the session exists and `host` is ours."""

    def __init__(self) -> None:
        self.etcd = FakeEtcd()
        self.etcd.write(SESSION_KEY, "{}")
        self.session = session = Compare(SESSION_KEY, Target.CREATE_REVISION, self.etcd.revision)
        self.etcd.write(HOST_KEY, "a")
        self.ground = Ground(self.etcd.revision)
        self.lock = InstanceLock(store=self.etcd, layout=Layout(), instance=ONE, session=lambda: session)

    @property
    def stored(self) -> Lock | None:
        data = self.etcd.data.get(LOCK_KEY)
        return None if data is None else Lock.from_json(data)

    async def write(self, lock: Lock = MINE) -> None:
        await self.lock.write(Change.TAKE if lock == MINE else Change.RECORD, lock, self.ground)


@pytest.fixture
async def bench() -> Bench:
    """A lock that was read and is absent."""
    made = Bench()
    await made.lock.look()
    return made


async def test_a_free_lock_is_taken_and_changed_and_released(bench: Bench) -> None:
    """Law 2: every change is a compare-and-swap on what was seen last, and what was written is what is seen."""
    await bench.write(MINE)
    assert bench.stored == bench.lock.view.lock == MINE
    await bench.write(NEXT)
    assert bench.stored == bench.lock.view.lock == NEXT
    await bench.lock.release(LAST)
    assert bench.stored is None
    assert (bench.lock.view.known, bench.lock.view.data, bench.lock.view.mod_revision) == (True, None, 0)


async def test_without_a_key_host_none_is_compared(bench: Bench) -> None:
    """Single mode: QEMU's own options have no wish; the session is compared all the same."""
    bench.etcd.write(HOST_KEY, "b")
    await bench.lock.write(Change.TAKE, MINE, None, status=LAST)
    assert bench.stored == MINE
    assert Status.from_json(bench.etcd.data[STATUS_KEY]) == LAST
    await bench.lock.drop()
    assert bench.stored is None
    assert STATUS_KEY in bench.etcd.data
    bench.etcd.erase(SESSION_KEY)
    with pytest.raises(SwapFailed):
        await bench.lock.write(Change.TAKE, MINE, None)


DISTURBED = {
    Compared.LOCK: lambda etcd: etcd.write(LOCK_KEY, THEIRS.to_json()),
    Compared.SESSION: lambda etcd: etcd.erase(SESSION_KEY),
    Compared.GROUND: lambda etcd: etcd.write(HOST_KEY, "b"),
    Compared.HOLDER_GONE: lambda etcd: etcd.write("/kvmsupervisor/hosts/b", "{}"),
    Compared.TARGET: lambda etcd: etcd.erase(Layout().offer_key(ONE)),
}


@pytest.mark.parametrize("disturbed", Compared, ids=lambda each: each.name.lower())
@pytest.mark.parametrize("change", Change, ids=lambda each: each.name.lower())
async def test_each_row_compares_what_it_says(bench: Bench, change: Change, disturbed: Compared) -> None:
    """Laws 2, 4, 7 and 13: what a row of the lock's table compares fails the transaction, and nothing else does."""
    bench.etcd.write(Layout().offer_key(ONE), "{}")
    offer = bench.etcd.revision
    bench.etcd.write(LOCK_KEY, MINE.to_json())
    compared = compares(
        change,
        layout=Layout(),
        instance=ONE,
        revision=bench.etcd.revision,
        session=bench.session,
        ground=bench.ground,
        holder=HostName("b"),
        offer=offer,
    )
    DISTURBED[disturbed](bench.etcd)
    result = await bench.etcd.txn(compared, [])
    assert result.succeeded is (disturbed not in change.value.compares)


async def test_what_the_table_does_not_have_is_not_written(bench: Bench) -> None:
    """Laws 2 and 4: a change that does not follow on what was seen last is refused before etcd is asked."""
    unfenced = replace(MINE, state=LockState.FENCING, fence=("c",))
    await bench.write(MINE)
    with pytest.raises(SwapFailed):
        await bench.lock.write(Change.RECORD, replace(NEXT, incarnation="y"), bench.ground)
    bench.etcd.write(LOCK_KEY, unfenced.to_json())
    await bench.lock.look()
    with pytest.raises(SwapFailed):
        await bench.lock.release(LAST)
    assert bench.stored == unfenced


async def test_nothing_is_written_without_the_session(bench: Bench) -> None:
    """Law 2: "my session exists" is compared, by etcd and in the same transaction."""
    bench.etcd.erase(SESSION_KEY)
    with pytest.raises(SwapFailed, match="a session, the key `host`"):
        await bench.write()
    assert bench.stored is None


async def test_a_session_that_came_back_is_another_one(bench: Bench) -> None:
    """Law 1: a key of the same name, made anew, is not the session that was held."""
    bench.etcd.erase(SESSION_KEY)
    bench.etcd.write(SESSION_KEY, "{}")
    with pytest.raises(SwapFailed):
        await bench.write()


async def test_nothing_is_written_once_a_placement_came_or_went(bench: Bench) -> None:
    """Laws 2 and 10: what stands in for `host` is compared like it, and its absence, too."""
    bench.etcd.write(PLACEMENT_KEY, "{}")
    with pytest.raises(SwapFailed, match="or the placement changed"):
        await bench.write()
    bench.ground = replace(bench.ground, placement_revision=bench.etcd.revision)
    await bench.write()
    bench.etcd.erase(PLACEMENT_KEY)
    with pytest.raises(SwapFailed, match="or the placement changed"):
        await bench.write(NEXT)
    assert bench.stored == MINE


async def test_a_release_takes_a_placement_that_has_ended_along(bench: Bench) -> None:
    """Law 10: in one step with the lock, and not when it is another one by now."""
    bench.etcd.write(PLACEMENT_KEY, "{}")
    ended = bench.etcd.revision
    bench.ground = replace(bench.ground, placement_revision=ended)
    await bench.write()
    bench.etcd.write(PLACEMENT_KEY, "{}")
    with pytest.raises(SwapFailed):
        await bench.lock.release(LAST, stale_placement=ended)
    with pytest.raises(SwapFailed):
        await bench.lock.tidy(ended)
    assert bench.stored == MINE
    await bench.lock.release(LAST, stale_placement=bench.etcd.revision)
    assert bench.stored is None
    assert PLACEMENT_KEY not in bench.etcd.data


@pytest.mark.parametrize("change", ["b", "a", None])
async def test_nothing_is_written_once_the_host_key_changed(bench: Bench, change: str | None) -> None:
    """Law 2: "`host` is still me" is compared by revision: also a key that was rewritten is looked at again first."""
    if change is None:
        bench.etcd.erase(HOST_KEY)
    else:
        bench.etcd.write(HOST_KEY, change)
    with pytest.raises(SwapFailed, match="a session, the key `host`"):
        await bench.write()
    assert bench.stored is None


async def test_a_strangers_lock_is_never_overwritten(bench: Bench) -> None:
    """Law 2: who was first has it, and the loser knows who."""
    bench.etcd.write(LOCK_KEY, THEIRS.to_json())
    with pytest.raises(SwapFailed, match="the lock changed meanwhile"):
        await bench.write()
    assert bench.stored == bench.lock.view.lock == THEIRS


async def test_a_lock_that_was_deleted_is_not_written_as_if_it_stood(bench: Bench) -> None:
    """Law 2: between two steps somebody deleted it: look again first."""
    await bench.write(MINE)
    bench.etcd.erase(LOCK_KEY)
    with pytest.raises(SwapFailed, match="the lock changed meanwhile"):
        await bench.write(NEXT)
    assert bench.stored is None
    assert bench.lock.view.data is None


async def test_the_same_value_written_by_somebody_else_is_a_change(bench: Bench) -> None:
    """Law 2: revisions are compared, not values."""
    await bench.write(MINE)
    bench.etcd.write(LOCK_KEY, MINE.to_json())
    with pytest.raises(SwapFailed):
        await bench.write(NEXT)
    assert bench.stored == MINE


@pytest.mark.parametrize(("incarnation", "epoch"), [("x", 1), ("of a former machine", 2), (None, 2)])
async def test_the_epoch_of_one_that_lives(bench: Bench, incarnation: str | None, epoch: int) -> None:
    """Law 11: a status that came with another history may be of a machine before; this QEMU's own raises nothing."""
    last = replace(LAST, phase=Phase.RUNNING, incarnation=incarnation)
    bench.etcd.write(STATUS_KEY, last.to_json())
    era = Era(count=1, number=1, since=bench.etcd.revision, mark="second")
    record = replace(RECORD, revision=bench.etcd.revision + 9)
    assert await bench.lock.epoch_of_the_living(record, bench.lock.view, era) == epoch


async def test_a_reassertion_needs_an_absent_lock_and_the_session(bench: Bench) -> None:
    """A deleted lock is written again by its living QEMU's host only, and never over somebody who was faster."""
    bench.etcd.write(HOST_KEY, "b")
    await bench.lock.reassert(NEXT, FIRST_ERA)
    assert bench.stored == NEXT
    bench.etcd.write(LOCK_KEY, THEIRS.to_json())
    with pytest.raises(SwapFailed):
        await bench.lock.reassert(NEXT, FIRST_ERA)
    assert bench.stored == THEIRS
    bench.etcd.erase(LOCK_KEY, SESSION_KEY)
    await bench.lock.look()
    with pytest.raises(SwapFailed):
        await bench.lock.reassert(NEXT, FIRST_ERA)
    assert bench.stored is None


@pytest.mark.parametrize("name", ["w", "y"], ids=["lesser", "greater"])
async def test_no_two_have_one_epoch(bench: Bench, name: str) -> None:
    """Law 2: where another host began anew with the epoch of one that lives, that one gets the next, whatever its name.

    The machine was removed and made again while its host was away (simulation, seed 8621).
    """
    bench.etcd.write(LOCK_KEY, replace(THEIRS, epoch=1, incarnation=name).to_json())
    await bench.lock.look()
    assert await bench.lock.epoch_of_the_living(RECORD, bench.lock.view, FIRST_ERA) == 2


async def test_a_lost_reply_to_a_write_that_was_done_is_a_success(bench: Bench) -> None:
    """A compare-and-swap whose reply was lost recognises its own value."""
    bench.etcd.lose_next_reply()
    await bench.write(MINE)
    assert bench.stored == bench.lock.view.lock == MINE
    await bench.write(NEXT)
    assert bench.stored == NEXT


async def test_a_lost_request_is_a_failed_swap(bench: Bench) -> None:
    """One that never arrived is told as such: decide again."""
    bench.etcd.lose_next_request()
    with pytest.raises(SwapFailed, match="a reply was lost, and the change was not made"):
        await bench.write(MINE)
    assert bench.stored is None


async def test_a_lost_reply_to_a_refused_swap_is_no_success(bench: Bench) -> None:
    """Law 2: what stands there after a lost reply is looked at, not hoped for."""
    bench.etcd.write(LOCK_KEY, THEIRS.to_json())
    bench.etcd.lose_next_reply()
    with pytest.raises(SwapFailed):
        await bench.write(MINE)
    assert bench.stored == bench.lock.view.lock == THEIRS


async def test_a_lost_reply_to_a_release_is_settled_too(bench: Bench) -> None:
    """Law 9: a delete that was done is done, whoever lost the reply."""
    await bench.write(MINE)
    bench.etcd.lose_next_reply()
    await bench.lock.release(LAST)
    assert bench.lock.view.data is None
    assert STATUS_KEY in bench.etcd.data


async def test_what_was_vouched_for_is_kept(bench: Bench) -> None:
    """Law 4: a supervisor that has just come hands on what the one before has said of the lock's other addresses.

    Otherwise who takes the lock over waits for a person before it shuts them out (simulation, seed 425).
    """
    before, own, strange = "192.0.2.1:0/1", "192.0.2.1:0/2", "192.0.2.9:0/9"
    bench.etcd.write("/kvmsupervisor/clients/1", clients_to_json({before, own}).decode())
    held = replace(MINE, state=LockState.RUNNING, pid=7, clients=(own,), fence=(before, strange))
    bench.etcd.write(LOCK_KEY, held.to_json())
    await bench.lock.look()
    bench.lock.vouch([own])
    await bench.lock.write(Change.RENAME, replace(held, facts="/kvmsupervisor"), bench.ground)
    assert clients_from_json(bench.etcd.data["/kvmsupervisor/clients/1"]) == {before, own}


async def test_an_etcd_that_is_away_changes_nothing(bench: Bench) -> None:
    """Law 6: no error is a failed compare; the view stays."""
    await bench.write(MINE)
    before = bench.lock.view
    bench.etcd.away()
    with pytest.raises(Unavailable):
        await bench.write(NEXT)
    assert bench.lock.view == before


async def test_a_lost_reply_whose_reading_fails_stays_open(bench: Bench) -> None:
    """When neither reply nor reading came, nothing is claimed; the next look tells."""

    async def away_afterwards(call: str) -> None:
        if call == "read":
            bench.etcd.away()

    bench.etcd.hook = away_afterwards
    bench.etcd.lose_next_reply()
    with pytest.raises(Unavailable) as raised:
        await bench.write(MINE)
    assert not isinstance(raised.value, Ambiguous)
    assert bench.lock.view.data is None
    bench.etcd.back()
    bench.etcd.hook = None
    await bench.lock.look()
    assert bench.lock.view.lock == MINE


def test_older_news_changes_nothing() -> None:
    """A watch that lags behind what a transaction has shown does not bring the old lock back."""
    lock = Bench().lock
    lock.seen(data=NEXT.to_json(), mod_revision=9, as_of=9)
    lock.seen(data=MINE.to_json(), mod_revision=5, as_of=8)
    lock.seen(data=None, mod_revision=0, as_of=9)
    assert lock.view.lock == NEXT
    lock.seen(data=None, mod_revision=0, as_of=10)
    assert lock.view.data is None


def test_the_first_news_counts_whatever_its_revision() -> None:
    """Before the first look nothing is known, and "absent" is an answer."""
    lock = Bench().lock
    assert not lock.view.known
    lock.seen(data=None, mod_revision=0, as_of=0)
    assert lock.view.known


async def test_releasing_writes_the_last_status_in_the_same_step(bench: Bench) -> None:
    """Who takes a free lock finds in the status up to which epoch it came: there is no instant between the two."""
    await bench.write(MINE)
    revision = await bench.lock.release(LAST)
    assert bench.etcd.data[STATUS_KEY] == LAST.to_json()
    assert revision == bench.etcd.revision
    assert await bench.lock.look() == LAST


async def test_releasing_for_good_deletes_the_status(bench: Bench) -> None:
    """With the keys gone, nothing of an instance stays."""
    bench.etcd.write(STATUS_KEY, LAST.to_json())
    await bench.write(MINE)
    await bench.lock.release(None)
    assert bench.etcd.data.keys() == {HOST_KEY, SESSION_KEY}


async def test_a_lock_that_is_not_ours_any_more_is_not_released(bench: Bench) -> None:
    """Law 9: the delete compares too; the status is not overwritten either."""
    await bench.write(MINE)
    bench.etcd.write(LOCK_KEY, THEIRS.to_json())
    with pytest.raises(SwapFailed):
        await bench.lock.release(LAST)
    assert bench.stored == THEIRS
    assert STATUS_KEY not in bench.etcd.data


@pytest.mark.parametrize("garbage", [b"", b"?", b"[" * 100_000, b"\xff", b'{"epoch":"x"}'])
async def test_a_status_that_is_none_tells_nothing(bench: Bench, garbage: bytes) -> None:
    """Whatever stands in the status key hurts nobody who takes the lock."""
    bench.etcd.write(STATUS_KEY, garbage)
    assert await bench.lock.look() is None
