"""What deploy/monitoring has for Prometheus and Grafana, without a server of either."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.test_metrics import CONTRACT

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
NAMES = re.compile(r"kvmsupervisor_([a-z_]+)")


def named(text: str) -> set[str]:
    """The metrics that a text names; of a histogram, the histogram."""
    return {
        re.sub(r"^(start_seconds|etcd_request_seconds)_(bucket|count|sum)$", r"\1", name)
        for name in NAMES.findall(text)
    }


@pytest.fixture(params=["cluster", "instance"])
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{request.param}.json").read_text())
    return found


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_prometheus_takes_the_files() -> None:
    """`promtool check config` reads the scrape configuration, and the alerts that it names."""
    done = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"],
        cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout


def test_the_page_has_every_metric() -> None:
    """docs/metrics.md names the metrics that there are: none missing, none more."""
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `kvm")]
    assert {name for row in rows for name in named(row.split("|")[1])} == set(CONTRACT)


@pytest.mark.parametrize("file", ["cluster.json", "instance.json", "alerts.yml"])
def test_only_metrics_that_exist_are_named(file: str) -> None:
    """Law: nothing asks for a metric that no supervisor has."""
    found = named((FOLDER / file).read_text().replace("kvmsupervisor_instance_$", ""))
    assert found
    assert found <= set(CONTRACT)


def test_each_panel_explains_itself(dashboard: dict[str, Any]) -> None:
    """A title, a sentence, a unit, and the data source that the person has chosen."""
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {one["datasource"]["uid"] for one in (panel, *panel["targets"])} == {"${datasource}"}


def test_each_query_keeps_to_what_is_chosen(dashboard: dict[str, Any]) -> None:
    """Law: every series is of the job that was chosen, and every rate spans as many scrapes as it needs."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            for selector in re.findall(r"(?:kvmsupervisor_\w+|\bup)(\{[^}]*\})?", target["expr"]):
                assert 'job=~"$job"' in selector, target["expr"]
            for span in re.findall(r"\[([^]]*)\]", target["expr"]):
                assert span in {"$__rate_interval", "$__range"}


def test_panels_lie_beside_each_other(dashboard: dict[str, Any]) -> None:
    """No two overlap, none is wider than the page, and no two have one number."""

    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        return {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}

    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])
    assert not any(cells(one) & cells(other) for one, other in combinations(dashboard["panels"], 2))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
