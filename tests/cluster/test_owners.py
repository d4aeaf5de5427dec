"""Law 4, B9: whose a storage client is, by the locks, and by what supervisors have recorded."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvmsupervisor.adapters.etcd import Unavailable
from kvmsupervisor.cluster.owners import LockOwners, OwnersInEtcd
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Destination, Lock, LockState, Storage, clients_to_json
from tests.cluster.test_informer import running
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd
from tests.fakes.history import SameHistory

ONE, TWO, THREE = (InstanceId(name) for name in ("1", "2", "3"))
MINE, THEIRS, NOBODYS = "192.0.2.1:0/1", "192.0.2.1:0/2", "192.0.2.1:0/3"
OPEN, APART = Layout(), Layout(lock="/locks/%i")


def lock(*clients: str, fence: tuple[str, ...] = (), to: str | None = None) -> bytes:
    held = Lock(
        host=HostName("z"), boot_id="boot-z", epoch=7, state=LockState.RUNNING, incarnation="i7", pid=5, starttime=5,
        clients=clients, fence=fence, storage=Storage.RBD,
    )  # fmt: skip
    if to is not None:
        there = Destination(host=HostName("y"), boot_id="b", incarnation="i8", pid=6, starttime=6, clients=(to,))
        held = replace(held, state=LockState.MIGRATING, to=there, version=2)
    return held.to_json()


def wishes(etcd: FakeEtcd, layout: Layout) -> Wishes:
    return Wishes(
        store=etcd.peer(), clock=FakeClock(), layout=layout, history=SameHistory(), me=HostName("a"),
        concerns=lambda name: name == ONE, on_change=lambda changed, revision: None, on_anew=lambda: None,
        rand=lambda: 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("layout", [OPEN, APART])
async def test_whose_a_client_is(layout: Layout) -> None:
    """Law 4: of all locks, also those that this host does not follow; one's own and what is dead do not count."""
    etcd = FakeEtcd()
    etcd.write(layout.lock_key(ONE), lock(MINE, THEIRS))
    etcd.write(layout.lock_key(TWO), lock(fence=(MINE,), to=THEIRS))
    followed = wishes(etcd, layout)
    owners = LockOwners(followed, etcd, layout)
    async with running(followed):
        found = await owners.recorded_for([MINE, THEIRS, NOBODYS], besides=ONE)
        assert found == {THEIRS: TWO}
        assert await owners.recorded_for([MINE, THEIRS], besides=TWO) == {MINE: ONE, THEIRS: ONE}
        assert await owners.recorded_for([], besides=ONE) == {}
        before = etcd.calls.copy()
        near = await owners.recorded_for([MINE, THEIRS], besides=THREE, everywhere=False)
        assert near == {MINE: ONE, THEIRS: ONE}
        assert etcd.calls == before


@pytest.mark.parametrize("layout", [OPEN, APART])
async def test_a_forged_lock_keeps_nobody_from_being_shut_out(layout: Layout) -> None:
    """B9: where people may write locks, one of them claims another's client in vain, also before the true owner."""
    etcd = FakeEtcd()
    etcd.write(layout.lock_key(TWO), lock(MINE))
    etcd.write(layout.lock_key(THREE), lock(MINE))
    followed = wishes(etcd, layout)
    owners = LockOwners(followed, etcd, layout)
    async with running(followed):
        found = await owners.recorded_for([MINE], besides=ONE, proven=True)
        assert found == ({} if layout is OPEN else {MINE: TWO})
        etcd.write(layout.clients_key(THREE), clients_to_json([MINE]))
        found = await owners.recorded_for([MINE], besides=ONE, proven=True)
        assert found == {MINE: THREE if layout is OPEN else TWO}
        # What it has itself on record is no other's.
        assert await owners.recorded_for([MINE], besides=THREE, proven=True) == ({} if layout is OPEN else {MINE: TWO})


async def test_who_asks_together_reads_once() -> None:
    """A host is gone, and all its machines are taken over at once: that is two readings of all locks, not hundreds."""
    etcd = FakeEtcd()
    etcd.write(APART.lock_key(TWO), lock(THEIRS))
    etcd.write(APART.lock_key(THREE), lock(MINE))
    followed = wishes(etcd, APART)
    owners = LockOwners(followed, etcd, APART)
    async with running(followed):
        before = etcd.calls["list"]
        asked = [owners.recorded_for([client], besides=ONE) for client in (THEIRS, MINE, NOBODYS) * 40]
        found = await asyncio.gather(*asked)
        assert found == [{THEIRS: TWO}, {MINE: THREE}, {}] * 40
        assert etcd.calls["list"] - before == 2


async def test_an_answer_that_does_not_come_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 6: without etcd it is not known; and who waited for another's reading that failed asks again."""
    etcd = FakeEtcd()
    etcd.write(APART.lock_key(TWO), lock(THEIRS))
    followed = wishes(etcd, APART)
    owners = LockOwners(followed, etcd, APART)
    async with running(followed):
        etcd.fail_next(Unavailable("away"), "list")
        asked = [owners.recorded_for([client], besides=ONE) for client in (MINE, THEIRS, NOBODYS)]
        first, *others = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(first, Unavailable)
        assert others == [{THEIRS: TWO}, {}]


@pytest.mark.parametrize(
    ("pattern", "key", "name"),
    [
        ("/kvm/%i/lock", "/kvm/2/lock", "2"),
        ("/locks/%i", "/locks/2", "2"),
        ("/locks/%i", "/kvm/2/lock", "2"),
    ],
)
async def test_whose_client_it_is_asked_of_etcd(pattern: str, key: str, name: str) -> None:
    """Law 4: who follows one lock only learns that a client is another instance's, wherever that one's lock is."""
    etcd = FakeEtcd()
    layout = Layout(lock=pattern)
    own = layout.lock_key(ONE)
    owners = OwnersInEtcd(etcd, layout, own=own)
    etcd.write(own, lock(MINE))
    assert await owners.recorded_for([MINE], besides=ONE) == {}
    etcd.write(key, lock(MINE))
    assert await owners.recorded_for([MINE], besides=ONE) == {MINE: InstanceId(name)}
    assert await owners.recorded_for([MINE], besides=ONE, everywhere=False) == {}
    by_people = key.startswith("/kvm/")
    assert await owners.recorded_for([MINE], besides=ONE, proven=True) == ({} if by_people else {MINE: name})
    etcd.write(layout.clients_key(TWO), clients_to_json([MINE]))
    assert await owners.recorded_for([MINE], besides=ONE, proven=True) == {MINE: InstanceId(name)}
    etcd.away()
    with pytest.raises(Unavailable):
        await owners.recorded_for([MINE], besides=ONE)
