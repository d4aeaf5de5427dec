"""The decision of `domain.lifecycle`: row by row, and cut off at every step.

The cuts: a small world holds what outlives a supervisor (etcd's lock, the QEMU process, the run directory). A
supervisor decides and acts in it by the smallest steps that a crash could fall between, and after any of them it may
die, which leaves the world and loses everything else. Its successor decides again from what it observes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import assert_never

import pytest

from kvmsupervisor.domain.cdrom import Cdrom
from kvmsupervisor.domain.decision import Row
from kvmsupervisor.domain.exits import Exit, ExitClass
from kvmsupervisor.domain.history import Era
from kvmsupervisor.domain.incarnation import Ended, Incarnation, InstanceState
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lifecycle import PROBE_EVERY_S, decide
from kvmsupervisor.domain.live import Attempt
from kvmsupervisor.domain.lock import Claim, Lock, LockState, LockView, Storage, take
from kvmsupervisor.domain.placement import Placed, Placement
from kvmsupervisor.domain.restart import after
from kvmsupervisor.domain.run_state import NEVER_RAN
from kvmsupervisor.domain.spec import Power, Problem, RbdDisk, RestartPolicy, Spec, Wish, spec_to_object
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.stopping import POWERDOWN_EVERY_S, QUIT_WAIT_S
from kvmsupervisor.domain.view import Action, Clearing, Deferral, Holdover, LeftAlone, Process, Stopping, Target, View

ME, OTHER = HostName("a"), HostName("b")
BOOT = "boot-1"
ID = InstanceId("1")
SPEC = Spec(ram_mib=64)
WISH = Wish(instance=ID, host=ME, host_revision=5, spec=SPEC, revision=7, keys=2)
GONE = Wish(instance=ID)


def record(*, name: str = "x", epoch: int = 1, spec: Spec = SPEC, request: str | None = None) -> Incarnation:
    return Incarnation(
        instance=ID,
        incarnation=name,
        epoch=epoch,
        boot_id=BOOT,
        argv=("qemu",),
        spec=spec_to_object(spec),
        storage=Storage.NONE,
        accelerator="tcg",
        restart_request=request,
        revision=7,
        log_offset=0,
        spawned_at=100.0,
        pid=42,
        starttime=9,
    )


def locked(*, host: HostName = ME, name: str = "x", state: LockState = LockState.RUNNING, pid: int | None = 42) -> Lock:
    return Lock(host=host, boot_id=BOOT, epoch=1, state=state, incarnation=name, pid=pid, starttime=pid and 9,
                storage=Storage.NONE)  # fmt: skip


def seen(lock: Lock | None) -> LockView:
    return LockView(known=True, data=None if lock is None else lock.to_json(), mod_revision=3 if lock else 0, as_of=9)


def running(**changes: object) -> Process:
    process = Process(incarnation=record(), spec=SPEC, connected=True, run_state="running", probe_at=1e9)
    return replace(process, **changes)  # type: ignore[arg-type]


def paused(**changes: object) -> Process:
    return running(run_state=NEVER_RAN, **changes)


def view(**changes: object) -> View:
    plain = View(
        now=101.0,
        me=ME,
        facts="/kvmsupervisor",
        boot_id=BOOT,
        wish=WISH,
        lock=seen(None),
        saved=InstanceState(boot_id=BOOT),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


UNVOUCHED = replace(record(), clients=("192.0.2.1:0/1",))
STOPPED_BY_US = Stopping(since=50.0, pressed_at=100.5)
OFF = replace(WISH, power=Power.OFF)
OFF_NOW = replace(OFF, power_off_now=True)
THERE, ABSENT = Target(there=True), Target(there=False)
MOVED = replace(WISH, host=OTHER)
LIVE_ONLY = replace(WISH, placed=Placed(9, Placement(host=OTHER, why="drain", since="12:00", of=5, only_live=True)))
CLOSED, EVICTED = Clearing(closed="it drains"), Clearing(closed="it drains", evicted="nobody takes it in")
PLACED_HERE = replace(MOVED, placed=Placed(9, Placement(host=ME, why="failover", since="12:00", of=5)))
PLACED_AWAY = replace(WISH, placed=Placed(9, Placement(host=OTHER, why="failover", since="12:00", of=5)))
DAMAGED = replace(WISH, spec=None, problems=(Problem("placement", "x", "y"),), placed=Placed(9))
BAD = replace(WISH, spec=None, problems=(Problem("ram", "'x'", "a size"),))
ENDED = Ended(reason="guest-shutdown", clean=True, host_revision=5, power_revision=0, restart_request=None)

AWAITED = Era(number=1, since=8, awaited=(OTHER,), until=150.0)
ON_RBD = replace(locked(host=OTHER, name="y"), storage=Storage.RBD, clients=("192.0.2.1:0/1",))
WAITED = Deferral(until=160.0, told="12:00", ask_at=102.0, watchers=("192.0.2.1:0/1",))

RESTORED = Era(number=1, since=9, mark="h")
SPEC_WITH_IMAGE = Spec(ram_mib=64, rbd=RbdDisk("rbd", "vm"))
WITH_IMAGE = replace(WISH, spec=SPEC_WITH_IMAGE)
WITH_DRIVE = replace(SPEC, cdrom=Cdrom("empty"))
MEDIUM_WANTED = replace(WISH, spec=replace(SPEC, cdrom=Cdrom("file:a.iso")))
GROWING = replace(SPEC, cpus_max=2)
MORE_CPUS = replace(WISH, spec=replace(GROWING, cpus=2))
UNWATCHED = replace(WAITED, watchers=())

TABLE: list[tuple[str, Row, View, Phase, Action | None]] = [
    ("the exit of an ended process is recorded first", Row.END,
     view(process=running(exit=Exit(ExitClass.CRASHED, "crashed (signal 9)")), wish=GONE), Phase.STOPPING, Action.RECORD_EXIT),
    ("not before its keys were read", Row.END_UNREAD, view(process=running(exit=Exit(ExitClass.CRASHED, "c")), wish=None),
     Phase.WAITING, None),
    ("law 6: a lock that names another host kills", Row.LOCK_LOST, view(process=running(), lock=seen(locked(host=OTHER, name="y"))),
     Phase.STOPPING, Action.KILL),
    ("law 6: so does another incarnation of this host", Row.LOCK_LOST, view(process=running(), lock=seen(locked(name="y"))),
     Phase.STOPPING, Action.KILL),
    ("law 6: so does one with an older epoch that a living host took in this history: made again, it began anew",
     Row.LOCK_LOST, view(process=running(incarnation=replace(record(), epoch=9)), lock=seen(locked(host=OTHER, name="y")),
     holder_has_session=True), Phase.STOPPING, Action.KILL),
    ("law 11: nor with one that was started in another history of the same number", Row.REWRITE,
     view(process=running(incarnation=replace(record(), epoch=1_000_009, history="i")),
     lock=seen(replace(locked(host=OTHER, name="y"), history="h")), holder_has_session=True, session_held=True,
     era=Era(number=1, since=2, mark="h")), Phase.RUNNING, Action.REASSERT),
    ("law 11: not with a process of an earlier history", Row.REWRITE, view(process=running(incarnation=replace(record(), epoch=9)),
     lock=seen(locked(host=OTHER, name="y")), holder_has_session=True, era=Era(number=1, since=2), session_held=True), Phase.RUNNING,
     Action.REASSERT),
    ("law 12: its own incarnation under another name of this host does not", Row.RENAME, view(process=running(),
     lock=seen(locked(host=OTHER))), Phase.RUNNING, Action.RENAME),
    ("law 12: nor does its lock of before the facts prefix was another one", Row.RENAME, view(process=running(),
     lock=seen(replace(locked(), facts="/other"))), Phase.RUNNING, Action.RENAME),
    ("law 12: before a stop, too", Row.RENAME, view(process=running(), lock=seen(locked(host=OTHER)), wish=GONE), Phase.RUNNING,
     Action.RENAME),
    ("law 12: and before it runs", Row.RENAME, view(process=paused(), lock=seen(locked(host=OTHER, pid=None))), Phase.STARTING,
     Action.RENAME),
    ("law 4: what an earlier release started is vouched for", Row.VOUCH, view(process=running(incarnation=UNVOUCHED),
     lock=seen(locked()), locks_are_open=True), Phase.RUNNING, Action.VOUCH),
    ("law 4: not where people cannot write locks", Row.RUNS, view(process=running(incarnation=UNVOUCHED), lock=seen(locked())),
     Phase.RUNNING, None),
    ("law 4: without a session it runs on", Row.RUNS, view(process=running(incarnation=UNVOUCHED), lock=seen(locked()),
     locks_are_open=True, session_held=False), Phase.RUNNING, None),
    ("law 4: what this release started is vouched for already", Row.RUNS, view(locks_are_open=True, lock=seen(locked()),
     process=running(incarnation=replace(UNVOUCHED, vouched=True))), Phase.RUNNING, None),
    ("law 12: without a session it runs on", Row.RUNS, view(process=running(), lock=seen(locked(host=OTHER)), session_held=False),
     Phase.RUNNING, None),
    ("law 12: or waits, paused", Row.PAUSED_LOCKLESS, view(process=paused(), lock=seen(locked(host=OTHER)), session_held=False),
     Phase.WAITING, None),
    ("law 12: what ended under another name is let go of", Row.REST_RELEASE, view(lock=seen(locked(host=OTHER)), last_ended="x", wish=OFF),
     Phase.STOPPED, Action.RELEASE),
    ("law 12: or taken anew", Row.TAKE, view(lock=seen(locked(host=OTHER)), last_ended="x", slot=True), Phase.STARTING, Action.TAKE),
    ("what cannot be read is left alone", Row.LEFT_ALONE, view(left_alone=LeftAlone(reason="r", look_at=102.0)), Phase.WAITING, None),
    ("and read again", Row.LEFT_ALONE, view(left_alone=LeftAlone(reason="r", look_at=101.0)), Phase.WAITING, Action.READ),
    ("its QEMU runs", Row.LEFT_ALONE, view(left_alone=LeftAlone(reason="r", pid=42, look_at=102.0), wish=OFF), Phase.RUNNING, None),
    ("whatever is told of its lock", Row.LEFT_ALONE, view(left_alone=LeftAlone(reason="r", pid=42, look_at=102.0),
     lock=seen(locked(host=OTHER, name="y"))), Phase.RUNNING, None),
    ("what others say of it is read before it is written over", Row.LEFT_ALONE, view(left_alone=LeftAlone(reason="r", look_at=102.0),
     looked=False), Phase.WAITING, Action.LOOK),
    ("law 12: where others look for locks elsewhere none is taken", Row.DISSENT, view(dissent="d", slot=True, looked=True),
     Phase.WAITING, None),
    ("and that is told", Row.DISSENT, view(dissent="d", slot=True, looked=False), Phase.WAITING, Action.LOOK),
    ("law 12: what holds one goes on", Row.TAKE, view(dissent="d", slot=True, lock=seen(locked())), Phase.STARTING, Action.TAKE),
    ("law 12: so does what runs", Row.RUNS, view(dissent="d", process=running(), lock=seen(locked())), Phase.RUNNING, None),
    ("law 12: and what shall not run is not held up", Row.FORGET, view(dissent="d", wish=GONE), Phase.STOPPED, Action.FORGET),
    ("law 12: under other settings nothing is started", Row.MISMATCH, view(mismatch="m", slot=True), Phase.WAITING, None),
    ("law 12: nor let go of", Row.MISMATCH, view(mismatch="m", wish=OFF, lock=seen(locked())), Phase.STOPPED, None),
    ("law 12: nor forgotten", Row.MISMATCH, view(mismatch="m", wish=GONE), Phase.STOPPED, None),
    ("law 12: nor stopped", Row.MISMATCH_QEMU, view(mismatch="m", process=running(), lock=seen(locked()), wish=OFF), Phase.RUNNING, None),
    ("law 12: nor killed", Row.MISMATCH_QEMU, view(mismatch="m", process=running(), lock=seen(locked(host=OTHER, name="y"))),
     Phase.RUNNING, None),
    ("law 12: nor its lock written", Row.MISMATCH_QEMU, view(mismatch="m", process=running()), Phase.RUNNING, None),
    ("law 12: nor let run", Row.MISMATCH_QEMU, view(mismatch="m", process=paused(), lock=seen(locked())), Phase.STARTING, None),
    ("law 12: but it is watched", Row.MISMATCH_QEMU, view(mismatch="m", process=running(connected=False)), Phase.RUNNING, Action.CONNECT),
    ("law 12: and asked", Row.MISMATCH_QEMU, view(mismatch="m", process=running(probe_at=101.0)), Phase.RUNNING, Action.PROBE),
    ("law 12: its exit is recorded", Row.END, view(mismatch="m", process=running(exit=Exit(ExitClass.CRASHED, "c"))),
     Phase.STOPPING, Action.RECORD_EXIT),
    ("law 12: who shuts the host down is heeded", Row.STOP_ASK, view(mismatch="m", process=running(), draining=True,
     lock=seen(locked())), Phase.STOPPING, Action.POWERDOWN),
    ("at once, a stop asks no guest", Row.STOP_FORCE, view(process=running(), lock=seen(locked()), wish=OFF_NOW), Phase.STOPPING,
     Action.QUIT),
    ("nor one that is shutting down", Row.STOP_FORCE, view(process=running(stopping=STOPPED_BY_US), lock=seen(locked()), wish=OFF_NOW),
     Phase.STOPPING, Action.QUIT),
    ("nor one whose QEMU is silent", Row.STOP_FORCE, view(process=running(connected=False), lock=seen(locked()), wish=OFF_NOW),
     Phase.STOPPING, Action.QUIT),
    ("nor a paused one", Row.STOP_FORCE, view(process=running(run_state="paused"), lock=seen(locked()), wish=OFF_NOW), Phase.STOPPING,
     Action.QUIT),
    ("QEMU has its time to flush", Row.STOP_TOLD, view(process=running(stopping=Stopping(since=100.0, quit_at=100.0)),
     lock=seen(locked()), wish=OFF_NOW), Phase.STOPPING, None),
    ("and is killed then", Row.STOP_TOLD, view(process=running(stopping=Stopping(since=90.0, quit_at=90.0)), lock=seen(locked()),
     wish=OFF_NOW, now=90.0 + QUIT_WAIT_S), Phase.STOPPING, Action.KILL),
    ("at once, a restart asks no guest", Row.STOP_FORCE, view(process=running(), lock=seen(locked()),
     wish=replace(WISH, restart_request="now:1")), Phase.STOPPING, Action.QUIT),
    ("an earlier request is no hurry for another stop", Row.STOP_ASK, view(process=running(), lock=seen(locked()),
     wish=replace(WISH, restart_request="now:1", power=Power.OFF)), Phase.STOPPING, Action.POWERDOWN),
    ("nor for a host that stops all its guests", Row.STOP_ASK, view(process=running(), lock=seen(locked()), draining=True,
     wish=replace(WISH, restart_request="now:1")), Phase.STOPPING, Action.POWERDOWN),
    ("a reset leaves the process", Row.RESET, view(process=running(), lock=seen(locked()),
     wish=replace(WISH, restart_request="reset:1")), Phase.RUNNING, Action.RESET),
    ("a reset is done once", Row.RUNS, view(process=running(incarnation=replace(record(), restart_request="reset:1")),
     lock=seen(locked()), wish=replace(WISH, restart_request="reset:1")), Phase.RUNNING, None),
    ("a reset waits for QMP", Row.RUNS_CONNECT, view(process=running(connected=False), lock=seen(locked()),
     wish=replace(WISH, restart_request="reset:1")), Phase.RUNNING, Action.CONNECT),
    ("a reset that came with another history was asked of nobody", Row.RUNS, view(process=running(), lock=seen(locked()),
     wish=replace(WISH, restart_request="reset:1"), saved=InstanceState(boot_id=BOOT, restart_seen="reset:1")),
     Phase.RUNNING, None),
    ("law 6: losing the session kills nothing", Row.RUNS, view(process=running(), lock=seen(locked()), session_held=False),
     Phase.RUNNING, None),
    ("law 6: an unreadable lock kills nothing", Row.RUNS, view(process=running(), lock=LockView(known=True, data=b"?", as_of=9)),
     Phase.RUNNING, None),
    ("a lock that was deleted is written again", Row.REWRITE, view(process=running()), Phase.RUNNING, Action.REASSERT),
    ("law 11: so is one that is older than its QEMU", Row.REWRITE, view(process=running(incarnation=record(epoch=2)),
     lock=seen(locked(host=OTHER, name="y"))), Phase.RUNNING, Action.REASSERT),
    ("what never ran is started anew instead", Row.REWRITE_PAUSED, view(process=paused()), Phase.STARTING, Action.KILL),
    ("also before a stop", Row.REWRITE, view(process=running(), wish=GONE), Phase.RUNNING, Action.REASSERT),
    ("but not without a session", Row.RUNS, view(process=running(), session_held=False), Phase.RUNNING, None),
    ("a machine that runs is left alone", Row.RUNS, view(process=running(), lock=seen(locked())), Phase.RUNNING, None),
    ("and asked now and then", Row.RUNS_PROBE, view(process=running(probe_at=101.0), lock=seen(locked())), Phase.RUNNING, Action.PROBE),
    ("without QMP it is connected", Row.RUNS_CONNECT, view(process=running(connected=False), lock=seen(locked())), Phase.RUNNING,
     Action.CONNECT),
    ("a bad wish lets it run on", Row.RUNS, view(process=running(), lock=seen(locked()), wish=BAD, problems=BAD.problems),
     Phase.RUNNING, None),
    ("a held removal lets it run on", Row.RUNS, view(process=running(), lock=seen(locked()), wish=GONE, held=True),
     Phase.RUNNING, None),
    ("unread keys let it run on", Row.RUNS, view(process=running(), lock=LockView(), wish=None), Phase.RUNNING, None),
    ("a host that drains stops it, its keys read or not", Row.STOP_ASK, view(process=running(), lock=LockView(), wish=None,
     draining=True), Phase.STOPPING, Action.POWERDOWN),
    ("and with its removal held", Row.STOP_ASK, view(process=running(), lock=seen(locked()), wish=GONE, held=True, draining=True),
     Phase.STOPPING, Action.POWERDOWN),
    ("what never ran is killed then", Row.PAUSED_UNWANTED, view(process=paused(), lock=LockView(), wish=None, draining=True),
     Phase.STOPPING, Action.KILL),
    ("nothing is started then", Row.REST, view(lock=seen(None), draining=True), Phase.STOPPED, None),
    ("and its lock is released", Row.REST_RELEASE, view(lock=seen(locked(pid=None)), planned="x", draining=True), Phase.STOPPED,
     Action.RELEASE),
    ("a host that empties itself starts nothing", Row.CLOSED, view(lock=seen(None), slot=True, clearing=CLOSED), Phase.WAITING, None),
    ("what it would read of others is read", Row.CLOSED, view(lock=seen(None), looked=False, clearing=CLOSED), Phase.WAITING,
     Action.LOOK),
    ("nor does it take anything over", Row.CLOSED, view(lock=seen(ON_RBD), holder_has_session=False, deferral=WAITED,
     clearing=CLOSED), Phase.WAITING, None),
    ("it holds no lock meanwhile: another host may start it", Row.CLOSED_RELEASE, view(lock=seen(locked(pid=None)), planned="x",
     clearing=CLOSED), Phase.WAITING, Action.RELEASE),
    ("law 4: but for what is to be fenced before", Row.CLOSED_FENCE, view(lock=seen(locked(state=LockState.FENCING, pid=None)),
     planned="x", clearing=CLOSED), Phase.WAITING, Action.FENCE),
    ("what runs there runs on", Row.RUNS, view(process=running(), lock=seen(locked()), clearing=CLOSED), Phase.RUNNING, None),
    ("unless it was ordered to be stopped", Row.STOP_ASK, view(process=running(), lock=seen(locked()), clearing=EVICTED),
     Phase.STOPPING, Action.POWERDOWN),
    ("and then it stays stopped", Row.REST, view(lock=seen(None), clearing=EVICTED), Phase.STOPPED, None),
    ("a start that has begun goes on", Row.CONTINUE, view(process=paused(), lock=seen(locked()), clearing=CLOSED), Phase.STARTING,
     Action.CONTINUE),
    ("a guest that may go only while it runs is not stopped", Row.RUNS, view(process=running(), lock=seen(locked()), wish=LIVE_ONLY,
     target=THERE), Phase.RUNNING, None),
    ("whatever it stands still for", Row.RUNS, view(process=running(run_state="io-error"), lock=seen(locked()), wish=LIVE_ONLY,
     target=THERE), Phase.RUNNING, None),
    ("power off stops it all the same, too", Row.STOP_ASK, view(process=running(), lock=seen(locked()), target=THERE,
     wish=replace(LIVE_ONLY, power=Power.OFF)), Phase.STOPPING, Action.POWERDOWN),
    ("what never ran has nothing to lose", Row.PAUSED_UNWANTED, view(process=paused(), lock=seen(locked()), wish=LIVE_ONLY,
     target=THERE), Phase.STOPPING, Action.KILL),
    ("and one that has ended by itself starts there", Row.REST_RELEASE, view(lock=seen(locked()), wish=LIVE_ONLY, target=THERE),
     Phase.STOPPED, Action.RELEASE),
    ("power off begins with the button", Row.STOP_ASK, view(process=running(), lock=seen(locked()), wish=OFF), Phase.STOPPING,
     Action.POWERDOWN),
    ("power off of a bad wish too", Row.STOP_ASK, view(process=running(), lock=seen(locked()),
     wish=replace(BAD, power=Power.OFF), problems=BAD.problems), Phase.STOPPING, Action.POWERDOWN),
    ("another host that is there begins with the button", Row.STOP_ASK, view(process=running(), lock=seen(locked()),
     wish=MOVED, target=THERE), Phase.STOPPING, Action.POWERDOWN),
    ("one that has no session stops nothing", Row.RUNS, view(process=running(), lock=seen(locked()), wish=MOVED, target=ABSENT),
     Phase.RUNNING, None),
    ("nor one of which nobody knows", Row.RUNS, view(process=running(), lock=seen(locked()), wish=MOVED), Phase.RUNNING, None),
    ("nor one that stops all its guests", Row.RUNS, view(process=running(), lock=seen(locked()), wish=MOVED,
     target=replace(THERE, drains=True)), Phase.RUNNING, None),
    ("nor while the lock cannot be handed over", Row.RUNS, view(process=running(), lock=seen(locked()), wish=MOVED,
     target=THERE, session_held=False), Phase.RUNNING, None),
    ("one that is gone again before the button was pressed stops nothing", Row.RUNS, view(process=running(stopping=Stopping(since=100.0)),
     lock=seen(locked()), wish=MOVED, target=ABSENT), Phase.RUNNING, None),
    ("power off stops it then all the same", Row.STOP_ASK, view(process=running(), lock=seen(locked()), target=ABSENT,
     wish=replace(MOVED, power=Power.OFF)), Phase.STOPPING, Action.POWERDOWN),
    ("so does a host that is taken away", Row.STOP_ASK, view(process=running(), lock=seen(locked()), wish=replace(WISH, host=None)),
     Phase.STOPPING, Action.POWERDOWN),
    ("so does a restart that is asked for", Row.STOP_ASK, view(process=running(), lock=seen(locked()), target=ABSENT,
     wish=replace(MOVED, restart_request="r1")), Phase.STOPPING, Action.POWERDOWN),
    ("what never ran is let run here meanwhile", Row.CONTINUE, view(process=paused(), lock=seen(locked()), wish=MOVED,
     target=ABSENT), Phase.STARTING, Action.CONTINUE),
    ("and killed when it moves on", Row.PAUSED_UNWANTED, view(process=paused(), lock=seen(locked()), wish=MOVED, target=THERE),
     Phase.STOPPING, Action.KILL),
    ("what ends meanwhile is started again where it was", Row.TAKE, view(lock=seen(locked()), wish=MOVED, target=ABSENT,
     slot=True), Phase.STARTING, Action.TAKE),
    ("and let go of once somebody is there", Row.REST_RELEASE, view(lock=seen(locked()), wish=MOVED, target=THERE), Phase.STOPPED,
     Action.RELEASE),
    ("law 10: where it is placed is where it runs, whatever its host", Row.RUNS, view(process=running(), lock=seen(locked()),
     wish=PLACED_HERE, target=THERE), Phase.RUNNING, None),
    ("law 10: and where it starts", Row.TAKE, view(wish=PLACED_HERE, slot=True), Phase.STARTING, Action.TAKE),
    ("law 10: what is placed elsewhere does not start on its host", Row.FORGET, view(wish=PLACED_AWAY, target=ABSENT, slot=True),
     Phase.STOPPED, Action.FORGET),
    ("law 10: and moves there", Row.STOP_ASK, view(process=running(), lock=seen(locked()), wish=PLACED_AWAY, target=THERE),
     Phase.STOPPING, Action.POWERDOWN),
    ("law 10: once somebody is there", Row.RUNS, view(process=running(), lock=seen(locked()), wish=PLACED_AWAY, target=ABSENT),
     Phase.RUNNING, None),
    ("law 10: a newer host ends a placement", Row.STOP_ASK, view(process=running(), lock=seen(locked()), target=THERE,
     wish=replace(PLACED_HERE, host_revision=6)), Phase.STOPPING, Action.POWERDOWN),
    ("law 10: what is left of one is deleted by who runs it", Row.RUNS_TIDY, view(process=running(), lock=seen(locked()),
     wish=replace(PLACED_AWAY, host_revision=6)), Phase.RUNNING, Action.TIDY),
    ("law 10: not without a session", Row.RUNS, view(process=running(), lock=seen(locked()), session_held=False,
     wish=replace(PLACED_AWAY, host_revision=6)), Phase.RUNNING, None),
    ("law 10: nor right after etcd failed", Row.RUNS, view(process=running(), lock=seen(locked()), etcd_at=102.0,
     wish=replace(PLACED_AWAY, host_revision=6)), Phase.RUNNING, None),
    ("law 10: or by who ran it, where nobody holds the lock", Row.REST_TIDY, view(wish=replace(PLACED_HERE, host_revision=6)),
     Phase.STOPPED, Action.TIDY),
    ("law 10: or by who is to run it, wherever it was placed", Row.REST_TIDY,
     view(wish=replace(PLACED_AWAY, host_revision=6, power=Power.OFF)), Phase.STOPPED, Action.TIDY),
    ("law 10: together with an instance that was removed", Row.REST_TIDY, view(wish=replace(GONE, placed=PLACED_HERE.placed)),
     Phase.STOPPED, Action.TIDY),
    ("law 10: a damaged one lets it run on", Row.RUNS, view(process=running(), lock=seen(locked()), wish=DAMAGED, target=THERE,
     problems=DAMAGED.problems), Phase.RUNNING, None),
    ("law 10: elsewhere, too", Row.RUNS, view(process=running(), lock=seen(locked()), wish=replace(DAMAGED, host=OTHER),
     target=THERE, problems=DAMAGED.problems), Phase.RUNNING, None),
    ("law 10: power off is an order all the same", Row.STOP_ASK, view(process=running(), lock=seen(locked()), problems=DAMAGED.problems,
     wish=replace(DAMAGED, power=Power.OFF)), Phase.STOPPING, Action.POWERDOWN),
    ("law 10: and nothing starts on its ground", Row.REST, view(wish=DAMAGED, problems=DAMAGED.problems, slot=True),
     Phase.INVALID, None),
    ("law 10: what is another's then is left to that", Row.FORGET, view(wish=replace(DAMAGED, host=OTHER), problems=DAMAGED.problems),
     Phase.STOPPED, Action.FORGET),
    ("the button is pressed again, not at once", Row.STOP_ASK, view(process=running(stopping=STOPPED_BY_US), lock=seen(locked()),
     wish=OFF), Phase.STOPPING, None),
    ("between two presses it may have heeded the first", Row.STOP_PROBE, view(process=running(stopping=STOPPED_BY_US,
     probe_at=0.0), lock=seen(locked()), wish=OFF), Phase.STOPPING, Action.PROBE),
    ("so may one that is to start again", Row.STOP_PROBE, view(process=running(stopping=STOPPED_BY_US, probe_at=0.0),
     lock=seen(locked()), wish=replace(WISH, restart_request="r1")), Phase.STOPPING, Action.PROBE),
    ("but repeatedly", Row.STOP_ASK, view(process=running(stopping=STOPPED_BY_US), lock=seen(locked()), wish=OFF,
     now=100.5 + POWERDOWN_EVERY_S), Phase.STOPPING, Action.POWERDOWN),
    ("never force before the timeout", Row.STOP_ASK, view(process=running(stopping=STOPPED_BY_US), lock=seen(locked()), wish=OFF,
     now=169.9, shutdown_timeout_s=120.0), Phase.STOPPING, Action.POWERDOWN),
    ("its supervisor was frozen before it was asked, so it is asked now", Row.STOP_ASK,
     view(process=running(stopping=Stopping(since=50.0)), lock=seen(locked()), wish=OFF, now=170.0), Phase.STOPPING, Action.POWERDOWN),
    ("and it has its time from then on", Row.STOP_ASK, view(process=running(stopping=Stopping(since=50.0, asked_at=169.0,
     pressed_at=169.0)), lock=seen(locked()), wish=OFF, now=170.0), Phase.STOPPING, None),
    ("then QEMU's own end", Row.STOP_FORCE, view(process=running(stopping=STOPPED_BY_US), lock=seen(locked()), wish=OFF, now=170.0),
     Phase.STOPPING, Action.QUIT),
    ("which has its time", Row.STOP_TOLD, view(process=running(stopping=replace(STOPPED_BY_US, quit_at=170.0)), lock=seen(locked()),
     wish=OFF, now=170.0 + QUIT_WAIT_S - 0.1), Phase.STOPPING, None),
    ("then SIGKILL", Row.STOP_TOLD, view(process=running(stopping=replace(STOPPED_BY_US, quit_at=170.0)), lock=seen(locked()),
     wish=OFF, now=170.0 + QUIT_WAIT_S), Phase.STOPPING, Action.KILL),
    ("a power-off is a power-off, though QEMU lives on", Row.OFF_FINISH, view(process=running(run_state="shutdown"), lock=seen(locked())),
     Phase.STOPPING, Action.FINISH),
    ("whatever the wish", Row.OFF_FINISH, view(process=running(run_state="shutdown", stopping=STOPPED_BY_US), lock=seen(locked()),
     wish=OFF), Phase.STOPPING, Action.FINISH),
    ("its keys read or not", Row.OFF_FINISH, view(process=running(run_state="shutdown"), lock=LockView(), wish=None), Phase.STOPPING,
     Action.FINISH),
    ("before it is put under guard", Row.OFF_FINISH, view(process=running(run_state="shutdown"), lock=seen(locked()), guarded=False),
     Phase.STOPPING, Action.FINISH),
    ("QEMU has its time for it", Row.OFF_TOLD, view(process=running(run_state="shutdown", stopping=Stopping(since=100.0, quit_at=100.0)),
     lock=seen(locked())), Phase.STOPPING, None),
    ("then SIGKILL, connected or not", Row.OFF_TOLD, view(process=running(run_state="shutdown", connected=False,
     stopping=Stopping(since=100.0, quit_at=100.0)), lock=seen(locked()), now=100.0 + QUIT_WAIT_S), Phase.STOPPING,
     Action.KILL),
    ("one that does not answer may have been let go on", Row.RUNS_CONNECT, view(process=running(run_state="shutdown", connected=False),
     lock=seen(locked())), Phase.RUNNING, Action.CONNECT),
    ("a guest that a person has paused is left alone", Row.RUNS, view(process=running(run_state="paused"), lock=seen(locked())),
     Phase.RUNNING, None),
    ("so is one that a disk has failed", Row.RUNS, view(process=running(run_state="io-error"), lock=seen(locked())), Phase.RUNNING,
     None),
    ("a silent QEMU is connected to, to press it", Row.STOP_CONNECT, view(process=running(connected=False),
     lock=seen(locked()), wish=OFF), Phase.STOPPING, Action.CONNECT),
    ("a silent QEMU goes down the ladder too", Row.STOP_FORCE, view(process=running(connected=False, connect_at=1e9,
     stopping=STOPPED_BY_US), lock=seen(locked()), wish=OFF, now=170.0), Phase.STOPPING, Action.QUIT),
    ("a restart request stops first", Row.STOP_ASK, view(process=running(), lock=seen(locked()),
     wish=replace(WISH, restart_request="r1")), Phase.STOPPING, Action.POWERDOWN),
    ("one that was heeded does not", Row.RUNS, view(process=running(incarnation=record(request="r1")), lock=seen(locked()),
     wish=replace(WISH, restart_request="r1")), Phase.RUNNING, None),
    ("who leaves begins with the button, whatever the wish", Row.STOP_ASK, view(process=running(), lock=seen(locked()),
     leaving="told to"), Phase.STOPPING, Action.POWERDOWN),
    ("also before the keys were read", Row.STOP_ASK, view(process=running(), lock=LockView(), wish=None, leaving="told to"),
     Phase.STOPPING, Action.POWERDOWN),
    ("and kills what never ran", Row.PAUSED_UNWANTED, view(process=paused(), lock=seen(locked()), leaving="told to"), Phase.STOPPING,
     Action.KILL),
    ("releases", Row.REST_RELEASE, view(lock=seen(locked()), leaving="told to"), Phase.STOPPED, Action.RELEASE),
    ("and is done with it", Row.FORGET, view(leaving="told to"), Phase.STOPPED, Action.FORGET),
    ("also while another has the lock", Row.FORGET, view(lock=seen(locked(host=OTHER, name="y")), leaving="told to"), Phase.STOPPED,
     Action.FORGET),
    ("changed keys are pending, not applied", Row.RUNS, view(process=running(), lock=seen(locked()),
     wish=replace(WISH, spec=Spec(ram_mib=128))), Phase.RUNNING, None),
    ("law 3: a new QEMU is connected to", Row.PAUSED_CONNECT, view(process=paused(connected=False), lock=seen(locked(state=LockState.STARTING, pid=None))),
     Phase.STARTING, Action.CONNECT),
    ("law 3: then put on record", Row.RECORD, view(process=paused(), lock=seen(locked(state=LockState.STARTING, pid=None))),
     Phase.STARTING, Action.RECORD),
    ("law 3: only then it continues", Row.CONTINUE, view(process=paused(), lock=seen(locked())), Phase.STARTING, Action.CONTINUE),
    ("law 3: not on another's record", Row.RECORD, view(process=paused(), lock=seen(locked(pid=43))), Phase.STARTING, Action.RECORD),
    ("law 3: nor on one that was written again without its clients", Row.RECORD,
     view(process=paused(incarnation=record(spec=SPEC_WITH_IMAGE), spec=SPEC_WITH_IMAGE), lock=seen(locked()), wish=WITH_IMAGE),
     Phase.STARTING, Action.RECORD),
    ("law 3: but on one that has them", Row.CONTINUE,
     view(process=paused(incarnation=record(spec=SPEC_WITH_IMAGE), spec=SPEC_WITH_IMAGE),
          lock=seen(replace(locked(), clients=("192.0.2.1:0/1",))), wish=WITH_IMAGE), Phase.STARTING, Action.CONTINUE),
    ("law 3: nor while the lock is unknown", Row.PAUSED_LOCKLESS, view(process=paused(), lock=LockView()), Phase.WAITING, None),
    ("law 2: nor without a session", Row.RECORD, view(process=paused(), lock=seen(locked(state=LockState.STARTING, pid=None)),
     session_held=False), Phase.WAITING, None),
    ("a new guest waits until its keys are quiet", Row.PAUSED_UNQUIET, view(process=paused(), lock=seen(locked()), quiet_at=101.5),
     Phase.STARTING, None),
    ("keys that change before it ran start it anew", Row.PAUSED_CHANGED, view(process=paused(), lock=seen(locked()),
     wish=replace(WISH, spec=Spec(ram_mib=128))), Phase.STARTING, Action.KILL),
    ("what waits for another instance's image holds nothing", Row.PAUSED_RIVAL, view(process=paused(),
     lock=seen(locked()), rival="2 has it"), Phase.WAITING, Action.KILL),
    ("a stop before it ran kills", Row.PAUSED_UNWANTED, view(process=paused(), lock=seen(locked()), wish=OFF), Phase.STOPPING, Action.KILL),
    ("a held removal keeps it paused", Row.PAUSED_KEEP, view(process=paused(), lock=seen(locked()), wish=GONE, held=True),
     Phase.STARTING, None),
    ("a QEMU that never answers is given up", Row.PAUSED_SILENT, view(process=paused(connected=False, connect_at=1e9),
     lock=seen(locked(state=LockState.STARTING, pid=None)), now=160.0), Phase.STARTING, Action.GIVE_UP),
    ("law 11: who began anew with the same epoch, and has not run, is no takeover", Row.REWRITE,
     view(process=running(), lock=seen(locked(host=OTHER, name="y", state=LockState.STARTING, pid=None)), holder_has_session=True),
     Phase.RUNNING, Action.REASSERT),
    ("but who runs with it by a greater name is one", Row.LOCK_LOST,
     view(process=running(), lock=seen(locked(host=OTHER, name="y")), holder_has_session=True), Phase.STOPPING, Action.KILL),
    ("law 11: a lock that its own host wrote is older in another history", Row.REWRITE,
     view(process=running(), lock=seen(replace(locked(name="y"), epoch=5, history="h")), era=RESTORED), Phase.RUNNING, Action.REASSERT),
    ("law 7: but not one that a person broke since", Row.LOCK_BROKEN,
     view(process=running(), lock=seen(replace(locked(state=LockState.BROKEN), history="h")), era=RESTORED), Phase.STOPPING, Action.KILL),
    ("a free lock needs a slot", Row.QUEUE, view(), Phase.WAITING, Action.QUEUE),
    ("and its turn", Row.TURN, view(slot=False), Phase.WAITING, None),
    ("then it is taken", Row.TAKE, view(slot=True), Phase.STARTING, Action.TAKE),
    ("so is one that a dead incarnation left", Row.TAKE, view(slot=True, lock=seen(locked())), Phase.STARTING, Action.TAKE),
    ("unless that incarnation lives without its records", Row.HELD_OVER, view(slot=True, lock=seen(locked()), holdover=Holdover(pid=42, starttime=9)),
     Phase.WAITING, None),
    ("also when somebody deletes its lock", Row.HELD_OVER, view(slot=True, holdover=Holdover(pid=42, starttime=9)), Phase.WAITING, None),
    ("law 2: not without a session", Row.TAKE, view(slot=True, session_held=False), Phase.WAITING, None),
    ("nor right after etcd failed", Row.TAKE, view(slot=True, etcd_at=102.0, etcd_trouble="no"), Phase.WAITING, None),
    ("law 12: a holder whose session is elsewhere is not known to be gone", Row.HELD_UNSEEN,
     view(lock=seen(replace(locked(host=OTHER, name="y"), facts="/other")), holder_has_session=False), Phase.WAITING, None),
    ("law 12: also where its disks could be fenced", Row.HELD_UNSEEN,
     view(lock=seen(replace(ON_RBD, facts="/other")), holder_has_session=False, deferral=WAITED, slot=True), Phase.WAITING, None),
    ("a stranger's lock is waited for", Row.HELD, view(lock=seen(locked(host=OTHER, name="y")), holder_has_session=True), Phase.WAITING, None),
    ("also when nobody knows of a session", Row.HELD, view(lock=seen(locked(host=OTHER, name="y"))), Phase.WAITING, None),
    ("law 7: what has nothing to lose is taken from the dead", Row.TAKE_HARMLESS, view(lock=seen(locked(host=OTHER, name="y")),
     holder_has_session=False, slot=True), Phase.WAITING, Action.TAKE),
    ("law 4: of what has disks, storage is asked first", Row.ASK_WATCHERS, view(lock=seen(ON_RBD), holder_has_session=False, slot=True),
     Phase.WAITING, Action.ASK_WATCHERS),
    ("law 4: not without a session of our own", Row.ASK_WATCHERS, view(lock=seen(ON_RBD), holder_has_session=False, session_held=False),
     Phase.WAITING, None),
    ("law 4: nor while Ceph is away", Row.ASK_WATCHERS, view(lock=seen(ON_RBD), holder_has_session=False, etcd_at=102.0,
     etcd_trouble="Ceph does not answer"), Phase.WAITING, None),
    ("law 4: while its disks are in use it is waited for", Row.ASK_WATCHERS, view(lock=seen(ON_RBD), holder_has_session=False, slot=True,
     deferral=WAITED), Phase.WAITING, None),
    ("law 4: and storage is asked again", Row.ASK_WATCHERS, view(lock=seen(ON_RBD), holder_has_session=False, slot=True, deferral=WAITED,
     now=102.0), Phase.WAITING, Action.ASK_WATCHERS),
    ("law 4: an answer that did not come is not \"nobody\"", Row.ASK_WATCHERS, view(lock=seen(ON_RBD), holder_has_session=False, slot=True,
     deferral=replace(WAITED, watchers=None)), Phase.WAITING, None),
    ("law 4: nor for longer than the wait", Row.TAKE_OVER, view(lock=seen(ON_RBD), holder_has_session=False, slot=True,
     deferral=replace(WAITED, watchers=None), now=160.0), Phase.WAITING, Action.TAKE),
    ("law 4: what nobody uses is taken at once", Row.TAKE_OVER, view(lock=seen(ON_RBD), holder_has_session=False, slot=True,
     deferral=replace(WAITED, watchers=())), Phase.WAITING, Action.TAKE),
    ("law 4: not for ever", Row.TAKE_OVER, view(lock=seen(ON_RBD), holder_has_session=False, slot=True, deferral=WAITED, now=160.0),
     Phase.WAITING, Action.TAKE),
    ("law 4: a holder that is back is waited for", Row.HELD, view(lock=seen(ON_RBD), holder_has_session=True, slot=True,
     deferral=WAITED, now=160.0), Phase.WAITING, None),
    ("law 4: what is not fenced yet is not let go of", Row.REST_FENCE, view(wish=OFF, planned="x",
     lock=seen(locked(state=LockState.FENCING, pid=None))), Phase.STOPPED, Action.FENCE),
    ("law 7: a broken lock is taken", Row.TAKE_BROKEN, view(slot=True, lock=seen(locked(host=OTHER, name="y", state=LockState.BROKEN)),
     holder_has_session=False), Phase.STARTING, Action.TAKE),
    ("law 7: but from nobody who is back", Row.BROKEN_HELD, view(slot=True, lock=seen(locked(host=OTHER, name="y", state=LockState.BROKEN)),
     holder_has_session=True), Phase.WAITING, None),
    ("law 7: nor while nobody knows whether he is", Row.BROKEN_HELD, view(slot=True,
     lock=seen(locked(host=OTHER, name="y", state=LockState.BROKEN))), Phase.WAITING, None),
    ("law 7: our own broken one, too", Row.TAKE_BROKEN, view(slot=True, lock=seen(locked(state=LockState.BROKEN))), Phase.STARTING,
     Action.TAKE),
    ("law 7: or let go of", Row.REST_RELEASE, view(wish=OFF, lock=seen(locked(state=LockState.BROKEN))), Phase.STOPPED, Action.RELEASE),
    ("law 7: another's is left to those who shall run it", Row.FORGET, view(wish=replace(WISH, host=OTHER),
     lock=seen(locked(host=OTHER, name="y", state=LockState.BROKEN))), Phase.STOPPED, Action.FORGET),
    ("law 7: under a QEMU, it kills", Row.LOCK_BROKEN, view(process=running(), lock=seen(locked(state=LockState.BROKEN))), Phase.STOPPING,
     Action.KILL),
    ("law 7: a guest does not run before its guard watches it", Row.PAUSED_GUARD, view(process=paused(), lock=seen(locked()), guarded=False),
     Phase.STARTING, Action.GUARD),
    ("law 7: nor while there is no guard", Row.PAUSED_GUARD, view(process=paused(), lock=seen(locked()), guarded=False, guard_at=102.0,
     guard_trouble="it cannot be started"), Phase.WAITING, None),
    ("law 7: watched, it runs", Row.CONTINUE, view(process=paused(), lock=seen(locked()), guarded=True), Phase.STARTING, Action.CONTINUE),
    ("law 7: what runs is put under guard, etcd or not", Row.RUNS_GUARD, view(process=running(), lock=LockView(), guarded=False,
     session_held=False), Phase.RUNNING, Action.GUARD),
    ("law 7: before it is asked to stop", Row.RUNS_GUARD, view(process=running(stopping=STOPPED_BY_US), lock=seen(locked()), wish=OFF,
     guarded=False), Phase.STOPPING, Action.GUARD),
    ("law 7: not before it is told to end", Row.STOP_FORCE, view(process=running(stopping=replace(STOPPED_BY_US, since=0.0)),
     lock=seen(locked()), wish=OFF, guarded=False, now=121.0), Phase.STOPPING, Action.QUIT),
    ("law 7: nor before it is killed", Row.STOP_TOLD, view(process=running(stopping=Stopping(since=0.0, quit_at=1.0)),
     lock=seen(locked()), wish=OFF, guarded=False), Phase.STOPPING, Action.KILL),
    ("law 7: a lost lock kills, guarded or not", Row.LOCK_LOST, view(process=running(), lock=seen(locked(host=OTHER, name="y")), guarded=False),
     Phase.STOPPING, Action.KILL),
    ("law 7: a missing guard is sought again, and all goes on meanwhile", Row.RUNS_PROBE, view(process=running(probe_at=101.0),
     lock=seen(locked()), guarded=False, guard_at=102.0), Phase.RUNNING, Action.PROBE),
    ("law 7: in time", Row.RUNS, view(process=running(), lock=seen(locked()), guarded=False, guard_at=102.0), Phase.RUNNING, None),
    ("a NIC that has lost its bridge is plugged in again", Row.RUNS_PLUG, view(process=running(plug_at=101.0), lock=seen(locked())),
     Phase.RUNNING, Action.PLUG),
    ("not at once again", Row.RUNS, view(process=running(plug_at=102.0), lock=seen(locked())), Phase.RUNNING, None),
    ("also of what its bad wish lets run on", Row.RUNS_PLUG, view(process=running(plug_at=101.0), lock=seen(locked()), wish=BAD,
     problems=BAD.problems), Phase.RUNNING, Action.PLUG),
    ("room is looked for where a file system is full", Row.RUNS_ROOM, view(process=running(room_at=101.0, run_state="io-error"), lock=seen(locked())), Phase.RUNNING,
     Action.ROOM),
    ("not all the time", Row.RUNS, view(process=running(room_at=102.0, run_state="io-error"), lock=seen(locked())), Phase.RUNNING, None),
    ("a medium is changed where its key names another one", Row.RUNS_MEDIUM,
     view(process=running(spec=WITH_DRIVE), wish=MEDIUM_WANTED, lock=seen(locked())), Phase.RUNNING, Action.MEDIUM),
    ("not at once again where that came to nothing", Row.RUNS,
     view(process=running(spec=WITH_DRIVE, medium_at=102.0), wish=MEDIUM_WANTED, lock=seen(locked())), Phase.RUNNING, None),
    ("not where the machine has no drive", Row.RUNS, view(process=running(), wish=MEDIUM_WANTED, lock=seen(locked())),
     Phase.RUNNING, None),
    ("nor while its keys are bad, or held", Row.RUNS, view(process=running(spec=WITH_DRIVE), wish=BAD, problems=BAD.problems,
     lock=seen(locked())), Phase.RUNNING, None),
    ("nor what waits for a person", Row.RUNS, view(process=running(spec=WITH_DRIVE), wish=MEDIUM_WANTED, held=True,
     lock=seen(locked())), Phase.RUNNING, None),
    ("what QEMU can change is changed", Row.RUNS_CHANGE, view(process=running(spec=GROWING), wish=MORE_CPUS, lock=seen(locked())),
     Phase.RUNNING, Action.CHANGE),
    ("once the keys are quiet", Row.RUNS, view(process=running(spec=GROWING), wish=MORE_CPUS, lock=seen(locked()), quiet_at=102.0),
     Phase.RUNNING, None),
    ("what came to nothing is not tried at once again", Row.RUNS, view(process=running(spec=GROWING, attempts={"cpus": Attempt(at=102.0)}),
     wish=MORE_CPUS, lock=seen(locked())), Phase.RUNNING, None),
    ("not what waits for a restart", Row.RUNS, view(process=running(), wish=MORE_CPUS, lock=seen(locked())), Phase.RUNNING, None),
    ("nor of a guest that stands still", Row.RUNS, view(process=running(spec=GROWING, run_state="paused"), wish=MORE_CPUS,
     lock=seen(locked())), Phase.RUNNING, None),
    ("law 3: nor without a session", Row.RUNS, view(process=running(spec=GROWING), wish=MORE_CPUS, lock=seen(locked()), session_held=False),
     Phase.RUNNING, None),
    ("law 3: nor under a lock that is not its own", Row.RUNS, view(process=running(spec=GROWING), wish=MORE_CPUS,
     lock=seen(locked(host=OTHER)), session_held=False), Phase.RUNNING, None),
    ("law 7: the guard comes first", Row.RUNS, view(process=running(spec=GROWING), wish=MORE_CPUS, lock=seen(locked()), guarded=False,
     guard_at=102.0), Phase.RUNNING, None),
    ("what was cut off is brought to an end first", Row.RUNS_CHANGE, view(process=running(incarnation=replace(record(), going=("disk1",))),
     lock=seen(locked())), Phase.RUNNING, Action.CHANGE),
    ("images are looked at now and then", Row.RUNS_GROW, view(process=running(grow_at=101.0), lock=seen(locked())), Phase.RUNNING,
     Action.GROW),
    ("law 7: nor what cannot be fenced", Row.UNFENCEABLE, view(lock=seen(replace(locked(host=OTHER, name="y"), storage=Storage.UNFENCEABLE)),
     holder_has_session=False, slot=True), Phase.WAITING, None),
    ("an unreadable lock counts as held", Row.UNREADABLE, view(lock=LockView(known=True, data=b"?", as_of=9), slot=True), Phase.WAITING, None),
    ("an unread lock too", Row.UNKNOWN, view(lock=LockView(), slot=True), Phase.WAITING, None),
    ("a deleted lock whose holder says that it runs is not free", Row.CLAIMED, view(claimed_by=OTHER, slot=True), Phase.WAITING,
     Action.LOOK),
    ("law 3: fence before QEMU", Row.FENCE, view(planned="x", lock=seen(locked(state=LockState.FENCING, pid=None))), Phase.WAITING,
     Action.FENCE),
    ("then QEMU", Row.SPAWN, view(planned="x", slot=True, lock=seen(locked(state=LockState.STARTING, pid=None))), Phase.STARTING,
     Action.SPAWN),
    ("after something was missing, in its turn again", Row.QUEUE, view(planned="x",
     lock=seen(locked(state=LockState.STARTING, pid=None))), Phase.WAITING, Action.QUEUE),
    ("what is missing on the host is waited for", Row.OBSTACLE, view(planned="x", slot=True, obstacle="no bridge br0", start_at=102.0,
     lock=seen(locked(state=LockState.STARTING, pid=None))), Phase.WAITING, None),
    ("before the lock is taken, too", Row.OBSTACLE, view(obstacle="no bridge br0", start_at=102.0), Phase.WAITING, None),
    ("another instance's image is waited for", Row.SHARE_ASK, view(rival="2 has it", ask_at=105.0), Phase.WAITING, None),
    ("which is told", Row.SHARE_ASK, view(rival="2 has it", ask_at=105.0, looked=False), Phase.WAITING, Action.LOOK),
    ("asked for", Row.SHARE_ASK, view(rival="2 has it", ask_at=100.0), Phase.WAITING, Action.ASK),
    ("and nothing is held", Row.SHARE_RELEASE, view(rival="2 has it", planned="x", lock=seen(locked(state=LockState.STARTING, pid=None))),
     Phase.WAITING, Action.RELEASE),
    ("but what is to be fenced", Row.SHARE_FENCE, view(rival="2 has it", planned="x", lock=seen(locked(state=LockState.FENCING, pid=None))),
     Phase.WAITING, Action.FENCE),
    ("a long wait is told, so the status key is read before it", Row.OBSTACLE, view(looked=False, obstacle="no server",
     start_at=102.0), Phase.WAITING, Action.LOOK),
    ("but not by who has the lock: it was read before that was taken", Row.OBSTACLE, view(looked=False, planned="x",
     obstacle="no server", start_at=102.0, lock=seen(locked(state=LockState.STARTING, pid=None))), Phase.WAITING, None),
    ("one for memory, too", Row.MEMORY, view(looked=False, slot=False, shortage="it needs more"), Phase.WAITING, Action.LOOK),
    ("one for a slot is short", Row.TURN, view(looked=False, slot=False), Phase.WAITING, None),
    ("and then looked for again, in silence", Row.SPAWN, view(planned="x", slot=True, obstacle="no bridge br0", start_at=100.0,
     lock=seen(locked(state=LockState.STARTING, pid=None))), Phase.WAITING, Action.SPAWN),
    ("in turn", Row.QUEUE, view(obstacle="no bridge br0", start_at=100.0), Phase.WAITING, Action.QUEUE),
    ("media, too", Row.PREPARE, view(prepared=False, obstacle="no server", start_at=100.0), Phase.WAITING, Action.PREPARE),
    ("in the line for memory that is the reason", Row.MEMORY, view(slot=False, shortage="it needs more", obstacle="no bridge br0",
     start_at=100.0), Phase.WAITING, None),
    ("media are made before the lock is taken, without a slot", Row.PREPARE, view(prepared=False), Phase.STARTING, Action.PREPARE),
    ("and again after a start that failed", Row.PREPARE, view(prepared=False, planned="x", slot=True,
     lock=seen(locked(state=LockState.STARTING, pid=None))), Phase.STARTING, Action.PREPARE),
    ("and again after something was missing", Row.PREPARE, view(prepared=False, obstacle="no image", start_at=100.0), Phase.WAITING,
     Action.PREPARE),
    ("but not while a stranger holds the lock", Row.HELD, view(prepared=False, lock=seen(locked(host=OTHER, name="y"))), Phase.WAITING, None),
    ("law 11: in another history others are waited for", Row.HISTORY, view(slot=True, era=AWAITED), Phase.WAITING, None),
    ("law 11: that is told, so the status key is read before it", Row.HISTORY, view(looked=False, era=AWAITED), Phase.WAITING, Action.LOOK),
    ("law 11: once etcd answers", Row.HISTORY, view(looked=False, era=AWAITED, session_held=False), Phase.WAITING, None),
    ("law 11: what storage can fence for a while", Row.TAKE, view(slot=True, era=AWAITED, now=150.0), Phase.STARTING,
     Action.TAKE),
    ("law 11: after a change of history storage is asked who runs it", Row.DOUBT,
     view(lock=seen(ON_RBD), holder_has_session=False, wish=WITH_IMAGE, slot=True, era=RESTORED), Phase.WAITING,
     Action.ASK_WATCHERS),
    ("law 11: while somebody does, nobody is fenced, however long", Row.DOUBTED,
     view(lock=seen(ON_RBD), holder_has_session=False, wish=WITH_IMAGE, slot=True, era=RESTORED, deferral=replace(WAITED, ask_at=2e4),
     now=1e4), Phase.WAITING, None),
    ("law 11: nor where the lock names this host, or nobody", Row.DOUBTED,
     view(lock=seen(locked(name="y")), holder_has_session=True, wish=WITH_IMAGE, slot=True, era=RESTORED, deferral=WAITED),
     Phase.WAITING, None),
    ("law 11: that wait is told, so the status key is read first", Row.DOUBTED, view(looked=False, wish=WITH_IMAGE, slot=True,
     era=RESTORED, deferral=WAITED), Phase.WAITING, Action.LOOK),
    ("law 11: nor one whose lock was broken before that", Row.DOUBTED,
     view(lock=seen(replace(ON_RBD, state=LockState.BROKEN)), holder_has_session=False, wish=WITH_IMAGE, slot=True, era=RESTORED,
     deferral=WAITED), Phase.WAITING, None),
    ("law 11: a lock that was broken since is taken", Row.TAKE_BROKEN,
     view(lock=seen(replace(ON_RBD, state=LockState.BROKEN, history="h")), holder_has_session=False, wish=WITH_IMAGE, slot=True,
     era=RESTORED, deferral=WAITED), Phase.STARTING, Action.TAKE),
    ("law 11: once nobody does, it is taken", Row.TAKE_OVER, view(lock=seen(ON_RBD), holder_has_session=False, wish=WITH_IMAGE,
     slot=True, era=RESTORED, deferral=UNWATCHED), Phase.WAITING, Action.TAKE),
    ("law 11: not by an answer from before it stood in line", Row.DOUBT, view(lock=seen(ON_RBD), holder_has_session=False,
     wish=WITH_IMAGE, slot=True, era=RESTORED, deferral=UNWATCHED, now=102.0), Phase.WAITING, Action.ASK_WATCHERS),
    ("law 11: what was written since is taken over as always", Row.TAKE_OVER,
     view(lock=seen(replace(ON_RBD, history="h")), holder_has_session=False, wish=WITH_IMAGE, slot=True, era=RESTORED,
     deferral=WAITED, now=160.0), Phase.WAITING, Action.TAKE),
    ("law 11: what was made since, too", Row.TAKE, view(wish=replace(WITH_IMAGE, revision=10), slot=True, era=RESTORED),
     Phase.STARTING, Action.TAKE),
    ("law 11: a living QEMU's lock of a former history is written anew", Row.RENAME, view(process=running(), lock=seen(locked()),
     era=RESTORED), Phase.RUNNING, Action.RENAME),
    ("law 11: once", Row.RUNS, view(process=running(), lock=seen(replace(locked(), history="h")), era=RESTORED), Phase.RUNNING, None),
    ("too early is backoff", Row.BACKOFF, view(saved=InstanceState(boot_id=BOOT, not_before=105.0, last_exit="crashed (signal 9)")),
     Phase.BACKOFF, None),
    ("that is told, after a change of history, too", Row.BACKOFF, view(looked=False, saved=InstanceState(boot_id=BOOT, not_before=105.0,
     last_exit="crashed (signal 9)")), Phase.BACKOFF, Action.LOOK),
    ("law 9: a stop releases the lock", Row.REST_RELEASE, view(wish=OFF, lock=seen(locked())), Phase.STOPPED, Action.RELEASE),
    ("off and free is stopped", Row.REST, view(wish=OFF), Phase.STOPPED, None),
    ("what another host wrote is read before it is written over", Row.REST_LOOK, view(wish=OFF, looked=False),
     Phase.STOPPED, Action.LOOK),
    ("removed and free is forgotten", Row.FORGET, view(wish=GONE), Phase.STOPPED, Action.FORGET),
    ("moved and free is forgotten", Row.FORGET, view(wish=replace(WISH, host=OTHER)), Phase.STOPPED, Action.FORGET),
    ("moved, and the stranger has it, is forgotten", Row.FORGET, view(wish=replace(WISH, host=OTHER), lock=seen(locked(host=OTHER, name="y"))),
     Phase.STOPPED, Action.FORGET),
    ("nothing is forgotten before the lock was read", Row.REST_UNKNOWN, view(wish=GONE, lock=LockView()), Phase.STOPPED, None),
    ("a bad wish does not start", Row.REST, view(wish=BAD, problems=BAD.problems), Phase.INVALID, None),
    ("and holds no lock", Row.REST_RELEASE, view(wish=BAD, problems=BAD.problems, lock=seen(locked())), Phase.INVALID, Action.RELEASE),
    ("what this host lacks is a problem too", Row.REST, view(problems=(Problem("bridge", "nothing", "a bridge"),)), Phase.INVALID, None),
    ("restart=never leaves what ended", Row.REST, view(wish=replace(WISH, restart=RestartPolicy.NEVER),
     saved=InstanceState(boot_id=BOOT, ended=ENDED)), Phase.STOPPED, None),
    ("a new order starts it", Row.QUEUE, view(wish=replace(WISH, restart=RestartPolicy.NEVER, power_revision=8),
     saved=InstanceState(boot_id=BOOT, ended=ENDED)), Phase.WAITING, Action.QUEUE),
    ("so does another policy", Row.QUEUE, view(saved=InstanceState(boot_id=BOOT, ended=ENDED)), Phase.WAITING, Action.QUEUE),
    ("unread keys start nothing", Row.REST_UNREAD, view(wish=None), Phase.WAITING, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "case", "phase", "action"), [case[1:] for case in TABLE], ids=[case[0] for case in TABLE]
)
def test_row(row: Row, case: View, phase: Phase, action: Action | None) -> None:
    """Each row of the decision's table, and its neighbours."""
    decision = decide(case)
    assert (decision.row, decision.phase, decision.action) == (row, phase, action), decision.reason
    assert decision.reason


@pytest.mark.parametrize("case", [case[2] for case in TABLE], ids=[case[0] for case in TABLE])
def test_a_wait_for_time_has_an_alarm_in_the_future(case: View) -> None:
    """A decision without an action never spins: its alarm lies ahead, or it waits to be told."""
    decision = decide(case)
    if decision.action is None and decision.wake_at is not None:
        assert decision.wake_at > case.now


# --- cut off at every step ------------------------------------------------------------------------------------


class Died(Exception):
    """The supervisor was killed."""


@dataclass
class Qemu:
    incarnation: str
    pid: int
    ran: bool = False
    end: Exit | None = None

    @property
    def address(self) -> str:
        """Of its storage client."""
        return f"192.0.2.1:0/{self.pid}"


@dataclass
class World:
    """What outlives a supervisor. Each change that a crash may follow is one `step`."""

    wish: Wish
    die_after: set[int] = field(default_factory=set)
    deaf: bool = False
    lock: Lock | None = None
    revision: int = 10
    qemus: list[Qemu] = field(default_factory=list)
    disk_record: Incarnation | None = None
    disk_saved: InstanceState = field(default_factory=lambda: InstanceState(boot_id=BOOT))
    status_epoch: int = 0
    now: float = 1000.0
    steps: int = 0
    names: Iterator[int] = field(default_factory=itertools.count)
    epochs: list[int] = field(default_factory=list)
    storage: Storage = Storage.NONE
    elsewhere: set[str] = field(default_factory=set)
    watched: bool = False
    fenced: set[str] = field(default_factory=set)
    guard: set[str] | None = None

    def step(self, change: Callable[[], object]) -> None:
        change()
        self.check()
        self.steps += 1
        if self.steps in self.die_after:
            raise Died

    def check(self) -> None:
        """What must be true at every instant."""
        alive = [qemu for qemu in self.qemus if qemu.end is None]
        assert len(alive) <= 1, "two processes of one instance"
        for qemu in alive:
            if qemu.ran:
                assert self.lock is not None, "a guest runs without a lock"
                assert (self.lock.incarnation, self.lock.pid) == (qemu.incarnation, qemu.pid), "law 3"
                if self.storage is Storage.RBD:
                    assert self.lock.clients == (qemu.address,), "law 3"
                assert self.guard is None or qemu.incarnation in self.guard, "law 7"
                assert self.elsewhere <= self.fenced, "law 4"
                crashed = {q.address for q in self.qemus if q.end is not None and q.end.kind is ExitClass.CRASHED}
                assert self.storage is Storage.NONE or crashed <= self.fenced, "law 4"
        assert self.epochs == sorted(set(self.epochs)), "epochs grow by incarnation"

    @property
    def alive(self) -> Qemu | None:
        return next((qemu for qemu in self.qemus if qemu.end is None), None)


class Supervisor:
    """Acts as `instance/worker.py` and `machine/machine.py` do, on the model world; all its fields are lost when it dies."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.planned: str | None = None
        self.stopping: Stopping | None = None
        self.asked = False
        self.connected = False
        self.run_state: str | None = None
        self.prepared = False
        self.deferral: Deferral | None = None
        self.record = world.disk_record
        self.saved = world.disk_saved
        self.qemu: Qemu | None = None
        self.end: Exit | None = None
        if self.record is not None:
            # Adoption (law 8): by pid, or by the environment when no pid is on record.
            self.qemu = next((q for q in world.qemus if q.incarnation == self.record.incarnation), None)
            self.end = Exit(ExitClass.UNKNOWN, "gone") if self.qemu is None else self.qemu.end
            if self.qemu is None:
                self.asked = True
            elif self.record.pid is None:
                self.record = replace(self.record, pid=self.qemu.pid, starttime=9)

    def observe(self) -> View:
        process = None
        if self.record is not None:
            end = self.end or (self.qemu.end if self.qemu else None)
            process = Process(
                incarnation=self.record, spec=SPEC, exit=end, connected=self.connected, run_state=self.run_state,
                probe_at=self.world.now + PROBE_EVERY_S, stopping=self.stopping, asked=self.asked,
            )  # fmt: skip
        world = self.world
        holdover = None
        if process is None and world.lock is not None and world.alive is not None:
            holdover = Holdover(pid=world.alive.pid, starttime=9)
        data = None if world.lock is None else world.lock.to_json()
        return View(
            now=world.now, me=ME, facts="/kvmsupervisor", boot_id=BOOT, wish=world.wish, planned=self.planned, process=process,
            lock=LockView(known=True, data=data, mod_revision=world.revision, as_of=world.revision),
            holder_has_session=False, target=THERE, guarded=self.guarded(), deferral=self.deferral, saved=self.saved, slot=True, prepared=self.prepared, holdover=holdover, shutdown_timeout_s=20.0,
        )  # fmt: skip

    def guarded(self) -> bool | None:
        if self.world.guard is None or self.record is None:
            return None
        return self.record.incarnation in self.world.guard

    def act(self, action: Action) -> None:  # noqa: C901, PLR0912 - one branch per action
        world = self.world
        match action:
            case Action.PREPARE:
                world.step(lambda: setattr(self, "prepared", True))
            case Action.ASK_WATCHERS:
                until = self.deferral.until if self.deferral else world.now + 60.0
                watchers = tuple(sorted(world.elsewhere)) if world.watched else ()
                self.deferral = Deferral(until=until, told="", ask_at=world.now + 2.0, watchers=watchers)
            case Action.TAKE:
                self.planned = f"i{next(world.names)}"
                lock = take(world.lock, host=ME, boot_id=BOOT, facts="/kvmsupervisor", incarnation=self.planned, storage=world.storage,
                            epoch_floor=world.status_epoch)  # fmt: skip
                world.step(lambda: self.write(lock))
            case Action.FENCE:
                assert world.lock is not None
                users = [*world.elsewhere] if world.lock.taken_from is not None else []
                for address in (*world.lock.fence, *users):
                    world.step(lambda shut_out=address: world.fenced.add(shut_out))  # type: ignore[misc]
                fenced = world.lock.fenced(dict.fromkeys((*world.lock.fence, *users)))
                world.step(lambda: self.write(fenced))
            case Action.SPAWN:
                self.spawn()
            case Action.CONNECT:
                assert self.qemu is not None
                self.connected = True
                self.run_state = "running" if self.qemu.ran else NEVER_RAN
            case Action.RECORD:
                assert world.lock is not None
                assert self.qemu is not None
                recorded = world.lock.recorded(pid=self.qemu.pid, starttime=9, clients=self.clients())
                world.step(lambda: self.write(recorded))
            case Action.GUARD:
                assert world.guard is not None
                assert self.qemu is not None
                watched = world.guard | {self.qemu.incarnation}
                world.step(lambda: setattr(world, "guard", watched))
            case Action.CONTINUE:
                assert self.qemu is not None
                qemu = self.qemu
                world.step(lambda: setattr(qemu, "ran", True))
                self.run_state = "running"
            case Action.POWERDOWN:
                begun = self.stopping or Stopping(since=world.now)
                asked_at = world.now if begun.asked_at is None else begun.asked_at
                self.stopping = replace(begun, asked_at=asked_at, pressed_at=world.now)
                self.asked = True
                if not world.deaf:
                    self.ends(ExitClass.GUEST_SHUTDOWN)
            case Action.QUIT:
                self.stopping = replace(self.stopping or Stopping(since=world.now), quit_at=world.now)
                self.asked = True
                self.ends(ExitClass.HOST_QUIT)
            case Action.KILL:
                self.asked = True
                self.ends(ExitClass.HOST_SIGNAL)
            case Action.REASSERT:
                assert self.record is not None
                lock = locked(name=self.record.incarnation, pid=self.record.pid)
                world.step(lambda: self.write(replace(lock, epoch=self.record.epoch if self.record else 0)))
            case Action.READ:
                raise AssertionError("all that is left can be read here")
            case Action.RENAME:
                assert world.lock is not None
                renamed = replace(world.lock, host=ME)
                world.step(lambda: self.write(renamed))
            case Action.RECORD_EXIT:
                self.record_exit()
            case Action.RELEASE:
                assert world.alive is None, "law 9"
                epoch = world.lock.epoch if world.lock else 0
                world.step(lambda: self.write(None, epoch))
                self.planned = None
            case (
                Action.GIVE_UP
                | Action.PROBE
                | Action.GROW
                | Action.ROOM
                | Action.MEDIUM
                | Action.SNAPSHOT
                | Action.CHANGE
                | Action.PLUG
                | Action.FINISH
                | Action.QUEUE
                | Action.LOOK
                | Action.ASK
                | Action.TIDY
                | Action.RESET
                | Action.FORGET
                | Action.OFFER
                | Action.RECEIVE
                | Action.TELL
                | Action.CALL
                | Action.ANNOUNCE
                | Action.SEND
                | Action.CANCEL
                | Action.SWITCH
                | Action.CUT
                | Action.GIVE
                | Action.CALL_OFF
                | Action.GO_BACK
                | Action.ARRIVE
                | Action.SETTLE
                | Action.VOUCH
            ):
                raise AssertionError(action)
            case _:
                assert_never(action)

    def write(self, lock: Lock | None, last_epoch: int = 0) -> None:
        world = self.world
        world.lock, world.revision = lock, world.revision + 1
        if lock is None:
            world.status_epoch = last_epoch
        elif lock.epoch not in world.epochs:
            world.epochs.append(lock.epoch)

    def clients(self) -> tuple[str, ...]:
        assert self.qemu is not None
        return () if self.world.storage is Storage.NONE else (self.qemu.address,)

    def spawn(self) -> None:
        world = self.world
        assert world.lock is not None
        fresh = replace(record(name=world.lock.incarnation, epoch=world.lock.epoch), spawned_at=world.now,
                        pid=None, starttime=None, restart_request=world.wish.restart_request)  # fmt: skip
        world.step(lambda: setattr(world, "disk_record", fresh))
        qemu = Qemu(fresh.incarnation, pid=1000 + len(world.qemus))
        world.step(lambda: world.qemus.append(qemu))
        self.record = replace(fresh, pid=qemu.pid, starttime=9)
        world.step(lambda: setattr(world, "disk_record", self.record))
        self.qemu, self.planned, self.run_state, self.prepared = qemu, None, NEVER_RAN, False

    def ends(self, kind: ExitClass) -> None:
        qemu = self.qemu
        assert qemu is not None
        self.world.step(lambda: setattr(qemu, "end", Exit(kind, kind.value)))

    def record_exit(self) -> None:
        world = self.world
        end = self.end or (self.qemu.end if self.qemu else None)
        assert end is not None
        assert self.record is not None
        self.saved = after(
            self.saved,
            end,
            world.wish,
            asked=self.asked,
            ran=True,
            spawned_at=self.record.spawned_at,
            now=world.now,
            jitter=0.5,
        )
        world.step(lambda: setattr(world, "disk_memory", self.saved))
        world.step(lambda: setattr(world, "disk_record", None))
        self.record = self.qemu = self.end = self.stopping = self.run_state = None
        self.asked = self.connected = False


def live(world: World, *, decisions: int = 200) -> None:
    """Run supervisors, one after the other, until nothing is left to do."""
    supervisor = Supervisor(world)
    for _ in range(decisions):
        decision = decide(supervisor.observe())
        if decision.phase is not Phase.STOPPING:
            supervisor.stopping = None
        if decision.action is None:
            if decision.phase in {Phase.RUNNING, Phase.STOPPED, Phase.INVALID}:
                return
            assert decision.wake_at is not None, decision
            world.now = decision.wake_at
        elif decision.action is Action.FORGET:
            return
        else:
            try:
                supervisor.act(decision.action)
            except Died:
                supervisor = Supervisor(world)
    raise AssertionError(f"no rest after {decisions} decisions: {decision}")


def started(world: World) -> None:
    live(world)
    assert world.alive is not None
    assert world.alive.ran
    assert world.lock is not None
    assert world.lock.state is LockState.RUNNING


def ended(world: World) -> None:
    live(world)
    assert world.alive is None
    assert world.lock is None
    assert world.disk_record is None


def start_then(change: Callable[[World], None], expect: Callable[[World], None]) -> Callable[[World], None]:
    def scenario(world: World) -> None:
        started(world)
        change(world)
        expect(world)

    return scenario


def wishes(wish: Wish) -> Callable[[World], None]:
    return lambda world: setattr(world, "wish", wish)


def crash(world: World) -> None:
    assert world.alive is not None
    world.alive.end = Exit(ExitClass.CRASHED, "crashed (signal 9)")


def crash_while_off(world: World) -> None:
    crash(world)
    world.wish = OFF


def delete_everything(world: World) -> None:
    world.wish, world.lock, world.revision = GONE, None, world.revision + 1


def lose_the_lock(world: World) -> None:
    world.lock, world.revision = None, world.revision + 1


def rename_the_host(world: World) -> None:
    """What runs was started under another name of this host."""
    assert world.lock is not None
    world.lock, world.revision = replace(world.lock, host=OTHER), world.revision + 1


def bears_our_name(world: World) -> None:
    before = world.alive
    started(world)
    assert world.alive is before
    assert world.lock is not None
    assert world.lock.host == ME


SCENARIOS: dict[str, Callable[[World], None]] = {
    "start": started,
    "start, power off": start_then(wishes(OFF), ended),
    "start, remove": start_then(wishes(GONE), ended),
    "start, move away": start_then(wishes(replace(WISH, host=OTHER, host_revision=9)), ended),
    "start, bad keys": start_then(wishes(BAD), live),
    "start, restart": start_then(wishes(replace(WISH, restart_request="r")), started),
    "start, crash": start_then(crash, started),
    "start, another name": start_then(rename_the_host, bears_our_name),
}
ON_CEPH: dict[str, Callable[[World], None]] = {
    "start, crash": start_then(crash, started),
    "start, crash, power off": start_then(crash_while_off, ended),
    "take over, still in use": started,
    "take over, then power off": start_then(wishes(OFF), ended),
}
UNGUARDED = {
    # Between the deletion and our writing it again nobody holds the lock, so the world's check does not apply.
    "start, delete with the lock": start_then(delete_everything, ended),
    "start, delete the lock": start_then(lose_the_lock, started),
}


def cuts(scenario: Callable[[World], None], times: int, **options: bool) -> Iterator[tuple[int, ...]]:
    """Run the scenario with `times` deaths, at every combination of steps; yield each that was survived."""
    whole = World(wish=WISH, **options)  # type: ignore[arg-type]
    scenario(whole)
    for died in itertools.combinations(range(1, whole.steps + 3), times):
        scenario(World(wish=WISH, die_after=set(died), **options))  # type: ignore[arg-type]
        yield died


@pytest.mark.parametrize("deaths", [1, 2])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_supervisor_may_die_after_any_step(name: str, deaths: int) -> None:
    """Whatever step a supervisor dies after, and its successor too, the wish comes true.

    No guest ever runs without a lock that names its process, no instance ever has two processes, and the lock goes only
    after the process (laws 3, 8, 9).
    """
    assert sum(1 for _ in cuts(SCENARIOS[name], deaths)) >= (8 if deaths == 1 else 25)


@pytest.mark.parametrize("deaths", [1])
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_guest_runs_that_its_guard_does_not_watch(name: str, deaths: int) -> None:
    """Law 7: whatever step a supervisor dies after, what storage cannot fence runs under guard or not at all."""

    def make(died: tuple[int, ...]) -> World:
        return World(wish=WISH, guard=set(), die_after=set(died))

    whole = make(())
    SCENARIOS[name](whole)
    for died in itertools.combinations(range(1, whole.steps + 3), deaths):
        world = make(died)
        SCENARIOS[name](world)
        assert world.guard


def test_what_is_said_of_a_machine_without_its_guard() -> None:
    """People are told that nobody watches it, and why; and what becomes of a watched one without etcd."""
    lost = view(process=running(), lock=seen(locked()), guarded=False, guard_at=102.0, guard_trouble="no such program")
    assert decide(lost).reason == "no guard watches it: no such program"
    assert decide(lost).wake_at == 102.0
    away = replace(lost, guarded=True, session_held=False)
    assert "its guard kills it once the time of this host's session is up" in decide(away).reason
    assert "it runs on" in decide(replace(away, guarded=None)).reason


def taken_over(**options: object) -> World:
    """A world in which another host holds the lock and has no session; two QEMUs may write there, one not on record."""
    lock = replace(ON_RBD, epoch=7, fence=("192.0.2.1:0/7",))
    elsewhere = {"192.0.2.1:0/1", "192.0.2.1:0/2", "192.0.2.1:0/7"}
    return World(wish=WISH, storage=Storage.RBD, lock=lock, elsewhere=elsewhere, watched=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("deaths", [1, 2])
@pytest.mark.parametrize("name", ON_CEPH)
def test_a_taker_may_die_after_any_step(name: str, deaths: int) -> None:
    """Law 4: whatever step a taker dies after, and its successor too, each address is fenced before a guest runs.

    Both those on record and those that storage alone names; a QEMU of our own that crashed is fenced likewise.
    """
    scenario = ON_CEPH[name]

    def make(died: tuple[int, ...]) -> World:
        if "take over" in name:
            return taken_over(die_after=set(died))
        return World(wish=WISH, storage=Storage.RBD, die_after=set(died))

    whole = make(())
    scenario(whole)
    survived = 0
    for died in itertools.combinations(range(1, whole.steps + 3), deaths):
        scenario(make(died))
        survived += 1
    assert survived >= (8 if deaths == 1 else 25)


def test_a_lock_that_is_not_fenced_is_never_let_go_of() -> None:
    """Law 4: a taker whose wish changes before it has fenced does that first: the next holder finds nothing to fence."""
    world = taken_over()
    supervisor = Supervisor(world)
    world.now += 100.0
    supervisor.act(Action.ASK_WATCHERS)
    supervisor.act(Action.TAKE)
    world.wish = GONE
    ended(world)
    assert world.elsewhere - {"192.0.2.1:0/2"} <= world.fenced


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_deaf_guest_is_forced_whoever_dies(deaths: int) -> None:
    """A guest that ignores the power button ends by force, also when supervisors die meanwhile."""
    assert sum(1 for _ in cuts(SCENARIOS["start, power off"], deaths, deaf=True)) > 8


@pytest.mark.parametrize("name", UNGUARDED)
def test_a_deleted_lock_is_mended_whoever_dies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that an operator deletes under a living QEMU comes back, at whatever step supervisors die."""
    monkeypatch.setattr(World, "check", lambda self: None)
    assert sum(1 for _ in cuts(UNGUARDED[name], 1)) > 8


def test_the_model_notices_a_guest_without_a_record() -> None:
    """The cuts can fail: a supervisor that continues before the record is caught."""
    world = World(wish=WISH)
    supervisor = Supervisor(world)
    supervisor.act(Action.TAKE)
    supervisor.act(Action.SPAWN)
    with pytest.raises(AssertionError, match="law 3"):
        supervisor.act(Action.CONTINUE)


def test_claims() -> None:
    """What a lock means: free, mine, mine under another name, an earlier one of mine, a stranger's, broken, unreadable, unread."""
    claims = {
        Claim.UNKNOWN: LockView(),
        Claim.ABSENT: seen(None),
        Claim.MINE: seen(locked()),
        Claim.RENAMED: seen(locked(host=OTHER)),
        Claim.LEFTOVER: seen(locked(name="y")),
        Claim.STRANGER: seen(locked(host=OTHER, name="y")),
        Claim.BROKEN: seen(locked(state=LockState.BROKEN)),
        Claim.UNREADABLE: LockView(known=True, data=b'{"version":1}', as_of=1),
        Claim.NEWER: LockView(known=True, data=b'{"version":9}', as_of=1),
    }
    meant = {
        claim: found.claim(host=ME, boot_id=BOOT, facts="/kvmsupervisor", incarnation="x")
        for claim, found in claims.items()
    }
    assert meant == {claim: claim for claim in Claim}
