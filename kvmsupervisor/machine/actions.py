"""The decisions that need nothing but the QEMU process itself: asking it, and bringing it down rung by rung."""

from __future__ import annotations

from kvmsupervisor.domain.decision import Decision
from kvmsupervisor.domain.view import Action
from kvmsupervisor.machine.machine import Machine


async def step(machine: Machine, decision: Decision) -> bool:
    """Do what was decided about the process; False when the decision is about something else."""
    match decision.action:
        case Action.CONNECT:
            await machine.connect()
        case Action.PROBE:
            await machine.probe()
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
