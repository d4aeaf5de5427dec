"""The `kvmsupervisor_` metrics that Prometheus scrapes, in a registry of their own.

Gauges come from a `Snapshot` that is taken during the scrape; counters are methods that the supervisor calls. Label
values are the instances of this host and small fixed sets only. A metric with the label `instance` also has `host`,
which `Metrics.collect` adds. docs/metrics.md explains each metric.

The library that writes Prometheus' formats is imported by the first scrape: it brings a whole HTTP server, for which no
start should wait.

Sources: https://prometheus.io/docs/practices/naming/ and
https://prometheus.io/docs/instrumenting/writing_clientlibs/.
"""

from kvmsupervisor.adapters.metrics.registry import START_BUCKETS_S, Metrics, MigrationResult, SnapshotResult
from kvmsupervisor.adapters.metrics.samples import HostSample, InstanceSample, Snapshot

__all__ = [
    "START_BUCKETS_S",
    "HostSample",
    "InstanceSample",
    "Metrics",
    "MigrationResult",
    "Snapshot",
    "SnapshotResult",
]
