"""Plays all stories, or those that are named, and writes down what was seen, in their files and in the page."""

from __future__ import annotations

import sys

from tests.simulation.stories import PAGE, STORIES, quoted
from tests.simulation.stories.story import play


def main() -> int:
    """The command; exit status 1 when a law was broken."""
    broken = 0
    for name in sys.argv[1:] or STORIES:
        text, violations = play(STORIES[name].read_text())
        for violation in violations:
            broken = 1
            sys.stderr.write(f"{name}: {violation}\n")
        STORIES[name].write_text(text)
    PAGE.write_text(quoted(PAGE.read_text()))
    return broken


sys.exit(main())
