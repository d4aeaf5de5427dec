"""`delete` of what is left of a machine without keys: what no host takes away, and nothing that protects a disk."""

from __future__ import annotations

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World


def facts(world: World) -> set[str]:
    """All keys but sessions."""
    return {key for key in world.etcd.data if "/hosts/" not in key}


def lock(world: World, host: str, storage: Storage, state: LockState = LockState.RUNNING) -> None:
    """Write a lock of instance 1."""
    held = Lock(host=HostName(host), boot_id="b", epoch=1, state=state, incarnation="i1", storage=storage)
    world.etcd.write(world.layout.lock_key(InstanceId("1")), held.to_json())


def test_a_status_of_a_host_that_is_gone_goes_with_the_keys(world: World) -> None:
    """A machine that was off when its host went away for good: nobody else would ever delete its status."""
    world.host("beta")
    world.keys("1", host="alpha", ram="1G", power="off")
    world.status("1", "alpha", Phase.STOPPED)
    assert world.run("delete", "1", "--yes").exit_code == 0
    assert facts(world) == set()


def test_a_status_of_a_host_that_its_keys_named_no_more_goes_with_them(world: World) -> None:
    """Its `host` was mistyped, and the old one has let go of it: it stays in no list until that one starts again."""
    world.host("alpha")
    world.keys("1", host="alhpa", ram="1G", power="off")
    world.status("1", "alpha", Phase.STOPPED)
    assert world.run("delete", "1", "--yes").exit_code == 0
    assert facts(world) == set()


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.STOPPED])
def test_a_host_that_is_there_sees_to_it_itself(world: World, phase: Phase) -> None:
    """Its status is the host's to delete, and says until then how far it has come."""
    world.running("1")
    world.host("alpha")
    world.status("1", "alpha", phase, pid=7 if phase is Phase.RUNNING else None)
    assert world.run("delete", "1", "--yes").exit_code == 0
    assert "/kvmsupervisor/instances/1" in facts(world)
    assert "/kvm/1/lock" in facts(world)


def test_what_is_left_without_keys_is_taken_away(world: World) -> None:
    """Keys that were deleted while the host was gone for good: a second `delete` takes status and lock."""
    world.host("beta")
    world.status("1", "alpha", Phase.RUNNING, pid=7)
    lock(world, "alpha", Storage.NONE)
    result = world.run("delete", "1", "--yes")
    assert (result.exit_code, result.stdout) == (0, "1 removed\n")
    assert facts(world) == set()


@pytest.mark.parametrize(
    ("storage", "way"), [(Storage.RBD, "takes the lock over"), (Storage.UNFENCEABLE, "`break-lock 1`")]
)
def test_a_lock_that_protects_a_disk_stays(world: World, storage: Storage, way: str) -> None:
    """Its host may only have lost its network: refused, with what is right instead; a broken one may go."""
    world.status("1", "alpha", Phase.RUNNING, pid=7)
    lock(world, "alpha", storage)
    before = dict(world.etcd.data)
    result = world.run("delete", "1", "--yes")
    assert result.exit_code == 1
    assert way in result.stderr
    assert world.etcd.data == before
    lock(world, "alpha", storage, LockState.BROKEN)
    assert world.run("delete", "1", "--yes").exit_code == 0
    assert facts(world) == set()


def test_nothing_of_a_living_host_is_taken_away(world: World) -> None:
    """A lock or a process of a host with a session: that host shuts it down."""
    world.host("alpha")
    world.status("1", "alpha", Phase.STOPPING, pid=7)
    before = dict(world.etcd.data)
    assert world.run("delete", "1", "--yes").exit_code == 1
    assert world.etcd.data == before
    lock(world, "alpha", Storage.NONE)
    before = dict(world.etcd.data)
    assert "shuts it down" in world.run("delete", "1", "--yes").stderr
    assert world.etcd.data == before


def test_a_process_without_a_lock_is_not_forgotten(world: World) -> None:
    """Its status is all that keeps a second QEMU from its disks: named, with the key to delete by hand."""
    world.status("1", "alpha", Phase.RUNNING, pid=7)
    result = world.run("delete", "1", "--yes")
    assert result.exit_code == 1
    assert "/kvmsupervisor/instances/1" in result.stderr


def test_a_host_that_comes_back_meanwhile_keeps_its_lock(world: World) -> None:
    """The write compares that the holder still has no session."""
    lock(world, "alpha", Storage.NONE)
    original = world.etcd.peer

    def peer() -> object:
        client = original()

        async def hook(call: str) -> None:
            if call == "txn":
                world.host("alpha")

        client.hook = hook
        return client

    world.etcd.peer = peer  # type: ignore[method-assign, assignment]
    assert world.run("delete", "1", "--yes").exit_code == 1
    assert "/kvm/1/lock" in facts(world)
