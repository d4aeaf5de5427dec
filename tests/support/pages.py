"""Commands of the project's own pages, so that what is tested is what people paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
BLOCK = re.compile(r"^```(sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = "kvmsupervisor"
"""What the pages call the image."""

PAIRS = {"-v": "--volume", "--volume": "--volume", "-e": "--env", "--env": "--env", "--name": "--name"}
"""Options whose value is a word of its own."""

UNWANTED = ("--env=", "--name=", "--detach", "--rm", "-it")
"""What a test says itself."""


def commands(page: str, heading: str) -> list[str]:
    """The shell commands of one section, in order; a command that goes on in the next line is one.

    In a block of the kind `console` answers stand among them, so a command is behind the prompt of a person or of root.

    Args:
        page: below the checkout.
        heading: as it is, without its `#`.
    """
    _, found, rest = (DOCS.parent / page).read_text().partition(f"# {heading}\n")
    assert found, f"{page} has no section {heading!r}"
    blocks = [(kind, text.replace("\\\n", " ").splitlines()) for kind, text in BLOCK.findall(_section(rest))]
    return [
        line[2:] if kind == "console" else line
        for kind, lines in blocks
        for line in lines
        if kind == "sh" or line.startswith(("$ ", "# "))
    ]


def _section(text: str) -> str:
    """What stands before the next heading; a line of a block that begins as one is none."""
    blocks = [found.span() for found in BLOCK.finditer(text)]
    for found in HEADING.finditer(text):
        if not any(start <= found.start() < end for start, end in blocks):
            return text[: found.start()]
    return text


def documented(page: str, heading: str) -> list[str]:
    """The words of the first command that a page has below a heading.

    Args:
        page: below `docs/`.
        heading: as it is, without its `#`.
    """
    below = re.split(rf"^#+ {re.escape(heading)}$", (DOCS / page).read_text(), flags=re.MULTILINE)[1]
    block = below.split("```console\n")[1].split("```")[0].replace("\\\n", " ")
    return shlex.split(block.splitlines()[0].lstrip("$#"), comments=True)


def options_of(words: Sequence[str]) -> list[str]:
    """Of a documented `docker run`, what stands between that and the image, without names and environment."""
    assert words[:2] == ["docker", "run"], words
    found: list[str] = []
    left = iter(words[2:])
    for word in left:
        if word == NAMED:
            return [one for one in found if not one.startswith(UNWANTED)]
        found.append(f"{PAIRS[word]}={next(left)}" if word in PAIRS else word)
    raise AssertionError(f"no {NAMED} in {words}")
