"""What is to be seen of the demo besides the cluster itself: the scene, the command, what it says, what is waited for.

The scenes write it, the view reads it. Without a terminal each change is a line. Pure, but for `tell`.
"""

from __future__ import annotations

import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.cluster_demo.pings import Tally

SAID_LINES = 6
"""Lines of a command that are kept for the view."""

WIDTH = 100
"""Columns of plain lines."""


@dataclass(slots=True, kw_only=True)
class Step:
    """Something that is waited for.

    Attributes:
        title: what.
        why: why it takes as long as it does.
        begun: when, by the stage's clock.
        seconds: how long it took; None while it is waited for.
    """

    title: str
    why: str
    begun: float
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a scene came to.

    Attributes:
        title: of the scene.
        seconds: how long it took, without the pauses for people.
        tally: of its pings.
        seen: what was seen, in a sentence.
    """

    title: str
    seconds: float
    tally: Tally
    seen: str


class Board:
    """The scene as it stands.

    Args:
        now: seconds of the stage's clock.
        tell: prints a line; the view has no use for it.
        program: with which people in another terminal reach the cluster; empty for none.

    Attributes:
        number: of the scene, from 1.
        title: of the scene.
        sentence: what happens now.
        command: the command that does it, as it is typed; empty without one.
        said: its last lines.
        look: what to look at.
        steps: what is waited for, and was.
        prompt: what Return does now; empty while something happens.
        results: of the scenes that are over.
    """

    def __init__(
        self, now: Callable[[], float], tell: Callable[[str], None] = lambda line: None, *, program: str = ""
    ) -> None:
        self.program = program
        self._now = now
        self._tell = tell
        self._clear()
        self.number = 0
        self.title = ""
        self.results: list[Result] = []

    def _clear(self) -> None:
        self.sentence = self.command = self.look = self.prompt = ""
        self.said: deque[str] = deque(maxlen=SAID_LINES)
        self.steps: list[Step] = []

    def scene(self, number: int, title: str) -> None:
        """Begin a scene."""
        self._clear()
        self.number, self.title = number, title
        self._tell(f"\n=== {number}. {title}")

    def say(self, sentence: str, look: str = "") -> None:
        """Say what happens now, and what to look at."""
        self._clear()
        self.sentence, self.look = sentence, look
        for text in filter(None, (sentence, look and f"Look at: {look}")):
            for line in textwrap.wrap(text, WIDTH - 4):
                self._tell(f"    {line}")

    def runs(self, command: str) -> None:
        """A command is run."""
        self.command = command
        self.said.clear()
        self._tell(f"    $ {command}")

    def hears(self, line: str) -> None:
        """The command has printed a line."""
        if line:
            self.said.append(line)
            self._tell(f"      {line}")

    @contextmanager
    def step(self, title: str, why: str = "") -> Iterator[None]:
        """Wait for something in the body."""
        step = Step(title=title, why=why, begun=self._now())
        self.steps.append(step)
        yield
        step.seconds = self._now() - step.begun
        self._tell(f"    {step.seconds:6.1f} s  {title}" + (f": {why}" if why else ""))

    def ends(self, result: Result) -> None:
        """The scene is over, and what it promises came true."""
        self.results.append(result)
        self.sentence, self.look = result.seen, ""
        for line in textwrap.wrap(f"Seen: {result.seen}", WIDTH - 4):
            self._tell(f"    {line}")


def table(results: Sequence[Result]) -> list[str]:
    """What was seen, for people: a line for each scene."""
    rows = [("", "SCENE", "SECONDS", "PINGS LOST", "LONGEST GAP")]
    for number, one in enumerate(results, 1):
        lost = f"{one.tally.lost} of {one.tally.sent}" if one.tally.sent else "-"
        gap = f"{one.tally.gap_s:.1f} s" if one.tally.sent else "-"
        rows.append((f"{number}", one.title, f"{one.seconds:.1f}", lost, gap))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        f"{number:>{widths[0]}}  {title:{widths[1]}}  {seconds:>{widths[2]}}  {lost:>{widths[3]}}  {gap:>{widths[4]}}"
        for number, title, seconds, lost, gap in rows
    ]
