"""`frozen` makes of a class what `dataclass(frozen=True, slots=True)` makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

import pytest

from kvmsupervisor.domain.frozen import frozen


@frozen
class Point:
    """Two numbers."""

    x: int
    y: int = 2


@frozen(kw_only=True)
class Shape:
    """With all that fields can be."""

    name: str
    at: Point = Point(0)
    tags: Mapping[str, str] = field(default_factory=dict)
    secret: str | None = field(default=None, repr=False, compare=False)
    length: int = field(init=False)

    def __post_init__(self) -> None:
        """Work out what follows from the others."""
        object.__setattr__(self, "length", len(self.name))

    def __repr__(self) -> str:
        return f"<{self.name}>"


@frozen
class Nothing:
    """Without a field."""


@frozen
class Alike:
    """Its fields are those of `Point`."""

    x: int
    y: int = 2


@dataclass(frozen=True, slots=True)
class Standard:
    """As the standard library makes it."""

    x: int
    y: int = 2


def test_values_and_defaults() -> None:
    assert (Point(1).x, Point(1).y, Point(1, 3).y, Point(y=4, x=1).y) == (1, 2, 3, 4)
    shape = Shape(name="abc")
    assert (shape.at, shape.tags, shape.secret, shape.length) == (Point(0, 2), {}, None, 3)
    assert Shape(name="a").tags is not Shape(name="a").tags
    assert isinstance(Nothing(), Nothing)


@pytest.mark.parametrize("arguments", [{}, {"y": 1}, {"x": 1, "z": 1}])
def test_wrong_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError) as ours:
        Point(**arguments)
    with pytest.raises(TypeError) as theirs:
        Standard(**arguments)
    assert str(ours.value).replace("Point", "Standard") == str(theirs.value)


def test_names_only() -> None:
    make: Any = Shape
    with pytest.raises(TypeError, match="positional"):
        make("abc")
    with pytest.raises(TypeError, match="length"):
        make(name="abc", length=3)


def test_nothing_can_be_changed() -> None:
    point: Any = Point(1)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'x'"):
        point.x = 2
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'x'"):
        del point.x
    with pytest.raises(FrozenInstanceError):
        point.other = 2
    assert point.x == 1
    assert not hasattr(point, "__dict__")


def test_equal_by_value() -> None:
    assert Point(1) == Point(1, 2)
    assert Point(1) != Point(2)
    others: list[object] = [Alike(1), (1, 2)]
    assert Point(1) not in others
    assert hash(Point(1)) == hash(Point(1, 2))
    assert len({Point(1), Point(1), Point(2)}) == 2
    assert Nothing() == Nothing()
    assert hash(Nothing()) == hash(Nothing())
    assert Shape(name="a", secret="1") == Shape(name="a", secret="2")
    assert Shape(name="a") != Shape(name="a", tags={"a": "b"})


def test_shown() -> None:
    assert repr(Point(1)) == repr(Standard(1)).replace("Standard", "Point")
    assert repr(Shape(name="a")) == "<a>"


def test_it_is_a_dataclass() -> None:
    assert Point.__match_args__ == ("x", "y")
    assert [one.name for one in fields(Shape)] == ["name", "at", "tags", "secret", "length"]
    assert replace(Point(1), y=5) == Point(1, 5)
    assert asdict(Shape(name="a")) == {"name": "a", "at": {"x": 0, "y": 2}, "tags": {}, "secret": None, "length": 1}
    assert is_dataclass(Point)
