"""Live moves and drains that went wrong once, in virtual time: production supervisors on the simulated cluster."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import LockState
from tests.simulation import loop as sim
from tests.simulation.chance import NoChance
from tests.simulation.outside import drawn
from tests.simulation.points import Armed, Way, listening
from tests.simulation.qemu import SimQemu
from tests.simulation.world import World, tapped

LIVE = {"KVM_MIGRATION_LISTEN": "192.0.2.{number}:9747"}
LIMIT_S = 600.0

Told = Callable[["Stage"], Awaitable[None]]


class Stage:
    """A cluster of three hosts, whose guests are moved while they run.

    Attributes:
        logged: what supervisors have logged: who, event, fields.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.logged: list[tuple[str, str, dict[str, Any]]] = []
        world.on_log = lambda who, event, told: self.logged.append((who, event, dict(told)))

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not true():  # noqa: ASYNC110 - time is virtual
                await asyncio.sleep(0.1)

    async def running(self, host: str, instance: str = "r1") -> SimQemu:
        """Let time pass until it runs there, settled, and nowhere else."""

        def found() -> SimQemu | None:
            lock, living = self.world.lock(instance), self.world.judge.living(instance)
            is_settled = lock is not None and (lock.state, lock.host) == (LockState.RUNNING, host)
            return living[0] if is_settled and len(living) == 1 and living[0].writes else None

        await self.until(found)
        qemu = found()
        assert qemu is not None
        return qemu

    def is_alone(self, host: str) -> bool:
        """Whether its one QEMU is there, and a lock that says so, whether its guest runs or not."""
        lock, living = self.world.lock("r1"), self.world.judge.living("r1")
        return [one.host for one in living] == [host] and lock is not None and lock.state is LockState.RUNNING

    def make(self, host: str, **keys: str) -> None:
        self.world.put("r1", rbd="rbd/r1", ram="64", shutdown_timeout="20", **keys, host=host)

    def move(self, host: str) -> None:
        self.world.judge.ordered("r1", f"moves to {host}", to=host)
        self.world.put("r1", host=host)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [told for _, event, told in self.logged if event == name]


@pytest.fixture
def played() -> Callable[[Told], list[str]]:
    """Plays a story to its end; returns what was violated."""

    def play(told: Told) -> list[str]:
        folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

        async def run(world: World) -> None:
            with drawn(world.chance.of("program")), listening(world):
                for host in world.hosts:
                    host.start()
                await told(Stage(world))
                world.end()
                for host in world.hosts:
                    host.kill()
                await asyncio.sleep(0)

        def in_its_world() -> list[str]:
            world = World(sim.SimLoop(), NoChance(0), folder, keep=0, settings=LIVE)
            with tapped(world):
                sim.run_within(world.loop, lambda loop: run(world))
            return list(map(str, world.judge.violations))

        try:
            with sim.apart():
                return in_its_world()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return play


def test_there_and_back(played: Callable[[Told], list[str]]) -> None:
    """Law 13: it goes on with its memory, and nobody stops it, also where it has come a moment before."""

    async def told(stage: Stage) -> None:
        stage.make("a")
        first = await stage.running("a")
        for host in "bcab":
            stage.move(host)
            qemu = await stage.running(host)
            assert qemu.boot is first.boot
            assert qemu.counted_s > first.counted_s
        # The source closes its disks itself: nobody has to shut it out.
        assert stage.world.ceph.shut_out == {}

    assert played(told) == []


def test_one_that_has_come_is_sent_on(played: Callable[[Told], list[str]]) -> None:
    """Law 13: QEMU tells of the transfer by which its guest came. Asked in between, that is no hand-over (seed 29)."""

    async def told(stage: Stage) -> None:
        stage.make("a")
        first = await stage.running("a")
        stage.move("b")
        here = await stage.running("b")
        stage.world.host("c").freeze_supervisor(on=True)
        stage.move("c")
        await asyncio.sleep(1.0)
        here.pause()
        await asyncio.sleep(3.0)
        here.resume()
        await asyncio.sleep(3.0)
        stage.world.host("c").freeze_supervisor(on=False)
        assert (await stage.running("c")).boot is first.boot

    assert played(told) == []


def test_one_that_a_person_paused_is_sent_on(played: Callable[[Told], list[str]]) -> None:
    """Law 13: paused here or there, it stays so, and comes back with all of its memory."""

    async def told(stage: Stage) -> None:
        stage.make("a")
        first = await stage.running("a")
        first.pause()
        await asyncio.sleep(2.0)
        for host in "bc":
            stage.move(host)
            await stage.until(partial(stage.is_alone, host))
        (there,) = stage.world.judge.living("r1")
        assert (there.run_state, there.boot is first.boot) == ("paused", True)
        stage.world.let_go_on(first.boot)
        assert (await stage.running("c")).boot is first.boot

    assert played(told) == []


def test_a_target_that_is_cut_off_once_it_is_on_record(played: Callable[[Told], list[str]]) -> None:
    """Law 13: its next supervisor finds a guest that has come, stands still, and is its own: it lets it go on."""

    async def told(stage: Stage) -> None:
        stage.make("a")
        first = await stage.running("a")
        stage.world.armed["arrival on record"] = Armed("b", Way.KILL, 2.0)
        stage.move("b")
        assert (await stage.running("b")).boot is first.boot
        assert not stage.world.armed

    assert played(told) == []


def test_an_offer_that_went_with_a_session_is_made_again(played: Callable[[Told], list[str]]) -> None:
    """A target that has lost its session meanwhile says once more that it takes the guest (seed 453)."""

    async def told(stage: Stage) -> None:
        stage.make("a")
        first = await stage.running("a")
        stage.world.host("a").freeze_supervisor(on=True)
        stage.move("b")
        await stage.until(lambda: stage.events("move.offered"))
        session = stage.world.etcd._server.keys[b"/kvmsupervisor/hosts/b"]
        stage.world.shaken(60.0)
        stage.world.etcd.expire(session.lease)
        await asyncio.sleep(5.0)
        stage.world.host("a").freeze_supervisor(on=False)
        assert (await stage.running("b")).boot is first.boot
        assert len(stage.events("move.offered")) == 2

    assert played(told) == []


def test_keys_that_are_written_again_need_another_offer(played: Callable[[Told], list[str]]) -> None:
    """A person writes the host again where a drain has placed a guest: an offer from before is none (seed 482)."""

    async def told(stage: Stage) -> None:
        stage.make("a", hosts="b")
        first = await stage.running("a")
        stage.world.armed["before CALL"] = Armed("a", Way.FAIL, 0.0)
        stage.world.drain("a", "live")
        await stage.until(lambda: stage.events("move.offered"))
        stage.move("b")
        assert (await stage.running("b")).boot is first.boot

    assert played(told) == []


def test_who_has_come_leaves_the_next_targets_offer_alone(played: Callable[[Told], list[str]]) -> None:
    """Sent back as soon as it has come, it waits for nobody: the offers of both ways have one key (seed 821)."""

    async def told(stage: Stage) -> None:
        stage.make("a")
        first = await stage.running("a")
        stage.world.armed["lock written"] = Armed("b", Way.FREEZE, 3.0, lambda: stage.move("a"))
        stage.move("b")
        await stage.until(lambda: len(stage.events("move.offered")) == 2)
        assert (await stage.running("a")).boot is first.boot

    assert played(told) == []


def test_who_waits_for_his_target_writes_nothing(played: Callable[[Told], list[str]]) -> None:
    """However often he asks: his status says once what he waits for (seed 453)."""

    async def told(stage: Stage) -> None:
        stage.make("a")
        await stage.running("a")
        stage.world.host("b").freeze_supervisor(on=True)
        stage.world.shaken(60.0)
        stage.move("b")
        await asyncio.sleep(4.0)
        status, revision = stage.world.status("r1"), stage.world.etcd.revision
        assert status is not None
        assert "waits until b has said that it takes it" in status.reason
        await asyncio.sleep(6.0)
        assert stage.world.etcd.revision == revision
        stage.world.host("b").freeze_supervisor(on=False)
        await stage.running("b")

    assert played(told) == []


def test_a_takeover_behind_two_moves_needs_no_person(played: Callable[[Told], list[str]]) -> None:
    """Law 4: whom the lock names is known as its own, also where a supervisor that has just come has moved it (425)."""

    async def told(stage: Stage) -> None:
        stage.make("a", hosts="a b c")
        await stage.running("a")
        stage.move("b")
        await stage.running("b")
        stage.world.host("b").stop()
        await asyncio.sleep(5.0)
        stage.move("c")
        await stage.running("c")
        stage.world.host("c").lose_power()
        await stage.until(lambda: any(one.host != "c" and one.writes for one in stage.world.judge.living("r1")))

    assert played(told) == []


def test_who_has_handed_over_says_nothing_of_his_qemu(played: Callable[[Told], list[str]]) -> None:
    """Also where etcd had failed a moment before, and the target is away: its status tells of no process (seed 207)."""

    async def told(stage: Stage) -> None:
        stage.make("a")
        await stage.running("a")
        stage.world.armed["before GIVE"] = Armed("a", Way.FAIL, 0.0)
        stage.world.armed["arriving"] = Armed("b", Way.KILL, 30.0)
        stage.move("b")
        await stage.until(lambda: stage.events("move.given"))
        await asyncio.sleep(5.0)
        status = stage.world.status("r1")
        assert status is not None
        assert (status.host, status.pid) == ("a", None)
        await stage.running("b")

    assert played(told) == []


def test_one_whose_qemu_dies_on_its_way_keeps_nobody_from_leaving(played: Callable[[Told], list[str]]) -> None:
    """Others move from that host afterwards, one at a time (seed 1059)."""

    async def told(stage: Stage) -> None:
        stage.make("a")
        first = await stage.running("a")
        stage.world.put("r2", rbd="rbd/r2", ram="64", shutdown_timeout="20", host="a")
        second = await stage.running("a", "r2")
        stage.world.armed["before ANNOUNCE"] = Armed("a", Way.HIT, 0.0, hit=lambda world, host, for_s: first.crash())
        stage.move("b")
        await stage.running("b")
        stage.world.judge.ordered("r2", "moves to b", to="b")
        stage.world.put("r2", host="b")
        assert (await stage.running("b", "r2")).boot is second.boot

    assert played(told) == []


def test_a_host_is_drained_once_it_has_ended_what_was_taken_over(played: Callable[[Told], list[str]]) -> None:
    """It comes back to a drain with a QEMU that is another one's by now: that leaves, and it says so (seed 1039)."""

    async def told(stage: Stage) -> None:
        world = stage.world
        stage.make("a", hosts="a b")
        (qemu,) = [await stage.running("a")]
        world.host("a").freeze(on=True)
        world.shaken(200.0)
        await stage.until(lambda: any(one.host == "b" and one.writes for one in world.judge.living("r1")))
        world.drain("a", "live")
        # It hangs in the kernel.
        dies = qemu.crash
        qemu.crash = lambda number=9: world.loop.call_later(3.0, dies, number)  # type: ignore[method-assign, assignment]
        world.host("a").freeze(on=False)
        await stage.until(lambda: (said := world.progress("a")) is not None and said.drained is not None)
        assert not qemu.alive

    assert played(told) == []


def test_a_host_empties_itself_and_takes_all_back(played: Callable[[Told], list[str]]) -> None:
    """Nobody is stopped for it; `drained` is said once all have arrived."""

    async def told(stage: Stage) -> None:
        world = stage.world
        for name in ("r1", "r2", "r3"):
            world.put(name, rbd=f"rbd/{name}", ram="64", hosts="b c", shutdown_timeout="20", host="a")
        for name in ("r1", "r2", "r3"):
            await stage.running("a", name)
        world.drain("a", "live")
        await stage.until(lambda: (said := world.progress("a")) is not None and said.drained is not None)
        assert world.host("a").kernel.living == []
        assert {*world.progress("a").moved} == {"r1", "r2", "r3"}  # type: ignore[union-attr]
        world.undrain("a", "live")
        for name in ("r1", "r2", "r3"):
            await stage.running("a", name)
        await stage.until(lambda: all(world.placed(InstanceId(name)) is None for name in ("r1", "r2", "r3")))
        assert world.judge.counts["handed over"] == 6
        assert world.judge.counts["taken"] == 9

    assert played(told) == []
