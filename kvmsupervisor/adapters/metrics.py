"""The `kvmsupervisor_` metrics that Prometheus scrapes, in a registry of their own.

Gauges come from a `Snapshot` that is taken during the scrape; counters are methods that the supervisor calls. Label
values are the instances of this host and small fixed sets only. A metric with the label `instance` also has `host`,
which `Metrics.collect` adds. docs/metrics.md explains each metric.

The library that writes Prometheus' formats is imported by the first scrape: it brings a whole HTTP server, for which no
start should wait.

Sources: https://prometheus.io/docs/practices/naming/ and
https://prometheus.io/docs/instrumenting/writing_clientlibs/.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING

from kvmsupervisor.domain.counters import DiskCounts, Traffic
from kvmsupervisor.domain.exits import ExitClass
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.run_state import RunState
from kvmsupervisor.domain.status import Phase

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

PREFIX = "kvmsupervisor_"

START_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of `start_seconds`: narrow around the time that a bare QEMU takes, wide up to the waits of a
takeover."""


_INFO_LABELS = ("instance", "accelerator", "machine")


class MigrationResult(StrEnum):
    """How a live migration ended; the label `result` of `kvmsupervisor_migrations_total`."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@frozen(kw_only=True)
class InstanceSample:
    """One instance at the moment of a scrape.

    Attributes:
        id: the instance.
        phase: the phase that it is in.
        run_state: of its guest; None without a process.
        epoch: of its lock; 0 before the first.
        pending: how many keys take effect at the next restart.
        invalid: whether any of its keys has a problem, also while it runs on as it was.
        unguarded: whether the guard should watch its QEMU and does not.
        placed_for: the host that it runs here instead of; None when its keys name this host.
        host_absent: whether its keys name a host that has no session, so that it stays here.
        cpu_s: CPU seconds that its QEMU has used; None without a process.
        memory_bytes: resident memory of its QEMU; None without a process.
        threads: of its QEMU; None without a process.
        files: that its QEMU has open; None without a process, and where the kernel does not tell.
        disks: bytes of each disk.
        nics: bytes of each NIC, by its name.
        plugged: whether each NIC is plugged into a bridge, by its name.
        guest_memory: bytes by kind, as the guest's balloon driver reports them.
        accelerator: of its QEMU; None without a process.
        machine: the versioned machine type; None when it is not known.
    """

    id: InstanceId
    phase: Phase
    run_state: RunState | None = None
    epoch: int = 0
    pending: int = 0
    invalid: bool = False
    unguarded: bool = False
    placed_for: str | None = None
    host_absent: bool = False
    cpu_s: float | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    files: int | None = None
    disks: Sequence[DiskCounts] = ()
    nics: Sequence[tuple[str, Traffic]] = ()
    plugged: Sequence[tuple[str, bool]] = ()
    guest_memory: Sequence[tuple[str, int]] = ()
    accelerator: str | None = None
    machine: str | None = None


@frozen(kw_only=True)
class Snapshot:
    """The whole supervisor at the moment of a scrape.

    Attributes:
        etcd_up: whether etcd's quorum answered the last request.
        session_remaining_s: seconds that the session lasts without another renewal; 0 without a session.
        watch_revision: the etcd revision up to which the wishes are known; 0 before the first list.
        qemu_privileged: whether QEMU runs as root.
        walls: what keeps guests apart, and whether it does on this host.
        guests_survive: whether guests outlive the supervisor's container.
        history_changes: how often etcd had another history than before.
        orphans: instances of the whole cluster that no host with a session looks after; None while that is not known.
        drain: machines of a host that drains by state: left, moving, moved, refused; empty in service.
        drained: whether it drains and none is left.
        removals_held: instances whose removal waits for an operator's confirmation.
        identity_mismatch: whether nothing is started or stopped, because the settings differ from those under which the
            QEMUs of this host were started.
        guard_memory_locked: False when there is a guard whose memory could not be locked.
        instances: the instances that this host is responsible for, the invalid ones too.
    """

    etcd_up: bool
    session_remaining_s: float
    watch_revision: int
    qemu_privileged: bool = False
    walls: Sequence[tuple[str, bool]] = ()
    guests_survive: bool = True
    orphans: int | None = None
    drain: Sequence[tuple[str, int]] = ()
    drained: bool = False
    removals_held: int = 0
    identity_mismatch: bool = False
    history_changes: int = 0
    guard_memory_locked: bool = True
    instances: Sequence[InstanceSample] = ()


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


class Metrics:
    """All metrics of one supervisor. For the event loop only; no method waits."""

    def __init__(self, snapshot: Callable[[], Snapshot], *, host: HostName, version: str) -> None:
        """Make the registry.

        Args:
            snapshot: takes a snapshot; called once per scrape.
            host: this host.
            version: of the supervisor, for `build_info`.
        """
        self._snapshot = snapshot
        self._host = host
        self._version = version
        self._instances: dict[InstanceId, _InstanceCounts] = {}
        self._adopted = 0
        self._fences = 0
        self._takeovers = 0
        self._migrations: Counter[MigrationResult] = Counter()
        self._migrated_bytes = 0
        self._downtime_s = 0.0
        self._starts_per_bucket = [0] * (len(START_BUCKETS_S) + 1)
        self._starts_sum_s = 0.0
        self._registry: CollectorRegistry | None = None

    def started(self, instance: InstanceId) -> None:
        """Count a QEMU process that began to run its guest."""
        self._counts(instance).starts += 1

    def exited(self, instance: InstanceId, reason: ExitClass) -> None:
        """Count a QEMU process that ended."""
        self._counts(instance).exits[reason] += 1

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
        yield from self._instance_gauges(now.instances)
        yield from self._guest_counts(now.instances)
        yield from self._instance_counters()

    def _counts(self, instance: InstanceId) -> _InstanceCounts:
        return self._instances.setdefault(instance, _InstanceCounts())

    def _host_metrics(self, now: Snapshot) -> Iterator[Metric]:
        build = _gauge("build_info", "Always 1; the label says which release runs.", "version")
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
            ("removals_held", "Instances whose removal waits for confirm-removal.", now.removals_held),
        ):
            gauge = _gauge(name, documentation)
            gauge.add_metric([], value)
            yield gauge
        drain = _gauge("drain_machines", "Machines of a host that drains; no series in service.", "state")
        for state, number in now.drain:
            drain.add_metric([state], number)
        yield drain
        walls = _gauge("wall", "Whether this keeps the guests of this host apart; 0: it cannot here.", "wall")
        for name, stands in now.walls:
            walls.add_metric([name], stands)
        yield walls
        orphans = _gauge("orphans", "Instances of the cluster that no host with a session looks after.")
        if now.orphans is not None:
            orphans.add_metric([], now.orphans)
        yield orphans
        for name, documentation, value in (
            ("adopted_total", "Running QEMU processes taken over from a former supervisor.", self._adopted),
            ("fences_total", "Client addresses that storage was told to refuse.", self._fences),
            ("takeovers_total", "Locks taken from hosts whose session was gone.", self._takeovers),
            ("migration_sent_bytes_total", "Bytes sent for live migrations that ended.", self._migrated_bytes),
            ("migration_downtime_seconds_total", "Seconds that their guests were stopped.", self._downtime_s),
            ("history_changes_total", "How often etcd had another history than before.", now.history_changes),
        ):
            counter = _counter(name, documentation)
            counter.add_metric([], value)
            yield counter
        migrations = _counter("migrations_total", "Live migrations that ended, by how.", "result")
        for result in MigrationResult:
            migrations.add_metric([result], self._migrations[result])
        yield migrations
        yield self._start_histogram()

    def _start_histogram(self) -> Metric:
        from prometheus_client.core import HistogramMetricFamily  # noqa: PLC0415 - see above

        histogram = HistogramMetricFamily(
            PREFIX + "start_seconds", "Seconds from seeing a wish to a running guest.", labels=()
        )
        bounds = [*map(str, START_BUCKETS_S), "+Inf"]
        # Prometheus' buckets are cumulative.
        buckets = list(zip(bounds, accumulate(self._starts_per_bucket), strict=True))
        histogram.add_metric([], buckets, self._starts_sum_s)
        return histogram

    def _instance_gauges(self, samples: Sequence[InstanceSample]) -> Iterator[Metric]:
        phase = _gauge("instance_phase", "1 for the phase that the instance is in, else 0.", "instance", "phase")
        up = _gauge("instance_up", "Whether the instance's guest runs.", "instance")
        run_state = _gauge("instance_run_state", "1 for the state that its guest is in, else 0.", "instance", "state")
        epoch = _gauge("instance_lock_epoch", "Epoch of the instance's lock; it grows at each start.", "instance")
        pending = _gauge("instance_pending_changes", "Keys that take effect at the next restart.", "instance")
        invalid = _gauge("instance_invalid", "Whether any key of the instance has a problem.", "instance")
        unguarded = _gauge("instance_unguarded", "Whether QEMU should be watched by the guard, and is not.", "instance")
        absent = _gauge("instance_host_absent", "Whether its `host` has no session, so that it stays here.", "instance")
        placed = _gauge("instance_placed", "1 while it runs in the place of its home.", "instance", "home")
        info = _gauge("instance_info", "Always 1; the labels say what the machine is.", *_INFO_LABELS)
        cpu = _counter("instance_cpu_seconds_total", "CPU seconds used by the instance's QEMU process.", "instance")
        memory = _gauge("instance_memory_bytes", "Resident memory of the instance's QEMU process.", "instance")
        threads = _gauge("instance_threads", "Threads of the instance's QEMU process.", "instance")
        files = _gauge("instance_open_files", "Files that the instance's QEMU process has open.", "instance")
        for sample in samples:
            label = [sample.id]
            for each in Phase:
                phase.add_metric([sample.id, each], sample.phase is each)
            up.add_metric(label, sample.run_state is RunState.RUNNING)
            for state in RunState:
                run_state.add_metric([sample.id, state], sample.run_state is state)
            epoch.add_metric(label, sample.epoch)
            pending.add_metric(label, sample.pending)
            invalid.add_metric(label, sample.invalid)
            unguarded.add_metric(label, sample.unguarded)
            absent.add_metric(label, sample.host_absent)
            if sample.placed_for is not None:
                placed.add_metric([sample.id, sample.placed_for], 1)
            if sample.accelerator is not None:
                info.add_metric([sample.id, sample.accelerator, sample.machine or ""], 1)
            if sample.cpu_s is not None:
                cpu.add_metric(label, sample.cpu_s)
            if sample.memory_bytes is not None:
                memory.add_metric(label, sample.memory_bytes)
            if sample.threads is not None:
                threads.add_metric(label, sample.threads)
            if sample.files is not None:
                files.add_metric(label, sample.files)
        yield from (phase, up, run_state, epoch, pending, invalid, unguarded, absent, placed, info, cpu, memory)
        yield from (threads, files)

    def _guest_counts(self, samples: Sequence[InstanceSample]) -> Iterator[Metric]:
        read = _counter("instance_disk_read_bytes_total", "Bytes that the guest read.", "instance", "disk")
        written = _counter("instance_disk_written_bytes_total", "Bytes that the guest wrote.", "instance", "disk")
        received = _counter("instance_network_received_bytes_total", "Bytes to the guest.", "instance", "nic")
        sent = _counter("instance_network_sent_bytes_total", "Bytes from the guest.", "instance", "nic")
        plugged = _gauge("instance_nic_plugged", "Whether frames pass between a NIC and a bridge.", "instance", "nic")
        memory = _gauge("instance_guest_memory_bytes", "Memory as the guest itself counts it.", "instance", "kind")
        for sample in samples:
            for disk in sample.disks:
                read.add_metric([sample.id, disk.name], disk.read_bytes)
                written.add_metric([sample.id, disk.name], disk.written_bytes)
            for name, traffic in sample.nics:
                received.add_metric([sample.id, name], traffic.received_bytes)
                sent.add_metric([sample.id, name], traffic.sent_bytes)
            for name, is_plugged in sample.plugged:
                plugged.add_metric([sample.id, name], is_plugged)
            for kind, value in sample.guest_memory:
                memory.add_metric([sample.id, kind], value)
        yield from (read, written, received, sent, plugged, memory)

    def _instance_counters(self) -> Iterator[Metric]:
        starts = _counter("instance_starts_total", "QEMU processes that began to run the guest.", "instance")
        exits = _counter("instance_exits_total", "QEMU processes that ended, by why.", "instance", "reason")
        errors = _counter("internal_errors_total", "Errors of the supervisor itself, by instance.", "instance")
        resets = _counter("instance_resets_total", "Reboots that the guest itself began; QEMU lived on.", "instance")
        changes = _counter("instance_changes_total", "Changes of the machine while its guest ran.", "instance")
        events = _counter("instance_events_total", "What QEMU told of the instance unasked, over QMP.", "instance")
        connections = _counter("instance_qmp_connections_total", "Connections to its QEMU's QMP.", "instance")
        for instance, counts in self._instances.items():
            starts.add_metric([instance], counts.starts)
            for reason in ExitClass:
                exits.add_metric([instance, reason], counts.exits[reason])
            errors.add_metric([instance], counts.internal_errors)
            resets.add_metric([instance], counts.resets)
            changes.add_metric([instance], counts.changes)
            events.add_metric([instance], counts.events)
            connections.add_metric([instance], counts.connections)
        yield from (starts, exits, errors, resets, changes, events, connections)


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415 - see above

    return GaugeMetricFamily(PREFIX + name, documentation, labels=labels)


def _counter(name: str, documentation: str, *labels: str) -> CounterMetricFamily:
    from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415 - see above

    return CounterMetricFamily(PREFIX + name, documentation, labels=labels)
