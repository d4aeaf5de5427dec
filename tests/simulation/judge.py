"""What must hold after every step, and at the end: pure checkers over what is told of a history.

Told of are QEMUs (spawned, let run, ended), what people write, and every change of etcd.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from kvmsupervisor.adapters.etcd.api import Event
from kvmsupervisor.domain.keys import Layout
from kvmsupervisor.domain.lock import Lock, LockState
from tests.simulation.qemu import SimQemu, image_of

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
        belongs: whether an instance is to run on a host, as its keys stand.
    """

    def __init__(
        self,
        time: Callable[[], float],
        layout: Layout,
        tell: Callable[[str, str], None],
        exists: Callable[[str], bool],
        belongs: Callable[[str, str], bool],
    ) -> None:
        self.violations: list[Violation] = []
        self.qemus: dict[str, list[SimQemu]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self._time = time
        self._layout = layout
        self._tell = tell
        self._exists = exists
        self._belongs = belongs
        # When people gave an order that ends a guest, by instance.
        self._orders: dict[str, float] = {}
        # By instance, whose lock says what: epochs by incarnation, clients of those that may run.
        self._epochs: dict[str, dict[str, int]] = defaultdict(dict)
        self._recorded: dict[str, frozenset[str]] = {}
        self._locks: dict[str, Lock] = {}
        self._by_people: set[int] = set()
        # Incarnations whose lock another one took.
        self._superseded: set[str] = set()

    def wrong(self, law: str, what: str) -> None:
        self.violations.append(Violation(self._time(), law, what))
        self._tell("judge", f"[{law}] {what}")

    # --- people -----------------------------------------------------------------------------------------------

    def ordered(self, instance: str, why: str) -> None:
        """A person gave an order that ends this guest, or starts it again."""
        self._orders[instance] = self._time()
        self._tell("people", f"{instance}: {why}")

    def wrote(self, revision: int) -> None:
        """People wrote the keys of this revision."""
        self._by_people.add(revision)

    # --- QEMUs ------------------------------------------------------------------------------------------------

    def spawned(self, qemu: SimQemu) -> None:
        self.counts["spawned"] += 1
        self.qemus[qemu.instance].append(qemu)
        self._tell(qemu.host, f"spawned {qemu.instance} {qemu.pid}")

    def continued(self, qemu: SimQemu) -> None:
        """Its guest runs."""
        self.counts["ran"] += 1
        self._tell(qemu.host, f"runs {qemu.instance} {qemu.pid}")
        recorded = self._recorded.get(qemu.incarnation)
        if recorded is None:
            self.wrong("law 3", f"{qemu.instance}: {qemu.pid} runs, and no lock ever said that it may")
        elif image_of(qemu.instance) is not None and qemu.client not in recorded:
            self.wrong("law 3", f"{qemu.instance}: {qemu.pid} runs, and {qemu.client} is on no record")
        self.look_at_writers(qemu.instance)

    def look_at_writers(self, instance: str) -> None:
        """At most one may write to a disk."""
        if instance.startswith("d"):
            return
        writers = [qemu for qemu in self.qemus[instance] if qemu.writes]
        if len(writers) > 1:
            self.wrong("two writers", f"{instance}: " + ", ".join(f"{one.pid} on {one.host}" for one in writers))

    def ended_by_us(self, qemu: SimQemu, how: str) -> None:
        """A supervisor ends a QEMU."""
        self._tell(qemu.host, f"{how} for {qemu.instance} {qemu.pid}")
        qemu.bears.append(how)
        why = self._right(qemu)
        if why is None:
            self.counts["wrongly ended"] += 1
            self.wrong("nothing but an order", f"{qemu.instance}: {how} for {qemu.pid} on {qemu.host}, for nothing")

    def _right(self, qemu: SimQemu) -> str | None:
        """Why this one may be ended; None when it may not."""
        if qemu.ran_at is None:
            return "it never ran"
        if qemu.run_state != "running":
            return "its guest has stopped by itself"
        if self._orders.get(qemu.instance, -1.0) >= qemu.since - EARLIER_S:
            return "a person said so"
        if not self._belongs(qemu.instance, qemu.host):
            return "people want it elsewhere, or not at all"
        if qemu.incarnation in self._superseded:
            return "its lock was taken over"
        return None if qemu.writes else "it is shut out"

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
            status = f"{self._layout.facts}/instances/"
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
            if not self._exists(self._layout.session_key(lock.host)):
                self.wrong("law 2", f"{instance}: {lock.host} took its lock, and has no session")
            if before is not None and before.host != lock.host:
                self.counts["taken over"] += 1
                if before.state is not LockState.BROKEN and self._exists(self._layout.session_key(before.host)):
                    self.wrong("law 4", f"{instance}: {lock.host} took the lock of {before.host}, which has a session")
        if lock.state is LockState.RUNNING:
            self._recorded[lock.incarnation] = frozenset(lock.clients)

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

    def lock(self, instance: str) -> Lock | None:
        """As it stands."""
        return self._locks.get(instance)

    def living(self, instance: str) -> list[SimQemu]:
        return [qemu for qemu in self.qemus[instance] if qemu.alive]
