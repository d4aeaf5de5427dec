"""The lock's protocol, searched exhaustively: two hosts, two QEMUs each, any of them frozen at any step.

Every state is visited that two supervisors can come to who decide by `domain.lifecycle` and write what `domain.lock`
says, each step of theirs at any time, on what they saw at any earlier time. A supervisor that is frozen is one that is
not scheduled: there is nothing special about it. Sessions come and go, the key `host` changes, QEMUs crash, supervisors
die and adopt, a host reboots. What etcd compares of sessions comes out as it is worst: any swap may fail for it, and a
host that is taken over has none just then, although it lives; and whether the other host is there to move to is seen
either way at any time. A takeover never waits: that is kindness, not safety. The key `host` stands for all that says
where it runs: a placement is written and compared like it.

What a write compares, and which state may follow which, is read off the lock's state table (`lock.Change`).

Invariant: never do two QEMUs run that storage still lets write; no lock changes in a way that the table does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import pytest

from kvmsupervisor.domain.incarnation import Incarnation, InstanceState
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.lock import Change, Compared, Lock, LockState, LockView, Storage, take
from kvmsupervisor.domain.run_state import NEVER_RAN
from kvmsupervisor.domain.spec import RbdDisk, Spec, Wish, spec_to_object
from kvmsupervisor.domain.view import Action, Deferral, Process, Target, View

HOSTS = (HostName("a"), HostName("b"))
SPEC = Spec(ram_mib=64, rbd=RbdDisk("rbd", "vm"))
SPEC_OBJECT = spec_to_object(SPEC)
LONG_AGO = Deferral(until=0.0, told="", ask_at=1e9, watchers=("x",))
LIMIT = 3_000_000
UNCOMPARED = {"KILL", "POWERDOWN", "SPAWN", "CONTINUE", "FENCE", "REASSERT", "REASSERTED"}
"""Steps that do something whatever etcd says meanwhile."""


COMPARES = {change: frozenset(change.value.compares) for change in Change}
"""What is compared, as the table says it."""


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

FOUND: set[tuple[Change, LockState | None, LockState | None]] = set()
"""What the present search came upon: which change led from which state to which."""


class Etcd(NamedTuple):
    """What etcd holds: the lock (0 without one), and the key `host`.

    `moves` counts the changes of that key, `last_epoch` is what the status tells since the lock was last let go of.
    """

    lock: int = 0
    host: int = 0
    moves: int = 0
    last_epoch: int = 0


class Local(NamedTuple):
    """What a supervisor knows: etcd as it last saw it, its QEMU, and the step that it has decided upon.

    Of revisions it matters only whether they are still etcd's (`lock_is`, `host_is`): one that is not never is again.
    An absent lock has none, so it can be again what it was.
    """

    lock: int = 0
    lock_is: bool = True
    host: int = 0
    host_is: bool = True
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
    breaks: bool = False
    compares: Mapping[Change, frozenset[Compared]] = field(default_factory=lambda: COMPARES)
    gates: bool = True
    proves: bool = True
    keeps_entries: bool = True

    def after(self, world: World) -> Iterator[World]:
        """Every world that is one step away."""
        for me in (0, 1):
            yield from self._supervisor(world, me)
            yield from self._fate(world, me)
        etcd = world.etcd
        if etcd.moves < self.moves:
            moved = world._replace(etcd=etcd._replace(host=1 - etcd.host, moves=etcd.moves + 1))
            a, b = world.locals
            yield moved._replace(locals=(a._replace(host_is=False), b._replace(host_is=False)))
        if self.breaks and etcd.lock:
            yield from self._broken(world, LOCKS[etcd.lock])
        if not self.keeps_entries:
            yield from (world._replace(fenced=world.fenced - {name}) for name in world.fenced)

    def _broken(self, world: World, lock: Lock) -> Iterator[World]:
        """An operator breaks the lock, after a look that no QEMU of its holder lives."""
        broken = lock.broken()
        if broken != lock and not any(name[0] == lock.host for name, _ in world.qemus):
            assert Change.BREAK.allows(lock, broken)
            yield _written(world, LOCKS.number(broken))

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
            yield from self._act(world, me, local, local.step)
            return
        seen = _seen(local, world.etcd)
        if seen.qemu is not None and not any(name == seen.qemu for name, _ in world.qemus):
            # Its pidfd says so: its exit is recorded.
            seen = seen._replace(qemu=None, ran=False)
        if seen != local:
            yield _with(world, me, seen)
        for step in self._actions(me, local):
            if step != "TAKE" or local.used < self.incarnations:
                yield from self._act(world, me, local, step)

    def _actions(self, me: int, local: Local) -> set[str]:
        """What is done where the other host is there to move to, and where it is not."""
        return {self._action(me, local, there) for there in (True, False)} - {""}

    def _action(self, me: int, local: Local, there: bool) -> str:
        action = _decide(Known(me, local.lock, local.host, local.planned, local.qemu, local.ran, local.boot, there))
        if not self.records and action is Action.RECORD:
            action = Action.CONTINUE
        return "" if action is None or action is Action.FORGET else action.name

    def _act(self, world: World, me: int, local: Local, step: str) -> Iterator[World]:  # noqa: C901, PLR0912 - a table
        etcd, qemus = world.etcd, world.qemus
        done = local._replace(step="", fence=())
        match step:
            case "TAKE" if not local.lock:
                # What the status tells is read first, and the lock with it.
                looked = local._replace(lock=etcd.lock, lock_is=True)
                yield _with(world, me, looked if etcd.lock else looked._replace(step="LOOKED", epoch=etcd.last_epoch))
            case "TAKE" | "LOOKED":
                name = f"{HOSTS[me]}{local.used}"
                previous = LOCKS[local.lock] if local.lock else None
                lock = take(
                    previous if self.keeps_list or previous is None else replace(previous, clients=(), fence=()),
                    host=HOSTS[me], boot_id=f"boot{local.boot}", facts="/kvmsupervisor", incarnation=name,
                    storage=Storage.RBD,
                    epoch_floor=0 if local.lock else local.epoch,
                    closed=previous is not None and previous.incarnation == local.closed,
                )  # fmt: skip
                done = failed = done._replace(planned=name, used=local.used + 1)
                if previous is not None and (previous.host, previous.boot_id) == (lock.host, lock.boot_id):
                    done = done._replace(gone=done.gone | set(previous.clients))
                ours = previous is None or previous.host == lock.host
                change = Change.TAKE if ours else Change.TAKE_OVER
                yield from self._swap(world, me, change, lock, done=done, failed=failed)
            case "FENCE":
                lock = LOCKS[local.lock]
                others = () if lock.taken_from is None else tuple(sorted(name for name, _ in qemus))
                # Storage names those that live, but for one that was frozen for so long that its watch is over.
                for named in {others, ()}:
                    everyone = tuple(dict.fromkeys((*lock.fence, *named)))
                    fenced = world.fenced | (set(everyone) if self.fences else set())
                    yield _with(world._replace(fenced=fenced), me, local._replace(step="FENCED", fence=everyone))
            case "FENCED":
                lock = LOCKS[local.lock].fenced(address for address in local.fence if address not in local.gone)
                yield from self._swap(world, me, Change.FENCE, lock, done=done._replace(gone=frozenset()), failed=done)
            case "SPAWN":
                name = LOCKS[local.lock].incarnation
                paused = done._replace(qemu=name, epoch=LOCKS[local.lock].epoch, ran=False, planned=None)
                yield _with(world._replace(qemus=qemus | {(name, False)}), me, paused)
            case "RECORD":
                assert local.qemu is not None
                lock = LOCKS[local.lock].recorded(pid=1, starttime=1, clients=(local.qemu,))
                failed = done if self.gates else done._replace(step="CONTINUE")
                yield from self._swap(world, me, Change.RECORD, lock, done=done, failed=failed)
            case "CONTINUE":
                assert local.qemu is not None
                if (local.qemu, False) in qemus:
                    qemus = qemus - {(local.qemu, False)} | {(local.qemu, True)}
                    if local.epoch < world.highest and local.qemu not in world.fenced:
                        world = world._replace(wrong="an epoch after a later one")
                    world = world._replace(qemus=qemus, highest=max(world.highest, local.epoch))
                yield _with(world, me, done._replace(ran=True))
            case "KILL" | "POWERDOWN":
                # A paused one closes its disks, too.
                left = frozenset(qemu for qemu in qemus if qemu[0] != local.qemu or not self.proves)
                closed = (
                    local.qemu if (step == "POWERDOWN" or not local.ran) and len(left) < len(qemus) else local.closed
                )
                yield _with(world._replace(qemus=left), me, done._replace(qemu=None, ran=False, closed=closed))
            case "RELEASE":
                if self._holds(Change.RELEASE, etcd, local, None):
                    last = LOCKS[etcd.lock].epoch if etcd.lock else etcd.last_epoch
                    free = _written(world, 0)._replace(etcd=etcd._replace(lock=0, last_epoch=last))
                    yield _with(free, me, done._replace(lock=0, lock_is=True, planned=None))
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
                yield from self._swap(world, me, Change.REASSERT, lock, done=done, failed=done)
            case _:
                raise AssertionError(step)

    def _swap(
        self, world: World, me: int, change: Change, lock: Lock, *, done: Local, failed: Local
    ) -> Iterator[World]:
        """Laws 2 and 3: any swap may fail, as without a session; it holds where the table's compares do."""
        yield _with(world, me, _seen(failed, world.etcd)._replace(step=failed.step))
        if self._holds(change, world.etcd, done, lock):
            number = LOCKS.number(lock)
            yield _with(_written(world, number), me, done._replace(lock=number, lock_is=True))

    def _holds(self, change: Change, etcd: Etcd, local: Local, lock: Lock | None) -> bool:
        """Whether the compares of a change hold, of which the table says that it leads to `lock`."""
        compared = self.compares[change]
        if (Compared.LOCK in compared and not _same(etcd, local)) or (
            Compared.GROUND in compared and not local.host_is
        ):
            return False
        before = LOCKS[etcd.lock] if etcd.lock else None
        if self.compares is COMPARES:
            assert change.allows(before, lock), (change, before, lock)
        FOUND.add((change, None if before is None else before.state, None if lock is None else lock.state))
        return True

    # What is the same.

    def merged(self, world: World) -> World:
        """The same world without what can matter no more, so that more worlds are the same."""
        a, b = world.locals
        locals_ = (self._local_merged(0, a, world.etcd), self._local_merged(1, b, world.etcd))
        fenced = world.fenced.intersection(name for name, _ in world.qemus)
        if fenced == world.fenced and locals_[0] is a and locals_[1] is b:
            return world
        return world._replace(fenced=fenced, locals=locals_)

    def _local_merged(self, me: int, local: Local, etcd: Etcd) -> Local:
        if self.compares is COMPARES and not (_same(etcd, local) and local.host_is):
            # Who does nothing but what etcd will refuse might as well look at once; it can look again later.
            steps = {local.step} if local.step else self._actions(me, local)
            if not steps & UNCOMPARED:
                local = _seen(local, etcd)
        if local.closed is None and not local.gone and (local.qemu or local.step or not local.epoch):
            return local
        known = [LOCKS[number] for number in (local.lock, etcd.lock) if number]
        named = {*local.fence, *(name for lock in known for name in (*lock.fence, *lock.clients))}
        return local._replace(
            epoch=local.epoch if local.qemu or local.step else 0,
            closed=local.closed if any(lock.incarnation == local.closed for lock in known) else None,
            gone=local.gone & named,
        )


def _same(etcd: Etcd, local: Local) -> bool:
    """Whether the lock's revision is still the one that was seen."""
    return local.lock_is if local.lock else not etcd.lock


def _written(world: World, number: int) -> World:
    """Another lock is in etcd: what anybody has seen of a former one is no longer so."""
    a, b = world.locals
    return world._replace(
        etcd=world.etcd._replace(lock=number), locals=(a._replace(lock_is=not a.lock), b._replace(lock_is=not b.lock))
    )


def _with(world: World, me: int, local: Local) -> World:
    return world._replace(locals=(local, world.locals[1]) if me == 0 else (world.locals[0], local))


def _seen(local: Local, etcd: Etcd) -> Local:
    return local._replace(lock=etcd.lock, lock_is=True, host=etcd.host, host_is=True, step="", fence=())


class Known(NamedTuple):
    """What of all that a supervisor knows its decision depends on."""

    me: int
    lock: int
    host: int
    planned: str | None
    qemu: str | None
    ran: bool
    boot: int
    there: bool


@cache
def _decide(known: Known) -> Action | None:
    """What `domain.lifecycle` says to what a supervisor knows."""
    me, lock, host, planned, qemu, ran, boot, there = known
    process = None
    boot_id = f"boot{boot}"
    if qemu is not None:
        record = Incarnation(
            instance="1", incarnation=qemu, epoch=1, boot_id=boot_id, argv=(), spec=SPEC_OBJECT, storage=Storage.RBD,
            accelerator="tcg", restart_request=None, revision=1, log_offset=0, spawned_at=1.0, pid=1, starttime=1,
        )  # fmt: skip
        state = "running" if ran else NEVER_RAN
        process = Process(incarnation=record, spec=SPEC, connected=True, run_state=state, probe_at=1e9)
    wish = Wish(instance=InstanceId("1"), host=HOSTS[host], host_revision=1, spec=SPEC, revision=1, keys=3)
    data = LOCKS[lock].to_json() if lock else None
    view = View(
        now=2.0, me=HOSTS[me], facts="/kvmsupervisor", boot_id=boot_id, wish=wish, planned=planned, process=process,
        saved=InstanceState(boot_id=boot_id), lock=LockView(known=True, data=data, mod_revision=1, as_of=1), slot=True,
        holder_has_session=False, deferral=LONG_AGO, target=Target(there=there),
    )  # fmt: skip
    return decide(view).action


def search(model: Model, wanted: str | None = None) -> tuple[int, World | None]:
    """Visit every world; how many there are, and the first one that must not be (for that reason)."""
    begin = World()
    seen, todo = {begin}, [begin]
    while todo:
        world = todo.pop()
        for following in map(model.merged, model.after(world)):
            if following in seen:
                continue
            if following.trouble() and (wanted is None or wanted == following.trouble()):
                return len(seen), following
            seen.add(following)
            assert len(seen) <= LIMIT
            todo.append(following)
    return len(seen), None


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Model(incarnations=2, moves=2), id="2 hosts, 2 incarnations each, there and back"),
        pytest.param(Model(incarnations=1, moves=1, reboots=1), id="a reboot of each"),
        pytest.param(Model(incarnations=1, moves=2, breaks=True), id="locks are broken"),
        pytest.param(Model(incarnations=2, moves=2, reboots=1), id="all of it", marks=pytest.mark.soak),
        pytest.param(Model(incarnations=2, moves=3), id="once more there", marks=pytest.mark.soak),
    ],
)
def test_no_reachable_world_has_two_writers(model: Model) -> None:
    """Laws 2, 3, 4, 6 and 9: whoever freezes where, and whatever comes and goes, storage lets one QEMU write.

    Nor does a guest that storage lets write begin under an epoch that is lower than one that has run. Worlds, and
    seconds of a processor: 41,000 in 4.5, 2,000 in 0.2, 6,000 in 0.8; "all of it" and "once more there" are larger.
    """
    FOUND.clear()
    worlds, wrong = search(model)
    assert wrong is None, f"{wrong.trouble()}: {wrong}"
    assert worlds > 1000
    assert {change for change, *_ in FOUND} == {
        Change.TAKE, Change.TAKE_OVER, Change.FENCE, Change.RECORD, Change.RELEASE,
    }  # fmt: skip
    assert (Change.TAKE_OVER, LockState.BROKEN, LockState.FENCING) in FOUND or not model.breaks


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param({"records": False}, id="law 3: no record before the guest runs"),
        pytest.param({"gates": False}, id="law 3: the guest runs though the record was refused"),
        pytest.param({"fences": False}, id="law 4: no fence"),
        pytest.param({"keeps_list": False}, id="law 4: what was on record is lost"),
        pytest.param({"keeps_entries": False}, id="law 4: an entry is removed whose process may live"),
        pytest.param({"proves": False}, id="law 9: released without proof that the process is gone"),
    ],
)
def test_the_search_can_fail(sabotage: dict[str, Any]) -> None:
    """Laws 2, 3, 4 and 9: with any one of them left out, the search finds two writers."""
    _, wrong = search(replace(Model(incarnations=1, moves=2), **sabotage), "two writers")
    assert wrong is not None


@pytest.mark.parametrize(
    ("change", "compared", "incarnations", "trouble"),
    [
        (Change.TAKE, Compared.LOCK, 2, "two writers"),
        (Change.TAKE, Compared.GROUND, 2, "an epoch after a later one"),
        (Change.TAKE_OVER, Compared.LOCK, 1, "two writers"),
        (Change.FENCE, Compared.LOCK, 2, "two writers"),
        (Change.RECORD, Compared.LOCK, 1, "two writers"),
        (Change.RELEASE, Compared.LOCK, 2, "two writers"),
    ],
)
def test_no_compare_of_the_table_can_go(change: Change, compared: Compared, incarnations: int, trouble: str) -> None:
    """Law 2: with one compare of one row left out, the search finds what must not be.

    Sessions are as bad as can be in every search, so their compares cannot be left out here; see `test_lock.py`.
    """
    compares = {**COMPARES, change: COMPARES[change] - {compared}}
    _, wrong = search(Model(incarnations=incarnations, moves=2, compares=compares), trouble)
    assert wrong is not None
