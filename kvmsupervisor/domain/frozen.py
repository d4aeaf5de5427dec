"""Frozen dataclasses that are made fast.

The program has 130 of them. `dataclass(frozen=True)` writes and compiles six methods for each class, which took a third
of the time in which the program is imported (Python 3.11). Here only `__init__` is compiled. The other methods are the
same for all classes: closures over the names of the fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields
from operator import attrgetter
from typing import Any, NoReturn, TypeVar, dataclass_transform, overload

T = TypeVar("T")


@overload
def frozen(cls: type[T], /) -> type[T]: ...
@overload
def frozen(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T] | None = None, /, *, kw_only: bool = False) -> type[T] | Callable[[type[T]], type[T]]:
    """Make a class what `dataclass(frozen=True, slots=True)` makes of it: with `replace`, `fields`, and so on.

    What the class defines by itself is kept. Not supported: `InitVar`, `weakref_slot`, pickling and copying.
    """

    def make(plain: type[T]) -> type[T]:
        made = dataclass(init=False, repr=False, eq=False, slots=True, kw_only=kw_only)(plain)
        for name, method in {
            "__init__": _init(made),
            "__repr__": _repr(made),
            "__eq__": _eq(made),
            "__hash__": _hash(made),
            "__setattr__": _refuse_to_set,
            "__delattr__": _refuse_to_delete,
        }.items():
            # A class that defines `__eq__` has the entry `__hash__ = None` by that.
            if plain.__dict__.get(name) is None:
                setattr(made, name, method)
        return made

    return make if cls is None else make(cls)


def _init(cls: type[Any]) -> Callable[..., None]:
    """`__init__` of one class, compiled: it runs more often than all others, and says what is missing."""
    known: dict[str, Any] = {"_MISSING": MISSING}
    by_place: list[str] = ["self"]
    by_name: list[str] = []
    body: list[str] = []
    for one in fields(cls):
        known[f"_set_{one.name}"] = getattr(cls, one.name).__set__
        if one.init:
            (by_name if one.kw_only else by_place).append(_parameter(one, known))
            value = one.name
            if one.default_factory is not MISSING:
                value = f"_make_{one.name}() if {one.name} is _MISSING else {one.name}"
            body.append(f" _set_{one.name}(self, {value})")
    if hasattr(cls, "__post_init__"):
        body.append(" self.__post_init__()")
    parameters = ", ".join([*by_place, *(["*", *by_name] if by_name else [])])
    exec("\n".join([f"def __init__({parameters}):", *body, " pass"]), known)  # noqa: S102 - names of fields only
    made: Callable[..., None] = known["__init__"]
    made.__qualname__ = f"{cls.__qualname__}.__init__"
    return made


def _parameter(one: Field[Any], known: dict[str, Any]) -> str:
    """How `__init__` names one field; what it refers to is put into `known`."""
    if one.default_factory is not MISSING:
        known[f"_make_{one.name}"] = one.default_factory
        return f"{one.name}=_MISSING"
    if one.default is not MISSING:
        known[f"_default_{one.name}"] = one.default
        return f"{one.name}=_default_{one.name}"
    return one.name


def _values(names: list[str]) -> Callable[[Any], Any]:
    """What is compared of an object; the same for two that are equal."""
    return attrgetter(*names) if names else lambda _: ()


def _eq(cls: type[Any]) -> Callable[[Any, object], bool]:
    values = _values([one.name for one in fields(cls) if one.compare])

    def __eq__(self: Any, other: object) -> bool:  # noqa: N807
        if other is self:
            return True
        if other.__class__ is not self.__class__:
            return NotImplemented
        return bool(values(self) == values(other))

    return __eq__


def _hash(cls: type[Any]) -> Callable[[Any], int]:
    values = _values([one.name for one in fields(cls) if one.compare])

    def __hash__(self: Any) -> int:  # noqa: N807
        return hash(values(self))

    return __hash__


def _repr(cls: type[Any]) -> Callable[[Any], str]:
    names = [one.name for one in fields(cls) if one.repr]

    def __repr__(self: Any) -> str:  # noqa: N807
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.__class__.__qualname__}({shown})"

    return __repr__


def _refuse_to_set(self: Any, name: str, value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self: Any, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
