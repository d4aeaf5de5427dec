"""Instances under guard (law 7), in virtual time: who is watched, before what, and what is said."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kvmsupervisor.domain.status import Phase
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd
from tests.fakes.guard import FakeGuard
from tests.fakes.qemu import FakeQemu, FakeQemus
from tests.support.host import Host

A_FILE = "-drive file=/srv/1.img"


@pytest.fixture
def guard() -> FakeGuard:
    return FakeGuard()


@pytest.fixture
async def host(guard: FakeGuard) -> AsyncIterator[Host]:
    clock = FakeClock()
    qemus = FakeQemus(clock)
    made = Host(FakeEtcd(clock.now), clock, qemus)
    made.guard = guard
    # No guest ever runs that its guard does not watch.
    qemus.on_record = lambda qemu: incarnation_of(qemu) in guard.charges
    yield made
    await made.close()


def incarnation_of(qemu: FakeQemu) -> str:
    return qemu.environment["KVMSUPERVISOR_INCARNATION"]


async def test_a_guest_runs_once_its_guard_watches_it(host: Host, guard: FakeGuard) -> None:
    """Law 7: what cannot be fenced waits for its guard, paused, and says so; then it runs, and that is said, too."""
    guard.trouble = "no cgroup can be made"
    host.wish(extra_flags=A_FILE)
    host.begin()
    await host.until(lambda: host.status.phase is Phase.WAITING and "guard" in host.status.reason)
    assert host.status.reason == "QEMU is ready and paused until its guard watches it: no cgroup can be made"
    assert host.status.guarded is False
    await host.clock.advance(30.0)
    assert host.qemus.running == []
    assert len(host.qemus.all) == 1
    guard.trouble = None
    qemu = await host.runs()
    assert list(guard.charges) == [incarnation_of(qemu)]
    assert host.status.guarded is True
    assert host.qemus.ran_off_the_record == []


@pytest.mark.parametrize("wishes", [{}, {"rbd": "rbd/1"}], ids=["diskless", "rbd"])
async def test_what_needs_no_guard_has_none(host: Host, guard: FakeGuard, wishes: dict[str, str]) -> None:
    """Law 6: machines on RBD only, or without a disk, have nothing to do with a guard, whether there is one or not."""
    guard.trouble = "there is none"
    host.wish(**wishes)
    host.begin()
    await host.runs()
    assert guard.charges == {}
    assert host.status.guarded is None


async def test_an_adopted_machine_is_put_under_guard_again(host: Host, guard: FakeGuard) -> None:
    """Law 8: by the next supervisor, before etcd has said anything."""
    host.wish(extra_flags=A_FILE)
    host.begin()
    qemu = await host.runs()
    await host.die()
    guard.charges.clear()
    host.session.held = False
    host.begin()
    await host.until(lambda: guard.charges)
    assert list(guard.charges) == [incarnation_of(qemu)]


async def test_a_guard_that_is_lost(host: Host, guard: FakeGuard) -> None:
    """Law 7: its machine runs on, that nobody watches it is said, and it is watched by the next one."""
    host.wish(extra_flags=A_FILE)
    host.begin()
    qemu = await host.runs()
    guard.trouble = "it has ended"
    guard.charges.clear()
    host.instance.notify()
    await host.until(lambda: "no guard watches it: it has ended" in host.status.reason)
    assert (host.status.phase, host.status.guarded) == (Phase.RUNNING, False)
    await host.clock.advance(10.0)
    assert qemu.alive
    guard.trouble = None
    await host.until(lambda: host.status.guarded)
    assert host.status.reason == "runs"


@pytest.mark.parametrize("policy", ["always", "never"])
async def test_what_its_guard_killed_is_told_and_started_again(host: Host, guard: FakeGuard, policy: str) -> None:
    """Law 7: it did not end by itself, so no policy keeps it down, and no restart is counted."""
    host.wish(extra_flags=A_FILE, restart=policy)
    host.begin()
    qemu = await host.runs()
    guard.kill(qemu)
    await host.until(lambda: host.running not in {None, qemu})
    assert host.status.last_exit is not None
    assert "killed by its guard at 2026-01-01T00:00:00Z" in host.status.last_exit
    assert host.status.restarts == 0
    assert guard.caught_up_with == 1
    assert guard.released == [incarnation_of(qemu)]


async def test_what_its_guard_killed_while_nobody_was_there(host: Host, guard: FakeGuard) -> None:
    """Law 7: the next supervisor says it, before etcd says anything."""
    host.wish(extra_flags=A_FILE)
    host.begin()
    qemu = await host.runs()
    await host.die()
    guard.kill(qemu)
    host.begin()
    assert "killed by its guard" in str(host.instance._machine.view())
    await host.until(lambda: host.running not in {None, qemu})
    assert host.status.last_exit is not None
    assert "killed by its guard" in host.status.last_exit


async def test_a_guard_that_ended_with_what_it_killed(host: Host, guard: FakeGuard) -> None:
    """Law: what has ended needs no guard, also while its end is not yet named: the loop lets others run meanwhile."""
    host.wish(extra_flags=A_FILE)
    host.begin()
    qemu = await host.runs()
    guard.kill(qemu)
    guard.trouble = "it has ended"
    await host.until(lambda: host.status.last_exit is not None)
    guard.trouble = None
    await host.until(lambda: host.running not in {None, qemu})


async def test_a_crash_is_still_a_crash(host: Host, guard: FakeGuard) -> None:
    """Law: a note of another incarnation, or none that can be read, is nobody's excuse."""
    host.wish(extra_flags=A_FILE)
    host.begin()
    qemu = await host.runs()
    guard.charges[incarnation_of(qemu)].write_text('{"version": 1, "incarnation": "another", "at": "x"}')
    qemu.crash()
    await host.until(lambda: host.running not in {None, qemu})
    assert host.status.last_exit == "crashed (signal 9)"
    (note,) = guard.charges.values()
    assert not note.exists()
    note.write_text("{")
    second = host.running
    assert second is not None
    second.crash()
    await host.until(lambda: host.status.restarts == 2)
    assert host.status.last_exit == "crashed (signal 9)"
