"""`events`: what happened to instances, on any machine, also after their host has died."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from kvmsupervisor.adapters import event_files
from kvmsupervisor.adapters.etcd.api import KeyValue, Store
from kvmsupervisor.cli.choice import WORD, Pattern, Word, is_one, meant_by
from kvmsupervisor.cli.common import Tools, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.following import follow
from kvmsupervisor.cli.output import (
    Cell,
    Column,
    echo_json,
    echo_table,
    local_time,
    note,
    plain_table,
    printable,
)
from kvmsupervisor.cluster.overview import list_all, natural, read_cluster
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.events import Event, from_json, from_lines, in_order, when, woven
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId, Layout, parse_id

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

INSTANCE_COLUMN = Column(title="INSTANCE")
COLUMNS = (
    Column(title="TIME"),
    INSTANCE_COLUMN,
    Column(title="HOST"),
    Column(title="EPOCH", right=True, spare=True),
    Column(title="EVENT"),
    Column(title="REASON", long=True),
)

STYLES = {"instance.ended": "yellow", "instance.backoff": "red", "instance.halted": "red", "instance.invalid": "red"}

History = Mapping[InstanceId, tuple[Event, ...]]


@frozen
class _Found:
    """The histories that were asked for, and the keys that they are from, at a revision."""

    histories: History
    kvs: Sequence[KeyValue]
    revision: int


class SinceType(click.ParamType):  # type: ignore[type-arg]
    """How far back: `90m`, `12h`, `2d`; or a time, RFC 3339 or local."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta | datetime:
        """Check that it is one of the two."""
        if isinstance(value, timedelta | datetime):
            return value
        found = re.fullmatch(r"([0-9]{1,6})([smhdw])", str(value))
        if found is not None:
            return timedelta(**{UNITS[found[2]]: int(found[1])})
        try:
            return datetime.fromisoformat(str(value)).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{printable(value)!r} is no length of time such as 90m, 12h or 2d, and no time.", param, ctx)


@click.command()
@click.argument("words", type=WORD, metavar="[ID...]", nargs=-1)
@click.option("-f", "--follow", "following", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option("--since", type=SinceType(), metavar="TIME", help="Only what is not older: 90m, 12h, 2d, or a time.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Format of the output; with --follow, json is one object per line.",
)
@pass_tools
def events(
    tools: Tools, words: Sequence[Word], following: bool, since: timedelta | datetime | None, output: str
) -> None:
    """Tell what happened to instances, and why: the newest last, times of this machine's zone.

    etcd has the last 16 events of each instance, whatever became of its host. On the host itself there are more, in
    files that only root can read. Without an ID the events of all instances are shown. An ID may be a pattern.

    Example: kvmsupervisor events web1 --since 12h
    """
    settings = tools.settings()
    try:
        oldest = tools.now() - since if isinstance(since, timedelta) else since
    except OverflowError:
        oldest = None  # before any event
    printer = _Printer(words, output, oldest)

    async def work(store: Store, settings: Settings) -> _Found:
        found = await _read(store, settings, words)
        if following:
            printer.print(found.histories, lines=True)
            await _follow(store, settings.layout, words, found, printer)
        return found

    found = with_store(tools, work)
    if not printer.print(found.histories):
        note(f"no events{'' if oldest is None else ' since then'}{_where_else(settings, words)}")


def _where_else(settings: Settings, words: Sequence[Word]) -> str:
    """Why there may be none."""
    return "" if words else f" below {settings.layout.events_prefix}: supervisors of earlier releases write none"


async def _read(store: Store, settings: Settings, words: Sequence[Word]) -> _Found:
    """Read the histories from etcd, and what this host has of them.

    Raises:
        Refused: an instance is not there, and has left nothing.
    """
    layout, folder = settings.layout, event_files.events_folder(settings.state_dir)
    listing = await list_all(store, _prefix(layout, words))
    told = {name: from_json(kv.value) for kv in listing.kvs if (name := _id_of(layout, kv)) is not None}
    on_disk = _on_disk(folder)
    ids = {name for name in told.keys() | on_disk if _is_meant(name, words)}
    ids |= {word for word in words if not isinstance(word, Pattern)}
    histories = {name: woven(_of_file(folder, name), told.get(name, ())) for name in sorted(ids, key=natural)}
    silent = [word for word in words if isinstance(word, Pattern) or not histories[word]]
    if any(not _has_any(histories, word) for word in silent):
        await _check(store, layout, [word for word in silent if not _has_any(histories, word)])
    return _Found(histories, listing.kvs, listing.revision)


def _has_any(histories: History, word: Word) -> bool:
    return any(history and _is_meant(name, [word]) for name, history in histories.items())


async def _check(store: Store, layout: Layout, silent: Sequence[Word]) -> None:
    """Check that each names an instance, where none has events.

    Raises:
        Refused: one does not.
    """
    there = (await read_cluster(store, layout)).instances
    for word in silent:
        if isinstance(word, Pattern):
            if not any(word.matches(name) for name in there):
                raise Refused(f"no instance is like {printable(word.text)}")
        elif word not in there:
            raise Refused(f"there is no instance {word}{meant_by(word, there)}, and no events of one are left")


async def _follow(store: Store, layout: Layout, words: Sequence[Word], found: _Found, printer: _Printer) -> None:
    """Print what is added to the keys, for ever."""
    known = dict(found.histories)
    async with aclosing(follow(store, _prefix(layout, words), found.kvs, found.revision)) as changes:
        async for batch in changes:
            for change in batch:
                name = _id_of(layout, change.kv)
                if name is None or not _is_meant(name, words):
                    continue
                before = known.get(name, ())
                now = known[name] = () if change.deleted else from_json(change.kv.value)
                new = tuple(event for event in now if not any(one.covers(event) for one in before))
                printer.print({name: new}, lines=True, titled=False)
                if change.deleted:
                    note(f"{name} was removed, and its events with it")


def _prefix(layout: Layout, words: Sequence[Word]) -> str:
    """What to read: of one instance no other's key, but for those whose ids begin alike."""
    (word, *_) = (*words, None)
    return layout.events_key(word) if is_one(words) and isinstance(word, str) else layout.events_prefix


def _is_meant(name: InstanceId, words: Sequence[Word]) -> bool:
    return not words or any(word.matches(name) if isinstance(word, Pattern) else word == name for word in words)


def _id_of(layout: Layout, kv: KeyValue) -> InstanceId | None:
    return parse_id(kv.key.decode(errors="replace").removeprefix(layout.events_prefix))


def _on_disk(folder: Path) -> set[InstanceId]:
    """The instances of which this host has files; none where they may not be listed."""
    try:
        return {name for found in event_files.instances_in(folder) if (name := parse_id(found)) is not None}
    except OSError:
        note(f"only what etcd has: {folder}, which has more, may not be read by this user")
        return set()


def _of_file(folder: Path, instance: InstanceId) -> tuple[Event, ...]:
    try:
        return from_lines(event_files.read(folder, instance))
    except OSError:
        # Told for the folder already, or one file of it is damaged: etcd has the last events.
        return ()


class _Printer:
    """Prints events.

    Args:
        words: as given: of one instance its name is no column.
        output: `table` or `json`.
        oldest: nothing that is older; None for all.
    """

    def __init__(self, words: Sequence[Word], output: str, oldest: datetime | None) -> None:
        self._columns = tuple(column for column in COLUMNS if column != INSTANCE_COLUMN or not is_one(words))
        self._output = output
        self._oldest = oldest

    def print(self, histories: History, *, lines: bool = False, titled: bool = True) -> bool:
        """Print them in the order of their times; return whether there were any.

        Args:
            histories: by instance.
            lines: whether more will follow: nothing is aligned to what comes later, and JSON has an object per line.
            titled: whether a table begins with its titles.
        """
        found = [one for one in in_order(histories) if self._oldest is None or when(one[1]) >= self._oldest]
        if self._output == "json":
            objects = [{"instance": name, **event.to_object()} for name, event in found]
            if not lines:
                echo_json(objects)
            for one in objects if lines else ():
                click.echo(json.dumps(one))
            return bool(found)
        rows = [_row(name, event, self._columns) for name, event in found]
        if not lines:
            if rows:
                echo_table(self._columns, rows)
            return bool(rows)
        for number, line in enumerate(plain_table(self._columns, rows)):
            if number or titled:
                click.echo(line)
        return bool(rows)


def _row(name: InstanceId, event: Event, columns: Sequence[Column]) -> list[Cell]:
    cells = [
        Cell(local_time(event.at)),
        Cell(name, "bold"),
        Cell(event.host),
        Cell(str(event.epoch)),
        Cell(event.event.removeprefix("instance."), STYLES.get(event.event, "")),
        Cell(event.reason + _repeated(event)),
    ]
    return [cell for cell, column in zip(cells, COLUMNS, strict=True) if column in columns]


def _repeated(event: Event) -> str:
    return f" ({event.times} times since {local_time(event.since or event.at)})" if event.times > 1 else ""
