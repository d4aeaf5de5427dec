"""The run states of QMP: whether the guest of a QEMU that lives runs, and if not, why. Pure.

Source: `RunState` in QEMU's qapi/run-state.json; which of them follow each other is in its softmmu/runstate.c.
"""

from __future__ import annotations

from enum import StrEnum

NEVER_RAN = "prelaunch"
"""Of a QEMU that was started with -S and whose guest has not run."""

RUNNING = "running"

IO_ERROR = "io-error"
"""A disk's error has stopped the guest (`werror=stop`)."""

PANICKED = "guest-panicked"
"""By default QEMU ends then. With `-no-shutdown`, or `-action panic=pause`, it waits for people to look at it."""

POWERED_OFF = "shutdown"
"""The guest has powered itself off, or was reset under `-no-reboot`, and QEMU was told to live on (`-no-shutdown`)."""


class RunState(StrEnum):
    """The run states that metrics tell apart: those that a person has to know of."""

    RUNNING = RUNNING
    PAUSED = "paused"
    SUSPENDED = "suspended"
    IO_ERROR = IO_ERROR
    INTERNAL_ERROR = "internal-error"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = PANICKED
    SHUTDOWN = POWERED_OFF
    OTHER = "other"
    """One on the way to another (`prelaunch`, `inmigrate`, …), or one that a newer QEMU invents."""
    UNKNOWN = "unknown"
    """QEMU lives, and does not answer."""

    @classmethod
    def of(cls, told: str | None) -> RunState:
        """What metrics call the state that QMP told; None: it told none."""
        if told is None:
            return cls.UNKNOWN
        return cls(told) if told in _TOLD else cls.OTHER


_TOLD = {state.value for state in RunState} - {RunState.OTHER, RunState.UNKNOWN}

_WHY = {
    "paused": "somebody has paused it; `cont` over QMP lets it go on",
    "suspended": "it has suspended itself to memory; what wakes up a machine lets it go on",
    IO_ERROR: "a disk has failed, is full, or was fenced; once that is mended, `cont` over QMP lets it go on",
    "internal-error": "QEMU cannot run it on; its log may say why; a restart helps",
    "watchdog": "its watchdog has stopped it; `cont` over QMP lets it go on, a restart begins anew",
    PANICKED: "it has panicked and was left for people to look at; a restart begins anew",
}


def why_not_running(run_state: str | None) -> str | None:
    """Why the guest of a QEMU that lives does not run, as a clause for people; None while it does, or nobody knows."""
    if run_state in {RUNNING, None}:
        return None
    said = f"QEMU lives, its guest does not run (QMP says {run_state})"
    more = _WHY.get(str(run_state))
    return said if more is None else f"{said}: {more}"
