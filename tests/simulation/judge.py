"""What must hold after every step, and at the end: pure checkers over what is told of a history.

Told of are QEMUs (spawned, let run, ended), what people write, and every change of etcd.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from kvmsupervisor.adapters.etcd.api import Event
from kvmsupervisor.domain.keys import Layout
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from tests.simulation.qemu import SimQemu

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

EARLIER_S = 60.0
"""How long before a QEMU was spawned an order may have been given that still ends it: it was on its way."""


SAID_SO, ELSEWHERE = "a person said so", "people want it elsewhere, or not at all"
ASKED_FIRST = {SAID_SO, ELSEWHERE}
"""Why a guest may be ended that is asked to shut down first."""


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
        at_home: the same, as the keys stand in etcd.
        watched: whether anybody has an image open.
    """

    def __init__(
        self,
        time: Callable[[], float],
        *,
        layout: Layout,
        tell: Callable[[str, str], None],
        exists: Callable[[str], bool],
        belongs: Callable[[str, str], bool],
        at_home: Callable[[str, str], bool],
        watched: Callable[[str], bool],
    ) -> None:
        self.violations: list[Violation] = []
        self.qemus: dict[str, list[SimQemu]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self._time = time
        self._layout = layout
        self._tell = tell
        self._exists = exists
        self._belongs = belongs
        self._at_home = at_home
        self._watched = watched
        # When people gave an order that ends a guest, by instance.
        self._orders: dict[str, float] = {}
        # By instance, whose lock says what: epochs by incarnation, clients of those that may run.
        self._epochs: dict[str, dict[str, int]] = defaultdict(dict)
        self._recorded: dict[str, frozenset[str]] = {}
        self._locks: dict[str, Lock] = {}
        self._by_people: set[int] = set()
        # Incarnations whose lock another one took, or an operator broke.
        self._superseded: set[str] = set()
        self._broken: set[str] = set()
        # Host → when its session's key was deleted; image → when nobody watched it last.
        self._session_gone: dict[str, float] = {}
        self._unwatched: dict[str, float] = {}
        # Host → the session that it believes in, and since when etcd has none such.
        self._mistaken: dict[str, tuple[str, float]] = {}
        self._hasty: dict[str, float] = {}
        self._spawns: dict[str, list[float]] = defaultdict(list)

    def wrong(self, law: str, what: str) -> None:
        self.violations.append(Violation(self._time(), law, what))
        self._tell("judge", f"[{law}] {what}")

    # --- people -----------------------------------------------------------------------------------------------

    def ordered(self, instance: str, why: str, *, at_once: bool = False) -> None:
        """A person gave an order that ends this guest, or starts it again; `at_once`: without asking it."""
        self._orders[instance] = self._time()
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
        if key is None or exists:
            self._mistaken.pop(host, None)
            return
        _, since = self._mistaken.setdefault(host, (key, self._time()))
        if self._time() - since > TTL_S + 2 * TICK_S:
            self._mistaken[host] = key, self._time()
            self.wrong("law 1", f"{host} believes in {key}, which etcd has not had for longer than its TTL")

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
        if lock is not None and lock.state is LockState.RUNNING and lock.incarnation == qemu.incarnation:
            self.wrong("law 4", f"{qemu.instance}: {qemu.pid} on {qemu.host} is shut out, and the lock is its own")

    # --- QEMUs ------------------------------------------------------------------------------------------------

    def spawned(self, qemu: SimQemu) -> None:
        self.counts["spawned"] += 1
        self.qemus[qemu.instance].append(qemu)
        since = max(self._time() - WITHIN_S, self._orders.get(qemu.instance, 0.0))
        spawns = [at for at in self._spawns[qemu.instance] if at > since]
        self._spawns[qemu.instance] = [*spawns, self._time()]
        if len(spawns) >= RESTARTS:
            self._spawns[qemu.instance] = []
            self.wrong("restarts pause", f"{qemu.instance}: {len(spawns) + 1} starts in {WITHIN_S:g} s")
        self._tell(qemu.host, f"spawned {qemu.instance} {qemu.pid}")

    def continued(self, qemu: SimQemu) -> None:
        """Its guest runs."""
        self.counts["ran"] += 1
        self._tell(qemu.host, f"runs {qemu.instance} {qemu.pid}")
        recorded = self._recorded.get(qemu.incarnation)
        if recorded is None:
            self.wrong("law 3", f"{qemu.instance}: {qemu.pid} runs, and no lock ever said that it may")
        elif qemu.image is not None and qemu.client not in recorded:
            self.wrong("law 3", f"{qemu.instance}: {qemu.pid} runs, and {qemu.client} is on no record")
        if not qemu.kernel.ceph.has_exclusive_lock(qemu.image):
            self.wrong("law 5", f"{qemu.instance}: {qemu.pid} runs, and {qemu.image} has no exclusive lock")
        self.look_at_writers(qemu.disk)

    def look_at_writers(self, disk: str | None) -> None:
        """At most one may write to a disk; None is no disk."""
        if disk is None:
            return
        found = (qemu for qemus in self.qemus.values() for qemu in qemus if qemu.disk == disk)
        writers = [qemu for qemu in found if qemu.writes and qemu.incarnation not in self._broken]
        if len(writers) > 1:
            self.wrong("two writers", f"{disk}: " + ", ".join(f"{one.pid} on {one.host}" for one in writers))

    def ended_by_us(self, qemu: SimQemu, how: str) -> None:
        """A supervisor ends a QEMU."""
        self._tell(qemu.host, f"{how} for {qemu.instance} {qemu.pid}")
        qemu.bears.append(how)
        why = self._right(qemu)
        if why is None:
            self.counts["wrongly ended"] += 1
            self.wrong("nothing but an order", f"{qemu.instance}: {how} for {qemu.pid} on {qemu.host}, for nothing")
        elif why in ASKED_FIRST and how in {"quit", "SIGKILL"} and not qemu.was_hindered:
            since = qemu.since - EARLIER_S
            asked_for_s = 0.0 if qemu.asked_at is None else self._time() - qemu.asked_at
            if asked_for_s < SHUTDOWN_S - TICK_S and self._hasty.get(qemu.instance, -1.0) < since:
                said = f"{how} for {qemu.pid} on {qemu.host}, which was asked for {asked_for_s:.1f} s"
                self.wrong("a guest is asked first", f"{qemu.instance}: {said}")

    def _right(self, qemu: SimQemu) -> str | None:
        """Why this one may be ended; None when it may not."""
        if qemu.ran_at is None:
            return "it never ran"
        if qemu.run_state != "running":
            return "its guest has stopped by itself"
        if qemu.incarnation in self._superseded | self._broken:
            return "its lock was taken over"
        if not qemu.writes:
            return "it is shut out"
        if self._orders.get(qemu.instance, -1.0) >= qemu.since - EARLIER_S:
            return SAID_SO
        return None if self._belongs(qemu.instance, qemu.host) else ELSEWHERE

    def ended(self, qemu: SimQemu) -> None:
        self.counts["ended"] += 1
        self._tell(qemu.host, f"ended {qemu.instance} {qemu.pid} {qemu.status}")

    # --- etcd -------------------------------------------------------------------------------------------------

    def changed(self, event: Event) -> None:
        """A key of etcd changed."""
        key = event.kv.key.decode(errors="replace")
        by_people = event.kv.mod_revision in self._by_people
        prefix = f"{self._layout.prefix}/"
        if not key.startswith(prefix):
            status, hosts = f"{self._layout.facts}/instances/", f"{self._layout.facts}/hosts/"
            if event.deleted and key.startswith(hosts):
                self._session_gone[key.removeprefix(hosts)] = self._time()
            if event.deleted and key.startswith(status) and (name := key.removeprefix(status)) not in self._locks:
                # All is forgotten of it: the next one of that name is another machine.
                self._epochs.pop(name, None)
            return
        instance, _, name = key.removeprefix(prefix).partition("/")
        if name != "lock":
            if not by_people:
                self.wrong("law 10", f"{key} was written by a supervisor")
            return
        if event.deleted:
            self._lock_gone(instance, by_people=by_people)
        else:
            self._lock_is(instance, event.kv.value)

    def changed_elsewhere(self, event: Event) -> None:
        """A key of another cluster's etcd changed: a host that is there by mistake may run its guests by its locks."""
        lock = None if event.deleted else Lock.from_json(event.kv.value)
        if lock is not None and lock.state is LockState.RUNNING:
            self._recorded[lock.incarnation] = frozenset(lock.clients)

    def _lock_is(self, instance: str, value: bytes) -> None:
        lock = Lock.from_json(value)
        if lock is None:
            return
        before = self._locks.get(instance)
        self._locks[instance] = lock
        known = self._epochs[instance]
        if lock.incarnation not in known:
            if lock.epoch in known.values():
                self.wrong("no epoch twice", f"{instance}: epoch {lock.epoch} of {lock.host} was used before")
            if before is not None and lock.epoch <= before.epoch:
                self.wrong("epochs grow", f"{instance}: {lock.epoch} after {before.epoch}")
            self._superseded.update(known)
            known[lock.incarnation] = lock.epoch
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
            if is_taken and before is not None and before.host != lock.host and before.boot_id != lock.boot_id:
                self.counts["taken over"] += 1
                self._look_at_wait(instance, before)
                if before.state is not LockState.BROKEN and self._exists(self._layout.session_key(before.host)):
                    self.wrong("law 4", f"{instance}: {lock.host} took the lock of {before.host}, which has a session")
        if lock.state is LockState.RUNNING:
            self._recorded[lock.incarnation] = frozenset(lock.clients)

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
        if lock is None or by_people:
            return
        self.counts["released"] += 1
        alive = [qemu for qemu in self.qemus[instance] if qemu.alive and qemu.incarnation == lock.incarnation]
        if alive:
            self.wrong("law 9", f"{instance}: its lock was let go of, and {alive[0].pid} on {alive[0].host} lives")

    def another_history(self, locks: dict[str, bytes]) -> None:
        """Etcd was restored, or emptied: these are the locks in it."""
        self._locks = {name: lock for name, value in locks.items() if (lock := Lock.from_json(value)) is not None}
        self._by_people.clear()
        self._session_gone.clear()

    def lock(self, instance: str) -> Lock | None:
        """As it stands."""
        return self._locks.get(instance)

    def was_broken(self, qemu: SimQemu) -> bool:
        """Whether its lock was broken while it lived, so that it is to be ended."""
        return qemu.incarnation in self._broken

    def living(self, instance: str) -> list[SimQemu]:
        return [qemu for qemu in self.qemus[instance] if qemu.alive]
