"""Two instances that name one image, in virtual time: who waits holds nothing, and one of them always runs.

The other one is played: its keys, its lock, and its client of the storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.spec import RawValue
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.instance.sharing import Namesakes
from tests.support.host import LAYOUT, ONE, Host

IMAGE = "rbd/vm"
CLIENT = "192.0.2.1:0/9"
BEFORE, AFTER = InstanceId("0"), InstanceId("2")
"""Ids below and above that of the instance under test."""

TAKEN = Lock(
    host=HostName("b"), boot_id="boot-b", epoch=3, state=LockState.STARTING, incarnation="i3", storage=Storage.RBD
)
RUNS = replace(TAKEN, state=LockState.RUNNING, pid=5, starttime=5, clients=(CLIENT,))


@pytest.fixture
def host(host: Host) -> Host:
    host.sessions = {"a", "b"}
    return host


def other(host: Host, name: InstanceId, lock: Lock | None, *, image: str = IMAGE) -> None:
    """Another instance, on another host, and its lock."""
    host.etcd.write(LAYOUT.wish_key(name, "host"), "b")
    host.etcd.write(LAYOUT.wish_key(name, "ram"), "64")
    host.etcd.write(LAYOUT.wish_key(name, "rbd"), image)
    if lock is not None:
        host.etcd.write(LAYOUT.lock_key(name), lock.to_json())
    is_open = lock is not None and lock.state is LockState.RUNNING
    host.fencing.elsewhere[IMAGE] = host.fencing.watching[IMAGE] = {CLIENT} if is_open else set()
    host.recorded_for = lambda client: name if is_open and client == CLIENT else None


def let_go(host: Host, name: InstanceId) -> None:
    """The other one has ended, and its lock was released."""
    host.etcd.erase(LAYOUT.lock_key(name))
    host.fencing.elsewhere[IMAGE] = host.fencing.watching[IMAGE] = set()
    host.recorded_for = lambda client: None


@pytest.mark.parametrize("name", [BEFORE, AFTER])
@pytest.mark.parametrize("lock", [RUNS, TAKEN])
async def test_who_has_no_lock_waits_and_holds_nothing(host: Host, name: InstanceId, lock: Lock) -> None:
    """A clone that kept its original's `rbd`: no QEMU, no lock, both ids; it starts by itself once the other let go."""
    other(host, name, lock)
    host.wish(rbd=IMAGE)
    host.begin()
    await host.clock.advance(60.0)
    assert (host.qemus.all, host.lock) == ([], None)
    assert host.status.phase is Phase.WAITING
    assert IMAGE in host.status.reason
    assert f"of {ONE} or of {name}" in host.status.reason
    assert host.published is not None
    assert host.published.reason == host.status.reason
    # Killed and started anew, the other one has its lock all the time.
    other(host, name, TAKEN)
    await host.clock.advance(60.0)
    assert (host.qemus.all, host.lock) == ([], None)
    let_go(host, name)
    await host.runs()


async def test_another_image_ends_it(host: Host) -> None:
    """Once either instance's keys name another image, the one that waited starts by itself."""
    other(host, AFTER, RUNS)
    host.wish(rbd=IMAGE)
    host.begin()
    await host.clock.advance(20.0)
    assert host.lock is None
    host.put(rbd="rbd/mine")
    await host.runs()


async def test_no_image_of_the_same_name_elsewhere_is_waited_for(host: Host) -> None:
    """Another pool, or a longer name, is another image; an instance without a lock has none."""
    other(host, AFTER, RUNS, image="rbd/vm2")
    other(host, BEFORE, RUNS, image="other/vm")
    let_go(host, InstanceId("3"))
    other(host, InstanceId("4"), None)
    host.wish(rbd=IMAGE)
    host.begin()
    await host.runs()


async def test_who_meets_a_client_on_record_gives_way(host: Host) -> None:
    """A client on record is another instance's, whatever image its keys name by now: nobody stays paused beside it."""
    other(host, BEFORE, RUNS, image="rbd/another")
    host.wish(rbd=IMAGE)
    host.begin()
    await host.until(lambda: "instance 0" in host.status.reason and host.lock is None)
    assert [qemu.alive for qemu in host.qemus.all] == [False]
    await host.clock.advance(60.0)
    assert len(host.qemus.all) == 1
    let_go(host, BEFORE)
    await host.runs()


@pytest.mark.parametrize(("name", "waits"), [(BEFORE, True), (AFTER, False)])
async def test_of_two_at_the_same_instant_one_runs(host: Host, name: InstanceId, waits: bool) -> None:
    """Both have taken their lock and are paused: the one with the greater id gives way, the other one runs."""
    other(host, name, None)
    host.fencing.elsewhere[IMAGE] = {CLIENT}

    def meanwhile(number: int) -> None:
        if number == 0:
            host.etcd.write(LAYOUT.lock_key(name), TAKEN.to_json())

    host.store.before = meanwhile
    host.wish(rbd=IMAGE)
    host.begin()
    if waits:
        await host.until(lambda: host.qemus.all and host.lock is None)
        assert not any(qemu.alive for qemu in host.qemus.all)
        assert f"instance {name}" in host.status.reason
    else:
        await host.clock.advance(20.0)
        assert host.status.reason.endswith(f"Instance {name} names it, too, and gives way to {ONE}")
        assert [qemu.alive for qemu in host.qemus.all] == [True]
        let_go(host, name)
        assert (await host.runs()) is host.qemus.all[0]


async def test_who_runs_tells_of_the_other(host: Host) -> None:
    """As soon as keys of another name its image, and no longer; a disk that nobody writes to may be everybody's."""
    other(host, InstanceId("3"), None, image="rbd/another")
    host.wish(rbd=IMAGE)
    host.begin()
    await host.runs()
    assert host.status.reason == "runs"
    for name in (AFTER, BEFORE):
        other(host, name, None)
    await host.told()
    assert (
        host.status.reason == f"runs; {IMAGE} is named by the keys of {BEFORE}, {AFTER}, too: only one of them can run"
    )
    assert host.published is not None
    assert host.published.reason == host.status.reason
    host.etcd.write(LAYOUT.wish_key(BEFORE, "rbd"), "rbd/mine")
    await host.told()
    assert f"of {AFTER}, too" in host.status.reason
    host.etcd.write(LAYOUT.wish_key(AFTER, "rbd"), f"{IMAGE} ro")
    await host.told()
    assert host.status.reason == "runs"
    # By its own keys, pending until it starts again: what it has open is what counts.
    host.etcd.write(LAYOUT.wish_key(AFTER, "rbd"), f"/{IMAGE}")
    host.put(rbd="rbd/new")
    await host.told()
    assert f"of {AFTER}, too" in host.status.reason
    host.etcd.erase(LAYOUT.wish_key(AFTER, "rbd"))
    await host.told()
    assert host.status.reason == "runs"


class Keys(dict[InstanceId, dict[bytes, RawValue]]):
    """The keys of a cluster without locks. Implements `sharing.AllWishes`."""

    def put(self, name: str, rbd: str) -> InstanceId:
        one = InstanceId(name)
        self[one] = {key: RawValue(value.encode(), 1) for key, value in {b"ram": "64", b"rbd": rbd}.items()}
        return one

    def keys_of(self, instance: InstanceId) -> Mapping[bytes, RawValue]:
        return self[instance]

    def lock_of(self, instance: InstanceId) -> None:
        return None

    def ids(self) -> Set[InstanceId]:
        return self.keys()


@pytest.mark.parametrize("text", ["rbd/vm", "/rbd/vm", "  rbd/vm discard", "rbd/vm\u00a0discard", "rbd/vm\niops=5"])
def test_an_image_is_told_by_its_whole_name(text: str) -> None:
    """However it is written. An image of that name in another pool is another one, and wakes no machine."""
    keys = Keys()
    names = Namesakes(keys, HostName("a"))
    mine, elsewhere = keys.put("1", IMAGE), keys.put("2", "others/vm")
    assert names.heard({mine, elsewhere}) == set()
    third = keys.put("3", text)
    assert names.heard({third}) == {mine}
    assert names.of(mine, [IMAGE]) == [third]
