"""`break-lock`: what may be broken, what is said before, and what is written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.domain.history import HistoryName
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World

ONE = InstanceId("1")
HELD = Lock(
    host=HostName("beta"), boot_id="b", epoch=3, state=LockState.RUNNING, incarnation="i3", pid=77, starttime=5,
    clients=("192.0.2.1:0/1",), fence=("192.0.2.1:0/2",), storage=Storage.UNFENCEABLE,
)  # fmt: skip


@pytest.fixture
def held(world: World) -> World:
    """A machine that shall run on alpha and that beta holds, which has no session."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G", extra_flags="-drive file=/srv/1.img")
    put(world, HELD)
    world.status("1", "beta", Phase.RUNNING, pid=77, epoch=3, incarnation="i3")
    return world


def put(world: World, lock: Lock) -> None:
    world.etcd.write(world.layout.lock_key(ONE), lock.to_json())


def lock_of(world: World) -> Lock | None:
    return Lock.from_json(world.etcd.data[world.layout.lock_key(ONE)])


def test_what_is_at_stake_is_said_and_all_there_is_to_fence_is_kept(held: World) -> None:
    """Law 7: names holder, process and risk; what could be fenced after all is still fenced by the next taker."""
    result = held.run("break-lock", "1", "--yes")
    assert result.exit_code == 0, result.output
    for said in ("beta", "epoch 3", "process 77", "has no session", "two machines write to one disk"):
        assert said in result.stdout
    assert lock_of(held) == replace(HELD, state=LockState.BROKEN)


@pytest.mark.parametrize(
    ("guarded", "incarnation", "said"),
    [
        (True, "i3", "it is dead by now, unless the guard has ended or hangs"),
        (False, "i3", "a guard should have watched it there, but did not"),
        (None, "i3", "lost no more than its network"),
        (True, "an earlier one", "lost no more than its network"),
    ],
)
def test_what_its_guard_means_is_said(held: World, guarded: bool | None, incarnation: str, said: str) -> None:
    """Law 7: a guard is told of, as far as is known, and is no proof: the word is the operator's all the same."""
    held.status("1", "beta", Phase.RUNNING, pid=77, epoch=3, incarnation=incarnation, guarded=guarded)
    result = held.run("break-lock", "1", "--yes")
    assert result.exit_code == 0, result.output
    assert said in result.stdout
    assert "two machines write to one disk" in result.stdout


def test_nobody_is_there_to_be_asked(held: World) -> None:
    """Without a terminal it needs `--yes`, and writes nothing."""
    assert held.run("break-lock", "1", input_text="y\n").exit_code == 2
    assert lock_of(held) == HELD


def test_a_holder_with_a_session(held: World) -> None:
    """Law 7: a host that lives stops its machine itself."""
    held.host("beta")
    result = held.run("break-lock", "1", "--yes")
    assert (result.exit_code, "has a session" in result.stderr) == (1, True)
    assert lock_of(held) == HELD


@pytest.mark.parametrize(("machine", "exit_code"), [("second", 0), ("first", 1), ("", 1)])
def test_another_machine_under_the_name_of_the_holder(held: World, machine: str, exit_code: int) -> None:
    """Law 12: its session says nothing of the holder; the same machine, or one that is not known, has rebooted."""
    put(held, replace(HELD, machine="first"))
    session = HostSession(host="beta", version="1", url="", boot_id="another", machine=machine)
    held.etcd.write(held.layout.session_key(HostName("beta")), session.to_json())
    result = held.run("break-lock", "1", "--yes")
    assert result.exit_code == exit_code, result.output
    broken = lock_of(held)
    assert broken is not None
    assert (broken.state is LockState.BROKEN) == (exit_code == 0)


def named(world: World, *, number: int) -> None:
    """Etcd has a history of this name."""
    name = HistoryName(id="present", number=number, by="alpha")
    world.etcd.write(world.layout.history_key, name.to_json())


@pytest.mark.parametrize("state", [LockState.RUNNING, LockState.BROKEN])
def test_a_lock_from_before_a_change_of_history(held: World, state: LockState) -> None:
    """Law 11: who has the disks open is fenced by a word only; the lock says in which history that was given."""
    on_rbd = replace(HELD, storage=Storage.RBD, state=state)
    put(held, on_rbd)
    named(held, number=1)
    result = held.run("break-lock", "1", "--yes")
    assert result.exit_code == 0, result.output
    assert "whoever has them open is fenced" in result.stdout
    assert lock_of(held) == replace(on_rbd, state=LockState.BROKEN, history="present")


@pytest.mark.parametrize(("number", "history"), [(0, None), (1, "present")])
def test_a_lock_of_the_present_history(held: World, number: int, history: str | None) -> None:
    """Law 4: what was written in it is taken, and fenced, without a word."""
    put(held, replace(HELD, storage=Storage.RBD, history=history))
    named(held, number=number)
    result = held.run("break-lock", "1", "--yes")
    assert (result.exit_code, "--ceph-is-gone" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("lock", "said"),
    [
        (replace(HELD, storage=Storage.NONE), "no disk to lose"),
        (replace(HELD, storage=Storage.RBD), "--ceph-is-gone"),
        (replace(HELD, state=LockState.BROKEN), "broken already"),
    ],
)
def test_where_no_word_is_needed(held: World, lock: Lock, said: str) -> None:
    """Laws 4 and 7: what storage fences, or has nothing to lose, is taken without a word."""
    put(held, lock)
    result = held.run("break-lock", "1", "--yes")
    assert (result.exit_code, said in result.stderr) == (1, True), result.stderr
    assert lock_of(held) == lock


@pytest.mark.parametrize("storage", list(Storage))
def test_a_holder_below_another_facts_prefix(held: World, storage: Storage) -> None:
    """Law 12: its session is looked for where it is; without a word no host takes such a lock."""
    lock = replace(HELD, storage=storage, facts="/other")
    put(held, lock)
    session_key = replace(held.layout, facts="/other").session_key(lock.host)
    held.etcd.write(session_key, "{}")
    assert "has a session" in held.run("break-lock", "1", "--yes").stderr
    assert lock_of(held) == lock
    held.etcd.erase(session_key)
    assert held.run("break-lock", "1", "--yes").exit_code == 0
    assert lock_of(held) == replace(lock, state=LockState.BROKEN, facts=None)


def test_what_is_no_lock(world: World) -> None:
    """Nothing to break, and what cannot be read, are refused."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")
    assert "has no lock" in world.run("break-lock", "1", "--yes").stderr
    world.etcd.write(world.layout.lock_key(ONE), "?")
    assert "this release cannot read the lock of 1" in world.run("break-lock", "1", "--yes").stderr


def test_a_ceph_that_is_gone(held: World) -> None:
    """Law 7: only with a word of its own is a machine on Ceph let go of, and nothing of it is to be fenced then."""
    put(held, replace(HELD, storage=Storage.RBD))
    assert held.run("break-lock", "1", "--yes", "--ceph-is-gone").exit_code == 0
    assert lock_of(held) == replace(HELD, storage=Storage.RBD, state=LockState.BROKEN, clients=(), fence=())


def test_its_host_is_still_the_old_one(held: World) -> None:
    """It says what is missing for it to run."""
    held.keys("1", host="beta")
    assert "name another host in it" in held.run("break-lock", "1", "--yes").stderr
