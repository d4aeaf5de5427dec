"""A QEMU with options of its own, in virtual time: its lock, its end, and what comes between."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.etcd import Unavailable
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.domain.stopping import QUIT_WAIT_S
from kvmsupervisor.single.identity import LET_GO_S
from kvmsupervisor.single.life import NotHere
from tests.fakes.qemu import FakeQemu
from tests.single.bench import KEY, ME, STATUS_KEY, Bench
from tests.support.host import as_written

BETA = Lock(host=HostName("b"), boot_id="boot-b", epoch=5, state=LockState.RUNNING, incarnation="x")


def is_there(path: str) -> bool:
    return Path(path).exists()


def states(bench: Bench) -> list[str]:
    """All that was ever written into the lock by a container."""
    return [lock["state"] for store in bench.stores for lock in as_written(store, KEY)]


# --- under a lock ---------------------------------------------------------------------------------------------


async def test_it_goes_from_taken_to_recorded_to_released(bench: Bench) -> None:
    """Laws 2, 3 and 9, and the epoch stays in the status."""
    bench.qemus.on_record = lambda qemu: bench.lock is not None and bench.lock.pid == qemu.pid
    await bench.options("-m", "16")
    qemu, lock = bench.qemu, bench.lock
    assert lock is not None
    assert (lock.host, lock.epoch, lock.state, lock.pid) == (ME, 1, LockState.RUNNING, qemu.pid)
    assert (lock.incarnation, lock.clients) == (qemu.environment["KVMSUPERVISOR_INCARNATION"], ())
    assert (qemu.run_state, bench.qemus.ran_off_the_record) == ("running", [])
    assert states(bench) == ["starting", "running"]
    assert bench.status is not None
    assert (bench.status.phase, bench.status.host, bench.status.pid) == (Phase.RUNNING, ME, qemu.pid)
    assert (bench.status.accelerator, bench.status.machine) == (None, None)
    # Nothing that only our own machines have.
    assert set(qemu.commands) == {"query-status", "cont"}
    bench.told()
    assert await bench.ends() == 0
    assert len(qemu.presses) == 1
    assert bench.lock is None
    assert (bench.status.phase, bench.status.pid, bench.status.epoch) == (Phase.STOPPED, None, 1)
    assert not [key for key in bench.etcd.data if key.startswith("/kvmsupervisor/hosts/")]


@pytest.mark.parametrize("fault", ["lost reply", "lost request", Unavailable("away")])
@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_lost_reply_is_settled_by_reading(bench: Bench, fault: str, number: int) -> None:
    """Law 2: whichever write is cut off, the end is the same, with one QEMU."""
    bench.store.faults[number] = fault
    await bench.options("-m", "16", virtual_s=10.0)
    assert bench.lock is not None
    assert (bench.lock.pid, bench.lock.state) == (bench.qemu.pid, LockState.RUNNING)
    bench.told()
    assert await bench.ends() == 0
    assert bench.lock is None
    assert len(bench.qemus.all) == 1


async def test_a_stranger_is_waited_for(bench: Bench) -> None:
    """Law 2: while it is there; then it is taken, with the next epoch. The log says for whom it waits."""
    bench.etcd.write(KEY, BETA.to_json())
    bench.there("b")
    with capture_logs() as logs:
        await bench.options("-m", "16", virtual_s=30.0)
    (line,) = [one for one in logs if "b holds its lock" in str(one.get("reason")) and one["event"] == "lock.waiting"]
    assert line["log_level"] == "warning"
    assert bench.lock == BETA
    last = Status(id="1", host="b", phase=Phase.STOPPED, reason="", since="", epoch=5, machine="pc-q35-7.2")
    bench.etcd.write(STATUS_KEY, last.to_json())
    bench.etcd.erase(KEY)
    await bench.clock.advance(5.0)
    assert bench.lock is not None
    assert (bench.lock.epoch, bench.qemu.run_state) == (6, "running")
    assert bench.status is not None
    # What an earlier host found out of the machine stays.
    assert (bench.status.host, bench.status.machine) == (ME, "pc-q35-7.2")


async def test_a_stranger_need_not_be_waited_for(bench: Bench) -> None:
    """`--no-wait`: it ends, and the message says who holds the lock, which is not touched."""
    bench.etcd.write(KEY, BETA.to_json())
    bench.there("b")
    await bench.options("-m", "16", wait=False)
    with pytest.raises(NotHere, match="b holds its lock"):
        await bench.ends()
    assert bench.lock == BETA
    assert bench.qemus.all == []


async def test_without_waiting_a_free_lock_is_taken(bench: Bench) -> None:
    """`--no-wait` is no hurry: while etcd is being asked, it is asked."""
    await bench.options("-m", "16", wait=False)
    assert bench.qemu.run_state == "running"


@pytest.mark.parametrize(
    ("storage", "clients", "taken"),
    [(Storage.NONE, (), True), (Storage.UNFENCEABLE, (), False), (Storage.RBD, ("1.2.3.4:0/5",), False)],
)
async def test_only_what_has_nothing_to_protect_is_taken_over(
    bench: Bench, storage: Storage, clients: tuple[str, ...], taken: bool
) -> None:
    """Law 7: from a holder whose session is gone; what may be written to stays his, however long that takes."""
    lock = replace(BETA, storage=storage, clients=clients)
    bench.etcd.write(KEY, lock.to_json())
    # The wait for a disk in use (`KVM_TAKEOVER_WAIT`, 60 s) has passed three times.
    await bench.options("-m", "16", virtual_s=200.0)
    assert (bench.lock == lock) is not taken
    assert len(bench.qemus.all) == taken
    assert bench.storage.fenced == []


async def test_what_is_not_fenced_stays_locked(bench: Bench) -> None:
    """Law 4: stopped before it has fenced, it keeps the lock: a free one would tell the next holder of no client."""
    theirs = replace(BETA, state=LockState.BROKEN, clients=("192.0.2.1:0/1",))
    bench.etcd.write(KEY, theirs.to_json())
    bench.storage.away = True
    await bench.options("-m", "16", virtual_s=60.0)
    assert bench.qemus.all == []
    bench.told()
    assert await bench.ends() == 128 + signal.SIGTERM
    assert bench.lock is not None
    assert (bench.lock.host, bench.lock.state, bench.lock.fence) == (ME, LockState.FENCING, theirs.clients)


async def test_a_holder_that_comes_back_is_not_robbed(bench: Bench) -> None:
    """Law 4: etcd itself tells, in the step that takes a lock over, that its holder has no session."""
    bench.etcd.write(KEY, replace(BETA, state=LockState.BROKEN).to_json())
    bench.store.before = lambda number: bench.there("b")
    await bench.options("-m", "16", virtual_s=30.0)
    assert bench.store.writes_begun > 0
    assert bench.lock is not None
    assert bench.lock.host == "b"


async def test_none_is_taken_over_a_status_that_tells_of_a_process(bench: Bench) -> None:
    """Law 2: a lock that was deleted by hand under a running QEMU."""
    running = Status(id="1", host="b", phase=Phase.RUNNING, reason="", since="", pid=9, epoch=3)
    bench.etcd.write(STATUS_KEY, running.to_json())
    await bench.options("-m", "16", virtual_s=60.0)
    assert bench.lock is None
    assert bench.qemus.all == []
    bench.told()
    assert await bench.ends() == 128 + signal.SIGTERM
    await bench.options("-m", "16", wait=False)
    with pytest.raises(NotHere, match="says that it runs on b"):
        await bench.ends()


async def test_no_key_is_compared(bench: Bench) -> None:
    """Decision 0013: the old unit's key `host` lies beside the lock, and may change."""
    bench.keys(host="elsewhere", ram="64")
    await bench.options("-m", "16")
    assert bench.qemu.run_state == "running"
    bench.keys(host="", power="off")
    await bench.clock.advance(60.0)
    assert bench.qemu.presses == []


async def test_a_lock_that_is_no_instances_has_no_status(bench: Bench) -> None:
    """`LOCK` may lie anywhere; nothing is written among the statuses of instances then."""
    await bench.options("-m", "16", lock_key="/locks/of/mine")
    assert bench.qemu.run_state == "running"
    bench.told()
    assert await bench.ends() == 0
    assert not [key for key in bench.etcd.data if key.startswith(("/locks", "/kvmsupervisor/instances"))]


def freeze(qemu: FakeQemu) -> None:
    qemu.frozen = True


async def test_what_was_lost_before_the_guest_ran_lets_no_guest_run(bench: Bench) -> None:
    """Law 3: a lock that has gone to another."""
    bench.qemus.prepare = freeze
    await bench.options("-m", "16")
    bench.there("b")
    bench.etcd.write(KEY, BETA.to_json())
    await bench.clock.advance(10.0)
    assert bench.qemus.alive == []
    assert [qemu.run_state for qemu in bench.qemus.all] == ["prelaunch"]
    assert bench.lock == BETA


async def test_deleted_it_is_written_again_and_gone_it_kills(bench: Bench) -> None:
    """Law 6: deleted is not lost; read to be another's is; losing the session is nothing."""
    await bench.options("-m", "16")
    qemu = bench.qemu
    bench.store.away()
    await bench.clock.advance(600.0)
    assert qemu.alive
    bench.store.back()
    bench.etcd.erase(KEY)
    await bench.clock.advance(30.0)
    assert bench.lock is not None
    assert (bench.lock.pid, bench.lock.state, bench.lock.epoch) == (qemu.pid, LockState.RUNNING, 1)
    with capture_logs() as logs:
        bench.etcd.write(KEY, BETA.to_json())
        assert await bench.ends() == 128 + signal.SIGKILL
    assert bench.lock == BETA
    (lost,) = [line for line in logs if line["event"] == "lock.lost"]
    assert "gone to b, epoch 5" in lost["reason"]


async def test_a_broken_lock_ends_it_and_stays_broken(bench: Bench) -> None:
    """Decision 0012: an operator's word that another may run it: no guest is let run, and nothing is written."""
    bench.qemus.prepare = freeze
    await bench.options("-m", "16")
    assert bench.lock is not None
    broken = bench.lock.broken()
    bench.there("b")
    bench.etcd.write(KEY, broken.to_json())
    bench.told()
    await bench.ends()
    assert [(qemu.alive, qemu.run_state) for qemu in bench.qemus.all] == [(False, "prelaunch")]
    assert states(bench) == ["starting"]


async def test_a_lock_that_is_broken_while_the_guest_runs(bench: Bench) -> None:
    """Decision 0012: QEMU is killed, and `running` is never written over `broken` (A11)."""
    await bench.options("-m", "16")
    qemu, lock = bench.qemu, bench.lock
    assert lock is not None
    bench.etcd.write(KEY, lock.broken().to_json())
    with capture_logs() as logs:
        assert await bench.ends() == 128 + signal.SIGKILL
    assert not qemu.alive
    assert states(bench) == ["starting", "running"]
    assert [line for line in logs if line["event"] == "lock.lost" and "broken by an operator" in line["reason"]]


async def test_a_full_etcd_ends_no_guest(bench: Bench) -> None:
    """Law 6: without space the guest runs on; what was to be written is, once there is some."""
    await bench.options("-m", "16")
    qemu = bench.qemu
    bench.etcd.fill()
    bench.etcd.erase(KEY)
    await bench.clock.advance(60.0)
    assert qemu.alive
    bench.etcd.make_space()
    await bench.clock.advance(30.0)
    assert bench.lock is not None
    assert bench.lock.pid == qemu.pid


async def test_the_end_does_not_wait_for_etcd_for_ever(bench: Bench) -> None:
    """Law: a lock that cannot be released stays, and its holder ends, with QEMU's status."""
    await bench.options("-m", "16")
    bench.store.faults = {bench.store.writes_begun + number: Unavailable("away") for number in range(100)}
    bench.told()
    with capture_logs() as logs:
        assert await bench.ends(LET_GO_S + 10.0) == 0
    assert [line for line in logs if line["event"] == "lock.not_released"]
    assert bench.lock is not None


async def test_an_older_lock_is_no_loss(bench: Bench) -> None:
    """Law 11: a lower epoch, of a stranger or of an earlier container, was restored; it is written over, with ours."""
    bench.etcd.write(KEY, replace(BETA, epoch=7, state=LockState.BROKEN).to_json())
    await bench.options("-m", "16")
    ours = bench.lock
    assert ours is not None
    assert ours.epoch == 8
    for older in (replace(BETA, epoch=3), replace(ours, incarnation="earlier", epoch=7)):
        bench.etcd.write(KEY, older.to_json())
        await bench.clock.advance(10.0)
        assert not bench.ended
        assert bench.lock is not None
        assert (bench.lock.incarnation, bench.lock.epoch) == (ours.incarnation, 8)
    bench.etcd.write(KEY, replace(BETA, epoch=9).to_json())
    assert await bench.ends() == 128 + signal.SIGKILL


async def test_a_crash_leaves_what_the_next_one_proves(bench: Bench) -> None:
    """Law 9: the next container waits while the QEMU lives, and goes on at once when it is gone."""
    await bench.options("-m", "16")
    first = bench.qemu
    await bench.crash()
    bench.clock.jump(20.0)
    await bench.options("-m", "16", virtual_s=30.0)
    assert bench.qemus.alive == [first]
    first.crash()
    await bench.clock.advance(10.0)
    assert bench.lock is not None
    assert (bench.lock.epoch, bench.lock.pid) == (2, bench.qemu.pid)


# --- without one, and in both ------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("lock_key", [None, KEY], ids=["alone", "locked"])


@BOTH
async def test_options_are_passed_word_by_word(bench: Bench, lock_key: str | None) -> None:
    """Law: what QEMU gets ends with the container's arguments; without a lock nothing is paused, or marked."""
    words = ("-m", "16", "-drive", "file=a b.img", "")
    await bench.options(*words, lock_key=lock_key)
    argv = bench.qemu.argv
    assert argv[1] == "-readconfig"
    assert argv[3:] == (("-S",) if lock_key else ()) + words
    assert ("KVMSUPERVISOR_INCARNATION" in bench.qemu.environment) is (lock_key is not None)
    assert is_there(argv[2])
    bench.told()
    assert await bench.ends() == 0
    assert not is_there(str(Path(argv[2]).parent))


@BOTH
@pytest.mark.parametrize("order", [("-S",), ("-incoming", "tcp:0:1")])
async def test_a_guest_that_its_user_has_wait_is_not_let_run(
    bench: Bench, lock_key: str | None, order: tuple[str, ...]
) -> None:
    """`-S` and `-incoming` are heeded; such a QEMU is on record, and is shut down as one that may have run."""

    def waits(qemu: FakeQemu) -> None:
        qemu.run_state = "inmigrate" if "-incoming" in order else "prelaunch"
        qemu.deaf = True

    bench.qemus.prepare = waits
    await bench.options("-m", "16", *order, lock_key=lock_key, virtual_s=200.0)
    qemu = bench.qemu
    if lock_key is None and "-incoming" in order:
        qemu.run_state = "inmigrate"
    assert "cont" not in qemu.commands
    assert lock_key is None or (bench.lock is not None and bench.lock.state is LockState.RUNNING)
    bench.told()
    await bench.clock.advance(10.0)
    assert len(qemu.presses) >= 2
    bench.told()
    assert await bench.ends() == 0


@BOTH
async def test_a_deaf_guest_is_ended_in_time(bench: Bench, lock_key: str | None) -> None:
    """Law: the button again and again until KVM_SHUTDOWN_TIMEOUT, then `quit`, then SIGKILL; the log says so."""
    bench.more["KVM_SHUTDOWN_TIMEOUT"] = "30"
    await bench.options("-m", "16", lock_key=lock_key)
    qemu = bench.qemu
    qemu.deaf = qemu.stubborn = True
    begun = bench.clock.now()
    bench.told()
    with capture_logs() as logs:
        assert await bench.ends(120.0) == 128 + signal.SIGKILL
    assert len(qemu.presses) == 6
    assert bench.clock.now() - begun >= 30.0 + QUIT_WAIT_S
    (forced,) = [line for line in logs if line["event"] == "qemu.forced"]
    assert "did not shut down in time" in forced["reason"]


@BOTH
async def test_each_signal_is_a_step(bench: Bench, lock_key: str | None) -> None:
    """Law: the first presses the button, the second tells QEMU to end, the third kills it."""
    bench.more["KVM_SHUTDOWN_TIMEOUT"] = "3600"
    await bench.options("-m", "16", lock_key=lock_key)
    qemu = bench.qemu
    qemu.deaf = qemu.stubborn = True
    bench.told(signal.SIGINT)
    await bench.clock.advance(2.0)
    assert (len(qemu.presses), "quit" in qemu.commands) == (1, False)
    bench.told()
    await bench.clock.advance(2.0)
    assert (qemu.alive, "quit" in qemu.commands) == (True, True)
    bench.told()
    assert await bench.ends(1.0) == 128 + signal.SIGKILL


@BOTH
async def test_qemus_status_is_the_containers(bench: Bench, lock_key: str | None) -> None:
    """Law: its exit code, 128 and the signal's number; a guest that shuts down is 0."""
    await bench.options("-m", "16", lock_key=lock_key)
    bench.qemu.shut_down()
    assert await bench.ends() == 0
    await bench.options("-m", "16", lock_key=lock_key)
    bench.qemu.crash(11)
    assert await bench.ends() == 128 + 11
    bench.qemus.prepare = lambda qemu: setattr(qemu, "words", "-nonsense: invalid option")
    await bench.options("-nonsense", lock_key=lock_key)
    assert await bench.ends() == 1
    assert bench.lock is None


@BOTH
async def test_no_such_program(bench: Bench, lock_key: str | None) -> None:
    """Law: it ends with a message, and nothing is held."""
    bench.qemus.no_program = "cannot start /nowhere/qemu: No such file or directory"
    await bench.options("-m", "16", lock_key=lock_key)
    with pytest.raises(NotHere, match="cannot start /nowhere/qemu"):
        await bench.ends()
    assert bench.lock is None


@BOTH
async def test_a_qemu_that_does_not_answer_is_not_given_up(bench: Bench, lock_key: str | None) -> None:
    """Whoever started it sees what it does. A signal ends it: under a lock its guest has not run."""
    bench.qemus.prepare = freeze
    bench.more["KVM_SHUTDOWN_TIMEOUT"] = "20"
    await bench.options("-m", "16", lock_key=lock_key, virtual_s=3600.0)
    assert bench.qemu.alive
    bench.told()
    status = await bench.ends(120.0)
    assert status == (128 + signal.SIGKILL if lock_key is None else 128 + signal.SIGTERM)
    assert bench.qemus.alive == []
    assert bench.lock is None


@BOTH
async def test_told_to_stop_before_there_is_a_qemu(bench: Bench, lock_key: str | None) -> None:
    """Law: 128 and the signal's number."""
    bench.etcd.write(KEY, BETA.to_json())
    bench.there("b")
    await bench.options("-m", "16", lock_key=lock_key, virtual_s=0.0)
    if lock_key is None:
        bench.qemu.crash(15)
    bench.told()
    assert await bench.ends() == 128 + signal.SIGTERM
