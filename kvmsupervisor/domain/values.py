"""Text that people write, turned into values: the parsers that the wishes and the settings share.

Each parser takes text without surrounding white space and returns the value, or raises `Unfit`, whose text
says what would be right. All of them are pure.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TypeVar

SHOWN_LENGTH = 80
"""Characters of a value that a message repeats. Arbitrary: enough to recognise it, short for a table."""

MIB_PER_UNIT = {"": 1, "m": 1, "g": 1024, "t": 1024 * 1024}
RAM_MAX_MIB = 16 * 1024 * 1024
"""16 TiB: more than any host has, and far below where QEMU's sizes overflow."""

SHUTDOWN_TIMEOUT_MAX_S = 86_400.0
"""A day. Arbitrary: for a longer wait `power` is the right key, not a time limit."""

BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Characters that are drawn as nothing: fillers of Hangul, and the Braille pattern without dots."""

SUGGESTION_CUTOFF = 0.75
"""How alike two names must be (`difflib`'s ratio). Arbitrary: `sipce_port` passes, `tag` does not."""

T = TypeVar("T")
_E = TypeVar("_E", bound=StrEnum)

_USERINFO = re.compile(r"//\S*@")
"""To the last `@`: a password that is not encoded for a URL may hold a slash."""
_RAM = re.compile(r"([0-9]{1,15}) *([mgt]?)(?:ib)?", re.IGNORECASE)
_MAC = re.compile(r"[0-9a-f]{2}(?:(?::[0-9a-f]{2}){5}|(?:-[0-9a-f]{2}){5})", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_WORD_PIECE = re.compile(
    r"""(?P<space>[ \t\r\n]+)|(?P<plain>[^ \t\r\n'"\\]+)|\\(?P<escaped>.)|'(?P<single>[^']*)'|"""
    r""""(?P<double>(?:[^"\\]|\\.)*)"|(?P<open>['"\\])""",
    re.DOTALL,
)
"""The pieces of words in a POSIX shell. In double quotes a backslash counts before a quote or another one only, because
nothing is expanded."""
_ESCAPED = re.compile(r"""\\(["\\])""")
_INTEGER = re.compile(r"[0-9]{1,18}")
_SECONDS = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,15})?")


class Unfit(ValueError):
    """A value that cannot be used. Its text says what would be right."""


def show(text: str) -> str:
    """`text` in quotes for a message: control characters visible, cut at about `SHOWN_LENGTH` characters."""
    shown = repr(text[:SHOWN_LENGTH])
    if len(text) <= SHOWN_LENGTH and len(shown) <= SHOWN_LENGTH + 2:
        return shown
    return f"{shown[: SHOWN_LENGTH + 1].rstrip(shown[0])}…{shown[0]} ({len(text)} characters)"


def some(things: Sequence[T], most: int, shown: Callable[[T], str] = str) -> str:
    """The first `most` of `things` for a message, and how many more there are."""
    named = ", ".join(map(shown, things[:most]))
    return f"{named} and {len(things) - most} more" if len(things) > most else named


def show_bytes(data: bytes) -> str:
    """Like `show`, for bytes that should be UTF-8."""
    try:
        return show(data.decode())
    except UnicodeDecodeError as error:
        shown = repr(data[:SHOWN_LENGTH])[: SHOWN_LENGTH + 2]
        return f"{shown} (not UTF-8 at byte {error.start})"


def invisible(text: str) -> str | None:
    """The first character of `text` that is invisible, or looks like a plain space, by its code point; else None.

    Control characters do not count: messages show them, and `echo` leaves a line feed at the end.
    """
    for char in text:
        if char in BLANKS or (char != " " and unicodedata.category(char) in {"Cf", "Zs", "Zl", "Zp"}):
            return _code_point(char)
    return None


def strange(text: str) -> str | None:
    """The first character of `text` that is invisible, or may look like ASCII, by its code point; else None.

    For messages about text that should be ASCII: a Cyrillic `a` in a name, or a full-width digit, looks right.
    """
    other = next((char for char in text if not char.isascii() and char.isprintable()), None)
    return invisible(text) or (None if other is None else _code_point(other))


def _code_point(char: str) -> str:
    return f"U+{ord(char):04X} {unicodedata.name(char, '')}".rstrip()


def without_userinfo(text: str) -> str:
    """`text` without the user and password of a URL in it, for messages that others may read."""
    return _USERINFO.sub("//…@", text)


def plain(name: str) -> str:
    """`name` without what people mix up: case, and `_` for `-`."""
    return name.lower().replace("_", "-")


def nearest(name: str, candidates: Mapping[str, str], cutoff: float = SUGGESTION_CUTOFF) -> str | None:
    """The candidate (`plain` name → name) that `name` probably means, or None."""
    from difflib import get_close_matches  # noqa: PLC0415 - only a typo pays for it

    # Longer names resemble none, and the time grows with the square of the length.
    typed = plain(name[:40])
    near = get_close_matches(typed, candidates, n=1, cutoff=cutoff)
    if not near and len(typed) > 1:
        # Two letters that changed places make a short word unlike itself, by difflib's count: `rma` for `ram`.
        near = [one for one in candidates if len(one) == len(typed) and sorted(one) == sorted(typed)]
    return candidates[near[0]] if near else None


def choice(kind: type[_E], what: str) -> Callable[[str], _E]:
    """Return a parser of the values of an enumeration."""

    def parse(text: str) -> _E:
        try:
            return kind(text)
        except ValueError:
            *others, last = kind
            raise Unfit(f"{what} is {', '.join(others)} or {last}") from None

    return parse


def matching(pattern: str, wanted: str) -> Callable[[str], str]:
    """Return a parser of texts that match `pattern` as a whole."""
    compiled = re.compile(pattern)

    def parse(text: str) -> str:
        if not compiled.fullmatch(text):
            raise Unfit(wanted)
        return text

    return parse


def integer(low: int, high: int, what: str) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`, in decimal digits."""

    def parse(text: str) -> int:
        if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise Unfit(f"{what} is a whole number from {low} to {high}")
        return int(text)

    return parse


def seconds(low: float, high: float, what: str) -> Callable[[str], float]:
    """Return a parser of seconds from `low` to `high`, with or without a fraction."""

    def parse(text: str) -> float:
        if not _SECONDS.fullmatch(text) or not low <= float(text) <= high:
            raise Unfit(f"{what} is a number of seconds from {low:g} to {high:g}, such as 30 or 0.5")
        return float(text)

    return parse


def ram_mib(text: str) -> int:
    """Memory in MiB from `2048` (MiB), `512M`, `2G`, `2GiB`, `1T`.

    Bare `MB` and `GB` are refused: some people mean powers of ten by them.
    """
    match = _RAM.fullmatch(text)
    if match is None or (text[-1] in "bB" and not match[2]):
        raise Unfit("memory is a whole number of MiB, or one with a unit M, G or T, such as 2048, 512M or 2G")
    mib = int(match[1]) * MIB_PER_UNIT[match[2].lower()]
    if not 1 <= mib <= RAM_MAX_MIB:
        raise Unfit("memory is at least 1M and at most 16T")
    return mib


def mac_address(text: str) -> str:
    """Return a unicast MAC address in lower case with colons, from one with colons or hyphens."""
    if not _MAC.fullmatch(text):
        raise Unfit(
            "a MAC address is six pairs of hexadecimal digits, such as 52:54:00:12:34:56"
            "; the commands `create` and `set` choose one for mac=auto"
        )
    address = text.lower().replace("-", ":")
    if int(address[:2], 16) & 1:
        raise Unfit("a NIC's MAC address is unicast: its first pair is an even number, such as 52")
    if address == "00:00:00:00:00:00":
        raise Unfit("a NIC's MAC address is not all zeros")
    return address


def interface_name(text: str) -> str:
    """Return the name of a network interface.

    The rule is Linux's own (`dev_valid_name` in net/core/dev.c), with two more: no control characters, for QEMU's
    bridge.conf, and no hyphen at the beginning, which `ip` would take for an option.
    """
    unfit = not 1 <= len(text.encode()) <= 15 or text in {".", ".."} or text.startswith("-")
    if unfit or any(c in "/:" or c.isspace() or not c.isprintable() for c in text):
        raise Unfit(
            "the name of a network interface has 1 to 15 bytes, no white space, '/' or ':', no '-' to begin with"
        )
    return text


def host_name(text: str) -> str:
    """Return a host's name, unchanged, because it is compared exactly."""
    if not _HOST.fullmatch(text):
        raise Unfit(
            "a host's name is letters, digits, '.', '_' and '-', beginning with a letter or digit, "
            "at most 253 characters"
        )
    return text


def shell_words(text: str) -> tuple[str, ...]:
    """Split `text` as a POSIX shell splits words: quotes and backslashes count, nothing is expanded.

    Python's shlex makes the same words in time that grows with the square of a word's length: two seconds for 64 KiB.
    """
    if "\0" in text:
        raise Unfit("a NUL character cannot be passed to a program: leave it out")
    words: list[list[str]] = []
    between = True
    for piece in _WORD_PIECE.finditer(text):
        kind, found = piece.lastgroup, piece[piece.lastgroup or 0]
        if kind == "open":
            lacks = "a character behind the backslash at its end" if found == "\\" else f"the other {found}"
            raise Unfit(f"every quote is closed, and a backslash stands before a character (it lacks {lacks})")
        if kind == "space":
            between = True
            continue
        if between:
            words.append([])
        between = False
        words[-1].append(_ESCAPED.sub(r"\1", found) if kind == "double" else found)
    return tuple("".join(word) for word in words)


_IP_ADDRESS = re.compile(r"[0-9A-Fa-f.:]+(?:%[A-Za-z0-9._-]+)?")


def ip_address(text: str) -> str:
    """An address of the host.

    Raises:
        Unfit: it is none.
    """
    try:
        # Python takes anything behind the % for an interface, a NUL too.
        return str(ipaddress.ip_address(text if _IP_ADDRESS.fullmatch(text) else ""))
    except ValueError:
        raise Unfit("it is an IP address of the host, such as 127.0.0.1, 0.0.0.0 or ::") from None
