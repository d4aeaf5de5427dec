"""What a chaos run sees beside its disks: each violation is planted once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.status import Phase, Status
from tests.chaos.truth import KILLED, false_status, killed_for_nothing, off_the_record
from tests.support.cluster import Qemu


def lock(name: str, epoch: int, **more: Any) -> Lock:
    return Lock(
        host=HostName("a"), boot_id="boot", epoch=epoch, state=LockState.RUNNING, incarnation=name, pid=epoch, **more
    )


ONE, TWO = lock("one", 1, clients=("x",)), lock("two", 2, clients=("y",))
END = {"incarnation": "one", "reason": f"{KILLED}: its lock has gone to b"}


@pytest.mark.parametrize(
    ("locks", "owners", "ordered", "rightly"),
    [
        ([ONE], ["one"], False, False),
        ([ONE, TWO], ["one"], False, True),
        ([ONE, ONE.broken()], ["one"], False, True),
        ([ONE, None], ["one"], False, False),
        ([ONE], [], False, True),
        ([ONE], ["one"], True, True),
    ],
)
def test_who_was_killed(locks: Sequence[Lock | None], owners: list[str], ordered: bool, rightly: bool) -> None:
    """Law 6: a guest that ran is killed for a lock that has gone on, or by an order."""
    found = list(killed_for_nothing([END], owners=owners, locks=locks, ordered=ordered))
    assert len(found) == (not rightly)
    assert (
        list(killed_for_nothing([{**END, "reason": "guest-shutdown"}], owners=owners, locks=[ONE], ordered=False)) == []
    )


@dataclass
class Process:
    """As much of a `Qemu` as is looked at."""

    instance: str
    incarnation: str
    pid: int = 2
    alive: bool = True


def test_who_is_on_record() -> None:
    """Law 8: of what lives there is a record."""
    living = cast("list[Qemu]", [Process("vm", "one"), Process("vm", "two"), Process("vm", "three", alive=False)])
    assert off_the_record(living, {"vm": '{"incarnation":"one"}'}) == ["two"]


def test_what_a_status_says_of_a_machine_that_runs() -> None:
    """Its process, and the epoch of that."""
    status = Status(
        id="vm", host="a", phase=Phase.RUNNING, reason="runs", since="", pid=2, epoch=2, run_state="running"
    )
    qemus = cast("list[Qemu]", [Process("vm", "two")])
    assert false_status(status, TWO, qemus, {"a"}) is None
    assert false_status(None, TWO, qemus, {"a"}) == "there is none"
    assert "QEMU 2 lives" in (false_status(status, TWO, [], {"a"}) or "")
    assert "its epoch is 2" in (false_status(status, replace(TWO, epoch=3), qemus, {"a"}) or "")
