"""The families of instances, from what is so at the scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvmsupervisor.adapters.metrics.families import counter, gauge
from kvmsupervisor.adapters.metrics.samples import InstanceSample
from kvmsupervisor.domain.run_state import RunState
from kvmsupervisor.domain.status import Phase

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Value = Callable[[InstanceSample], float | None]

GAUGES: tuple[tuple[str, str, Value], ...] = (
    ("up", "Whether the instance's guest runs.", lambda one: one.run_state is RunState.RUNNING),
    ("lock_epoch", "Epoch of the instance's lock; it grows at each start.", lambda one: one.epoch),
    ("pending_changes", "Keys that take effect at the next restart.", lambda one: one.pending),
    ("invalid", "Whether any key of the instance has a problem.", lambda one: one.invalid),
    ("unguarded", "Whether QEMU should be watched by the guard, and is not.", lambda one: one.unguarded),
    ("host_absent", "Whether its `host` has no session, so that it stays here.", lambda one: one.host_absent),
    ("pinned", "Whether only this host may start it: its disks cannot be fenced.", lambda one: one.pinned),
    ("phase_since_timestamp_seconds", "When its phase began.", lambda one: one.since),
    ("next_start_timestamp_seconds", "When it is started again, while it waits for that.", lambda one: one.next_start),
    ("memory_bytes", "Resident memory of the instance's QEMU process.", lambda one: one.memory_bytes),
    ("threads", "Threads of the instance's QEMU process.", lambda one: one.threads),
    ("open_files", "Files that the instance's QEMU process has open.", lambda one: one.files),
    ("vcpus", "Processors of its guest.", lambda one: one.vcpus),
    ("ram_bytes", "Memory of its guest.", lambda one: one.ram_bytes),
    (
        "move_sent_bytes",
        "Bytes sent of a live move that is under way.",
        lambda one: None if one.move is None else one.move.sent_bytes,
    ),
    (
        "move_left_bytes",
        "Bytes of it that are left, as QEMU guesses.",
        lambda one: None if one.move is None else one.move.left_bytes,
    ),
)
"""Of each instance one series, where there is a value: name behind `instance_`, documentation, value."""

COUNTERS: tuple[tuple[str, str, Value], ...] = (
    ("cpu_seconds_total", "CPU seconds used by the instance's QEMU process.", lambda one: one.cpu_s),
    ("cpu_wait_seconds_total", "Seconds that its vCPUs waited for a processor.", lambda one: one.waited_s),
)


def of_instances(samples: Sequence[InstanceSample]) -> Iterator[Metric]:
    """What an instance is, and what its QEMU process uses."""
    phase = gauge("instance_phase", "1 for the phase that the instance is in, else 0.", "instance", "phase")
    run_state = gauge("instance_run_state", "1 for the state that its guest is in, else 0.", "instance", "state")
    placed = gauge("instance_placed", "1 while it runs in the place of its home.", "instance", "home")
    what = "Always 1; the labels say what the machine is."
    info = gauge("instance_info", what, "instance", "accelerator", "machine")
    for sample in samples:
        for each in Phase:
            phase.add_metric([sample.id, each], sample.phase is each)
        for state in RunState:
            run_state.add_metric([sample.id, state], sample.run_state is state)
        if sample.placed_for is not None:
            placed.add_metric([sample.id, sample.placed_for], 1)
        if sample.accelerator is not None:
            info.add_metric([sample.id, sample.accelerator, sample.machine or ""], 1)
    yield from (phase, run_state, placed, info)
    for make, table in ((gauge, GAUGES), (counter, COUNTERS)):
        for name, documentation, value in table:
            family = make(f"instance_{name}", documentation, "instance")
            for sample in samples:
                if (found := value(sample)) is not None:
                    family.add_metric([sample.id], found)
            yield family


def of_guests(samples: Sequence[InstanceSample]) -> Iterator[Metric]:
    """What guests do with their disks and NICs, and with their memory."""
    yield from _of_disks(samples)
    yield from _of_nics(samples)
    memory = gauge("instance_guest_memory_bytes", "Memory as the guest itself counts it.", "instance", "kind")
    for sample in samples:
        for kind, value in sample.guest_memory:
            memory.add_metric([sample.id, kind], value)
    yield memory


def _of_disks(samples: Sequence[InstanceSample]) -> Iterator[Metric]:
    by_disk, by_operation = ("instance", "disk"), ("instance", "disk", "operation")
    read = counter("instance_disk_read_bytes_total", "Bytes that the guest read.", *by_disk)
    written = counter("instance_disk_written_bytes_total", "Bytes that the guest wrote.", *by_disk)
    done = counter("instance_disk_operations_total", "Reads, writes and flushes that were done.", *by_operation)
    spent = counter("instance_disk_operation_seconds_total", "Seconds that they took, each by itself.", *by_operation)
    failed = counter("instance_disk_failed_operations_total", "Those that failed.", *by_operation)
    for sample in samples:
        for disk in sample.disks:
            read.add_metric([sample.id, disk.name], disk.read_bytes)
            written.add_metric([sample.id, disk.name], disk.written_bytes)
            for operation, work in disk.work:
                labels = [sample.id, disk.name, operation]
                done.add_metric(labels, work.done)
                spent.add_metric(labels, work.seconds)
                failed.add_metric(labels, work.failed)
    yield from (read, written, done, spent, failed)


def _of_nics(samples: Sequence[InstanceSample]) -> Iterator[Metric]:
    by_nic, by_direction = ("instance", "nic"), ("instance", "nic", "direction")
    received = counter("instance_network_received_bytes_total", "Bytes to the guest.", *by_nic)
    sent = counter("instance_network_sent_bytes_total", "Bytes from the guest.", *by_nic)
    packets = counter("instance_network_packets_total", "Frames to and from the guest.", *by_direction)
    dropped = counter("instance_network_dropped_packets_total", "Those that its tap dropped.", *by_direction)
    errors = counter("instance_network_errors_total", "Errors of its tap.", *by_direction)
    plugged = gauge("instance_nic_plugged", "Whether frames pass between a NIC and a bridge.", *by_nic)
    for sample in samples:
        for name, traffic in sample.nics:
            received.add_metric([sample.id, name], traffic.received.bytes)
            sent.add_metric([sample.id, name], traffic.sent.bytes)
            for direction, flow in (("received", traffic.received), ("sent", traffic.sent)):
                labels = [sample.id, name, direction]
                packets.add_metric(labels, flow.packets)
                dropped.add_metric(labels, flow.dropped)
                errors.add_metric(labels, flow.errors)
        for name, is_plugged in sample.plugged:
            plugged.add_metric([sample.id, name], is_plugged)
    yield from (received, sent, packets, dropped, errors, plugged)
