"""How long something may take, or be untrue: one table, made of the times that the program has, and of Ceph's."""

from __future__ import annotations

from dataclasses import dataclass

from kvmsupervisor.adapters.ceph.client import LONGEST_ANSWER_S, MONITORS_S
from kvmsupervisor.adapters.etcd import EtcdConfig
from kvmsupervisor.adapters.transfer import SILENCE_S as CUT_OFF_S
from kvmsupervisor.cluster.batches import GATHER_S, SPREAD_S
from kvmsupervisor.cluster.removal_approval import CONFIRMATION_POLL_S
from kvmsupervisor.domain.failover import STEP_S
from kvmsupervisor.domain.hands_off import HOLDOVER_POLL_S
from kvmsupervisor.domain.lifecycle import PROBE_EVERY_S
from kvmsupervisor.domain.ownership import LOCK_POLL_S
from kvmsupervisor.domain.stopping import QUIT_WAIT_S
from kvmsupervisor.domain.timing import REMIND_EVERY_S, RESTART_CAP_S, RETRY_CAP_S, Rival
from kvmsupervisor.instance.moves import LEAST_S, READY_S, REST_S
from kvmsupervisor.instance.takeover_wait import ASK_WATCHERS_EVERY_S
from kvmsupervisor.machine.machine import KILL_S
from kvmsupervisor.machine.monitor import ANSWER_S, DRAIN_S, PROBE_GAP_S
from kvmsupervisor.supervisor.evacuation import PATIENCE_S

WATCH_S = 30.0
"""After which Ceph forgets a client that has gone silent (`osd_client_watch_timeout`)."""

TELL_S = EtcdConfig(endpoints=("http://etcd:2379",)).call_timeout_s + RETRY_CAP_S + GATHER_S + SPREAD_S
"""From a changed status to its key, on a host that has its session: a write that got no answer, and the next one."""

STATUS_S = ANSWER_S + DRAIN_S + PROBE_GAP_S + TELL_S
"""For how long a status may claim what is not so, on a host with which nothing is wrong: its loop may wait for an
answer on QMP, and asks for a run state once a second."""

STATUS_SILENT_S = PROBE_EVERY_S + ANSWER_S + STATUS_S
"""The same about a QEMU that has fallen silent: it is asked once a minute."""

STATUS_STORAGE_S = 2 * (LONGEST_ANSWER_S + MONITORS_S) + STATUS_S
"""The same where Ceph does not answer, or did not a moment ago: the loop may wait for it twice."""

SILENCE_S = REMIND_EVERY_S
"""How long something may be tried again without a word in the log or in a status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a cluster is set to. Seconds.

    Attributes:
        ttl_s: `KVM_SESSION_TTL`.
        takeover_wait_s: `KVM_TAKEOVER_WAIT`.
        shutdown_s: the longest `shutdown_timeout` of its machines.
        start_timeout_s: `KVM_START_TIMEOUT`.
        again_s: until a supervisor that ended is started again (`RestartSec=`).
        person_s: until a person sees what waits for a word, and says it.
    """

    ttl_s: float = 15.0
    takeover_wait_s: float = 60.0
    shutdown_s: float = 120.0
    start_timeout_s: float = 60.0
    again_s: float = 2.0
    person_s: float = 20.0

    # What may hold up a machine that is to run, once nothing is wrong any more.

    @property
    def host_s(self) -> float:
        """Its host: its supervisor is started again, wins the session (an earlier one's has to run out), reads keys."""
        return self.again_s + self.ttl_s + Rival.GRACE_S + 2 * RETRY_CAP_S

    @property
    def start_s(self) -> float:
        """A start: the lock, a fence of two calls, disks, QEMU; each step may have to be tried again once."""
        return 2 * LOCK_POLL_S + TELL_S

    @property
    def leave_s(self) -> float:
        """A QEMU that is in the way is shut down, by force in the end, and its lock let go of."""
        return self.shutdown_s + QUIT_WAIT_S + KILL_S + HOLDOVER_POLL_S + TELL_S

    @property
    def forgotten_s(self) -> float:
        """A client that is on nobody's record is forgotten by Ceph, and that is seen."""
        return WATCH_S + ASK_WATCHERS_EVERY_S + STEP_S

    @property
    def takeover_s(self) -> float:
        """A host that has not spoken in another history, or whose disks are in use, is waited for."""
        return self.takeover_wait_s + ASK_WATCHERS_EVERY_S + STEP_S

    @property
    def moved_s(self) -> float:
        """A live move: the target makes ready, memory is sent, then the rest; or it is called off."""
        return READY_S + LEAST_S + REST_S + CUT_OFF_S + STATUS_S

    @property
    def placed_s(self) -> float:
        """A drain, or a return, waits for a machine that does not begin to move; then that moves, or says why not."""
        return PATIENCE_S + self.moved_s + self.leave_s + self.start_s

    @property
    def silent_s(self) -> float:
        """A QEMU that does not answer is given up."""
        return self.start_timeout_s + KILL_S

    @property
    def word_s(self) -> float:
        """A person says what is waited for."""
        return self.person_s + CONFIRMATION_POLL_S

    @staticmethod
    def pause_s(ends: int) -> float:
        """The longest pause before the next start of a machine that ended by itself so often."""
        return 0.0 if ends < 1 else min(RESTART_CAP_S, 2.0 ** (ends - 1))
