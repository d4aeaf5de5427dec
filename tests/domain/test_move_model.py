"""A live move, searched exhaustively: a source, a target, and a third host that takes over; as `test_lock_model.py` is.

Every state is visited that three supervisors can come to who decide by `domain.lifecycle`, each step of theirs at any
time, on what they saw at any earlier time: a frozen one is not scheduled. QEMUs do by themselves what was measured of
them: they go on to the switchover, fail and run again, load all of a guest whose source thinks that it failed.
Connections break, one way or both; a transaction whose reply was lost is done at any later time, or never; sessions are
as bad as can be; the key `host` is written back, or to the third host; QEMUs crash, supervisors die and adopt.

Never do two guests run that storage still lets write. And wherever somebody has all of the guest, there is a way on
which it runs again without a start from nothing, and without anybody else's death.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest

from kvmsupervisor.domain.handover import announced, arrived, called_off, given
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.lock import Change, Compared, Destination, Lock, LockState, LockView, Storage, take
from kvmsupervisor.domain.run_state import INCOMING, NEVER_RAN, PAUSED, POSTMIGRATE
from kvmsupervisor.domain.spec import RbdDisk, Spec, Wish, spec_to_object
from kvmsupervisor.domain.transfer import Course, Link, Stage
from kvmsupervisor.domain.view import Action, Deferral, Process, Target, View
from tests.domain.test_lock_model import Locks

A, B, C = range(3)
HOSTS = (HostName("a"), HostName("b"), HostName("c"))
SPEC = Spec(ram_mib=64, rbd=RbdDisk("rbd", "vm"))
SPEC_OBJECT = spec_to_object(SPEC)
LONG_AGO = Deferral(until=0.0, told="", ask_at=1e9, watchers=("x",))
LIMIT = 2_000_000
STATES = {
    # What a QEMU does, as QMP tells it: run state, stage.
    "paused": (NEVER_RAN, Stage.IDLE),
    "run": ("running", Stage.IDLE),
    "active": ("running", Stage.ACTIVE),
    "switch": ("finish-migrate", Stage.SWITCHOVER),
    "device": ("finish-migrate", Stage.DEVICE),
    "done": (POSTMIGRATE, Stage.DONE),
    "wait": (INCOMING, Stage.IDLE),
    "loaded": (PAUSED, Stage.DONE),
}
UNCOMPARED = {
    *(
        Action.KILL,
        Action.POWERDOWN,
        Action.QUIT,
        Action.ARRIVE,
        Action.GO_BACK,
        Action.SEND,
        Action.CANCEL,
        Action.CUT,
    ),
    *(Action.SWITCH, Action.RECEIVE, Action.TELL, Action.CALL, Action.CONTINUE, Action.SPAWN, Action.FENCE),
}
"""What is done whatever etcd says meanwhile."""

SENDING = {"active", "switch", "device", "done"}


LOCKS = Locks()
BEGIN = Lock(
    host=HOSTS[A], boot_id="boot", epoch=1, state=LockState.RUNNING, incarnation="a0", pid=1, starttime=1,
    clients=("a0",), storage=Storage.RBD, facts="/kvmsupervisor",
)  # fmt: skip


class Local(NamedTuple):
    """What a supervisor knows: etcd as it last saw it and whether that is still so, its QEMU, the move's connection."""

    lock: int = 0
    lock_is: bool = True
    host: int = B
    host_is: bool = True
    qemu: str = ""
    incoming: bool = False
    planned: str = ""
    used: int = 0
    link: Link = Link.NONE
    ready: str = ""
    refused: bool = False
    told: bool = False
    taken: bool = False


class World(NamedTuple):
    """All of it. A QEMU's name is its incarnation and its address; `stream` is the one that receives.

    `late` is a hand-over that was sent, and whose reply was lost: the lock that it writes, while its compares hold.
    """

    lock: int
    locals: tuple[Local, Local, Local]
    host: int = B
    moves: int = 0
    offer: str = ""
    qemus: frozenset[tuple[str, str]] = frozenset()
    fenced: frozenset[str] = frozenset()
    stream: str = ""
    late: int = 0

    def does(self, name: str) -> str:
        """What a QEMU does; empty when it is dead."""
        return next((state for one, state in self.qemus if one == name), "")

    @property
    def running(self) -> int:
        """How many guests run and write."""
        return sum(state in {"run", "active"} and name not in self.fenced for name, state in self.qemus)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What may happen, and what is done wrong, to see that the search finds it."""

    moves: int = 1
    arrivals: int = 1
    crashes: bool = True
    restarts: bool = True
    gives_early: bool = False
    infers: bool = False
    forgets: bool = False
    goes_back_unread: bool = False

    # Everything that is one step away, and whether that is somebody's death or a start from nothing.

    def after(self, world: World) -> Iterator[tuple[World, bool]]:
        for me in (A, B, C):
            for following in self._supervisor(world, me):
                paused = {name for name, state in world.qemus | following.qemus if state == "paused"}
                cold = me is C or any(name in paused for name, _ in following.qemus ^ world.qemus)
                yield following, cold
        for following in self._fate(world):
            yield following, False
        for following in self._death(world):
            yield following, True
        if world.moves < self.moves:
            for host in {A, B, C} - {world.host}:
                a, b, c = (local._replace(host_is=False) for local in world.locals)
                yield world._replace(host=host, moves=world.moves + 1, locals=(a, b, c)), True

    def _fate(self, world: World) -> Iterator[World]:
        """What QEMUs and networks do by themselves."""
        for name, state in world.qemus:
            there = world.does(world.stream)
            match state:
                case "active":
                    yield _turns(world, name, "switch")
                    yield _turns(world, name, "run")._replace(stream="")
                case "device":
                    if there == "wait":
                        yield _turns(world, world.stream, "loaded")
                    if there == "loaded":
                        yield _turns(world, name, "done")
                    # Whatever broke, and whatever the other side has: it runs again.
                    yield _turns(world, name, "run")._replace(stream="")
        if world.late:
            if self._target_holds(world, LOCKS[world.late].incarnation) and world.host == B:
                yield _written(world, world.late)
            yield world._replace(late=0)

    def _death(self, world: World) -> Iterator[World]:
        for me in (A, B):
            local = world.locals[me]
            if local.link is not Link.NONE:
                yield _with(world, me, local._replace(link=Link.NONE))
            if not self.restarts:
                continue
            fresh = Local(qemu=local.qemu, incoming=local.incoming, used=local.used, taken=local.taken)
            yield _with(world, me, _seen(fresh, world))
        if world.offer:
            yield world._replace(offer="")
        if self.crashes:
            yield from (world._replace(qemus=world.qemus - {qemu}) for qemu in world.qemus)

    # What a supervisor does.

    def _supervisor(self, world: World, me: int) -> Iterator[World]:
        local = world.locals[me]
        seen = _seen(local, world)
        if seen != local:
            yield _with(world, me, seen)
        for action in _decisions(me, local, world.does(local.qemu)):
            yield from self._act(world, me, local, action)

    def _act(self, world: World, me: int, local: Local, action: Action) -> Iterator[World]:  # noqa: C901, PLR0912 - a table
        lock = LOCKS[local.lock] if local.lock else None
        qemu = local.qemu
        match action:
            case Action.CALL:
                if world.offer and world.locals[B].link is Link.OPEN:
                    yield _with(world, me, local._replace(link=Link.OPEN, ready=world.offer, refused=False))
            case Action.ANNOUNCE:
                assert lock is not None
                to = _destination(local.ready, clients=() if self.forgets else (local.ready,))
                yield from self._swap(
                    world, me, Change.ANNOUNCE, announced(lock, to), failed=local._replace(link=Link.NONE)
                )
            case Action.SEND:
                sent = _with(world, me, local._replace(link=Link.IN_USE))
                yield _turns(sent, qemu, "active")._replace(stream=local.ready)
            case Action.CANCEL | Action.CUT:
                # What is cut may have arrived all the same.
                yield _turns(world, qemu, "run")._replace(stream="")
            case Action.SWITCH if self.gives_early:
                assert lock is not None
                early = given(lock, paused=False, mark="")
                for following in self._swap(world, me, Change.GIVE, early, failed=local):
                    yield _turns(following, qemu, "device") if following.lock != world.lock else following
            case Action.SWITCH:
                yield _turns(world, qemu, "device")
                yield _turns(world, qemu, "run")._replace(stream="")
            case Action.GIVE:
                assert lock is not None
                now = given(lock, paused=False, mark="")
                failed = local._replace(refused=True)
                yield from self._swap(world, me, Change.GIVE, now, failed=failed)
                if self._holds(Change.GIVE, world, local, now):
                    # Sent; and nothing was heard.
                    yield _with(world, me, failed)._replace(late=LOCKS.number(now))
                if self.goes_back_unread:
                    yield _turns(_with(world, me, failed), qemu, "run")._replace(late=LOCKS.number(now))
            case Action.CALL_OFF:
                assert lock is not None
                yield from self._swap(world, me, Change.CALL_OFF, called_off(lock), failed=local)
            case Action.GO_BACK:
                yield _turns(world, qemu, "run")
            case Action.RECEIVE:
                if local.used < self.arrivals:
                    name = f"b{local.used}"
                    comes = local._replace(qemu=name, incoming=True, link=Link.OPEN, used=local.used + 1, told=False)
                    yield _with(world, me, comes)._replace(qemus=world.qemus | {(name, "wait")})
            case Action.TELL:
                yield _with(world, me, local._replace(told=True))._replace(offer=qemu)
            case Action.ARRIVE:
                yield _turns(_with(world, me, local._replace(incoming=False)), qemu, "run")
            case Action.SETTLE:
                assert lock is not None
                yield from self._swap(world, me, Change.ARRIVE, arrived(lock), failed=local)
            case Action.KILL | Action.POWERDOWN | Action.QUIT:
                left = frozenset(one for one in world.qemus if one[0] != qemu)
                ended = local._replace(qemu="", incoming=False, link=Link.NONE, told=False)
                yield _with(world, me, ended)._replace(qemus=left)
            case Action.TAKE:
                if lock is None or local.taken:
                    return
                name = f"{HOSTS[me]}{1 if me == A else 9}"
                change = Change.TAKE if lock.host == HOSTS[me] else Change.TAKE_OVER
                taken = take(
                    lock, host=HOSTS[me], boot_id="boot", facts="/kvmsupervisor", incarnation=name, storage=Storage.RBD
                )
                yield from self._swap(
                    world,
                    me,
                    change,
                    taken,
                    failed=local._replace(taken=True),
                    done=local._replace(planned=name, taken=True),
                )
            case Action.FENCE:
                assert lock is not None
                done = _with(world, me, local)._replace(fenced=world.fenced | set(lock.fence))
                yield from self._swap(done, me, Change.FENCE, lock.fenced(lock.fence), failed=local)
            case Action.SPAWN:
                assert lock is not None
                name = lock.incarnation
                if name not in {one for one, _ in world.qemus}:
                    spawned = local._replace(qemu=name, planned="")
                    yield _with(world, me, spawned)._replace(qemus=world.qemus | {(name, "paused")})
            case Action.RECORD:
                assert lock is not None
                recorded = lock.recorded(pid=1, starttime=1, clients=(qemu,))
                yield from self._swap(world, me, Change.RECORD, recorded, failed=local)
            case Action.CONTINUE:
                yield _turns(world, qemu, "run")
            case _:
                # What becomes of a lock that is let go of is `test_lock_model`'s.
                pass
        if self.infers and me == B and local.incoming and world.does(qemu) == "loaded" and local.link is Link.NONE:
            yield _turns(_with(world, me, local._replace(incoming=False)), qemu, "run")

    def _swap(
        self, world: World, me: int, change: Change, lock: Lock, *, failed: Local, done: Local | None = None
    ) -> Iterator[World]:
        """Any swap may fail; it holds where the table's compares do, and then its writer may not hear of it."""
        local = world.locals[me]
        yield _with(world, me, _seen(failed, world))
        if self._holds(change, world, local, lock):
            number = LOCKS.number(lock)
            known = (done or local)._replace(lock=number, lock_is=True)
            yield _with(_written(world, number), me, known)
            yield _written(_with(world, me, failed if done is None else done), number)

    def _holds(self, change: Change, world: World, local: Local, lock: Lock) -> bool:
        compared = change.value.compares
        before = LOCKS[world.lock]
        if not (local.lock_is and change.allows(before, lock)):
            assert not local.lock_is or self.gives_early, (change, before, lock)
            return False
        if Compared.GROUND in compared and not local.host_is:
            return False
        name = lock.to.incarnation if lock.to is not None else lock.incarnation
        return Compared.TARGET not in compared or self._target_holds(world, name)

    @staticmethod
    def _target_holds(world: World, name: str) -> bool:
        return world.offer == name


def _destination(name: str, clients: tuple[str, ...]) -> Destination:
    return Destination(
        host=HOSTS[B], boot_id="boot", incarnation=name, pid=2, starttime=2, clients=clients, facts="/kvmsupervisor"
    )


def _turns(world: World, name: str, state: str) -> World:
    """A QEMU does something else, unless it is dead, or past that."""
    before = world.does(name)
    if not before or (state == "run" and before == "wait"):
        return world
    return world._replace(qemus=world.qemus - {(name, before)} | {(name, state)})


def _written(world: World, number: int) -> World:
    a, b, c = (local._replace(lock_is=False) for local in world.locals)
    return world._replace(lock=number, locals=(a, b, c), late=0)


def _with(world: World, me: int, local: Local) -> World:
    a, b, c = (local if one == me else known for one, known in enumerate(world.locals))
    return world._replace(locals=(a, b, c))


def _seen(local: Local, world: World) -> Local:
    return local._replace(lock=world.lock, lock_is=True, host=world.host, host_is=True)


def _decisions(me: int, local: Local, does: str) -> frozenset[Action]:
    known = (me, local.lock, local.host, local.planned, local.qemu, local.incoming, does)
    return _decided(*known, local.link, local.ready, local.refused, local.told)


@cache
def _decided(  # noqa: PLR0917 - a key of the cache
    me: int, lock: int, host: int, planned: str, qemu: str, incoming: bool, does: str, link: Link, ready: str,
    refused: bool, told: bool,
) -> frozenset[Action]:  # fmt: skip
    """What `domain.lifecycle` says, whether sessions are there or not, and time is up or not."""
    process = None
    if qemu:
        run_state, stage = STATES[does]
        record = Incarnation(
            instance="1", incarnation=qemu, epoch=0 if incoming else LOCKS[lock].epoch, boot_id="boot", argv=(),
            spec=SPEC_OBJECT, storage=Storage.RBD, accelerator="tcg", restart_request=None, revision=1, log_offset=0,
            spawned_at=1.0, pid=1 if qemu[0] != "b" else 2, starttime=1, incoming=incoming,
        )  # fmt: skip
        process = Process(incarnation=record, spec=SPEC, connected=True, run_state=run_state, stage=stage, probe_at=1e9)
    wish = Wish(instance=InstanceId("1"), host=HOSTS[host], host_revision=1, spec=SPEC, revision=1, keys=3)
    found = set()
    for there, up, held, give_up_at in product((True, False), (True, False), (True, False), (0.0, 1e9)):
        course = Course(
            cold=None, link=link, ready=_destination(ready, (ready,)) if ready else None, refused=refused,
            give_up_at=give_up_at, receives=me == B, offered=True, called=True, told=told,
        )  # fmt: skip
        view = View(
            now=2.0, me=HOSTS[me], facts="/kvmsupervisor", boot_id="boot", wish=wish, planned=planned or None,
            process=process, saved=InstanceState(boot_id="boot"), slot=True, session_held=held, course=course,
            lock=LockView(known=True, data=LOCKS[lock].to_json(), mod_revision=1, as_of=1), holder_has_session=up,
            deferral=LONG_AGO, target=Target(there=there),
        )  # fmt: skip
        found.add(decide(view).action)
    return frozenset(action for action in found if action is not None)


def _merged(world: World) -> World:
    """The same world without what can matter no more, so that more worlds are the same.

    Who does nothing but what etcd will refuse might as well look at once; it can look again later.
    """
    locals_ = []
    for me, local in enumerate(world.locals):
        known, does = local, world.does(local.qemu)
        if known.qemu and not does:
            # Its pidfd says so: its exit is recorded.
            known = known._replace(qemu="", incoming=False, link=Link.NONE, told=False)
        if not (known.lock_is and known.host_is) and not _decisions(me, known, does) & UNCOMPARED:
            known = _seen(known, world)
        if known.link is Link.NONE and known.ready:
            known = known._replace(ready="")
        if known.refused and LOCKS[known.lock].to is None:
            known = known._replace(refused=False)
        if known.told and not known.incoming:
            known = known._replace(told=False)
        locals_.append(known)
    names = {name for name, _ in world.qemus}
    sends = any(state in {"active", "switch", "device"} for _, state in world.qemus)
    return world._replace(
        locals=(locals_[A], locals_[B], locals_[C]),
        fenced=world.fenced & names,
        stream=world.stream if sends and world.stream in names else "",
        offer=world.offer if world.offer in names else "",
    )


def search(model: Model) -> tuple[int, World | None, list[World]]:
    """Visit every world; how many there are, one with two writers, and those from which nobody ever goes on."""
    number = LOCKS.number(BEGIN)
    local = Local(lock=number)
    begin = World(lock=number, locals=(local._replace(qemu="a0"), local, local), qemus=frozenset({("a0", "run")}))
    seen, todo = {begin}, deque([begin])
    before: defaultdict[World, list[World]] = defaultdict(list)
    while todo:
        world = todo.popleft()  # the shortest way to what must not be is found first
        for raw, is_death in model.after(world):
            following = _merged(raw)
            if not is_death:
                before[following].append(world)
            if following in seen:
                continue
            if following.running > 1:
                return len(seen), following, []
            seen.add(following)
            assert len(seen) <= LIMIT
            todo.append(following)
    good = [world for world in seen if world.running == 1]
    hopeful = set(good)
    while good:
        for earlier in before[good.pop()]:
            if earlier not in hopeful:
                hopeful.add(earlier)
                good.append(earlier)
    return len(seen), None, [world for world in seen - hopeful if _has_guest(world)]


def _has_guest(world: World) -> bool:
    """Whether somebody has all of the guest, and may go on: the source until it is handed over, then the target."""
    lock = LOCKS[world.lock]
    if any(local.planned for local in world.locals) or lock.incarnation in world.fenced:
        return False
    state = world.does(lock.incarnation)
    return state in SENDING or (state == "loaded" and lock.state is LockState.GIVEN)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Model(crashes=False, moves=0), id="nothing crashes"),
        pytest.param(Model(restarts=False), id="a third host, no new supervisors", marks=pytest.mark.soak),
        pytest.param(Model(), id="one attempt", marks=pytest.mark.soak),
        pytest.param(Model(arrivals=2, crashes=False, moves=0), id="two attempts", marks=pytest.mark.soak),
    ],
)
def test_a_guest_never_runs_twice_and_always_may_go_on(model: Model) -> None:
    """Law 13: whoever freezes, dies or hears nothing at whatever step."""
    worlds, twice, stuck = search(model)
    assert twice is None, twice
    assert stuck == [], f"{len(stuck)} of {worlds}: {stuck[0]}"
    assert worlds > 1000


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param({"gives_early": True, "moves": 0}, id="handed over at the switchover"),
        pytest.param({"infers": True, "moves": 0}, id="the target goes on because the source fell silent"),
        pytest.param({"forgets": True}, id="the target's addresses are not on record"),
        pytest.param(
            {"goes_back_unread": True, "moves": 0}, id="the source goes on without having read that the lock is its own"
        ),
    ],
)
def test_the_search_can_fail(sabotage: dict[str, Any]) -> None:
    """Law 13: with any part of it left out, the search finds a guest that runs twice."""
    _, twice, _ = search(replace(Model(crashes=False, restarts=False), **sabotage))
    assert twice is not None
