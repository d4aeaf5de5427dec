"""HTML that is right by construction: text is escaped where it becomes part of a document, and nowhere else.

A `str` is text. Only `tag` and `join` make `Html`, of text that they have escaped and of other `Html`.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = frozenset({"input", "link", "meta", "br"})
"""Elements without an end tag that are used here (HTML standard, 13.1.2)."""


class Html(str):
    """A piece of a document, whole and escaped."""

    __slots__ = ()


Child = str | None
"""Text, `Html`, or nothing."""

NOTHING = Html()


def tag(name: str, /, *children: Child, **attributes: str | bool | None) -> Html:
    """An element.

    Args:
        name: of it, a literal.
        children: text is escaped.
        attributes: `class_` is class, `data_id` is data-id; None and False leave it out, True has no value.
    """
    said = "".join(
        f" {_name(key)}" if value is True else f' {_name(key)}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{said}>")
    return Html(f"<{name}{said}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Several pieces, one behind the other."""
    return Html("".join(one if isinstance(one, Html) else escape(one) for one in children if one is not None))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
