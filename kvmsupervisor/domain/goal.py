"""What an instance's keys come to on one host: to run it, to stop it, or to leave it as it is. Pure."""

from __future__ import annotations

from enum import Enum

from kvmsupervisor.domain.restart import rests
from kvmsupervisor.domain.spec import Power, Problem
from kvmsupervisor.domain.view import View


class Goal(Enum):
    """What the wish comes to on this host."""

    RUN = "run"
    STOP = "stop"
    REST = "leave as it ended"
    KEEP = "leave as it is"


def goal(view: View) -> tuple[Goal, str]:
    """What the wish comes to, and why, as a clause for people."""
    wish = view.wish
    if (ordered := order(view)) is not None:
        return Goal.STOP, ordered
    if wish is None:
        return Goal.KEEP, "its keys have not been read yet, since this supervisor started"
    if view.held:
        held = "its removal is held, with many others at once; `kvmsupervisor confirm-removal` lets it go on"
        return Goal.KEEP, view.held_why or held
    if wish.keys == 0:
        return Goal.STOP, "its keys were removed"
    if wish.host is None:
        if any(problem.key == "host" for problem in wish.problems):
            return Goal.KEEP, _first(view.problems)
        return Goal.STOP, "it has no `host`"
    if wish.host != view.me:
        return Goal.STOP, f"its `host` is {wish.host}"
    if wish.power is None:
        return Goal.KEEP, _first(view.problems)
    if wish.power is Power.OFF:
        return Goal.STOP, "`power` is off"
    if view.problems:
        return Goal.KEEP, _first(view.problems)
    ended = view.memory.ended
    if ended is not None and view.process is None and rests(ended, wish):
        return (
            Goal.REST,
            f"it ended by itself ({ended.reason}) and `restart` is {wish.restart}; `start` runs it again",
        )
    return Goal.RUN, "its keys ask for it"


def order(view: View) -> str | None:
    """Why it is to be stopped whatever the wish; None when nothing says so."""
    if view.leaving is not None:
        return view.leaving
    if view.draining:
        return "this host stops all its guests (`stop --all --local`), until its next boot or `start --all --local`"
    return None


def _first(problems: tuple[Problem, ...]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"
