"""Law 11: backups that are older than what they are restored over, once or twice.

Whole supervisors in virtual time.
"""

from __future__ import annotations

import pytest

from tests.fakes.storage import FakeStorage, address_of
from tests.supervisor.test_history import PATIENCE_S, lock, run, untouched
from tests.supervisor.test_supervisor import Bench

IMAGE = "pool/image-1"


@pytest.mark.parametrize("histories", [0, 1], ids=["of the first history", "of a later one"])
async def test_what_moved_between_two_restores_of_one_backup(bench: Bench, other: Bench, histories: int) -> None:
    """Law 11: its history was left, and nobody goes on with that: the host that runs a file machine is waited for."""
    await bench.begin()
    await other.begin()
    await run(bench, "1", kind="a file")
    for _ in range(histories):
        backup = bench.etcd.backup()
        bench.etcd.write("/elsewhere", "1")
        await bench.clock.advance(5.0)
        bench.etcd.restore(backup)
        await bench.clock.advance(PATIENCE_S)
    backup = bench.etcd.backup()
    bench.etcd.write("/kvm/2/host", "a")
    await bench.clock.advance(5.0)
    bench.etcd.restore(backup)
    await bench.clock.advance(PATIENCE_S)
    bench.etcd.write("/kvm/1/host", "b")
    await bench.clock.advance_until(lambda: lock(bench, "1").host == "b" and lock(bench, "1").pid, 300.0)
    (theirs,) = bench.qemus.alive
    other.client.away()
    await bench.clock.advance(5.0)
    bench.etcd.restore(backup)
    await bench.clock.advance(600.0)
    assert bench.qemus.alive == [theirs]
    other.client.back()
    await bench.clock.advance(60.0)
    assert untouched({"1": theirs})
    assert (lock(bench, "1").host, lock(bench, "1").pid) == ("b", theirs.pid)


async def test_a_lock_that_comes_back_with_a_backup_is_not_kept_for_who_was_shut_out(
    bench: Bench, other: Bench, storage: FakeStorage
) -> None:
    """Law 4: the backup is older than a takeover, and its lock names a QEMU that was fenced since: it starts anew."""
    await bench.begin()
    await other.begin()
    first = (await run(bench, "1", kind="rbd"))["1"]
    bench.etcd.write("/kvm/1/hosts", "a b")
    await bench.clock.advance(5.0)
    backup = bench.etcd.backup()
    bench.etcd.write("/kvm/2/host", "a")
    await bench.clock.advance(5.0)
    bench.client.away()
    await bench.clock.advance_until(lambda: lock(bench, "1").host == "b" and lock(bench, "1").pid, 300.0)
    assert address_of(first.pid) in storage.fenced
    assert first.alive
    await other.end()
    for qemu in bench.qemus.alive:
        if qemu is not first:
            qemu.crash()
    bench.etcd.restore(backup)
    bench.client.back()
    await bench.clock.advance_until(lambda: not first.alive and bench.of("1"), 300.0)
    await bench.clock.advance(5.0)
    assert (lock(bench, "1").host, lock(bench, "1").pid) == ("a", bench.of("1")["1"].pid)
