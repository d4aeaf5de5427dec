"""Snapshots in virtual time: when a guest stands still and how it goes on, what every failure leaves, who waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvmsupervisor.adapters.ceph import CephFailed
from kvmsupervisor.domain.agent import GuestFacts
from kvmsupervisor.domain.ceph import SnapshotInfo
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.guard.keeper_client import DONE, FROZEN, PAUSED
from kvmsupervisor.machine.standstill import FREEZE_S
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemu
from tests.support.host import LAYOUT, ONE, Host

PAIR = {"disk/0": "rbd/a", "disk/1": "rbd/b"}
WHOLE = SnapshotInfo(8 << 20, True)


def names(host: Host) -> list[str]:
    return [snap.name for snap in host.status.snapshots]


def ask(host: Host, name: str, value: str = "a note") -> None:
    host.etcd.write(LAYOUT.wish_key(ONE, f"snapshot/{name}"), value)


async def begun(host: Host, **wishes: str) -> FakeQemu:
    host.wish(**(wishes or PAIR))
    host.begin()
    return await host.runs()


async def off(host: Host) -> None:
    """A machine that ran, and was switched off."""
    qemu = await begun(host)
    host.wish(power="off", **PAIR)
    await host.until(lambda: not qemu.alive and host.status.phase is Phase.STOPPED and host.lock is None)


async def test_all_disks_of_a_guest_that_stands_still(host: Host) -> None:
    """Frozen by its agent and paused before the first disk, and going on once all have it; a keeper stands by."""
    qemu = await begun(host)
    qemu.open_agent(GuestFacts())
    states: list[tuple[str, str, int, bytes]] = []
    host.snapshots.before = lambda words: states.append(
        (words, qemu.run_state, qemu.frozen_file_systems, host.qemus.keepers[-1].told)
    )
    ask(host, "one")
    await host.until(lambda: names(host) == ["one"])
    assert [state for state in states if state[0].startswith("create")] == [
        (f"create rbd/{image}@kvm-.one", "paused", 1, FROZEN + PAUSED) for image in "ab"
    ]
    assert {state[1:3] for state in states if not state[0].startswith("create")} == {("running", 0)}
    assert host.snapshots.held == {"rbd/a": {"kvm-one": WHOLE}, "rbd/b": {"kvm-one": WHOLE}}
    (snap,) = host.status.snapshots
    assert (snap.how, snap.why, snap.size, snap.disks) == ("frozen", None, 16 << 20, ("disk/0", "disk/1"))
    assert snap.at
    (keeper,) = host.qemus.keepers
    assert (keeper.told, keeper.done) == (FROZEN + PAUSED, True)
    assert (qemu.run_state, qemu.frozen_file_systems) == ("running", 0)
    await host.told()
    assert host.published is not None
    assert host.published.snapshots == host.status.snapshots
    writes = len(host.etcd.writes)
    await host.clock.advance(600.0)
    assert len(host.etcd.writes) == writes, "nothing is written while nothing changes"


async def test_one_disk_needs_no_pause(host: Host) -> None:
    """What one operation takes is of one instant: without an agent the guest is not touched."""
    qemu = await begun(host, **{"disk/0": "rbd/a"})
    ask(host, "one")
    await host.until(lambda: names(host) == ["one"])
    assert (host.status.snapshots[0].how, host.qemus.keepers) == ("at once", [])
    assert {"stop"} & {*qemu.commands} == set()


async def test_a_guest_that_cannot_freeze(host: Host) -> None:
    """It gets its seconds, then the snapshot is as after a power cut, and says why. It is thawed all the same."""
    qemu = await begun(host)
    qemu.open_agent(GuestFacts())
    qemu.file_systems = None
    ask(host, "one")
    await host.until(lambda: names(host) == ["one"], FREEZE_S + 5)
    (snap,) = host.status.snapshots
    assert snap.how == "paused"
    assert snap.why is not None
    assert "within 10 s" in snap.why
    assert qemu.run_state == "running"
    assert host.qemus.keepers[0].done is True


async def test_a_guest_that_does_not_thaw(host: Host) -> None:
    """It is told, tried again, and its keeper goes on trying; the snapshot counts."""
    qemu = await begun(host)
    qemu.open_agent(GuestFacts())
    qemu.deaf_to_thaw = True
    ask(host, "one")
    await host.until(lambda: names(host) == ["one"], 60)
    assert host.qemus.keepers[0].done is False
    await host.until(lambda: "may still be frozen" in host.status.reason, 60)
    assert qemu.frozen_file_systems == 1
    qemu.deaf_to_thaw = False
    await host.until(lambda: host.status.reason == "runs", 60)
    assert qemu.frozen_file_systems == 0


async def test_a_guest_that_was_left_standing(host: Host) -> None:
    """Supervisor and keeper were killed in between: by the record the next one lets it go on, before anything else."""
    qemu = await begun(host)
    host.instance._machine.note(standing=True)
    await host.die()
    qemu.run_state, qemu.frozen_file_systems = "paused", 1
    qemu.agent, qemu.agent_open = GuestFacts(), True
    host.begin()
    await host.until(lambda: qemu.run_state == "running")
    await host.until(lambda: host.status.reason == "runs")
    assert qemu.frozen_file_systems == 0


async def test_a_person_has_paused_it(host: Host) -> None:
    """It is taken as it stands, and not let go on."""
    qemu = await begun(host)
    qemu.open_agent(GuestFacts())
    qemu.by_hand("stop")
    await host.until(lambda: host.status.run_state == "paused")
    ask(host, "one")
    await host.until(lambda: names(host) == ["one"])
    assert qemu.run_state == "paused"
    assert "cont" not in qemu.commands[qemu.commands.index("stop") :]
    assert host.status.snapshots[0].why == "its guest was paused"


async def test_without_a_keeper_nothing_stands_still(host: Host) -> None:
    qemu = await begun(host)
    host.qemus.no_keeper = "no memory"
    ask(host, "one")
    await host.until(lambda: "no memory" in host.status.reason)
    assert "stop" not in qemu.commands
    host.qemus.no_keeper = None
    await host.until(lambda: names(host) == ["one"], 60)


async def test_ceph_is_full(host: Host) -> None:
    """The guest goes on, the reason tells, a part counts for nothing and goes, and it is tried again."""
    qemu = await begun(host)

    def full(words: str) -> None:
        if words == "create rbd/b@kvm-.one":
            raise CephFailed("No space left on device")

    host.snapshots.before = full
    ask(host, "one")
    await host.until(lambda: "No space left" in host.status.reason)
    assert qemu.run_state == "running"
    assert "kvm-one" not in host.snapshots.held["rbd/a"]
    assert (names(host), host.status.phase) == ([], Phase.RUNNING)
    host.snapshots.before = lambda words: None
    await host.until(lambda: names(host) == ["one"], 60)
    assert host.snapshots.held == {"rbd/a": {"kvm-one": WHOLE}, "rbd/b": {"kvm-one": WHOLE}}
    assert host.status.reason == "runs"


async def test_what_is_there_is_not_taken_again(host: Host) -> None:
    """Facts that were lost are found on the disks; what was cut off after its instant is finished, before it is not."""
    host.snapshots.held = {
        "rbd/a": {"kvm-old": WHOLE, "kvm-cut": SnapshotInfo(8 << 20, False), "kvm-.late": SnapshotInfo(8 << 20, False)},
        "rbd/b": {"kvm-old": WHOLE, "kvm-.cut": SnapshotInfo(8 << 20, False), "theirs": WHOLE},
    }
    await begun(host)
    for name in ("old", "cut"):
        ask(host, name)
    await host.until(lambda: names(host) == ["cut", "old"])
    assert [words for words in host.snapshots.done if words.startswith("create")] == []
    assert host.snapshots.held == {
        "rbd/a": {"kvm-old": WHOLE, "kvm-cut": WHOLE},
        "rbd/b": {"kvm-old": WHOLE, "kvm-cut": WHOLE, "theirs": WHOLE},
    }
    assert {snap.how for snap in host.status.snapshots} == {"found"}


async def test_clones_keep_it_and_others_are_taken_all_the_same(host: Host) -> None:
    await begun(host)
    ask(host, "one")
    await host.until(lambda: names(host) == ["one"])
    host.snapshots.clones_of = {"rbd/b@kvm-one": ("rbd/web2",)}
    ask(host, "one", "delete")
    ask(host, "two")
    await host.until(lambda: names(host) == ["one", "two"])
    assert "rbd/web2 is a clone of it (disk/1)" in host.status.reason
    assert "kvm-one" in host.snapshots.held["rbd/a"], "all disks or none"
    host.snapshots.clones_of = {}
    await host.until(lambda: names(host) == ["two"], 60)
    assert host.snapshots.held["rbd/a"].keys() == {"kvm-two"}
    host.drop("snapshot/two")
    await host.clock.advance(60.0)
    assert names(host) == ["two"], "taking away the key does nothing"


async def test_a_machine_that_is_off(host: Host) -> None:
    """Law 2: under its lock, which is released; without a session nothing is done."""
    await off(host)
    taken: list[Storage | None] = []
    host.snapshots.before = lambda words: taken.append(None if host.lock is None else host.lock.storage)
    host.session.turn(False)
    ask(host, "one")
    await host.clock.advance(30.0)
    assert taken == []
    host.session.turn(True)
    await host.until(lambda: names(host) == ["one"])
    assert {*taken} == {Storage.RBD}
    await host.until(lambda: host.lock is None)
    assert (host.status.snapshots[0].how, host.status.phase) == ("off", Phase.STOPPED)
    assert host.qemus.alive == []


async def test_a_rollback(host: Host) -> None:
    """Once it is off, under a lock that nobody takes over, on all disks; once, whatever becomes of the facts."""
    host.snapshots.contents = {"rbd/a": "then", "rbd/b": "then"}
    qemu = await begun(host)
    ask(host, "one")
    await host.until(lambda: names(host) == ["one"])
    host.snapshots.contents = {"rbd/a": "now", "rbd/b": "now"}
    host.put(rollback_request="one:1")
    await host.until(lambda: "once it is off" in host.status.reason)
    assert qemu.alive
    locks: list[Storage | None] = []
    host.snapshots.before = lambda words: locks.append(None if host.lock is None else host.lock.storage)
    host.put(power="off")
    await host.until(lambda: host.status.rollback is not None and host.status.rollback.done)
    assert host.snapshots.contents == {"rbd/a": "then", "rbd/b": "then"}
    assert {*locks} == {Storage.UNFENCEABLE}
    await host.until(lambda: host.lock is None)

    host.snapshots.contents = {"rbd/a": "later", "rbd/b": "later"}
    await host.told()
    await host.die()
    host.etcd.erase(LAYOUT.status_key(ONE))
    host.begin()
    await host.until(lambda: host.status.rollback is not None and host.status.rollback.done, 60)
    assert host.snapshots.contents == {"rbd/a": "later", "rbd/b": "later"}, "no request is done twice"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda host: host.put(rollback_request="two:1"), "there is no snapshot two (there is one)"),
        (lambda host: host.snapshots.held["rbd/b"].clear(), "the snapshot one is not on disk/1"),
        (lambda host: host.snapshots.open_by.update({"rbd/a": ("192.0.2.1:0/7",)}), "rbd/a is open (192.0.2.1:0/7)"),
        (lambda host: setattr(host.snapshots, "away", True), "Ceph does not answer"),
    ],
)
async def test_a_rollback_that_cannot_be(host: Host, spoil: Any, said: str) -> None:
    """No disk is touched, the reason tells; the lock is not kept, and the machine can be started."""
    host.snapshots.held = {image: {"kvm-one": WHOLE} for image in ("rbd/a", "rbd/b")}
    await off(host)
    host.put(rollback_request="one:1")
    spoil(host)
    await host.until(lambda: said in host.status.reason, 60)
    assert not any(words.startswith("rollback") for words in host.snapshots.done)
    await host.until(lambda: host.lock is None)
    host.snapshots.away = False
    host.put(power="on")
    await host.runs()


async def test_a_rollback_that_fails_half_way(host: Host) -> None:
    """The machine does not start before the other disk is rolled back, too, although its keys ask for it."""
    host.snapshots.held = {image: {"kvm-one": WHOLE} for image in ("rbd/a", "rbd/b")}
    host.snapshots.kept = {(image, "kvm-one"): "then" for image in ("rbd/a", "rbd/b")}
    await off(host)

    def fail(words: str) -> None:
        if words == "rollback rbd/b@kvm-one":
            raise CephFailed("an error")

    host.snapshots.before = fail
    host.put(rollback_request="one:1")
    await host.until(lambda: "an error" in host.status.reason, 60)
    host.put(power="on")
    host.drop("rollback_request")
    await host.clock.advance(120.0)
    assert host.qemus.alive == []
    await host.die()
    host.begin()
    await host.clock.advance(60.0)
    assert host.qemus.alive == []
    assert "an error" in host.status.reason
    host.snapshots.before = lambda words: None
    await host.until(lambda: host.running, 120)
    assert host.snapshots.contents == {"rbd/a": "then", "rbd/b": "then"}
    assert host.snapshots.done.count("rollback rbd/a@kvm-one") == 1


async def test_a_raw_file_keeps_none(host: Host) -> None:
    """That is told, and the machine runs."""
    await begun(host, **{"disk/0": "file:a.raw size=1M"})
    ask(host, "one")
    await host.until(lambda: "a .raw file keeps none" in host.status.reason)
    assert host.status.phase is Phase.RUNNING


async def test_qcow2_files_in_one_transaction(host: Host) -> None:
    """All or none, of one instant without a pause; taken away by QEMU, which has them open."""
    qemu = await begun(host, **{"disk/0": "file:a.qcow2 size=1M", "disk/1": "file:b.qcow2 size=1M"})
    qemu.blocks = [
        {"inserted": {"node-name": f"disk{number}", "image": {"virtual-size": 1 << 20}}} for number in range(2)
    ]
    ask(host, "one")
    await host.until(lambda: names(host) == ["one"])
    assert qemu.commands.count("transaction") == 1
    assert "stop" not in qemu.commands
    assert host.status.snapshots[0].size == 2 << 20
    ask(host, "one", "delete")
    await host.until(lambda: names(host) == [])
    assert qemu.commands.count("blockdev-snapshot-delete-internal-sync") == 2


async def test_a_hundred_snapshots(host: Host, etcd: FakeEtcd) -> None:
    """They fit into a status, notes and all."""
    await begun(host, **{"disk/0": "rbd/a"})
    for number in range(100):
        ask(host, f"every-hour-{number:03}", "ünïcode — 🐧")
    await host.until(lambda: len(names(host)) == 100, 60)
    await host.told()
    assert host.published is not None
    assert len(host.published.snapshots) == 100
    assert len(etcd.data[LAYOUT.status_key(ONE)]) < 32 << 10


async def test_a_name_that_leads_elsewhere(host: Host) -> None:
    """Such a key is told as any other unknown one, and nothing reaches Ceph."""
    await begun(host)
    for name in ("a/b", "..", "-x", "a b", "."):
        ask(host, name)
    await host.until(lambda: host.status.problems)
    assert "unknown keys" in host.status.problems[0]
    assert (host.snapshots.done, host.status.phase) == ([], Phase.RUNNING)


def test_a_keeper_knows_three_words() -> None:
    assert FROZEN + PAUSED + DONE == b"fpd"


async def test_law_7_a_host_that_dies_in_the_midst_of_a_rollback(host: Host, other: Host) -> None:
    """Nobody takes over by himself; once a person has broken the lock, the next host finishes it, then starts."""
    other.snapshots = host.snapshots
    host.snapshots.held = {image: {"kvm-one": WHOLE} for image in ("rbd/a", "rbd/b")}
    host.snapshots.kept = {(image, "kvm-one"): "then" for image in ("rbd/a", "rbd/b")}
    await off(host)

    def die(words: str) -> None:
        if words == "rollback rbd/b@kvm-one":
            raise asyncio.CancelledError

    host.snapshots.before = die
    host.put(rollback_request="one:1")
    await host.until(lambda: host.snapshots.contents.get("rbd/a") == "then")
    await host.until(host.loop.done)
    lock = host.lock
    assert lock is not None
    assert lock.storage is Storage.UNFENCEABLE
    host.put(host="b", power="on")
    host.sessions = other.sessions = {"b"}
    host.etcd.erase(LAYOUT.session_key(host.me))
    other.begin()
    await other.until(lambda: "break-lock" in other.status.reason)
    await other.clock.advance(300.0)
    assert host.qemus.alive == []
    host.snapshots.before = lambda words: None
    host.etcd.write(LAYOUT.lock_key(ONE), lock.broken().to_json())
    await other.until(lambda: other.running, 60)
    assert host.snapshots.contents == {"rbd/a": "then", "rbd/b": "then"}
    assert host.snapshots.done.count("rollback rbd/a@kvm-one") == 1
