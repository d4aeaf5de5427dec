"""One QEMU process by the law, where no lock and no keys have a say: seen to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.domain.decision import Decision
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Process, View
from kvmsupervisor.machine import actions
from kvmsupervisor.machine.machine import Machine


async def see_to_its_end(
    machine: Machine,
    *,
    wake: asyncio.Event,
    clock: Clock,
    view: Callable[[Process], View],
    decided: Callable[[View, Decision], None],
) -> Process | None:
    """Observe, decide, act on the process alone until it has ended; return it then, None when there is none.

    Args:
        machine: which; its record is not deleted here.
        wake: set whenever something changed.
        clock: the machine's.
        view: all that a decision depends on, of the process as it is now.
        decided: told of every decision.
    """
    while (process := machine.view()) is not None and process.exit is None:
        wake.clear()
        seen = view(process)
        decision = decide(seen)
        if decision.phase is Phase.STOPPING:
            machine.stop_begins()
        else:
            machine.stop_is_off()
        decided(seen, decision)
        if not await actions.step(machine, decision):
            await clock.wait(wake, decision.wake_at)
    return process
