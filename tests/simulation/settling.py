"""Once all is healed: each machine that is to run does within its bound, and what does not run says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmsupervisor.domain.status import Phase
from tests.simulation.advice import is_nobodys
from tests.simulation.judge import SHUTDOWN_S
from tests.support.bounds import Terms
from tests.support.invariants import Wait, unexplained

if TYPE_CHECKING:
    from tests.simulation.world import World

CONFIRM_S = 20.0
"""How often a person looks for what waits for a word."""

LOOK_S = 5.0
"""How often it is looked whether everything is as people want it."""

TERMS = Terms(shutdown_s=SHUTDOWN_S, person_s=CONFIRM_S)
"""What each host of the simulation is set to."""

RECENT_S = 600.0
"""Of how long ago an end makes the pause before the next start longer (`domain.timing.RESET_AFTER_S`)."""


class Settling:
    """From the healing on.

    Args:
        world: was healed just now.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._since = world.loop.time()
        self._waits = {name: self._wait_of(name) for name in sorted(world.wishes)}
        self._late: set[str] = set()

    @property
    def is_over(self) -> bool:
        """Whether nothing has its time any more."""
        return self._took_s > max((wait.bound_s for wait in self._waits.values()), default=0.0)

    @property
    def _took_s(self) -> float:
        return self._world.loop.time() - self._since

    def look(self) -> bool:
        """Whether everything is as people want it; what is not within its bound is a violation, once."""
        missing = self._world.missing()
        for name, what in missing.items():
            late = self._waits[name].late(self._took_s)
            if late is not None and name not in self._late:
                self._late.add(name)
                self._world.judge.wrong("liveness", f"{what}; {late}")
        return not missing and not any(self._unexplained())

    def end(self) -> None:
        """What does not run says why not: its host has had the time for that."""
        for what in self._unexplained():
            self._world.judge.wrong("nothing in silence", what)

    def _unexplained(self) -> Iterator[str]:
        world, judge = self._world, self._world.judge
        for name, wish in sorted(world.wishes.items()):
            runs = any(qemu.writes for qemu in judge.living(name))
            if not wish.get("host") or runs or name in judge.lost_statuses:
                continue
            if (what := unexplained(judge.status(name))) is not None:
                yield f"{name} does not run, and {what}"

    def _pause_s(self, name: str) -> float:
        """How long its last pause after a live move that failed is, and the next one."""
        return 2 * self._world.pauses_s.get(name, 0.0)

    def _wait_of(self, name: str) -> Wait:
        """What may hold an instance up, as things are now."""
        world, judge = self._world, self._world.judge
        living = judge.living(name)
        causes = {"its host": TERMS.host_s, "its start": TERMS.start_s}
        if any(not (qemu.writes and world.belongs(name, qemu.host)) for qemu in living) or len(living) > 1:
            causes["a QEMU that is in its way"] = TERMS.leave_s
        if world.moves_live and any(not world.belongs(name, qemu.host) or qemu.is_arrival for qemu in living):
            pause_s = max(self._pause_s(name), TERMS.moved_s)
            causes["a live move, and one that is tried again"] = 2 * TERMS.moved_s + pause_s
        status = judge.status(name)
        if not living or len(causes) > 2:
            causes["clients that Ceph has to forget"] = TERMS.forgotten_s
            ends = sum(qemu.since > self._since - RECENT_S for qemu in judge.qemus[name])
            causes["a pause after its ends"] = TERMS.pause_s(ends)
        lock = judge.lock(name)
        gone = lock is not None and not world.has_session(lock.host)
        if gone or world.has_begun_again:
            causes["a host that has not spoken"] = TERMS.takeover_s
        if any(qemu.was_hindered for qemu in living):
            causes["a QEMU that does not answer"] = TERMS.silent_s
        image = world.wishes[name].get("rbd")
        if any(world.has_anothers(one, image) for one in world.wishes if one != name):
            causes["a person who restarts who has its image"] = TERMS.word_s + TERMS.leave_s
        is_held = status is not None and (status.held or status.phase is Phase.INVALID)
        shut_out = any(world.ceph.is_shut_out(qemu.client) for qemu in living)
        if is_held or shut_out or world.has_begun_again or is_nobodys(world, lock):
            causes["a person's word"] = TERMS.word_s + TERMS.leave_s
        return Wait(causes=causes)
