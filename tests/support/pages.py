"""Commands of the project's own pages, so that what is tested is what people paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMED = "kvmsupervisor"
"""What the pages call the image."""

PAIRS = {"-v": "--volume", "--volume": "--volume", "-e": "--env", "--env": "--env", "--name": "--name"}
"""Options whose value is a word of its own."""

UNWANTED = ("--env=", "--name=", "--detach", "--rm", "-it")
"""What a test says itself."""


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
