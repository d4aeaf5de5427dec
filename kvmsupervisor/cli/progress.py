"""Progress of `--wait`, on standard error: one line for each change, or one live block on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kvmsupervisor.cli.output import PHASE_STYLES, note, on_terminal, printable, terminal_console
from kvmsupervisor.cli.waiting import Report


@contextmanager
def progress() -> Iterator[Report]:
    """Show progress while the body runs; yields a function to call at every change."""
    if on_terminal(sys.stderr):
        with _live() as report:
            yield report
    else:
        yield _line


def _line(instance: str, phase: str, reason: str) -> None:
    """One change, one line."""
    note(f"{instance}: {phase}: {reason}")


@contextmanager
def _live() -> Iterator[Report]:
    """A block with one line for each instance, redrawn in place and gone at the end.

    rich draws it from a thread of its own, so the event loop does not notice.
    """
    from rich.live import Live  # noqa: PLC0415
    from rich.spinner import Spinner  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    said: dict[str, tuple[str, str]] = {}
    spinner = Spinner("dots")

    def block() -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        for instance, (phase, reason) in said.items():
            table.add_row(
                spinner,
                Text(instance, style="bold"),
                Text(printable(phase), style=PHASE_STYLES.get(phase, "")),
                Text(printable(reason)),
            )
        return table

    with Live(console=terminal_console(stderr=True), transient=True, get_renderable=block) as live:

        def report(instance: str, phase: str, reason: str) -> None:
            said[instance] = (phase, reason)
            live.refresh()

        yield report
