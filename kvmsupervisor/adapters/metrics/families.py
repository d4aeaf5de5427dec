"""Families of series, with the prefix that all names have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

PREFIX = "kvmsupervisor_"


def gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    """A family of gauges."""
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415 - see the package

    return GaugeMetricFamily(PREFIX + name, documentation, labels=labels)


def counter(name: str, documentation: str, *labels: str) -> CounterMetricFamily:
    """A family of counters."""
    from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415 - see the package

    return CounterMetricFamily(PREFIX + name, documentation, labels=labels)


def histogram(
    name: str, documentation: str, bounds: Sequence[float], counts: Sequence[int], total: float
) -> HistogramMetricFamily:
    """One histogram.

    Args:
        name: of it.
        documentation: of it.
        bounds: upper bounds of its buckets, in rising order.
        counts: how many fell into each of them and no narrower one, and at last those beyond all.
        total: the sum of all values.
    """
    from prometheus_client.core import HistogramMetricFamily  # noqa: PLC0415 - see the package

    made = HistogramMetricFamily(PREFIX + name, documentation, labels=())
    # Prometheus' buckets are cumulative.
    made.add_metric([], list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True)), total)
    return made
