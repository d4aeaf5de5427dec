"""The instance loop over a fake etcd and fake QEMUs, in virtual time: the laws of docs/architecture.md."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.etcd import Denied, EtcdError, Put, Unavailable
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.domain.stopping import POWERDOWN_EVERY_S, QUIT_WAIT_S
from tests.fakes.clock import settle
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemu
from tests.support.host import LAYOUT, ONE, SETTLE_S, Host

HOUR_S = 3600.0

LONG_S = 900.0
"""Longer than any deadline and any pause of an instance; for what asks again every second."""

LOCK_KEY, STATUS_KEY = LAYOUT.lock_key(ONE), LAYOUT.status_key(ONE)


def theirs(**changes: object) -> Lock:
    lock = Lock(
        host=HostName("b"), boot_id="boot-b", epoch=7, state=LockState.RUNNING, incarnation="theirs",
        pid=5, starttime=6, storage=Storage.UNFENCEABLE,
    )  # fmt: skip
    return replace(lock, **changes)  # type: ignore[arg-type]


# --- start (laws 2 and 3) -------------------------------------------------------------------------------------


async def test_a_wish_becomes_a_running_guest(host: Host) -> None:
    """Law 3: lock, paused QEMU, pid on record, and only then the guest runs."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    assert host.lock is not None
    assert (host.lock.host, host.lock.epoch, host.lock.state) == ("a", 1, LockState.RUNNING)
    assert (host.lock.pid, host.lock.starttime) == (qemu.pid, qemu.starttime)
    assert qemu.ram == "size=65664K"
    await host.told()
    assert host.published == host.status
    assert (host.status.phase, host.status.pid, host.status.epoch) == (Phase.RUNNING, qemu.pid, 1)


async def test_nothing_is_written_or_asked_while_nothing_changes(host: Host) -> None:
    """§2: at rest, a running instance costs etcd nothing."""
    host.wish()
    host.begin()
    await host.runs()
    await host.told()
    before = (host.etcd.revision, host.store.calls.total())
    await host.clock.advance(HOUR_S)
    assert (host.etcd.revision, host.store.calls.total()) == before


# The swaps of a start: taking the lock, and putting pid and addresses on record.
STEPS = {"take": 0, "record": 1}
ERRORS: list[str | EtcdError] = ["lost reply", "lost request", Unavailable("away"), Denied("no")]


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("step", STEPS)
async def test_a_start_survives_a_fault_at_each_transaction(host: Host, step: str, error: str | EtcdError) -> None:
    """Law 3: whatever becomes of a transaction, no guest runs without its pid in the lock; in the end one runs."""
    host.wish()
    host.store.faults[STEPS[step]] = error
    host.begin()
    await host.runs()
    assert len(host.qemus.alive) == 1
    assert host.store.writes_begun >= 2


@pytest.mark.parametrize("step", STEPS)
async def test_without_the_session_nothing_goes_on(host: Host, step: str) -> None:
    """Law 2: the session vanished between two steps: QEMU, if there is one, stays paused, and never continues."""

    def lose_the_session(number: int) -> None:
        if number == STEPS[step]:
            host.etcd.erase(host.session.key)

    host.wish()
    host.store.before = lose_the_session
    host.begin()
    await host.clock.advance(LONG_S)
    assert host.qemus.running == []
    assert len(host.qemus.all) == (0 if step == "take" else 1)
    # It tries again and again.
    await host.until(lambda: host.status.phase is Phase.WAITING)
    host.session.turn(held=False)
    await host.clock.advance(LONG_S)
    assert host.qemus.running == []


async def test_a_paused_qemu_continues_once_the_session_is_back(host: Host) -> None:
    """Law 2: what was interrupted goes on, with the same process, when the session is won again."""
    host.wish()
    host.store.before = lambda number: host.session.turn(held=False) if number == STEPS["record"] else None
    host.store.faults[STEPS["record"]] = Unavailable("away")
    host.begin()
    await host.clock.advance(60.0)
    (qemu,) = host.qemus.alive
    assert qemu.run_state == "prelaunch"
    host.store.before = lambda number: None
    host.session.turn(held=True)
    assert await host.runs() is qemu


@pytest.mark.parametrize("step", STEPS)
async def test_a_host_key_that_changed_meanwhile_stops_the_start(host: Host, step: str) -> None:
    """Laws 2 and 3: `host` changed between two steps: what was started is killed, the lock released, no guest ran."""

    def move_away(number: int) -> None:
        if number == STEPS[step]:
            host.put(host="b")

    host.wish()
    host.sessions = {"a", "b"}
    host.store.before = move_away
    host.begin()
    await host.until(lambda: host.gone, HOUR_S)
    assert host.qemus.alive == []
    assert all("cont" not in qemu.commands for qemu in host.qemus.all)
    assert host.lock is None


async def test_a_lock_taken_by_somebody_else_meanwhile_kills_the_paused_qemu(host: Host) -> None:
    """Laws 2 and 6: between spawn and record another epoch appears: killed, not continued."""

    def steal(number: int) -> None:
        if number == STEPS["record"]:
            host.etcd.write(LOCK_KEY, theirs().to_json())

    host.wish()
    host.sessions = {"a", "b"}
    host.store.before = steal
    host.begin()
    await host.clock.advance(HOUR_S)
    assert host.qemus.alive == []
    assert "cont" not in host.qemus.all[0].commands
    assert host.lock == theirs()
    assert host.status.phase is Phase.WAITING
    assert "b holds its lock (epoch 7)" in host.status.reason


async def test_keys_that_change_before_the_guest_runs_are_what_it_runs_with(host: Host) -> None:
    """A guest never runs with keys that were replaced before it ran: QEMU is started anew."""

    def freeze(qemu: FakeQemu) -> None:
        qemu.frozen = not host.qemus.all[:-1]

    host.wish()
    host.qemus.prepare = freeze
    host.begin()
    await host.until(lambda: host.qemus.alive)
    host.put(ram="128")
    qemu = await host.runs()
    assert qemu.ram == "size=131200K"
    assert [one.ram for one in host.qemus.all if "cont" in one.commands] == ["size=131200K"]
    assert host.status.restarts == 0
    assert host.lock is not None
    assert host.lock.epoch == len(host.qemus.all)


async def test_a_guest_waits_until_its_keys_are_quiet(host: Host) -> None:
    """Keys are written one by one: a guest runs when no change came for the settling time."""
    host.put(host="a")
    host.begin()
    await settle()
    host.put(ram="64")
    await settle()
    changed = host.clock.now()
    for cpus in ("2", "3", "4"):
        await host.clock.advance(SETTLE_S * 0.9)
        host.put(cpus=cpus)
        await settle()
        changed = host.clock.now()
        assert host.qemus.running == []
    qemu = await host.runs()
    assert host.clock.now() >= changed + SETTLE_S
    assert "cpus=4" in qemu.argv


@pytest.mark.parametrize("at_once", [True, False], ids=["one transaction", "`host` last"])
async def test_a_guest_whose_keys_are_complete_waits_for_nothing(host: Host, at_once: bool) -> None:
    host.put(host="-")  # which is no host's name
    host.begin()
    await settle()
    written = host.clock.now()
    keys = {"ram": b"64", "cpus": b"2", "host": host.me.encode()}
    ops = [Put(LAYOUT.wish_key(ONE, name), value) for name, value in keys.items()]
    for some in [ops] if at_once else [[op] for op in ops]:
        await host.etcd.txn([], some)
    qemu = await host.runs()
    assert "cpus=2" in qemu.argv
    assert host.clock.now() < written + SETTLE_S


async def test_what_may_be_written_to_is_told_of_the_machine_that_runs(host: Host) -> None:
    """Law 7: keys may change between taking the lock and starting QEMU; the lock tells of what was started."""

    def add_a_disk(number: int) -> None:
        if number == STEPS["take"]:
            host.put(rbd="/rbd/vm")

    host.wish()
    host.store.before = add_a_disk
    host.begin()
    qemu = await host.runs()
    assert any('"pool":"rbd","image":"vm"' in word for word in qemu.argv)
    assert host.lock is not None
    assert host.lock.storage is Storage.RBD


async def test_an_answer_to_cont_that_was_lost_does_not_make_a_running_guest_worthless(host: Host) -> None:
    """A QEMU whose guest may have run is asked, never thrown away as one that did not."""
    host.wish()
    host.qemus.lose_answer_to = "cont"
    host.begin()
    await host.until(lambda: host.qemus.running)
    host.put(ram="128")
    qemu = await host.runs()
    await host.clock.advance(60.0)
    assert host.qemus.all == [qemu]
    assert host.status.pending == ("ram",)
    assert qemu.commands.count("cont") == 1


async def test_a_qemu_that_refuses_to_continue_has_failed(host: Host) -> None:
    """A refusal is not repeated unchanged: QEMU is started anew, after the usual pause, and its words are told."""

    def refuse(qemu: FakeQemu) -> None:
        qemu.refuses["cont"] = "Resetting the Virtual Machine is required"

    host.wish()
    host.qemus.prepare = refuse
    host.begin()
    await host.until(lambda: host.status.phase is Phase.BACKOFF)
    assert "Resetting the Virtual Machine is required" in host.status.reason
    host.qemus.prepare = lambda qemu: None
    await host.runs()


# --- etcd and the lock while it runs (law 6) ------------------------------------------------------------------


async def test_etcd_away_for_an_hour_kills_nothing(host: Host) -> None:
    """Law 6: a machine runs on without etcd and without a session; all is well when they are back."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    host.store.away()
    host.session.turn(held=False)
    await host.clock.advance(HOUR_S)
    assert host.running is qemu
    assert "etcd is away; it runs on" in host.status.reason
    host.store.back()
    host.session.turn(held=True)
    await settle()
    assert (host.running, host.status.reason) == (qemu, "runs")


@pytest.mark.parametrize("change", [theirs(), theirs(host=HostName("a"))], ids=["another host", "another incarnation"])
async def test_reading_another_epoch_kills(host: Host, change: Lock) -> None:
    """Law 6: killed is only whoever *reads* that the lock is not his any more, and then at once."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    before = host.clock.now()
    host.sessions = {"a", "b"}
    host.etcd.write(LOCK_KEY, change.to_json())
    await settle()
    assert not qemu.alive
    assert host.clock.now() == before
    assert qemu.status is not None
    assert qemu.status.signal == 9


async def test_an_unreadable_lock_kills_nothing(host: Host) -> None:
    """Law 6: what cannot be understood is no evidence; deleting the key mends it."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    host.etcd.write(LOCK_KEY, b"[" * 70_000)
    await host.clock.advance(HOUR_S)
    assert host.running is qemu
    assert "its lock holds what this release cannot read" in host.status.reason
    host.etcd.erase(LOCK_KEY)
    await settle()
    assert host.is_on_record(qemu)


async def test_a_deleted_lock_is_written_again(host: Host) -> None:
    """A lock that somebody deleted under a living QEMU is asserted again, as it was."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    before = host.lock
    host.etcd.erase(LOCK_KEY)
    await settle()
    assert host.lock == before
    assert host.running is qemu


async def test_a_reassertion_that_failed_is_tried_again_soon(host: Host) -> None:
    """A lock is not left off for half a minute because etcd stumbled once."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    host.store.faults[host.store.writes_begun] = Unavailable("away")
    host.etcd.erase(LOCK_KEY)
    await host.until(lambda: host.is_on_record(qemu), 2.0)


# --- stop (laws 9 and §4) -------------------------------------------------------------------------------------


def keys_removed(host: Host) -> None:
    host.etcd.erase(*(key for key in host.etcd.data if key.startswith("/kvm/1/")))


STOPS: dict[str, Callable[[Host], None]] = {
    "power off": lambda host: host.put(power="off"),
    "no host": lambda host: host.drop("host"),
    "another host": lambda host: host.put(host="b"),
    "wishes removed": lambda host: host.drop("host", "ram"),
    "all keys removed": keys_removed,
}


@pytest.mark.parametrize("stop", STOPS)
async def test_a_stop_is_graceful_and_the_lock_goes_last(host: Host, stop: str) -> None:
    """Law 9: the power button first; the lock is deleted only when the process is gone."""
    host.wish()
    host.sessions = {"a", "b"}
    host.begin()
    qemu = await host.runs()

    def check(number: int) -> None:
        # A lock that was deleted by hand is written again first: that is no release.
        assert not qemu.alive or host.lock is None, "law 9"

    host.store.before = check
    STOPS[stop](host)
    await host.until(lambda: not qemu.alive)
    assert len(qemu.presses) == 1
    assert qemu.status is not None
    assert qemu.status.code == 0
    await settle()
    assert host.lock is None
    assert host.gone == (stop != "power off")


async def test_a_guest_has_its_time_once_qemu_has_heard_of_it(host: Host) -> None:
    """§4: what comes between pressing the button and QEMU is no time of the guest's (simulation, seed 240)."""
    host.wish(shutdown_timeout="20")
    host.begin()
    qemu = await host.runs()
    qemu.deaf = qemu.mute = True
    STOPS["power off"](host)
    await host.clock.advance(4.0)
    qemu.mute = False
    await host.clock.advance(19.0)
    assert qemu.presses
    assert "quit" not in qemu.commands
    await host.until(lambda: not qemu.alive, 10.0)


async def test_all_keys_removed_leave_nothing_behind(host: Host) -> None:
    """`etcdctl del --prefix` takes the lock too: it is reasserted, the guest shut down, then lock and status go."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    qemu.deaf = True
    keys_removed(host)
    await settle()
    assert host.is_on_record(qemu)
    await host.clock.advance(10.0)
    qemu.shut_down()
    await host.until(lambda: host.gone)
    await host.told()
    assert host.etcd.data.keys() == {host.session.key, LAYOUT.history_key}


async def test_the_last_status_of_a_stopped_machine_stays(host: Host) -> None:
    """Evidence: with the lock released, the status says that it stopped, why, and under which epoch it ran last."""
    host.wish()
    host.begin()
    await host.runs()
    host.put(power="off")
    await host.until(lambda: host.lock is None)
    await host.told()
    assert host.published is not None
    assert (host.published.phase, host.published.pid, host.published.epoch) == (Phase.STOPPED, None, 1)
    assert "`power` is off" in host.published.reason
    assert host.published.last_exit == "guest-shutdown"


async def test_a_deaf_guest_is_asked_again_then_forced(host: Host) -> None:
    """§4: the button every 5 s until the timeout, then QEMU's own quit, SIGKILL ten seconds later: never earlier."""
    host.wish(shutdown_timeout="30")
    host.begin()
    qemu = await host.runs()
    qemu.deaf = qemu.stubborn = True
    begun = host.clock.now()
    host.put(power="off")
    await host.clock.advance(29.9)
    assert qemu.alive
    assert [at - begun for at in qemu.presses] == [n * POWERDOWN_EVERY_S for n in range(6)]
    assert "quit" not in qemu.commands
    await host.clock.advance(0.1)
    assert qemu.commands[-1] == "quit"
    await host.clock.advance(QUIT_WAIT_S - 0.1)
    assert qemu.alive
    await host.clock.advance(0.1)
    assert not qemu.alive
    await settle()
    assert host.lock is None
    assert host.status.last_exit is not None
    assert "killed by its supervisor" in host.status.last_exit


async def test_a_guest_that_is_deaf_to_the_button_ends_by_quit(host: Host) -> None:
    """§4: a QEMU that listens needs no SIGKILL, its disks are flushed."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    qemu.deaf = True
    host.put(power="off")
    await host.until(lambda: not qemu.alive, 121.0)
    assert qemu.status is not None
    assert qemu.status.code == 0
    await settle()
    assert host.status.last_exit == "host-quit"


async def test_a_frozen_qemu_goes_down_the_ladder_too(host: Host) -> None:
    """§4: QMP that answers nothing delays no rung by more than one answer's time."""
    host.wish(shutdown_timeout="30")
    host.begin()
    qemu = await host.runs()
    qemu.frozen = True
    host.put(power="off")
    await host.clock.advance(30.0)
    assert qemu.alive
    await host.clock.advance(QUIT_WAIT_S + 15.0)
    assert not qemu.alive


async def test_a_stop_taken_back_lets_it_run_and_a_later_one_begins_anew(host: Host) -> None:
    """§4: time that an earlier stop has used up is not held against the guest."""
    host.wish(shutdown_timeout="30")
    host.begin()
    qemu = await host.runs()
    qemu.deaf = True
    host.put(power="off")
    await host.clock.advance(25.0)
    host.put(power="on")
    await host.clock.advance(HOUR_S)
    assert host.running is qemu
    begun = host.clock.now()
    host.put(power="off")
    await host.clock.advance(29.9)
    assert qemu.alive
    assert "quit" not in qemu.commands
    assert next(at - begun for at in qemu.presses if at >= begun) == 0


async def test_a_crash_long_after_a_stop_was_taken_back_is_a_crash(host: Host) -> None:
    """A button that was pressed once does not make every later end one that was asked for."""
    host.wish(restart="never")
    host.begin()
    qemu = await host.runs()
    qemu.deaf = True
    host.put(power="off")
    await host.clock.advance(1.0)
    host.put(power="on")
    await host.clock.advance(HOUR_S)
    qemu.crash()
    await host.clock.advance(60.0)
    assert host.qemus.alive == []
    assert "it ended by itself (crashed (signal 9))" in host.status.reason


async def test_a_guest_that_heeds_a_button_late_is_started_again(host: Host) -> None:
    """A stop was taken back, the guest shuts down all the same: that was asked for, and is no end by itself."""
    host.wish(restart="never")
    host.begin()
    qemu = await host.runs()
    qemu.deaf = True
    host.put(power="off")
    await host.clock.advance(1.0)
    host.put(power="on")
    await host.clock.advance(1.0)
    qemu.shut_down()
    assert await host.runs() is not qemu


# --- ends and restarts (§4) -----------------------------------------------------------------------------------


async def crash_and_wait(host: Host, qemu: FakeQemu) -> tuple[FakeQemu, float]:
    """Crash it; return its successor and how long that took."""
    at = host.clock.now()
    qemu.crash()
    await host.until(lambda: host.qemus.all[-1] is not qemu, 400.0)
    spawned = host.clock.now()
    return await host.runs(), spawned - at


async def test_a_crash_loop_backs_off_and_recovers(host: Host) -> None:
    """§4: at once, then below 1, 2, 4 … 300 s with full jitter, and from the start after 600 s of running."""
    host.wish()
    host.begin()
    host.jitters = [0.5, 0.5, 0.25, 1 - 1e-9, *[0.5] * 8]
    qemu = await host.runs()
    pauses = []
    for _ in range(11):
        qemu, pause_s = await crash_and_wait(host, qemu)
        pauses.append(round(pause_s, 3))
    assert pauses == [0.0, 0.5, 0.5, 4.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 150.0]
    assert host.status.restarts == 11
    await host.clock.advance(600.0)
    qemu, pause_s = await crash_and_wait(host, qemu)
    assert pause_s == 0.0


async def test_a_pause_is_told(host: Host) -> None:
    """§4: `backoff`, with what happened and when it ends."""
    host.wish()
    host.begin()
    qemu, _ = await crash_and_wait(host, await host.runs())
    qemu.crash()
    await settle()
    assert host.status.phase is Phase.BACKOFF
    assert host.status.reason == "QEMU crashed (signal 9); it is started again after a pause of 0.5 s"


@pytest.mark.parametrize(
    ("policy", "clean", "restarted"),
    [("always", True, True), ("always", False, True), ("on-failure", True, False), ("on-failure", False, True),
     ("never", True, False), ("never", False, False)],
)  # fmt: skip
async def test_the_restart_policy(host: Host, policy: str, clean: bool, restarted: bool) -> None:
    """§2: `restart` says what follows an end by itself; what rests has released its lock, and starts when asked."""
    host.wish(restart=policy)
    host.begin()
    first = await host.runs()
    if clean:
        first.shut_down()
    else:
        first.crash()
    await host.clock.advance(60.0)
    assert (host.running is not None) == restarted
    if not restarted:
        assert host.lock is None
        assert host.status.phase is Phase.STOPPED
        host.put(power="on")
        await host.runs()


@pytest.mark.parametrize("policy", ["never", "always"])
async def test_the_policy_counts_for_an_end_that_nobody_watched(host: Host, policy: str) -> None:
    """§2 and law 8: a machine that ended between two supervisors is judged by its keys, once they are read."""
    host.wish(restart=policy)
    host.begin()
    qemu = await host.runs()
    await host.die()
    qemu.crash()
    host.begin()
    await host.clock.advance(60.0)
    assert (host.running is not None) == (policy == "always")


async def test_a_restart_request_restarts_once_and_gracefully(host: Host) -> None:
    """§2: any new value asks for one graceful restart, with the keys as they are."""
    host.wish()
    host.begin()
    first = await host.runs()
    host.put(ram="128")
    await host.clock.advance(60.0)
    host.put(restart_request="2026-01-01")
    await host.until(lambda: not first.alive)
    assert len(first.presses) == 1
    second = await host.runs()
    assert second.ram == "size=131200K"
    await host.clock.advance(HOUR_S)
    assert host.running is second
    assert (host.status.restarts, host.status.pending) == (0, ())


async def test_a_restart_at_once_asks_no_guest_and_has_no_pause(host: Host) -> None:
    """§4: a request that begins with `now:` ends QEMU without the power button, and the next one starts at once."""
    host.wish()
    host.begin()
    first = await host.runs()
    first.deaf = True
    host.put(restart_request="now:1")
    await host.until(lambda: not first.alive)
    assert first.presses == []
    second = await host.runs()
    assert host.running is second
    assert host.status.restarts == 0


async def test_a_stop_at_once_ends_a_shutdown_that_drags_on(host: Host) -> None:
    """§4: `power=off-now` for a guest that is deaf to `power=off`: QEMU is told to end there and then."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    qemu.deaf = True
    host.put(power="off")
    await host.clock.advance(10.0)
    assert qemu.alive
    host.put(power="off-now")
    await host.until(lambda: not qemu.alive)
    assert "quit" in qemu.commands


async def test_a_reset_is_done_once_and_the_process_stays(host: Host) -> None:
    """§4: a request that begins with `reset:` presses the reset button once, whatever else changes afterwards."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    host.put(restart_request="reset:1")
    await host.clock.advance(1.0)
    host.put(description="x")
    await host.clock.advance(HOUR_S)
    assert (host.running is qemu, qemu.presses) == (True, [])
    assert qemu.commands.count("system_reset") == 1
    host.put(restart_request="reset:2")
    await host.clock.advance(1.0)
    assert qemu.commands.count("system_reset") == 2


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_paused_guest_that_is_reset_stays_paused(host: Host, *, at_once: bool) -> None:
    """§4: QEMU then says that it never ran; the person who paused it lets it go on, no supervisor does."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    qemu.by_hand("stop")
    if not at_once:
        await host.until(lambda: "it is paused" in host.status.reason)
    qemu.by_hand("system_reset")
    await host.clock.advance(HOUR_S)
    assert (qemu.run_state, qemu.commands.count("cont")) == ("prelaunch", 1)
    assert (host.status.phase, "it is paused" in host.status.reason) == (Phase.RUNNING, True)
    await host.die()
    host.begin()
    await host.clock.advance(HOUR_S)
    assert (host.qemus.alive, qemu.commands.count("cont")) == ([qemu], 1)
    assert "it is paused" in host.status.reason
    qemu.by_hand("cont")
    await host.until(lambda: host.status.reason == "runs")


async def test_a_guest_that_panicked_begins_again_when_it_is_reset(host: Host) -> None:
    """§4: nobody has paused it."""
    host.wish(extra_flags="-no-shutdown")
    host.begin()
    qemu = await host.runs()
    qemu.run_state = "guest-panicked"
    qemu.event("GUEST_PANICKED", action="pause")
    await settle()
    host.put(restart_request="reset:1")
    await host.clock.advance(HOUR_S)
    assert (host.running is qemu, qemu.run_state) == (True, "running")


async def test_changed_keys_are_pending_by_name(host: Host) -> None:
    """§2: a change that needs a restart is shown as the names of its keys, and never applied by surprise."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    host.put(ram="128", cpus="2", description="web")
    await host.clock.advance(HOUR_S)
    assert set(host.status.pending) == {"ram", "cpus"}
    assert host.running is qemu
    host.put(ram="64", cpus="1")
    await settle()
    assert host.status.pending == ()


async def test_keys_that_turn_invalid_do_not_touch_a_running_machine(host: Host) -> None:
    """§2: it keeps running as it was, its phase stays `running`, `problems` lists what is wrong."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    host.put(ram=b"\xff", mood="good")
    await host.clock.advance(HOUR_S)
    assert host.running is qemu
    assert len(host.status.problems) == 2
    assert "it runs on as it was" in host.status.reason
    qemu.crash()
    await host.clock.advance(60.0)
    assert host.status.phase is Phase.INVALID
    assert host.qemus.alive == []
    host.put(ram="64")
    host.drop("mood")
    await host.runs()


async def test_a_host_without_a_bridge_says_so(host: Host) -> None:
    """§2: what this host lacks for a wish is a problem of that wish, by key."""
    host.wish(mac="52:54:00:00:00:01")
    host.begin()
    await settle()
    assert host.status.phase is Phase.INVALID
    assert "bridge" in host.status.problems[0]
    assert host.qemus.all == []


async def test_qemus_own_last_words_are_the_reason(host: Host) -> None:
    """§4: `failed: <QEMU's own last error line>`."""

    def refuse(qemu: FakeQemu) -> None:
        qemu.words = "qemu-system-x86_64: warning: odd\nqemu-system-x86_64: -m 64: no\n"

    host.wish()
    host.qemus.prepare = refuse
    host.begin()
    await host.until(lambda: host.status.phase is Phase.BACKOFF)
    assert host.status.last_exit == "failed: -m 64: no"


async def test_a_program_that_is_not_there_is_a_failure_like_others(host: Host) -> None:
    """A QEMU that cannot be started at all backs off, and says what was missing."""
    host.wish()
    host.qemus.no_program = "cannot start qemu: No such file or directory"
    host.begin()
    await host.until(lambda: host.status.phase is Phase.BACKOFF)
    assert host.status.last_exit == "failed: cannot start qemu: No such file or directory"
    host.qemus.no_program = None
    await host.runs()


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_record_that_cannot_be_completed_keeps_the_guest_paused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the pid of a QEMU that was started: its guest does not run before that is on record, then it does."""
    write, room = InstanceDir.write_incarnation, False

    def scarce(directory: InstanceDir, record: Incarnation) -> None:
        if record.pid is not None and not room:
            raise full()
        write(directory, record)

    monkeypatch.setattr(InstanceDir, "write_incarnation", scarce)
    host.wish()
    host.begin()
    await host.clock.advance(120.0)
    (qemu,) = host.qemus.all
    assert (qemu.alive, qemu.run_state) == (True, "prelaunch")
    assert host.status.phase is Phase.WAITING
    assert "its record cannot be written: " in host.status.reason
    room = True
    assert await host.runs() is qemu


async def test_room_for_what_is_only_remembered_is_not_needed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine is started, changed and stopped without it; it is told once, and written once there is room."""
    write, room = InstanceDir.write_state, False

    def scarce(directory: InstanceDir, saved: InstanceState) -> None:
        if not room:
            raise full()
        write(directory, saved)

    monkeypatch.setattr(InstanceDir, "write_state", scarce)
    host.wish()
    host.begin()
    with capture_logs() as logs:
        await host.runs()
        host.wish(shutdown_timeout="7")
        await host.clock.advance(120.0)
    assert [one["event"] for one in logs].count("instance.memory_unwritten") == 1
    room = True
    await host.clock.advance(120.0)
    assert host.run_dir.instance(ONE).read_state(host.boot_id).shutdown_timeout_s == 7.0


async def test_a_host_that_cannot_start_a_program_is_waited_for(host: Host) -> None:
    """No descriptor, no memory, no process left: no failure of QEMU's, so there is no backoff and nothing on record."""
    host.wish()
    host.qemus.shortage = errno.EMFILE
    host.begin()
    await host.until(lambda: "QEMU cannot be started: " in host.status.reason)
    assert "Too many open files" in host.status.reason
    assert host.status.phase is Phase.WAITING
    assert not host.run_dir.instance(ONE).has_record
    host.qemus.shortage = None
    await host.runs()
    assert host.status.restarts == 0


async def test_a_qemu_that_never_answers_is_given_up(host: Host) -> None:
    """A start has its time (`KVM_START_TIMEOUT`); after it QEMU is killed, and that is a failure."""

    def freeze(qemu: FakeQemu) -> None:
        qemu.frozen = True

    host.wish()
    host.qemus.prepare = freeze
    host.begin()
    await host.clock.advance(60.0 - 1.0)
    (qemu,) = host.qemus.all
    assert qemu.alive
    await host.until(lambda: not qemu.alive, 10.0)
    await settle()
    assert host.status.last_exit == "failed: QEMU has not answered on QMP for 60 s: it is killed"
    assert host.status.restarts == 1


async def test_a_qemu_that_greets_and_then_freezes_is_given_up_too(host: Host) -> None:
    """Only an answered command means up: a greeting alone starts nothing."""

    def mute(qemu: FakeQemu) -> None:
        qemu.mute = True

    host.wish()
    host.qemus.prepare = mute
    host.begin()
    await host.until(lambda: host.qemus.all and not host.qemus.all[0].alive, 80.0)
    assert host.lock is not None
    assert host.lock.state is LockState.STARTING


async def test_a_frozen_qemu_is_reported_and_left_alone(host: Host) -> None:
    """A QEMU that stops answering is never killed for it; people read of it, also when it recovers."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    qemu.frozen = True
    await host.clock.advance(HOUR_S)
    assert qemu.alive
    assert host.status.phase is Phase.RUNNING
    assert "does not answer on QMP" in host.status.reason
    qemu.frozen = False
    await host.clock.advance(60.0)
    assert host.status.reason == "runs"


async def test_a_guest_that_is_paused_is_told(host: Host) -> None:
    """A person, or an I/O error, may stop the guest: QEMU lives, its guest does not run, and that is said."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    qemu.run_state = "io-error"
    qemu.event("STOP")
    await settle()
    assert host.status.phase is Phase.RUNNING
    assert "QMP says io-error" in host.status.reason
    assert (host.status.run_state, host.status.up) == ("io-error", False)
    qemu.run_state = "running"
    qemu.event("RESUME")
    await settle()
    assert host.status.reason == "runs"
    assert (host.status.run_state, host.status.up) == ("running", True)


async def test_a_qemu_that_does_not_answer_is_not_up(host: Host) -> None:
    """Nobody knows then whether its guest runs; it is up again with its next answer, without having been touched."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    assert host.status.up
    qemu.frozen = True
    await host.clock.advance(90.0)
    assert (host.status.phase, host.status.run_state, host.status.up) == (Phase.RUNNING, None, False)
    qemu.frozen = False
    await host.clock.advance(60.0)
    assert (host.status.run_state, host.status.up, host.qemus.all) == ("running", True, [qemu])


async def test_a_panic_that_the_guest_survives_leaves_it_up(host: Host) -> None:
    """`-action panic=none`: QEMU tells of the panic and lets the guest run on."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    qemu.event("GUEST_PANICKED", action="run")
    await settle()
    assert host.status.up


@pytest.mark.parametrize(
    ("restart", "reason", "again"),
    [
        ("always", "guest-shutdown", True),
        ("on-failure", "guest-shutdown", False),
        ("never", "guest-shutdown", False),
        ("on-failure", "guest-reset", True),
    ],
)
async def test_a_power_off_is_a_power_off_though_qemu_lives_on(
    host: Host, restart: str, reason: str, again: bool
) -> None:
    """§4: under `-no-shutdown` QEMU is ended, and the policy decides, as if QEMU had ended by itself."""
    host.wish(restart=restart)
    host.begin()
    qemu = await host.runs()
    qemu.power_off(reason)
    await host.until(lambda: not qemu.alive, 1.0)
    await host.clock.advance(1.0)
    assert host.status.last_exit == reason
    assert len(host.qemus.all) == (2 if again else 1)
    assert host.status.phase is (Phase.RUNNING if again else Phase.STOPPED)
    assert host.status.restarts == again


async def test_a_guest_that_heeds_its_power_button_is_not_waited_for(host: Host) -> None:
    """§4: under `-no-shutdown` only QEMU's run state tells that the guest is down; the stop ends then, not by force."""
    host.wish(extra_flags="-no-shutdown")
    host.begin()
    qemu = await host.runs()
    host.put(power="off")
    await host.until(lambda: not qemu.alive, 3.0)
    await host.told()
    assert "quit" in qemu.commands
    assert (host.status.phase, host.status.last_exit) == (Phase.STOPPED, "guest-shutdown")


async def test_a_powered_off_qemu_that_does_not_end_is_killed_and_still_a_power_off(host: Host) -> None:
    """The guest's end was its own, whatever its QEMU makes of `quit`: `restart=on-failure` leaves it so."""
    host.wish(restart="on-failure")
    host.begin()
    qemu = await host.runs()
    qemu.stubborn = True
    qemu.power_off()
    await settle()
    assert (qemu.alive, host.status.phase) == (True, Phase.STOPPING)
    await host.clock.advance(11.0)
    assert not qemu.alive
    assert (host.status.phase, host.status.last_exit) == (Phase.STOPPED, "guest-shutdown")


async def test_a_successor_ends_what_has_powered_itself_off_meanwhile(host: Host) -> None:
    """Nobody has heard the event: the run state alone tells that the guest is at its end."""
    host.wish(restart="on-failure")
    host.begin()
    qemu = await host.runs()
    await host.die()
    qemu.run_state = "shutdown"
    host.begin()
    await host.until(lambda: not qemu.alive, 5.0)
    await settle()
    assert (host.status.phase, host.status.last_exit) == (Phase.STOPPED, "guest-shutdown")


async def test_a_guest_that_resets_all_the_time_is_counted_and_told_once_a_minute(host: Host) -> None:
    """One line at once, one a minute that says how many more there were, a metric that has them all."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    with capture_logs() as logs:
        for _ in range(22):
            for _ in range(1000):
                qemu.event("RESET", guest=True, reason="guest-reset")
            await host.clock.advance(0.5)
        await host.clock.advance(120.0)
        qemu.event("RESET", guest=True, reason="guest-reset")
    told = [one.get("untold", 0) for one in logs if one["event"] == "instance.guest_reset"]
    assert told == [0, 21_999, 0]
    text = host.context.metrics.render()[0].decode()
    assert f'kvmsupervisor_instance_resets_total{{host="a",instance="{ONE}"}} 22001.0' in text


async def test_a_guest_that_flaps_is_not_asked_nor_told_of_without_end(host: Host) -> None:
    """A flood of events that bear on the run state: few questions, few lines, and in the end the right word."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    asked = qemu.commands.count("query-status")
    with capture_logs() as logs:
        for _ in range(300):
            for state, event in (("suspended", "SUSPEND"), ("paused", "STOP"), ("running", "RESUME")):
                qemu.run_state = state
                qemu.event(event)
                await host.clock.advance(0.1)
    assert qemu.commands.count("query-status") - asked <= 100
    assert sum(one["event"] == "instance.running" for one in logs) <= 2 * 20 + 2
    await host.clock.advance(120.0)
    assert host.status.reason == "runs"


# --- one supervisor after the other (law 8) -------------------------------------------------------------------


async def test_a_successor_adopts(host: Host) -> None:
    """Law 8: same process, same lock, no restart; what people read does not change."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    lock = host.lock
    await host.die()
    host.begin()
    assert await host.runs() is qemu
    assert (host.lock, len(host.qemus.all)) == (lock, 1)
    assert host.status.restarts == 0
    assert b"kvmsupervisor_adopted_total 1.0" in host.context.metrics.render("")[0]


async def test_a_successor_that_finds_the_lock_lost_kills(host: Host) -> None:
    """Law 8: a process that fails the lock test is killed."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    await host.die()
    host.sessions = {"a", "b"}
    host.etcd.write(LOCK_KEY, theirs().to_json())
    host.begin()
    await host.until(lambda: not qemu.alive)
    assert len(host.qemus.all) == 1


async def test_a_successor_without_etcd_leaves_all_as_it_is(host: Host) -> None:
    """Laws 6 and 8: keys and lock unread are no reason for anything."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    await host.die()
    host.session.held = False
    client = host.etcd.peer

    def away() -> FakeEtcd:
        peer = client()
        peer.away()
        return peer

    host.etcd.peer = away  # type: ignore[method-assign]
    host.store.away()
    host.begin()
    await host.clock.advance(HOUR_S)
    assert host.running is qemu
    assert "its keys have not been read yet" in host.status.reason


@pytest.mark.parametrize("cut", range(6))
async def test_a_supervisor_cut_off_during_a_start(host: Host, cut: int) -> None:
    """Laws 3 and 8: whenever it dies, its successor brings the start to its end, with one QEMU and no gap in law 3."""
    host.wish()
    host.begin()
    for _ in range(cut * 3):
        await settle_once()
    await host.die()
    host.begin()
    await host.runs()
    assert len(host.qemus.alive) == 1


async def settle_once() -> None:
    """One turn of the loop."""
    await asyncio.sleep(0)


async def test_an_unwished_qemu_is_shut_down_by_the_successor(host: Host) -> None:
    """Keys that were removed while no supervisor looked are as gone as others."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    await host.die()
    keys_removed(host)
    host.begin()
    await host.until(lambda: host.gone)
    assert len(qemu.presses) == 1
    assert host.lock is None


async def test_a_qemu_whose_run_directory_is_gone_is_not_doubled(host: Host) -> None:
    """A living QEMU of ours without a record is told of by pid; nothing is started beside it."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    await host.die()
    host.run_dir.instance(ONE).drop_incarnation()
    host.begin()
    await host.clock.advance(60.0)
    assert host.qemus.alive == [qemu]
    assert f"QEMU {qemu.pid} of this instance lives" in host.status.reason
    qemu.crash()
    await host.runs()


async def test_the_environment_is_searched_only_for_a_lock_that_is_left_over(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading every process of the host costs milliseconds: an ordinary start does not."""
    searches = []
    find = host.qemus.find

    def counted(marks: Mapping[str, str]) -> Iterator[int]:
        searches.append(marks)
        return find(marks)

    monkeypatch.setattr(host.qemus, "find", counted)
    host.wish()
    host.begin()
    await host.runs()
    assert searches == []


# --- two hosts ------------------------------------------------------------------------------------------------


async def test_a_move_stops_here_and_starts_there(host: Host, other: Host) -> None:
    """§6, cold: at no instant do two guests run; the epoch goes on."""

    def one_runs(qemu: FakeQemu) -> bool:
        assert host.qemus.running == []
        return host.is_on_record(qemu)

    host.qemus.on_record = one_runs
    host.wish()
    host.begin()
    other.begin()
    await host.runs()
    assert other.gone
    await other.die()
    other.begin()
    host.put(host="b")
    await other.runs()
    assert host.gone
    assert host.lock is not None
    assert (host.lock.host, host.lock.epoch) == ("b", 2)
    await other.told()
    assert host.published is not None
    assert host.published.host == "b"


@pytest.mark.parametrize("number", [0, 1])
async def test_a_lock_that_another_host_takes_first_is_left_alone(host: Host, number: int) -> None:
    """Law 2: whoever is first has it, however close: at our first write, or while we read who had it before."""
    taken = Lock(host=HostName("b"), boot_id="b", epoch=7, state=LockState.STARTING, incarnation="theirs").to_json()
    host.etcd.write(STATUS_KEY, b"{}")

    def race(call: int) -> None:
        if call == number:
            host.etcd.write(LOCK_KEY, taken)

    async def between(call: str) -> None:
        # The look, which is a transaction that compares nothing, comes behind the first write.
        if call == "txn" and host.store.writes_begun == 1 and number == 1:
            host.etcd.write(LOCK_KEY, taken)

    host.store.before = race
    host.store.hook = between
    host.wish()
    host.begin()
    await host.clock.advance(30.0)
    assert host.etcd.data[LOCK_KEY] == taken
    assert host.qemus.alive == []


async def test_a_deleted_lock_does_not_let_two_hosts_run(host: Host, other: Host) -> None:
    """A lock deleted by hand while its host cannot write it again: the status still tells that the guest runs there."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    await host.told()
    host.session.turn(held=False)
    host.store.away()
    host.etcd.erase(LOCK_KEY)
    host.put(host="b")
    # Host `a` reads that it shall stop; its guest is deaf.
    qemu.deaf = True
    other.begin()
    await host.clock.advance(60.0)
    assert host.qemus.alive == [qemu]
    assert other.status.phase is Phase.WAITING
    assert "its status says that it runs on a" in other.status.reason
    qemu.shut_down()
    host.store.back()
    host.session.turn(held=True)
    await other.runs()
    assert other.lock is not None
    assert other.lock.epoch == 2


@pytest.mark.parametrize(
    ("storage", "session", "taken"),
    [
        (Storage.NONE, True, False),
        (Storage.NONE, None, False),
        (Storage.NONE, False, True),
        (Storage.RBD, True, False),
        (Storage.RBD, None, False),
        (Storage.RBD, False, True),
        (Storage.UNFENCEABLE, False, False),
    ],
)
async def test_whose_lock_is_taken(host: Host, storage: Storage, session: bool | None, taken: bool) -> None:
    """Laws 4 and 7: what can be fenced, or has nothing to protect, is taken from a host known to have no session."""
    host.sessions = None if session is None else {"a", "b"} if session else {"a"}
    host.etcd.write(LOCK_KEY, theirs(storage=storage).to_json())
    host.wish()
    host.begin()
    await host.clock.advance(60.0)
    assert (host.running is not None) == taken
    if taken:
        assert host.lock is not None
        assert host.lock.epoch == 8
        assert b"kvmsupervisor_takeovers_total 1.0" in host.context.metrics.render("")[0]
    else:
        assert host.lock == theirs(storage=storage)
        assert "b" in host.status.reason


async def test_an_address_that_cannot_be_fenced_starts_nothing(host: Host) -> None:
    """Laws 3 and 4: addresses of an earlier boot are fenced before QEMU is started; while they cannot be, none is."""
    left = theirs(host=HostName("a"), boot_id="an earlier one", clients=("10.0.0.1:0/1",), pid=None, starttime=None)
    host.etcd.write(LOCK_KEY, left.to_json())
    host.etcd.write(LAYOUT.clients_key(ONE), '["10.0.0.1:0/1"]')
    host.fencing.refused = "cannot fence 10.0.0.1:0/1 here"
    host.wish()
    host.begin()
    await host.clock.advance(60.0)
    assert host.qemus.all == []
    assert "cannot fence 10.0.0.1:0/1 here" in host.status.reason
    assert host.lock is not None
    assert host.lock.fence == ("10.0.0.1:0/1",)
    host.fencing.refused = None
    await host.runs()
    assert host.fencing.fenced == ["10.0.0.1:0/1"]


@pytest.mark.parametrize("garbage", [b"", b"\xff", b"[" * 70_000, b'{"version":1,"epoch":"x"}', b'{"version":9}'])
async def test_a_lock_that_cannot_be_read_counts_as_held(host: Host, garbage: bytes) -> None:
    """Law 2: nothing is started over what this release does not understand, and nothing breaks over it."""
    host.etcd.write(LOCK_KEY, garbage)
    host.wish()
    host.begin()
    await host.clock.advance(60.0)
    assert host.qemus.all == []
    assert host.etcd.data[LOCK_KEY] == garbage
    assert "counts as held" in host.status.reason


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xff", b"[" * 70_000, b'{"id":"1","host":"b","phase":"running","reason":"","since":"","epoch":"x"}'],
)
async def test_a_status_that_cannot_be_read_hinders_nothing(host: Host, garbage: bytes) -> None:
    """Facts are for people: garbage in the status key starts the machine all the same."""
    host.etcd.write(STATUS_KEY, garbage)
    host.wish()
    host.begin()
    await host.runs()


async def test_the_epoch_goes_on_after_a_lock_was_released(host: Host) -> None:
    """Law 2: the status remembers the last epoch of a lock that is gone."""
    host.wish()
    host.begin()
    await host.runs()
    for epoch in (2, 3):
        host.put(power="off")
        await host.until(lambda: host.lock is None)
        host.put(power="on")
        await host.runs()
        assert host.lock is not None
        assert host.lock.epoch == epoch


async def test_the_epoch_goes_on_after_a_release_that_the_watch_has_not_shown(host: Host) -> None:
    """Law 2: what was let go of here a moment ago still looks held; the status alone knows how far it came."""
    left = theirs(host=HostName("a"), boot_id="boot-a", pid=None, starttime=None)
    host.etcd.write(LOCK_KEY, left.to_json())
    last = Status(id=ONE, host="a", phase=Phase.STOPPED, reason="", since="", epoch=left.epoch)
    host.etcd.write(STATUS_KEY, last.to_json())

    async def released(call: str) -> None:
        if call == "read":
            host.store.hook = None
            host.etcd.erase(LOCK_KEY)

    host.store.hook = released
    host.wish()
    host.begin()
    await host.runs()
    assert host.lock is not None
    assert host.lock.epoch == left.epoch + 1


async def test_the_epoch_goes_on_though_a_host_was_behind(host: Host, other: Host) -> None:
    """Law 2: who was behind while another host had the instance does not write over how far that one came."""
    host.qemus.on_record = lambda qemu: host.is_on_record(qemu) or other.is_on_record(qemu)
    host.disks.trouble = "Ceph does not answer"
    host.wish(rbd="/rbd/vm")
    host.begin()
    await host.until(lambda: host.published)
    host.keys.away()
    host.put(host="b")
    other.begin()
    for epoch in (1, 2, 3):
        host.put(power="on")
        await other.runs()
        assert other.lock is not None
        assert other.lock.epoch == epoch
        host.put(power="off")
        await host.until(lambda: host.lock is None)
    await other.told()
    # What it says of itself differs, and nothing of what it knows.
    host.disks.trouble = "Ceph still does not answer"
    await host.clock.advance(60.0)
    host.put(host="a", power="on")
    host.disks.trouble = None
    host.keys.back()
    await host.runs()
    assert host.lock is not None
    assert host.lock.epoch == 4


async def test_since_survives_a_new_supervisor(host: Host) -> None:
    """§7: `since` is when the phase began, whoever supervised then."""
    host.wish()
    host.begin()
    await host.runs()
    since = host.status.since
    await host.told()
    await host.die()
    await host.clock.advance(HOUR_S)
    host.begin()
    await host.runs()
    written = host.published
    assert written is not None
    host.instance.report.recall(replace(written, since=since))
    assert host.status.since == since
    host.instance.report.recall(Status(id="1", host="a", phase=Phase.STOPPED, reason="", since="long ago"))
    assert host.status.since == since


async def test_one_that_answers_again_is_asked_for_its_run_state(host: Host) -> None:
    """Somebody has paused the guest while QEMU hung: its status says so once QEMU has answered anything.

    Otherwise it said for up to a minute that the guest runs (simulation, seed 7362).
    """
    host.wish(rbd="/rbd/vm")
    host.begin()
    qemu = await host.runs()
    qemu.frozen = True
    qemu.by_hand("stop")
    await host.clock.advance(7.0)
    qemu.frozen = False
    host.put(ram="128")
    await host.clock.advance(3.0)
    assert host.status.run_state == "paused"


async def test_a_size_that_ceph_does_not_tell_is_a_line_in_the_log(host: Host) -> None:
    """Each change of a key has the disks looked at: not without a word where Ceph is away (simulation, seed 2739)."""
    host.wish(rbd="/rbd/vm")
    host.begin()
    await host.runs()
    host.disks.trouble = "whether rbd/vm has grown is not known: Ceph does not answer"
    with capture_logs() as lines:
        host.put(ram="128")
        await host.clock.advance(3.0)
    assert [one["reason"] for one in lines if one["event"] == "instance.etcd_trouble"] == [host.disks.trouble]
