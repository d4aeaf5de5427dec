"""Forged facts, in virtual time: who may write a lock names nobody to be shut out. The world is `test_worker`'s."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Destination, Lock, LockState, clients_from_json, clients_to_json
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Action
from tests.fakes.qemu import FakeQemu
from tests.fakes.storage import address_of
from tests.instance.test_takeover import IMAGE, LOCK_KEY, OLD, OLDER, UNKNOWN, orphan, theirs
from tests.support.host import LAYOUT, ONE, Host

CLIENTS_KEY = LAYOUT.clients_key(ONE)


async def test_a_locks_word_alone_shuts_nobody_out(host: Host) -> None:
    """B9: neither Ceph nor a supervisor names the addresses of a forged lock: it waits, and a person's word ends it."""
    host.etcd.write(LOCK_KEY, theirs().to_json())
    host.wish(rbd=IMAGE)
    host.begin()
    await host.clock.advance(120.0)
    assert host.fencing.fenced == []
    assert host.qemus.all == []
    assert host.status.phase is Phase.WAITING
    assert f"wants {OLDER} and {OLD} shut out" in host.status.reason
    assert f"`ceph osd blocklist add {OLDER}`" in host.status.reason
    assert host.lock is not None
    assert set(host.lock.fence) == {OLD, OLDER}
    # Taking a lock vouches for nothing that it says.
    assert CLIENTS_KEY not in host.etcd.data
    # Somebody with that right in Ceph did so.
    host.fencing.fenced += [OLDER, OLD]
    await host.runs()
    assert host.fencing.fenced[2:] == [OLDER, OLD]


async def test_storages_word_is_enough(host: Host) -> None:
    """B9, law 4: whom Ceph names as a user of its images is shut out, also if named while it was waited for."""
    host.etcd.write(LOCK_KEY, theirs().to_json())
    host.wish(rbd=IMAGE)
    host.fencing.watching[IMAGE] = {OLD}
    host.fencing.users_of[IMAGE] = {OLDER}
    host.begin()
    await host.clock.advance(20.0)
    host.fencing.watching[IMAGE].clear()
    await host.runs(10.0)
    assert set(host.fencing.fenced) == {OLD, OLDER}


async def test_another_instances_client_is_never_shut_out(host: Host) -> None:
    """B9: though Ceph names it as a user of the image, which two instances' keys name."""
    host.etcd.write(LOCK_KEY, theirs().to_json())
    host.wish(rbd=IMAGE)
    host.fencing.users_of[IMAGE] = {OLD, OLDER}
    host.recorded_for = lambda client: InstanceId("2") if client == OLD else None
    host.begin()
    await host.clock.advance(60.0)
    assert host.fencing.fenced == []
    assert "the QEMU of instance 2" in host.status.reason


async def test_what_a_supervisor_records_is_vouched_for(host: Host) -> None:
    """B9: its own clients stand among the facts while the lock does, so that the next host may shut them out."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    assert clients_from_json(host.etcd.data[CLIENTS_KEY]) == {address_of(first.pid)}
    first.end(WaitStatus(signal=9))
    second = await host.runs()
    assert host.fencing.fenced == [address_of(first.pid)]
    assert clients_from_json(host.etcd.data[CLIENTS_KEY]) == {address_of(second.pid)}
    host.put(power="off")
    await host.until(lambda: host.lock is None)
    assert CLIENTS_KEY not in host.etcd.data


async def test_what_is_added_to_its_own_lock_is_not_believed(host: Host) -> None:
    """B9: somebody adds an address to the lock of a machine that runs: no next start and no end shuts that out."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    assert host.lock is not None
    forged = host.lock.recorded(pid=first.pid, starttime=1, clients=(*host.lock.clients, UNKNOWN), images=(IMAGE,))
    host.etcd.write(LOCK_KEY, forged.to_json())
    await host.clock.advance(1.0)
    first.crash()
    await host.clock.advance(30.0)
    assert UNKNOWN not in host.fencing.fenced
    assert UNKNOWN in host.status.reason


async def test_a_locks_fence_that_another_taker_left_is_vouched_for_as_before(host: Host) -> None:
    """Law 4: a taker that died hands on what it found, with the same doubt and the same word."""
    lock = theirs(host=HostName("c"), state=LockState.FENCING, taken_from="b", clients=(), fence=(OLD, OLDER))
    host.etcd.write(LOCK_KEY, lock.to_json())
    host.etcd.write(CLIENTS_KEY, clients_to_json([OLD, OLDER]))
    host.wish(rbd=IMAGE)
    host.begin()
    await host.runs(10.0)
    assert set(host.fencing.fenced) == {OLD, OLDER}


async def test_what_another_instance_has_on_record_is_not_shut_out(host: Host) -> None:
    """B9: a supervisor's word for it notwithstanding: it waits until a person, or that instance, says otherwise."""
    orphan(host)
    host.recorded_for = lambda client: InstanceId("2") if client == OLD else None
    host.begin()
    await host.clock.advance(60.0)
    assert host.fencing.fenced == []
    assert host.qemus.all == []
    assert f"{OLD} is on record as its QEMU and as that of instance 2" in host.status.reason
    assert f"`ceph osd blocklist add {OLD}`" in host.status.reason
    # A person says so.
    host.fencing.fenced.append(OLD)
    await host.runs()
    assert set(host.fencing.fenced) == {OLD, OLDER}


async def test_an_end_shuts_out_no_other_instances_client(host: Host) -> None:
    """B9: the same before a lock is let go of; nothing waits for it, as its own process is proven gone."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    host.recorded_for = lambda client: InstanceId("2")
    host.put(power="off")
    host.put(restart="never")
    first.crash()
    await host.until(lambda: host.lock is None)
    assert host.fencing.fenced == []


def as_an_earlier_release_left_it(host: Host) -> None:
    """Its record says nothing of the repetition, which is not there either."""
    path = host.path / ONE / "incarnation.json"
    told = json.loads(path.read_text())
    assert told.pop("vouched") is True
    path.write_text(json.dumps(told))
    host.etcd.erase(CLIENTS_KEY)


async def test_a_guest_of_an_earlier_release_is_vouched_for_once_it_is_adopted(host: Host, other: Host) -> None:
    """Law 4, B9: without a restart of any guest; so the next host may shut it out. Once, and then nothing is asked."""
    host.wish(rbd=IMAGE)
    host.begin()
    qemu = await host.runs()
    await host.die()
    as_an_earlier_release_left_it(host)
    host.begin()
    await host.until(lambda: CLIENTS_KEY in host.etcd.data)
    assert clients_from_json(host.etcd.data[CLIENTS_KEY]) == {address_of(qemu.pid)}
    await host.told()
    assert (host.status.phase, host.status.reason, qemu.alive) == (Phase.RUNNING, "runs", True)
    await host.die()
    host.etcd.erase(CLIENTS_KEY)
    host.begin()
    await host.clock.advance(60.0)
    assert CLIENTS_KEY not in host.etcd.data
    await host.die()


@pytest.mark.parametrize(
    ("there", "then"), [((OLD,), ()), ((OLDER, OLD), (OLDER,)), (("own",), ()), (("own", UNKNOWN), (UNKNOWN,))]
)
async def test_what_is_on_record_already_stays(host: Host, there: tuple[str, ...], then: tuple[str, ...]) -> None:
    """Law 4: a release in between may have left other clients there; those that the lock still names are kept."""
    host.wish(rbd=IMAGE)
    host.begin()
    qemu = await host.runs()
    own = address_of(qemu.pid)
    await host.die()
    as_an_earlier_release_left_it(host)
    assert host.lock is not None
    host.etcd.write(LOCK_KEY, replace(host.lock, fence=(OLDER,)).to_json())
    host.etcd.write(CLIENTS_KEY, clients_to_json(own if one == "own" else one for one in there))
    host.begin()
    await host.until(lambda: json.loads((host.path / ONE / "incarnation.json").read_text())["vouched"])
    assert clients_from_json(host.etcd.data[CLIENTS_KEY]) == {own, *then}


@pytest.mark.parametrize("fault", ["lost reply", "lost request"])
async def test_a_word_that_is_lost_is_given_again(host: Host, fault: str) -> None:
    """Law 4: etcd does not answer, or another writer is first: it is tried again, and the guest runs on."""
    host.wish(rbd=IMAGE)
    host.begin()
    qemu = await host.runs()
    await host.die()
    as_an_earlier_release_left_it(host)
    host.store.faults[host.store.writes_begun] = fault
    host.begin()
    # With its next look, within a minute.
    await host.until(lambda: json.loads((host.path / ONE / "incarnation.json").read_text()).get("vouched", False), 90.0)
    assert clients_from_json(host.etcd.data[CLIENTS_KEY]) == {address_of(qemu.pid)}
    assert qemu.alive


def given(host: Host, **changes: object) -> Lock:
    """A lock that gives the guest that runs here to itself, from a host that is gone, with more to shut out."""
    assert host.lock is not None
    told = replace(host.lock, state=LockState.GIVEN, taken_from="gone", fence=(OLD, UNKNOWN), version=2)
    return replace(told, **changes)  # type: ignore[arg-type]


async def comes_to_a_stop(host: Host, qemu: FakeQemu) -> None:
    """Its guest stands still, and the lock is forged as given."""
    qemu.by_hand("stop")
    await host.clock.advance(1.0)
    host.etcd.write(LOCK_KEY, given(host).to_json())
    await host.clock.advance(1.0)


async def test_a_lock_that_is_forged_as_given_shuts_nobody_out(host: Host) -> None:
    """B9, law 13: whoever writes a lock makes a guest that came by a live move arrive again: what it names stays."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    host.etcd.write(CLIENTS_KEY, clients_to_json([address_of(first.pid), OLD]))
    host.etcd.write(LOCK_KEY, given(host, paused=True).to_json())
    await host.until(lambda: host.lock is not None and host.lock.state is LockState.RUNNING)
    assert host.fencing.fenced == []
    # The same, with its guest stopped: it would go on. What a supervisor has recorded is shut out.
    await comes_to_a_stop(host, first)
    await host.instance.moves.act(Action.ARRIVE, host.instance.wish)
    assert host.fencing.fenced == [OLD]
    # But for what another instance has.
    host.recorded_for = lambda client: InstanceId("2")
    await comes_to_a_stop(host, first)
    await host.instance.moves.act(Action.ARRIVE, host.instance.wish)
    assert host.fencing.fenced == [OLD]


async def test_an_arriving_guest_does_not_wait_for_etcd(host: Host) -> None:
    """Law 13: it stands still: without etcd nobody is shut out, and it goes on all the same."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    await comes_to_a_stop(host, first)
    host.store.away()
    await host.instance.moves.act(Action.ARRIVE, host.instance.wish)
    assert first.run_state == "running"
    assert host.fencing.fenced == []


async def test_the_source_that_is_shut_out_late_is_no_other_instances(host: Host) -> None:
    """B9, law 13: whom Ceph names, and the lock: but not where another instance has it on record."""
    host.wish(rbd=IMAGE)
    host.begin()
    await host.runs()
    host.fencing.watching[IMAGE] = {OLD}
    host.recorded_for = lambda client: InstanceId("2")
    host.etcd.write(LOCK_KEY, given(host).to_json())
    await host.until(lambda: host.lock is not None and host.lock.state is LockState.RUNNING)
    assert host.fencing.fenced == []
    assert host.lock is not None
    assert set(host.lock.fence) == {OLD, UNKNOWN}
    host.recorded_for = lambda client: None
    host.etcd.write(LOCK_KEY, given(host).to_json())
    await host.until(lambda: host.lock is not None and host.lock.state is LockState.RUNNING)
    assert host.fencing.fenced == [OLD]


async def test_a_move_that_is_forged_is_called_off(host: Host) -> None:
    """B9, law 13: a lock that says `migrating` to a QEMU that nobody knows: its clients are noted, and not shut out."""
    host.wish(rbd=IMAGE)
    host.begin()
    first = await host.runs()
    there = Destination(host=HostName("b"), boot_id="boot-b", incarnation="i9", pid=9, starttime=9, clients=(UNKNOWN,))
    assert host.lock is not None
    forged = replace(host.lock, state=LockState.MIGRATING, to=there, version=2)
    host.etcd.write(LOCK_KEY, forged.to_json())
    await host.until(lambda: host.lock is not None and host.lock.state is LockState.RUNNING)
    first.crash()
    await host.clock.advance(30.0)
    assert UNKNOWN not in host.fencing.fenced
    assert UNKNOWN in host.status.reason


@pytest.mark.parametrize("value", [b"", b"\xff", b"{}", b'"x"', b"[1, null]", b"[" * 5000, b'{"a": 1}'])
def test_a_damaged_word_is_none(value: bytes) -> None:
    """Law: what is no list of addresses vouches for nobody."""
    assert clients_from_json(value) == frozenset()
