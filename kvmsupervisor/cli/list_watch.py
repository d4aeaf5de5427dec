"""`list --watch`: the list on a terminal, kept in step; in a pipe each row that has changed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli import views
from kvmsupervisor.cli.common import Tools, with_store
from kvmsupervisor.cli.filters import Filters
from kvmsupervisor.cli.output import Cell, Column, OutputFormat, echo_table, on_terminal, plain_table, printable
from kvmsupervisor.cli.watching import clusters
from kvmsupervisor.cluster.overview import Cluster, as_object
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.keys import InstanceId

AGES_S = 5.0
"""How often ages are shown anew on a terminal, from memory. Arbitrary: a person sees that it lives."""

GONE = "gone"


def watch_list(tools: Tools, filters: Filters, output: OutputFormat) -> None:
    """Show the list, and go on with it until the reader leaves."""
    terminal = on_terminal(sys.stdout) and output != "json"
    show = _Screen(tools, wide=output == "wide") if terminal else _Lines(tools, output)

    async def work(store: Store, settings: Settings) -> None:
        async with aclosing(clusters(store, settings.layout, again_s=AGES_S if terminal else None)) as found:
            async for cluster in found:
                show.show(cluster, filters)

    with_store(tools, work)


class _Screen:
    """A terminal, cleared for each list."""

    def __init__(self, tools: Tools, *, wide: bool) -> None:
        self._tools = tools
        self._wide = wide

    def show(self, cluster: Cluster, filters: Filters) -> None:
        """Show as many rows as fit."""
        now = self._tools.now()
        instances = filters.choose(cluster.instances.values(), cluster)
        room = max(1, shutil.get_terminal_size().lines - 3)
        rows = [views.list_row(one, cluster, now, wide=self._wide) for one in instances[:room]]
        click.clear()
        echo_table(views.WIDE_COLUMNS if self._wide else views.LIST_COLUMNS, rows)
        left = len(instances) - len(rows)
        said = now.astimezone().strftime("%H:%M:%S")
        click.echo(f"{said}, {len(instances)} instances{f', {left} of them not shown' if left else ''}; Ctrl-C ends")


class _Lines:
    """A pipe: all rows at first, then those that differ in more than their age."""

    def __init__(self, tools: Tools, output: OutputFormat) -> None:
        self._tools = tools
        self._output = output
        self._columns: Sequence[Column] = views.WIDE_COLUMNS if output == "wide" else views.LIST_COLUMNS
        self._shown: Mapping[InstanceId, object] | None = None

    def show(self, cluster: Cluster, filters: Filters) -> None:
        """Print the rows that are new or differ, and the ids of those that are there no more."""
        instances = {one.id: one for one in filters.choose(cluster.instances.values(), cluster)}
        now = self._tools.now()
        if self._output == "json":
            objects = {name: as_object(one, cluster) for name, one in instances.items()}
            for name in self._differing(objects):
                click.echo(json.dumps(objects.get(name, {"id": name, "phase": GONE})))
            return
        wide = self._output == "wide"
        rows = {name: views.list_row(one, cluster, now, wide=wide) for name, one in instances.items()}
        age = next(number for number, column in enumerate(self._columns) if column.title == "AGE")
        first = self._shown is None
        differing = self._differing({name: [*row[:age], *row[age + 1 :]] for name, row in rows.items()})
        lines = plain_table(self._columns, [rows.get(name) or self._gone(name) for name in differing])
        for number, line in enumerate(lines):
            if number or first:
                click.echo(line)

    def _gone(self, name: InstanceId) -> list[Cell]:
        texts = {"ID": name, "PHASE": GONE}
        return [Cell(printable(texts.get(column.title, "-"))) for column in self._columns]

    def _differing(self, found: Mapping[InstanceId, object]) -> list[InstanceId]:
        before, self._shown = self._shown or {}, found
        return [*(name for name, value in found.items() if before.get(name) != value), *(before.keys() - found.keys())]
