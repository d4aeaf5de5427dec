"""`remove-host`: what a host that is gone for good has left goes; wishes, and what may protect a disk, stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.placement import FAILOVER, Placement
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import SINCE, World

ALPHA = HostName("alpha")


@pytest.fixture
def left(world: World) -> World:
    """Alpha is gone, and has the last word about 1, which has no keys, and 2, which is off and beta's. 3 runs there."""
    world.host("beta")
    world.status("1", "alpha", Phase.STOPPED)
    world.keys("2", host="beta", ram="1G", power="off", hosts="alpha beta")
    world.status("2", "alpha", Phase.STOPPED)
    world.running("3", "beta")
    world.etcd.write(world.layout.confirmation_key(ALPHA), b"x")
    return world


def place(world: World, instance: str, *, on: str, of: int) -> None:
    placed = Placement(host=HostName(on), why=FAILOVER, since=SINCE, of=of)
    world.etcd.write(world.layout.placement_key(InstanceId(instance)), placed.to_json())


def test_its_last_words_go_and_nothing_else(left: World) -> None:
    """Each key that went is named; wishes that name it as a candidate are a person's to change."""
    before = dict(left.etcd.data)
    result = left.run("remove-host", "alpha", "--yes")
    assert result.exit_code == 0, result.output
    gone = {"/kvmsupervisor/instances/1", "/kvmsupervisor/instances/2", "/kvmsupervisor/confirm-removal/alpha"}
    assert before.keys() - left.etcd.data.keys() == gone
    assert all(f"deleted {key}\n" in result.stdout for key in gone)
    assert "`hosts` still names alpha as a candidate for: 2" in result.stderr
    assert "has left nothing" in left.run("remove-host", "alpha", "--yes").stdout


def test_a_person_is_asked(left: World) -> None:
    """Without a terminal `--yes` is needed; No deletes nothing."""
    before = dict(left.etcd.data)
    assert left.run("remove-host", "alpha").exit_code == 2
    assert left.run("remove-host", "alpha", input_text="n\n", asked=True).exit_code == 1
    assert left.etcd.data == before


def lock(world: World, *, state: LockState = LockState.RUNNING) -> None:
    held = Lock(host=ALPHA, boot_id="b", epoch=1, state=state, incarnation="i1")
    world.etcd.write(world.layout.lock_key(InstanceId("9")), held.to_json())


def named(world: World) -> None:
    world.keys("9", host="alpha", ram="1G")


def placed(world: World) -> None:
    place(world, "9", on="alpha", of=world.keys("9", host="beta"))


def running_without_keys(world: World) -> None:
    world.status("9", "alpha", Phase.RUNNING, pid=7)


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (lambda world: world.host("alpha"), "alpha has a session"),
        (named, "`set 9 host=OTHER`"),
        (placed, "it was placed there for beta"),
        (lock, "may have a QEMU that writes"),
        (running_without_keys, "was last seen running there"),
    ],
)
def test_what_still_needs_it_is_named_and_nothing_goes(left: World, needs: Callable[[World], None], said: str) -> None:
    """All or nothing: a host that may come back, or that protects a disk, keeps what it has said."""
    needs(left)
    before = dict(left.etcd.data)
    result = left.run("remove-host", "alpha", "--yes")
    assert (result.exit_code, said in result.stderr) == (1, True), result.stderr
    assert left.etcd.data == before


def test_a_broken_lock_does_not_keep_it(left: World) -> None:
    """A person has said that no QEMU of it is left."""
    left.keys("9", host="beta", ram="1G", power="off")
    lock(left, state=LockState.BROKEN)
    assert left.run("remove-host", "alpha", "--yes").exit_code == 0
    assert left.layout.lock_key(InstanceId("9")) in left.etcd.data


def test_a_host_that_comes_back_keeps_all(left: World, acting: Callable[[Callable[[str], None]], None]) -> None:
    """It came back after the question was answered: every write compares that it has no session."""
    acting(lambda call: left.host("alpha") if call == "txn" else None)
    result = left.run("remove-host", "alpha", "--yes")
    assert (result.exit_code, "changed meanwhile" in result.stderr) == (1, True), result.output
    assert left.layout.status_key(InstanceId("1")) in left.etcd.data
