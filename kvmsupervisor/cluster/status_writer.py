"""Writes what is observed of each instance into its status key, and writes nothing while nothing changes.

Level-triggered: for every instance it knows the wanted value and the value of the key, and writes the latest value
where they differ. Every write compares that this host's session exists, and that the key is as this host knows it: a
value that another host has written since is read first. A value of a later epoch stays, because after the release of a
lock only the status says which epoch its instance has reached (law 2).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Never, Protocol

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
    Put,
    Rejected,
    Store,
    Target,
    TxnResult,
)
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout, parse_id
from kvmsupervisor.domain.status import Status
from kvmsupervisor.domain.timing import retry_delay

log = structlog.get_logger(__name__)

OPS_PER_TXN = 64
"""Half of what etcd allows by default (--max-txn-ops=128, https://etcd.io/docs/v3.5/op-guide/configuration/)."""

BYTES_PER_TXN = 512 * 1024
"""A third of what etcd allows by default (--max-request-bytes=1.5 MiB, same page)."""

GATHER_S = 0.05
"""How long a host's statuses wait for each other, to be written together. A machine that starts changes its status five
times in a tenth of a second, and these writes would delay those of its lock. Arbitrary: a person sees no difference."""

SPREAD_S = 0.25
"""The pause between two writes while there are many: a host that starts a hundred machines makes four writes a second
for all of them together. Arbitrary, as above."""

BURST = 3
"""How many writes need no pause after a quiet time: as many as the start of one machine needs."""

FLUSH_S = 2.0
"""How long the end of a supervisor, or of a container in single mode, waits for its last statuses."""

VALUE_BYTES = 64 * 1024
"""A status is cut to about this: an instance with 10,000 bad keys must not fill etcd. Arbitrary."""


class SessionView(Protocol):
    """What the status writer needs of `session.Session`."""

    @property
    def held(self) -> bool:
        """Whether the session is held now."""
        ...

    def compare(self) -> Compare:
        """The condition "my session exists"."""
        ...

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` whenever the session is won or lost; return a function that ends that."""
        ...


@frozen
class _Known:
    """The value of a status key at `revision`; `value` is None when a later write got no reply."""

    value: bytes | None
    revision: int


class StatusWriter:
    """Keeps the status keys of this host's instances at their wanted values.

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
        self._clock = clock
        self._layout = layout
        self._host = host
        self._session = session
        self._gather_s = gather_s
        self._spread_s = spread_s
        # When the next write is due at the earliest.
        self._due_at = 0.0
        self._rand = rand
        # None: the key is to be deleted.
        self._wanted: dict[InstanceId, bytes | None] = {}
        self._known: dict[InstanceId, _Known] = {}
        # Instances of which another host has reached a later epoch: that epoch, from its status.
        self._later: dict[InstanceId, int] = {}
        # The callbacks for that.
        self._overtaken: dict[InstanceId, Callable[[], None]] = {}
        # In the order in which they became dirty. Invariant: holds every id whose key may differ from its wanted
        # value; `_clean` is set exactly while it is empty.
        self._dirty: dict[InstanceId, None] = {}
        self._clean = asyncio.Event()
        self._clean.set()
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._ops_per_txn = OPS_PER_TXN
        self._trouble: type[EtcdError] | None = None
        self._era = 0

    async def learn(self, only: InstanceId | None = None) -> Mapping[InstanceId, Status]:
        """Read the status keys, as soon as etcd answers; return the values that this host has written.

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

    def prime(self, kvs: Iterable[KeyValue]) -> Mapping[InstanceId, Status]:
        """Take note of the status keys' values; return those that this host has written. Others are passed over."""
        ours: dict[InstanceId, Status] = {}
        mark = json.dumps(self._host, ensure_ascii=False).encode()
        prefix = self._layout.statuses_prefix.encode()
        for kv in kvs:
            # A search for the name costs less than reading JSON, and most statuses are other hosts'.
            status = self._ours(kv.value) if mark in kv.value and kv.key.startswith(prefix) else None
            instance = None if status is None else parse_id(kv.key[len(prefix) :].decode(errors="replace"))
            if status is not None and instance is not None:
                self._learn(instance, kv.value, kv.mod_revision)
                ours[instance] = status
        return ours

    def begin_anew(self) -> None:
        """Forget what the keys hold, because etcd has another history. Each worker sets its status again.

        Replies to earlier requests do not count either.
        """
        self._era += 1
        for known in (self._wanted, self._known, self._later, self._overtaken, self._dirty):
            known.clear()
        self._clean.set()

    def ids(self) -> Set[InstanceId]:
        """The instances whose status keys are ours, as far as known: written by this process, or learnt."""
        return self._known.keys() | {i for i, value in self._wanted.items() if value is not None}

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
        self._want(instance, _encode(status))

    def forget(self, instance: InstanceId) -> None:
        """Let the status key be deleted, if it holds a status of this host. The last call counts."""
        self._want(instance, None)

    def doubt(self, instance: InstanceId) -> None:
        """Write the next status in any case: another host may have written the key since."""
        if instance in self._known:
            self._known[instance] = _Known(None, self._known[instance].revision)

    def abandon(self, instance: InstanceId) -> None:
        """Leave the status key to the host that has the instance now, whatever it holds."""
        for known in (self._wanted, self._known, self._later, self._overtaken, self._dirty):
            known.pop(instance, None)
        if not self._dirty:
            self._clean.set()

    def wrote(self, instance: InstanceId, value: bytes, revision: int) -> None:
        """Take note of a value that another transaction of this host has written. It becomes the wanted value.

        Args:
            instance: of the status.
            value: as written.
            revision: of that transaction (`TxnResult.revision`), which orders it among the writes made here.
        """
        self._learn(instance, value, revision)
        self._want(instance, value)

    async def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Return True once every key has its wanted value, or False after `timeout_s`. `run` must be running.

        From now on no change waits for other changes.
        """
        self._hurry.set()
        return await self._clock.wait(self._clean, self._clock.now() + timeout_s)

    async def run(self) -> Never:
        """Write the values that differ, for ever. Cancelling leaves the rest unwritten (see `flush`)."""
        end_listening = self._session.listen(self._wake.set)
        try:
            failures = 0
            while True:
                self._wake.clear()
                if not self._dirty or not self._session.held:
                    await self._wake.wait()
                    now = self._clock.now()
                    await self._clock.wait(self._hurry, max(now + self._gather_s, self._due_at))
                    continue
                if self._may_wait():
                    await self._clock.wait(self._hurry, self._due_at)
                    continue
                if await self._write_some():
                    failures = 0
                    unpaused = self._clock.now() - (BURST - 1) * self._spread_s
                    self._due_at = max(self._due_at, unpaused) + self._spread_s
                else:
                    failures += 1
                    await self._clock.sleep(retry_delay(failures, self._rand()))
        finally:
            end_listening()

    def _may_wait(self) -> bool:
        """Whether changes have to wait for more changes, because there were many writes just now."""
        early = self._clock.now() < self._due_at and not self._hurry.is_set()
        return early and len(self._dirty) < self._ops_per_txn

    # Bookkeeping.

    def _want(self, instance: InstanceId, value: bytes | None) -> None:
        self._wanted[instance] = value
        self._judge(instance)

    def _learn(self, instance: InstanceId, value: bytes, revision: int) -> None:
        known = self._known.get(instance)
        if known is None or revision > known.revision:
            self._known[instance] = _Known(value, revision)

    def _doubt(self, instances: Iterable[InstanceId]) -> None:
        """Note that the keys may or may not hold the values that were just sent."""
        for instance in self._wanted.keys() & instances:
            known = self._known.get(instance)
            self._known[instance] = _Known(None, 0 if known is None else known.revision)

    def _judge(self, instance: InstanceId) -> None:
        """Add the instance to the dirty ones, or remove it from them."""
        if instance not in self._wanted:
            # Abandoned while it was being written.
            self._known.pop(instance, None)
            return
        wanted, known = self._wanted[instance], self._known.get(instance)
        if known is not None and wanted is not None and known.value == wanted:
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
            self._wanted.pop(instance, None)
            self._dirty.pop(instance, None)
        else:
            self._judge(instance)
        if not self._dirty:
            self._clean.set()

    def _ours(self, value: bytes) -> Status | None:
        """The status in a key; None when the value is no status, or another host's."""
        status = Status.from_json(value)
        return status if status is not None and status.host == self._host else None

    # Writing.

    async def _write_some(self) -> bool:
        """Write the first of the dirty keys, in one transaction at most; False when it failed."""
        puts, deletes = self._next()
        try:
            done = await (self._put(puts) if puts else self._delete(deletes))
        except EtcdError as error:
            if isinstance(error, Ambiguous):
                self._doubt(puts)
            self._note(error, [*puts, *deletes])
            return False
        if self._trouble is not None:
            log.info("publisher.back")
            self._trouble = None
        if done:
            self._ops_per_txn = min(self._ops_per_txn * 2, OPS_PER_TXN)
        # Otherwise etcd says that the session is gone: the session will notice that itself.
        return done

    def _next(self) -> tuple[dict[InstanceId, bytes], list[InstanceId]]:
        """Take from the front of the dirty keys either values to put or keys to delete."""
        puts: dict[InstanceId, bytes] = {}
        deletes: list[InstanceId] = []
        size = 0
        for instance in self._dirty:
            value = self._wanted[instance]
            size += 0 if value is None else len(value)
            if len(puts) + len(deletes) == self._ops_per_txn or (size > BYTES_PER_TXN and puts):
                break
            if value is None:
                if puts:
                    break
                deletes.append(instance)
            else:
                if deletes:
                    break
                puts[instance] = value
        return puts, deletes

    async def _put(self, puts: dict[InstanceId, bytes]) -> bool:
        keys = {instance: self._layout.status_key(instance) for instance in puts}
        seen = {instance: self._known[instance].revision if instance in self._known else 0 for instance in puts}
        era = self._era
        done = await self._store.txn(
            [self._session.compare(), *(Compare(keys[one], Target.MOD_REVISION, seen[one]) for one in puts)],
            [Put(keys[instance], value) for instance, value in puts.items()],
            [Get(key) for key in keys.values()],
        )
        if era != self._era:
            return done.succeeded
        if not done.succeeded:
            return self._heed(seen, done)
        for instance, value in puts.items():
            self._learn(instance, value, done.revision)
            self._judge(instance)
        return True

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
            known, wanted = self._known.get(instance), self._wanted.get(instance)
            if known is None or known.revision == revision:
                self._known[instance] = _Known(None if found is None else found.value, found_at)
            theirs = None if found is None else Status.from_json(found.value)
            ours = None if wanted is None else Status.from_json(wanted)
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
        """Delete the keys that hold a status of this host: another host may have written its own."""
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
        done = await self._store.txn(
            [self._session.compare(), *unchanged],
            [Delete(self._layout.status_key(instance)) for instance in ours],
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


def _encode(status: Status) -> bytes:
    """The value of the key, with as many problems as fit."""
    value = status.to_json()
    if len(value) <= VALUE_BYTES:
        return value
    kept: list[str] = []
    size = 0
    for problem in status.problems:
        size += len(problem.encode()) + 3
        if size > VALUE_BYTES // 2:
            break
        kept.append(problem)
    left_out = len(status.problems) - len(kept)
    return replace(status, problems=(*kept, f"and {left_out} more problems, see `kvmsupervisor check`")).to_json()
