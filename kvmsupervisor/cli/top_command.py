"""`top`: which instances use the hosts, by what their supervisors count: processor, memory, disks, network.

Each host is asked for its metrics, which it has in memory; etcd is asked at each turn which hosts there are. A host
that does not answer is named. What a host says may be anybody's: it is bounded, and printed as text of strangers.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli.common import HOST, Tools, pass_tools, with_store
from kvmsupervisor.cli.output import NOTHING, Cell, Column, echo_json, echo_table, note, on_terminal
from kvmsupervisor.cluster.overview import list_all
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host import HostSession

COLUMNS = (
    Column(title="INSTANCE"),
    Column(title="HOST"),
    Column(title="CPU", right=True),
    Column(title="MEMORY", right=True),
    Column(title="READ/S", right=True),
    Column(title="WRITTEN/S", right=True),
    Column(title="RECEIVED/S", right=True),
    Column(title="SENT/S", right=True),
)

INTERVAL_S = 2.0
"""Default of `--interval`. Arbitrary: top(1) has 3 s; supervisors count disks as often as they are asked."""

ASKED_AT_ONCE = 16
"""Hosts asked at the same time. Arbitrary: a slow one must not hold up the others."""

COUNTED = {
    "instance_cpu_seconds_total": "cpu",
    "instance_memory_bytes": "memory",
    "instance_disk_read_bytes_total": "read",
    "instance_disk_written_bytes_total": "written",
    "instance_network_received_bytes_total": "received",
    "instance_network_sent_bytes_total": "sent",
}
"""Metrics, and what they count here. Of several disks or NICs the sum is shown."""

SORTED_BY: Mapping[str, Sequence[str]] = {
    "cpu": ["cpu"],
    "memory": ["memory"],
    "disk": ["read", "written"],
    "network": ["received", "sent"],
}

_LINE = re.compile(r"kvmsupervisor_(\w+)\{([^\n]*)\} ([0-9.eE+-]{1,30})")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Counts = Mapping[tuple[str, str], Mapping[str, float]]
"""By host and instance: what was counted."""


@frozen
class Taken:
    """What the hosts said at one time.

    Attributes:
        at: monotonic time in seconds.
        counts: of their instances.
        silent: hosts that did not answer.
    """

    at: float
    counts: Counts
    silent: tuple[str, ...]


@frozen(kw_only=True)
class Usage:
    """One instance's use between two times: `rates` in a second (of `cpu` seconds), None where it is not known."""

    instance: str
    host: str
    memory: float | None
    rates: Mapping[str, float | None]

    def value(self, name: str) -> float | None:
        """By the name of a column."""
        return self.memory if name == "memory" else self.rates.get(name)


@click.command()
@click.option("--host", "hosts", type=HOST, multiple=True, help="Only this host; may be repeated.")
@click.option(
    "--sort", "by", type=click.Choice(list(SORTED_BY)), default="cpu", show_default=True, help="What comes first."
)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.2, max=3600),
    default=INTERVAL_S,
    show_default=True,
    metavar="SECONDS",
    help="Over how long the use is measured.",
)
@click.option(
    "-n", "--count", type=click.IntRange(min=1), metavar="N", help="End after N lists; in a pipe, 1 is the default."
)
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="The format."
)
@pass_tools
def top(tools: Tools, *, hosts: Sequence[str], by: str, interval: float, count: int | None, output: str) -> None:
    """Show which instances use processor, memory, disks and network, the greediest first.

    CPU is in percent of one core, MEMORY what QEMU has resident, the others bytes in a second. The figures are those of
    the hosts' metrics, which this machine has to reach (`KVM_LISTEN`). A terminal is kept up until Ctrl-C.

    Example: kvmsupervisor top --sort disk --host alpha
    """
    terminal = on_terminal(sys.stdout) and output == "table"
    left = count if count is not None else (None if terminal else 1)
    before = _take(tools, hosts)
    while left is None or left > 0:
        time.sleep(interval)
        now = _take(tools, hosts)
        _show(usages(before, now), now, by=by, output=output, terminal=terminal)
        before, left = now, None if left is None else left - 1


def _take(tools: Tools, only: Sequence[str]) -> Taken:
    """Ask all hosts at once."""

    async def work(store: Store, settings: Settings) -> dict[str, HostSession | None]:
        prefix = settings.layout.hosts_prefix
        listing = await list_all(store, prefix)
        return {
            kv.key.decode(errors="replace").removeprefix(prefix): HostSession.from_json(kv.value) for kv in listing.kvs
        }

    urls = {
        host: session.url for host, session in with_store(tools, work).items() if session is not None and session.url
    }
    asked = {host: url for host, url in urls.items() if not only or host in only}
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        texts = dict(zip(asked, pool.map(tools.metrics_of, asked.values()), strict=True))
    counts: dict[tuple[str, str], dict[str, float]] = {}
    for host, text in texts.items():
        for instance, found in counted(text or "").items():
            counts[host, instance] = found
    silent = [host for host, text in texts.items() if text is None] + [host for host in only if host not in urls]
    return Taken(time.monotonic(), counts, tuple(silent))


def counted(text: str) -> dict[str, dict[str, float]]:
    """What the metrics of one host count, by instance."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None or (name := COUNTED.get(match[1])) is None:
            continue
        instance = dict(_LABEL.findall(match[2])).get("instance")
        try:
            value = float(match[3])
        except ValueError:
            continue
        if instance is not None:
            sums = found.setdefault(instance, {})
            sums[name] = sums.get(name, 0.0) + value
    return found


def usages(before: Taken, now: Taken) -> list[Usage]:
    """The use between two times, of the instances that are there now."""
    seconds = max(now.at - before.at, 1e-3)
    return [
        Usage(
            instance=instance,
            host=host,
            memory=values.get("memory"),
            rates={
                name: _rate(before.counts.get((host, instance), {}), values, name, seconds) for name in COUNTED.values()
            },
        )
        for (host, instance), values in now.counts.items()
        if values
    ]


def _rate(before: Mapping[str, float], now: Mapping[str, float], name: str, seconds: float) -> float | None:
    """None where it was not counted both times, or began anew."""
    if name not in before or name not in now or now[name] < before[name]:
        return None
    return (now[name] - before[name]) / seconds


def _show(found: Sequence[Usage], now: Taken, *, by: str, output: str, terminal: bool) -> None:
    ordered = sorted(found, key=lambda one: (-sum(one.value(name) or 0.0 for name in SORTED_BY[by]), one.instance))
    if output == "json":
        echo_json([_object(one) for one in ordered])
    else:
        room = max(1, shutil.get_terminal_size().lines - 3) if terminal else len(ordered)
        if terminal:
            click.clear()
        echo_table(COLUMNS, [_row(one) for one in ordered[:room]])
        if room < len(ordered):
            note(f"{len(ordered) - room} more are not shown")
    if now.silent:
        note(f"no answer from {', '.join(now.silent)}")


def _object(usage: Usage) -> dict[str, object]:
    names = ("read", "written", "received", "sent")
    rates = {f"{name}_bytes_per_second": usage.rates[name] for name in names}
    cores = {"cpu_cores": usage.rates["cpu"], "memory_bytes": usage.memory}
    return {"instance": usage.instance, "host": usage.host, **cores, **rates}


def _row(usage: Usage) -> list[Cell]:
    cpu = usage.rates["cpu"]
    return [
        Cell(usage.instance, "bold"),
        Cell(usage.host),
        Cell(NOTHING if cpu is None else f"{100 * cpu:.0f}%"),
        Cell(size(usage.memory)),
        *(Cell(size(usage.rates[name])) for name in ("read", "written", "received", "sent")),
    ]


def size(value: float | None) -> str:
    """Bytes in the unit that leaves few digits."""
    if value is None:
        return NOTHING
    for unit in ("", "K", "M", "G"):
        if value < 1000:
            return f"{value:.0f}{unit}"
        value /= 1024
    return f"{value:.0f}T"
