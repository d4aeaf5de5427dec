"""What a benchmark yields, and how it is shown: a table on the terminal, and one in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Sample:
    """One quantity, measured several times."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Sample:
        """Of at least one value."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:g}"


Unit = Callable[[float], str]
"""Writes a value for people."""


def milliseconds(value: float) -> str:
    return f"{value * 1000:.1f} ms"


def microseconds(value: float) -> str:
    return f"{value * 1e6:.0f} µs"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def percent(value: float) -> str:
    return f"{value * 100:.2f} %"


def count(value: float) -> str:
    return f"{value:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure beside its reference.

    Attributes:
        what: is measured.
        measured: in base units (seconds, bytes, fractions).
        unit: writes them.
        reference: what it is compared with, measured in the same run; None when it stands alone.
        reference_is: says what that is.
        budget: in words; empty for a figure that is only told.
        met: whether it is kept; None when there is no budget.
        notes: what a reader must know to judge it.
    """

    what: str
    measured: Sample
    unit: Unit
    reference: Sample | None = None
    reference_is: str = ""
    budget: str = ""
    met: bool | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def ratio(self) -> float | None:
        """Of the medians."""
        return self.measured.median / self.reference.median if self.reference and self.reference.median else None

    @property
    def verdict(self) -> str:
        return {True: "kept", False: "MISSED", None: ""}[self.met]

    def cells(self) -> list[str]:
        """As a table shows it."""
        return [
            self.what,
            _shown(self.measured, self.unit),
            "" if self.reference is None else f"{_shown(self.reference, self.unit)} {self.reference_is}",
            "" if self.ratio is None else f"{self.ratio:.2f}",
            self.budget,
            self.verdict,
        ]


HEADINGS = ("what", "measured", "reference", "ratio", "budget", "verdict")


def within(measured: Sample, reference: Sample, factor: float, plus: float = 0.0) -> bool:
    """Whether the medians keep `measured ≤ factor × reference + plus`."""
    return measured.median <= factor * reference.median + plus


def show(figures: Sequence[Figure], console: Console) -> None:
    """Print the table and the notes."""
    table = Table(*HEADINGS, show_lines=True)
    for figure in figures:
        colour = {True: "green", False: "bold red", None: ""}[figure.met]
        *cells, verdict = figure.cells()
        table.add_row(*cells, f"[{colour}]{verdict}[/]" if colour else verdict)
    console.print(table)
    for figure in figures:
        for note in figure.notes:
            console.print(f"· {figure.what}: {note}", highlight=False, markup=False)


def markdown(figures: Sequence[Figure], surroundings: Sequence[str]) -> str:
    """The page `RESULTS.md`."""
    lines = [
        "# Results",
        "",
        "Written by `make bench`; what each line means is in the modules of this folder. Medians, with the least and",
        "the greatest of n in brackets; figures and references of a line were taken in turn, in the same run.",
        "",
        *(f"- {line}" for line in surroundings),
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{' --- |' * len(HEADINGS)}",
        *(f"| {' | '.join(figure.cells())} |" for figure in figures),
        "",
    ]
    notes = [f"- {figure.what}: {note}" for figure in figures for note in figure.notes]
    return "\n".join([*lines, *(["Notes:", "", *notes, ""] if notes else [])])


def _shown(sample: Sample, unit: Unit) -> str:
    values = sample.values
    if len(values) == 1:
        return unit(values[0])
    return f"{unit(sample.median)} ({unit(min(values))} – {unit(max(values))}, n={len(values)})"
