"""`--wait`: follows an instance until the wish is fulfilled.

Level-triggered: a watch only says *when* to look; each look reads everything anew.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from kvmsupervisor.adapters.etcd.api import Compacted, Store, Unavailable
from kvmsupervisor.cli import reach
from kvmsupervisor.cluster.acts.instances import Written
from kvmsupervisor.cluster.overview import UNKNOWN, list_all
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.spec import Power
from kvmsupervisor.domain.status import Phase, Status

LOOK_AGAIN_S = 5.0
"""Seconds after which a wait looks without an event, because no watch covers a host's session. Arbitrary: a person does
not notice the delay, and etcd does not notice the reads."""


@frozen(kw_only=True)
class Sighting:
    """An instance as observed at one moment.

    Attributes:
        status: from its host.
        locked: whether there is a lock, readable or not.
        holder: of the lock; None when that cannot be read.
        host_alive: whether the host in question has a session; None when no host is known.
    """

    status: Status | None
    locked: bool
    holder: str | None = None
    host_alive: bool | None = None


@frozen
class Outcome:
    """The end of a wait: `ok` when the wish is fulfilled; otherwise `text` says why not.

    `timed_out` tells "not yet" from "never".
    """

    instance: InstanceId
    ok: bool
    text: str
    timed_out: bool = False


Verdict = tuple[bool, str] | None
"""(reached, why), or None as long as the outcome is open."""

Goal = Callable[[Sighting], Verdict]

Report = Callable[[str, str, str], None]
"""Called with (instance, phase, reason) whenever one of them changes."""


def until_running(written: Written) -> Goal:
    """Until it runs by the written wish; a machine that has ended again fails."""
    epoch_before = written.before.epoch if written.before is not None else 0

    def judge(sighting: Sighting) -> Verdict:
        status = sighting.status
        if status is None or status.revision < written.revision:
            return None
        if status.phase is Phase.RUNNING and not status.problems:
            return True, _running(status)
        if status.phase is Phase.INVALID or (status.phase is Phase.RUNNING and status.problems):
            return False, f"its keys have problems: {'; '.join(status.problems)}"
        if status.phase is Phase.STOPPED and status.epoch > epoch_before:
            return False, f"it started and ended: {status.reason}"
        return None

    return judge


def until_stopped(written: Written) -> Goal:
    """Until nothing of it runs, and its host has released the lock; another host's lock does not count."""

    def judge(sighting: Sighting) -> Verdict:
        status = sighting.status
        if status is None:
            return None if sighting.locked else (True, "nothing runs")
        if status.revision < written.revision:
            return None
        idle = status.phase is Phase.STOPPED or (status.phase is Phase.INVALID and status.pid is None)
        if idle and not (sighting.locked and sighting.holder == status.host):
            return True, f"{status.phase.value}: {status.reason}"
        return None

    return judge


def until_restarted(written: Written) -> Goal:
    """Until a new QEMU process runs."""
    running = until_running(written)
    before = written.before.incarnation if written.before is not None else None

    def judge(sighting: Sighting) -> Verdict:
        status = sighting.status
        same_as_before = status is not None and before is not None and status.incarnation == before
        return None if same_as_before else running(sighting)

    return judge


def until_gone(sighting: Sighting) -> Verdict:
    """Until status and lock are gone."""
    return (True, "gone") if sighting.status is None and not sighting.locked else None


def until_as_written(heard_of: reach.HeardOf, patience_s: float = 0.0) -> Callable[[Written], Goal]:
    """Until the instance is as the keys say: running on the host that they name, or stopped with power=off.

    Args:
        heard_of: tells the addresses that this machine has heard of.
        patience_s: how long to wait on for an address of a guest that runs. That it runs is enough for success.
    """
    return lambda written: _until_as_written(written, heard_of, patience_s)


def _until_as_written(written: Written, heard_of: reach.HeardOf, patience_s: float) -> Goal:
    if written.wish.power is Power.OFF:
        return until_stopped(written)
    running, spec = until_running(written), written.wish.spec
    since: list[float] = []

    def judge(sighting: Sighting) -> Verdict:
        status = sighting.status
        if status is not None and (status.awaited_host is not None or status.changing):
            return None
        verdict = running(sighting)
        if status is None or verdict is None or not verdict[0]:
            return verdict
        said = reach.clause(spec, status, heard_of)
        if said or not reach.has_address(spec) or not patience_s:
            return True, verdict[1] + said
        now = asyncio.get_running_loop().time()
        since.append(now)
        if now < since[0] + patience_s:
            return None
        return True, f"{verdict[1]}; its address is not known here yet: see `show {written.instance}`"

    return judge


def _running(status: Status) -> str:
    """A running machine in one sentence, for people."""
    pending = f"; pending until its next restart: {', '.join(status.pending)}" if status.pending else ""
    why = f" ({status.reason})" if status.pending and status.reason != "runs" else ""
    return f"running on {status.host}, pid {status.pid}{pending}{why}"


async def wait_for_all(
    store: Store,
    layout: Layout,
    goals: Sequence[tuple[Written, Goal]],
    *,
    timeout_s: float,
    report: Report,
) -> list[Outcome]:
    """Wait for several goals at once, each for itself.

    Raises:
        Denied: the user may not read the keys.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_wait(store, layout, written, goal, timeout_s=timeout_s, report=report))
                for written, goal in goals
            ]
    except ExceptionGroup as errors:
        raise _first(errors) from errors
    return [task.result() for task in tasks]


async def _wait(
    store: Store, layout: Layout, written: Written, goal: Goal, *, timeout_s: float, report: Report
) -> Outcome:
    """Wait for one goal. The time begins anew with each step of work that tells how far it is, such as a fetch."""
    instance, progress = written.instance, Progress()
    said: tuple[str, str] | None = None
    keys = (layout.status_key(instance), layout.lock_key(instance))
    try:
        async with asyncio.timeout(timeout_s) as limit, doorbell(store, keys, written.revision) as bell:
            while True:
                bell.clear()
                try:
                    sighting = await _look(store, layout, instance, written.wish.runs_on)
                    verdict, saying = goal(sighting), _saying(sighting, written.wish.runs_on)
                except Unavailable as error:
                    verdict, saying = None, ("waiting", f"etcd does not answer: {error}")
                if verdict is not None:
                    return Outcome(instance, *verdict)
                if saying != said:
                    said = saying
                    if progress.is_made(saying[1]):
                        limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
                    report(instance, *saying)
                await _rung(bell)
    except TimeoutError:
        last = ": ".join(said) if said is not None else "nothing was seen"
        return Outcome(instance, False, f"not reached within {timeout_s:g} s; last seen {last}", timed_out=True)


class Progress:
    """How far work has come that a reason tells of: an image of gigabytes, over a slow line, takes its time."""

    def __init__(self) -> None:
        # Invariant: the most that was told of each piece of work, so that one which begins again and again ends.
        self._most: dict[str, int] = {}

    def is_made(self, reason: str) -> bool:
        """Whether the reason tells of more than any before."""
        found = _PERCENT.search(reason)
        if found is None:
            return False
        what, percent = reason[: found.start()], int(found[1])
        if percent <= self._most.get(what, -1):
            return False
        self._most[what] = percent
        return True


_PERCENT = re.compile(r"\b([0-9]{1,3}) %")


async def wait_until_deleted(store: Store, key: str, revision: int, *, timeout_s: float) -> bool:
    """Wait until `key` is gone; False after the time limit."""
    try:
        async with asyncio.timeout(timeout_s), doorbell(store, (key,), revision) as bell:
            while True:
                bell.clear()
                if await store.get(key) is None:
                    return True
                await _rung(bell)
    except TimeoutError:
        return False


async def _rung(bell: asyncio.Event) -> None:
    """Wait for the bell, `LOOK_AGAIN_S` at most."""
    try:
        async with asyncio.timeout(LOOK_AGAIN_S):
            await bell.wait()
    except TimeoutError:
        return


@asynccontextmanager
async def doorbell(store: Store, keys: Sequence[str], revision: int) -> AsyncIterator[asyncio.Event]:
    """An event that is set whenever one of `keys` (or a key that begins with one) changes after `revision`.

    Raises:
        Denied: the user may not read one of them.
    """
    bell = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as group:
            watchers = [group.create_task(_ring(store, key, revision, bell)) for key in keys]
            yield bell
            for watcher in watchers:
                watcher.cancel()
    except ExceptionGroup as errors:
        raise _first(errors) from errors


async def _ring(store: Store, key: str, revision: int, bell: asyncio.Event) -> None:
    """Ring at every change of one key, for ever."""
    while True:
        try:
            async with store.watch(key, revision + 1) as watch:
                async for batch in watch:
                    revision = batch.revision
                    bell.set()
        except Compacted:
            revision = (await list_all(store, key)).revision
            bell.set()


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    """The first error of a task group, at any depth: a command ends with one error."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


async def _look(store: Store, layout: Layout, instance: InstanceId, host: str | None) -> Sighting:
    """Read status, lock and session of one instance."""
    status_kv = await store.get(layout.status_key(instance))
    lock_kv = await store.get(layout.lock_key(instance))
    lock = Lock.from_json(lock_kv.value) if lock_kv is not None else None
    status = Status.from_json(status_kv.value) if status_kv is not None else None
    actor = status.host if status is not None else host
    session = await store.get(layout.session_key(HostName(actor))) if actor else None
    return Sighting(
        status=status,
        locked=lock_kv is not None,
        holder=lock.host if lock is not None else None,
        host_alive=session is not None if actor else None,
    )


def _saying(sighting: Sighting, host: str | None) -> tuple[str, str]:
    """Phase and reason, as shown while waiting."""
    status = sighting.status
    if status is None:
        if host is None:
            return Phase.WAITING.value, "its lock is still held" if sighting.locked else "no host is set"
        alive = "has not said anything yet" if sighting.host_alive else "has no session"
        return Phase.WAITING.value, f"host {host} {alive}"
    if sighting.host_alive is False:
        return UNKNOWN, f"host {status.host} has no session; last seen: {status.phase.value}"
    return status.phase.value, status.reason + progress_of(status)


def progress_of(status: Status) -> str:
    """How far its live move is, as a clause; empty where none is under way."""
    move = status.move
    if move is None or status.phase is not Phase.MIGRATING or not move.sent_bytes + move.left_bytes:
        return ""
    percent = 100 * move.sent_bytes // (move.sent_bytes + move.left_bytes)
    done = "█" * (percent // 10) + "·" * (10 - percent // 10)
    rate = f"{move.bytes_per_s / (1 << 20):.1f} MiB/s"
    return f"; {done} {percent} %: {move.sent_bytes >> 20} MiB sent, {move.left_bytes >> 20} MiB left, {rate}"
