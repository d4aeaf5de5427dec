"""`--wait`: it ends when the wish is a fact, not before, and says what stands in the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from kvmsupervisor.adapters.etcd.api import Denied
from kvmsupervisor.cli import waiting
from kvmsupervisor.cli.move_command import until_on
from kvmsupervisor.cli.waiting import Goal, Outcome, Sighting
from kvmsupervisor.cluster.acts import instances as actions
from kvmsupervisor.cluster.acts.instances import Written
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import Power, Wish
from kvmsupervisor.domain.status import Phase, Status, Transfer
from tests.cli.conftest import SINCE, World

ONE = InstanceId("1")

BEFORE = Status(
    id="1", host="alpha", phase=Phase.RUNNING, reason="r", since=SINCE, revision=5, epoch=1, incarnation="i1"
)
WRITTEN = Written(instance=ONE, revision=7, wish=Wish(instance=ONE, host="alpha"), before=BEFORE)


def seen(phase: Phase, revision: int = 7, *, locked: bool = True, holder: str = "beta", **fields: object) -> Sighting:
    """A sighting of a status that differs from `BEFORE` in these fields."""
    status = replace(BEFORE, phase=phase, revision=revision, **fields)  # type: ignore[arg-type]
    return Sighting(status=status, locked=locked, holder=holder, host_alive=True)


AS_WRITTEN = waiting.until_as_written(lambda macs: {})
NOTHING = Sighting(status=None, locked=False)
ONLY_LOCKED = Sighting(status=None, locked=True)


@pytest.mark.parametrize(
    ("goal", "sighting", "reached"),
    [
        (waiting.until_running, NOTHING, None),
        (waiting.until_running, seen(Phase.RUNNING, 6), None),
        (waiting.until_running, seen(Phase.STARTING), None),
        (waiting.until_running, seen(Phase.BACKOFF), None),
        (waiting.until_running, seen(Phase.STOPPED), None),
        (waiting.until_running, seen(Phase.STOPPED, epoch=2), False),
        (waiting.until_running, seen(Phase.RUNNING, problems=("ram: bad",)), False),
        (waiting.until_running, seen(Phase.INVALID, problems=("ram: bad",)), False),
        (waiting.until_running, seen(Phase.RUNNING, 9), True),
        (AS_WRITTEN, seen(Phase.RUNNING, 9), True),
        (AS_WRITTEN, seen(Phase.RUNNING, 9, awaited_host="nowhere"), None),
        (waiting.until_restarted, seen(Phase.RUNNING, incarnation="i2", awaited_host="nowhere"), True),
        (waiting.until_stopped, seen(Phase.STOPPED, 6), None),
        (waiting.until_stopped, seen(Phase.STOPPING), None),
        (waiting.until_stopped, seen(Phase.INVALID, pid=4), None),
        (waiting.until_stopped, seen(Phase.INVALID), True),
        (waiting.until_stopped, seen(Phase.STOPPED, holder="alpha"), None),
        (waiting.until_stopped, seen(Phase.STOPPED), True),
        (waiting.until_stopped, seen(Phase.STOPPED, locked=False), True),
        (waiting.until_stopped, ONLY_LOCKED, None),
        (waiting.until_stopped, NOTHING, True),
        (waiting.until_restarted, seen(Phase.RUNNING), None),
        (waiting.until_restarted, seen(Phase.STARTING, incarnation="i2"), None),
        (waiting.until_restarted, seen(Phase.RUNNING, incarnation="i2"), True),
        (lambda _: waiting.until_gone, seen(Phase.STOPPED, locked=False), None),
        (lambda _: waiting.until_gone, ONLY_LOCKED, None),
        (lambda _: waiting.until_gone, NOTHING, True),
    ],
)
def test_a_goal_is_reached_by_facts_that_are_new_enough(
    goal: Callable[[Written], Goal], sighting: Sighting, reached: bool | None
) -> None:
    """What a host said before it saw the wish counts for nothing; what cannot come any more ends the wait."""
    verdict = goal(WRITTEN)(sighting)
    assert (None if verdict is None else verdict[0]) is reached


async def waited(
    world: World,
    supervisor: Callable[[], Awaitable[None]],
    goal_of: Callable[[Written], Goal],
    *,
    timeout_s: float = 20,
) -> tuple[list[Outcome], list[tuple[str, str]]]:
    """Switch instance 1 on and wait for a goal while `supervisor` acts; return outcomes and what was told."""
    client = world.etcd.peer()
    written = await actions.switch(client, world.layout, ONE, Power.ON)
    told: list[tuple[str, str]] = []
    acting = asyncio.create_task(_run(supervisor))
    outcomes = await waiting.wait_for_all(
        client,
        world.layout,
        [(written, goal_of(written))],
        timeout_s=timeout_s,
        report=lambda instance, phase, reason: told.append((phase, reason)),
    )
    await acting
    return outcomes, told


async def _run(work: Callable[[], Awaitable[None]]) -> None:
    await work()


async def turns(count: int = 30) -> None:
    """Let the other tasks run until they wait: enough turns of the loop for a few calls of the fake."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_every_change_is_told_once_until_it_runs(world: World) -> None:
    """Progress is one line for each change of phase or reason."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")

    async def supervisor() -> None:
        for phase, reason in ((Phase.WAITING, "for the lock"), (Phase.STARTING, "a"), (Phase.STARTING, "a")):
            await turns()
            world.status("1", "alpha", phase, reason)
        await turns()
        world.status("1", "alpha", Phase.RUNNING, pid=5)

    outcomes, told = await waited(world, supervisor, waiting.until_running)
    assert outcomes == [Outcome(ONE, True, "running on alpha, pid 5")]
    assert told == [
        ("waiting", "host alpha has not said anything yet"),
        ("waiting", "for the lock"),
        ("starting", "a"),
    ]


async def test_a_compaction_meanwhile_loses_nothing(world: World) -> None:
    """The watch begins again when history is gone; what counts is read anew."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")
    original = actions.switch

    async def supervisor() -> None:
        await turns()
        world.status("1", "alpha", Phase.RUNNING, pid=5)

    client = world.etcd.peer()
    written = await original(client, world.layout, ONE, Power.ON)
    for _ in range(5):
        world.keys("2", description="noise")
    world.etcd.compact()
    acting = asyncio.create_task(_run(supervisor))
    goals = [(written, waiting.until_running(written))]
    (outcome,) = await waiting.wait_for_all(client, world.layout, goals, timeout_s=20, report=lambda *said: None)
    await acting
    assert outcome.ok


async def test_an_etcd_that_goes_away_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Etcd away in the middle of a wait is told as such, and the wait goes on."""
    monkeypatch.setattr(waiting, "LOOK_AGAIN_S", 0.01)
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")
    client = world.etcd.peer()
    written = await actions.switch(client, world.layout, ONE, Power.ON)
    client.away()
    told: list[str] = []

    def report(instance: str, phase: str, reason: str) -> None:
        told.append(reason)
        world.status("1", "alpha", Phase.RUNNING, pid=5)
        client.back()

    goals = [(written, waiting.until_running(written))]
    (outcome,) = await waiting.wait_for_all(client, world.layout, goals, timeout_s=20, report=report)
    assert outcome.ok
    assert told == ["etcd does not answer: the fake etcd is away"]


async def test_work_that_goes_on_is_waited_for(world: World) -> None:
    """The time begins anew with each step of a fetch, over however slow a line; not where it stands still."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")
    limit_s = 3.0
    began = asyncio.get_running_loop().time()

    async def supervisor() -> None:
        for percent in (0, 5, 10, 15):
            world.status("1", "alpha", Phase.WAITING, f"disk/0: fetched {percent} % of 600 MiB")
            await asyncio.sleep(0.4 * limit_s)
        world.status("1", "alpha", Phase.RUNNING, pid=5)

    outcomes, _ = await waited(world, supervisor, waiting.until_running, timeout_s=limit_s)
    assert outcomes == [Outcome(ONE, True, "running on alpha, pid 5")]
    assert asyncio.get_running_loop().time() - began > limit_s


def test_what_counts_as_progress() -> None:
    """More of the same work than ever before: what fails half way and begins again and again ends a wait."""
    progress = waiting.Progress()
    told = ["fetched 0 % of 9 MiB", "fetched 5 % of 9 MiB", "fetched 5 % of 9 MiB", "fetched 0 % of 9 MiB",
            "fetched 5 % of 9 MiB", "fetched 10 % of 9 MiB", "converted to raw, 0 %", "waits for its turn"]  # fmt: skip
    assert [progress.is_made(one) for one in told] == [True, True, False, False, False, True, True, False]


async def test_rights_that_are_gone_end_the_wait(world: World) -> None:
    """Denied is no matter of time: the wait ends with that very error."""
    world.keys("1", host="alpha", ram="1G")
    client = world.etcd.peer()
    written = await actions.switch(client, world.layout, ONE, Power.ON)
    client.deny()
    with pytest.raises(Denied):
        await waiting.wait_for_all(
            client,
            world.layout,
            [(written, waiting.until_gone)],
            timeout_s=20,
            report=lambda *said: None,
        )


# --- through the command line ----------------------------------------------------------------------------------

Acting = Callable[[Callable[[str], None]], None]


def test_timed_out_exits_4_and_says_what_was_last_seen(world: World) -> None:
    """The wish stays written; the message names the last phase and reason."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")
    result = world.run("start", "1", "--wait", "--timeout", "0.05")
    assert result.exit_code == 4
    assert result.stderr.splitlines() == [
        "1: waiting: host alpha has not said anything yet",
        "Error: 1: not reached within 0.05 s; last seen waiting: host alpha has not said anything yet",
    ]
    assert world.value("1", "power") == "on"


def test_a_host_without_a_session_is_told_while_waiting(world: World) -> None:
    """Who waits for a dead host is told so."""
    world.running("1")
    result = world.run("restart", "1", "--wait", "--timeout", "0.05")
    assert "1: unknown: host alpha has no session; last seen: running" in result.stderr


def test_wait_for_several_says_each(world: World, acting: Acting) -> None:
    """One that fails does not keep the others from being waited for; the exit code is the worst."""
    world.host("alpha")
    world.running("1")
    world.running("2")

    def act(call: str) -> None:
        if call == "watch" or not world.value("2", "power"):
            return
        world.status("1", "alpha", Phase.RUNNING, pid=5)
        world.status("2", "alpha", Phase.INVALID, problems=("ram: found 'x'; y",))

    acting(act)
    result = world.run("start", "1", "2", "--wait")
    assert (result.exit_code, result.stdout) == (1, "1: running on alpha, pid 5\n")
    assert result.stderr.endswith("Error: 2: its keys have problems: ram: found 'x'; y\n")


def test_create_with_power_off_waits_for_stopped(world: World, acting: Acting) -> None:
    """The goal of `create` and `set` is what the keys say."""
    world.host("alpha")

    def act(call: str) -> None:
        if world.value("1", "ram"):
            world.status("1", "alpha", Phase.STOPPED, "power=off")

    acting(act)
    result = world.run("create", "1", "host=alpha", "ram=1G", "power=off", "--wait")
    assert (result.exit_code, result.stdout) == (0, "1: stopped: power=off\n")


def test_delete_waits_until_status_and_lock_are_gone(world: World, acting: Acting) -> None:
    """Removed is a fact when its host says nothing of it any more and the lock is free."""
    world.host("alpha")
    world.running("1")

    def act(call: str) -> None:
        if call == "get" and not world.value("1", "ram"):
            world.etcd.erase("/kvm/1/lock", "/kvmsupervisor/instances/1")

    acting(act)
    result = world.run("delete", "1", "--yes", "--wait")
    assert (result.exit_code, result.stdout) == (0, "1: gone\n")


MOVES = Transfer(source="alpha", target="beta", sent_bytes=30 << 20, left_bytes=70 << 20, bytes_per_s=5 << 20)


def test_how_far_a_live_move_is() -> None:
    """§6: bytes, rate and what is left; a percentage, by which the time limit begins anew."""
    migrating = replace(BEFORE, phase=Phase.MIGRATING, move=MOVES)
    said = waiting.progress_of(migrating)
    assert said == "; ███······· 30 %: 30 MiB sent, 70 MiB left, 5.0 MiB/s"
    assert waiting.Progress().is_made(said)
    assert waiting.progress_of(BEFORE) == ""
    assert waiting.progress_of(replace(migrating, move=replace(MOVES, sent_bytes=0, left_bytes=0))) == ""
    assert waiting.progress_of(replace(migrating, phase=Phase.RUNNING)) == ""


@pytest.mark.parametrize(
    ("stopped_ms", "said"), [(28, "; its guest stood still for 28 ms on the way"), (None, "")], ids=["live", "cold"]
)
def test_a_move_is_over_once_it_runs_there(stopped_ms: int | None, said: str) -> None:
    """And says how long the guest stood still, where it came live."""
    judge = until_on("beta", WRITTEN)
    came = replace(MOVES, stopped_ms=stopped_ms)
    assert judge(seen(Phase.RUNNING, 9, move=came)) is None, "it runs on alpha yet"
    assert judge(seen(Phase.MIGRATING, 9, host="beta", move=came)) is None
    verdict = judge(seen(Phase.RUNNING, 9, host="beta", pid=7, move=came))
    assert verdict == (True, f"running on beta, pid 7{said}")
