"""Writes what is observed of each instance into its status key, and writes nothing while nothing changes.

Level-triggered: for every instance it knows the wanted value and the value of the key, and writes the latest value
where they differ. Every write compares that this host's session exists, and that the key is as this host knows it: a
value that another host has written since is read first. A value of a later epoch stays, because after the release of a
lock only the status says which epoch its instance has reached (law 2).

What has happened to an instance goes with its status, in the same transaction (`event_keys`).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Never

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import (
    Ambiguous,
    Compare,
    Delete,
    Denied,
    EtcdError,
    Get,
    KeyValue,
    Op,
    Put,
    Rejected,
    Store,
    Target,
    TxnResult,
)
from kvmsupervisor.cluster.batches import BURST, OPS_PER_TXN, next_batch
from kvmsupervisor.cluster.event_keys import EventKeys, EventPut, Known
from kvmsupervisor.cluster.session_view import SessionView
from kvmsupervisor.domain.events import Event
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout, parse_id
from kvmsupervisor.domain.status import Status, encoded
from kvmsupervisor.domain.timing import retry_delay

log = structlog.get_logger(__name__)

FLUSH_S = 2.0
"""How long the end of a supervisor, or of a container in single mode, waits for its last statuses."""


class StatusWriter:
    """Keeps the status keys of this host's instances at their wanted values.

    `events` are the events keys.

    Args:
        store: etcd.
        clock: the machine's.
        layout: of the keys.
        host: this host: only its own statuses are ever deleted.
        session: of this host; nothing is written without it.
        gather_s: how long the first of several changes waits for the others.
        spread_s: the pause between two writes, except the first `BURST`.
        rand: random numbers, 0 ≤ x < 1.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        layout: Layout,
        host: HostName,
        session: SessionView,
        gather_s: float = 0.0,
        spread_s: float = 0.0,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self.events = EventKeys(store=store, layout=layout)
        self._clock = clock
        self._layout = layout
        self._host = host
        self._session = session
        self._gather_s = gather_s
        self._spread_s = spread_s
        self._due_at = 0.0  # when the next write is due at the earliest
        self._rand = rand
        # None: the key is to be deleted, or to become the value in `_last`, where it holds a status of this host.
        self._wanted: dict[InstanceId, bytes | None] = {}
        self.inherited: dict[InstanceId, Status] = {}  # other hosts', for `Report.begin_turn` to take on
        self._last: dict[InstanceId, bytes] = {}
        self._known: dict[InstanceId, Known] = {}
        # Instances of which another host has reached a later epoch: that epoch, from its status.
        self._later: dict[InstanceId, int] = {}
        self._overtaken: dict[InstanceId, Callable[[], None]] = {}  # the callbacks for that
        self._ceded: dict[InstanceId, None] = {}  # instances that other hosts speak for
        # In the order in which they became dirty. Invariant: holds every id whose key may differ from its wanted
        # value; `_clean` is set exactly while it is empty.
        self._dirty: dict[InstanceId, None] = {}
        self._clean = asyncio.Event()
        self._clean.set()
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._ops_per_txn = OPS_PER_TXN
        self._trouble: type[EtcdError] | None = None
        self._era, self._begun = 0, False
        # Whether the session was lost since the keys were read: meanwhile other hosts may have written them.
        self._was_lost = False

    async def learn(self, only: InstanceId | None = None) -> Mapping[InstanceId, Status | None]:
        """Read the status keys, as soon as etcd answers; return what this host has written, None for other values.

        Args:
            only: the one instance whose key is read; None for all.
        """
        failures = 0
        while True:
            try:
                if only is None:
                    return self.prime((await self._store.list(self._layout.statuses_prefix)).kvs)
                found = await self._store.get(self._layout.status_key(only))
                return self.prime([] if found is None else [found])
            except EtcdError as error:
                failures += 1
                log.warning("statuses.unread", reason=str(error))
                await self._clock.sleep(retry_delay(failures, self._rand()))

    def prime(self, kvs: Iterable[KeyValue]) -> Mapping[InstanceId, Status | None]:
        """Take note of the status keys' values that this host has written; return as `learn` does."""
        found: dict[InstanceId, Status | None] = {}
        mark = json.dumps(self._host, ensure_ascii=False).encode()
        for kv in kvs:
            instance = parse_id(kv.key.decode(errors="replace").removeprefix(self._layout.statuses_prefix))
            if instance is None:
                continue
            # A search for the name costs less than reading JSON, and most statuses are other hosts'.
            if (status := self._ours(kv.value) if mark in kv.value else None) is not None:
                self._learn(instance, kv.value, kv.mod_revision)
                self.events.doubt(instance)
            found[instance] = status
        return found

    def begin_anew(self) -> None:
        """Forget what the keys hold, because etcd has another history. Each worker sets its status again.

        Replies to earlier requests do not count either.
        """
        self._era += 1
        for known in (self._wanted, self._last, self._known, self._later, self._overtaken, self._dirty, self._ceded):
            known.clear()
        self.events.begin_anew()
        self._clean.set()

    def ids(self) -> Set[InstanceId]:
        """The instances whose status keys are ours, as far as known: written by this process, or learnt."""
        return self._known.keys() | {i for i, value in self._wanted.items() if value is not None}

    @property
    def has_begun(self) -> bool:
        """Whether what this host has said is known (`learn`), and is kept up."""
        return self._begun

    def written(self, instance: InstanceId) -> tuple[Status, int] | None:
        """What this host has said of it, as far as known, and at which revision; also a supervisor before this one."""
        known = self._known.get(instance)
        status = None if known is None or known.value is None else self._ours(known.value)
        return None if known is None or status is None else (status, known.revision)

    def publishes(self, instance: InstanceId) -> bool:
        """Whether there is a status key for it: a lock of single mode may be no instance's."""
        return parse_id(instance) is not None

    def set(self, instance: InstanceId, status: Status, *, overtaken: Callable[[], None] = lambda: None) -> None:
        """Let the status key become `status`, unless the key holds a status of a later epoch. The last call counts.

        Args:
            instance: of the status.
            status: to be written.
            overtaken: called when a later epoch is found; from then on only a status of that epoch is written.
        """
        if status.epoch < self._later.get(instance, 0) or not self.publishes(instance):
            return
        self._later.pop(instance, None)
        self._overtaken[instance] = overtaken
        self._want(instance, encoded(status))

    def cede(self, instance: InstanceId) -> None:
        """Another host speaks for it now: its key is left as it is until the next `set`."""
        self._ceded[instance] = None
        self._dirty.pop(instance, None)
        if not self._dirty:
            self._clean.set()

    def note(self, instance: InstanceId, event: Event) -> None:
        """Add an event to the events key, in the next transaction that writes the status; most events cause one."""
        if self.publishes(instance):
            self.events.add(instance, event)
            if instance in self._wanted:
                self._judge(instance)

    async def events_of(self, instance: InstanceId) -> EventPut | None:
        """What of events another transaction has to write that writes the status; see `wrote`. May raise EtcdError."""
        await self.events.read([instance])
        return self.events.put(instance)

    def forget(self, instance: InstanceId) -> None:
        """Let the status key be deleted, if it holds a status of this host. The last call counts."""
        self._want(instance, None)

    def leave(self, instance: InstanceId, last: Status) -> None:
        """Nothing of it is here any more: let the status key become `last`, if it holds a status of this host.

        Most often it does not have to: the release of the lock has written the last status (`wrote`). Without a lock
        to release, a status that tells of a QEMU here would keep other hosts waiting for ever.
        """
        known, wanted = self._known.get(instance), self._wanted.get(instance)
        written = None if known is None or known.value is None else Status.from_json(known.value)
        if written is not None and written.pid is None and known is not None and known.value == wanted:
            self.abandon(instance)
            return
        self._want(instance, None)
        self._last[instance] = encoded(last)

    def doubt(self, *instances: InstanceId) -> None:
        """Write the next status in any case: another host may have written the key since, or a reply was lost."""
        for instance in instances:
            known = self._known.get(instance)
            if known is not None or instance in self._wanted:
                self._known[instance] = Known(None, 0 if known is None else known.revision)
                self.events.doubt(instance)

    def abandon(self, instance: InstanceId) -> None:
        """Leave the status key to the host that has the instance now, whatever it holds."""
        for known in (self._wanted, self._last, self._known, self._later, self._overtaken, self._dirty, self._ceded):
            known.pop(instance, None)
        self.events.forget(instance)
        if not self._dirty:
            self._clean.set()

    def wrote(self, instance: InstanceId, value: bytes, revision: int, events: EventPut | None = None) -> None:
        """Take note of a value that another transaction of this host has written. It becomes the wanted value.

        Args:
            instance: of the status.
            value: as written.
            revision: of that transaction (`TxnResult.revision`), which orders it among the writes made here.
            events: that it has written, too.
        """
        self._learn(instance, value, revision)
        self.events.wrote(instance, events, revision)
        self._want(instance, value)

    async def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Return True once every key has its wanted value, or False after `timeout_s`. `run` must be running.

        From now on no change waits for other changes.
        """
        self._hurry.set()
        return await self._clock.wait(self._clean, self._clock.now() + timeout_s)

    async def run(self) -> Never:
        """Write the values that differ, for ever. Cancelling leaves the rest unwritten (see `flush`)."""
        self._begun = True
        end_listening = self._session.listen(self._on_session)
        try:
            failures = 0
            while True:
                self._wake.clear()
                if not self._session.held or not (self._dirty or self._was_lost):
                    await self._wake.wait()
                    now = self._clock.now()
                    await self._clock.wait(self._hurry, max(now + self._gather_s, self._due_at))
                    continue
                if not self._was_lost and self._may_wait():
                    await self._clock.wait(self._hurry, self._due_at)
                    continue
                if await (self._look_again() if self._was_lost else self._write_some()):
                    failures = 0
                    unpaused = self._clock.now() - (BURST - 1) * self._spread_s
                    self._due_at = max(self._due_at, unpaused) + self._spread_s
                else:
                    failures += 1
                    await self._clock.sleep(retry_delay(failures, self._rand()))
        finally:
            end_listening()

    def _on_session(self) -> None:
        self._was_lost = self._was_lost or not self._session.held
        self._wake.set()

    async def _look_again(self) -> bool:
        """See whether the keys hold what is known; write anew what others have written. False: etcd did not say."""
        self._was_lost, era, known = False, self._era, list(self._known)
        for begin in range(0, len(known), OPS_PER_TXN):
            some = known[begin : begin + OPS_PER_TXN]
            seen = {instance: self._known[instance].revision for instance in some if instance in self._known}
            try:
                done = await self._txn(seen)
            except EtcdError as error:
                self._was_lost = True
                self._note(error, some)
                return False
            if era != self._era:
                break
            if not done.succeeded:
                self._heed(seen, done)
        return True

    def _may_wait(self) -> bool:
        """Whether changes have to wait for more changes, because there were many writes just now."""
        early = self._clock.now() < self._due_at and not self._hurry.is_set()
        return early and len(self._dirty) < self._ops_per_txn

    def _want(self, instance: InstanceId, value: bytes | None) -> None:
        self._wanted[instance] = value
        self._last.pop(instance, None)
        self._ceded.pop(instance, None)
        self._judge(instance)

    def _learn(self, instance: InstanceId, value: bytes, revision: int) -> None:
        known = self._known.get(instance)
        if known is None or revision > known.revision:
            self._known[instance] = Known(value, revision)

    def _judge(self, instance: InstanceId) -> None:
        """Add the instance to the dirty ones, or remove it from them."""
        if instance not in self._wanted:
            # Abandoned while it was being written.
            self._known.pop(instance, None)
            return
        if instance in self._ceded:
            return
        wanted, known = self._wanted[instance], self._known.get(instance)
        if known is not None and wanted is not None and known.value == wanted and not self.events.due(instance):
            self._dirty.pop(instance, None)
        else:
            # A key to be deleted is dirty even when it is not known: a write of it may be under way.
            self._dirty.setdefault(instance)
        if self._dirty:
            self._clean.clear()
            self._wake.set()
        else:
            self._clean.set()

    def _gone(self, instance: InstanceId) -> None:
        """Note that this host must not delete the key, or not any more."""
        self._known.pop(instance, None)
        if self._wanted.get(instance) is None:
            self.events.forget(instance)
            for known in (self._wanted, self._last, self._dirty):
                known.pop(instance, None)
        else:
            self._judge(instance)
        if not self._dirty:
            self._clean.set()

    def _ours(self, value: bytes) -> Status | None:
        """The status in a key; None when the value is no status, or another host's."""
        status = Status.from_json(value)
        return status if status is not None and status.host == self._host else None

    async def _write_some(self) -> bool:
        """Write the first of the dirty keys, in one transaction at most; False when it failed."""
        puts, deletes = next_batch(self._dirty, self._wanted, self._ops_per_txn)
        try:
            done = await (self._put(puts) if puts else self._delete(deletes))
        except EtcdError as error:
            if isinstance(error, Ambiguous):
                self.doubt(*puts)
                for instance in puts:
                    self._judge(instance)
            self._note(error, [*puts, *deletes])
            return False
        if self._trouble is not None:
            log.info("publisher.back")
            self._trouble = None
        if done:
            self._ops_per_txn = min(self._ops_per_txn * 2, OPS_PER_TXN)
        # Otherwise etcd says that the session is gone: the session will notice that itself.
        return done

    async def _put(self, puts: dict[InstanceId, bytes]) -> bool:
        seen = {instance: self._known[instance].revision if instance in self._known else 0 for instance in puts}
        era = self._era
        await self.events.read(puts)
        events = {instance: put for instance in puts if (put := self.events.put(instance)) is not None}
        done = await self._txn(seen, puts, [put.op for put in events.values()])
        if era != self._era:
            return done.succeeded
        if not done.succeeded:
            return self._heed(seen, done)
        for instance, value in puts.items():
            self._learn(instance, value, done.revision)
            self.events.wrote(instance, events.get(instance), done.revision)
            self._judge(instance)
        return True

    async def _txn(
        self, seen: Mapping[InstanceId, int], puts: Mapping[InstanceId, bytes] | None = None, more: Iterable[Op] = ()
    ) -> TxnResult:
        """Write values, while the session is there, where keys are as seen; read these keys where one is not."""
        keys = {instance: self._layout.status_key(instance) for instance in seen}
        unchanged = [Compare(keys[instance], Target.MOD_REVISION, revision) for instance, revision in seen.items()]
        return await self._store.txn(
            [self._session.compare(), *unchanged] if puts else unchanged,
            [*(Put(keys[instance], value) for instance, value in (puts or {}).items()), *more],
            [Get(key) for key in keys.values()],
        )

    def _heed(self, seen: Mapping[InstanceId, int], done: TxnResult) -> bool:
        """Take note of values that other hosts have written; return whether such a value made the compare fail.

        Args:
            seen: the compared revisions.
            done: the values found instead, in the same order.
        """
        differs = False
        for (instance, revision), kvs in zip(seen.items(), done.reads, strict=True):
            found = next(iter(kvs), None)
            found_at = 0 if found is None else found.mod_revision
            if found_at == revision:
                continue
            differs = True
            self.events.doubt(instance)
            known, wanted = self._known.get(instance), self._wanted.get(instance)
            if known is None or known.revision == revision or found_at > known.revision:
                self._known[instance] = Known(None if found is None else found.value, found_at)
            theirs = None if found is None else Status.from_json(found.value)
            ours = None if wanted is None else Status.from_json(wanted)
            if theirs is not None and ours is not None and theirs.host != self._host:
                # It is not written over before this host knows of it, too.
                self.inherited[instance], self._wanted[instance] = theirs, encoded(ours.inheriting(theirs))
            if theirs is None or ours is None or theirs.epoch <= ours.epoch:
                self._judge(instance)
                continue
            overtaken = self._overtaken.get(instance)
            self.abandon(instance)
            self._later[instance] = theirs.epoch
            if overtaken is not None:
                overtaken()
        return differs

    async def _delete(self, instances: Sequence[InstanceId]) -> bool:
        """Delete the keys that hold a status of this host, or write the last: another host may have written its own."""
        known = [instance for instance in instances if instance in self._known]
        for instance in instances:
            if instance not in self._known:
                self._gone(instance)
        if not known:
            return True
        # The transaction below compares each deleted key with this read, and the session.
        seen = await self._store.read(*(self._layout.status_key(instance) for instance in known))
        ours: dict[InstanceId, KeyValue] = {}
        for instance, found in zip(known, seen.kvs, strict=True):
            if found is not None and self._ours(found.value) is not None:
                ours[instance] = found
            else:
                self._gone(instance)
        if not ours:
            return True
        unchanged = [
            Compare(self._layout.status_key(instance), Target.MOD_REVISION, kv.mod_revision)
            for instance, kv in ours.items()
        ]
        last = {instance: self._last[instance] for instance in ours if instance in self._last}
        keys = {instance: self._layout.status_key(instance) for instance in ours}
        await self.events.read(last)
        events: list[Op] = [put.op for one in last if (put := self.events.put(one)) is not None]
        events += [self.events.delete(one) for one in ours if one not in last]
        done = await self._store.txn(
            [self._session.compare(), *unchanged],
            [*(Put(keys[one], last[one]) if one in last else Delete(keys[one]) for one in ours), *events],
        )
        if done.succeeded:
            for instance in ours:
                self._gone(instance)
        return done.succeeded

    def _note(self, error: EtcdError, instances: Sequence[InstanceId]) -> None:
        """Log what is wrong when it differs from what was wrong before; find the value that etcd refuses."""
        if isinstance(error, Rejected):
            if len(instances) > 1:
                # Fewer keys next time, until the refused one is alone.
                self._ops_per_txn = max(1, len(instances) // 2)
            else:
                # The other keys first, then this one again, for ever: etcd may get space again.
                for instance in self._dirty.keys() & instances:
                    del self._dirty[instance]
                    self._dirty[instance] = None
        if self._trouble is type(error):
            return
        self._trouble = type(error)
        match error:
            case Rejected():
                log.error("publisher.rejected", instances=list(instances)[:10], error=str(error))
            case Denied():
                log.error("publisher.denied", prefix=self._layout.statuses_prefix, error=str(error))
            case _:
                log.warning("publisher.away", error=str(error))
