"""Numbers of users for guests."""

from __future__ import annotations

import pytest

from kvmsupervisor.config.values import uids
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.uids import DEFAULT_UIDS, RESERVED, UidRange
from kvmsupervisor.domain.values import Unfit


def test_every_number_but_the_reserved_is_offered_once() -> None:
    """Law: each instance may have every number; which one it prefers depends on its id alone."""
    span = UidRange(70000, 70019)
    found = list(span.for_instance(InstanceId("web1")))
    assert sorted(found) == list(range(70000 + RESERVED, 70020))
    assert found == list(span.for_instance(InstanceId("web1")))
    assert {span.of_tools, span.of_kvm}.isdisjoint(found)
    preferred = {next(DEFAULT_UIDS.for_instance(InstanceId(f"vm{number}"))) for number in range(100)}
    assert len(preferred) > 95


def test_the_default_meets_no_usual_range() -> None:
    """Law: neither people nor DynamicUser= nor subordinate ids nor nspawn, by the sources that the module names."""
    for first, last in ((0, 60577), (61184, 65535), (100000, 600100000), (524288, 1879048191)):
        assert last < DEFAULT_UIDS.first or DEFAULT_UIDS.last < first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("70000", "first-last"),
        ("70000-x", "first-last"),
        ("0-70000", "between 1000"),
        ("60000-70000", "nobody"),
        ("65535-70000", "nobody"),
        ("3000000000-3000000100", "between 1000"),
        ("70000-70016", "18 numbers at least"),
        ("79999-70000", "18 numbers at least"),
    ],
)
def test_what_is_no_range(text: str, said: str) -> None:
    """Law: a slip stops the start, and what would be right is said."""
    with pytest.raises(Unfit, match=said):
        uids(text)


def test_a_range() -> None:
    """Law: both ends belong to it."""
    assert uids("70000 - 70017") == UidRange(70000, 70017)
    assert str(uids("1000-60000")) == "1000-60000"
