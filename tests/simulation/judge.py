"""What must hold after every step: what is told of a history goes to the checkers of `tests.support.invariants`.

Told of are QEMUs (spawned, let run, ended), what people write, and every change of etcd. What nobody tells of is looked
at between two steps, by `looks.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from kvmsupervisor.adapters.etcd.api import Event
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Status
from tests.simulation.qemu import SimQemu
from tests.support.invariants import ASKED_FIRST, Debts, Epochs, Lasting, Plight, Writers, right_to_end

TTL_S = 15.0
"""`KVM_SESSION_TTL`."""

TAKEOVER_WAIT_S = 60.0
"""`KVM_TAKEOVER_WAIT`."""

SHUTDOWN_S = 20.0
"""`shutdown_timeout` of each machine of the simulation."""

TICK_S = 0.5
"""How often leases and watchers are looked at."""

LOOKED_S = 20.0
"""How long ago a supervisor may have seen that nobody watches the disks of a machine that it takes over."""

RESTARTS, WITHIN_S = 12, 60.0
"""More starts of one machine in so many seconds are none with a growing pause; by chance, one in a million."""

MOMENT_S = 1e-3
"""Less than that no guest counts."""

EARLIER_S = 60.0
"""How long before a QEMU was spawned an order may have been given that still ends it: it was on its way."""


@dataclass(frozen=True, slots=True)
class Violation:
    """What must not be.

    Attributes:
        at: virtual time.
        law: which kind; a shrunk history must break the same one.
        what: for people.
    """

    at: float
    law: str
    what: str

    def __str__(self) -> str:
        return f"{self.at:.3f} [{self.law}] {self.what}"


class Judge:
    """The checkers of one history.

    Args:
        time: virtual.
        tell: told of each event, for the trace.
        exists: whether etcd has a key.
        belongs: whether an instance is to run on a host, as people want it.
        wanted: whether it is to run at all.
        at_home: the same, as the keys stand in etcd.
        leaves: whether a placement has it leave that host: True: also by a stop; False: only while it runs; None: not.
        watched: whether anybody has an image open.
        shut_out: whether storage shuts out a client.
    """

    def __init__(
        self,
        time: Callable[[], float],
        *,
        layout: Layout,
        tell: Callable[[str, str], None],
        exists: Callable[[str], bool],
        belongs: Callable[[str, str], bool],
        wanted: Callable[[str], bool],
        at_home: Callable[[str, str], bool],
        leaves: Callable[[str, str], bool | None],
        watched: Callable[[str], bool],
        shut_out: Callable[[str], bool],
    ) -> None:
        self.violations: list[Violation] = []
        self.qemus: dict[str, list[SimQemu]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self._time = time
        self._layout = layout
        self._tell = tell
        self._exists = exists
        self._belongs = belongs
        self._wanted = wanted
        self._at_home = at_home
        self._leaves = leaves
        self._watched = watched
        self._shut_out = shut_out
        # When people gave an order that ends a guest, by instance; where to, if that was a move.
        self._orders: dict[str, float] = {}
        self._moves: dict[str, str | None] = {}
        # Address → whose it is; incarnations to which a guest was handed over.
        self._clients: dict[str, SimQemu] = {}
        self._given: set[str] = set()
        # By instance: what its lock was, what is to be fenced by it, clients of those that may run; its status.
        self._epochs: dict[str, Epochs] = defaultdict(Epochs)
        self._debts: dict[str, Debts] = defaultdict(Debts)
        self._statuses: dict[str, tuple[bytes, Status | None]] = {}
        # Instances whose status people have deleted: it is written again when there is something new to say.
        self.lost_statuses: set[str] = set()
        # By instance: the revision of each of its keys.
        self._revisions: dict[str, dict[str, int]] = defaultdict(dict)
        # Incarnations that have closed their disks.
        self._closed: set[str] = set()
        self._writers = Writers()
        self._looks = 0
        self._recorded: dict[str, frozenset[str]] = {}
        self._locks: dict[str, Lock] = {}
        self._by_people: set[int] = set()
        # Incarnations whose lock another one took, or an operator broke.
        self._superseded: set[str] = set()
        self._broken: set[str] = set()
        # Instance → the incarnations that it had before all was forgotten of it.
        self._former: dict[str, set[str]] = defaultdict(set)
        # In another cluster's etcd: the lock's key → what was written into it last.
        self._elsewhere: dict[bytes, Lock] = {}
        # Incarnations whose host has written their lock there itself: it is a dead one there once it has left.
        self._published: set[str] = set()
        # Incarnation → its epoch.
        self._ranks: dict[str, int] = {}
        # Host → when its session's key was deleted; image → when nobody watched it last.
        self._session_gone: dict[str, float] = {}
        self._unwatched: dict[str, float] = {}
        # Host → the session that it believes in, where etcd has none such.
        self._mistaken: Lasting[str] = Lasting()
        self._hasty: dict[str, float] = {}
        self._spawns: dict[str, list[float]] = defaultdict(list)

    def wrong(self, law: str, what: str) -> None:
        self.violations.append(Violation(self._time(), law, what))
        self._tell("judge", f"[{law}] {what}")

    # --- people -----------------------------------------------------------------------------------------------

    def ordered(self, instance: str, why: str, *, at_once: bool = False, to: str | None = None) -> None:
        """A person gave an order that ends this guest, or starts it again.

        Args:
            instance: whose.
            why: for people.
            at_once: whether without asking it.
            to: the host that it is to move to, where it is that.
        """
        self._orders[instance] = self._time()
        self._moves[instance] = to
        if at_once:
            self._hasty[instance] = self._time()
        self._tell("people", f"{instance}: {why}")

    def wrote(self, revision: int) -> None:
        """People wrote the keys of this revision."""
        self._by_people.add(revision)

    def broken(self, instance: str) -> None:
        """A person broke its lock. Whoever lives of it all the same is that person's mistake, and is to be ended."""
        self._broken.update(qemu.incarnation for qemu in self.living(instance))

    # --- sessions and storage ---------------------------------------------------------------------------------

    def believes(self, host: str, key: str | None, *, exists: bool) -> None:
        """A host believes that it has this session (None: it has none), and etcd has that, or has not."""
        lasted_s = self._mistaken.see(host, None if exists else key, now=self._time(), bound_s=TTL_S + 2 * TICK_S)
        if lasted_s is not None:
            self.wrong("law 1", f"{host} believes in {key}, which etcd has not had for {lasted_s:.1f} s")

    def lost_session(self, host: str) -> None:
        """A host that nothing had happened to says that it has lost its session."""
        self.wrong("law 1", f"{host} has lost its session, and nothing kept it from renewing it")

    def unwatched(self, image: str) -> None:
        """Nobody watches this image."""
        self._unwatched[image] = self._time()

    def shut_out(self, qemu: SimQemu) -> None:
        """Storage shuts out the client of a living QEMU."""
        self.counts["shut out alive"] += 1
        lock = self._locks.get(qemu.instance)
        if qemu.incarnation in self._published & self._superseded:
            # Taken over elsewhere, where its host had published it and is not any more (docs/weaknesses.md, 9).
            return
        holds = {LockState.RUNNING, LockState.MIGRATING, LockState.GIVEN}
        if lock is not None and lock.state in holds and lock.incarnation == qemu.incarnation:
            self.wrong("law 4", f"{qemu.instance}: {qemu.pid} on {qemu.host} is shut out, and the lock is its own")

    # --- QEMUs ------------------------------------------------------------------------------------------------

    def spawned(self, qemu: SimQemu) -> None:
        self.counts["spawned"] += 1
        self.qemus[qemu.instance].append(qemu)
        self._clients[qemu.client] = qemu
        self._tell(qemu.host, f"spawned {qemu.instance} {qemu.pid}{' for a guest that comes' * qemu.is_arrival}")
        if qemu.is_arrival:
            return
        since = max(self._time() - WITHIN_S, self._orders.get(qemu.instance, 0.0))
        spawns = [at for at in self._spawns[qemu.instance] if at > since]
        self._spawns[qemu.instance] = [*spawns, self._time()]
        if len(spawns) >= RESTARTS:
            self._spawns[qemu.instance] = []
            self.wrong("restarts pause", f"{qemu.instance}: {len(spawns) + 1} starts in {WITHIN_S:g} s")

    def continued(self, qemu: SimQemu, *, again: bool = False) -> None:
        """Its guest runs; `again`: it ran in this QEMU before."""
        self.counts["ran"] += 1
        self._tell(qemu.host, f"runs {qemu.instance} {qemu.pid}")
        self._look_at_guest(qemu)
        recorded = self._recorded.get(qemu.incarnation)
        if recorded is None:
            self.wrong("law 3", f"{qemu.instance}: {qemu.pid} runs, and no lock ever said that it may")
        elif qemu.image is not None and qemu.client not in recorded:
            self.wrong("law 3", f"{qemu.instance}: {qemu.pid} runs, and {qemu.client} is on no record")
        if not qemu.kernel.ceph.has_exclusive_lock(qemu.image):
            self.wrong("law 5", f"{qemu.instance}: {qemu.pid} runs, and {qemu.image} has no exclusive lock")
        # One that is shut out itself may go on until its supervisor has read that, if that was frozen: nothing lands.
        owed = self._debts[qemu.instance].before(qemu.incarnation) if qemu.writes and not again else {}
        for address, whose in owed.items():
            if not self._is_done_with(address, whose) and not self._stands_for(qemu, address):
                self.wrong("law 4", f"{qemu.instance}: {qemu.pid} runs, and {address} of {whose} is not shut out")
        if qemu.disk is not None:
            self.look_at_writers([qemu])
            self.look_at_writers(one for one in self._all() if one.disk == qemu.disk)

    def _is_done_with(self, address: str, whose: str) -> bool:
        """Whether a client writes no more: it is shut out, or has closed its disks."""
        qemu = self._clients.get(address)
        return (
            self._shut_out(address) or whose in self._closed or (qemu is not None and qemu.incarnation in self._closed)
        )

    def _is_harmless(self, address: str) -> bool:
        """Whether a client writes no more, or is that of a QEMU that waited for a guest which never went on in it."""
        qemu = self._clients.get(address)
        return self._is_done_with(address, "") or (qemu is not None and qemu.is_arrival and qemu.ran_at is None)

    def _stands_for(self, qemu: SimQemu, address: str) -> bool:
        """Whether a client is that of a QEMU whose guest came to this one by hand-over, or that never had any."""
        other = self._clients.get(address)
        if other is None or qemu.incarnation not in self._given:
            return False
        return other.ran_at is None or (other.boot is qemu.boot and other.run_state != "running")

    def _look_at_guest(self, qemu: SimQemu) -> None:
        """Law 13: a guest runs in one QEMU, and goes on with all that it has counted."""
        others = [one for one in self.qemus[qemu.instance] if one is not qemu and one.boot is qemu.boot]
        for one in others:
            if one.alive and one.run_state == "running" and not self._shut_out(one.client):
                self.wrong(
                    "law 13", f"{qemu.instance}: {qemu.pid} on {qemu.host} runs, and {one.pid} on {one.host} does"
                )
        counted_s = max((one.counted_s for one in others if one.ran_at is not None), default=0.0)
        if counted_s > qemu.counted_s + MOMENT_S:
            lacks_s = counted_s - qemu.counted_s
            self.wrong(
                "law 13", f"{qemu.instance}: {qemu.pid} on {qemu.host} goes on, and lacks the last {lacks_s:.3f} s"
            )

    def _all(self) -> Iterator[SimQemu]:
        return (qemu for qemus in self.qemus.values() for qemu in qemus)

    def look_at_writers(self, qemus: Iterable[SimQemu]) -> None:
        """Of these, some write now."""
        self._looks += 1
        for qemu in qemus:
            if qemu.disk is None or not qemu.writes or qemu.ran_at is None or qemu.incarnation in self._broken:
                continue
            later = self._writers.wrote(qemu.disk, qemu.incarnation, rank=qemu.ran_at, at=self._looks)
            if later is not None:
                self.wrong("two writers", f"{qemu.disk}: {qemu.pid} on {qemu.host} writes, and {later} has written")

    def ended_by_us(self, qemu: SimQemu, how: str) -> None:
        """A supervisor ends a QEMU."""
        self._tell(qemu.host, f"{how} for {qemu.instance} {qemu.pid}")
        qemu.bears.append(how)
        why = right_to_end(self._plight(qemu))
        if why is None:
            self.counts["wrongly ended"] += 1
            self.wrong("nothing but an order", f"{qemu.instance}: {how} for {qemu.pid} on {qemu.host}, for nothing")
        elif why in ASKED_FIRST and how in {"quit", "SIGKILL"} and not qemu.was_hindered:
            since = qemu.since - EARLIER_S
            asked_for_s = 0.0 if qemu.asked_at is None else self._time() - qemu.asked_at
            if asked_for_s < SHUTDOWN_S - TICK_S and self._hasty.get(qemu.instance, -1.0) < since:
                said = f"{how} for {qemu.pid} on {qemu.host}, which was asked for {asked_for_s:.1f} s"
                self.wrong("a guest is asked first", f"{qemu.instance}: {said}")

    def _plight(self, qemu: SimQemu) -> Plight:
        leaves = self._leaves(qemu.instance, qemu.host)
        belongs = self._belongs(qemu.instance, qemu.host)
        return Plight(
            ran=qemu.ran_at is not None,
            stands=qemu.run_state != "running",
            lost=qemu.incarnation in self._superseded | self._broken or self._is_outranked(qemu),
            shut_out=not qemu.writes,
            ordered=self._orders.get(qemu.instance, -1.0) >= qemu.since - EARLIER_S,
            # One that is placed elsewhere, and goes only while it runs, is not stopped for that.
            elsewhere=leaves or not (belongs or (leaves is not None and self._wanted(qemu.instance))),
        )

    def _is_outranked(self, qemu: SimQemu) -> bool:
        """Whether it has no disk, and the other cluster's lock is a later one's (docs/etcd-restored.md, "Limits")."""
        there = self._elsewhere.get(self._layout.lock_key(InstanceId(qemu.instance)).encode())
        here = self._locks.get(qemu.instance) if qemu.incarnation in self._published else None
        epoch = self._ranks.get(qemu.incarnation)
        if qemu.disk is not None or epoch is None:
            return False
        others = [(lock.epoch, lock.incarnation) for lock in (there, here) if lock is not None]
        return any((epoch, qemu.incarnation) < other for other in others)

    def ended(self, qemu: SimQemu) -> None:
        self.counts["ended"] += 1
        if qemu.status is not None and qemu.status.code == 0:
            self._closed.add(qemu.incarnation)
        self._tell(qemu.host, f"ended {qemu.instance} {qemu.pid} {qemu.status}")

    # --- etcd -------------------------------------------------------------------------------------------------

    def changed(self, event: Event) -> None:
        """A key of etcd changed."""
        key = event.kv.key.decode(errors="replace")
        by_people = event.kv.mod_revision in self._by_people
        prefix, lock_of = f"{self._layout.prefix}/", self._layout.id_of_lock(key)
        if lock_of is None and not key.startswith(prefix):
            status, hosts = f"{self._layout.facts}/instances/", f"{self._layout.facts}/hosts/"
            if event.deleted and key.startswith(hosts):
                self._session_gone[key.removeprefix(hosts)] = self._time()
            if key.startswith(status):
                self._status_is(key.removeprefix(status), event, by_people=by_people)
            return
        instance, _, name = key.removeprefix(prefix).partition("/")
        if lock_of is None:
            if event.deleted:
                self._revisions[instance].pop(name, None)
            else:
                self._revisions[instance][name] = event.kv.mod_revision
            if not by_people:
                self.wrong("law 10", f"{key} was written by a supervisor")
            return
        if event.deleted:
            self._lock_gone(lock_of, by_people=by_people)
        else:
            self._lock_is(lock_of, event.kv.value)

    def _status_is(self, instance: str, event: Event, *, by_people: bool) -> None:
        """A status was written, or deleted: never that of a QEMU that lives."""
        if not event.deleted:
            self._statuses[instance] = event.kv.value, None
            self.lost_statuses.discard(instance)
            return
        if by_people:
            self.lost_statuses.add(instance)
        status = self.status(instance)
        self._statuses.pop(instance, None)
        if not by_people and status is not None:
            for qemu in self.living(instance):
                if (qemu.host, qemu.pid) == (status.host, status.pid) and qemu.incarnation not in self._superseded:
                    self.wrong("the living are on record", f"{instance}: its status is deleted, and {qemu.pid} lives")
        if instance not in self._locks:
            # All is forgotten of it: the next one of that name is another machine.
            self._forget_epochs(instance)

    def _forget_epochs(self, instance: str) -> None:
        """Neither lock nor status is there. People may have deleted both: then who lives of it may be overtaken."""
        if (epochs := self._epochs.pop(instance, None)) is not None:
            self._former[instance].update(epochs.of)

    def another_history_elsewhere(self, locks: Mapping[bytes, bytes]) -> None:
        """Another cluster's etcd was replaced by a copy with these locks, by their keys."""
        found = {key: Lock.from_json(value) for key, value in locks.items()}
        self._elsewhere = {key: lock for key, lock in found.items() if lock is not None}
        self._published.clear()

    def changed_elsewhere(self, event: Event) -> None:
        """A key of another cluster's etcd changed: a host that is there by mistake may run its guests by its locks."""
        lock = None if event.deleted else Lock.from_json(event.kv.value)
        if lock is None:
            return
        before, self._elsewhere[event.kv.key] = self._elsewhere.get(event.kv.key), lock
        self._ranks[lock.incarnation] = lock.epoch
        self._published.add(lock.incarnation)
        if before is not None and before.incarnation != lock.incarnation:
            # Published there, and taken over there.
            self._superseded.add(before.incarnation)
        if lock.state in {LockState.RUNNING, LockState.GIVEN}:
            self._recorded[lock.incarnation] = frozenset(lock.clients)

    def _lock_is(self, instance: str, value: bytes) -> None:
        lock = Lock.from_json(value)
        if lock is None:
            return
        before = self._locks.get(instance)
        self._locks[instance] = lock
        self._ranks[lock.incarnation] = lock.epoch
        epochs, debts = self._epochs[instance], self._debts[instance]
        if lock.state is LockState.GIVEN and (before is None or before.incarnation != lock.incarnation):
            self._handed_over(instance, before, lock)
        is_new = lock.incarnation not in epochs.of
        if is_new:
            self._superseded.update(epochs.of, self._former.pop(instance, ()))
            for address, whose in debts.lost_by(lock).items():
                if not self._is_done_with(address, whose):
                    self.wrong("law 4", f"{instance}: the lock of {lock.host} does not tell of {address} of {whose}")
        for what in epochs.saw(lock):
            self.wrong("law 2", f"{instance}: {what}")
        debts.saw(lock)
        if is_new:
            self._is_new_incarnations(instance, before, lock)
        if lock.state in {LockState.RUNNING, LockState.GIVEN}:
            self._recorded[lock.incarnation] = frozenset(lock.clients)

    def _is_new_incarnations(self, instance: str, before: Lock | None, lock: Lock) -> None:
        """The lock names another incarnation than it ever did: it was taken, handed over, or written again."""
        self.counts["taken"] += 1
        # One that is written again has its QEMU there, whatever the keys say.
        is_taken = lock.state is not LockState.RUNNING
        # Who has it may start it again while the host where it is to run was not there a moment ago.
        is_new_here = is_taken and (before is None or before.host != lock.host)
        if is_new_here and not self._at_home(instance, lock.host):
            self.wrong("law 2", f"{instance}: {lock.host} took its lock, and it is to run elsewhere")
        if not self._exists(self._layout.session_key(lock.host)):
            self.wrong("law 2", f"{instance}: {lock.host} took its lock, and has no session")
        # A host that was renamed takes its own.
        is_anothers = before is not None and before.host != lock.host and before.boot_id != lock.boot_id
        if is_taken and is_anothers and lock.state is not LockState.GIVEN:
            assert before is not None
            self.counts["taken over"] += 1
            self._look_at_wait(instance, before)
            if before.state is not LockState.BROKEN and self._exists(self._layout.session_key(before.host)):
                self.wrong("law 4", f"{instance}: {lock.host} took the lock of {before.host}, which has a session")

    def _handed_over(self, instance: str, before: Lock | None, lock: Lock) -> None:
        """Law 13: the source hands over once, to the QEMU that it has on record, which has all of the guest."""
        self.counts["handed over"] += 1
        self._given.add(lock.incarnation)
        if self._moves.get(instance) == lock.host:
            # That order is carried out: it ends this guest no more.
            self._orders.pop(instance, None)
            self._moves.pop(instance, None)
        announced = None if before is None or before.state is not LockState.MIGRATING else before.to
        if announced is None or announced.incarnation != lock.incarnation:
            self.wrong(
                "law 13", f"{instance}: handed over to {lock.incarnation} on {lock.host}, which was not announced"
            )
            return
        assert before is not None
        for qemu in self.living(instance):
            if qemu.incarnation == before.incarnation and qemu.run_state == "running":
                self.wrong("law 13", f"{instance}: handed over, and {qemu.pid} on {qemu.host} runs its guest")
            if qemu.incarnation == lock.incarnation and not qemu.migration.has_all:
                self.wrong("law 13", f"{instance}: handed over, and {qemu.pid} on {qemu.host} has not all of the guest")

    def _look_at_wait(self, instance: str, before: Lock) -> None:
        """Law 4: who is gone and has its disks open has probably lost etcd only, and is waited for."""
        now = self._time()
        image = next((one.image for one in self.qemus[instance] if one.incarnation == before.incarnation), None)
        if image is None or before.state is not LockState.RUNNING or before.storage is not Storage.RBD:
            return
        gone_for_s = now - self._session_gone.get(before.host, -1e9)
        watched_for_s = now - self._unwatched.get(image, 0.0)
        if gone_for_s < TAKEOVER_WAIT_S - TICK_S and watched_for_s > LOOKED_S and self._watched(image):
            self.wrong("law 4", f"{instance}: taken after {gone_for_s:.1f} s, and its disks are in use")

    def _lock_gone(self, instance: str, *, by_people: bool) -> None:
        lock = self._locks.pop(instance, None)
        self._debts[instance].saw(None)
        if instance not in self._statuses:
            self._forget_epochs(instance)
        if by_people:
            # With it goes what says that it was broken.
            self._unbreak(instance)
        if lock is None or by_people:
            return
        self.counts["released"] += 1
        alive = [qemu for qemu in self.qemus[instance] if qemu.alive and qemu.incarnation == lock.incarnation]
        if alive:
            self.wrong("law 9", f"{instance}: its lock was let go of, and {alive[0].pid} on {alive[0].host} lives")
        if unfenced := [address for address in lock.fence if not self._is_harmless(address)]:
            self.wrong("law 4", f"{instance}: its lock was let go of, and {unfenced} are not shut out")

    def _unbreak(self, instance: str) -> None:
        """Nothing tells any more that its lock was broken: whoever lives of it may write it again."""
        self._broken.difference_update(qemu.incarnation for qemu in self.living(instance))

    def another_history(
        self,
        locks: Mapping[str, bytes],
        statuses: Mapping[str, bytes],
        revisions: Mapping[str, Mapping[str, int]],
        *,
        named: bool,
    ) -> None:
        """Etcd was restored, or emptied: these are the locks and statuses in it, and the revisions of wishes.

        A host that has just booted may be the first to name an emptied one; then epochs begin again
        (docs/etcd-restored.md, "Limits").
        """
        self._revisions.clear()
        for name, keys in revisions.items():
            self._revisions[name].update(keys)
        self._statuses = {name: (value, None) for name, value in statuses.items()}
        self._debts.clear()
        for epochs in self._epochs.values():
            epochs.begin_again(from_one=not named)
        self._locks = {name: lock for name, value in locks.items() if (lock := Lock.from_json(value)) is not None}
        for name, lock in self._locks.items():
            self._debts[name].saw(lock)
        for name in self.qemus:
            if (found := self._locks.get(name)) is None or found.state is not LockState.BROKEN:
                self._unbreak(name)
        self._by_people.clear()
        self._session_gone.clear()

    def status(self, instance: str) -> Status | None:
        """As it stands; None when there is none."""
        if instance not in self._statuses:
            return None
        value, status = self._statuses[instance]
        if status is None and (status := Status.from_json(value)) is not None:
            self._statuses[instance] = value, status
        return status

    def newest(self, instance: str) -> int:
        """The revision of the newest of its keys; 0 without any."""
        return max(self._revisions[instance].values(), default=0)

    def with_a_status(self) -> list[str]:
        """The instances that have one."""
        return list(self._statuses)

    def lock(self, instance: str) -> Lock | None:
        """As it stands."""
        return self._locks.get(instance)

    def was_broken(self, qemu: SimQemu) -> bool:
        """Whether its lock was broken while it lived, so that it is to be ended."""
        return qemu.incarnation in self._broken

    def living(self, instance: str) -> list[SimQemu]:
        return [qemu for qemu in self.qemus[instance] if qemu.alive]
