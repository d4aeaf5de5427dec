"""The dashboards of deploy/monitoring on a real Prometheus, which scrapes two real supervisors as that folder says."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain.status import Phase
from tests.support.again import start_again
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.etcd import free_port
from tests.support.firmware import RAM_MIB, Puppet

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"

CHOSEN = {"$job": "kvmsupervisor", "$host": ".*", "$instance": ".*", "$__rate_interval": "1m", "$__range": "1h"}

EMPTY = {
    "Memory as the guest counts it": "these guests have no balloon driver",
    "NICs that are plugged in": "QEMU's own network has no bridge",
    "Network: received": "it has no tap either, of which the kernel counts",
    "Network: sent": "the same",
    "Network: frames dropped": "the same",
    "Disks: time of one operation": "nothing is read or written within the minute that is looked at",
}
"""Panels without data here, and why."""


class Prometheus:
    """A server, and what it answers."""

    def __init__(self, folder: Path, *targets: str) -> None:
        self._folder = folder
        self._targets = targets

    def prepare(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"

    def start(self) -> None:
        config = (FOLDER / "prometheus.yml").read_text()
        shown = "          - alpha:9746\n          - beta:9746\n"
        assert shown in config
        config = config.replace(shown, "".join(f"          - {target}\n" for target in self._targets))
        file = self._folder / "prometheus.yml"
        file.write_text(config.replace("interval: 15s", "interval: 1s"))
        (self._folder / "alerts.yml").write_bytes((FOLDER / "alerts.yml").read_bytes())
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus", f"--config.file={file}", f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        eventually("Prometheus to be ready", self._is_ready)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as reply:  # noqa: S310 - our own
                return bool(reply.status == 200)
        except OSError:
            return False

    def close(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The samples of a query now.

        Raises:
            urllib.error.HTTPError: it is none.
        """
        words = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{words}", timeout=30) as reply:  # noqa: S310 - our own
            found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
        return found


@contextlib.contextmanager
def running(folder: Path, *targets: str) -> Iterator[Prometheus]:
    one = Prometheus(folder, *targets)
    start_again(
        prepare=one.prepare, start=one.start, close=one.close, lost=lambda error: "address already in use" in str(error)
    )
    try:
        yield one
    finally:
        one.close()


def queries() -> list[tuple[str, str]]:
    """Each query of the dashboards, with what is chosen, and the title of its panel."""
    found = []
    for name in ("cluster", "instance"):
        for panel in json.loads((FOLDER / f"{name}.json").read_text())["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"]
                for variable, value in CHOSEN.items():
                    query = query.replace(variable, value)
                found.append((panel["title"], query))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "prometheus"
    made.mkdir()
    return made


def test_each_panel_shows_something(keys: Keys, hosts: Hosts, puppet: Puppet, tmp_path: Path, folder: Path) -> None:
    """Law: every query is understood, and has data of two hosts with machines that run, wait, end and are wrong."""
    alpha, beta = (hosts(name, KVM_DISK_DIR=str(tmp_path)).start() for name in ("alpha", "beta"))
    common = {"ram": RAM_MIB, "extra_flags": puppet.extra_flags(), "restart": "on-failure"}
    network = {"bridge": ":user", "mac": "52:54:00:00:00:01"}
    keys.machines("alpha", "runs", **{"disk/0": "file:a.raw size=1M"}, **network, **common)
    keys.machines("beta", "panics", **common)
    keys.machines("beta", "waits", **{"disk/0": "file:none.raw"}, **common)
    alpha.wait_running("runs")
    beta.wait_running("panics")
    beta.hears("panics", "HELLO from")
    beta.say("panics", "panic")
    beta.wait_for("panics", lambda status: status.phase is Phase.RUNNING and status.restarts == 1)

    asked = queries()
    assert {title for title, _ in asked} >= set(EMPTY)
    with running(folder, *(host.url.removeprefix("http://") for host in (alpha, beta))) as prometheus:

        def are_silent() -> list[str]:
            return [query for title, query in asked if title not in EMPTY and not prometheus.ask(query)]

        with contextlib.suppress(AssertionError):
            eventually("data in each panel", lambda: not are_silent(), 60)
        assert are_silent() == []
        # An instance is named by its own label, whatever address was scraped.
        found = prometheus.ask("kvmsupervisor_instance_up == 1")
        assert {(one["metric"]["instance"], one["metric"]["host"]) for one in found} >= {("runs", "alpha")}
