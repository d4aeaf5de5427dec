"""Which instances a list shows, and in which order: read from the address of the page. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.cluster.overview import natural
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.web.rows import Rank, Row

WORDS_LENGTH = 200
"""Characters of a filter. Arbitrary: a person types fewer."""

SORTS: Mapping[str, Callable[[Row], Any]] = {
    "rank": lambda row: row.rank,
    "id": lambda row: natural(row.id),
    "host": lambda row: natural(row.host or ""),
    "phase": lambda row: row.phase,
    "since": lambda row: row.since or "",
    "restarts": lambda row: row.restarts,
    "ram": lambda row: row.ram_mib or 0,
}
"""What a list can be sorted by. Equal ones are in the natural order of their ids."""

FIRST = "rank"
"""The order without a wish: problems first."""


@frozen(kw_only=True)
class Choice:
    """What the address of a list says.

    Attributes:
        words: each has to be somewhere in the row's text.
        host: exactly this one; empty for any.
        phase: exactly this one; empty for any.
        problems: only those that need a person.
        sort: a key of `SORTS`.
        down: whether in the reverse order.
    """

    words: str = ""
    host: str = ""
    phase: str = ""
    problems: bool = False
    sort: str = FIRST
    down: bool = False

    @classmethod
    def parse(cls, query: Mapping[str, Sequence[str]]) -> Choice:
        """Read the parameters of an address; what is none of them is ignored."""
        said = {name: values[0].strip() for name, values in query.items() if values}
        sort = said.get("sort", "")
        known = sort.removeprefix("-") in SORTS
        return cls(
            words=visible(said.get("q", ""), WORDS_LENGTH),
            host=visible(said.get("host", "")),
            phase=visible(said.get("phase", "")),
            problems=said.get("show", "") == "problems",
            sort=sort.removeprefix("-") if known else FIRST,
            down=known and sort.startswith("-"),
        )

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return not (self.words or self.host or self.phase or self.problems)

    def choose(self, rows: Iterable[Row]) -> list[Row]:
        """The rows to show, in their order; they come in the natural order of their ids."""
        words = self.words.casefold().split()
        chosen = [
            row
            for row in rows
            if (not self.host or row.host == self.host)
            and (not self.phase or row.phase == self.phase)
            and (not self.problems or row.rank == Rank.PROBLEM)
            and (not words or all(word in row.text for word in words))
        ]
        return sorted(chosen, key=SORTS[self.sort], reverse=self.down)

    def address(self, path: str = "/", **other: Any) -> str:
        """The address of this list, or of one that differs from it in `other`."""
        one = replace(self, **other)
        order = ("-" if one.down else "") + one.sort
        said = {
            "q": one.words,
            "host": one.host,
            "phase": one.phase,
            "show": "problems" if one.problems else "",
            "sort": "" if order == FIRST else order,
        }
        query = urlencode({name: value for name, value in said.items() if value})
        return f"{path}?{query}" if query else path
