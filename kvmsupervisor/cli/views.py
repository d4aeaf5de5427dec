"""The rows and blocks of `list`, `show` and `check`, made from what was read; `output` prints them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from kvmsupervisor.cli.checks import Finding
from kvmsupervisor.cli.output import NOTHING, Block, Cell, Column, age, phase_cell, printable, printable_bytes
from kvmsupervisor.cluster.details import public
from kvmsupervisor.cluster.overview import Cluster, Instance, shown
from kvmsupervisor.domain.agent import GuestFacts
from kvmsupervisor.domain.keys import Layout
from kvmsupervisor.domain.names import FREE_KEY, WISH_KEYS
from kvmsupervisor.domain.parse_keys import ALL_NUMBERED_KEYS
from kvmsupervisor.domain.snapshots import Snap
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.values import some

OTHERS = 100
"""How many keys `show` prints that are no wishes. Arbitrary: a writer of keys must not fill a terminal."""

LIST_COLUMNS = (
    Column(title="ID"),
    Column(title="HOST"),
    Column(title="PHASE"),
    Column(title="AGE", right=True),
    Column(title="PID", right=True),
    Column(title="EPOCH", right=True, spare=True),
    Column(title="RESTARTS", right=True, spare=True),
    Column(title="PENDING"),
    Column(title="REASON", long=True),
)

WIDE_COLUMNS = (
    *LIST_COLUMNS[:-1],
    Column(title="RAM", right=True),
    Column(title="REVISION", right=True),
    Column(title="INCARNATION"),
    Column(title="LAST EXIT"),
    Column(title="ADDRESSES", long=True, label="addresses: "),
    Column(title="DESCRIPTION", long=True, label="description: "),
    Column(title="REASON", long=True),
    Column(title="PROBLEMS", long=True, label="problems: "),
)

ADDRESSES = 4
"""Addresses of a guest that `list` shows; the others are counted. Arbitrary: two networks with IPv4 and IPv6. A guest
that runs containers has dozens."""

DESCRIPTION_LENGTH = 80
"""Characters of a description that `list` shows. Arbitrary: a line; a value may have 64 KiB, and `show` has it."""

FINDING_COLUMNS = (
    Column(title="INSTANCE"),
    Column(title="KEY"),
    Column(title="FOUND", long=True, label="found   "),
    Column(title="WANTED", long=True, label="wanted  "),
)


def list_row(instance: Instance, cluster: Cluster, now: datetime, *, wide: bool) -> list[Cell]:
    """The row of one instance, for `LIST_COLUMNS` or `WIDE_COLUMNS`."""
    view, status = shown(instance, cluster), instance.status
    reason = view.reason
    count = len(instance.problems)
    if count and not wide:
        reason += f" ({count} problem{'s' if count > 1 else ''}: see check {instance.id})"
    cells = [
        Cell(instance.id, "bold"),
        _or_nothing(_where(instance, view.host)),
        phase_cell(view.phase, view.halted),
        Cell(age(status.since, now) if status is not None else NOTHING),
        _or_nothing(status.pid if status is not None else None),
        _or_nothing(status.epoch if status is not None else None),
        _or_nothing(status.restarts if status is not None else None),
        _or_nothing(",".join(status.pending) if status is not None else None, "yellow"),
    ]
    if wide:
        spec = instance.wish.spec
        cells += [
            _or_nothing(f"{spec.ram_mib}M" if spec is not None else None),
            _or_nothing(status.revision if status is not None else None),
            _or_nothing(status.incarnation if status is not None else None),
            _or_nothing(status.last_exit if status is not None else None),
            _or_nothing(addresses_of(status.agent) if status is not None else None),
            _or_nothing(_description(instance)),
        ]
    cells.append(Cell(reason))
    return [*cells, _or_nothing("; ".join(instance.problems), "red")] if wide else cells


def addresses_of(agent: GuestFacts | None, most: int = ADDRESSES) -> str | None:
    """The guest's addresses as its agent tells them, in one line; None when it tells none."""
    found = () if agent is None else dict.fromkeys(one.address for one in agent.addresses)
    return some(tuple(found), most) or None


def _description(instance: Instance) -> str | None:
    """The key `description`, in one line."""
    raw = instance.keys.get(FREE_KEY.encode())
    return None if raw is None else printable_bytes(raw.value.strip(), limit=DESCRIPTION_LENGTH)


def _where(instance: Instance, host: str | None) -> str | None:
    """The host where it runs; with a placement also its own host; while it moves also where to."""
    status, placement = instance.status, instance.wish.placement
    if status is not None and status.phase is Phase.MIGRATING and status.move is not None and status.host == host:
        return f"{host} → {status.move.target}"
    is_placed = placement is not None and placement.host == host != instance.wish.host
    return f"{host} (for {instance.wish.host})" if is_placed else host


def show_blocks(
    instance: Instance, cluster: Cluster, layout: Layout, now: datetime, agent_seen: str | None = None
) -> list[Block]:
    """Everything about one instance; `agent_seen`: when the guest's agent last answered, None when not known."""
    view, status = shown(instance, cluster), instance.status
    since = f" for {age(status.since, now)}" if status is not None else ""
    where = f" on {_where(instance, view.host)}" if view.host is not None else ""
    blocks: list[Block] = [
        (
            f"{instance.id}{where}: {phase_cell(view.phase, view.halted).text}{since}",
            [("", Cell(view.reason)), *(("problem", Cell(text, "red")) for text in instance.problems)],
        ),
        (
            f"Wishes ({layout.instance_prefix(instance.id)})",
            list(_wishes(instance)) or [("", Cell("none"))],
        ),
    ]
    if status is not None:
        fields = {**status.to_object(), "phase": view.phase}
        hidden = ("id", "reason", "problems", "agent", "snapshots")
        blocks.append(
            (
                f"Status ({layout.status_key(instance.id)})",
                [(name, _field(name, value)) for name, value in fields.items() if name not in hidden],
            )
        )
        if status.snapshots:
            blocks.append(("Snapshots", [_snapshot_line(snap, now) for snap in status.snapshots]))
        if status.agent is not None:
            blocks.append(("Guest (as its agent tells)", _guest_lines(status.agent, agent_seen, now)))
    blocks.append((f"Lock ({layout.lock_key(instance.id)})", _lock_lines(instance)))
    if instance.wish.placed.revision:
        blocks.append((f"Placement ({layout.placement_key(instance.id)})", _placement_lines(instance)))
    host = instance.wish.runs_on or (status.host if status is not None else None)
    if host is not None:
        blocks.append((f"Session of host {host}", _session_lines(host, cluster)))
    return blocks


def _wishes(instance: Instance) -> Iterator[tuple[str, Cell]]:
    """Its keys and their values; of unknown keys, and of those for people, the first `OTHERS`."""
    wishes = {name.encode() for name in (*WISH_KEYS, *ALL_NUMBERED_KEYS)}
    others = 0
    for name, raw in sorted(instance.keys.items()):
        others += name not in wishes
        if name in wishes or others <= OTHERS:
            yield printable_bytes(name), Cell(printable_bytes(public(name, raw.value)))
    if others > OTHERS:
        yield "…", Cell(f"and {others - OTHERS} more, which `-o json` has")


def finding_row(finding: Finding) -> list[Cell]:
    """The row of one finding, for `FINDING_COLUMNS`."""
    return [
        Cell(",".join(finding.instances) or NOTHING, "bold"),
        Cell(finding.key),
        Cell(finding.found, "red"),
        Cell(finding.wanted),
    ]


def _or_nothing(value: object | None, style: str = "") -> Cell:
    """A cell that shows `-` for a missing value."""
    return Cell(NOTHING, "dim") if value is None or value == "" else Cell(str(value), style)


def _snapshot_line(snap: Snap, now: datetime) -> tuple[str, Cell]:
    more = "" if snap.why is None else f": {snap.why}"
    told = f"{age(snap.at, now)} old, {snap.how}{more}, of {', '.join(snap.disks)}"
    return printable(snap.name), Cell(printable(told), "" if snap.is_consistent else "yellow")


def _field(name: str, value: object) -> Cell:
    """A field of the status in `show`."""
    if name == "phase":
        return phase_cell(str(value))
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    return _or_nothing(", ".join(map(str, value)) if isinstance(value, list) else value)


def _guest_lines(agent: GuestFacts, seen: str | None, now: datetime) -> Sequence[tuple[str, Cell]]:
    """The guest's own statements."""
    return [
        *(("address", Cell(f"{one.address} ({one.interface})")) for one in agent.addresses),
        ("os", _or_nothing(agent.os)),
        ("hostname", _or_nothing(agent.hostname)),
        ("agent version", _or_nothing(agent.version)),
        ("last contact", Cell(f"{age(seen, now)} ago") if seen is not None else Cell("not known", "dim")),
    ]


def _lock_lines(instance: Instance) -> Sequence[tuple[str, Cell]]:
    """The lock's fields, in the order in which people ask for them."""
    if instance.lock is None:
        return [("", Cell("free"))]
    if instance.lock.lock is None:
        return [("unreadable", Cell(printable_bytes(instance.lock.kv.value), "red"))]
    fields: Iterable[tuple[str, Any]] = asdict(instance.lock.lock).items()
    return [
        (name, _or_nothing(", ".join(map(str, value)) if isinstance(value, list | tuple) else value))
        for name, value in fields
        if name != "version"
    ]


def _placement_lines(instance: Instance) -> Sequence[tuple[str, Cell]]:
    """The placement's fields."""
    placement = instance.wish.placed.placement
    if placement is None:
        return [("", Cell("there, but this release cannot read it", "red"))]
    ended = [] if instance.wish.placement is not None else [("", Cell("ended: `host` was written since", "dim"))]
    fields: Iterable[tuple[str, Any]] = asdict(placement).items()
    return [*ended, *((name, Cell(str(value))) for name, value in fields if name != "version")]


def _session_lines(host: str, cluster: Cluster) -> Sequence[tuple[str, Cell]]:
    """A host's session."""
    if not cluster.alive(host):
        return [("", Cell(f"none ({cluster.who_has_sessions()})", "magenta"))]
    session = cluster.sessions[host]
    if session is None:
        return [("", Cell("there, but this release cannot read it", "yellow"))]
    return [(name, _or_nothing(value)) for name, value in session.to_object().items() if name != "host"]
