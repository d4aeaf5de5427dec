"""`user-data=@FILE`: the value of a key that is read from a file, because nobody types it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from kvmsupervisor.domain.parse_keys import VALUE_LIMIT
from kvmsupervisor.domain.values import show

FROM_FILE = frozenset({"user-data"})
"""Keys whose value is read from a file where it begins with `@`. No sound value of these begins so."""

STDIN = "-"


class Unreadable(Exception):
    """The file cannot be the value. The message says what was found, and what would be right."""


def value_of(name: str, text: str, read_stdin: Callable[[int], bytes] | None = None) -> str:
    """The value for a key, as it was typed.

    Args:
        name: of the key.
        text: behind the `=`.
        read_stdin: reads so many bytes of standard input.

    Raises:
        Unreadable: there is no such file, or it is too large, or no text.
    """
    if name not in FROM_FILE or not text.startswith("@"):
        return text
    path = text.removeprefix("@")
    if not path:
        raise Unreadable(f"{name}=@ names no file: {name}=@FILE, or {name}=@- for standard input")
    said = "standard input" if path == STDIN else f"file {show(path)}"
    try:
        # One byte more than fits. A pipe has no size, and `<(…)` of a shell is one.
        if path == STDIN:
            data = (read_stdin or sys.stdin.buffer.read)(VALUE_LIMIT + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(VALUE_LIMIT + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unreadable(f"{name}: {said} cannot be read: {why}") from error
    if len(data) > VALUE_LIMIT:
        raise Unreadable(
            f"{name}: {said} has more than {VALUE_LIMIT} bytes, the most that a value has; put it on a web server, and "
            "its URL into cloud-config"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"{name}: {said} is no text (not UTF-8 at byte {error.start}); data that is packed or not text is served "
            "from a URL in cloud-config"
        ) from error


def completions(incomplete: str) -> list[str]:
    """The names of files that the word `KEY=@…` can go on with."""
    name, equals, text = incomplete.partition("=")
    if name not in FROM_FILE or not equals:
        return []
    if not text.startswith("@"):
        return [f"{name}=@"] if not text else []
    typed = text.removeprefix("@")
    folder = Path(typed).parent if not typed.endswith("/") else Path(typed)
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return []
    start = typed[: len(typed) - len(Path(typed).name)] if not typed.endswith("/") else typed
    names = (start + one.name + ("/" if one.is_dir() else "") for one in found)
    # A shell splits words at spaces and expands some characters: a name with those is typed by hand.
    return [
        f"{name}=@{one}" for one in names if one.startswith(typed) and not set(one) & set(" \t\n\\'\"$`*?&|;<>(){}[]!#")
    ]
