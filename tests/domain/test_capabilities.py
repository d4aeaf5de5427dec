"""Which capabilities are missing, and what is said of it."""

from __future__ import annotations

import pytest

from kvmsupervisor.domain.capabilities import NET_ADMIN, TO_BE_ANOTHER, Capability, lacking, what_is_lacking

ALL = sum(1 << one.number for one in TO_BE_ANOTHER)


@pytest.mark.parametrize("less", TO_BE_ANOTHER, ids=lambda one: one.name)
def test_each_one_is_missed(less: Capability) -> None:
    """Law: exactly what is not in the set is lacking, whatever else is in it."""
    assert lacking(ALL, TO_BE_ANOTHER) == ()
    assert lacking(ALL & ~(1 << less.number) | 1 << 40, TO_BE_ANOTHER) == (less,)
    assert lacking(0, TO_BE_ANOTHER) == TO_BE_ANOTHER


def test_people_are_told_why_and_what_to_do() -> None:
    """Law: the kernel's name, the reason, and the options of a container that mend it."""
    said = what_is_lacking((NET_ADMIN, TO_BE_ANOTHER[0]))
    assert said.startswith("CAP_NET_ADMIN (taps are made, and plugged into bridges); CAP_CHOWN (")
    assert said.endswith("Run the container with --cap-add=NET_ADMIN --cap-add=CHOWN")
