"""Why a QEMU process ended, by QMP's SHUTDOWN reason, the wait status and the last lines of its log.

Sources: QMP `SHUTDOWN` event and `ShutdownCause` (QEMU QMP reference manual, "run-state"), waitid(2).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from enum import StrEnum

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.secrecy import cleaned


class ExitClass(StrEnum):
    """The kinds of end; the label `reason` of `kvmsupervisor_instance_exits_total`, so it stays bounded."""

    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_RESET = "guest-reset"
    GUEST_PANIC = "guest-panic"
    HOST_SIGNAL = "host-signal"
    HOST_QUIT = "host-quit"
    GUARD = "guard"
    CRASHED = "crashed"
    FAILED = "failed"
    UNKNOWN = "unknown"


SHUTDOWN_REASONS = {
    "guest-shutdown": ExitClass.GUEST_SHUTDOWN,
    "guest-reset": ExitClass.GUEST_RESET,
    "subsystem-reset": ExitClass.GUEST_RESET,
    "guest-panic": ExitClass.GUEST_PANIC,
    "host-signal": ExitClass.HOST_SIGNAL,
    "host-ui": ExitClass.HOST_SIGNAL,
    "host-qmp-quit": ExitClass.HOST_QUIT,
    "host-qmp-system-reset": ExitClass.GUEST_RESET,
    "host-error": ExitClass.FAILED,
}
"""QMP's `ShutdownCause` → ours. A cause that a newer QEMU invents counts as unknown."""


_SPICE_WARNING = re.compile(r"warning: Spice: \S+: (.+)")
"""What the SPICE server says through QEMU: a place in its source, then the words."""


SIGKILL = 9
SIGABRT = 6
"""Of x86 (signal(7))."""


@frozen(kw_only=True)
class WaitStatus:
    """How a process ended, as the kernel says. Both None: not known (see `adapters.process`).

    Attributes:
        code: exit code, when it exited.
        signal: number of the signal that killed it.
    """

    code: int | None = None
    signal: int | None = None


@frozen
class Exit:
    """Why a QEMU process ended: its kind, and the words for people, such as `crashed (signal 9)`."""

    kind: ExitClass
    text: str

    @property
    def is_clean(self) -> bool:
        """Whether the guest meant it: `restart=on-failure` restarts anything else."""
        return self.kind is ExitClass.GUEST_SHUTDOWN


def classify(
    *,
    shutdown: str | None,
    status: WaitStatus,
    log_tail: Sequence[str],
    guard_killed_at: str | None = None,
    secrets: Collection[str] = (),
) -> Exit:
    """Name the end of a QEMU process.

    Args:
        shutdown: `reason` of the last QMP SHUTDOWN event seen, or None.
        status: how it ended, as far as the kernel says.
        log_tail: the last lines that this process wrote on its standard error.
        guard_killed_at: when the guard killed it, as the guard noted; None without such a note.
        secrets: of its command line (`secrecy.secrets_in`); they are hidden in the text.
    """
    if guard_killed_at is not None and status in {WaitStatus(), WaitStatus(signal=SIGKILL)}:
        text = f"killed by its guard at {guard_killed_at}, because its host's session had run out (KVM_UNFENCED=guard)"
        return Exit(ExitClass.GUARD, text)
    if status.signal is not None:
        # The signal ended it, whatever it announced before. After an abort, the log's last words say why.
        words = _last_words(log_tail, secrets) if status.signal == SIGABRT else None
        return Exit(ExitClass.CRASHED, f"crashed (signal {status.signal})" + (f": {words}" if words else ""))
    if shutdown is not None and (kind := SHUTDOWN_REASONS.get(shutdown)) is not None:
        return Exit(kind, kind.value)
    last = _last_words(log_tail, secrets)
    if status.code:
        return Exit(ExitClass.FAILED, f"failed: {last or f'exit status {status.code}, and nothing in its log'}")
    if status.code == 0:
        return Exit(
            ExitClass.UNKNOWN,
            f"ended with status 0 and did not say why ({shutdown or 'no SHUTDOWN event seen'})",
        )
    return Exit(ExitClass.UNKNOWN, "ended while no supervisor watched" + (f"; last words: {last}" if last else ""))


def _last_words(log_tail: Sequence[str], secrets: Collection[str]) -> str | None:
    words = last_error(log_tail)
    return None if words is None else cleaned(words, secrets)


def last_error(log_tail: Sequence[str]) -> str | None:
    """The most telling line: the last that is not a warning, else the last.

    QEMU begins its lines with its program's name, which is left out. The SPICE server gives its cause (a port that is
    taken) in a warning, and QEMU then says only that SPICE failed: both are returned then.
    """
    lines = [line.strip() for line in log_tail if line.strip()]
    telling = [line for line in lines if "warning:" not in line.lower()] or lines
    if not telling:
        return None
    head, separator, rest = telling[-1].partition(": ")
    said = rest if separator and head.rpartition("/")[2].startswith("qemu-system") else telling[-1]
    causes = [found[1] for line in lines if (found := _SPICE_WARNING.search(line))]
    return f"{said}: {causes[0]}" if causes and "spice" in said else said
