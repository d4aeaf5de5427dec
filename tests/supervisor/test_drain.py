"""`stop --all --local`: a host's guests go down with and without its supervisor, in virtual time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.clock import boot_id
from kvmsupervisor.adapters.rundir import InstanceDir, RunDir
from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.stopping import POWERDOWN_EVERY_S, QUIT_WAIT_S
from kvmsupervisor.supervisor.drain import LOOK_EVERY_S, Drain
from tests.fakes.clock import settle
from tests.fakes.qemu import FakeQemu
from tests.supervisor.test_supervisor import ME, Bench

OWN_S = 60.0
"""What each guest has between power button and force, unless its key says otherwise."""


class Near(RunDir):
    """The run directory, as a shell beside the supervisor has it: the signal reaches the supervisor of a bench.

    Attributes:
        supervised: whether the signal finds one.
    """

    def __init__(self, bench: Bench, *, supervised: bool) -> None:
        super().__init__(bench.path)
        self.supervised = supervised
        self._bench = bench

    def signal_supervisor(self) -> bool:
        if self.supervised:
            self._bench.supervisor.heed_draining()
        return self.supervised


class Shell:
    """A person who stops all guests.

    Attributes:
        drain: what the command does.
        told: which guests were said to run still, each time.
        task: the command; its result is whether all are gone.
    """

    def __init__(self, bench: Bench, *, supervised: bool = False) -> None:
        self.told: list[tuple[str, ...]] = []
        self.drain = Drain(
            system=bench.qemus.system,
            clock=bench.clock,
            boot_id=boot_id(),
            run_dir=Near(bench, supervised=supervised),
            prefix="/kvm",
            me=HostName(ME),
            shutdown_timeout_s=OWN_S,
        )
        self._bench = bench

    def begin(self, *, timeout_s: float = 600.0) -> None:
        self.task = asyncio.create_task(self.drain.begin(timeout_s=timeout_s, on_change=self.told.append))

    async def done(self, *, timeout_s: float = 600.0) -> bool:
        """Begin, and let time pass until the command returns."""
        self.begin(timeout_s=timeout_s)
        return await self.returns()

    async def returns(self) -> bool:
        await self._bench.clock.advance_until(self.task.done, 1000.0)
        return self.task.result()

    async def cut_off(self) -> None:
        """Ctrl-C."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.close()


@pytest.fixture
async def alone(bench: Bench) -> Bench:
    """Three guests run, and their supervisor is gone."""
    await bench.begin()
    await bench.running("1", "2", "3")
    await bench.end()
    return bench


def qemu_of(bench: Bench, name: str) -> FakeQemu:
    (found,) = [qemu for qemu in bench.qemus.all if qemu.instance == name]
    return found


def directory(bench: Bench, name: str) -> InstanceDir:
    return RunDir(bench.path).instance(InstanceId(name))


def saved(bench: Bench, name: str) -> InstanceState:
    return directory(bench, name).read_state(boot_id())


def record(bench: Bench, name: str) -> Incarnation:
    found = directory(bench, name).read_incarnation()
    assert found is not None
    return found


# --- without a supervisor -------------------------------------------------------------------------------------


async def test_all_power_buttons_are_pressed_at_once(alone: Bench) -> None:
    """Nobody waits for another; each end is put on record as asked for, and no key is touched."""
    before, begun = alone.etcd.revision, alone.clock.now()
    shell = Shell(alone)
    assert await shell.done()
    assert [qemu.presses for qemu in alone.qemus.all] == [[begun]] * 3
    assert shell.told == [("1", "2", "3")]
    for name in ("1", "2", "3"):
        assert directory(alone, name).read_incarnation() is None
        assert (saved(alone, name).last_exit, saved(alone, name).restarts) == ("guest-shutdown", 0)
    assert alone.etcd.revision == before


async def test_who_still_runs_is_told_whenever_that_changes(alone: Bench) -> None:
    """A person who waits sees it go on."""
    qemu_of(alone, "2").deaf = True
    shell = Shell(alone)
    assert await shell.done()
    assert shell.told == [("1", "2", "3"), ("2",)]


async def test_a_guest_that_does_not_heed_is_forced_when_its_time_is_over(alone: Bench) -> None:
    """The button again and again; then QEMU's own end; each guest has its own time, from its key or the host's."""
    quick, slow, heeds = (qemu_of(alone, name) for name in ("1", "2", "3"))
    quick.deaf = slow.deaf = True
    directory(alone, "1").write_state(replace(saved(alone, "1"), shutdown_timeout_s=25.0))
    begun = alone.clock.now()
    shell = Shell(alone)
    shell.begin()
    await alone.clock.advance(25.0 - 1.0)
    assert (quick.alive, slow.alive, heeds.alive) == (True, True, False)
    assert quick.presses == [begun + number * POWERDOWN_EVERY_S for number in range(5)]
    await alone.clock.advance(2.0)
    assert (quick.alive, slow.alive) == (False, True)
    assert await shell.returns()
    assert begun + OWN_S <= alone.clock.now() <= begun + OWN_S + 2 * LOOK_EVERY_S
    assert [saved(alone, name).last_exit for name in "123"] == ["host-quit", "host-quit", "guest-shutdown"]


async def test_no_time_at_all_is_at_once(alone: Bench) -> None:
    """A guest whose key `shutdown_timeout` is 0 is not asked."""
    directory(alone, "1").write_state(replace(saved(alone, "1"), shutdown_timeout_s=0.0))
    assert await Shell(alone).done()
    qemu = qemu_of(alone, "1")
    assert (qemu.presses, qemu.status) == ([], WaitStatus(code=0))


@pytest.mark.parametrize("way", ["stubborn", "frozen"])
async def test_a_qemu_that_does_not_end_is_killed(alone: Bench, way: str) -> None:
    """One that lives on when it is told to end, and one that hears nothing, is no reason for a host to stay up."""
    qemu = qemu_of(alone, "1")
    qemu.deaf = True
    setattr(qemu, way, True)
    begun = alone.clock.now()
    assert await Shell(alone).done()
    assert qemu.status is not None
    assert qemu.status.signal == 9
    assert OWN_S <= alone.clock.now() - begun < OWN_S + QUIT_WAIT_S + 30.0
    assert (saved(alone, "1").last_exit or "").startswith("killed by its supervisor")


async def test_the_callers_limit_is_no_sentence(alone: Bench) -> None:
    """Who still runs when it is over is named, and neither forced nor let go of: the next one goes on with it."""
    qemu = qemu_of(alone, "2")
    qemu.deaf = True
    shell = Shell(alone)
    begun = alone.clock.now()
    assert not await shell.done(timeout_s=5.0)
    assert alone.clock.now() - begun <= 5.0 + LOOK_EVERY_S
    assert shell.drain.running() == ("2",)
    assert (qemu.alive, record(alone, "2").pid) == (True, qemu.pid)
    qemu.deaf = False
    assert await Shell(alone).done()


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.15, 5.0, OWN_S + 1.0])
async def test_cut_off_half_way_and_started_again(alone: Bench, after_s: float) -> None:
    """Whatever the first one came to, the second one ends it, and the run directory is free meanwhile."""
    qemu_of(alone, "1").deaf = qemu_of(alone, "1").stubborn = True
    first = Shell(alone)
    first.begin()
    await alone.clock.advance(after_s)
    await first.cut_off()
    free = RunDir(alone.path)
    free.acquire()
    free.release()
    assert qemu_of(alone, "1").alive
    assert free.is_draining(boot_id())
    assert await Shell(alone).done()
    assert not alone.qemus.alive


async def test_without_guests_it_is_done_at_once(bench: Bench) -> None:
    """The mark is set all the same: nothing starts before the host's next boot."""
    begun = bench.clock.now()
    assert await Shell(bench).done()
    assert bench.clock.now() <= begun + LOOK_EVERY_S
    assert RunDir(bench.path).is_draining(boot_id())


# --- what is in the way ---------------------------------------------------------------------------------------


async def test_a_record_that_nobody_can_read_keeps_no_other_guest_up(alone: Bench) -> None:
    """It is another release's: left alone, and told."""
    (alone.path / "1" / "incarnation.json").write_text("{")
    with capture_logs() as logs:
        assert await Shell(alone).done()
    assert [qemu_of(alone, name).alive for name in ("1", "2", "3")] == [True, False, False]
    assert {line["instance"] for line in logs if line["event"] == "instance.unreadable"} == {"1"}


async def test_a_process_that_cannot_be_seen_is_left_alone(alone: Bench) -> None:
    """It lives, so it is named when the time is over; nothing is done to it (law 8)."""
    qemu = qemu_of(alone, "1")
    qemu.environment.clear()
    shell = Shell(alone)
    assert not await shell.done(timeout_s=30.0)
    assert shell.drain.running() == ("1",)
    assert (qemu.alive, qemu.presses) == (True, [])


async def test_a_record_of_an_earlier_boot_is_buried(alone: Bench) -> None:
    """Its process ended with that boot, whoever has its pid now."""
    qemu = qemu_of(alone, "1")
    directory(alone, "1").write_incarnation(replace(record(alone, "1"), boot_id="another"))
    assert await Shell(alone).done()
    assert (qemu.alive, qemu.presses) == (True, [])
    assert directory(alone, "1").read_incarnation() is None


async def test_a_full_disk_keeps_no_guest_up(alone: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be remembered of one guest is told; all go down."""
    write = InstanceDir.write_state

    def full(self: InstanceDir, saved: InstanceState) -> None:
        if self.path.name == "1":
            raise OSError(28, os.strerror(28))
        write(self, saved)

    monkeypatch.setattr(InstanceDir, "write_state", full)
    qemu_of(alone, "2").deaf = True
    with capture_logs() as logs:
        assert await Shell(alone).done()
    assert not alone.qemus.alive
    assert [line["instance"] for line in logs if line["event"] == "instance.memory_unwritten"] == ["1"]


# --- with a supervisor ----------------------------------------------------------------------------------------


async def test_a_supervisor_does_it_by_itself(bench: Bench) -> None:
    """The command only waits; the keys stay as they are, and `start --all --local` lets them run again."""
    await bench.begin()
    qemus = await bench.running("1", "2")
    shell = Shell(bench, supervised=True)
    assert await shell.done()
    assert [len(qemu.presses) for qemu in qemus.values()] == [1, 1]
    await bench.clock.advance(5.0)
    status = bench.status("1")
    assert status is not None
    assert status.phase is Phase.STOPPED
    bench.create("3")
    await bench.clock.advance(60.0)
    assert not bench.qemus.alive
    shell.drain.end()
    await bench.clock.advance_until(lambda: len(bench.of("1", "2", "3")) == 3, 60.0)


async def test_a_supervisor_that_starts_meanwhile_goes_on_with_it(alone: Bench) -> None:
    """The signal found none; then one has the run directory. It has seen the mark, and the command waits for it."""
    shell = Shell(alone)
    RunDir(alone.path).mark_draining(boot_id())
    await alone.begin(virtual_s=0.0)
    assert await shell.done()
    assert not alone.qemus.alive
    assert all(qemu.presses for qemu in alone.qemus.all)


async def test_the_next_supervisor_starts_nothing(alone: Bench) -> None:
    """Not before `start --all --local`, or the next boot; the locks of what has ended are let go of."""
    shell = Shell(alone)
    assert await shell.done()
    await alone.begin(virtual_s=120.0)
    assert not alone.qemus.alive
    assert not [key for key in alone.etcd.data if key.endswith("/lock")]
    shell.drain.end()
    alone.supervisor.heed_draining()
    await alone.clock.advance_until(lambda: len(alone.of("1", "2", "3")) == 3, 60.0)
    await settle()
