"""The benchmarks still run. What they measure is judged by people, on a quiet machine, never by a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.figures import Figure, Sample, markdown, milliseconds, within

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["imports", "starts", "prefix", "simulation", "bystander", "clones", "page"])
def test_a_benchmark_yields_its_figures(name: str) -> None:
    """With real programs, and without touching the results that are on record."""
    before = [path.read_bytes() for path in (ROOT / "bench").glob("RESULTS.md")]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--only", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = {
        "imports": "grpc.aio",
        "starts": "bare spawn",
        "prefix": "etcdctl get",
        "simulation": "additions",
        "bystander": "does nothing",
        "clones": "rbd clone",
        "page": "a viewer is told",
    }
    assert shown[name] in done.stdout
    assert before == [path.read_bytes() for path in (ROOT / "bench").glob("RESULTS.md")]


def test_a_budget_is_judged_by_medians() -> None:
    """One slow outlier misses no budget, and the summand counts."""
    reference = Sample.of([0.040, 0.040, 0.500])
    assert within(Sample.of([0.056, 0.055, 0.900]), reference, 1.15, 0.010)
    assert not within(Sample.of([0.057, 0.057, 0.001]), reference, 1.15, 0.010)
    assert not within(Sample.of([0.056]), reference, 1.15)


def test_a_missed_budget_is_shown() -> None:
    """In the page too, with the ratio and the reference that it comes from."""
    figure = Figure(
        what="start",
        measured=Sample.of([0.080]),
        unit=milliseconds,
        reference=Sample.of([0.030, 0.040, 0.050]),
        reference_is="bare",
        budget="≤ 1.15 ×",
        met=False,
        notes=("noisy",),
    )
    page = markdown([figure], ["two cores"])
    assert "| start | 80.0 ms | 40.0 ms (30.0 ms – 50.0 ms, n=3) bare | 2.00 | ≤ 1.15 × | MISSED |" in page
    assert "- two cores" in page
    assert "- start: noisy" in page
