"""What `tests.support.lock_history` holds against a lock, broken by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage, take
from tests.support.lock_history import FORWARD, check_lock_values

ALPHA, BETA = HostName("alpha"), HostName("beta")


def taken(previous: Lock | None, host: HostName, name: str, *, closed: bool = False) -> Lock:
    """As the product takes one."""
    return take(
        previous,
        host=host,
        boot_id=f"boot of {host}",
        facts="/kvmsupervisor",
        incarnation=name,
        storage=Storage.RBD,
        closed=closed,
    )


def running(lock: Lock) -> Lock:
    return lock.recorded(pid=1, starttime=1, clients=(f"127.0.0.1:0/{lock.epoch}",))


FIRST = taken(None, ALPHA, "one")
SECOND = taken(running(FIRST), BETA, "two")
FENCED = SECOND.fenced(SECOND.fence)
THIRD = taken(FENCED, BETA, "three")
TAKEOVER = [FIRST, running(FIRST), SECOND, FENCED, running(FENCED)]


def test_a_takeover() -> None:
    """Law 4: taken from a dead host, fenced, started; and let go of."""
    assert check_lock_values([*TAKEOVER, None], takeovers=["alpha"]) == TAKEOVER


def test_an_end_in_order() -> None:
    """A host that takes its own again after an end in order has nothing to fence."""
    check_lock_values([FIRST, running(FIRST), taken(running(FIRST), ALPHA, "two", closed=True)])


@pytest.mark.parametrize(
    "locks",
    [
        pytest.param([FIRST, running(FIRST), SECOND, running(SECOND)], id="it ran before it had fenced"),
        pytest.param([FIRST, running(FIRST), FIRST], id="back"),
        pytest.param([running(FIRST)], id="it ran before it was taken"),
        pytest.param([FIRST, replace(running(FIRST), epoch=2)], id="another epoch"),
        pytest.param([FIRST, replace(running(FIRST), host=BETA)], id="another host"),
        pytest.param([FIRST, replace(running(FIRST), pid=None)], id="of no process"),
        pytest.param([FIRST, running(FIRST), None, taken(None, ALPHA, "two")], id="its epoch was there"),
        pytest.param([*TAKEOVER[:4], replace(THIRD, fence=())], id="an address is lost"),
        pytest.param([None], id="nothing was there"),
    ],
)
def test_what_is_refused(locks: list[Lock | None]) -> None:
    """Law: each of these is found."""
    with pytest.raises(AssertionError):
        check_lock_values(locks, takeovers=["alpha"])


def test_a_host_that_lives() -> None:
    """Law 4: no lock is taken from a host that did not die, unless an operator broke it."""
    with pytest.raises(AssertionError):
        check_lock_values(TAKEOVER)
    broken = running(FIRST).broken()
    check_lock_values([FIRST, running(FIRST), broken, taken(broken, BETA, "two")])


def test_some_of_its_addresses() -> None:
    """Law: who takes a lock fences all of an incarnation's clients or, after an end in order, none."""
    both = replace(running(FIRST), clients=("127.0.0.1:0/1", "127.0.0.1:0/2"))
    with pytest.raises(AssertionError):
        check_lock_values([FIRST, both, replace(taken(both, ALPHA, "two"), fence=both.clients[:1])])


def test_states_are_all_known() -> None:
    """None is without a row."""
    assert set(FORWARD) == set(LockState)
