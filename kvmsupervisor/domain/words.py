"""Words that reach other programs: what a key or a setting says may be an argument, never an option.

Every command line that the supervisor runs is made of these forms. A value that a person wrote either stands behind the
name of an option in the same word (`option`), or in an option string in which it cannot end (`escaped`, `json_option`),
or is a name that no program takes for an option (`is_name`, which parsers ask). What is free-form is `extra_flags`
alone: its words are the user's own options, for QEMU and for no other program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

NAME_LENGTH = 255
"""Characters of a name. Linux's limit of a file's name (NAME_MAX, limits.h): it may become one."""


def option(name: str, value: str) -> str:
    """`--name=value` in one word: whatever the value begins with, it is read as the value."""
    return f"{name}={value}"


def escaped(value: str) -> str:
    """`value` as part of one of QEMU's option strings: it reads two commas as one that does not separate."""
    return value.replace(",", ",,")


def json_option(value: Mapping[str, Any]) -> str:
    """An option's argument in JSON, from which nothing can break out."""
    return json.dumps(value, separators=(",", ":"))


def is_name(text: str) -> bool:
    """Whether `text` may stand anywhere: alone, in a path, in a unit's name, in JSON."""
    return len(text) <= NAME_LENGTH and bool(_NAME.fullmatch(text))


def may_begin_a_word(text: str) -> bool:
    """Whether no program takes `text` for an option."""
    return bool(text) and not text.startswith("-")
