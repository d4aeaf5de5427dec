"""What happened to an instance is in its file and in its key, with the reason a person asks for."""

from __future__ import annotations

import asyncio

import pytest

from kvmsupervisor.adapters.event_files import read
from kvmsupervisor.domain.events import Event, from_json, from_lines, to_json
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.status import Phase
from tests.fakes.etcd import FakeEtcd
from tests.instance.test_takeover import orphan, theirs
from tests.support.host import LAYOUT, ONE, Host

EVENTS_KEY = LAYOUT.events_key(ONE)

CRASH = ["starting", "running", "stopping", "ended", "starting", "running"]


def in_key(host: Host) -> tuple[Event, ...]:
    return from_json(host.etcd.data.get(EVENTS_KEY, b"[]"))


def in_file(host: Host) -> tuple[Event, ...]:
    host.event_files.close()  # waits for its thread
    return from_lines(read(host.path / "_state" / "_events", ONE))


def names(events: tuple[Event, ...]) -> list[str]:
    return [event.event for event in events]


async def test_a_crash_is_told_with_its_cause(host: Host) -> None:
    """Start, run, end with its class, run again; the same in the file and in the key."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    qemu.crash(9)
    await host.until(lambda: host.running not in {None, qemu})
    await host.told()
    told = in_key(host)
    assert told == in_file(host)
    assert names(told) == [f"instance.{name}" for name in CRASH]
    ended = told[-3]
    assert (ended.end, ended.reason, ended.host, ended.epoch) == ("crashed", "crashed (signal 9)", host.me, 1)
    assert told[-1].epoch == 2
    assert told[-1].revision > 0


async def test_a_first_start_asks_for_no_events(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in the step that takes the lock, also where somebody has deleted a status and left its events."""
    left = Event(at="2026-01-01T00:00:00Z", host="b", event="instance.ended", epoch=3, reason="guest-shutdown")
    host.etcd.write(EVENTS_KEY, to_json([left])[0])
    host.wish()
    host.begin()
    writer = host.context.status_writer._store
    assert isinstance(writer, FakeEtcd)
    compared: list[bool] = []
    monkeypatch.setattr(writer, "begin_txn", lambda compare, _: compared.append(bool(compare)))
    await host.runs()
    await host.told()
    assert in_key(host)[0] == left
    assert names(in_key(host))[1:] == ["instance.starting", "instance.running"]
    assert all(compared), "a transaction that only reads"
    assert (writer.calls["txn"], writer.calls["read"]) == (len(compared), 0)
    assert compared


async def test_a_stop_is_told_by_the_release_and_what_follows(host: Host) -> None:
    """The transaction that lets go of the lock has the end in it."""
    host.wish()
    host.begin()
    await host.runs()
    host.put(power="off")
    await host.until(lambda: host.status.phase is Phase.STOPPED and host.lock is None)
    await host.told()
    assert names(in_key(host))[-3:] == ["instance.stopping", "instance.ended", "instance.stopped"]
    assert names(in_file(host))[-3:] == ["instance.stopping", "instance.ended", "instance.stopped"]


async def test_a_removed_instance_leaves_no_key(host: Host) -> None:
    """Its status and its events are gone together, in the step that releases the lock."""
    host.wish()
    host.begin()
    await host.runs()
    await host.told()
    assert in_key(host)
    host.etcd.erase(*(key for key in host.etcd.data if key.startswith("/kvm/1/") and not key.endswith("/lock")))
    await host.until(lambda: host.gone)
    await host.told()
    assert EVENTS_KEY not in host.etcd.data
    assert host.published is None


async def test_a_host_that_booted_says_why_its_guest_began_again(host: Host) -> None:
    """Nobody recorded the end of its QEMU: the lock of the former boot tells."""
    orphan(host, theirs(host=HostName("a"), boot_id="an earlier boot"))
    host.begin()
    await host.runs(2.0)
    await host.told()
    taken = next(event for event in in_key(host) if event.event == "lock.taken")
    assert "has booted since" in taken.reason
    assert names(in_key(host)) == names(in_file(host))


async def test_a_guest_that_reboots_all_day_is_counted(host: Host) -> None:
    """One event a minute at most, with the number of resets; the key stays small."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    await host.told()
    for _ in range(50):
        qemu.event("RESET", guest=True, reason="guest-reset")
        await host.clock.advance(10.0)
    await host.clock.advance(120.0)
    await host.told()
    resets = [event for event in in_key(host) if event.event == "instance.guest_reset"]
    assert 1 < len(resets) <= 10
    assert sum(event.times for event in resets) == 50


async def test_a_supervisor_that_is_replaced_writes_nothing(host: Host) -> None:
    """What an earlier one has said is no news; that another one watches is in the file."""
    host.wish()
    host.begin()
    await host.runs()
    await host.told()
    before = in_key(host)
    await host.die()
    host.begin()
    host.context.status_writer.prime(host.etcd._server.select(LAYOUT.statuses_prefix, prefix=True))
    await host.clock.advance(600.0)
    assert not any(event.at > before[-1].at for event in in_key(host) if event.event != "instance.adopted")
    assert names(in_file(host)) == [*names(before), "instance.adopted"]


async def test_a_lock_that_another_host_got_meanwhile_is_not_released(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 2: before a release its events are read; what is released is the lock that was decided on, and no other."""
    host.wish()
    host.begin()
    await host.runs()
    host.sessions = {"a", "b"}
    real = host.context.status_writer.events_of
    lock = theirs(epoch=9)

    async def meanwhile(instance: InstanceId) -> object:
        host.etcd.write(LAYOUT.lock_key(ONE), lock.to_json())
        for _ in range(50):
            await asyncio.sleep(0)  # the watch brings it
        return await real(instance)

    monkeypatch.setattr(host.context.status_writer, "events_of", meanwhile)
    host.put(power="off")
    await host.until(lambda: not host.qemus.alive)
    await host.clock.advance(30.0)
    assert host.lock == lock


@pytest.mark.parametrize("hours", [4, pytest.param(24, marks=pytest.mark.soak)])
async def test_a_day_of_crashes_stays_within_its_bounds(host: Host, hours: int) -> None:
    """Every value of the key, and the file; the number of crashes is right, and what came before them is still told."""
    orphan(host, theirs(host=HostName("a"), boot_id="an earlier boot"))
    host.begin()
    sizes: list[int] = []
    crashes, end = 0, host.clock.now() + hours * 3600.0
    while host.clock.now() < end:
        qemu = await host.runs(400.0)
        await host.told()
        sizes.append(len(host.etcd.data[EVENTS_KEY]))
        (host.run_dir.instance(ONE).qemu_log).write_bytes(
            b"qemu: \x1b[2J\n" + b"\xff" * 4000 + b"\nabort() %d\n" % crashes
        )
        qemu.crash(6)
        crashes += 1
        await host.clock.advance(1.0)
    assert crashes > 20 * hours
    assert max(sizes) <= 4096
    told = in_key(host)
    assert len(told) <= 16
    assert sum(event.times for event in told if event.end == "crashed") == crashes
    assert any(event.event == "lock.taken" for event in told)
    in_file(host)
    folder = host.path / "_state" / "_events"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 128 * 1024


async def test_at_rest_nothing_is_written(host: Host) -> None:
    """Not to etcd, and not to the disk."""
    host.wish()
    host.begin()
    await host.runs()
    await host.told()
    before, revision = in_file(host), host.etcd.revision
    await host.clock.advance(86_400.0)
    assert (in_file(host), host.etcd.revision) == (before, revision)
