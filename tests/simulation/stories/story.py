"""Plays a story, and writes down what is seen: what supervisors log, what `list` shows, what becomes of guests."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from kvmsupervisor.domain.status import Phase, Status
from tests.simulation import loop as sim
from tests.simulation.chance import NoChance
from tests.simulation.judge import Violation
from tests.simulation.outside import drawn
from tests.simulation.points import listening
from tests.simulation.qemu import SimQemu
from tests.simulation.stories.happenings import arrange, happen
from tests.simulation.world import World, tapped

HOSTS = ("alpha", "beta", "gamma")

BEFORE_S = 60.0
"""In which all machines have started, before a story begins."""

END = "the end"

LINE = re.compile(r" *([+-]\d+) s  > (.+)")
"""Something that happens."""

SHOWN = (
    "reason",
    "problem",
    "previous",
    "in_place_of",
    "holder",
    "taken_from",
    "image",
    "addresses",
    "held",
    "instances",
    "pause_s",
)
"""What is shown of an event, in this order. Much of the rest is another one on each machine that plays."""

HIDDEN = {"instance.spawned", "instance.etcd_trouble", "qemu.privileged", "history.named", "lock.orphaned"}
"""Events that say nothing more than the next ones, or what is no part of a story."""

PHASES = {f"instance.{phase}" for phase in Phase}
"""Of those of one instance, none is shown that another one follows at once: it is a step on the way."""

STEP_S = 1.0

WIDTH = 118


@dataclass(frozen=True)
class Told:
    """A story as it is written.

    Attributes:
        head: its title and prose, which stays as it is.
        happenings: seconds after its begin, and what happens.
    """

    head: tuple[str, ...]
    happenings: tuple[tuple[int, str], ...]

    @classmethod
    def read(cls, text: str) -> Told:
        head, _, rest = text.rpartition("\n\n")
        found = [LINE.fullmatch(line) for line in rest.splitlines()]
        return cls(tuple(head.splitlines()), tuple((int(match[1]), match[2]) for match in found if match is not None))


@dataclass(frozen=True, kw_only=True)
class Line:
    """Something that happens, or was seen.

    Attributes:
        at: seconds after the begin.
        text: what.
        about: the machine, where it is about one.
        who: the host that logs it, where one does.
        event: of the log.
        happens: it is the story's.
    """

    at: float
    text: str
    about: str = ""
    who: str = ""
    event: str = ""
    happens: bool = False


class Seen:
    """What is seen of a world.

    Attributes:
        lines: so far.
    """

    def __init__(self, world: World, begin: float) -> None:
        self.lines: list[Line] = []
        self._world = world
        self._begin = begin
        self._guests: dict[SimQemu, str] = {}

    def add(self, text: str, **what: Any) -> None:
        self.lines.append(Line(at=self._world.loop.time() - self._begin, text=text, **what))

    def log(self, who: str, event: str, told: Mapping[str, Any]) -> None:
        """A line of a supervisor's log."""
        if event in HIDDEN:
            return
        name = str(told.get("instance", ""))
        fields = [
            str(told[key]) if key in {"reason", "problem"} else f"{key}={told[key]}"
            for key in SHOWN
            if told.get(key) not in (None, "", ())
        ]
        text = f"{name} {event}".strip() + (f": {', '.join(fields)}" if fields else "")
        self.add(text, about=name, who=who.partition("#")[0], event=event)

    def look(self) -> None:
        """What has become of guests since the last time."""
        for name in sorted(self._world.wishes):
            for qemu in self._world.judge.qemus[name]:
                now = qemu.run_state if qemu.alive else "ended"
                if now != self._guests.get(qemu, "prelaunch"):
                    self._guests[qemu] = now
                    said = "ends" if now == "ended" else "runs" if now == "running" else f"is stopped ({now})"
                    self.add(f"the guest of {name} on {qemu.host} {said}", about=name)


def written(lines: Sequence[Line]) -> list[str]:
    """The lines of a story.

    Within one second they are put into the order of machines and hosts: the one that they had is chance. What a host
    says again and again is written once, until something else happens.
    """
    made: list[str] = []
    known: dict[tuple[str, str], str] = {}
    kept = [line for place, line in enumerate(lines) if not _is_passing(line, lines[place + 1 :])]
    # What happens stands alone, before what follows from it.
    for (at, happens), group in groupby(kept, key=lambda line: (round(line.at), line.happens)):
        hosts: dict[str, list[str]] = {}
        if happens:
            known.clear()
        for line in sorted(group, key=lambda line: (line.about, "" if line.about else line.who)):
            # A phase that is back is news.
            kind = (line.who, line.about) if line.event in PHASES else (line.who, line.text)
            if line.event and known.get(kind) == line.text:
                continue
            known[kind] = line.text
            hosts.setdefault(line.text, []).extend([line.who] if line.who else [])
        for text, who in hosts.items():
            first = f"{at:+7d} s  {'> ' if happens else '  '}"
            said = f"{', '.join(who)}: {text}" if who else text
            made += textwrap.wrap(said, WIDTH, initial_indent=first, subsequent_indent=" " * (len(first) + 2))
    return made


def _is_passing(line: Line, later: Sequence[Line]) -> bool:
    """Whether it tells a phase that another one follows at once."""
    if line.event not in PHASES:
        return False
    soon = takewhile(lambda other: other.at < line.at + STEP_S and not other.happens, later)
    return any(other.event in PHASES and (other.about, other.who) == (line.about, line.who) for other in soon)


def _shown(status: Status) -> str:
    return f"{status.phase} on {status.host}" + (f": {status.reason}" if status.reason else "")


def play(text: str) -> tuple[str, list[Violation]]:
    """Play a story; return it with what was seen, and what was violated."""
    told = Told.read(text)
    folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def played() -> tuple[list[str], list[Violation]]:
        world = World(sim.SimLoop(), NoChance(0), folder, names=HOSTS, keep=0)
        with tapped(world):
            return sim.run_within(world.loop, lambda loop: _play(world, told)), world.judge.violations

    try:
        with sim.apart():
            lines, violations = played()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return "\n".join([*told.head, "", *lines, ""]).replace(str(folder), ""), violations


async def _play(world: World, told: Told) -> list[str]:
    loop = world.loop
    with drawn(world.chance.of("program")), listening(world):
        for host in world.hosts:
            host.start()
        for line in told.head:
            arrange(world, line)
        await asyncio.sleep(BEFORE_S)
        zero = loop.time() - min(told.happenings[0][0], 0)
        seen = Seen(world, zero)
        seen.look()
        seen.lines.clear()
        judge, world.on_log = loop.on_step, seen.log

        def stepped(life: sim.Life) -> None:
            assert judge is not None
            judge(life)
            seen.look()
            # Nobody tells of a guest's state: that is looked at after every step.
            loop.stirred = True

        loop.on_step = stepped
        loop.stirred = True
        for at, said in told.happenings:
            await asyncio.sleep(max(0.0, zero + at - loop.time()))
            seen.add(said, happens=True)
            if said != END:
                happen(world, said)
        for name in sorted(world.wishes):
            status = world.status(name)
            seen.add(f"list: {name} {'is not there' if status is None else _shown(status)}", about=name)
        world.end()
        for host in world.hosts:
            host.kill()
        await asyncio.sleep(0)
    return written(seen.lines)
