"""What code finds that has broken out of a guest: a real QEMU with `doors.c` in it tries what `doors.py` lists.

All is in a few QEMUs: one for each set of measures, and one more for each door at which QEMU's filter ends QEMU.
"""

from __future__ import annotations

import os
import resource
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.attack.doors import ALL, DOORS, Door, Measure
from tests.attack.street import FILES, THREADS, Street, compiled, openable_handle

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has other users, and raises walls")


@pytest.fixture(scope="module")
def library() -> Iterator[Path]:
    with compiled() as made:
        yield made


def triable(door: Door) -> bool:
    """Whether this host is as open as the proof takes: a test cannot raise its own limits."""
    core, threads, files = (
        resource.getrlimit(one)[1] for one in (resource.RLIMIT_CORE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE)
    )
    enough = {
        "dump_core": core != 0,
        "many_threads": not 0 <= threads <= THREADS,
        "many_files": not 0 <= files <= FILES,
        # With all of root's rights, and no wall: what has no handles here is no door.
        "by_handle": openable_handle() is not None,
    }
    return enough.get(door.name, True)


def test_there_are_enough_of_them() -> None:
    """Law: at least 60, none twice, and each is stopped by something."""
    assert len({str(door) for door in DOORS}) == len(DOORS) >= 60
    assert all(door.stopped_by for door in DOORS)
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    assert f"tries {len(DOORS)} doors" in page


async def test_every_door_is_shut(library: Path) -> None:
    """Law: with all measures that a supervisor takes, none of them opens."""
    with ExitStack() as stack:
        street = Street(stack, library)
        assert sorted(map(str, await street.opened(DOORS))) == []


async def test_every_door_opens_without_what_stops_it(library: Path) -> None:
    """Law: each of them opens once what stops it is left out, and all else is there: the attacks are real."""
    kinds = defaultdict[frozenset[Measure], list[Door]](list)
    for door in filter(triable, DOORS):
        kinds[ALL - door.stopped_by].append(door)
    with ExitStack() as stack:
        street = Street(stack, library)
        shut = {}
        for measures, doors in kinds.items():
            if missing := sorted(map(str, {*doors} - await street.opened(doors, measures))):
                shut["+".join(sorted(measures))] = missing
        assert shut == {}


async def test_each_measure_stops_by_itself(library: Path) -> None:
    """Law: any single one of the measures of a door shuts it, when the others of that door are left out."""
    kinds = defaultdict[frozenset[Measure], list[Door]](list)
    for door in DOORS:
        for measure in door.stopped_by:
            kinds[(ALL - door.stopped_by) | {measure}].append(door)
    with ExitStack() as stack:
        street = Street(stack, library)
        found = {}
        for measures, doors in kinds.items():
            if opened := sorted(map(str, await street.opened(doors, measures))):
                found["+".join(sorted(measures))] = opened
        assert found == {}
