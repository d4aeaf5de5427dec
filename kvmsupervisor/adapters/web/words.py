"""Untrusted text for people: of keys, of QEMU, of guests. It neither hides nor reverses what stands beside it."""

from __future__ import annotations

TEXT_LIMIT = 400
"""The most characters of a text on a page. Arbitrary; the JSON has all of them."""


def visible(found: object, limit: int = TEXT_LIMIT) -> str:
    r"""Any value as text of a bounded length, of characters that can be seen.

    Control characters, bidirectional overrides and lone surrogates are not printable. They are shown as \x1b or \u202e.
    """
    text = str(found)
    if len(text) > limit:
        text = text[:limit] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
