"""Frozen dataclasses as JSON objects: written, and read with care, as others may have written them (locks, statuses).

An unknown field is left out, and a missing one takes its default. A field of another type than the dataclass says makes
the whole object unfit: no decision is based on a part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache, partial
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, NewType, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def shallow(record: Any) -> dict[str, Any]:
    """The fields of a dataclass by name.

    The values are not copied, because a record is frozen; `dataclasses.asdict` copies them and costs ten times as much.
    """
    names = _names(cast("Hashable", type(record)))
    return dict(zip(names, map(getattr, repeat(record), names), strict=True))


_COMPACT = json.JSONEncoder(separators=(",", ":"), default=shallow)
_LINED = json.JSONEncoder(separators=(",\n ", ": "), default=shallow)


def compact(record: Any) -> bytes:
    """A dataclass as a JSON object without white space."""
    return _COMPACT.encode(shallow(record)).encode()


def lined(record: Any) -> bytes:
    """A dataclass as a JSON object with one value per line, for files that people look into.

    With Python's own indentation the fast encoder would not be used.
    """
    return f"{{\n {_LINED.encode(shallow(record))[1:-1]}\n}}".encode()


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def plain(record: Any) -> dict[str, Any]:
    """A dataclass as the object that `json` reads from what it has written of it."""
    return {name: _plain(value) for name, value in shallow(record).items()}


def _plain(value: Any) -> Any:
    if value is None or type(value) in {str, int, float, bool}:
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return plain(value) if is_dataclass(value) else value


class Unfit(Exception):
    """The data is not the expected object. The message says why."""


def parse(cls: type[T], data: bytes) -> T:
    """Read one JSON object as a `cls`.

    Raises:
        Unfit: it is not JSON, not an object, or a field is missing or of another type.
    """
    return build(cls, load(data))


def load(data: bytes) -> object:
    """Read JSON, for `build`.

    Raises:
        Unfit: it is not JSON.
    """
    try:
        found: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"it is not JSON ({error})") from error
    return found


def build(cls: type[T], found: object) -> T:
    """Make a `cls` of a parsed JSON object; see `parse`."""
    if not isinstance(found, dict):
        raise Unfit("it is not a JSON object")
    values: dict[str, Any] = {}
    for name, (read, required) in _schema(cast("Hashable", cls)).items():
        if name in found:
            try:
                values[name] = read(found[name])
            except (TypeError, ValueError) as error:
                raise Unfit(f"its field {name} is {found[name]!r:.80}") from error
        elif required:
            raise Unfit(f"its field {name} is missing")
    return cls(**values)


Reader = Callable[[Any], Any]
"""Makes what a field holds of what JSON has; TypeError or ValueError when that is of another type."""


@cache
def _schema(cls: Any) -> Mapping[str, tuple[Reader, bool]]:
    """How each field is read, and whether it has no default."""
    hints = get_type_hints(cls)
    return {
        field.name: (_reader(hints[field.name]), field.default is MISSING and field.default_factory is MISSING)
        for field in fields(cls)
    }


@cache
def _reader(hint: Any) -> Reader:
    """What reads values of one type. Types are looked at once, and not again for each value."""
    if isinstance(hint, NewType):
        return _reader(hint.__supertype__)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {UnionType, Union}:
        (one,) = (argument for argument in arguments if argument is not NoneType)
        read = _reader(one)
        return lambda value: None if value is None else read(value)
    if origin is tuple:
        item = _reader(arguments[0])
        return lambda value: tuple(map(item, _exactly(list, value)))
    if origin is Mapping:
        return partial(_exactly, dict)
    if is_dataclass(hint) and isinstance(hint, type):
        return partial(build, hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint
    if hint is float:
        return lambda value: float(value) if type(value) is int else _exactly(float, value)
    return partial(_exactly, hint)


def _exactly(kind: type[T], value: Any) -> T:
    """`value`, of that type and no other: JSON's true is no number."""
    if type(value) is not kind:
        raise TypeError
    return value
