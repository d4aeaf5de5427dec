"""An instance from its keys in a container of its own, in virtual time."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage, clients_to_json
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.single.life import NotHere
from tests.fakes.storage import address_of
from tests.single.bench import KEY, ME, Bench
from tests.support.host import LAYOUT

OLD, OTHERS = "192.0.2.1:0/1", "192.0.2.1:0/2"
IMAGE = "pool/image"


async def run(bench: Bench, **more: str) -> None:
    bench.keys(ram="64", host="a", **more)
    await bench.instance()
    assert bench.qemu.run_state == "running"


async def test_it_runs_and_a_signal_shuts_it_down(bench: Bench) -> None:
    """Law: on record before its guest runs, under a name of its own; a signal presses the button; all is let go of."""
    bench.qemus.on_record = lambda qemu: bench.lock is not None and bench.lock.pid == qemu.pid
    await run(bench)
    qemu, lock = bench.qemu, bench.lock
    assert lock is not None
    assert (lock.host, lock.state, lock.pid) == (ME, LockState.RUNNING, qemu.pid)
    assert bench.qemus.ran_off_the_record == []
    assert bench.status is not None
    assert (bench.status.host, bench.status.phase) == (ME, Phase.RUNNING)
    bench.told()
    assert await bench.ends() == 0
    assert len(qemu.presses) == 1
    assert bench.lock is None
    assert bench.status.phase is Phase.STOPPED
    assert LAYOUT.session_key(ME) not in bench.etcd.data


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "there is no instance 1"),
        ({"ram": "64"}, "host is missing"),
        ({"ram": "64", "host": "b"}, "this host is a"),
        ({"ram": "64", "host": "a", "power": "off"}, "power is off"),
        ({"ram": "lots", "host": "a", "cpus": "x"}, "cpus"),
    ],
)
async def test_what_cannot_run_here_is_told(bench: Bench, keys: dict[str, str], said: str) -> None:
    """Law: nothing is done, and the message says why."""
    bench.keys(**keys)
    await bench.instance()
    with pytest.raises(NotHere, match=said):
        await bench.ends()
    assert bench.lock is None
    assert bench.qemus.all == []


async def test_the_environment_wins_over_keys(bench: Bench) -> None:
    """Law: `VM_RAM` and its like."""
    bench.keys(ram="lots", host="a")
    await bench.instance(ram="96")
    assert bench.qemu.ram == "size=98432K"


async def test_its_lock_may_lie_anywhere(bench: Bench) -> None:
    """Law: `LOCK` may name any key. The instance is the one that `INSTANCE` names all the same."""
    elsewhere = "/locks/other"
    bench.keys(ram="64", host="a")
    await bench.instance(lock_key=elsewhere)
    assert bench.qemu.run_state == "running"
    assert bench.status is not None
    assert bench.status.phase is Phase.RUNNING
    lock = Lock.from_json(bench.etcd.data[elsewhere])
    assert lock is not None
    assert lock.pid == bench.qemu.pid
    bench.told()
    assert await bench.ends() == 0
    assert elsewhere not in bench.etcd.data


async def test_its_end_is_the_containers(bench: Bench) -> None:
    """Law: nothing is restarted in here, whatever `restart` says."""
    await run(bench, restart="always")
    bench.qemu.crash()
    assert await bench.ends() == 128 + signal.SIGKILL
    assert len(bench.qemus.all) == 1
    assert bench.lock is None


async def test_no_such_program(bench: Bench) -> None:
    """Law: it ends with a message, and nothing is held."""
    bench.qemus.no_program = "cannot start qemu: No such file or directory"
    bench.keys(ram="64", host="a")
    await bench.instance()
    with pytest.raises(NotHere, match="cannot start qemu"):
        await bench.ends()
    assert bench.lock is None


@pytest.mark.parametrize("change", [{"power": "off"}, {"host": "b"}, {"restart_request": "now"}])
async def test_keys_that_change_end_it(bench: Bench, change: dict[str, str]) -> None:
    """Law: `power=off`, another `host` that is there, and a restart end the container."""
    bench.there("b")
    await run(bench)
    bench.keys(**change)
    assert await bench.ends() == 0
    assert bench.lock is None
    assert len(bench.qemus.all) == 1


async def test_each_signal_is_a_step(bench: Bench) -> None:
    """Law: the first presses the button, the second tells QEMU to end, the third kills it."""
    await run(bench, shutdown_timeout="3600")
    qemu = bench.qemu
    qemu.deaf = qemu.stubborn = True
    bench.told()
    await bench.clock.advance(2.0)
    assert (len(qemu.presses), "quit" in qemu.commands) == (1, False)
    bench.told()
    await bench.clock.advance(2.0)
    assert (qemu.alive, "quit" in qemu.commands) == (True, True)
    bench.told()
    assert await bench.ends(2.0) == 128 + signal.SIGKILL


async def test_a_qemu_that_outlived_its_container_is_adopted(bench: Bench) -> None:
    """Law 8: the same process, no second one."""
    await run(bench)
    qemu = bench.qemu
    await bench.crash()
    bench.clock.jump(20.0)
    await bench.instance(virtual_s=30.0)
    assert bench.qemus.all == [qemu]
    assert qemu.presses == []
    bench.told()
    assert await bench.ends() == 0


async def test_what_ended_while_nobody_watched_is_no_end_of_this_one(bench: Bench) -> None:
    """A container begins anew: its leftover is cleared away, its lock taken again."""
    await run(bench)
    qemu = bench.qemu
    await bench.crash()
    qemu.crash()
    bench.clock.jump(20.0)
    with capture_logs() as logs:
        await bench.instance(virtual_s=30.0)
    assert [line for line in logs if line["event"] == "single.leftover_buried"]
    assert bench.qemu is not qemu
    assert bench.lock is not None
    assert bench.lock.epoch == 2


def left_by_b(bench: Bench) -> Lock:
    """The lock of a host that is gone, with an image in Ceph."""
    bench.keys(ram="64", host="a", rbd=IMAGE)
    lock = Lock(
        host=HostName("b"), boot_id="b", epoch=3, state=LockState.RUNNING, incarnation="x", pid=1, starttime=1,
        storage=Storage.RBD, clients=(OLD,),
    )  # fmt: skip
    bench.etcd.write(KEY, lock.to_json())
    bench.etcd.write(LAYOUT.clients_key(InstanceId("1")), clients_to_json(lock.clients))
    return lock


async def test_a_takeover_fences_and_runs(bench: Bench) -> None:
    """Law 4: what is on record is shut out, then it starts."""
    left_by_b(bench)
    await bench.instance(virtual_s=120.0)
    assert bench.storage.fenced == [OLD]
    assert bench.lock is not None
    assert (bench.lock.host, bench.lock.clients) == (ME, (address_of(bench.qemu.pid),))


@pytest.mark.parametrize("place", ["/kvm/2/lock", "/locks/2"])
async def test_the_living_client_of_another_instance_is_not_fenced(bench: Bench, place: str) -> None:
    """A10: two instances name one image, and the lock is taken over: who has the image is asked of all locks."""
    if place.startswith("/locks"):
        bench.more["LOCK"] = "/locks/%i"
    lock = left_by_b(bench)
    other = replace(lock, host=HostName("c"), incarnation="y", clients=(OTHERS,))
    bench.etcd.write(place, other.to_json())
    bench.there("c")
    bench.storage.users_of[IMAGE] = {OTHERS}
    await bench.instance(virtual_s=600.0)
    assert OTHERS not in bench.storage.fenced
    assert bench.qemus.all == []
    assert bench.status is not None
    assert f"{OTHERS} has one of its disks open" in bench.status.reason


async def test_a_broken_lock_kills(bench: Bench) -> None:
    """Decision 0012 holds here, too."""
    await run(bench)
    lock = bench.lock
    assert lock is not None
    bench.etcd.write(KEY, lock.broken().to_json())
    assert await bench.ends() == 128 + signal.SIGKILL
    assert bench.lock == lock.broken() or bench.lock is None
