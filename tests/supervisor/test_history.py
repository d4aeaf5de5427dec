"""Law 11, one history: an etcd that was restored, emptied or swapped for another one ends no guest and doubles none.

Whole supervisors in virtual time; the etcd of the tests is given another history under their feet.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.etcd import Denied, Put
from kvmsupervisor.adapters.etcd.api import NoSpace
from kvmsupervisor.cluster.history import FILE_NAME, History
from kvmsupervisor.domain.history import EPOCHS_PER_HISTORY, HistoryName
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase, Status
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemu
from tests.fakes.storage import FakeStorage
from tests.supervisor.test_supervisor import ME, Bench, lock_of

LAYOUT = Layout()
CONFIRMATION = LAYOUT.confirmation_key(HostName(ME))
PATIENCE_S = 60.0

KINDS = {
    "diskless": {},
    "a file": {"extra_flags": "-drive file=/tmp/x,format=raw"},
    "rbd": {"rbd": "pool/image-{name}"},
}


def make(etcd: FakeEtcd, *names: str, kind: str = "diskless", host: str = ME) -> None:
    for name in names:
        for key, value in KINDS[kind].items():
            etcd.write(f"/kvm/{name}/{key}", value.format(name=name))
        etcd.write(f"/kvm/{name}/ram", "64")
        etcd.write(f"/kvm/{name}/host", host)


async def run(bench: Bench, *names: str, kind: str = "diskless", host: str = ME) -> dict[str, FakeQemu]:
    """Create machines and let them run."""
    make(bench.etcd, *names, kind=kind, host=host)
    await bench.clock.advance_until(lambda: len(bench.of(*names)) == len(names), 60.0)
    await bench.clock.advance(2.0)
    return bench.of(*names)


async def restart(bench: Bench, name: str) -> FakeQemu:
    """Have a machine started again, so that its epoch grows."""
    before = bench.of(name)[name]
    bench.etcd.write(f"/kvm/{name}/restart_request", f"r{bench.etcd.revision}")
    await bench.clock.advance_until(lambda: bench.of(name) and bench.of(name)[name] is not before, 200.0)
    await bench.clock.advance(2.0)
    return bench.of(name)[name]


def lock(bench: Bench, name: str) -> Lock:
    found = Lock.from_json(bench.etcd.data[LAYOUT.lock_key(InstanceId(name))])
    assert found is not None
    return found


def untouched(qemus: dict[str, FakeQemu]) -> bool:
    return all(qemu.alive and not qemu.presses for qemu in qemus.values())


def written_past(etcd: FakeEtcd, backup: FakeEtcd) -> FakeEtcd:
    """The backup, after so many writes that its revision is beyond the one that was seen."""
    copy = backup.backup()
    while copy.revision <= etcd.revision + 3:
        copy.write("/elsewhere", str(copy.revision))
    return copy


# --- guests go on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", [False, True], ids=["older revision", "written past"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_machine_outlives_a_restored_backup(bench: Bench, kind: str, past: bool) -> None:
    """Law 11: a lock with a lower epoch is a restored one, no takeover: it is written again, as what runs has it."""
    await bench.begin()
    await run(bench, "1", kind=kind)
    backup = bench.etcd.backup()
    qemu = await restart(bench, "1")
    epoch = lock(bench, "1").epoch
    bench.etcd.restore(written_past(bench.etcd, backup) if past else backup)
    await bench.clock.advance(600.0)
    assert untouched({"1": qemu} | bench.of("1"))
    assert (lock(bench, "1").epoch, lock(bench, "1").pid) == (epoch, qemu.pid)
    assert bench.host.http_view.ready()[0]
    assert bench.metric("kvmsupervisor_history_changes_total") == 1.0
    assert bench.metric("kvmsupervisor_removals_held") == 0.0


@pytest.mark.parametrize("left", ["our lock", "another host's lock", "a status"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_machine_made_again_outlives_a_backup_from_before(bench: Bench, kind: str, left: str) -> None:
    """Law 11: its epochs began anew, so the lock that comes back has a greater one, and is older all the same."""
    await bench.begin()
    await run(bench, "1", kind=kind)
    for _ in range(2):
        await restart(bench, "1")
    old = lock(bench, "1")
    if left != "our lock":
        bench.etcd.write("/kvm/1/power", "off")
        await bench.clock.advance_until(lambda: not bench.of("1"), 200.0)
        await bench.clock.advance(5.0)
    backup = bench.etcd.backup()
    if left == "another host's lock":
        backup.write(LAYOUT.lock_key(InstanceId("1")), replace(old, host=HostName("b"), boot_id="b").to_json().decode())
    keys = *KINDS[kind], "ram", "host", "power", "restart_request"
    bench.etcd.erase(*(f"/kvm/1/{key}" for key in keys))
    await bench.clock.advance_until(lambda: LAYOUT.status_key(InstanceId("1")) not in bench.etcd.data, 200.0)
    qemus = await run(bench, "1", kind=kind)
    assert lock(bench, "1").epoch < old.epoch
    bench.etcd.restore(backup)
    await bench.clock.advance(600.0)
    assert bench.of("1") == qemus
    assert untouched(qemus)
    assert (lock(bench, "1").pid, lock(bench, "1").epoch) == (qemus["1"].pid, old.epoch + 1)
    status = bench.status("1")
    assert status is not None
    assert (status.phase, status.epoch) == (Phase.RUNNING, old.epoch + 1)


@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("kind", KINDS)
async def test_machines_outlive_an_empty_etcd(bench: Bench, kind: str, count: int) -> None:
    """Law 11: keys that are missing with another store are no removal, however few; their locks are written there."""
    names = [str(number) for number in range(count)]
    await bench.begin()
    qemus = await run(bench, *names, kind=kind)
    bench.etcd.restore(FakeEtcd(bench.clock.now))
    await bench.clock.advance(3600.0)
    assert bench.of(*names) == qemus
    assert untouched(qemus)
    assert {lock(bench, name).pid for name in names} == {qemu.pid for qemu in qemus.values()}
    assert bench.metric("kvmsupervisor_removals_held") == count
    make(bench.etcd, *names, kind=kind)
    await bench.clock.advance(60.0)
    assert untouched(qemus)
    assert bench.metric("kvmsupervisor_removals_held") == 0.0


@pytest.mark.parametrize("order", ["host", "power", "removed"])
async def test_orders_that_come_with_a_backup_wait_for_a_person(bench: Bench, order: str) -> None:
    """Law 11: removals, moves and `power=off` that a backup brings are held, however few; what stood is shown."""
    await bench.begin()
    bench.etcd.write(LAYOUT.session_key(HostName("b")), "{}")
    if order != "removed":
        make(bench.etcd, "1", host="b")
        if order == "power":
            bench.etcd.write("/kvm/1/host", ME)
            bench.etcd.write("/kvm/1/power", "off")
            await bench.clock.advance(5.0)
    backup = bench.etcd.backup()
    if order == "power":
        bench.etcd.write("/kvm/1/power", "on")
    qemus = await run(bench, "1")
    bench.etcd.restore(written_past(bench.etcd, backup))
    await bench.clock.advance(600.0)
    assert untouched(qemus)
    status = bench.status("1")
    assert status is not None
    assert (status.phase, status.held) == (Phase.RUNNING, True)
    assert "another history" in status.reason
    stood = {"host": {"host": ME}, "power": {"power": "on"}, "removed": {"host": ME, "ram": "64"}}
    assert status.stood == stood[order]
    bench.etcd.write(CONFIRMATION, json.dumps(["1"]))
    await bench.clock.advance(30.0)
    assert bench.of("1") == {}
    assert bench.metric("kvmsupervisor_removals_held") == 0.0


async def test_a_qemu_whose_guest_never_ran_waits_for_nobody(bench: Bench) -> None:
    """Law 11 spares guests. A paused QEMU has none: it ends, and its host says nothing in the place of whoever runs it.

    Simulation, seed 1258: etcd was away before the start was on record, and then another one.
    """
    await bench.begin()
    bench.there("b")
    make(bench.etcd, "1", host="b")
    theirs = Status(id=InstanceId("1"), host=HostName("b"), phase=Phase.RUNNING, reason="runs", since="", epoch=3)
    bench.etcd.write(LAYOUT.lock_key(InstanceId("1")), lock_of("b"))
    bench.etcd.write(LAYOUT.status_key(InstanceId("1")), theirs.to_json())
    backup = bench.etcd.backup()
    bench.etcd.erase(LAYOUT.lock_key(InstanceId("1")))
    bench.etcd.write(LAYOUT.status_key(InstanceId("1")), replace(theirs, phase=Phase.STOPPED, epoch=5).to_json())
    bench.qemus.prepare = lambda qemu: bench.client.away()
    bench.etcd.write("/kvm/1/host", ME)
    await bench.clock.advance(30.0)
    assert (len(bench.qemus.alive), bench.qemus.running) == (1, [])
    bench.qemus.prepare = lambda qemu: None
    bench.etcd.restore(written_past(bench.etcd, backup))
    bench.client.back()
    await bench.clock.advance(60.0)
    assert bench.qemus.alive == []
    assert bench.phases == {}
    assert Status.from_json(bench.etcd.data[LAYOUT.status_key(InstanceId("1"))]) == theirs
    assert bench.metric("kvmsupervisor_removals_held") == 0.0


async def test_a_machine_that_stays_for_want_of_a_host_outlives_an_empty_etcd(bench: Bench) -> None:
    """Law 11: its keys name a host that is not there, so it runs here; that they are gone is no order (seed 1335)."""
    await bench.begin()
    qemus = await run(bench, "1")
    bench.etcd.write("/kvm/1/host", "nodex")
    await bench.clock.advance(5.0)
    assert untouched(qemus)
    bench.etcd.restore(FakeEtcd(bench.clock.now))
    await bench.clock.advance(600.0)
    assert untouched(qemus)
    status = bench.status("1")
    assert status is not None
    assert (status.phase, status.held) == (Phase.RUNNING, True)
    assert status.stood is not None
    assert status.stood["host"] == "nodex"


@pytest.mark.parametrize("order", ["host", "power"])
async def test_an_order_that_is_written_since_is_one(bench: Bench, order: str) -> None:
    """Whoever writes the key again means it: the hold ends, and the order is followed."""
    await bench.begin()
    bench.etcd.write(LAYOUT.session_key(HostName("b")), "{}")
    make(bench.etcd, "1", host="b")
    backup = bench.etcd.backup()
    qemus = await run(bench, "1")
    bench.etcd.restore(backup)
    await bench.clock.advance(60.0)
    assert untouched(qemus)
    bench.etcd.write("/kvm/1/description", "no order at all")
    await bench.clock.advance(60.0)
    assert untouched(qemus)
    if order == "host":
        bench.etcd.write("/kvm/1/host", "b")
    else:
        bench.etcd.write("/kvm/1/host", ME)
        bench.etcd.write("/kvm/1/power", "off")
    await bench.clock.advance(30.0)
    assert bench.of("1") == {}


async def test_a_hold_outlives_the_supervisor(bench: Bench) -> None:
    """A successor neither follows an order that is held nor forgets what stood before."""
    await bench.begin()
    bench.etcd.write(LAYOUT.session_key(HostName("b")), "{}")
    make(bench.etcd, "1", host="b")
    backup = bench.etcd.backup()
    qemus = await run(bench, "1")
    bench.etcd.restore(backup)
    await bench.clock.advance(60.0)
    await bench.end()
    await bench.begin(virtual_s=600.0)
    assert untouched(qemus)
    status = bench.status("1")
    assert status is not None
    assert (status.held, status.stood) == (True, {"host": ME})
    bench.etcd.write("/kvm/1/host", ME)
    await bench.clock.advance(60.0)
    assert untouched(qemus)
    status = bench.status("1")
    assert status is not None
    assert (status.held, status.stood) == (False, None)


async def test_a_host_whose_word_is_not_taken_says_it_seldom(tmp_path: Path) -> None:
    """An etcd that has run full since is not asked five times a second, and the log does not say so as often."""
    clock = FakeClock()
    history = History(
        store=FakeEtcd(clock.now), clock=clock, layout=LAYOUT, me=HostName("a"), run_dir=tmp_path, patience_s=60.0
    )
    history.heard(HistoryName(id="h", number=1), 1)
    said: list[str] = []

    async def say(name: str) -> bool:
        said.append(name)
        raise NoSpace("it is full")

    task = asyncio.create_task(history.run_speaking(lambda: True, say))
    with capture_logs() as lines:
        await clock.advance(60.0)
    task.cancel()
    assert 10 <= len(said) <= 13
    assert [line["event"] for line in lines] == ["history.not_spoken"]


async def test_a_history_that_begins_without_space_gets_its_name_later(bench: Bench) -> None:
    """Nobody can speak in a history without a name, so machines that wait for that would wait for ever (seed 575)."""
    await bench.begin()
    bench.there("b")
    qemus = await run(bench, "1", kind="a file")
    empty = FakeEtcd(bench.clock.now)
    empty.fill()
    bench.etcd.restore(empty)
    await bench.clock.advance(60.0)
    assert untouched(qemus)
    bench.etcd.make_space()
    await bench.clock.advance(60.0)
    name = HistoryName.from_json(bench.etcd.data[LAYOUT.history_key])
    assert name is not None
    assert (name.number, bench.host.http_view.ready()[0]) == (1, True)
    assert lock(bench, "1").history == name.id
    assert untouched(qemus)


@pytest.mark.parametrize("order", ["moved", "without a host"])
@pytest.mark.parametrize("successor", [False, True])
async def test_a_machine_that_leaves_without_a_lock_is_not_said_to_live_here(
    bench: Bench, order: str, successor: bool
) -> None:
    """Otherwise its next host waits for ever for this one to say so, and people read that it runs.

    Its lock could not be written again, because etcd was full, when it was told to go (simulation, seed 257). The last
    status is written once that is possible, by a successor too.
    """
    await bench.begin()
    bench.there("b")
    await run(bench, "1")
    epoch = lock(bench, "1").epoch
    bench.etcd.fill()
    bench.etcd.erase(LAYOUT.lock_key(InstanceId("1")))
    if order == "moved":
        bench.etcd.write("/kvm/1/host", "b")
    else:
        bench.etcd.erase("/kvm/1/host")
    await bench.clock.advance(30.0)
    assert bench.of("1") == {}
    if successor:
        await bench.end()
        await bench.begin()
    bench.etcd.make_space()
    await bench.clock.advance(60.0)
    written = Status.from_json(bench.etcd.data[LAYOUT.status_key(InstanceId("1"))])
    assert written is not None
    assert (written.phase, written.pid, written.incarnation) == (Phase.STOPPED, None, None)
    # The next incarnation is counted from it (law 2).
    assert written.epoch == epoch


async def test_what_lives_by_another_run_directory_is_said_to_live(bench: Bench) -> None:
    """Law 12: a supervisor without the record of a QEMU, and without its lock, does not say that it is gone."""
    await bench.begin()
    bench.there("b")
    qemus = await run(bench, "1")
    await bench.end()
    before = bench.etcd.data[LAYOUT.status_key(InstanceId("1"))]
    bench.etcd.erase(LAYOUT.lock_key(InstanceId("1")))
    bench.etcd.write("/kvm/1/host", "b")
    bench.more = {"KVM_RUN_DIR": str(bench.path / "r")}
    await bench.begin(virtual_s=60.0)
    assert untouched(qemus)
    assert bench.etcd.data[LAYOUT.status_key(InstanceId("1"))] == before
    qemus["1"].crash()
    await bench.end()
    await bench.begin(virtual_s=60.0)
    assert bench.etcd.data[LAYOUT.status_key(InstanceId("1"))] != before


async def test_a_supervisor_that_ends_between_the_change_and_its_orders(bench: Bench) -> None:
    """It has noticed the change and read no key yet: to its successor, too, the change is one (simulation, seed 2)."""
    await bench.begin()
    qemus = await run(bench, "1")
    lists = asyncio.Event()

    async def hold_up(call: str) -> None:
        if call == "list":
            await lists.wait()

    bench.client.hook = hold_up
    bench.etcd.restore(FakeEtcd(bench.clock.now))
    await bench.clock.advance(10.0)
    assert bench.metric("kvmsupervisor_history_changes_total") == 1.0
    await bench.end()
    lists.set()
    await bench.begin()
    await bench.clock.advance(600.0)
    assert untouched(qemus)
    assert bench.metric("kvmsupervisor_removals_held") == 1.0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_successor_knows_what_its_predecessor_acted_on(bench: Bench, kind: str) -> None:
    """Law 11: an etcd that is restored, or lost, while no supervisor runs: the next one notices all the same."""
    await bench.begin()
    await run(bench, "1", kind=kind)
    backup = bench.etcd.backup()
    second = await restart(bench, "1")
    qemus = await run(bench, "2", kind=kind) | {"1": second}
    await bench.end()
    bench.etcd.restore(written_past(bench.etcd, backup))
    await bench.begin(virtual_s=600.0)
    assert untouched(qemus)
    assert lock(bench, "1").pid == second.pid
    assert bench.metric("kvmsupervisor_removals_held") == 1.0


async def test_an_old_request_for_a_restart_is_none(bench: Bench) -> None:
    """`restart_request` of a backup differs from the one that was followed last, and nobody has asked for it now."""
    await bench.begin()
    await run(bench, "1")
    await restart(bench, "1")
    backup = bench.etcd.backup()
    qemu = await restart(bench, "1")
    bench.etcd.restore(backup)
    await bench.clock.advance(600.0)
    assert untouched({"1": qemu})
    assert await restart(bench, "1") is not qemu


async def test_another_clusters_etcd_is_not_touched(bench: Bench) -> None:
    """Law 11: a wrong endpoint: another cluster's lock of the same id, with any epoch, says nothing, and stays."""
    await bench.begin()
    qemus = await run(bench, "1", "2", kind="a file")
    ours = bench.etcd.backup()
    foreign = FakeEtcd(bench.clock.now)
    foreign.write(LAYOUT.history_key, HistoryName(id="theirs").to_json())
    make(foreign, "1", "2", host="x")
    theirs = {
        name: Lock(host=HostName("x"), boot_id="bx", epoch=epoch, state=LockState.RUNNING, incarnation="i").to_json()
        for name, epoch in (("1", 900), ("2", 0))
    }
    for name, value in theirs.items():
        foreign.write(LAYOUT.lock_key(InstanceId(name)), value)
    bench.etcd.restore(written_past(bench.etcd, foreign))
    await bench.clock.advance(600.0)
    assert untouched(qemus)
    assert {name: bench.etcd.data[LAYOUT.lock_key(InstanceId(name))] for name in theirs} == theirs
    assert not any(key.startswith(LAYOUT.statuses_prefix) for key in bench.etcd.data)
    bench.etcd.restore(ours)
    await bench.clock.advance(600.0)
    assert untouched(qemus)
    assert bench.metric("kvmsupervisor_removals_held") == 0.0
    assert {lock(bench, name).pid for name in qemus} == {qemu.pid for qemu in qemus.values()}


async def test_back_from_another_clusters_etcd(bench: Bench) -> None:
    """Laws 6, 11: a host that was in another etcd for one run knows its own cluster again, whose locks count for it."""
    await bench.begin()
    qemus = await run(bench, "1", "2")
    elsewhere = FakeEtcd(bench.clock.now)
    await bench.end()
    ours = bench.etcd.backup()
    bench.etcd.restore(elsewhere)
    await bench.begin(virtual_s=60.0)
    assert untouched(qemus)
    taken = replace(lock(bench, "1"), host=HostName("b"), boot_id="bb", epoch=2, incarnation="theirs")
    await bench.end()
    ours.write(LAYOUT.lock_key(InstanceId("1")), taken.to_json())
    bench.etcd.restore(ours)
    await bench.begin(virtual_s=60.0)
    assert not qemus["1"].alive
    assert untouched({"2": qemus["2"]})
    # `b` has no session, so it was taken over: it runs once.
    assert lock(bench, "1").epoch == 3
    assert len(bench.qemus.running) == 2


async def test_back_from_a_copy_that_it_has_booted_into(bench: Bench) -> None:
    """Law 11: it knows its cluster's history by the name in the copy only. It is no stranger there, and proves nothing.

    The machine without a disk has run in both meanwhile: the greater epoch stays (simulation, seeds 8194 and 8826).
    """
    name = LAYOUT.history_key
    make(bench.etcd, "1", host="b")
    bench.etcd.write(name, HistoryName(id="ours", by="b").to_json())
    theirs = Lock(host=HostName("b"), boot_id="bb", epoch=5, state=LockState.RUNNING, incarnation="i")
    bench.etcd.write(LAYOUT.lock_key(InstanceId("1")), replace(theirs, storage=Storage.NONE).to_json())
    ours = bench.etcd.backup()
    bench.etcd.write(name, HistoryName(id="copy", number=1, after="ours", by="b").to_json())
    bench.etcd.erase(LAYOUT.lock_key(InstanceId("1")))
    bench.etcd.write("/kvm/1/host", ME)
    await bench.begin(virtual_s=60.0)
    assert lock(bench, "1").epoch > EPOCHS_PER_HISTORY
    await bench.end()
    ours.write("/kvm/1/x-note", "b goes on there")
    bench.etcd.restore(ours)
    bench.there("b")
    await bench.begin(virtual_s=60.0)
    named = HistoryName.from_json(bench.etcd.data[name])
    assert named is not None
    assert (named.number, named.after, named.found) == (2, "copy", "ours")
    assert (lock(bench, "1").host, lock(bench, "1").pid) == (ME, bench.of("1")["1"].pid)


async def test_a_lock_of_a_former_history_says_nothing(bench: Bench) -> None:
    """Law 11: until the locks of the present history are read, one that was seen in another one is unknown."""
    await bench.begin()
    qemus = await run(bench, "1")
    ours, theirs = bench.etcd.backup(), FakeEtcd(bench.clock.now)
    theirs.write(LAYOUT.history_key, HistoryName(id="theirs").to_json())
    make(theirs, "1", host="x")
    strange = replace(lock(bench, "1"), host=HostName("x"), boot_id="bx", epoch=900, incarnation="theirs")
    theirs.write(LAYOUT.lock_key(InstanceId("1")), strange.to_json())
    bench.etcd.restore(written_past(bench.etcd, theirs))
    await bench.clock.advance(60.0)
    bench.etcd.restore(ours)
    await bench.clock.advance(60.0)
    assert untouched(qemus)


async def test_a_machine_that_rests_goes_on_resting(bench: Bench) -> None:
    """A machine that its guest has switched off is not started because its keys have other revisions now."""
    await bench.begin()
    bench.etcd.write("/kvm/1/restart", "never")
    backup = bench.etcd.backup()
    qemus = await run(bench, "1")
    make(backup, "1")
    qemus["1"].shut_down()
    await bench.clock.advance(30.0)
    assert bench.of("1") == {}
    bench.etcd.restore(written_past(bench.etcd, backup))
    await bench.clock.advance(600.0)
    assert bench.of("1") == {}


# --- the same history -----------------------------------------------------------------------------------------


async def test_a_lost_connection_is_no_other_history(bench: Bench) -> None:
    """What changes meanwhile in the same history is followed at once, whatever it is."""
    await bench.begin()
    await run(bench, "1", "2")
    bench.client.away()
    bench.etcd.write("/kvm/1/power", "off")
    bench.remove("2")
    await bench.clock.advance(5.0)
    bench.client.back()
    await bench.clock.advance(60.0)
    assert bench.of("1", "2") == {}
    assert bench.metric("kvmsupervisor_history_changes_total") == 0.0


async def test_a_proof_costs_two_reads(bench: Bench) -> None:
    """Law 11: whoever connects again at one time shares a proof; while nothing is lost there is none, and no write."""
    await bench.begin()
    await run(bench, "1", "2")
    await bench.clock.advance(5.0)
    before, written = bench.client.calls.copy(), (bench.path / FILE_NAME).stat().st_mtime_ns
    await bench.clock.advance(600.0)
    assert bench.client.calls["get_at"] == before["get_at"]
    assert (bench.path / FILE_NAME).stat().st_mtime_ns == written
    bench.client.away()
    await bench.clock.advance(5.0)
    bench.client.back()
    await bench.clock.advance(60.0)
    assert 1 <= bench.client.calls["get_at"] - before["get_at"] <= 2
    assert bench.client.calls["list"] == before["list"]


async def test_a_compaction_meanwhile_is_no_other_history(bench: Bench) -> None:
    """A key that is as it was vouches for what came before it, also where its revision is gone."""
    await bench.begin()
    await run(bench, "1", "2")
    bench.client.away()
    await bench.clock.advance(5.0)
    bench.etcd.write("/kvm/1/power", "off")
    bench.etcd.compact()
    bench.client.back()
    await bench.clock.advance(60.0)
    assert bench.of("1", "2").keys() == {"2"}
    assert bench.metric("kvmsupervisor_history_changes_total") == 0.0


async def test_every_key_of_a_transaction_is_a_witness(bench: Bench) -> None:
    """Of a backup that was restored with a greater revision and compacted, one key that went back tells it."""
    await bench.begin()
    qemus = await run(bench, "1")
    backup = bench.etcd.backup()
    await bench.client.txn([], [Put("/kvm/1/ram", b"64"), Put("/kvm/1/description", b"new")])
    await bench.clock.advance(5.0)
    restored = written_past(bench.etcd, backup)
    restored.compact()
    bench.etcd.restore(restored)
    await bench.clock.advance(60.0)
    assert untouched(qemus)
    assert bench.metric("kvmsupervisor_history_changes_total") == 1.0


async def test_what_cannot_be_proven_any_more_is_held(bench: Bench) -> None:
    """Its witnesses rewritten and compacted away, nobody can tell: what would end a guest waits for a person."""
    await bench.begin()
    qemus = await run(bench, "1")
    bench.client.away()
    await bench.clock.advance(5.0)
    for key, value in bench.etcd.data.items():
        bench.etcd.write(key, value)
    bench.etcd.write("/kvm/1/power", "off")
    bench.etcd.compact()
    bench.client.back()
    await bench.clock.advance(60.0)
    assert untouched(qemus)
    assert bench.metric("kvmsupervisor_removals_held") == 1.0
    assert bench.metric("kvmsupervisor_history_changes_total") == 0.0


# --- nothing twice --------------------------------------------------------------------------------------------


@contextmanager
def never_twice(bench: Bench) -> Iterator[None]:
    """No instance has two guests that run at any time."""
    twice: list[str] = []
    spawn = bench.qemus.spawn

    def look(*args: object, **kwargs: object) -> object:
        made = spawn(*args, **kwargs)  # type: ignore[arg-type]
        names = [qemu.instance for qemu in bench.qemus.running]
        environment = kwargs["environment"]
        assert isinstance(environment, dict)
        twice.extend(name for name in names if name == environment["KVMSUPERVISOR_INSTANCE"])
        return made

    bench.qemus.spawn = look  # type: ignore[method-assign,assignment]
    yield
    bench.qemus.spawn = spawn  # type: ignore[method-assign]
    assert not twice


async def moved(bench: Bench, other: Bench, kind: str) -> tuple[FakeEtcd, FakeQemu]:
    """A machine that ran here when the backup was made, and runs on `b` now."""
    await bench.begin()
    await other.begin()
    await run(bench, "1", kind=kind)
    backup = bench.etcd.backup()
    bench.etcd.write("/kvm/1/host", "b")
    await bench.clock.advance_until(lambda: lock(bench, "1").host == "b" and bench.of("1"), 200.0)
    await bench.clock.advance(5.0)
    return backup, bench.of("1")["1"]


@pytest.mark.parametrize("first", ["a", "b", "both"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_machine_that_moved_since_the_backup_runs_once(
    bench: Bench, other: Bench, kind: str, first: str
) -> None:
    """Law 11: keys and lock of the backup say that it is this host's; it waits until the other has spoken."""
    backup, qemu = await moved(bench, other, kind)
    clients = {"a": bench.client, "b": other.client}
    bench.client.away()
    other.client.away()
    bench.etcd.restore(written_past(bench.etcd, backup))
    with never_twice(bench):
        for name, client in clients.items():
            if first in {name, "both"}:
                client.back()
        await bench.clock.advance(10.0)
        for client in clients.values():
            client.back()
        await bench.clock.advance(600.0)
    assert bench.of("1") == {"1": qemu}
    assert untouched({"1": qemu})
    assert (lock(bench, "1").host, lock(bench, "1").pid) == ("b", qemu.pid)
    status = other.status("1")
    assert status is not None
    assert status.held
    bench.etcd.write(LAYOUT.confirmation_key(HostName("b")), json.dumps(["1"]))
    await bench.clock.advance_until(lambda: lock(bench, "1").host == "a" and bench.of("1"), 200.0)


async def test_files_wait_for_a_host_for_ever_and_others_for_a_while(
    bench: Bench, other: Bench, storage: FakeStorage
) -> None:
    """What no storage can fence waits for a host that has not spoken until a person says that it is gone for good."""
    await bench.begin()
    await other.begin()
    make(bench.etcd, "1", kind="a file")
    make(bench.etcd, "2")
    backup = bench.etcd.backup()
    await bench.clock.advance(10.0)
    for name in "12":
        bench.etcd.write(f"/kvm/{name}/power", "off")
    await bench.clock.advance(30.0)
    assert bench.of("1", "2") == {}
    other.client.away()
    await bench.clock.advance(5.0)
    bench.etcd.restore(backup)
    await bench.clock.advance(PATIENCE_S / 2)
    assert bench.of("1", "2") == {}
    status = bench.status("1")
    assert status is not None
    assert "until b has said there what runs" in status.reason
    assert "confirm-removal b" in status.reason
    await bench.clock.advance(PATIENCE_S)
    assert bench.of("1", "2").keys() == {"2"}
    assert lock(bench, "2").epoch == EPOCHS_PER_HISTORY + 1
    await bench.clock.advance(3600.0)
    assert bench.of("1") == {}
    present = HistoryName.from_json(bench.etcd.data[LAYOUT.history_key])
    assert present is not None
    bench.etcd.write(LAYOUT.history_key, replace(present, gone=("b",)).to_json())
    await bench.clock.advance(30.0)
    assert bench.of("1").keys() == {"1"}


async def test_once_all_have_spoken_nobody_is_waited_for(bench: Bench, other: Bench) -> None:
    """The key says so, and a new file machine starts at once, also under a new supervisor."""
    await bench.begin()
    await other.begin()
    await run(bench, "1", kind="a file")
    bench.etcd.restore(FakeEtcd(bench.clock.now))
    await bench.clock.advance(30.0)
    name = HistoryName.from_json(bench.etcd.data[LAYOUT.history_key])
    assert name is not None
    assert (name.number, name.hosts) == (1, ())
    for host in "ab":
        session = HostSession.from_json(bench.etcd.data[LAYOUT.session_key(HostName(host))])
        assert session is not None
        assert session.history == name.id
    await other.end()
    (bench.path / FILE_NAME).unlink()
    await bench.end()
    await bench.begin()
    assert (await run(bench, "2", kind="a file")).keys() == {"2"}


# --- the proof itself -----------------------------------------------------------------------------------------


async def test_a_history_without_a_name_is_acted_on_all_the_same(bench: Bench) -> None:
    """An etcd that takes no writes (no space, no right) keeps nobody from being adopted or kept running."""
    await bench.begin()
    qemus = await run(bench, "1")

    refuse = {"txn"}

    async def hook(call: str) -> None:
        if call in refuse:
            raise Denied("etcdserver: permission denied")

    bench.client.hook = hook
    bench.etcd.restore(FakeEtcd(bench.clock.now))
    await bench.clock.advance(600.0)
    assert untouched(qemus)
    refuse.clear()
    await bench.clock.advance(60.0)
    assert untouched(qemus)
    assert lock(bench, "1").pid == qemus["1"].pid


@pytest.mark.parametrize("content", ["", "{", '{"version": 99}', '{"version": 1, "witnesses": 5}'])
async def test_a_file_that_cannot_be_read_is_left_alone(bench: Bench, content: str) -> None:
    """What a newer release wrote, or a full disk cut, is no reason not to run."""
    (bench.path / FILE_NAME).write_text(content)
    await bench.begin()
    assert (await run(bench, "1")).keys() == {"1"}
    await bench.end()
    assert (bench.path / FILE_NAME).read_text() == content
