"""How a supervisor keeps its guard: found, started, told, replaced. The guard is the real one, its machines are not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from kvmsupervisor.adapters import process as kernel
from kvmsupervisor.adapters.cgroup import Cgroup, CgroupFailed, NoCgroups
from kvmsupervisor.adapters.cgroup.manager import SameCgroup
from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import Limits
from kvmsupervisor.guard import client as guarding
from kvmsupervisor.guard.client import GuardClient, Unguarded
from tests.support.processes import freeze, starttime_of

LIMIT_S = 30.0
TTL_S = 1000.0
LATE = 1e9


class Bench:
    """One host: its run directory, its machines, and supervisors one after the other."""

    def __init__(self, path: Path) -> None:
        self.run_dir = RunDir(path)
        self.news = 0
        self.posts: list[tuple[GuardClient, asyncio.Task[None]]] = []
        self.machines: dict[str, subprocess.Popen[bytes]] = {}
        self.cgroups: NoCgroups = NoCgroups(survives_container=True)

    def supervisor(self, version: str = "1", ttl_s: float = TTL_S) -> GuardClient:
        """One begins; the former one has ended."""
        post = GuardClient(
            run_dir=self.run_dir, clock=Clock(), cgroups=self.cgroups, ttl_s=ttl_s, notify=self._notify, version=version
        )
        self.posts.append((post, asyncio.create_task(self._run(post))))
        return post

    async def _run(self, post: GuardClient) -> None:
        await post.run()

    def _notify(self) -> None:
        self.news += 1

    async def end_supervisor(self) -> None:
        post, task = self.posts.pop()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        post.close()

    def machine(self, name: str) -> subprocess.Popen[bytes]:
        made = self.machines[name] = subprocess.Popen(["sleep", "3600"])
        return made

    async def watch(self, post: GuardClient, name: str) -> None:
        """As a machine does it: again and again, while there is no guard."""
        process = self.machines.get(name) or self.machine(name)
        pidfd = os.pidfd_open(process.pid)
        try:
            async with asyncio.timeout(LIMIT_S):
                while True:
                    with contextlib.suppress(Unguarded):
                        await post.watch(name, pidfd=pidfd, note=self.note(name))
                        break
        finally:
            os.close(pidfd)

    def note(self, name: str) -> Path:
        return self.run_dir.path / f"{name}.json"

    @property
    def pid(self) -> int | None:
        """Of the guard that lives."""
        found = self.run_dir.guard()
        return found[0] if found is not None and kernel.is_alive(*found) else None

    @property
    def all_guards(self) -> list[int]:
        return list(kernel.find({guarding.MARK: str(self.run_dir.path)}))

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not true():  # noqa: ASYNC110 - processes have no events here
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        while self.posts:
            await self.end_supervisor()
        for process in self.machines.values():
            process.kill()
            process.wait()
        for pid in self.all_guards:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="kvs") as path:
        made = Bench(Path(path))
        yield made
        await made.close()


async def test_there_is_a_guard_while_there_is_something_to_watch(bench: Bench) -> None:
    """Law 7: none without a machine; one for all of them; it outlives its supervisor, in a session of its own."""
    post = bench.supervisor()
    post.renewed(LATE)
    await asyncio.sleep(0)
    assert bench.all_guards == []
    await bench.watch(post, "a")
    await bench.watch(post, "b")
    pid = bench.pid
    assert pid is not None
    assert bench.all_guards == [pid]
    assert os.getsid(pid) == pid
    assert post.holds("a")
    assert post.unlocked is None
    assert bench.news
    await bench.end_supervisor()
    assert bench.pid == pid
    assert not post.holds("a")


async def test_a_successor_finds_it_and_sets_its_deadline(bench: Bench) -> None:
    """Laws 1 and 8: same guard; until the successor has its session the former deadline counts, then its own does.

    For all machines, those too that the successor does not know of.
    """
    first = bench.supervisor()
    first.renewed(LATE)
    await bench.watch(first, "a")
    await bench.watch(first, "unknown-to-its-successor")
    pid = bench.pid
    await bench.end_supervisor()
    second = bench.supervisor()
    await bench.watch(second, "a")
    assert bench.pid == pid
    assert all(process.poll() is None for process in bench.machines.values())
    second.renewed(Clock().now())
    await bench.until(lambda: all(process.poll() == -signal.SIGKILL for process in bench.machines.values()))
    await second.caught_up()
    assert all(bench.note(name).exists() for name in bench.machines)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_guard_that_ends_or_freezes_is_replaced(bench: Bench, number: signal.Signals) -> None:
    """Law 7: noticed, said, and another one watches all of its machines, until the same instant."""
    post = bench.supervisor()
    clock = Clock()
    post.renewed(LATE)
    await bench.watch(post, "a")
    await bench.watch(post, "b")
    before, news = bench.pid, bench.news
    assert before is not None
    os.kill(before, number)
    if number is signal.SIGSTOP:
        post.renewed(LATE + 1)
    await bench.until(lambda: bench.pid not in {None, before} and post.holds("a") and post.holds("b"))
    # Lost, and had again.
    assert bench.news >= news + 2
    assert bench.all_guards == [bench.pid]
    post.renewed(clock.now())
    await bench.until(lambda: all(process.poll() == -signal.SIGKILL for process in bench.machines.values()))


async def test_a_guard_that_was_frozen_when_its_supervisor_ended(bench: Bench) -> None:
    """Law 8: it is found, does not answer, and is replaced."""
    post = bench.supervisor()
    post.renewed(LATE)
    await bench.watch(post, "a")
    before = bench.pid
    assert before is not None
    await bench.end_supervisor()
    freeze(before)
    second = bench.supervisor()
    second.renewed(LATE)
    await bench.watch(second, "a")
    assert bench.all_guards == [bench.pid]
    assert bench.pid != before


async def test_another_versions_guard_is_replaced_once_nobody_is_lost_by_that(bench: Bench) -> None:
    """Law 8: the new one watches before the old one ends; not while the old one watches what we do not know of."""
    post = bench.supervisor("1")
    post.renewed(LATE)
    await bench.watch(post, "a")
    await bench.watch(post, "b")
    before = bench.pid
    await bench.end_supervisor()
    second = bench.supervisor("2")
    second.renewed(LATE)
    await bench.watch(second, "a")
    await second.caught_up()
    assert bench.pid == before
    await bench.watch(second, "b")
    await bench.until(lambda: bench.pid not in {None, before})
    assert second.holds("a")
    assert second.holds("b")
    assert bench.all_guards == [bench.pid]


async def test_nobody_is_killed_before_the_session_could_be_found(bench: Bench) -> None:
    """Law 7: a guard that is begun without a session gives it one TTL; then it kills."""
    post = bench.supervisor(ttl_s=0.5)
    begun = Clock().now()
    await bench.watch(post, "a")
    await bench.until(lambda: bench.machines["a"].poll() == -signal.SIGKILL)
    assert Clock().now() >= begun + 0.5


async def test_pin_ends_the_guard_and_no_machine(bench: Bench) -> None:
    """The setting changed: what an earlier supervisor has left is ended, whatever it is about to do."""
    post = bench.supervisor()
    post.renewed(LATE)
    await bench.watch(post, "a")
    await bench.end_supervisor()
    third = GuardClient(run_dir=bench.run_dir, clock=Clock(), cgroups=bench.cgroups, ttl_s=TTL_S, notify=lambda: None)
    await third.dismiss()
    assert bench.all_guards == []
    assert bench.machines["a"].poll() is None
    await third.dismiss()


async def test_another_process_is_not_taken_for_a_guard(bench: Bench) -> None:
    """Law 8: a pid that is somebody else's by now is left alone."""
    stranger = bench.machine("stranger")
    bench.run_dir.guard_lock.write_text(f"{stranger.pid} {starttime_of(stranger.pid)}\n")
    post = bench.supervisor()
    await post.dismiss()
    assert stranger.poll() is None
    bench.run_dir.guard_lock.write_text("what is this\n")
    post.renewed(LATE)
    await bench.watch(post, "a")
    assert bench.pid is not None


class Entered(SameCgroup):
    """Notes which thread entered, and whether it was to become the parent of the process."""

    def __init__(self) -> None:
        self.by: list[int] = []

    def enter(self) -> None:
        self.by.append(threading.get_ident())


class NotingCgroups(NoCgroups):
    def __init__(self) -> None:
        super().__init__(survives_container=True)
        self.made: list[Entered] = []

    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Cgroup:
        self.made.append(Entered())
        return self.made[-1]


async def test_a_guard_is_in_its_own_cgroup(bench: Bench) -> None:
    """Law 7: it outlives the container, so whatever starts it enters its cgroup before: v1's hierarchies need that."""
    bench.cgroups = cgroups = NotingCgroups()
    await bench.watch(bench.supervisor(), "1")
    assert [len(one.by) for one in cgroups.made] == [1]
    assert threading.get_ident() not in cgroups.made[0].by


class BrokenCgroups(NoCgroups):
    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Cgroup:
        raise CgroupFailed("no cgroup can be made")


async def test_without_a_guard_it_is_said_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 7: a machine that waits for its guard is told what is in the way, whatever that is; then it is watched."""
    bench.cgroups = BrokenCgroups(survives_container=True)
    post = bench.supervisor()
    post.renewed(LATE)
    machine = bench.machine("a")
    pidfd = os.pidfd_open(machine.pid)
    with pytest.raises(Unguarded, match="no cgroup can be made"):
        await post.watch("a", pidfd=pidfd, note=bench.note("a"))
    assert post.trouble is not None
    assert not post.holds("a")
    await bench.end_supervisor()
    bench.cgroups = NoCgroups(survives_container=True)
    monkeypatch.setattr(guarding, "PROGRAM", Path("/nonexistent/guard.py"))
    post = bench.supervisor()
    with pytest.raises(Unguarded, match="the guard that was started does not do its work"):
        await post.watch("a", pidfd=pidfd, note=bench.note("a"))
    monkeypatch.undo()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nonexistent/python")
        await bench.end_supervisor()
        post = bench.supervisor()
        with pytest.raises(Unguarded, match=r"cannot start /nonexistent/python"):
            await post.watch("a", pidfd=pidfd, note=bench.note("a"))
    os.close(pidfd)
    await bench.watch(post, "a")
    assert post.trouble is None


async def test_a_machine_that_has_ended_is_released(bench: Bench) -> None:
    """Law: the descriptor is given back, the guard is not kept for it, and the next one is watched all the same."""
    post = bench.supervisor()
    post.renewed(LATE)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
    await bench.watch(post, "a")
    bench.machines["a"].kill()
    post.release("a")
    post.release("a")
    assert not post.holds("a")
    await bench.until(lambda: bench.pid is None)
    await bench.watch(post, "b")
    assert post.holds("b")
    bench.machines["b"].kill()
    post.release("b")
    await bench.until(lambda: bench.pid is None)
    post.renewed(LATE + 1)
    await bench.until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # noqa: PTH208


async def test_a_machine_that_needs_no_guard_any_more_is_forgotten(bench: Bench) -> None:
    """Law 7: it lives on when the deadline passes, and the others do not; a guard that does not answer may watch it."""
    post = bench.supervisor()
    post.renewed(LATE)
    for name in ("stays", "leaves"):
        await bench.watch(post, name)
    await post.forget("leaves")
    assert not post.holds("leaves")
    post.renewed(Clock().now() - 1.0)
    await bench.until(lambda: bench.note("stays").exists())
    assert bench.machines["leaves"].poll() is None
    assert not bench.note("leaves").exists()
    # A later one may be watched again.
    post.renewed(LATE)
    await bench.watch(post, "leaves")
    assert post.holds("leaves")


async def test_a_candidate_without_a_supervisor_leaves_nothing(bench: Bench) -> None:
    """Cut off while it starts a guard, a supervisor leaves none; or one that does its work."""
    bench.machine("a")
    for turn in range(4):
        post = bench.supervisor()
        post.renewed(LATE)
        asking = asyncio.create_task(bench.watch(post, "a"))
        for _ in range(4 * turn):
            await asyncio.sleep(0.003)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await bench.end_supervisor()
        await bench.until(lambda: bench.all_guards == [pid for pid in [bench.pid] if pid is not None])
        assert bench.machines["a"].poll() is None
