"""Frozen dataclasses as JSON objects: written, and read with care, as others may have written them (locks, statuses).

An unknown field is left out, and a missing one takes its default. A field of another type than the dataclass says makes
the whole object unfit: no decision is based on a part of it.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, NewType, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def shallow(record: Any) -> dict[str, Any]:
    """The fields of a dataclass by name.

    The values are not copied, because a record is frozen; `dataclasses.asdict` copies them and costs ten times as much.
    """
    return {name: getattr(record, name) for name in _names(cast("Hashable", type(record)))}


_COMPACT = json.JSONEncoder(separators=(",", ":"), default=shallow)
_PLAIN = json.JSONEncoder(default=shallow)


def compact(record: Any) -> bytes:
    """A dataclass as a JSON object without white space."""
    return _COMPACT.encode(shallow(record)).encode()


def lined(record: Any) -> bytes:
    """A dataclass as a JSON object with one field per line, for files that people look into.

    With Python's own indentation the fast encoder would not be used.
    """
    named = zip(_line_starts(cast("Hashable", type(record))), shallow(record).values(), strict=True)
    return ("{\n" + ",\n".join(start + _PLAIN.encode(value) for start, value in named) + "\n}").encode()


@cache
def _line_starts(cls: Any) -> tuple[str, ...]:
    return tuple(f" {_PLAIN.encode(name)}: " for name in _names(cls))


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


class Unfit(Exception):
    """The data is not the expected object. The message says why."""


def parse(cls: type[T], data: bytes) -> T:
    """Read one JSON object as a `cls`.

    Raises:
        Unfit: it is not JSON, not an object, or a field is missing or of another type.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"it is not JSON ({error})") from error
    return build(cls, found)


def build(cls: type[T], found: object) -> T:
    """Make a `cls` of a parsed JSON object; see `parse`."""
    if not isinstance(found, dict):
        raise Unfit("it is not a JSON object")
    values: dict[str, Any] = {}
    for name, (hint, required) in _schema(cast("Hashable", cls)).items():
        if name in found:
            try:
                values[name] = _fit(hint, found[name])
            except (TypeError, ValueError) as error:
                raise Unfit(f"its field {name} is {found[name]!r:.80}") from error
        elif required:
            raise Unfit(f"its field {name} is missing")
    return cls(**values)


@cache
def _schema(cls: Any) -> Mapping[str, tuple[Any, bool]]:
    """Each field's type, and whether it has no default."""
    hints = get_type_hints(cls)
    return {
        field.name: (hints[field.name], field.default is MISSING and field.default_factory is MISSING)
        for field in fields(cls)
    }


def _fit(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`; TypeError or ValueError when it is of another type."""
    # Exactly: JSON's true is no number. Most fields have plain types, which are done here.
    if type(value) is hint:
        return value
    if isinstance(hint, NewType):
        return _fit(hint.__supertype__, value)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {UnionType, Union}:
        if value is None and NoneType in arguments:
            return None
        (one,) = (argument for argument in arguments if argument is not NoneType)
        return _fit(one, value)
    if origin is tuple and isinstance(value, list):
        return tuple(_fit(arguments[0], item) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if hint is float and type(value) in {int, float}:
        return float(value)
    raise TypeError
