"""Words for other programs: the value of a key or a setting may be an argument, never an option.

The supervisor makes every command line of these forms. A value that a person wrote follows the name of an option in the
same word (`option`), or is part of an option string that it cannot end (`escaped`, `json_option`), or is a name that no
program takes for an option (`is_name`, which parsers check). Only `extra_flags` is free-form: its words are the user's
own options, for QEMU and for no other program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

NAME_LENGTH = 255
"""Most characters of a name. Linux's limit for a file name (NAME_MAX, limits.h): it may become one."""


def option(name: str, value: str) -> str:
    """`--name=value` in one word: whatever the value begins with, it is read as the value."""
    return f"{name}={value}"


def escaped(value: str) -> str:
    """`value` as part of an option string of QEMU, which reads two commas as one comma in a value."""
    return value.replace(",", ",,")


def json_option(value: Mapping[str, Any]) -> str:
    """An option's argument in JSON, which no value can break."""
    return json.dumps(value, separators=(",", ":"))


def is_name(text: str) -> bool:
    """Whether `text` may stand anywhere: alone, in a path, in a unit's name, in JSON."""
    return len(text) <= NAME_LENGTH and bool(_NAME.fullmatch(text))


def may_begin_a_word(text: str) -> bool:
    """Whether no program takes `text` for an option."""
    return bool(text) and not text.startswith("-")
