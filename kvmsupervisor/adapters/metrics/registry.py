"""All metrics of one supervisor: counters that it is told of, and gauges that are looked at during a scrape."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from kvmsupervisor.adapters.metrics.families import counter, gauge, histogram
from kvmsupervisor.adapters.metrics.instances import of_guests, of_instances
from kvmsupervisor.adapters.metrics.samples import Snapshot
from kvmsupervisor.domain.exits import ExitClass
from kvmsupervisor.domain.keys import HostName, InstanceId

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

START_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of `start_seconds`: narrow around the time that a bare QEMU takes, wide up to the waits of a
takeover."""


class MigrationResult(StrEnum):
    """How a live migration ended; the label `result` of `kvmsupervisor_migrations_total`."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class SnapshotResult(StrEnum):
    """What was done about a machine's snapshots; the label `result` of `kvmsupervisor_snapshots_total`."""

    TAKEN = "taken"
    DELETED = "deleted"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"


@dataclass(slots=True)
class _InstanceCounts:
    """The counters of one instance since the supervisor started."""

    starts: int = 0
    internal_errors: int = 0
    resets: int = 0
    changes: int = 0
    events: int = 0
    connections: int = 0
    exits: Counter[ExitClass] = field(default_factory=Counter)
    ended_at: float | None = None


class Metrics:
    """All metrics of one supervisor. For the event loop only; no method waits."""

    def __init__(
        self, snapshot: Callable[[], Snapshot], *, host: HostName, version: str, wall: Callable[[], float] = time.time
    ) -> None:
        """Make the registry.

        Args:
            snapshot: takes a snapshot; called once per scrape.
            host: this host.
            version: of the supervisor, for `build_info`.
            wall: the time of day, seconds since 1970.
        """
        self._wall = wall
        self._snapshot = snapshot
        self._host = host
        self._version = version
        self._instances: dict[InstanceId, _InstanceCounts] = {}
        self._adopted = 0
        self._fences = 0
        self._takeovers = 0
        self._migrations: Counter[MigrationResult] = Counter()
        self._snapshots: Counter[SnapshotResult] = Counter()
        self._standstill_s = 0.0
        self._migrated_bytes = 0
        self._downtime_s = 0.0
        self._starts_per_bucket = [0] * (len(START_BUCKETS_S) + 1)
        self._starts_sum_s = 0.0
        self._registry: CollectorRegistry | None = None

    def started(self, instance: InstanceId) -> None:
        """Count a QEMU process that began to run its guest."""
        self._counts(instance).starts += 1

    def exited(self, instance: InstanceId, reason: ExitClass) -> None:
        """Count a QEMU process that ended, now."""
        counts = self._counts(instance)
        counts.exits[reason] += 1
        counts.ended_at = self._wall()

    def observed_start(self, seconds: float) -> None:
        """Count one start: `seconds` from seeing the wish to a running guest."""
        self._starts_per_bucket[bisect_left(START_BUCKETS_S, seconds)] += 1
        self._starts_sum_s += seconds

    def internal_error(self, instance: InstanceId) -> None:
        """Count a bug of the supervisor that was contained to one instance."""
        self._counts(instance).internal_errors += 1

    def guest_reset(self, instance: InstanceId) -> None:
        """Count a reboot that the guest began."""
        self._counts(instance).resets += 1

    def changed(self, instance: InstanceId) -> None:
        """Count a change of its machine that came about while its guest ran."""
        self._counts(instance).changes += 1

    def heard_event(self, instance: InstanceId) -> None:
        """Count a QMP event of its QEMU."""
        self._counts(instance).events += 1

    def connected(self, instance: InstanceId) -> None:
        """Count a connection to its QEMU's QMP."""
        self._counts(instance).connections += 1

    def adopted(self) -> None:
        """Count a running QEMU that was adopted from an earlier supervisor."""
        self._adopted += 1

    def fenced(self, addresses: int) -> None:
        """Count addresses that were fenced."""
        self._fences += addresses

    def took_over(self) -> None:
        """Count a lock that was taken from a host without a session."""
        self._takeovers += 1

    def snapshot(self, result: SnapshotResult, *, standstill_s: float = 0.0) -> None:
        """Count what was done about a snapshot.

        Args:
            result: what came of it.
            standstill_s: for how long its guest was frozen or paused for it.
        """
        self._snapshots[result] += 1
        self._standstill_s += standstill_s

    def migrated(self, result: MigrationResult, *, sent: int = 0, downtime_s: float = 0.0) -> None:
        """Count a live migration that ended.

        Args:
            result: how.
            sent: bytes that were sent for it.
            downtime_s: how long the guest was stopped, as QEMU tells it.
        """
        self._migrations[result] += 1
        self._migrated_bytes += sent
        self._downtime_s += downtime_s

    def forget(self, instance: InstanceId) -> None:
        """Drop an instance that left this host, so that labels stay bounded by those that are here."""
        self._instances.pop(instance, None)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the body of `/metrics` and its content type.

        Args:
            accept: the request's Accept header. It chooses OpenMetrics or, by default, Prometheus' text format.
        """
        from prometheus_client.exposition import choose_encoder  # noqa: PLC0415 - see above

        if self._registry is None:
            self._registry = self._registered()
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _registered(self) -> CollectorRegistry:
        """A registry that holds these metrics."""
        from prometheus_client import CollectorRegistry, ProcessCollector  # noqa: PLC0415 - see above

        registry = CollectorRegistry()
        registry.register(self)
        # The supervisor's own CPU, memory and descriptors under the names that every exporter uses (process_…).
        ProcessCollector(registry=registry)
        return registry

    def describe(self) -> Iterable[Metric]:
        """Describe no metric in advance: otherwise the registry would take a snapshot when it is made."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; called by the registry at each scrape.

        Every series of an instance gets the label `host` here: while an instance moves, two hosts report it, and
        Prometheus would merge two series with the same labels.
        """
        for family in self._families(self._snapshot()):
            for series in family.samples:
                if "instance" in series.labels:
                    series.labels["host"] = self._host
            yield family

    def _families(self, now: Snapshot) -> Iterator[Metric]:
        """Every metric; an instance's still without the label `host`."""
        for sample in now.instances:
            self._counts(sample.id)  # seen at 0 first: alerts need that to notice the first increase
        yield from self._host_metrics(now)
        yield from of_instances(now.instances)
        yield from of_guests(now.instances)
        yield from self._instance_counters()

    def _counts(self, instance: InstanceId) -> _InstanceCounts:
        return self._instances.setdefault(instance, _InstanceCounts())

    def _host_metrics(self, now: Snapshot) -> Iterator[Metric]:
        build = gauge("build_info", "Always 1; the label says which release runs.", "version")
        build.add_metric([self._version], 1)
        yield build
        for name, documentation, value in (
            ("etcd_up", "Whether etcd's quorum answered last.", now.etcd_up),
            (
                "session_remaining_seconds",
                "Seconds that this host's session holds without another renewal, 0 without a session.",
                max(0.0, now.session_remaining_s),
            ),
            ("watch_revision", "etcd revision up to which the wishes are known here.", now.watch_revision),
            ("qemu_privileged", "Whether QEMU runs as root.", now.qemu_privileged),
            ("guests_survive", "Whether guests outlive the supervisor's container.", now.guests_survive),
            ("guard_memory_locked", "0 while the guard's memory could not be locked.", now.guard_memory_locked),
            (
                "identity_mismatch",
                "1 while the settings name another host or prefix than what lives.",
                now.identity_mismatch,
            ),
            ("drained", "1 while this host drains and no QEMU is left on it.", now.drained),
            ("draining", "1 while this host drains.", now.draining),
            ("removals_held", "Instances whose removal waits for confirm-removal.", now.removals_held),
            ("fences_pending", "Addresses to be shut out before machines here may start.", now.fences_pending),
        ):
            family = gauge(name, documentation)
            family.add_metric([], value)
            yield family
        drain = gauge("drain_machines", "Machines of a host that drains; no series in service.", "state")
        for state, number in now.drain:
            drain.add_metric([state], number)
        yield drain
        walls = gauge("wall", "Whether this keeps the guests of this host apart; 0: it cannot here.", "wall")
        for name, stands in now.walls:
            walls.add_metric([name], stands)
        yield walls
        yield from self._room(now)
        orphans = gauge("orphans", "Instances of the cluster that no host with a session looks after.")
        if now.orphans is not None:
            orphans.add_metric([], now.orphans)
        yield orphans
        for name, documentation, value in (
            ("adopted_total", "Running QEMU processes taken over from a former supervisor.", self._adopted),
            ("fences_total", "Client addresses that storage was told to refuse.", self._fences),
            ("takeovers_total", "Locks taken from hosts whose session was gone.", self._takeovers),
            ("migration_sent_bytes_total", "Bytes sent for live migrations that ended.", self._migrated_bytes),
            ("migration_downtime_seconds_total", "Seconds that their guests were stopped.", self._downtime_s),
            ("snapshot_standstill_seconds_total", "Seconds that guests stood still for snapshots.", self._standstill_s),
            ("etcd_requests_failed_total", "Requests that etcd did not answer in time.", now.etcd.failed),
            ("sessions_lost_total", "How often this host's session was lost.", now.sessions_lost),
            ("history_changes_total", "How often etcd had another history than before.", now.history_changes),
        ):
            counted = counter(name, documentation)
            counted.add_metric([], value)
            yield counted
        migrations = counter("migrations_total", "Live migrations that ended, by how.", "result")
        for result in MigrationResult:
            migrations.add_metric([result], self._migrations[result])
        yield migrations
        what = "Snapshots taken, deleted, rolled back to, and attempts that failed."
        snapshots = counter("snapshots_total", what, "result")
        for outcome in SnapshotResult:
            snapshots.add_metric([outcome], self._snapshots[outcome])
        yield snapshots
        yield histogram(
            "start_seconds", "Seconds from seeing a wish to a running guest.", START_BUCKETS_S, self._starts_per_bucket,
            self._starts_sum_s,
        )  # fmt: skip
        what = "Seconds that requests to etcd took, until they were answered or given up."
        yield histogram("etcd_request_seconds", what, now.etcd.bounds, now.etcd.counts, now.etcd.total_s)

    def _room(self, now: Snapshot) -> Iterator[Metric]:
        ceph = gauge("ceph_up", "Whether Ceph answered this host's last question; no series before the first.")
        if now.ceph_up is not None:
            ceph.add_metric([], now.ceph_up)
        yield ceph
        memory = gauge("host_memory_bytes", "Memory of this host, by kind.", "kind")
        cpus = gauge("host_cpus", "Processors of this host.")
        if now.host is not None:
            for kind, value in now.host.memory:
                memory.add_metric([kind], value)
            cpus.add_metric([], now.host.cpus)
        yield from (memory, cpus)

    def _instance_counters(self) -> Iterator[Metric]:
        starts = counter("instance_starts_total", "QEMU processes that began to run the guest.", "instance")
        exits = counter("instance_exits_total", "QEMU processes that ended, by why.", "instance", "reason")
        errors = counter("internal_errors_total", "Errors of the supervisor itself, by instance.", "instance")
        resets = counter("instance_resets_total", "Reboots that the guest itself began; QEMU lived on.", "instance")
        changes = counter("instance_changes_total", "Changes of the machine while its guest ran.", "instance")
        events = counter("instance_events_total", "What QEMU told of the instance unasked, over QMP.", "instance")
        connections = counter("instance_qmp_connections_total", "Connections to its QEMU's QMP.", "instance")
        ended = gauge("instance_last_exit_timestamp_seconds", "When its QEMU ended last, while this runs.", "instance")
        for instance, counts in self._instances.items():
            if counts.ended_at is not None:
                ended.add_metric([instance], counts.ended_at)
            starts.add_metric([instance], counts.starts)
            for reason in ExitClass:
                exits.add_metric([instance, reason], counts.exits[reason])
            errors.add_metric([instance], counts.internal_errors)
            resets.add_metric([instance], counts.resets)
            changes.add_metric([instance], counts.changes)
            events.add_metric([instance], counts.events)
            connections.add_metric([instance], counts.connections)
        yield from (starts, exits, ended, errors, resets, changes, events, connections)
