"""Law 12: two machines under one name. The supervisor of one is away, its guests run, and the other gets its session.

Whole supervisors in virtual time. Found by the simulation, seed 414.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.status import Phase
from tests.fakes.qemu import FakeQemu
from tests.fakes.storage import FakeStorage, address_of
from tests.supervisor.test_history import KINDS, LAYOUT, lock, run, untouched
from tests.supervisor.test_supervisor import Bench

LONG_S = 900.0
"""Longer than any deadline and any pause of a supervisor."""

IMAGE = "pool/image-1"


def machine(name: str) -> Bench:
    """One under the name `a`."""
    made = Bench()
    made.machine = name
    return made


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = machine("first")
    made.storage = FakeStorage()
    yield made
    await made.close()


@pytest.fixture
async def namesake(bench: Bench) -> AsyncIterator[Bench]:
    """Another machine of the same cluster, to which somebody has given the same name."""
    made = machine("second")
    made.clock, made.etcd, made.qemus, made.storage = bench.clock, bench.etcd, bench.qemus, bench.storage
    yield made
    await made.close()


async def left(bench: Bench, kind: str) -> dict[str, FakeQemu]:
    """A machine runs whose supervisor has gone."""
    await bench.begin()
    qemus = await run(bench, "1", kind=kind)
    if bench.storage is not None and kind == "rbd":
        bench.storage.users_of[IMAGE] = bench.storage.watching[IMAGE] = {address_of(qemus["1"].pid)}
    await bench.end()
    return qemus


@pytest.mark.parametrize("removed", [False, True], ids=["wanted", "removed"])
@pytest.mark.parametrize("kind", ["a file", "rbd"])
async def test_a_namesake_lets_go_of_nothing(bench: Bench, namesake: Bench, kind: str, removed: bool) -> None:
    """Laws 7, 9 and 12: its name proves no process gone; neither is the lock taken or deleted, nor anybody fenced.

    The namesake took the lock for its own of an earlier boot: it started a second QEMU on a file.
    """
    assert bench.storage is not None
    qemus = await left(bench, kind)
    before = lock(bench, "1")
    if removed:
        bench.etcd.erase(*(key for key in bench.etcd.data if key.startswith("/kvm/1/") and not key.endswith("/lock")))
    await namesake.begin(virtual_s=LONG_S)
    assert "/kvmsupervisor/hosts/a" in bench.etcd.data
    assert untouched(qemus)
    assert bench.qemus.alive == [*qemus.values()]
    assert bench.storage.fenced == []
    assert lock(bench, "1") == before
    status = namesake.status("1")
    assert status is not None
    assert "another machine" in status.reason
    # And taken back.
    await namesake.end()
    await bench.begin(virtual_s=60.0)
    assert bench.metric("kvmsupervisor_adopted_total") == 1.0
    assert bench.qemus.alive == ([] if removed else [*qemus.values()])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_machine_that_replaces_another_goes_on(bench: Bench, namesake: Bench, kind: str) -> None:
    """Laws 4 and 7: under the name of one that is gone, what storage can fence is taken; a file waits."""
    assert bench.storage is not None
    qemus = await left(bench, kind)
    before = lock(bench, "1")
    qemus["1"].crash()
    bench.storage.users_of.clear()
    bench.storage.watching.clear()
    await namesake.begin(virtual_s=60.0)
    if kind != "a file":
        assert lock(bench, "1").machine == "second"
        assert bench.of("1")
        return
    assert lock(bench, "1") == before
    status = namesake.status("1")
    assert status is not None
    assert status.phase is Phase.WAITING
    assert "break-lock 1" in status.reason
    bench.etcd.write(LAYOUT.lock_key(InstanceId("1")), before.broken().to_json())
    await namesake.clock.advance(30.0)
    assert bench.of("1")
