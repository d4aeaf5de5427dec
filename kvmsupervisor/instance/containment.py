"""Keeps an error of ours with the one instance in whose loop it happened."""

from __future__ import annotations

from collections.abc import Callable

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.aio import no_stray_cancellation
from kvmsupervisor.instance.worker import Worker

ERROR_PAUSE_S = (1.0, 60.0)
"""First and longest pause of one instance after an error of our own, doubled each time."""


async def keep_going(instance: Worker, *, clock: Clock, on_error: Callable[[], None]) -> None:
    """Run one instance's loop to its end. An error of ours in it is told and waited out, and is not the end."""
    pause_s = ERROR_PAUSE_S[0]
    while True:
        try:
            with no_stray_cancellation():
                await instance.run()
            break
        except Exception:  # noqa: BLE001 - the only one: a bug in one instance must not stop the others
            on_error()
            instance.report.tell("instance.error", level="exception", pause_s=pause_s)
            await clock.sleep(pause_s)
            pause_s = min(2 * pause_s, ERROR_PAUSE_S[1])
