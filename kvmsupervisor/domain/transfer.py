"""How far the transfer of a live move has come, and what a supervisor knows of it beside lock and QEMU. Pure.

Source: `MigrationStatus` in QEMU's qapi/migration.json, and what its run states say besides (qapi/run-state.json).
"""

from __future__ import annotations

import math
from enum import Enum

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.lock import Destination
from kvmsupervisor.domain.run_state import POSTMIGRATE


class Stage(Enum):
    """How far the migration of one QEMU has come, at either side."""

    UNKNOWN = "not asked yet"
    IDLE = "none is under way"
    ACTIVE = "memory is transferred; the guest runs at the source"
    SWITCHOVER = "the guest is stopped, and its disks are flushed"
    DEVICE = "the rest is transferred; who fails now runs again by itself at the source"
    DONE = "completed: the guest stands still, on both sides"

    @classmethod
    def of_source(cls, told: str, run_state: str | None) -> Stage:
        """The stage of a QEMU that sends.

        QEMU tells the end of its last migration until the next one begins. So "completed" counts only of a guest that
        stands still for it.

        Args:
            told: `status` of `query-migrate`; `none` where it has none.
            run_state: of QMP.
        """
        if told == "completed":
            return cls.DONE if run_state == POSTMIGRATE else cls.IDLE
        return _STAGES.get(told, cls.DEVICE)

    @classmethod
    def of_target(cls, told: str) -> Stage:
        """The stage of a QEMU that receives, by `status` of `query-migrate`."""
        return cls.DONE if told == "completed" else _STAGES.get(told, cls.DEVICE)


_STAGES = {
    **dict.fromkeys(("none", "failed", "cancelled"), Stage.IDLE),
    **dict.fromkeys(("setup", "active", "wait-unplug", "cancelling"), Stage.ACTIVE),
    "pre-switchover": Stage.SWITCHOVER,
}


class Link(Enum):
    """The connection between two supervisors over which a guest is transferred."""

    NONE = "there is none"
    OPEN = "both QEMUs are ready, and nothing was sent"
    IN_USE = "a QEMU sends"


@frozen(kw_only=True)
class Course:
    """What a supervisor knows of a live move of one instance. Nothing of it outlives the supervisor.

    Attributes:
        cold: at the source: why it can only be moved cold; empty where live moves are not switched on. None: it can.
        only_live: whether it stays where it is then (`KVM_MIGRATION=live`).
        link: to the other side.
        ready: at the source: the QEMU that waits at the target.
        refused: at the source: etcd has refused the hand-over.
        again_at: when the next attempt is worth it, CLOCK_BOOTTIME.
        trouble: why the last one came to nothing; None without one.
        give_up_at: when the present step has lasted too long, CLOCK_BOOTTIME.
        why_give_up: what is said then.
        receives: at the target: whether this host takes guests in live, and the holder of the lock hands them on.
        offered: at the target: whether it has said so.
        called: at the target: whether the source has said what comes.
        told: at the target: whether the source was told of the QEMU that waits.
    """

    cold: str | None = ""
    only_live: bool = False
    link: Link = Link.NONE
    ready: Destination | None = None
    refused: bool = False
    again_at: float = 0.0
    trouble: str | None = None
    give_up_at: float = math.inf
    why_give_up: str = "it takes too long"
    receives: bool = False
    offered: bool = False
    called: bool = False
    told: bool = False


NO_COURSE = Course()
"""Where live moves are not switched on."""
