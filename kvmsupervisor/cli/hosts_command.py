"""`hosts`: each host with a session, and each that has left something and has none."""

from __future__ import annotations

from datetime import datetime

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli.common import Tools, output_option, pass_tools, with_store
from kvmsupervisor.cli.output import NOTHING, Cell, Column, OutputFormat, age, echo_json, echo_table, note
from kvmsupervisor.cluster.host_table import DRAINED, DRAINING, NO_SESSION, UNREADABLE, UP, HostFact, facts_of
from kvmsupervisor.cluster.overview import Cluster, read_cluster
from kvmsupervisor.config.settings import Settings

COLUMNS = (
    Column(title="HOST"),
    Column(title="STATE"),
    Column(title="SINCE", right=True),
    Column(title="RUNNING", right=True),
    Column(title="PROMISED", right=True),
    Column(title="MEMORY", right=True),
    Column(title="CPUS", right=True, spare=True),
    Column(title="RELEASE", spare=True),
    Column(title="NOTICE", long=True),
)
WIDE_COLUMNS = (
    *COLUMNS[:-1],
    Column(title="URL"),
    Column(title="GUESTS", right=True),
    Column(title="LOCKS", long=True, label="locks: "),
    COLUMNS[-1],
)

STYLES = {UP: "green", DRAINING: "yellow", DRAINED: "cyan", NO_SESSION: "magenta", UNREADABLE: "red"}


@click.command()
@output_option
@pass_tools
def hosts(tools: Tools, output: OutputFormat) -> None:
    """List the hosts: their state, what runs there, and the memory that is promised.

    `up` has a session, `draining` empties itself or shuts all its guests down, `drained` is empty, `no session` has
    left locks or statuses and is off, cut off, or without a supervisor. RUNNING counts guests that run; PROMISED is the
    memory of the instances whose locks the host holds, of MEMORY. SINCE is how long its supervisor runs. `-o wide` adds
    its address, the memory for guests, and these instances.

    Example: kvmsupervisor hosts -o wide
    """

    async def work(store: Store, settings: Settings) -> Cluster:
        return await read_cluster(store, settings.layout)

    found = facts_of(with_store(tools, work))
    if output == "json":
        echo_json([fact.to_object() for fact in found])
    elif found:
        wide = output == "wide"
        now = tools.now()
        echo_table(WIDE_COLUMNS if wide else COLUMNS, [_row(fact, now, wide=wide) for fact in found])
    else:
        note("no host has a session, and none has left anything")


def _row(fact: HostFact, now: datetime, *, wide: bool) -> list[Cell]:
    session = fact.session
    cells = [
        Cell(fact.host, "bold"),
        Cell(fact.state, STYLES[fact.state]),
        Cell(NOTHING if session is None or not session.started else age(session.started, now)),
        Cell(str(len(fact.running)) if fact.state != NO_SESSION else NOTHING),
        Cell(f"{fact.promised_mib}M"),
        Cell(NOTHING if session is None or not session.memory_mib else f"{session.memory_mib}M"),
        Cell(NOTHING if session is None or not session.cpus else str(session.cpus)),
        Cell(NOTHING if session is None else session.version),
    ]
    if wide:
        for_guests = NOTHING if session is None or not session.guests_mib else f"{session.guests_mib}M"
        cells += [
            Cell(NOTHING if session is None else session.url or NOTHING),
            Cell(for_guests),
            Cell(", ".join(fact.locks) or NOTHING),
        ]
    return [*cells, Cell(fact.notice or NOTHING, "" if fact.notice else "dim")]
