"""The lock's protocol, searched exhaustively: two hosts, two QEMUs each, any of them frozen at any step.

Every state is visited that two supervisors can come to who decide by `domain.lifecycle` and write what `domain.lock`
says, each step of theirs at any time, on what they saw at any earlier time. A supervisor that is frozen is one that is
not scheduled: there is nothing special about it. Sessions come and go, the key `host` changes, QEMUs crash, supervisors
die and adopt, a host reboots. What etcd compares of sessions comes out as it is worst: any swap may fail for it, and a
host that is taken over has none just then, although it lives. A takeover never waits: that is kindness, not safety.

Invariant: never do two QEMUs run that storage still lets write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import pytest

from kvmsupervisor.domain.incarnation import Incarnation, Memory
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.lock import Lock, LockState, LockView, Storage, take
from kvmsupervisor.domain.spec import RbdDisk, Spec, Wish, spec_to_object
from kvmsupervisor.domain.view import NEVER_RAN, Action, Deferral, Process, View

HOSTS = (HostName("a"), HostName("b"))
SPEC = Spec(ram_mib=64, rbd=RbdDisk("rbd", "vm"))
SPEC_OBJECT = spec_to_object(SPEC)
LONG_AGO = Deferral(until=0.0, told="", ask_at=1e9, watchers=("x",))
LIMIT = 3_000_000


class Locks:
    """Every lock that was ever written, by number: the same for the same, and quick to compare."""

    def __init__(self) -> None:
        self._all: list[Lock | None] = [None]
        self._numbers: dict[Lock, int] = {}

    def number(self, lock: Lock) -> int:
        found = self._numbers.setdefault(lock, len(self._all))
        if found == len(self._all):
            self._all.append(lock)
        return found

    def __getitem__(self, number: int) -> Lock:
        lock = self._all[number]
        assert lock is not None
        return lock


LOCKS = Locks()


class Etcd(NamedTuple):
    """What etcd holds: the lock and its revision (0 without one), and the key `host` and its revision.

    `writes` counts those of the lock, `last_epoch` is what the status tells since the lock was last let go of.
    """

    lock: int = 0
    revision: int = 0
    host: int = 0
    host_revision: int = 1
    writes: int = 0
    last_epoch: int = 0


class Local(NamedTuple):
    """What a supervisor knows: etcd as it last saw it, its QEMU, and the step that it has decided upon."""

    lock: int = 0
    revision: int = 0
    host: int = 0
    host_revision: int = 1
    planned: str | None = None
    qemu: str | None = None
    ran: bool = False
    epoch: int = 0
    closed: str | None = None
    gone: frozenset[str] = frozenset()
    step: str = ""
    fence: tuple[str, ...] = ()
    boot: int = 0
    used: int = 0


class World(NamedTuple):
    """All of it. `qemus` are those that live: name and whether the guest runs; a QEMU's address is its name."""

    etcd: Etcd = Etcd()
    locals: tuple[Local, Local] = (Local(), Local())
    qemus: frozenset[tuple[str, bool]] = frozenset()
    fenced: frozenset[str] = frozenset()
    highest: int = 0
    wrong: str = ""

    def trouble(self) -> str:
        """What must not be."""
        if sum(runs and name not in self.fenced for name, runs in self.qemus) > 1:
            return "two writers"
        return self.wrong


@dataclass(frozen=True, kw_only=True)
class Model:
    """What may happen, and what is left out to see that the search finds it."""

    incarnations: int = 2
    moves: int = 1
    reboots: int = 0
    fences: bool = True
    records: bool = True
    keeps_list: bool = True

    def after(self, world: World) -> Iterator[World]:
        """Every world that is one step away."""
        for me in (0, 1):
            yield from self._supervisor(world, me)
            yield from self._fate(world, me)
        etcd = world.etcd
        if etcd.host_revision <= self.moves:
            yield world._replace(etcd=etcd._replace(host=1 - etcd.host, host_revision=etcd.host_revision + 1))

    # What happens to a host.

    def _fate(self, world: World, me: int) -> Iterator[World]:
        etcd, local = world.etcd, world.locals[me]
        for name, runs in world.qemus:
            if name[0] == HOSTS[me] and runs:
                yield world._replace(qemus=world.qemus - {(name, runs)})
        fresh = Local(qemu=local.qemu, epoch=local.epoch, boot=local.boot, used=local.used)
        if local.qemu is not None:
            fresh = fresh._replace(ran=(local.qemu, True) in world.qemus)
        yield _with(world, me, _seen(fresh, etcd))
        if local.boot < self.reboots:
            survivors = frozenset(qemu for qemu in world.qemus if qemu[0][0] != HOSTS[me])
            rebooted = _seen(Local(boot=local.boot + 1, used=local.used), etcd)
            yield _with(world._replace(qemus=survivors), me, rebooted)

    # What a supervisor does.

    def _supervisor(self, world: World, me: int) -> Iterator[World]:
        local = world.locals[me]
        if local.step:
            yield from self._act(world, me, local)
            return
        seen = _seen(local, world.etcd)
        if seen.qemu is not None and not any(name == seen.qemu for name, _ in world.qemus):
            # Its pidfd says so: buried.
            seen = seen._replace(qemu=None, ran=False)
        if seen != local:
            yield _with(world, me, seen)
        action = _decide(me, local._replace(closed=None, gone=frozenset(), used=0, epoch=0))
        if not self.records and action is Action.RECORD:
            action = Action.CONTINUE
        if action is None or action is Action.FORGET or (action is Action.TAKE and local.used >= self.incarnations):
            return
        yield _with(world, me, local._replace(step=action.name))

    def _act(self, world: World, me: int, local: Local) -> Iterator[World]:  # noqa: C901, PLR0912 - one branch per step
        etcd, qemus = world.etcd, world.qemus
        done = local._replace(step="", fence=())
        match local.step:
            case "TAKE":
                name = f"{HOSTS[me]}{local.used}"
                previous = LOCKS[local.lock] if local.lock else None
                lock = take(
                    previous if self.keeps_list or previous is None else replace(previous, clients=(), fence=()),
                    host=HOSTS[me], boot_id=f"boot{local.boot}", incarnation=name, storage=Storage.RBD,
                    epoch_floor=0 if local.lock else etcd.last_epoch,
                    closed=previous is not None and previous.incarnation == local.closed,
                )  # fmt: skip
                done = done._replace(planned=name, used=local.used + 1)
                if previous is not None and (previous.host, previous.boot_id) == (lock.host, lock.boot_id):
                    done = done._replace(gone=done.gone | set(previous.clients))
                yield from self._swap(world, me, done, lock)
            case "FENCE":
                lock = LOCKS[local.lock]
                others = () if lock.taken_from is None else tuple(sorted(name for name, _ in qemus))
                everyone = tuple(dict.fromkeys((*lock.fence, *others)))
                fenced = world.fenced | (set(everyone) if self.fences else set())
                yield _with(world._replace(fenced=fenced), me, local._replace(step="FENCED", fence=everyone))
            case "FENCED":
                lock = LOCKS[local.lock].fenced(address for address in local.fence if address not in local.gone)
                yield from self._swap(world, me, done._replace(gone=frozenset()), lock)
            case "SPAWN":
                name = LOCKS[local.lock].incarnation
                paused = done._replace(qemu=name, epoch=LOCKS[local.lock].epoch, ran=False, planned=None)
                yield _with(world._replace(qemus=qemus | {(name, False)}), me, paused)
            case "RECORD":
                assert local.qemu is not None
                lock = LOCKS[local.lock].recorded(pid=1, starttime=1, clients=(local.qemu,))
                yield from self._swap(world, me, done, lock)
            case "CONTINUE":
                assert local.qemu is not None
                if (local.qemu, False) in qemus:
                    qemus = qemus - {(local.qemu, False)} | {(local.qemu, True)}
                wrong = (
                    "" if local.qemu in world.fenced or local.epoch >= world.highest else "an epoch after a later one"
                )
                highest = max(world.highest, local.epoch)
                yield _with(world._replace(qemus=qemus, highest=highest, wrong=wrong), me, done._replace(ran=True))
            case "KILL" | "POWERDOWN":
                left = frozenset(qemu for qemu in qemus if qemu[0] != local.qemu)
                closed = local.qemu if local.step == "POWERDOWN" and len(left) < len(qemus) else local.closed
                yield _with(world._replace(qemus=left), me, done._replace(qemu=None, ran=False, closed=closed))
            case "RELEASE":
                if etcd.revision == local.revision:
                    last = LOCKS[etcd.lock].epoch if etcd.lock else etcd.last_epoch
                    free = world._replace(etcd=etcd._replace(lock=0, revision=0, last_epoch=last))
                    yield _with(free, me, done._replace(lock=0, revision=0, planned=None))
                yield _with(world, me, _seen(done, etcd))
            case "REASSERT":
                assert local.qemu is not None
                if etcd.last_epoch > local.epoch:
                    yield _with(world, me, done._replace(step="KILL"))
                elif etcd.lock:
                    yield _with(world, me, _seen(done, etcd))
                else:
                    yield _with(world, me, _seen(done, etcd)._replace(step="REASSERTED"))
            case "REASSERTED":
                assert local.qemu is not None
                lock = Lock(
                    host=HOSTS[me], boot_id=f"boot{local.boot}", epoch=local.epoch, state=LockState.RUNNING,
                    incarnation=local.qemu, clients=(local.qemu,), storage=Storage.RBD,
                )  # fmt: skip
                yield from self._swap(world, me, done._replace(host_revision=etcd.host_revision), lock)
            case _:
                raise AssertionError(local.step)

    @staticmethod
    def _swap(world: World, me: int, local: Local, lock: Lock) -> Iterator[World]:
        """Laws 2 and 3: compared with what was seen, and with the key `host`; without a session it fails, too."""
        etcd = world.etcd
        yield _with(world, me, _seen(local, etcd))
        if etcd.revision == local.revision and etcd.host_revision == local.host_revision:
            number, writes = LOCKS.number(lock), etcd.writes + 1
            etcd = etcd._replace(lock=number, revision=writes, writes=writes)
            yield _with(world._replace(etcd=etcd), me, local._replace(lock=number, revision=writes))


def _with(world: World, me: int, local: Local) -> World:
    return world._replace(locals=(local, world.locals[1]) if me == 0 else (world.locals[0], local))


def _seen(local: Local, etcd: Etcd) -> Local:
    return local._replace(
        lock=etcd.lock, revision=etcd.revision, host=etcd.host, host_revision=etcd.host_revision, step="", fence=()
    )


@cache
def _decide(me: int, local: Local) -> Action | None:
    """What `domain.lifecycle` says to this."""
    process = None
    boot = f"boot{local.boot}"
    if local.qemu is not None:
        record = Incarnation(
            instance="1", incarnation=local.qemu, epoch=1, boot_id=boot, argv=(), spec=SPEC_OBJECT,
            storage=Storage.RBD, accelerator="tcg", restart_request=None, revision=1, log_offset=0, spawned_at=1.0,
            pid=1, starttime=1,
        )  # fmt: skip
        state = "running" if local.ran else NEVER_RAN
        process = Process(incarnation=record, spec=SPEC, connected=True, run_state=state, probe_at=1e9)
    wish = Wish(
        instance=InstanceId("1"), host=HOSTS[local.host], host_revision=local.host_revision, spec=SPEC, revision=1,
        keys=3,
    )  # fmt: skip
    data = LOCKS[local.lock].to_json() if local.lock else None
    view = View(
        now=2.0, me=HOSTS[me], boot_id=boot, wish=wish, planned=local.planned, process=process,
        memory=Memory(boot_id=boot),
        lock=LockView(known=True, data=data, mod_revision=local.revision, as_of=1), slot=True,
        holder_has_session=False, deferral=LONG_AGO,
    )  # fmt: skip
    return decide(view).action


def search(model: Model) -> tuple[int, World | None]:
    """Visit every world; how many there are, and the first one that must not be."""
    begin = World()
    seen, todo = {begin}, [begin]
    while todo:
        world = todo.pop()
        for following in model.after(world):
            if following in seen:
                continue
            if following.trouble():
                return len(seen), following
            seen.add(following)
            assert len(seen) <= LIMIT
            todo.append(following)
    return len(seen), None


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Model(incarnations=2, moves=1), id="2 hosts, 2 incarnations each"),
        pytest.param(Model(incarnations=1, moves=2), id="there and back"),
        pytest.param(Model(incarnations=1, moves=1, reboots=1), id="and a reboot of each"),
        pytest.param(Model(incarnations=2, moves=2), id="all of it", marks=pytest.mark.soak),
    ],
)
def test_no_reachable_world_has_two_writers(model: Model) -> None:
    """Laws 2 to 4, 6 and 9: whoever freezes where, and whatever comes and goes, storage lets one QEMU write.

    Nor does a guest that storage lets write begin under an epoch that is lower than one that has run.
    """
    worlds, wrong = search(model)
    assert wrong is None, f"{wrong.trouble()}: {wrong}"
    assert worlds > 1000


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param({"fences": False}, id="law 4: no fence"),
        pytest.param({"records": False}, id="law 3: no record before the guest runs"),
        pytest.param({"keeps_list": False}, id="law 4: what was on record is lost"),
    ],
)
def test_the_search_can_fail(sabotage: dict[str, bool]) -> None:
    """With one law left out, the search finds two writers, or one under an epoch that is over."""
    _, wrong = search(replace(Model(incarnations=2, moves=2), **sabotage))
    assert wrong is not None
    assert wrong.trouble() == "two writers" or not wrong_by_fencing(sabotage)


def wrong_by_fencing(sabotage: dict[str, bool]) -> bool:
    """Without a fence, or a record, it is two writers for certain."""
    return "keeps_list" not in sabotage
