"""Faults that are planted, to see that the simulation finds them: laws left out, and mends taken back.

`python -m tests.simulation --mutant NAME --seeds 1-1000` plays with one of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import structlog

from kvmsupervisor.adapters.etcd import Compare, EtcdError, Get, KeyValue
from kvmsupervisor.adapters.etcd.api import Event
from kvmsupervisor.cluster import history, informer, session
from kvmsupervisor.cluster import lock as lock_module
from kvmsupervisor.cluster.fencing import CephFencing
from kvmsupervisor.cluster.informer import Informer
from kvmsupervisor.cluster.lock import SwapFailed
from kvmsupervisor.cluster.lock import compares as right_compares
from kvmsupervisor.cluster.owners import LockOwners
from kvmsupervisor.domain import doubt, lifecycle
from kvmsupervisor.domain.decision import Decision, Row
from kvmsupervisor.domain.evacuation import plan
from kvmsupervisor.domain.handover import announced, given
from kvmsupervisor.domain.history import Era
from kvmsupervisor.domain.host_wish import Mode
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.lock import Change, Claim, Lock, LockState, LockView, Storage
from kvmsupervisor.domain.lock import take as domain_take
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.removal import MassRemovalHold
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.storage import storage_of
from kvmsupervisor.domain.transfer import Link, Stage
from kvmsupervisor.domain.view import Action, View
from kvmsupervisor.instance import moves, new_qemu, start, worker
from kvmsupervisor.instance.moves import Moves
from kvmsupervisor.instance.sharing import Namesakes, Sharing
from kvmsupervisor.instance.status import Report
from kvmsupervisor.instance.worker import Worker
from kvmsupervisor.machine.images import Law5
from kvmsupervisor.machine.migration import MoveRefused
from kvmsupervisor.supervisor import evacuation, failover, host, identity
from kvmsupervisor.supervisor.dispatch import Dispatch
from kvmsupervisor.supervisor.identity import Standing
from tests.simulation.etcd import SimEtcd

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault.

    Attributes:
        name: as the command line calls it.
        law: which law it breaks, or which fault that was found in a release comes back by it.
        change: what is changed.
        seed: one that finds it.
        kinds: of acts, in whose histories it is looked for; all, where none is named.
        plant: plants it.
    """

    name: str
    law: str
    change: str
    seed: int
    kinds: tuple[str, ...]
    plant: Plant

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The program has this fault."""
        with pytest.MonkeyPatch.context() as patch:
            self.plant(patch)
            yield


MUTANTS: dict[str, Mutant] = {}
"""The table."""


def mutant(law: str, *, seed: int, kinds: tuple[str, ...] = ()) -> Callable[[Plant], Plant]:
    """A row of the table, under its function's name."""

    def add(plant: Plant) -> Plant:
        name = plant.__name__.replace("_", "-")
        MUTANTS[name] = Mutant(name=name, law=law, change=plant.__doc__ or "", seed=seed, kinds=kinds, plant=plant)
        return plant

    return add


def _with_decisions(patch: pytest.MonkeyPatch, change: Callable[[View, Decision], Decision]) -> None:
    patch.setattr(worker, "decide", lambda view: change(view, decide(view)))


# --- the lock ---------------------------------------------------------------------------------------------------


@mutant("laws 2 and 4", seed=1, kinds=("frozen-at-the-lock", "qemu-kill"))
def lock_without_session(patch: pytest.MonkeyPatch) -> None:
    """Neither our own session is compared, nor that the holder has none."""

    def left(change: Change, **told: Any) -> list[Compare]:
        return [one for one in right_compares(change, **told) if "/hosts/" not in one.key]

    patch.setattr(lock_module, "compares", left)


@mutant("law 2", seed=1)
def epoch_stands_still(patch: pytest.MonkeyPatch) -> None:
    """A new incarnation takes over its predecessor's epoch."""
    right = domain_take

    def take(previous: Lock | None, **told: Any) -> Lock:
        lock = right(previous, **told)
        return lock if previous is None else replace(lock, epoch=previous.epoch)

    patch.setattr(start, "take", take)


@mutant("law 2", seed=14)
def epoch_begins_again(patch: pytest.MonkeyPatch) -> None:
    """What the status tells of the last epoch is not looked at."""
    right = domain_take

    def take(previous: Lock | None, **told: Any) -> Lock:
        return right(previous, **{**told, "epoch_floor": 0})

    patch.setattr(start, "take", take)


@mutant("law 2", seed=55, kinds=("frozen-at-the-lock", "move"))
def wherever_it_was_wanted(patch: pytest.MonkeyPatch) -> None:
    """An instance is started although its keys want it elsewhere by then: neither `host` nor placement is compared.

    Machines move cold there, so that there are starts enough.
    """
    patch.setattr(host, "open_gate", lambda *told, **more: None)

    def left(change: Change, **told: Any) -> list[Compare]:
        return right_compares(change, **{**told, "ground": None})

    patch.setattr(lock_module, "compares", left)


@mutant("law 4", seed=2, kinds=("host-freeze",))
def addresses_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Whoever takes a lock does not take over what there is to fence."""
    right = domain_take

    def take(previous: Lock | None, **told: Any) -> Lock:
        return replace(right(previous, **told), fence=(), state=LockState.STARTING, taken_from=None)

    patch.setattr(start, "take", take)


# --- storage ----------------------------------------------------------------------------------------------------


@mutant("law 4", seed=11, kinds=("etcd-cut",))
def no_fence(patch: pytest.MonkeyPatch) -> None:
    """Nobody is shut out."""

    async def fence(self: CephFencing, addresses: Collection[str]) -> None:
        await asyncio.sleep(0)

    patch.setattr(CephFencing, "fence", fence)


@mutant("law 3", seed=1)
def no_clients_on_record(patch: pytest.MonkeyPatch) -> None:
    """A guest runs before its storage clients are on record."""

    async def clients(
        self: CephFencing, record: Incarnation, known: Collection[str] = (), **more: object
    ) -> tuple[str, ...]:
        await asyncio.sleep(0)
        return ()

    patch.setattr(CephFencing, "clients", clients)


@mutant(
    "track record, simulation seed 12",
    seed=69,
    kinds=("supervisor-kill", "host-freeze", "remove", "create", "key-deleted"),
)
def shut_out_unnoticed(patch: pytest.MonkeyPatch) -> None:
    """A lock is written again without asking Ceph."""

    async def shut_out(self: CephFencing, addresses: Collection[str]) -> tuple[str, ...]:
        await asyncio.sleep(0)
        return ()

    patch.setattr(CephFencing, "shut_out", shut_out)


@mutant("law 3", seed=1)
def runs_before_the_record(patch: pytest.MonkeyPatch) -> None:
    """`cont` comes before the swap."""

    def change(view: View, decision: Decision) -> Decision:
        return replace(decision, action=Action.CONTINUE) if decision.action is Action.RECORD else decision

    _with_decisions(patch, change)


# --- decisions --------------------------------------------------------------------------------------------------


@mutant("law 6", seed=1, kinds=("etcd-cut",))
def killed_without_session(patch: pytest.MonkeyPatch) -> None:
    """A guest is killed because its host has no session."""

    def change(view: View, decision: Decision) -> Decision:
        if not view.session_held and view.process is not None and view.process.exit is None:
            return replace(decision, action=Action.KILL)
        return decision

    _with_decisions(patch, change)


@mutant("law 9", seed=1, kinds=("power", "move"))
def released_while_it_lives(patch: pytest.MonkeyPatch) -> None:
    """The lock is let go of when the power button is pressed."""

    def change(view: View, decision: Decision) -> Decision:
        return replace(decision, action=Action.RELEASE) if decision.action is Action.POWERDOWN else decision

    _with_decisions(patch, change)


@mutant("law 12", seed=2, kinds=("host-renamed",))
def any_name_will_do(patch: pytest.MonkeyPatch) -> None:
    """What lives is not asked under which name it was started."""
    _whatever_its_identity(patch)


@mutant("A4, law 11", seed=4, kinds=("etcd-backup", "power", "etcd-restored"))
def any_history_will_do(patch: pytest.MonkeyPatch) -> None:
    """Nobody makes sure that etcd has the same history."""

    async def prove(self: history.History) -> None:
        await asyncio.sleep(0)

    patch.setattr(history.History, "prove", prove)


@mutant("law 1", seed=1, kinds=("etcd-cut",))
def session_for_ever(patch: pytest.MonkeyPatch) -> None:
    """A session counts as held whatever etcd says."""
    patch.setattr(session.Session, "held", property(lambda self: self._create_revision != 0))


# --- what was found in releases, or by outsiders, and was mended (A1 to A11 of that list) ---------------------------


def _whatever_its_identity(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(identity, "judge", lambda wanted, living: (wanted, None))
    patch.setattr(Standing, "objection", lambda self, own: lambda record: None)


@mutant("A1, law 12", seed=1, kinds=("host-renamed",))
def a_name_is_an_identity(patch: pytest.MonkeyPatch) -> None:
    """A host that was renamed takes locks under its former name for a stranger's."""
    right = LockView.claim

    def claim(self: LockView, **told: Any) -> Claim:
        found = right(self, **told)
        return Claim.STRANGER if found is Claim.RENAMED else found

    _whatever_its_identity(patch)
    patch.setattr(LockView, "claim", claim)


@mutant("A2, law 11", seed=6, kinds=("etcd-backup", "restart", "etcd-restored"))
def an_older_lock_is_a_takeover(patch: pytest.MonkeyPatch) -> None:
    """A lock with a lower epoch, as a restored backup has it, ends the QEMU that runs."""
    patch.setattr(View, "is_outdated", property(lambda self: False))


@mutant("A3, law 11", seed=51, kinds=("etcd-backup", "move", "etcd-restored", "supervisor-freeze"))
def nobody_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    """In another history a machine starts before the other hosts have said what runs."""
    patch.setattr(Era, "keeps_waiting", lambda self, storage, now: False)


@mutant("A5, law 11", seed=1, kinds=("etcd-lost",))
def what_is_missing_was_removed(patch: pytest.MonkeyPatch) -> None:
    """Keys that are missing in another history are orders."""

    def judge_orders(self: Dispatch, wishes: object) -> set[str]:
        return set()

    patch.setattr(Dispatch, "_judge_orders", judge_orders)


@mutant("law 11, seed 1071", seed=17, kinds=("host-astray", "guest-deaf", "qmp-answer-lost"))
def the_id_of_a_cluster_is_nothing(patch: pytest.MonkeyPatch) -> None:
    """A copy of etcd that has all keys that were seen is the same etcd."""
    patch.setattr(SimEtcd, "cluster", 0)


@mutant("law 11, seed 1071", seed=95, kinds=("host-astray", "etcd-cut"))
def a_timer_decides(patch: pytest.MonkeyPatch) -> None:
    """In a copy of etcd a machine is taken over after a while from a host that is not there, and fenced."""
    for module in (doubt, start, failover):
        patch.setattr(module, "is_doubted", lambda *told, **more: False)


@mutant("law 11, seed 15", seed=150, kinds=("etcd-backup", "move", "etcd-restored", "supervisor-freeze"))
def a_name_is_a_history(patch: pytest.MonkeyPatch) -> None:
    """A backup that is restored a second time is the history that has its name."""

    async def left_for_good(self: history.History, name: object) -> None:
        await asyncio.sleep(0)

    patch.setattr(history.History, "_left_for_good", left_for_good)


@mutant("law 12, seed 414", seed=43, kinds=("host-renamed", "supervisor-kill"))
def a_name_is_a_machine(patch: pytest.MonkeyPatch) -> None:
    """A host that is given another one's name takes that one's locks for its own of an earlier boot."""
    patch.setattr(Lock, "is_namesakes", lambda self, host, **told: False)


@mutant("A6, law 12", seed=1, kinds=("host-other-prefix",))
def a_prefix_is_no_identity(patch: pytest.MonkeyPatch) -> None:
    """A supervisor with another prefix goes on with what lives, by the keys below that."""
    _whatever_its_identity(patch)


@mutant("A7", seed=1, kinds=("move-to-nobody",))
def a_typo_moves(patch: pytest.MonkeyPatch) -> None:
    """A guest is shut down although the host where it is to run has no session."""
    patch.setattr(View, "stays", property(lambda self: False))


@mutant("A8", seed=7, kinds=("create", "qemu-kill", "supervisor-kill"))
def who_waits_holds_its_lock(patch: pytest.MonkeyPatch) -> None:
    """Of two that name one image, who waits has a lock and a paused QEMU."""

    async def gives_way(self: Sharing, spec: object, conflict: object) -> bool:
        await asyncio.sleep(0)
        return False

    patch.setattr(Sharing, "has_to_wait", lambda self, spec: False)
    patch.setattr(Sharing, "gives_way", gives_way)


@mutant("A9, law 1", seed=1, kinds=("etcd-full",))
def the_session_takes_a_transaction(patch: pytest.MonkeyPatch) -> None:
    """A session is confirmed by a transaction, which an etcd without space refuses."""
    right = session.Session._confirmed

    async def confirmed(self: session.Session) -> KeyValue | None:
        await self._store.txn([self.compare()], [Get(self.key)])
        return await right(self)

    patch.setattr(session.Session, "_confirmed", confirmed)


@mutant("A10, law 4", seed=3, kinds=("rbd-mistaken", "host-power"))
def nobody_says_whose_a_client_is(patch: pytest.MonkeyPatch) -> None:
    """Who takes a lock over shuts out whoever has the disks open, also another instance's QEMU that lives."""

    async def recorded_for(self: LockOwners, clients: object, **how: object) -> Mapping[str, InstanceId]:
        await asyncio.sleep(0)
        return {}

    patch.setattr(LockOwners, "recorded_for", recorded_for)
    patch.setattr(Namesakes, "of", lambda self, instance, images: ())


@mutant("A11, law 7", seed=1, kinds=("etcd-cut", "lock-broken"))
def a_broken_lock_is_ours(patch: pytest.MonkeyPatch) -> None:
    """A QEMU whose lock was broken runs on."""
    right = LockView.claim

    def claim(self: LockView, **told: Any) -> Claim:
        lock, name = self.lock, told["incarnation"]
        is_own = lock is not None and lock.state is LockState.BROKEN and lock.incarnation == name is not None
        return Claim.MINE if is_own else right(self, **told)

    patch.setattr(LockView, "claim", claim)


# --- more laws --------------------------------------------------------------------------------------------------


@mutant("law 4", seed=2, kinds=("etcd-cut",))
def nobody_asks_who_watches(patch: pytest.MonkeyPatch) -> None:
    """A machine whose disks are in use is taken over as soon as its host has no session."""

    async def watchers(self: CephFencing, images: object, lock: object = None) -> tuple[str, ...]:
        await asyncio.sleep(0)
        return ()

    patch.setattr(CephFencing, "watchers", watchers)


@mutant("law 4, seed 240", seed=67, kinds=("rbd-mistaken", "etcd-cut"))
def its_keys_tell_its_disks(patch: pytest.MonkeyPatch) -> None:
    """Who is to be taken over is looked for at the disks that its keys name now, not at those that it has open."""
    right = CephFencing.watchers

    async def watchers(self: CephFencing, images: Any, lock: object = None) -> tuple[str, ...]:
        return await right(self, images)

    patch.setattr(CephFencing, "watchers", watchers)


@mutant("law 5", seed=24)
def any_image_will_do(patch: pytest.MonkeyPatch) -> None:
    """Images without `exclusive-lock` are taken."""
    always = property(lambda self: True, lambda self, value: None)
    for checks in (CephFencing, Law5):
        patch.setattr(checks, "_allow_unfenced", always, raising=False)


@mutant("law 7", seed=24, kinds=("etcd-cut", "move", "host-freeze"))
def files_are_nothing(patch: pytest.MonkeyPatch) -> None:
    """What storage cannot fence may be taken over like a machine without a disk."""

    def storage(spec: Spec) -> Storage:
        found = storage_of(spec)
        return Storage.NONE if found is Storage.UNFENCEABLE else found

    for module in (start, failover, new_qemu):
        patch.setattr(module, "storage_of", storage)


@mutant("law 10", seed=8, kinds=("host-power", "move"))
def placed_for_ever(patch: pytest.MonkeyPatch) -> None:
    """A newer write of `host` does not end a placement."""
    patch.setattr(Placement, "stands", lambda self, host_revision: host_revision > 0)


@mutant("life of an instance", seed=1, kinds=("power", "guest-deaf"))
def told_to_end_at_once(patch: pytest.MonkeyPatch) -> None:
    """A guest that is to be shut down is not asked."""

    def change(view: View, decision: Decision) -> Decision:
        return replace(decision, action=Action.QUIT) if decision.action is Action.POWERDOWN else decision

    _with_decisions(patch, change)


@mutant("life of an instance", seed=5, kinds=("qemu-fails", "qemu-kill"))
def no_pause_between_restarts(patch: pytest.MonkeyPatch) -> None:
    """What ended by itself is started again at once, over and over."""
    patch.setattr(lifecycle, "pauses", lambda state, wish, now: False)


@mutant("removals of many", seed=3, kinds=("mass-removal",))
def many_removals_are_one(patch: pytest.MonkeyPatch) -> None:
    """However many lost their keys at once, all are shut down."""

    def judge(self: MassRemovalHold, removed: object, running: object, now: float) -> set[str]:
        return set()

    patch.setattr(MassRemovalHold, "judge", judge)


# --- live moves -------------------------------------------------------------------------------------------------

MOVING = ("move-a-guest", "move-and-back", "struck-in-a-move")


@mutant("law 13", seed=2, kinds=("move-a-guest",))
def handed_over_at_the_switchover(patch: pytest.MonkeyPatch) -> None:
    """The source hands over before the rest is sent: if that fails, it runs again by itself."""

    async def switch(self: Moves, wish: Any) -> None:
        lock = self._lock.view.lock
        assert lock is not None
        now = given(lock, paused=False, mark=self._context.era().mark)
        await self._lock.write(Change.GIVE, now, wish.ground, offer=self._offer)
        await self._machine.migration.switch()

    patch.setattr(Moves, "_switch", switch)


@mutant("law 13", seed=2, kinds=MOVING)
def goes_on_because_the_source_fell_silent(patch: pytest.MonkeyPatch) -> None:
    """The target goes on by inference: it has all of the guest, and the connection is over."""

    def change(view: View, decision: Decision) -> Decision:
        process = view.process
        waits = process is not None and process.incarnation.incoming and process.stage is Stage.DONE
        return replace(decision, action=Action.ARRIVE) if waits and view.course.link is Link.NONE else decision

    _with_decisions(patch, change)


@mutant("laws 3 and 13", seed=2, kinds=("move-a-guest",))
def the_target_is_on_no_record(patch: pytest.MonkeyPatch) -> None:
    """The lock does not name the clients of the QEMU that a guest is sent to."""
    patch.setattr(moves, "announced", lambda lock, to: announced(lock, replace(to, clients=())))


@mutant("law 13", seed=12, kinds=("move-a-guest", "end-of-a-move"))
def goes_back_unread(patch: pytest.MonkeyPatch) -> None:
    """The source lets its guest go on where nothing was heard of the hand-over, without having read whose it is."""
    right = Moves._give

    async def give(self: Moves, wish: Any) -> None:
        try:
            await right(self, wish)
        except (SwapFailed, EtcdError):
            with contextlib.suppress(MoveRefused):
                await self._machine.migration.go_on()
            raise

    patch.setattr(Moves, "_give", give)


@mutant("a drain stops nobody", seed=2, kinds=("drain",))
def a_live_drain_stops(patch: pytest.MonkeyPatch) -> None:
    """A drain with `live` stops what it cannot move while it runs."""
    patch.setattr(Mode, "stops_guests", property(lambda self: True))


@mutant("a drain ends", seed=1, kinds=("drain",))
def a_drain_says_nothing(patch: pytest.MonkeyPatch) -> None:
    """Why a machine stays is not said."""
    nothing: dict[str, Any] = {"refused": {}, "evicted": frozenset()}
    patch.setattr(evacuation, "plan", lambda *told, **more: replace(plan(*told, **more), **nothing))


# --- statuses, records, watches, tries --------------------------------------------------------------------------


@mutant("life of an instance, seed 7", seed=2, kinds=("guest-shutdown",))
def nobody_sees_who_is_down(patch: pytest.MonkeyPatch) -> None:
    """A guest under `-no-shutdown` that has powered itself off counts as one that runs."""
    patch.setattr(lifecycle, "power_off", lambda view, process: None)


@mutant("a status is so", seed=1, kinds=("qemu-kill",))
def it_runs_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Once a status says that it runs, nothing else is published."""
    right, stuck = Report._may_publish, set[Report]()

    def may_publish(self: Report, view: View) -> bool:
        if self in stuck or not right(self, view):
            return False
        if self.status.phase is Phase.RUNNING:
            stuck.add(self)
        return True

    patch.setattr(Report, "_may_publish", may_publish)


@mutant("the living are on record", seed=1, kinds=("supervisor-upgrade",))
def who_lets_go_forgets(patch: pytest.MonkeyPatch) -> None:
    """A supervisor that ends deletes the records of what lives."""
    right = Worker.detach

    async def detach(self: Worker) -> None:
        await right(self)
        self._machine.directory.drop_incarnation()

    patch.setattr(Worker, "detach", detach)


@mutant("etcd's watch: unique", seed=1, kinds=("move",))
def told_twice(patch: pytest.MonkeyPatch) -> None:
    """An informer tells each change twice."""
    right = Informer._commit

    def commit(self: Informer[Any], stage: Any, revision: int, *, era: int) -> None:
        told: list[Any] = []
        listener = self._on_change
        self._on_change = lambda *words: told.append(words)
        right(self, stage, revision, era=era)
        self._on_change = listener
        for words in told * 2:
            listener(*words)

    patch.setattr(Informer, "_commit", commit)


@mutant("etcd's watch: ordered", seed=1, kinds=("etcd-cut", "restart", "power"))
def the_last_comes_first(patch: pytest.MonkeyPatch) -> None:
    """The events of a batch are applied in the wrong order."""
    right = informer._fill

    async def fill(stage: Any, events: Sequence[Event]) -> None:
        await right(stage, tuple(reversed(events)))

    patch.setattr(informer, "_fill", fill)


@mutant("etcd's watch: resumable", seed=1, kinds=("etcd-cut", "move", "power"))
def lost_behind_a_reconnect(patch: pytest.MonkeyPatch) -> None:
    """What an informer hears first on a new connection is lost."""
    prove, commit = Informer._prove, Informer._commit
    fresh: set[int] = set()

    async def proven(self: Informer[Any]) -> None:
        await prove(self)
        fresh.add(id(self))

    def committed(self: Informer[Any], stage: Any, revision: int, *, era: int) -> None:
        if id(self) in fresh and self.synced.is_set():
            fresh.discard(id(self))
            self.revision = revision
            return
        commit(self, stage, revision, era=era)

    patch.setattr(Informer, "_prove", proven)
    patch.setattr(Informer, "_commit", committed)


@mutant("nothing in silence", seed=4, kinds=("ceph-away", "host-power"))
def it_waits_without_a_word(patch: pytest.MonkeyPatch) -> None:
    """A host that cannot take over, because Ceph does not answer, tries again and says nothing."""
    patch.setattr(failover, "log", structlog.wrap_logger(None, processors=[_said_nothing]))


def _said_nothing(logger: Any, method: str, event: Any) -> Any:
    raise structlog.DropEvent


@mutant("liveness", seed=1, kinds=("qemu-kill",))
def a_pause_without_end(patch: pytest.MonkeyPatch) -> None:
    """What ended by itself twice is not started again."""
    patch.setattr(lifecycle, "pauses", lambda state, wish, now: state.attempt > 1)
    _with_decisions(patch, lambda view, one: replace(one, wake_at=None) if one.row is Row.BACKOFF else one)
