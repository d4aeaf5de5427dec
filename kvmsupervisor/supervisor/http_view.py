"""What others see of a supervisor, over HTTP: answered at once, from memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime

from kvmsupervisor import __version__
from kvmsupervisor.adapters.metrics import HostSample, InstanceSample, Metrics, Snapshot
from kvmsupervisor.adapters.usage import VcpuWaits, memory_of_host, traffic_by_tap, usage_of
from kvmsupervisor.cluster.history import History
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.counters import Traffic
from kvmsupervisor.domain.durations import Durations
from kvmsupervisor.domain.grouping import Flat
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.host_wish import HostProgress
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.orphans import count_orphans
from kvmsupervisor.domain.run_state import RunState
from kvmsupervisor.domain.status import Status
from kvmsupervisor.instance.worker import Worker


class HttpView:
    """Implements `adapters.web.View`, and gives the metrics their gauges.

    Args:
        host: this host.
        instances: those of this host; a live mapping.
        hosts: the session keys of all hosts; a live table.
        alive: tells the names of the hosts that have a session; none while that is not known.
        session: of this host.
        history: that etcd has.
        wishes: the keys.
        progress: tells how far the drain of this host has come; None in service.
        room: bytes for guests by kind: `for_guests`, where they are limited, and `promised`.
        durations: of requests to etcd.
        ceph_up: tells whether Ceph answered the last question; None before the first.
        removals_held: tells how many removals wait for an operator's word.
        qemu_privileged: whether QEMU runs as root.
        walls: what keeps guests apart, and whether it does on this host.
        guests_survive: whether guests outlive the supervisor's container, and the next one can adopt them.
        mismatch: why nothing is started or stopped here (law 12); None when all goes its way.
        guard_unlocked: tells why the guard's memory is not locked; None when it is, or there is none.
    """

    def __init__(
        self,
        *,
        host: HostName,
        instances: Mapping[InstanceId, Worker],
        hosts: Flat,
        alive: Callable[[], Collection[str]],
        session: Session,
        history: History,
        wishes: Wishes,
        progress: Callable[[], HostProgress | None],
        room: Callable[[], Sequence[tuple[str, int]]],
        durations: Durations,
        ceph_up: Callable[[], bool | None],
        removals_held: Callable[[], int],
        qemu_privileged: bool,
        walls: Callable[[], Sequence[tuple[str, bool]]],
        guests_survive: bool,
        guard_unlocked: Callable[[], str | None],
        mismatch: str | None,
    ) -> None:
        self.counters = Metrics(self.snapshot, host=host, version=__version__)
        self._host = host
        self._instances = instances
        self._hosts = hosts
        self._alive = alive
        # What the last count of orphans was made of, and what it came to: most scrapes see nothing new.
        self._counted: tuple[object, int] = (None, 0)
        self._session = session
        self._history = history
        self._wishes = wishes
        self._progress = progress
        self._room = room
        self._durations = durations
        self._ceph_up = ceph_up
        self._waits = VcpuWaits()
        self._removals_held = removals_held
        self._qemu_privileged = qemu_privileged
        self._walls = walls
        self._guests_survive = guests_survive
        self._guard_unlocked = guard_unlocked
        self._mismatch = mismatch

    def instances(self) -> Sequence[Status]:
        """Those that this host is responsible for, by id."""
        return [self._instances[name].report.status for name in sorted(self._instances)]

    def agent_seen(self, instance: InstanceId) -> str | None:
        """When the agent in this instance's guest last answered; None when it did not."""
        found = self._instances.get(instance)
        return None if found is None else found.agent_seen

    def hosts(self) -> Sequence[HostSession]:
        """The hosts that have a session, by name."""
        entries = sorted(self._hosts.entries.items())
        return [host for _, entry in entries if (host := HostSession.from_json(entry.value)) is not None]

    def healthy(self) -> bool:
        """Whether the supervisor's own parts turn: that it answers is the evidence."""
        return True

    def ready(self) -> tuple[bool, str]:
        """Whether the session is held and the watch in step, and this host is who it was."""
        if self._mismatch is not None:
            return False, self._mismatch
        if not self._session.held:
            return False, f"no session: {self._session.problem or 'etcd has not answered yet'}"
        if not self._wishes.in_step:
            return False, f"not in step: {self._wishes.problem}"
        if self._wishes.era != self._history.era:
            return False, "etcd has another history than before: its keys are being read anew"
        return True, f"session held, in step with revision {self._wishes.revision}"

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """The body of `/metrics`, and its content type."""
        return self.counters.render(accept)

    def snapshot(self) -> Snapshot:
        """All that the gauges show, at this moment."""
        self._waits.keep({instance.pid for instance in self._instances.values() if instance.pid is not None})
        total, available = memory_of_host()
        # One read for all of them, and none where nobody has a tap.
        taps = traffic_by_tap() if any(any(one.plugs.attachments()) for one in self._instances.values()) else {}
        return Snapshot(
            etcd_up=self._session.held and self._wishes.in_step,
            session_remaining_s=self._session.remaining_s,
            watch_revision=self._wishes.revision,
            qemu_privileged=self._qemu_privileged,
            walls=self._walls(),
            guests_survive=self._guests_survive,
            drain=() if (told := self._progress()) is None else told.counts,
            draining=told is not None,
            drained=told is not None and told.drained is not None,
            host=HostSample(
                cpus=os.cpu_count() or 0, memory=(("total", total), ("available", available), *self._room())
            ),
            sessions_lost=self._session.lost_count,
            ceph_up=self._ceph_up(),
            fences_pending=sum(instance.report.fences_pending for instance in self._instances.values()),
            etcd=self._durations,
            removals_held=self._removals_held(),
            orphans=self._orphans(),
            history_changes=self._history.changes,
            guard_memory_locked=self._guard_unlocked() is None,
            identity_mismatch=self._mismatch is not None,
            instances=[self._sample(instance, taps) for instance in self._instances.values()],
        )

    def _orphans(self) -> int | None:
        """How many instances of the cluster nobody looks after; None while this host does not know."""
        alive = frozenset(self._alive())
        if not alive or not self._wishes.in_step:
            return None
        wishes = self._wishes
        seen = (wishes.era, wishes.revision, wishes.locks_revision, wishes.placements_revision, alive)
        if self._counted[0] != seen:
            self._counted = (seen, count_orphans(self._wishes, alive))
        return self._counted[1]

    def _sample(self, instance: Worker, taps: Mapping[str, Traffic]) -> InstanceSample:
        status, spec, wait_s = instance.report.status, instance.report.runs_as, instance.report.next_start_in_s
        usage = None if instance.pid is None else usage_of(instance.pid, starttime=instance.starttime)
        return InstanceSample(
            id=instance.id,
            phase=status.phase,
            run_state=None if status.pid is None else RunState.of(status.run_state),
            epoch=status.epoch,
            pending=len(status.pending),
            invalid=bool(status.problems),
            unguarded=status.guarded is False,
            placed_for=status.placed_for,
            host_absent=status.awaited_host is not None,
            cpu_s=None if usage is None else usage.cpu_s,
            memory_bytes=None if usage is None else usage.memory_bytes,
            threads=None if usage is None else usage.threads,
            files=None if usage is None else usage.files,
            disks=instance.counts.disks,
            guest_memory=instance.counts.memory,
            nics=[(one.nic, taps[one.tap]) for one in instance.plugs.attachments() if one.tap in taps],
            plugged=[(plug.nic, plug.plugged) for plug in instance.plugs.seen] if instance.pid is not None else (),
            accelerator=status.accelerator,
            machine=status.machine,
            since=_seconds(status.since),
            next_start=None if wait_s is None else time.time() + wait_s,
            pinned=instance.report.pinned,
            vcpus=None if spec is None else spec.cpus,
            ram_bytes=None if spec is None else spec.ram_mib << 20,
            waited_s=None if usage is None or spec is None else self._waited(instance, spec.cpus),
            move=status.move if status.move is not None and status.move.source == self._host else None,
        )

    def _waited(self, instance: Worker, vcpus: int) -> float | None:
        return None if instance.pid is None else self._waits.seconds(instance.pid, instance.starttime, vcpus)


def _seconds(since: str) -> float | None:
    """The time of a status, seconds since 1970; None for what an earlier release wrote in another way."""
    try:
        return datetime.fromisoformat(since).timestamp()
    except ValueError:
        return None
