"""Metrics: the names of the contract, in a form that Prometheus' own tool accepts."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kvmsupervisor.adapters.metrics import (
    START_BUCKETS_S,
    HostSample,
    InstanceSample,
    Metrics,
    MigrationResult,
    Snapshot,
)
from kvmsupervisor.domain.counters import DiskCounts, Flow, Traffic, Work
from kvmsupervisor.domain.durations import Durations
from kvmsupervisor.domain.exits import ExitClass
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.run_state import RunState
from kvmsupervisor.domain.status import Phase, Transfer

HERE = HostName("alpha")
ONE, TWO = InstanceId("1"), InstanceId("web.two-2_x")

CONTRACT = {
    "build_info": "gauge",
    "etcd_up": "gauge",
    "session_remaining_seconds": "gauge",
    "watch_revision": "gauge",
    "qemu_privileged": "gauge",
    "wall": "gauge",
    "guests_survive": "gauge",
    "guard_memory_locked": "gauge",
    "identity_mismatch": "gauge",
    "removals_held": "gauge",
    "drain_machines": "gauge",
    "drained": "gauge",
    "orphans": "gauge",
    "instance_phase": "gauge",
    "instance_up": "gauge",
    "instance_run_state": "gauge",
    "instance_nic_plugged": "gauge",
    "instance_lock_epoch": "gauge",
    "instance_pending_changes": "gauge",
    "instance_invalid": "gauge",
    "instance_unguarded": "gauge",
    "instance_host_absent": "gauge",
    "instance_placed": "gauge",
    "instance_info": "gauge",
    "instance_memory_bytes": "gauge",
    "instance_guest_memory_bytes": "gauge",
    "instance_disk_read_bytes_total": "counter",
    "instance_disk_written_bytes_total": "counter",
    "instance_network_received_bytes_total": "counter",
    "instance_network_sent_bytes_total": "counter",
    "instance_cpu_seconds_total": "counter",
    "instance_starts_total": "counter",
    "instance_exits_total": "counter",
    "instance_resets_total": "counter",
    "instance_changes_total": "counter",
    "instance_events_total": "counter",
    "instance_qmp_connections_total": "counter",
    "instance_threads": "gauge",
    "instance_open_files": "gauge",
    "internal_errors_total": "counter",
    "adopted_total": "counter",
    "fences_total": "counter",
    "takeovers_total": "counter",
    "history_changes_total": "counter",
    "migrations_total": "counter",
    "snapshots_total": "counter",
    "snapshot_standstill_seconds_total": "counter",
    "migration_sent_bytes_total": "counter",
    "migration_downtime_seconds_total": "counter",
    "start_seconds": "histogram",
    "draining": "gauge",
    "fences_pending": "gauge",
    "ceph_up": "gauge",
    "host_memory_bytes": "gauge",
    "host_cpus": "gauge",
    "sessions_lost_total": "counter",
    "etcd_requests_failed_total": "counter",
    "etcd_request_seconds": "histogram",
    "instance_phase_since_timestamp_seconds": "gauge",
    "instance_next_start_timestamp_seconds": "gauge",
    "instance_last_exit_timestamp_seconds": "gauge",
    "instance_pinned": "gauge",
    "instance_vcpus": "gauge",
    "instance_ram_bytes": "gauge",
    "instance_cpu_wait_seconds_total": "counter",
    "instance_move_sent_bytes": "gauge",
    "instance_move_left_bytes": "gauge",
    "instance_disk_operations_total": "counter",
    "instance_disk_operation_seconds_total": "counter",
    "instance_disk_failed_operations_total": "counter",
    "instance_network_packets_total": "counter",
    "instance_network_dropped_packets_total": "counter",
    "instance_network_errors_total": "counter",
}


class Supervisor:
    """A stand-in that is scraped: assign `now`."""

    def __init__(self) -> None:
        self.now = Snapshot(etcd_up=False, session_remaining_s=0.0, watch_revision=0)
        self.metrics = Metrics(lambda: self.now, host=HERE, version="1.2.3", wall=lambda: 4000.0)

    def show(self, *instances: InstanceSample) -> None:
        self.now = Snapshot(
            etcd_up=True, session_remaining_s=12.5, watch_revision=4711, removals_held=3, orphans=2, instances=instances
        )

    def text(self) -> str:
        return self.metrics.render()[0].decode()

    def value(self, name: str, **labels: str) -> float | None:
        """The value of one sample, or None without it; of an instance's, on this host."""
        labels |= {"host": HERE} if "instance" in labels else {}
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                if sample.name == f"kvmsupervisor_{name}" and sample.labels == labels:
                    return sample.value
        return None

    def labels(self, label: str) -> set[str]:
        """Every value of a label in all metrics."""
        families = text_string_to_metric_families(self.text())
        return {s.labels[label] for family in families for s in family.samples if label in s.labels}


@pytest.fixture
def supervisor() -> Supervisor:
    return Supervisor()


def busy(supervisor: Supervisor) -> None:
    """Let everything that can be counted happen."""
    supervisor.show(
        InstanceSample(
            id=ONE,
            phase=Phase.RUNNING,
            run_state=RunState.RUNNING,
            epoch=7,
            pending=2,
            cpu_s=1.5,
            memory_bytes=123_456_789,
            accelerator="kvm",
            machine="pc-q35-7.2",
            placed_for="beta",
            disks=[
                DiskCounts(
                    name="disk0",
                    read_bytes=11,
                    written_bytes=12,
                    work=(("flush", Work(done=4, seconds=0.5, failed=1)),),
                )
            ],
            nics=[("nic0", Traffic(received=Flow(bytes=21, packets=3, dropped=1), sent=Flow(bytes=22, errors=2)))],
            plugged=[("nic0", True), ("nic1", False)],
            guest_memory=[("available", 31)],
            since=1_000.0,
            next_start=2_000.0,
            pinned=True,
            vcpus=2,
            ram_bytes=1 << 30,
            waited_s=0.25,
            move=Transfer(source=HERE, target="beta", sent_bytes=41, left_bytes=42),
        ),
        InstanceSample(id=TWO, phase=Phase.INVALID, invalid=True),
    )
    metrics = supervisor.metrics
    metrics.started(ONE)
    metrics.observed_start(0.07)
    for reason in ExitClass:
        metrics.exited(ONE, reason)
    metrics.internal_error(TWO)
    metrics.adopted()
    metrics.fenced(1)
    metrics.took_over()
    metrics.migrated(MigrationResult.COMPLETED, sent=4096, downtime_s=0.25)


def test_what_a_guest_does_is_counted(supervisor: Supervisor) -> None:
    """Each disk, each NIC and each kind of memory by its name, and what the machine is; nothing where there is none."""
    busy(supervisor)
    for name, labels, value in (
        ("instance_disk_read_bytes_total", {"disk": "disk0"}, 11),
        ("instance_disk_written_bytes_total", {"disk": "disk0"}, 12),
        ("instance_network_received_bytes_total", {"nic": "nic0"}, 21),
        ("instance_network_sent_bytes_total", {"nic": "nic0"}, 22),
        ("instance_guest_memory_bytes", {"kind": "available"}, 31),
        ("instance_disk_operations_total", {"disk": "disk0", "operation": "flush"}, 4),
        ("instance_disk_operation_seconds_total", {"disk": "disk0", "operation": "flush"}, 0.5),
        ("instance_disk_failed_operations_total", {"disk": "disk0", "operation": "flush"}, 1),
        ("instance_network_packets_total", {"nic": "nic0", "direction": "received"}, 3),
        ("instance_network_dropped_packets_total", {"nic": "nic0", "direction": "received"}, 1),
        ("instance_network_errors_total", {"nic": "nic0", "direction": "sent"}, 2),
        ("instance_phase_since_timestamp_seconds", {}, 1000),
        ("instance_next_start_timestamp_seconds", {}, 2000),
        ("instance_last_exit_timestamp_seconds", {}, 4000),
        ("instance_pinned", {}, 1),
        ("instance_vcpus", {}, 2),
        ("instance_ram_bytes", {}, 1 << 30),
        ("instance_cpu_wait_seconds_total", {}, 0.25),
        ("instance_move_sent_bytes", {}, 41),
        ("instance_move_left_bytes", {}, 42),
        ("instance_nic_plugged", {"nic": "nic0"}, 1),
        ("instance_nic_plugged", {"nic": "nic1"}, 0),
        ("instance_info", {"accelerator": "kvm", "machine": "pc-q35-7.2"}, 1),
    ):
        assert supervisor.value(name, instance=ONE, **labels) == value
    assert "instance_info{" + f'instance="{TWO}"' not in supervisor.text()


def test_every_series_of_an_instance_names_its_host(supervisor: Supervisor) -> None:
    """§7: two hosts that tell of one instance, while it moves, never tell of one series."""
    busy(supervisor)
    families = list(text_string_to_metric_families(supervisor.text()))
    of_instances = [sample for family in families for sample in family.samples if "instance" in sample.labels]
    assert {sample.labels.get("host") for sample in of_instances} == {HERE}


def test_how_guests_are_kept_is_told(supervisor: Supervisor) -> None:
    """Whether QEMU is root's, and whether guests end with the supervisor's container."""
    supervisor.now = Snapshot(
        etcd_up=True, session_remaining_s=1, watch_revision=1, qemu_privileged=True, guests_survive=False
    )
    assert (supervisor.value("qemu_privileged"), supervisor.value("guests_survive")) == (1, 0)


def promtool(body: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, timeout=30, check=False)


@pytest.mark.parametrize("is_busy", [False, True], ids=["fresh", "busy"])
def test_promtool_has_nothing_to_say(supervisor: Supervisor, is_busy: bool) -> None:
    """`promtool check metrics` passes without a warning, with and without instances."""
    if is_busy:
        busy(supervisor)
    checked = promtool(supervisor.metrics.render()[0])
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_promtool_would_say_something() -> None:
    """The check above can fail: a counter without its suffix is named."""
    assert promtool(b"# HELP x y\n# TYPE x counter\nx 1\n").returncode != 0


def test_every_name_of_the_contract_has_its_type(supervisor: Supervisor) -> None:
    """Names and types are what dashboards are written against: none missing, none more, none renamed."""
    found = dict(re.findall(r"^# TYPE kvmsupervisor_(\S+) (\S+)$", supervisor.text(), re.MULTILINE))
    assert found == CONTRACT


def test_gauges_follow_the_snapshot(supervisor: Supervisor) -> None:
    """Gauges tell what is so at the scrape, not what was so at some call before."""
    assert supervisor.value("etcd_up") == 0
    assert supervisor.value("orphans") is None
    busy(supervisor)
    assert supervisor.value("build_info", version="1.2.3") == 1
    assert supervisor.value("etcd_up") == 1
    assert supervisor.value("session_remaining_seconds") == 12.5
    assert supervisor.value("watch_revision") == 4711
    assert supervisor.value("removals_held") == 3
    assert supervisor.value("drained") == 0
    assert supervisor.value("drain_machines", state="left") is None
    supervisor.now = replace(supervisor.now, drain=(("left", 2), ("refused", 1)), drained=True)
    assert supervisor.value("drain_machines", state="left") == 2
    assert supervisor.value("drained") == 1
    assert supervisor.value("orphans") == 2
    assert supervisor.value("instance_up", instance=ONE) == 1
    assert supervisor.value("instance_lock_epoch", instance=ONE) == 7
    assert supervisor.value("instance_pending_changes", instance=ONE) == 2
    assert supervisor.value("instance_invalid", instance=ONE) == 0
    assert supervisor.value("instance_invalid", instance=TWO) == 1
    assert supervisor.value("instance_cpu_seconds_total", instance=ONE) == 1.5
    assert supervisor.value("instance_memory_bytes", instance=ONE) == 123_456_789
    supervisor.show(InstanceSample(id=ONE, phase=Phase.STOPPED))
    assert supervisor.value("instance_up", instance=ONE) == 0


def test_what_the_host_has_and_asks(supervisor: Supervisor) -> None:
    """Room for guests, whether etcd and Ceph answer, and how long that takes; nothing of what is not known."""
    assert supervisor.value("ceph_up") is None
    assert supervisor.value("host_cpus") is None
    assert supervisor.value("etcd_request_seconds_count") == 0
    took = Durations()
    took.took(0.001)
    took.took(0.3)
    took.took(99.0, failed=True)
    supervisor.now = replace(
        supervisor.now,
        host=HostSample(cpus=4, memory=(("total", 64), ("promised", 32))),
        draining=True,
        sessions_lost=2,
        ceph_up=False,
        fences_pending=3,
        etcd=took,
    )
    assert supervisor.value("host_memory_bytes", kind="promised") == 32
    told = ("host_cpus", "draining", "sessions_lost_total", "ceph_up", "fences_pending", "etcd_requests_failed_total")
    assert [supervisor.value(name) for name in told] == [4, 1, 2, 0, 3, 1]
    bounds = ("0.001", "0.25", "0.5", "5.0", "+Inf")
    assert [supervisor.value("etcd_request_seconds_bucket", le=bound) for bound in bounds] == [1, 1, 2, 2, 3]
    assert supervisor.value("etcd_request_seconds_sum") == pytest.approx(99.301)


def test_a_session_that_is_over_has_nothing_left(supervisor: Supervisor) -> None:
    """Remaining time is never negative."""
    supervisor.now = Snapshot(etcd_up=False, session_remaining_s=-3.0, watch_revision=1)
    assert supervisor.value("session_remaining_seconds") == 0


@pytest.mark.parametrize("phase", Phase)
def test_exactly_one_phase_is_1(supervisor: Supervisor, phase: Phase) -> None:
    """Every phase has its sample; only the present one is 1."""
    supervisor.show(InstanceSample(id=ONE, phase=phase))
    found = {each: supervisor.value("instance_phase", instance=ONE, phase=each) for each in Phase}
    assert found == {each: float(each is phase) for each in Phase}


@pytest.mark.parametrize("state", RunState)
def test_up_means_that_the_guest_runs(supervisor: Supervisor, state: RunState) -> None:
    """§4: a guest that does not run although QEMU lives is `running`, but not up, and its run state is told."""
    supervisor.show(InstanceSample(id=ONE, phase=Phase.RUNNING, run_state=state))
    assert supervisor.value("instance_up", instance=ONE) == (state is RunState.RUNNING)
    found = {each: supervisor.value("instance_run_state", instance=ONE, state=each) for each in RunState}
    assert found == {each: float(each is state) for each in RunState}


def test_run_states_are_a_small_set() -> None:
    """A label has a fixed set of values, whatever a newer QEMU says."""
    told = ("running", "io-error", "prelaunch", "other", "unknown", "a-new-one", None)
    assert [RunState.of(state).value for state in told] == [
        "running", "io-error", "other", "other", "other", "other", "unknown",
    ]  # fmt: skip


def test_without_a_process_there_is_no_usage(supervisor: Supervisor) -> None:
    """A stopped instance uses no 0 bytes: it has no sample."""
    supervisor.show(InstanceSample(id=ONE, phase=Phase.STOPPED))
    assert supervisor.value("instance_cpu_seconds_total", instance=ONE) is None
    assert supervisor.value("instance_memory_bytes", instance=ONE) is None


def test_counters_begin_at_0_and_count(supervisor: Supervisor) -> None:
    """An instance's counters are there before the first event, so that an alert sees the first step."""
    supervisor.show(InstanceSample(id=ONE, phase=Phase.WAITING))
    assert supervisor.value("instance_starts_total", instance=ONE) == 0
    assert [supervisor.value("instance_exits_total", instance=ONE, reason=each) for each in ExitClass] == [
        0.0 for _ in ExitClass
    ]
    assert supervisor.value("internal_errors_total", instance=ONE) == 0
    busy(supervisor)
    busy(supervisor)
    assert supervisor.value("instance_starts_total", instance=ONE) == 2
    assert supervisor.value("instance_exits_total", instance=ONE, reason="crashed") == 2
    assert supervisor.value("internal_errors_total", instance=TWO) == 2
    for name in ("adopted_total", "fences_total", "takeovers_total"):
        assert supervisor.value(name) == 2
    assert supervisor.value("migrations_total", result="completed") == 2
    assert supervisor.value("migration_sent_bytes_total") == 8192
    assert supervisor.value("migration_downtime_seconds_total") == 0.5
    assert supervisor.value("migrations_total", result="failed") == 0


def test_labels_are_bounded_by_what_is_here(supervisor: Supervisor) -> None:
    """A forgotten instance leaves no label behind; the others keep their counts."""
    busy(supervisor)
    assert supervisor.labels("instance") == {ONE, TWO}
    supervisor.show(InstanceSample(id=ONE, phase=Phase.RUNNING))
    supervisor.metrics.forget(TWO)
    supervisor.metrics.forget(InstanceId("never-seen"))
    assert supervisor.labels("instance") == {ONE}
    assert supervisor.value("instance_starts_total", instance=ONE) == 1


def test_start_times_fall_into_cumulative_buckets(supervisor: Supervisor) -> None:
    """A start counts in its own bucket (bounds included) and in every wider one; a longer one in +Inf only."""
    for seconds in (0.01, START_BUCKETS_S[0], 0.3, 1e9):
        supervisor.metrics.observed_start(seconds)
    assert supervisor.value("start_seconds_bucket", le="0.05") == 2
    assert supervisor.value("start_seconds_bucket", le="0.2") == 2
    assert supervisor.value("start_seconds_bucket", le="0.3") == 3
    assert supervisor.value("start_seconds_bucket", le="300.0") == 3
    assert supervisor.value("start_seconds_bucket", le="+Inf") == 4
    assert supervisor.value("start_seconds_count") == 4
    assert supervisor.value("start_seconds_sum") == pytest.approx(1e9 + 0.36)


def test_openmetrics_for_those_who_ask(supervisor: Supervisor) -> None:
    """The Accept header decides; both forms hold the same names, and OpenMetrics parses as such."""
    busy(supervisor)
    body, content_type = supervisor.metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in parse_openmetrics(body.decode())}  # type: ignore[no-untyped-call]
    assert {f"kvmsupervisor_{name.removesuffix('_total')}" for name in CONTRACT} <= names
    assert supervisor.metrics.render("text/html")[1].startswith("text/plain; version=0.0.4")


def test_one_registry_each(supervisor: Supervisor) -> None:
    """Nothing is registered process-wide: two supervisors in one process do not meet."""
    other = Supervisor()
    busy(other)
    assert supervisor.labels("instance") == set()
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("kvmsupervisor")]


def test_making_metrics_asks_for_nothing() -> None:
    """The first snapshot is taken at the first scrape: the supervisor is not yet complete before."""

    def premature() -> Snapshot:
        raise AssertionError("asked before anybody scraped")

    Metrics(premature, host=HERE, version="1")
