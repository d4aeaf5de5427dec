"""What follows when a QEMU process has ended: the policy, the pause before the next start, and what to remember."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from kvmsupervisor.domain.exits import Exit
from kvmsupervisor.domain.incarnation import Ended, InstanceState
from kvmsupervisor.domain.spec import RestartPolicy, Wish
from kvmsupervisor.domain.timing import RESET_AFTER_S, restart_delay


def after(
    saved: InstanceState,
    end: Exit,
    wish: Wish | None,
    *,
    asked: bool,
    ran: bool,
    spawned_at: float,
    now: float,
    jitter: float,
) -> InstanceState:
    """What to remember once a process has ended.

    Args:
        saved: the state before.
        end: why it ended.
        wish: as it stands now; None when it has not been read: the default policy then.
        asked: whether this supervisor asked it to end: no failure then, and the wish says what follows.
        ran: whether its guest may have run; otherwise its requested end is not worth telling.
        spawned_at: when it began, CLOCK_BOOTTIME.
        now: CLOCK_BOOTTIME.
        jitter: a random number, 0 ≤ x < 1.
    """
    if asked:
        told = end.text if ran else saved.last_exit
        return replace(saved, last_exit=told, attempt=0, not_before=0.0, pause_s=0.0, ended=None)
    if wish is not None and _stays_down(wish.restart, clean=end.is_clean):
        ended = Ended(
            reason=end.text,
            clean=end.is_clean,
            host_revision=wish.host_revision,
            power_revision=wish.power_revision,
            restart_request=wish.restart_request,
        )
        return replace(saved, last_exit=end.text, attempt=0, not_before=0.0, pause_s=0.0, ended=ended)
    attempt = 0 if now - spawned_at >= RESET_AFTER_S else saved.attempt
    pause_s = restart_delay(attempt, jitter)
    return replace(
        saved,
        last_exit=end.text,
        attempt=attempt + 1,
        not_before=now + pause_s,
        pause_s=pause_s,
        revision=0 if wish is None else wish.revision,
        keys=0 if wish is None else wish.keys,
        restarts=saved.restarts + 1,
        ended=None,
    )


def pauses(saved: InstanceState, wish: Wish, now: float) -> bool:
    """Whether it is too early for the next start. Any change of its keys ends the pause."""
    same = not saved.keys or (saved.revision, saved.keys) == (wish.revision, wish.keys)
    return same and now < saved.not_before


def rests(ended: Ended, wish: Wish) -> bool:
    """Whether a machine that ended by itself stays stopped: no new order came, and the policy still says so."""
    fresh_order = (
        wish.host_revision != ended.host_revision
        or wish.power_revision != ended.power_revision
        or (wish.restart_request is not None and wish.restart_request != ended.restart_request)
    )
    return not fresh_order and _stays_down(wish.restart, clean=ended.clean)


def in_another_history(saved: InstanceState, wish: Wish) -> InstanceState:
    """The state for another history of etcd with this wish: its revisions are no new orders."""
    ended = saved.ended and replace(
        saved.ended,
        host_revision=wish.host_revision,
        power_revision=wish.power_revision,
        restart_request=wish.restart_request,
    )
    pause = (wish.revision, wish.keys) if saved.keys else (saved.revision, saved.keys)
    return replace(saved, restart_seen=wish.restart_request, ended=ended, revision=pause[0], keys=pause[1])


def _stays_down(policy: RestartPolicy, *, clean: bool) -> bool:
    match policy:
        case RestartPolicy.ALWAYS:
            return False
        case RestartPolicy.ON_FAILURE:
            return clean
        case RestartPolicy.NEVER:
            return True
        case _:
            assert_never(policy)
