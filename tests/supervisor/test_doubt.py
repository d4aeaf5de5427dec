"""Law 11: after a change of history storage decides who runs a machine, and nobody is fenced who has its disks open.

Whole supervisors in virtual time; `b` is the host that has not said what it runs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import ANOTHER_HISTORY, Lock, LockState
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.domain.status import Phase
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemu
from tests.fakes.storage import FakeStorage, address_of
from tests.supervisor.test_history import LAYOUT, PATIENCE_S, lock, make, moved, run, untouched
from tests.supervisor.test_supervisor import ME, Bench

IMAGE = "pool/image-1"
LOCK_KEY = LAYOUT.lock_key(InstanceId("1"))


async def silent(bench: Bench, other: Bench, storage: FakeStorage) -> FakeQemu:
    """A machine that ran here when the backup was made, and runs on `b`, which is away when that is restored."""
    backup, theirs = await moved(bench, other, "rbd")
    storage.users_of[IMAGE] = storage.watching[IMAGE] = {address_of(theirs.pid)}
    other.client.away()
    await bench.clock.advance(5.0)
    storage.fenced.clear()
    bench.etcd.restore(backup)
    return theirs


def reason(bench: Bench) -> str:
    status = bench.status("1")
    assert status is not None
    assert status.phase is Phase.WAITING
    return status.reason


async def test_who_has_the_disks_of_a_host_that_stays_silent_is_not_fenced(
    bench: Bench, other: Bench, storage: FakeStorage
) -> None:
    """Law 11: the backup's lock names this host, and storage names another client: that is waited for, then obeyed."""
    theirs = await silent(bench, other, storage)
    await bench.clock.advance(3600.0)
    assert storage.fenced == []
    assert bench.qemus.alive == [theirs]
    assert address_of(theirs.pid) in reason(bench)
    assert f"ceph osd blocklist add {address_of(theirs.pid)}" in reason(bench)
    other.client.back()
    await bench.clock.advance(30.0)
    assert (lock(bench, "1").host, lock(bench, "1").pid) == ("b", theirs.pid)
    assert untouched({"1": theirs})


async def test_what_has_no_lock_says_for_whom_it_waits(bench: Bench, storage: FakeStorage) -> None:
    """Its keys came with the change, and it never ran here: its status tells of the client (simulation, seed 36)."""
    await bench.begin()
    storage.watching[IMAGE] = {"192.0.2.1:0/9"}
    backup = bench.etcd.backup()
    make(backup, "1", kind="rbd")
    bench.etcd._server.cluster = 2
    bench.etcd.restore(backup)
    await bench.clock.advance(PATIENCE_S * 2)
    assert b"ceph osd blocklist add 192.0.2.1:0/9" in bench.etcd.data[LAYOUT.status_key(InstanceId("1"))]
    assert bench.qemus.alive == []


async def test_a_host_that_died_meanwhile_is_taken_over_by_itself(
    bench: Bench, other: Bench, storage: FakeStorage
) -> None:
    """A dead host's watch ends: after a restore, too, that is all that a takeover waits for."""
    theirs = await silent(bench, other, storage)
    await bench.clock.advance(PATIENCE_S + 30.0)
    storage.watching[IMAGE] = set()
    await bench.clock.advance_until(lambda: lock(bench, "1").epoch > 1 and lock(bench, "1").pid, 30.0)
    assert lock(bench, "1").host == ME
    # Who holds the image's own lock, and has it open no more, is on nobody's record.
    assert address_of(theirs.pid) in storage.fenced


async def test_a_guest_that_comes_up_while_its_lock_is_taken(bench: Bench, other: Bench, storage: FakeStorage) -> None:
    """A QEMU that restarts on its host is seen by nobody for a moment; it is not fenced for that either."""
    theirs = await silent(bench, other, storage)
    await bench.clock.advance(PATIENCE_S + 30.0)
    ask = storage.watchers

    async def nobody_once(images: Collection[RbdDisk], lock: Lock | None = None) -> tuple[str, ...]:
        storage.watchers = ask  # type: ignore[method-assign]
        return ()

    storage.watchers = nobody_once  # type: ignore[method-assign]
    await bench.clock.advance_until(lambda: lock(bench, "1").epoch > 1, 30.0)
    await bench.clock.advance(600.0)
    taken = lock(bench, "1")
    assert (taken.host, taken.state, taken.taken_from) == (ME, LockState.FENCING, ANOTHER_HISTORY)
    assert storage.fenced == []
    assert f"ceph osd blocklist add {address_of(theirs.pid)}" in reason(bench)
    storage.watching[IMAGE] = set()
    await bench.clock.advance_until(lambda: lock(bench, "1").pid, 60.0)


async def led_to_a_copy(bench: Bench, other: Bench, storage: FakeStorage) -> FakeQemu:
    """Two hosts with one machine, on `b`; then the etcd of `a` is a copy of this very moment, which `b` never sees."""
    await bench.begin()
    await other.begin()
    qemus = await run(bench, "1", kind="rbd", host="b")
    bench.etcd.write("/kvm/1/hosts", "a b")
    storage.watching[IMAGE] = {address_of(qemus["1"].pid)}
    await bench.clock.advance(10.0)
    other.client.away()
    bench.etcd._server.cluster = 2
    bench.etcd.restore(bench.etcd.backup())
    return qemus["1"]


async def test_a_copy_of_this_very_moment(bench: Bench, other: Bench, storage: FakeStorage) -> None:
    """Every key that was seen is there: another cluster id says that it is another store (simulation, seed 1071)."""
    theirs = await led_to_a_copy(bench, other, storage)
    await bench.clock.advance(3600.0)
    assert bench.metric("kvmsupervisor_history_changes_total") == 1.0
    assert (lock(bench, "1").host, storage.fenced) == ("b", [])
    assert untouched({"1": theirs})


@pytest.mark.parametrize("is_candidate", [True, False], ids=["failover", "by its key"])
async def test_a_persons_word_ends_the_wait(
    bench: Bench, other: Bench, storage: FakeStorage, is_candidate: bool
) -> None:
    """A lock that is broken since then may be taken, and whoever has its disks open is fenced."""
    theirs = await led_to_a_copy(bench, other, storage)
    if not is_candidate:
        bench.etcd.write("/kvm/1/host", ME)
        await bench.clock.advance(PATIENCE_S * 3)
        assert "kvmsupervisor break-lock 1" in reason(bench)
    await bench.clock.advance(PATIENCE_S * 3)
    mark = bench.host._history.present.mark
    bench.etcd.write(LOCK_KEY, lock(bench, "1").broken(mark=mark).to_json())
    await bench.clock.advance_until(lambda: lock(bench, "1").host == ME and lock(bench, "1").pid, 120.0)
    assert address_of(theirs.pid) in storage.fenced


async def test_who_has_spoken_is_fenced_as_always(bench: Bench, other: Bench, storage: FakeStorage) -> None:
    """A host whose machine runs on writes its lock anew, though nothing else of it changed: a later cut is a cut."""
    await bench.begin()
    await other.begin()
    qemus = await run(bench, "1", kind="rbd", host="b")
    storage.watching[IMAGE] = {address_of(qemus["1"].pid)}
    bench.etcd.write("/kvm/1/hosts", "a b")
    before = lock(bench, "1")
    bench.etcd.restore(bench.etcd.backup())
    bench.etcd._server.cluster = 2
    await bench.clock.advance(30.0)
    mark = bench.host._history.present.mark
    assert mark
    assert lock(bench, "1") == replace(before, history=mark)
    other.client.away()
    await bench.clock.advance_until(lambda: lock(bench, "1").host == ME and lock(bench, "1").pid, 120.0)
    assert address_of(qemus["1"].pid) in storage.fenced


async def test_a_machine_that_is_made_since_asks_nobody(bench: Bench, storage: FakeStorage) -> None:
    """What was never in the former history costs no question more than before."""
    await bench.begin()
    asked = []
    for name in "12":
        before = storage.asked
        await run(bench, name, kind="rbd")
        asked.append(storage.asked - before)
        bench.etcd.restore(FakeEtcd(bench.clock.now))
        await bench.clock.advance(PATIENCE_S * 2)
    assert asked[0] == asked[1]


async def test_a_host_that_starts_later_goes_by_what_locks_say(
    bench: Bench, other: Bench, storage: FakeStorage
) -> None:
    """It learns of the change long after: a lock that was written in between names the history, and counts."""
    await other.begin()
    make(bench.etcd, "0", host="b")
    await bench.clock.advance(10.0)
    bench.etcd.restore(bench.etcd.backup())
    bench.etcd._server.cluster = 2
    await bench.clock.advance(30.0)
    qemus = await run(bench, "1", kind="rbd", host="b")
    storage.watching[IMAGE] = {address_of(qemus["1"].pid)}
    bench.etcd.write("/kvm/1/hosts", "a b")
    found = Lock.from_json(bench.etcd.data[LOCK_KEY])
    assert found is not None
    assert found.history
    await bench.begin()
    other.client.away()
    await bench.clock.advance_until(lambda: lock(bench, "1").host == ME, 120.0)
