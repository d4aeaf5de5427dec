"""Parts of QMP answers and events, of which nothing is trusted: a guest may have taken over the QEMU that sends them.

What is not of its type does not count, and no text is longer than people read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WORDS = 500
"""Characters of a text that are kept. QEMU's longest messages have two hundred; they go into the log and the status."""

NAME = 64
"""Characters of a name, such as a run state or a reason."""


def shortened(text: str, limit: int = WORDS) -> str:
    """The beginning of a text."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def text_in(answer: object, name: str) -> str | None:
    """A member that is a text; None when there is none."""
    found = answer.get(name) if isinstance(answer, dict) else None
    return shortened(found, NAME) if isinstance(found, str) else None


def number_in(answer: object, name: str) -> int | None:
    """A member that is a whole number, and not negative; None when there is none."""
    found = answer.get(name) if isinstance(answer, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


def object_in(answer: object, name: str) -> Mapping[str, Any]:
    """A member that is an object; an empty one when there is none."""
    found = answer.get(name) if isinstance(answer, dict) else None
    return found if isinstance(found, dict) else {}


def objects_in(answer: object) -> Iterator[Mapping[str, Any]]:
    """The objects in a list."""
    return (one for one in answer if isinstance(one, dict)) if isinstance(answer, list) else iter(())
