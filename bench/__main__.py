"""`python -m bench`: measure, print the table, and write `bench/RESULTS.md` when everything was measured in full."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click
import psutil
from rich.console import Console
from rich.status import Status

from bench import bystander, clones, disk, fleet, imports, page, prefix, simulation, starts
from bench.figures import Figure, markdown, show
from bench.rig import Rig

RESULTS = Path(__file__).with_name("RESULTS.md")

Benchmark = Callable[[Rig], Iterator[Figure]]

FULL: Mapping[str, Benchmark] = {
    "imports": lambda rig: imports.measure(rig, rounds=15),
    "starts": lambda rig: starts.measure(rig, pairs=25),
    "fleet": lambda rig: fleet.measure(rig, machines=100, rounds=3, settle_s=20.0, idle_s=60.0, adoptions=5),
    "prefix": lambda rig: prefix.measure(rig, instances=10_000, rounds=5),
    "simulation": lambda rig: simulation.measure(rig, seeds=25),
    "bystander": lambda rig: bystander.measure(rig, instances=1000, events=2000, rounds=5),
    "disk": lambda rig: disk.measure(rig, rounds=15),
    "clones": lambda rig: clones.measure(rig, machines=50, rounds=3),
    "page": lambda rig: page.measure(rig, instances=1000, viewers=20, settle_s=10.0, idle_s=60.0, changes=15),
}

QUICK: Mapping[str, Benchmark] = {
    "imports": lambda rig: imports.measure(rig, rounds=1),
    "starts": lambda rig: starts.measure(rig, pairs=2),
    "fleet": lambda rig: fleet.measure(rig, machines=4, rounds=1, settle_s=1.0, idle_s=2.0, adoptions=1),
    "prefix": lambda rig: prefix.measure(rig, instances=100, rounds=1),
    "simulation": lambda rig: simulation.measure(rig, seeds=1),
    "bystander": lambda rig: bystander.measure(rig, instances=10, events=20, rounds=1),
    "disk": lambda rig: disk.measure(rig, rounds=1),
    "clones": lambda rig: clones.measure(rig, machines=2, rounds=1),
    "page": lambda rig: page.measure(rig, instances=10, viewers=2, settle_s=0.5, idle_s=1.0, changes=2),
}
"""The same with the least that makes a figure. They say nothing about the budgets."""


@click.command()
@click.option("--only", type=click.Choice(list(FULL)), multiple=True, help="Measure this alone; may be repeated.")
@click.option("--quick", is_flag=True, help="See that it works, in seconds; the figures mean nothing.")
def main(only: tuple[str, ...], quick: bool) -> int:
    """Measure the budgets. RESULTS.md is written by a run that is neither quick nor partial.

    Exit code 1: a budget is missed.
    """
    console = Console(stderr=not sys.stdout.isatty())
    table = {name: run for name, run in (QUICK if quick else FULL).items() if not only or name in only}
    begun, load = datetime.now(UTC), os.getloadavg()
    figures: list[Figure] = []
    with console.status("") as status:
        for name, run in table.items():
            # An etcd for each: what one has written is no burden for the next.
            with Rig(partial(_tell, status, name)) as rig:
                figures += run(rig)
    surroundings = _surroundings(begun, load)
    out = Console(width=None if sys.stdout.isatty() else 200)
    show(figures, out)
    for line in surroundings:
        out.print(line, highlight=False)
    if not quick and not only:
        RESULTS.write_text(markdown(figures, surroundings))
        out.print(f"written to {RESULTS}", highlight=False)
    return 1 if not quick and any(figure.met is False for figure in figures) else 0


def _tell(status: Status, name: str, said: str) -> None:
    status.update(f"{name}: {said}")


def _surroundings(begun: datetime, load: tuple[float, float, float]) -> list[str]:
    """When, on what machine, with which programs."""
    programs = {"QEMU": ["qemu-system-x86_64", "--version"], "etcd": ["etcd", "--version"]}
    versions = [f"{name} {_version(argv)}" for name, argv in programs.items()]
    versions += [f"{name} {version(name)}" for name in ("grpcio", "protobuf", "h11", "kvmsupervisor")]
    now = os.getloadavg()
    return [
        f"begun {begun:%Y-%m-%d %H:%M} UTC, took {(datetime.now(UTC) - begun).total_seconds() / 60:.0f} min",
        f"{len(os.sched_getaffinity(0))} CPUs ({_cpu_model()}), {psutil.virtual_memory().total / 2**30:.0f} GiB; "
        f"load average {load[0]:.1f} at the begin, {now[0]:.1f} at the end",
        f"Linux {platform.release()}, Python {platform.python_version()}, {', '.join(versions)}",
    ]


def _version(argv: list[str]) -> str:
    first = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return next(word for word in first.split() if word[0].isdigit())


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main(standalone_mode=False))
