"""What an instance's keys come to on one host: to run it, to stop it, or to leave it as it is. Pure."""

from __future__ import annotations

from enum import Enum

from kvmsupervisor.domain.restart import rests
from kvmsupervisor.domain.spec import Power, Problem, Wish
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
    if wish.is_elsewhere(view.me) and not view.stays and not view.goes_only_live:
        return Goal.STOP, where_else(wish)
    if wish.power is None:
        return Goal.KEEP, _first(view.problems)
    if wish.power is Power.OFF:
        return Goal.STOP, "`power` is off"
    if view.problems:
        return Goal.KEEP, _first(view.problems)
    ended = view.saved.ended
    if ended is not None and view.process is None and rests(ended, wish):
        return (
            Goal.REST,
            f"it ended by itself ({ended.reason}) and `restart` is {wish.restart}; `start` runs it again",
        )
    return Goal.RUN, "its keys ask for it"


def where_else(wish: Wish) -> str:
    """Where an instance is to run that is to run on another host, as a clause."""
    placement = wish.placement
    if placement is None:
        return f"its `host` is {wish.host}"
    if placement.host == wish.host:
        return f"it goes back to its `host` {wish.host}"
    return f"it is placed on {placement.host} since {placement.since}, in place of {wish.host} ({placement.why})"


def why_it_stays(view: View) -> str:
    """Why an instance that `stays` is still here, and what would end that."""
    wish = view.wish
    assert wish is not None
    target = view.target
    if target.receives:
        return f"{where_else(wish)}: it goes there once this host has a session with etcd again"
    if target.drains:
        return f"{where_else(wish)}, which drains, or stops all its guests just now: it stays here until that ends"
    if target.there is None:
        return f"{where_else(wish)}; it is not known yet whether that has a session: it stays here"
    meant = "" if target.meant is None else f" (did you mean {target.meant}?)"
    return f"{where_else(wish)}, which has no session{meant}: it stays here until {wish.runs_on} is there"


def why_it_waits(view: View) -> str:
    """Why a guest that may go only while it runs is still here, where no move of it is under way."""
    assert view.wish is not None
    cold = view.course.cold
    why = f", and that cannot be: {cold}" if cold else ""
    return f"{where_else(view.wish)}, but only while it runs{why}: it stays here"


def order(view: View) -> str | None:
    """Why it is to be stopped whatever the wish; None without such an order."""
    if view.clearing.evicted is not None:
        return view.clearing.evicted
    if view.leaving is not None:
        return view.leaving
    if view.draining:
        return "this host stops all its guests (`stop --all --local`), until its next boot or `start --all --local`"
    return None


def _first(problems: tuple[Problem, ...]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"
