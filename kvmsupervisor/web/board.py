"""What viewers see of the cluster, and since when: rows that a viewer lacks are found without asking etcd.

Every change of the board is a turn. A viewer's mark names the turn up to which it has everything. It is good for this
run of this process and for one history of etcd; with any other mark a viewer gets the whole list.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvmsupervisor.cluster.live_overview import Differing, LiveOverview
from kvmsupervisor.cluster.overview import Instance, as_object
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.web.html import Html
from kvmsupervisor.web.list_page import row_html
from kvmsupervisor.web.rows import Row, row_of

GONE_KEPT = 1024
"""Removed instances that are remembered. Arbitrary: a viewer who was away for longer gets the whole list."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

SLICE = 50
"""Rows that are made before other tasks get their turn: some 10 ms."""


@dataclass(slots=True)
class Entry:
    """One instance, ready to be sent.

    Attributes:
        row: the line about it.
        turn: in which it became so.
        html: of the row.
        full: JSON of all that its host says of it, as in `/api/v1/instances`.
    """

    row: Row
    turn: int
    html: Html
    full: bytes


@frozen
class News:
    """What a viewer lacks.

    Attributes:
        whole: whether these are all rows, and the viewer has to forget its own.
        rows: of these, the newest last.
        gone: ids of what is there no more.
    """

    whole: bool
    rows: Sequence[Row]
    gone: Sequence[str]


class Board:
    """The rows of all instances.

    Args:
        overview: the cluster.
        token: makes the name of a run.

    Attributes:
        turn: the number of the last change.
        run: the name of this run, and of the history of etcd in it.
    """

    def __init__(self, overview: LiveOverview, token: Callable[[], str] = lambda: secrets.token_hex(4)) -> None:
        self.turn = 0
        self._overview = overview
        self._token = token
        self.run = token()
        # In the order of their turns.
        self._entries: OrderedDict[InstanceId, Entry] = OrderedDict()
        self._gone: OrderedDict[InstanceId, int] = OrderedDict()
        self._since = 0
        self._ordered: list[Entry] | None = None

    @property
    def mark(self) -> str:
        """Names what a viewer has who has everything: etcd's revision, this run, and the turn."""
        return f"{self._overview.revision}-{self.run}-{self.turn}"

    @property
    def entries(self) -> list[Entry]:
        """All, in the natural order of their ids."""
        if self._ordered is None:
            # In between an instance may be known that has no row yet.
            found = (self._entries.get(name) for name in self._overview.cluster.instances)
            self._ordered = [entry for entry in found if entry is not None]
        return self._ordered

    async def turn_over(self) -> bool:
        """Take in what has changed; return whether anything that is shown differs. The first time it does."""
        differing = await self._overview.look()
        if differing.anew:
            self.run = self._token()
        turn, made = self.turn + 1, await self._made(differing)
        gone = [name for name in self._entries if name not in self._overview.cluster.instances]
        if self.turn and not (made or gone or differing.hosts or differing.drains or differing.anew):
            return False
        for name, entry in made.items():
            entry.turn = turn
            self._entries[name] = entry
            self._entries.move_to_end(name)
            self._gone.pop(name, None)
        for name in gone:
            del self._entries[name]
            self._gone[name] = turn
        while len(self._gone) > GONE_KEPT:
            _, self._since = self._gone.popitem(last=False)
        self.turn, self._ordered = turn, None
        return True

    async def _made(self, differing: Differing) -> Mapping[InstanceId, Entry]:
        """The entries that differ from those that there are."""
        cluster = self._overview.cluster
        names = list(cluster.instances) if differing.hosts or differing.anew else differing.instances
        made = {}
        for number, name in enumerate(names):
            instance = cluster.instances.get(name)
            entry = None if instance is None else self._entry(instance)
            if entry is not None:
                made[name] = entry
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
        return made

    def _entry(self, instance: Instance) -> Entry | None:
        """What is to be shown of it; None where that is shown."""
        cluster = self._overview.cluster
        row = row_of(instance, cluster, self._overview.events_revision(instance.id))
        full = _ENCODER.encode(as_object(instance, cluster)).encode(errors="backslashreplace")
        before = self._entries.get(instance.id)
        if before is not None and before.row == row and before.full == full:
            return None
        return Entry(row=row, turn=0, html=row_html(row), full=full)

    def news(self, turn: int | None) -> News:
        """What a viewer lacks.

        Args:
            turn: up to which it has everything; None for one that has nothing.
        """
        if turn is None:
            return News(True, [entry.row for entry in self.entries], ())
        rows = []
        for entry in reversed(self._entries.values()):
            if entry.turn <= turn:
                break
            rows.append(entry.row)
        return News(False, rows[::-1], [name for name, at in self._gone.items() if at > turn])

    def turn_of(self, mark: str) -> int | None:
        """The turn that a mark names; None where it is of no use any more."""
        _, _, rest = mark.partition("-")
        run, _, number = rest.partition("-")
        if run != self.run or not number.isascii() or not number.isdecimal() or len(number) > 15:
            return None
        turn = int(number)
        return turn if self._since <= turn <= self.turn else None
