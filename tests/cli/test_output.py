"""How things are printed: tables that fit, text that is safe, times that people read."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Sequence
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from kvmsupervisor.cli.output import (
    Cell,
    Column,
    age,
    duration,
    fit,
    natural_widths,
    plain_table,
    print_rich,
    print_rich_block,
    printable,
    printable_bytes,
    quoted,
)
from tests.cli.conftest import NOW

COLUMNS = (
    Column(title="ID"),
    Column(title="N", right=True),
    Column(title="SPARE", spare=True),
    Column(title="REASON", long=True, label="why: "),
)


def row(*texts: str) -> Sequence[Cell]:
    """Cells without a style."""
    return [Cell(text) for text in texts]


ROWS = [row("1", "7", "x" * 30, "word " * 30), row("web", "1234", "y", "-")]


def on_terminal(width: int, columns: Sequence[Column] = COLUMNS, rows: Sequence[Sequence[Cell]] = ROWS) -> str:
    """What a terminal of this width shows."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    print_rich(console, columns, rows)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_tables_are_aligned_and_never_cut() -> None:
    """Two spaces between columns, numbers to the right, nothing folded."""
    assert list(plain_table(COLUMNS, [row("1", "7", "a", "b c"), row("web", "1234", "b", "z" * 500)])) == [
        "ID      N  SPARE  REASON",
        "1       7  a      b c",
        "web  1234  b      " + "z" * 500,
    ]


def test_columns_stay_aligned_beside_wide_characters_and_accents() -> None:
    """A Chinese character takes two columns of a terminal, a combining accent none."""
    lines = list(plain_table(COLUMNS[:2], [row("\u96f2\u7aef", "1"), row("e\u0301a", "2"), row("abcd", "3")]))
    assert lines == ["ID    N", "\u96f2\u7aef  1", "e\u0301a    2", "abcd  3"]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 140, 200])
def test_a_terminals_table_fits_and_loses_no_sentence(width: int) -> None:
    """Whatever the width, no line is longer than it and every word of a sentence is there."""
    lines = on_terminal(width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert sum(line.count("word") for line in lines) == 30


def test_a_narrow_terminal_puts_sentences_below_and_then_drops_what_is_spare() -> None:
    """First the sentences go below, with their label; then the spare columns go."""
    assert "why: word" in on_terminal(80)
    assert "SPARE" in on_terminal(80)
    assert "SPARE" not in on_terminal(40)
    assert "why: word" not in on_terminal(140)


def test_fit_keeps_what_fits() -> None:
    """A table that fits as it is stays whole."""
    widths = natural_widths(COLUMNS, [row("1", "2", "3", "short")])
    assert fit(COLUMNS, widths, 40) == (range(4), [])


def test_a_block_folds_a_value_in_its_own_column() -> None:
    """`show` on a terminal: the value's next lines stand below its first."""
    console = Console(file=io.StringIO(), width=30, force_terminal=True, color_system=None)
    print_rich_block(console, "Title", [("name", Cell("word " * 9))], width=4, first=True)
    assert isinstance(console.file, io.StringIO)
    _, first, *rest = console.file.getvalue().splitlines()
    assert first.startswith("  name  word")
    assert rest
    assert all(line.startswith("        word") for line in rest)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("é ok", "é ok"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb", r"a\nb"),
        ("\ud800", r"\ud800"),
        ("\u0301x", r"\u0301x"),
        ("a" + "\u0301" * 5, "a" + "\u0301" * 3 + r"\u0301" * 2),
        ("no\u3164ne", r"no\u3164ne"),
        ("\u202edlrow", r"\u202edlrow"),
    ],
)
def test_printable_text_cannot_act(text: str, shown: str) -> None:
    """Control characters, what no encoding can print, what nobody sees, and piles of accents are shown, not sent."""
    assert printable(text) == shown


def test_printable_bytes_are_cut_and_say_how_much() -> None:
    """A big value does not fill the screen."""
    assert printable_bytes(b"\xffabc") == r"\xffabc"
    assert printable_bytes(b"x" * 500, limit=10) == "xxxxxxxxxx… (500 bytes)"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-5, "0s"), (0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (172_800, "2d")],
)
def test_durations_have_one_unit(seconds: int, shown: str) -> None:
    """One unit that tells enough; a clock that is ahead is no negative age."""
    assert duration(timedelta(seconds=seconds)) == shown


@pytest.mark.parametrize("since", ["", "yesterday", "2026-03-01T11:57:00", None, 5])
def test_an_age_of_no_time_is_a_hyphen(since: object) -> None:
    """What is no RFC 3339 time with a zone has no age."""
    assert age(since, NOW) == "-"


def test_ages_count_from_rfc_3339() -> None:
    """Z and offsets are both read."""
    assert age("2026-03-01T11:57:00Z", NOW) == age("2026-03-01T12:57:00+01:00", NOW) == "3m"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8), max_size=4))
@settings(max_examples=25)
def test_a_command_is_what_bash_reads_and_moves_no_cursor(words: list[str]) -> None:
    """Law: a command that is shown can be pasted, and has no character that a terminal acts on."""
    line = quoted(words)
    assert line.isprintable()
    script = f'set -- {line}\nprintf "%s\\0" "$#" "$@"'
    done = subprocess.run(["bash", "-c", script], env={"LC_ALL": "C.UTF-8"}, capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == [str(len(words)), *words]
