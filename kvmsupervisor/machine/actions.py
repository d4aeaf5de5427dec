"""The actions that need only the QEMU process: ask it, and stop it step by step."""

from __future__ import annotations

from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.view import Action
from kvmsupervisor.machine.machine import Machine

ASK_STAGE = frozenset({Row.MOVE_PROBE, Row.ARRIVING_PROBE})
"""Rows that want to know how far a live move has come, not only the run state."""

STEPS = frozenset(
    {Action.CONNECT, Action.PROBE, Action.POWERDOWN, Action.FINISH, Action.QUIT, Action.KILL, Action.GIVE_UP}
)
"""What `step` does."""


async def step(machine: Machine, decision: Decision) -> bool:
    """Carry out a decision about the process; return False when the decision is about something else."""
    match decision.action:
        case Action.CONNECT:
            await machine.connect()
        case Action.PROBE:
            await machine.probe()
            if decision.row in ASK_STAGE:
                await machine.migration.look()
        case Action.POWERDOWN:
            await machine.press_power_button()
        case Action.FINISH:
            await machine.finish()
        case Action.QUIT:
            await machine.quit()
        case Action.KILL:
            await machine.kill(decision.reason)
        case Action.GIVE_UP:
            await machine.give_up(decision.reason)
        case _:
            return False
    return True
