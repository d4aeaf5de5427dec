"""How a machine that runs is stopped, step by step. Pure: part of `lifecycle.decide`."""

from __future__ import annotations

from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.goal import Goal, goal
from kvmsupervisor.domain.spec import Power, Request
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Action, Haste, Process, Stopping, View
from kvmsupervisor.domain.waiting import when

POWERDOWN_EVERY_S = 5.0
"""A guest without a loaded driver for its power button loses the press in silence, so the press is repeated."""

QUIT_WAIT_S = 10.0
"""How long QEMU gets for its own `quit` (flushing disks) before SIGKILL. Arbitrary; ten times what was seen."""


def power_off(view: View, process: Process) -> Decision | None:
    """The guest powered itself off, and QEMU lives on (`-no-shutdown`): end QEMU.

    None while QMP does not answer: the last known run state may be out of date.
    """
    said = "its guest has powered itself off, but QEMU lives on (`-no-shutdown`)"
    stopping = process.stopping
    if stopping is not None and stopping.quit_at is not None:
        said += ": it was told to end"
        kill_at = stopping.quit_at + QUIT_WAIT_S
        return when(view, Row.OFF_TOLD, Action.KILL, Phase.STOPPING, said, at=kill_at)
    if not process.connected:
        return None
    reason = f"{said}: it is told to end"
    return Decision(row=Row.OFF_FINISH, phase=Phase.STOPPING, reason=reason, action=Action.FINISH)


def stop(view: View, process: Process, why: str) -> Decision:
    """The stop sequence: power button, repeated; QEMU's own quit; SIGKILL. Each step has its time limit."""
    stopping = process.stopping or Stopping(since=view.now)
    at_once = _needs_no_consent(view)
    force_at = stopping.force_at(0.0 if at_once else view.shutdown_timeout_s)
    must_ask = process.connected and stopping.pressed_at is None and not at_once
    phase = Phase.STOPPING
    if stopping.quit_at is not None:
        kill_at = stopping.quit_at + (0.0 if view.haste is Haste.KILL else QUIT_WAIT_S)
        return when(view, Row.STOP_TOLD, Action.KILL, phase, f"{why}: QEMU was told to end", at=kill_at)
    if view.now >= force_at and not must_ask:
        reason = (
            f"{why}, at once: QEMU is told to end"
            if at_once
            else f"{why}: its guest did not shut down within {view.shutdown_timeout_s:g} s, QEMU is told to end"
        )
        return Decision(row=Row.STOP_FORCE, phase=phase, reason=reason, action=Action.QUIT)
    left = f"{why}: its guest is asked to shut down, by force {view.shutdown_timeout_s:g} s after the first time"
    if not process.connected:
        at = process.connect_at
        return when(view, Row.STOP_CONNECT, Action.CONNECT, phase, left, at=at, or_at=force_at)
    press_at = view.now if stopping.pressed_at is None else stopping.pressed_at + POWERDOWN_EVERY_S
    if process.probe_at <= view.now < press_at:
        # Under `-no-shutdown` a guest that has heeded the button is told by QEMU's run state only.
        return Decision(row=Row.STOP_PROBE, phase=phase, reason=left, action=Action.PROBE)
    next_at = min(force_at, process.probe_at)
    return when(view, Row.STOP_ASK, Action.POWERDOWN, phase, left, at=press_at, or_at=next_at)


def _needs_no_consent(view: View) -> bool:
    """Whether a person asked for an end at once: by `power`, by `restart_request`, or by insisting (`haste`)."""
    wish = view.wish
    if view.haste is not Haste.NONE:
        return True
    if wish is None or wish.keys == 0:
        return False
    if wish.power is Power.OFF:
        return wish.power_off_now
    return goal(view)[0] is Goal.RUN and wish.request is Request.RESTART_NOW
