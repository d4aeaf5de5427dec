"""`hosts`: each host with a session, and each that has left something and has none."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli.cluster import Cluster, Instance, natural, read_cluster
from kvmsupervisor.cli.common import Tools, output_option, pass_tools, with_store
from kvmsupervisor.cli.output import NOTHING, Cell, Column, OutputFormat, age, echo_json, echo_table, note
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.lock import LockState
from kvmsupervisor.domain.values import some

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
WIDE_COLUMNS = (*COLUMNS[:-1], Column(title="URL"), Column(title="LOCKS", long=True, label="locks: "), COLUMNS[-1])

UP, DRAINING, NO_SESSION, UNREADABLE = "up", "draining", "no session", "unreadable"
STYLES = {UP: "green", DRAINING: "yellow", NO_SESSION: "magenta", UNREADABLE: "red"}

NAMED = 5
"""Instances that a notice names; the others are counted. Arbitrary: a line."""


@frozen(kw_only=True)
class HostFact:
    """A host as the keys show it.

    Attributes:
        host: its name.
        state: `up`, `draining` (it stops all its guests), `no session`, or `unreadable`: it has one of another release.
        session: what it says of itself.
        running: the instances whose guests run there, as it says; none without a session.
        locks: the instances whose locks it holds.
        promised_mib: the memory of these, by their keys.
    """

    host: str
    state: str
    session: HostSession | None
    running: tuple[str, ...]
    locks: tuple[str, ...]
    promised_mib: int

    @property
    def notice(self) -> str:
        """What a person should know."""
        if self.state == NO_SESSION:
            held = f"it holds the locks of {some(self.locks, NAMED)}, and may run them" if self.locks else ""
            return held or "nothing of it is locked; `remove-host` deletes what it has left"
        if self.session is None:
            return "this release cannot read its session"
        return self.session.notice

    def to_object(self) -> dict[str, Any]:
        """For programs."""
        session = self.session
        return {
            "host": self.host,
            "state": self.state,
            "since": None if session is None else session.started or None,
            "running": list(self.running),
            "locks": list(self.locks),
            "promised_mib": self.promised_mib,
            "memory_mib": None if session is None else session.memory_mib,
            "cpus": None if session is None else session.cpus,
            "version": None if session is None else session.version,
            "url": None if session is None else session.url,
            "notice": self.notice,
        }


@click.command()
@output_option
@pass_tools
def hosts(tools: Tools, output: OutputFormat) -> None:
    """List the hosts: their state, what runs there, and the memory that is promised.

    `up` has a session, `draining` shuts all its guests down, `no session` has left locks or statuses and is off, cut
    off, or without a supervisor. RUNNING counts guests that run; PROMISED is the memory of the instances whose locks
    the host holds, of MEMORY. SINCE is how long its supervisor runs. `-o wide` adds its address and these instances.

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


def facts_of(cluster: Cluster) -> list[HostFact]:
    """All hosts that etcd knows of, in natural order."""
    locked: dict[str, list[Instance]] = {}
    said: dict[str, list[Instance]] = {}
    for instance in cluster.instances.values():
        lock = None if instance.lock is None else instance.lock.lock
        if lock is not None and lock.state is not LockState.BROKEN:
            locked.setdefault(lock.host, []).append(instance)
        if instance.status is not None:
            said.setdefault(instance.status.host, []).append(instance)
    names = {*cluster.sessions, *locked, *(host for host, left in said.items() if any(_tells(one) for one in left))}
    return [
        _fact(host, cluster, locked=locked.get(host, ()), said=said.get(host, ()))
        for host in sorted(names, key=natural)
    ]


def _tells(instance: Instance) -> bool:
    """Whether its status says that something of it runs; that of an ended container is no host's."""
    return instance.status is not None and instance.status.tells_of_a_process


def _fact(host: str, cluster: Cluster, *, locked: Sequence[Instance], said: Sequence[Instance]) -> HostFact:
    session = cluster.sessions.get(host)
    if not cluster.alive(host):
        state = NO_SESSION
    elif session is None:
        state = UNREADABLE
    else:
        state = DRAINING if session.draining else UP
    return HostFact(
        host=host,
        state=state,
        session=session,
        running=tuple(one.id for one in said if state != NO_SESSION and one.status is not None and one.status.up),
        locks=tuple(one.id for one in locked),
        promised_mib=sum(one.wish.spec.ram_mib for one in locked if one.wish.spec is not None),
    )


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
        cells += [Cell(NOTHING if session is None else session.url or NOTHING), Cell(", ".join(fact.locks) or NOTHING)]
    return [*cells, Cell(fact.notice or NOTHING, "" if fact.notice else "dim")]
