"""Output: tables (coloured on a terminal, plain in a pipe), JSON, ages, and safe text.

Any value of etcd may be printed here, so every text passes `printable`: no value reaches a terminal as an escape
sequence.
"""

from __future__ import annotations

import json
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.values import BLANKS

if TYPE_CHECKING:
    from rich.console import Console

OutputFormat = Literal["table", "wide", "json"]

GAP = "  "
NOTHING = "-"

PHASE_STYLES = {
    "running": "green",
    "starting": "cyan",
    "stopping": "cyan",
    "migrating": "cyan",
    "waiting": "yellow",
    "backoff": "red",
    "invalid": "red",
    "unknown": "magenta",
    "stopped": "dim",
}
"""Colours of the phases on a terminal. Arbitrary, but only what needs a person is red."""


@frozen
class Cell:
    """One cell of a table. `style` is rich's, for terminals."""

    text: str
    style: str = ""


@frozen(kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        title: its heading.
        right: whether it is aligned to the right.
        long: whether it holds sentences: a terminal folds them, or puts them below the row.
        label: stands before such a sentence below the row.
        spare: whether a narrow terminal leaves it out.
    """

    title: str
    right: bool = False
    long: bool = False
    label: str = ""
    spare: bool = False


LEAST_WIDTH = 40
"""The least width of a long column beside the others; with less room its sentences go below the rows. Arbitrary: in a
narrower column a sentence has fewer words per line than lines."""

BELOW_INDENT = 4

Block = tuple[str, Sequence[tuple[str, Cell]]]
"""A heading, and lines of (name, value) below it; a line without a name stands for itself."""

MARKS = 3
"""Marks (accents, vowels) that one character may have. Arbitrary: languages need two, and rarely three."""


def printable(text: object) -> str:
    """Return `text` in one line that cannot move a cursor: unprintable and invisible characters are escaped."""
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    shown = []
    # A mark is drawn over the character before it: many of them, or one at the start, would cover other text.
    marks = MARKS
    for char in plain:
        marks = marks + 1 if unicodedata.combining(char) or unicodedata.category(char) in {"Mn", "Me"} else 0
        visible = char.isprintable() and char not in BLANKS and marks <= MARKS
        shown.append(char if visible else char.encode("unicode_escape").decode())
    return "".join(shown)


def printable_bytes(value: bytes, *, limit: int = 200) -> str:
    """Return a value of etcd in one line, cut after `limit` characters; bytes that are not UTF-8 are escaped."""
    text = printable(value.decode("utf-8", "backslashreplace"))
    return text if len(text) <= limit else f"{text[:limit]}… ({len(value)} bytes)"


def quoted(words: Iterable[str]) -> str:
    """Return a command in one line, as bash reads it; unprintable characters are escaped (`$'…'`)."""
    return " ".join(shlex.quote(word) if word.isprintable() else _dollar_quoted(word) for word in words)


def _dollar_quoted(word: str) -> str:
    escaped = (
        char.replace("\\", r"\\").replace("'", r"\'")
        if char.isprintable()
        else "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))
        for char in word
    )
    return f"$'{''.join(escaped)}'"


def parse_time(text: object) -> datetime | None:
    """Read an RFC 3339 time with its zone; None when it is not one."""
    try:
        found = datetime.fromisoformat(str(text))
        return found.astimezone(UTC) if found.tzinfo is not None else None
    except (ValueError, OverflowError):
        # At the ends of the calendar a time has no UTC.
        return None


def local_time(text: object) -> str:
    """A time (RFC 3339) as the clock on this machine's wall shows it; what is no time as it is."""
    found = parse_time(text)
    try:
        return str(text) if found is None else found.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):
        return str(text)


def age(since: object, now: datetime) -> str:
    """Say how long ago `since` (RFC 3339) was, in one unit: `45s`, `12m`, `5h`, `9d`; `-` for no time."""
    began = parse_time(since)
    return NOTHING if began is None else duration(now - began)


def duration(length: timedelta) -> str:
    """Say a duration in one unit; a negative one (clocks differ between hosts) is `0s`."""
    seconds = max(0, int(length.total_seconds()))
    for unit, size, below in (("s", 1, 120), ("m", 60, 7200), ("h", 3600, 172_800)):
        if seconds < below:
            return f"{seconds // size}{unit}"
    return f"{seconds // 86_400}d"


def on_terminal(stream: TextIO | None) -> bool:
    """Whether `stream` is a terminal; it is None when the program was started without it (`>&-`)."""
    return stream is not None and stream.isatty()


def terminal_console(*, stderr: bool = False) -> Console:
    """A rich console, which respects NO_COLOR and TERM. rich is imported late, because most commands do not need it."""
    from rich.console import Console  # noqa: PLC0415

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def echo_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a table to standard output: rich on a terminal, aligned plain text otherwise."""
    if on_terminal(sys.stdout):
        print_rich(terminal_console(), columns, rows)
    else:
        for line in plain_table(columns, rows):
            click.echo(line)


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Iterable[str]:
    """Yield the lines of a table without colour, box or truncation; columns are two spaces apart."""
    widths = natural_widths(columns, rows)
    for cells in ([Cell(column.title) for column in columns], *rows):
        yield GAP.join(
            aligned(cell, column, width) for cell, column, width in zip(cells, columns, widths, strict=True)
        ).rstrip()


def natural_widths(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> list[int]:
    """The width of each column when no text is folded."""
    return [
        max([len(column.title), *(width_of(printable(row[index].text)) for row in rows)])
        for index, column in enumerate(columns)
    ]


def aligned(cell: Cell, column: Column, width: int) -> str:
    """The text of a cell, padded."""
    text = printable(cell.text)
    room = " " * (width - width_of(text))
    return room + text if column.right else text + room


def width_of(text: str) -> int:
    """How many columns of a terminal a printable text takes: Chinese characters take two, accents none."""
    if text.isascii():
        return len(text)
    marks = sum(unicodedata.category(char) in {"Mn", "Me"} for char in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(char) in "WF" for char in text)


def print_rich(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a table that fits the terminal: sentences are folded in their columns, or stand below their rows."""
    beside, below = fit(columns, natural_widths(columns, rows), console.width)
    if below:
        _print_rows_with_sentences(console, columns, rows, beside, below)
    else:
        _print_folded(console, columns, rows)


def _print_folded(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    """Print all columns beside each other."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, len(GAP), 0, 0), header_style="bold")
    for column in columns:
        justify: Literal["right", "left"] = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, no_wrap=not column.long, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell.text), style=cell.style) for cell in row))
    console.print(table)


def _print_rows_with_sentences(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    beside: Sequence[int],
    below: Sequence[int],
) -> None:
    """Print the short columns beside each other, and the sentences of each row indented below it."""
    from rich.padding import Padding  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    widths = natural_widths(columns, rows)
    for cells in ([Cell(column.title, "bold") for column in columns], *rows):
        line = Text(overflow="fold")
        for index in beside:
            line.append(aligned(cells[index], columns[index], widths[index]) + GAP, style=cells[index].style)
        line.rstrip()
        console.print(line)
        for index in below:
            if cells[index].text not in {NOTHING, columns[index].title}:
                text = Text(columns[index].label, overflow="fold")
                text.append(printable(cells[index].text), style=cells[index].style)
                console.print(Padding(text, (0, 0, 0, BELOW_INDENT)))


def fit(columns: Sequence[Column], widths: Sequence[int], available: int) -> tuple[Sequence[int], Sequence[int]]:
    """Choose the columns that stand beside each other, and those that go below each row, by index."""

    def total(indexes: Sequence[int]) -> int:
        return sum(widths[index] + len(GAP) for index in indexes)

    every = range(len(columns))
    short = [index for index in every if not columns[index].long]
    long = [index for index in every if columns[index].long]
    if total(every) <= available or total(short) + LEAST_WIDTH * len(long) <= available:
        return every, []
    if total(short) > available:
        short = [index for index in short if not columns[index].spare]
    return short, long


def echo_blocks(blocks: Sequence[Block]) -> None:
    """Print blocks of named values, with an empty line between them."""
    width = max((len(name) for _, lines in blocks for name, _ in lines), default=0)
    terminal = terminal_console() if on_terminal(sys.stdout) else None
    for index, (title, lines) in enumerate(blocks):
        if terminal is None:
            click.echo(("\n" if index else "") + printable(title))
            for name, cell in lines:
                indent = f"  {printable(name).ljust(width)}  " if name else "  "
                click.echo(f"{indent}{printable(cell.text)}")
        else:
            print_rich_block(terminal, title, lines, width=width, first=index == 0)


def print_rich_block(
    console: Console, title: str, lines: Sequence[tuple[str, Cell]], *, width: int, first: bool
) -> None:
    """Print one block on a terminal; a long value is folded within its own column."""
    from rich.padding import Padding  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    if not first:
        console.print()
    console.print(Text(printable(title), style="bold"))
    for name, cell in lines:
        value = Text(printable(cell.text), style=cell.style, overflow="fold")
        if not name:
            console.print(Padding(value, (0, 0, 0, 2)))
            continue
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=width)
        grid.add_column(overflow="fold")
        grid.add_row(Text(printable(name), style="cyan"), value)
        console.print(Padding(grid, (0, 0, 0, 2)))


def echo_json(value: Any) -> None:
    """Print JSON for programs: ASCII only, so that no value of etcd can harm a terminal or break an encoding."""
    click.echo(json.dumps(value, indent=2))


def phase_cell(phase: str, halted: str | None = None) -> Cell:
    """A phase in its colour; with the run state of a halted guest, in the colour of what needs a person."""
    return Cell(phase, PHASE_STYLES.get(phase, "")) if halted is None else Cell(f"{phase} ({halted})", "red")


def note(text: str) -> None:
    """Print a note on standard error, so that standard output holds results only."""
    click.echo(printable(text), err=True)
