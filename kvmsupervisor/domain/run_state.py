"""The run states of QMP: whether the guest of a QEMU that lives runs, and if not, why. Pure.

Source: `RunState` in QEMU's qapi/run-state.json; which of them follow each other is in its softmmu/runstate.c.
"""

from __future__ import annotations

from enum import StrEnum

NEVER_RAN = "prelaunch"
"""The state of a QEMU that was started with -S and whose guest has not run."""

INCOMING = "inmigrate"
"""Of a QEMU that waits for another one's guest to migrate to it."""

POSTMIGRATE = "postmigrate"
"""Of a QEMU whose guest was sent to another one, or, where a person had paused it, failed to be."""

PAUSED = "paused"

RUNNING = "running"

IO_ERROR = "io-error"
"""A disk's error has stopped the guest (`werror=stop`)."""

PANICKED = "guest-panicked"
"""By default QEMU ends then. With `-no-shutdown`, or `-action panic=pause`, it waits for a person."""

POWERED_OFF = "shutdown"
"""The guest powered itself off, or was reset under `-no-reboot`, and QEMU lives on (`-no-shutdown`)."""


class RunState(StrEnum):
    """The run states in metrics: those that a person has to know."""

    RUNNING = RUNNING
    PAUSED = PAUSED
    SUSPENDED = "suspended"
    IO_ERROR = IO_ERROR
    INTERNAL_ERROR = "internal-error"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = PANICKED
    SHUTDOWN = POWERED_OFF
    OTHER = "other"
    """A transitional state (`prelaunch`, `inmigrate`, …), or one of a newer QEMU."""
    UNKNOWN = "unknown"
    """QEMU lives, but does not answer."""

    @classmethod
    def of(cls, told: str | None) -> RunState:
        """The state in metrics for the state of QMP; None: not known."""
        if told is None:
            return cls.UNKNOWN
        return cls(told) if told in _TOLD else cls.OTHER


_TOLD = {state.value for state in RunState} - {RunState.OTHER, RunState.UNKNOWN}

_WHY = {
    "paused": "it is paused; `cont` over QMP lets it go on",
    INCOMING: "it waits for the guest of another host",
    POSTMIGRATE: "it was sent to another host",
    "suspended": "it suspended itself to memory; a wake-up of the machine lets it go on",
    IO_ERROR: "a disk has failed, is full, or was fenced; once that is mended, `cont` over QMP lets it go on",
    "internal-error": "QEMU cannot go on running it; its log may say why; a restart helps",
    "watchdog": "its watchdog stopped it; `cont` over QMP lets it go on, a restart begins again",
    PANICKED: "it panicked and waits for a person; a restart begins again",
}


def why_not_running(run_state: str | None) -> str | None:
    """Why the guest of a living QEMU does not run, as a clause for people; None while it runs, or is not known."""
    if run_state in {RUNNING, None}:
        return None
    said = f"QEMU lives, its guest does not run (QMP says {run_state})"
    more = _WHY.get(str(run_state))
    return said if more is None else f"{said}: {more}"
