"""A run: the faults of a schedule, one after the other, and then the judgement of what the disks hold."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

from kvmsupervisor.domain.lock import Lock
from tests.chaos.acts import Act, Acts, felt_by
from tests.chaos.bounds import FACTOR, NOTHING, OPEN, SLACK_S, Promise, guarded, promise, together
from tests.chaos.disk import Away, Observer, boottime
from tests.chaos.downtime import downtime
from tests.chaos.fabric import joined
from tests.chaos.faults import Fault, Kind
from tests.chaos.records import check
from tests.chaos.report import Episode, Felt, Report
from tests.chaos.truth import false_status, killed_for_nothing, off_the_record
from tests.chaos.world import World
from tests.support.bounds import STATUS_S
from tests.support.ceph import CephError
from tests.support.invariants import unexplained

T = TypeVar("T")

SETTLE_LIMIT_S = 180.0
"""How long a run waits until everything writes again, once nothing is wrong any more: generous, it only ends what would
never end. Whether a machine was away for too long is judged by its own bound."""

CALM_S = 1.0
"""Between two episodes: each machine is seen to write on."""

LOOK_S = 0.25
"""Between two looks at what is waited for: each asks etcd by a program of its own."""

_CRASHES = frozenset({Kind.QEMU_KILL, Kind.HOST_CRASH, Kind.HOST_REBOOT})


class Unsettled(Exception):
    """Something does not write again although nothing is wrong any more; the message says what."""


def _until(what: str, look: Callable[[], object], limit_s: float = SETTLE_LIMIT_S) -> None:
    """Wait until it is so.

    Raises:
        Unsettled: it is not, within the limit.
    """
    deadline = time.monotonic() + limit_s
    while not look():
        if time.monotonic() > deadline:
            raise Unsettled(f"{what}: not so within {limit_s:g} s, although nothing is wrong any more")
        time.sleep(LOOK_S)


@dataclass
class _Playing:
    """An episode while it lasts."""

    acts: list[Act] = field(default_factory=list)
    ends: list[tuple[float, float, Act]] = field(default_factory=list)
    """When each is to end, when it began, and which."""


class Run:
    """Plays one schedule.

    Args:
        world: whose machines write.
        seed: of the schedule, for the report.
        minutes: of the schedule, for the report.
        replay: the command that does it again.
        say: told each line for people.
        heal: whether faults are ended, and waited for; without it the world is judged as it is as soon as two have
            written to one disk in turns.
    """

    def __init__(
        self,
        world: World,
        *,
        seed: int,
        minutes: float,
        replay: str,
        say: Callable[[str], object] = print,
        heal: bool = True,
    ) -> None:
        self._world, self._terms = world, world.terms
        self._seed, self._minutes, self._replay, self._say = seed, minutes, replay, say
        self._heal = heal
        self._acts = Acts(world)
        self._began = time.monotonic()
        self._boot_s = self._tool_s = self._tool_before_s = 0.0
        self._episodes: list[Episode] = []
        self._faults: Counter[str] = Counter()
        self._crashes: Counter[str] = Counter()
        self._violations: list[str] = []
        # Machines that somebody wanted elsewhere.
        self._moved: set[str] = set()

    def play(self, faults: Sequence[Fault]) -> Report:
        """Let it all happen; return what came of it."""
        world = self._world
        world.begin()
        with ExitStack() as stack:
            with joined(world.witness):
                observer = stack.enter_context(Observer(world.ceph, world.image))
            try:
                self._boot_s = max(self._begin(machine, observer) for machine in world.machines)
                self._settle(observer)
                world.back_up()
                self._say(f"{len(world.machines)} machines write, {self._boot_s:.1f} s after their keys; faults follow")
                self._began = time.monotonic()
                for episode in _episodes(faults):
                    self._play(episode, observer)
            except Unsettled as error:
                self._say(str(error))
                self._violations.append(str(error))
            return self._judge(observer)

    def _begin(self, machine: str, observer: Observer) -> float:
        """Let a machine's keys come; return the seconds until its first record."""
        begin = time.monotonic()
        self._world.begin_machine(machine)
        while not _patiently(lambda: observer.head(machine)).sequence:
            assert time.monotonic() < begin + SETTLE_LIMIT_S, f"{machine} writes nothing:\n{self._state()}"
            time.sleep(0.02)
        return time.monotonic() - begin

    # --- one episode ------------------------------------------------------------------------------------------

    def _play(self, faults: Sequence[Fault], observer: Observer) -> None:
        # Not before its time, and not before everything writes again.
        self._sleep_until(faults[0].start_s)
        shift = self._now() - faults[0].start_s
        since, playing, told = boottime(), _Playing(), list[str]()
        began = self._now()
        todo = [(fault.start_s + shift, fault) for fault in faults]
        while todo or playing.ends:
            next_begin = todo[0][0] if todo else float("inf")
            playing.ends.sort(key=lambda end: end[0])
            if playing.ends and playing.ends[0][0] <= next_begin:
                at, begun, act = playing.ends.pop(0)
                if self._heal:
                    self._sleep_until(at)
                    act.end()
                    # What is promised follows from how long it really was: a busy machine ends nothing to the second.
                    lasted = act.fault.lasting(self._now() - begun)
                    playing.acts[playing.acts.index(act)] = replace(act, fault=lasted)
                else:
                    self._await_turns(at, since, observer)
                continue
            at, fault = todo.pop(0)
            self._sleep_until(at)
            begun = self._now()
            act = self._acts.begin(fault)
            if fault.kind is Kind.MOVE:
                self._moved |= act.machines
            playing.acts.append(act)
            playing.ends.append((self._now() + fault.duration_s, begun, act))
            line = f"{fault}: {'nothing to hit' if act.void else act.whom}"
            told.append(line)
            self._say(line)
            if not act.void:
                self._faults[fault.kind] += 1
        if not self._heal:
            return
        self._settle(observer)
        felt = self._felt(playing.acts, observer, since)
        self._episodes.append(
            Episode(
                kinds=tuple(act.fault.kind for act in playing.acts if not act.void),
                told=tuple(told),
                began_s=round(began, 1),
                lasted_s=round(self._now() - began, 1),
                felt=felt,
            )
        )

    def _await_turns(self, at: float, since: float, observer: Observer) -> None:
        """Wait until an owner wrote again after another one had, or until the fault would end."""

        def turns() -> bool:
            return any(
                downtime(observer.samples(machine), since, boottime()).restarts > 1 for machine in self._world.machines
            )

        while self._now() < at and not turns():
            time.sleep(0.2)

    def _felt(self, acts: Sequence[Act], observer: Observer, since: float) -> tuple[Felt, ...]:
        until, found = boottime(), []
        for machine in self._world.machines:
            hit = [act for act in acts if machine in act.machines]
            promised = self._promised(machine, felt_by(machine, acts))
            was = downtime(observer.samples(machine), since, until)
            bound_s = promised.bound_s(self._boot_s, max(self._tool_s, self._tool_before_s))
            found.append(
                Felt(
                    machine=machine,
                    hit=bool(hit),
                    guarded=machine in self._world.guarded,
                    away_s=round(was.away_s, 2),
                    restarts=was.restarts,
                    bound_s=round(bound_s, 2),
                    blind_s=round(was.blind_s, 2),
                )
            )
            names = " + ".join(str(act.fault.number) for act in acts)
            mark = ""
            if not was.within(bound_s):
                mark = " TOO LONG"
                self._violations.append(
                    f"fault {names}: {machine} was away for {was.away_s:.1f} s, the bound is {bound_s:.1f} s"
                )
            if promised.restarts is not None and was.restarts > promised.restarts:
                mark += " STARTED AGAIN"
                self._violations.append(
                    f"fault {names}: {machine} was started again {was.restarts} times, "
                    f"{promised.restarts or 'no'} restart is promised"
                )
            if was.restarts < promised.least:
                mark += " NOT KILLED"
                self._violations.append(f"fault {names}: {machine} cannot be fenced, and its guard let it run on")
            self._say(f"      {machine} away {was.away_s:.1f} s of {bound_s:.1f} s, {was.restarts} restarts{mark}")
            if was.restarts and any(act.fault.kind in _CRASHES for act in hit):
                self._crashes[machine] += 1
        return tuple(found)

    def _promised(self, machine: str, acts: Sequence[Act]) -> Promise:
        if not acts:
            return OPEN if machine in self._world.guarded else NOTHING
        # Restarts that follow one another wait for up to 1, 2, 4 … 300 s (DESIGN §4).
        crashed = self._crashes[machine]
        pause_s = 1.0 + (min(300.0, 2.0 ** (crashed - 1)) if crashed else 0.0)
        judge = guarded if machine in self._world.guarded else promise
        return together([(act.fault, judge(act.fault, self._terms, pause_s=pause_s)) for act in acts], self._terms)

    # --- until all is well ------------------------------------------------------------------------------------

    def _settle(self, observer: Observer) -> None:
        """Wait until each host has its session, and each machine writes by the one that its lock names.

        Raises:
            Unsettled: that does not come.
        """
        world = self._world
        for host in world.hosts:
            if not host.running:
                host.launch()
        try:
            for host in world.hosts:
                _until(f"the session of {host.name}", lambda host=host: world.has_session(host))  # type: ignore[misc]
            for machine in world.machines:
                _until(f"writes of {machine}", lambda machine=machine: self._writes(machine, observer))  # type: ignore[misc]
        except Unsettled as error:
            for machine in world.machines:
                why = None if world.qemus_of(machine) else unexplained(world.keys.status(machine))
                if why is not None:
                    self._violations.append(f"{machine} does not run, and {why}")
            raise Unsettled(f"{error}\n{self._state()}") from None
        for machine in world.machines:
            self._look_at_status(machine)
        for host in world.hosts:
            qemus = host.qemus()
            records = {qemu.instance: host.record_of(qemu.instance) for qemu in qemus}
            self._violations += [
                f"{name} lives on {host.name}, and its record was deleted" for name in off_the_record(qemus, records)
            ]
        before, begin = self._tool_s, time.monotonic()
        world.ceph.blocklist()
        # A busy machine is not busy at each instant: what it was like before the episode counts, too.
        self._tool_s, self._tool_before_s = time.monotonic() - begin, before

    def _look_at_status(self, machine: str) -> None:
        """Wait until its status is so; one that is not within its bound is a violation."""
        world, deadline = self._world, time.monotonic() + FACTOR * STATUS_S + SLACK_S
        while True:
            what: str | None = "etcd does not tell"
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                sessions = {host.name for host in world.hosts if world.has_session(host)}
                status = world.keys.status(machine)
                what = false_status(status, world.runs(machine), world.qemus_of(machine), sessions)
            if what is None:
                return
            if time.monotonic() > deadline:
                self._violations.append(f"the status of {machine} is not so for too long: {what}")
                return
            time.sleep(LOOK_S)

    def _writes(self, machine: str, observer: Observer) -> bool:
        """Whether it is written to by the one QEMU that its lock names, and goes on."""
        lock = self._world.runs(machine)
        if lock is None:
            return False
        qemus = self._world.qemus_of(machine)
        if [qemu.incarnation for qemu in qemus] != [lock.incarnation]:
            return False
        try:
            before = observer.head(machine)
            time.sleep(CALM_S)
            after = observer.head(machine)
        except Away:
            return False
        return after.owner == lock.incarnation and after.sequence > before.sequence

    def _state(self) -> str:
        keys, lines = self._world.keys, []
        for machine in self._world.machines:
            status = keys.status(machine)
            lines.append(f"  {machine}: {status}\n    lock {keys.lock(machine)}")
        for host in self._world.hosts:
            end = "\n    ".join(host.log.splitlines()[-5:])
            lines.append(f"  {host.name} {'runs' if host.running else 'has ended'}:\n    {end}")
        try:
            lines.append(f"  Ceph: {self._world.ceph.ceph('osd', 'stat').strip()}")
        except CephError as error:
            # It may be what is wrong: a daemon that has ended is named.
            lines.append(f"  Ceph: {error}")
        return "\n".join(lines)

    # --- the judgement ----------------------------------------------------------------------------------------

    def _judge(self, observer: Observer) -> Report:
        world = self._world
        takeovers, fenced, records, owners = 0, set[str](), 0, 0
        for machine in world.machines:
            # The journal first: whoever wrote has had a lock by then.
            journal = _patiently(lambda machine=machine: observer.journal(machine))  # type: ignore[misc]
            locks = world.locks(machine)
            history = observer.history(machine, locks)
            self._violations += [f"{machine}: {violation}" for violation in check(journal, history)]
            ends = [end for host in world.hosts for end in host.events("instance.ended", instance=machine)]
            self._violations += killed_for_nothing(
                ends, owners=journal.owners, locks=locks, ordered=machine in self._moved
            )
            takeovers += _takeovers(locks)
            fenced |= {address for lock in locks if lock is not None for address in lock.fence}
            records += len(journal.records)
            owners += len(journal.owners)
        return Report(
            seed=self._seed,
            minutes=self._minutes,
            took_s=round(self._now(), 1),
            terms=self._terms,
            boot_s=round(self._boot_s, 2),
            faults=dict(sorted(self._faults.items())),
            episodes=tuple(self._episodes),
            takeovers=takeovers,
            fences=len(fenced),
            records=records,
            owners=owners,
            load=os.getloadavg()[0],
            reached=tuple(sorted(frozenset().union(*(host.points.reached for host in world.hosts)))),
            violations=tuple(self._violations),
            replay=self._replay,
        )

    # --- time -------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _sleep_until(self, at: float) -> None:
        time.sleep(max(0.0, at - self._now()))


def _episodes(faults: Sequence[Fault]) -> list[list[Fault]]:
    """Each fault with those that ride on it."""
    found: list[list[Fault]] = []
    for fault in faults:
        if fault.rides and found:
            found[-1].append(fault)
        else:
            found.append([fault])
    return found


def _patiently(look: Callable[[], T]) -> T:
    """What `look` sees, once Ceph answers: an OSD on a busy machine may take longer than a look has."""
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while True:
        try:
            return look()
        except Away:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)


def _takeovers(locks: Sequence[Lock | None]) -> int:
    """How often a lock went from one host to another without having been let go of."""
    return sum(one is not None and other is not None and one.host != other.host for one, other in pairwise(locks))
