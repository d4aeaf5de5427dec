"""One instance's lock in etcd: read, compared and swapped. `domain.lock` and its callers decide what to write.

Every change is one transaction that compares the lock's `mod_revision` with the last one seen (law 2). When a reply is
lost, the lock is read again: each value names an incarnation, so this host recognises its own.

Where people who write wishes may write locks, too (the default `LOCK`), a lock alone does not say whom to shut out:
what supervisors have recorded is repeated, in the same transactions, in a key of their facts (`Layout.clients_key`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, assert_never

from kvmsupervisor.adapters.etcd import (
    Ambiguous,
    Compare,
    Delete,
    Get,
    KeyValue,
    Op,
    Put,
    Reading,
    Store,
    Target,
    TxnResult,
)
from kvmsupervisor.cluster.event_keys import EventPut
from kvmsupervisor.domain.history import Era, is_older
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Change, Compared, Lock, LockView, clients_from_json, clients_to_json
from kvmsupervisor.domain.placement import Ground
from kvmsupervisor.domain.status import Status
from kvmsupervisor.failpoints import point

T = TypeVar("T")


class SwapFailed(Exception):
    """A compare failed: another writer was first, or our session or the wish changed. Look again, decide again."""


def compares(
    change: Change,
    *,
    layout: Layout,
    instance: InstanceId,
    revision: int,
    session: Compare | None = None,
    ground: Ground | None = None,
    holder: HostName | None = None,
    namesake: int = 0,
    offer: int = 0,
) -> list[Compare]:
    """What the transaction of a change compares, as the table says.

    Args:
        change: the row of the table.
        layout: of the keys.
        instance: whose lock it is.
        revision: `mod_revision` of the lock as last seen, 0 when it was absent.
        session: of the writer, where the row has it.
        ground: the two keys that say where it runs, as last seen; None where they have no say.
        holder: who must have no session, where the row has that.
        namesake: `mod_revision` of the session of another machine under the holder's name; 0 without one.
        offer: `mod_revision` of a live move's offer.
    """
    found = []
    for compared in change.value.compares:
        match compared:
            case Compared.LOCK:
                found.append(Compare(layout.lock_key(instance), Target.MOD_REVISION, revision))
            case Compared.SESSION:
                assert session is not None
                found.append(session)
            case Compared.GROUND if ground is not None:
                host_key, placement_key = layout.wish_key(instance, "host"), layout.placement_key(instance)
                found.append(Compare(host_key, Target.MOD_REVISION, ground.host_revision))
                found.append(Compare(placement_key, Target.MOD_REVISION, ground.placement_revision))
            case Compared.GROUND:
                pass
            case Compared.HOLDER_GONE:
                assert holder is not None
                found.append(Compare(layout.session_key(holder), Target.MOD_REVISION, namesake))
            case Compared.TARGET:
                assert offer > 0
                found.append(Compare(layout.offer_key(instance), Target.MOD_REVISION, offer))
            case _:
                assert_never(compared)
    return found


class InstanceLock:
    """The lock of one instance, as last seen."""

    def __init__(self, *, store: Store, layout: Layout, instance: InstanceId, session: Callable[[], Compare]) -> None:
        self.view = LockView()
        self._store = store
        self._layout = layout
        self._instance = instance
        self._key = layout.lock_key(instance)
        self._status_key = layout.status_key(instance)
        self._events_key = layout.events_key(instance)
        self._placement_key = layout.placement_key(instance)
        self._session = session
        self._era = 0
        self._clients_key = layout.clients_key(instance)
        self._is_open = layout.locks_are_open
        # Storage clients that are this instance's, by more than a lock's word.
        self._vouched: set[str] = set()

    def begin_anew(self, era: int) -> None:
        """Take the next value whatever its revision, and ignore replies to earlier requests: etcd has another history.

        The value known so far stays until then, as one of a former history.

        Args:
            era: the history, as `Era.count` counts them.
        """
        self._era = era
        self.view = replace(self.view, as_of=0)

    def seen(self, *, data: bytes | None, mod_revision: int, as_of: int) -> None:
        """Take note of a value that a watch or list told, unless it is older than the known one."""
        if not self.view.known or as_of > self.view.as_of:
            known = self.view.lock if data == self.view.data else None
            self.view = LockView(
                known=True, data=data, mod_revision=mod_revision, as_of=as_of, era=self._era, lock=known
            )

    def vouch(self, addresses: Iterable[str]) -> None:
        """These storage clients are this instance's: its QEMU's own, or users of its images by storage's word."""
        self._vouched.update(addresses)

    async def unvouched(self, addresses: Iterable[str]) -> tuple[str, ...]:
        """Those of the addresses that nothing but the lock calls this instance's, though people may write the lock.

        Raises:
            SwapFailed: etcd has another history since that was asked.
            EtcdError: it is not known.
        """
        if not self._is_open or self._vouched.issuperset(addresses := tuple(addresses)):
            return ()
        found = await self._in_this_era(self._store.get(self._clients_key))
        if found is not None:
            self._vouched |= clients_from_json(found.value)
        return tuple(address for address in addresses if address not in self._vouched)

    async def repeat(self, addresses: Iterable[str]) -> None:
        """Vouch for storage clients of a QEMU that lives, among the facts, under the lock as last seen.

        Raises:
            SwapFailed: the lock or the record has changed, or our session is gone; or a reply was lost.
            EtcdError: etcd did not do it.
        """
        self.vouch(addresses)
        found = await self._in_this_era(self._store.get(self._clients_key))
        told = frozenset[str]() if found is None else clients_from_json(found.value)
        if told.issuperset(addresses):
            return
        lock = self.view.lock
        stays = told if lock is None else told.intersection(lock.addresses)
        compared = [
            Compare(self._key, Target.MOD_REVISION, self.view.mod_revision),
            Compare(self._clients_key, Target.MOD_REVISION, 0 if found is None else found.mod_revision),
            self._session(),
        ]
        try:
            result = await self._txn(compared, [Put(self._clients_key, clients_to_json({*stays, *addresses}))])
        except Ambiguous:
            raise SwapFailed("a reply was lost") from None
        if not result.succeeded:
            raise SwapFailed("the lock or its clients changed meanwhile")

    def _vouching(self, change: Change, lock: Lock | None) -> list[Op]:
        """What repeats a lock's clients among the facts. Other changes, such as taking it, hand on what it says."""
        if not self._is_open:
            return []
        if lock is None:
            return [Delete(self._clients_key)]
        # A source of an earlier release has announced the guest that arrives.
        fences, runs = {Change.ENLIST, Change.FENCE}, {Change.RECORD, Change.REASSERT, Change.RENAME}
        row = {*fences, *runs, Change.ANNOUNCE, Change.ARRIVE}
        if change not in row:
            return []
        known = self._vouched.intersection(lock.addresses)
        return [Put(self._clients_key, clients_to_json(known))] if known else []

    async def look(self) -> Status | None:
        """Read lock and status in one linearizable step; return the status, of whatever host."""
        _, status = await self._look()
        return status

    async def write(
        self,
        change: Change,
        lock: Lock,
        ground: Ground | None,
        *,
        holder: HostName | None = None,
        status: Status | None = None,
        offer: int = 0,
    ) -> None:
        """Take the lock, or write its next state.

        Args:
            change: the row of the table; what it says is compared.
            lock: what to write.
            ground: `host` and the placement as last seen; None when they do not matter.
            holder: the former holder, which must have no session; etcd compares that in the same step (law 4).
            status: what to write into the status key in the same step.
            offer: `mod_revision` of a live move's offer, where the row compares it.

        Raises:
            SwapFailed, EtcdError: see `_swap`.
        """
        also = () if status is None else (Put(self._status_key, status.to_json()),)
        await self._swap(change, lock, (), also, ground=ground, holder=holder, offer=offer)

    async def take_new(self, lock: Lock, ground: Ground | None, *, status_at: int) -> Reading | None:
        """Take the lock if the status is still the one that this host has written, or there is none.

        Args:
            lock: what to write.
            ground: as for `write`.
            status_at: revision of the status, 0 for none. It says that no host has ever had this instance.

        Returns:
            The events key, read in the same step; None where the reply was lost.

        Raises:
            SwapFailed, EtcdError: see `_swap`.
        """
        never_had = Compare(self._status_key, Target.MOD_REVISION, status_at)
        done = await self._swap(Change.TAKE, lock, [never_had], [Get(self._events_key)], ground=ground)
        return None if done is None else Reading([next(iter(done.reads[0]), None)], done.revision)

    async def would_hold(self, change: Change, ground: Ground | None, *, offer: int) -> bool:
        """Whether a change would be made now, by all that it compares; nothing is written.

        Raises:
            SwapFailed, EtcdError: see `_swap`.
        """
        compared = compares(
            change,
            layout=self._layout,
            instance=self._instance,
            revision=self.view.mod_revision,
            session=self._session(),
            ground=ground,
            offer=offer,
        )
        return (await self._txn(compared, [Get(self._key)])).succeeded

    async def epoch_of_the_living(self, record: Incarnation, seen: LockView, era: Era) -> int:
        """The epoch that a QEMU which lives needs to have its lock again: its own, or one more than what is there.

        Args:
            record: of that QEMU.
            seen: the lock that was found to be older than the QEMU, maybe not by its epoch (`View.is_outdated`).
            era: the present history.

        Raises:
            SwapFailed: there is another lock by now.
            EtcdError: etcd does not say.
        """
        found, status = await self._look()
        if self.view.mod_revision != seen.mod_revision:
            raise SwapFailed("the lock changed meanwhile")
        known, epochs = self.view.lock, [record.epoch]
        if known is not None:
            # Also where it is the same: another host began anew with it, and no two have one epoch (law 2).
            epochs.append(known.epoch + 1)
        if status is not None and status.incarnation == record.incarnation:
            # Ours, maybe written before it was seen that etcd has another history.
            status = None
        # A status does not say in which history it was written: it goes with its lock, and is as old as that.
        if status is not None and found is not None and record.is_after(record.history, found.mod_revision, era):
            epochs.append(status.epoch + 1)
        return max(epochs)

    async def reassert(self, lock: Lock, era: Era) -> Status | None:
        """Write our own lock again where it is missing or older, if our session holds and no other host had it since.

        A host that had the lock and released it has left a status with a later epoch: that status is returned, and
        nothing is written. The status of another cluster's host does not count.

        Args:
            lock: ours.
            era: of the history in which the lock is written.
        """
        found, status = await self._look()
        known = self.view.lock
        if self.view.data is not None and (
            known is None or not is_older(known, epoch=lock.epoch, incarnation=lock.incarnation)
        ):
            raise SwapFailed("the lock changed meanwhile")
        strange = status is not None and found is not None and era.is_strange(status.host, found.mod_revision)
        if status is not None and status.epoch > lock.epoch and not strange:
            return status
        # If another host had the lock since that read, it has fenced our QEMU: this write comes late, and does no harm.
        await self._swap(Change.REASSERT, lock)
        return None

    async def release(self, status: Status | None, *, stale_placement: int = 0, events: EventPut | None = None) -> int:
        """Release our lock, and write the last status in the same step (None: delete it); return the revision.

        The process is proven gone. The next holder finds in the status up to which epoch this host came. A placement
        that has ended is deleted in the same step: later, it would change under the next holder.

        Args:
            status: the last one.
            stale_placement: `mod_revision` of the placement that has ended, 0 when there is none.
            events: to be written with the status. Without a status they are deleted, too.
        """
        if status is None:
            last: list[Op] = [Delete(self._status_key), Delete(self._events_key)]
        else:
            last = [Put(self._status_key, status.to_json()), *([] if events is None else [events.op])]
        more = []
        if stale_placement:
            more.append(Compare(self._placement_key, Target.MOD_REVISION, stale_placement))
            last.append(Delete(self._placement_key))
        await self._swap(Change.RELEASE, None, more, last)
        return self.view.as_of

    async def tidy(self, stale_placement: int) -> None:
        """Delete a placement that has ended, unless a new one was written since; the watch shows that one.

        Raises:
            SwapFailed: the key has changed, or is gone.
            EtcdError: etcd did not do it, or the reply was lost.
        """
        seen = Compare(self._placement_key, Target.MOD_REVISION, stale_placement)
        result = await self._store.txn([seen], [Delete(self._placement_key)])
        if not result.succeeded:
            raise SwapFailed("its placement changed meanwhile")

    async def drop(self) -> None:
        """Delete our lock where there is no status. The process is proven gone."""
        await self._swap(Change.RELEASE, None)

    async def _swap(
        self,
        change: Change,
        lock: Lock | None,
        more: Sequence[Compare] = (),
        also: Sequence[Op] = (),
        *,
        ground: Ground | None = None,
        holder: HostName | None = None,
        offer: int = 0,
    ) -> TxnResult | None:
        """Replace the lock as last seen by `lock` (None: delete it), under the compares of `change`, and `more`.

        Returns:
            What etcd said; None where its reply was lost, but the change was made.

        Raises:
            SwapFailed: a compare failed, or `change` does not lead from the lock as last seen to `lock`.
            EtcdError: the outcome is unknown until the next watch event.
        """
        if not change.allows(self.view.lock, lock):
            raise SwapFailed("the lock changed meanwhile")
        data = None if lock is None else lock.to_json()
        compared = compares(
            change,
            layout=self._layout,
            instance=self._instance,
            revision=self.view.mod_revision,
            session=self._session(),
            ground=ground,
            holder=holder,
            offer=offer,
        )
        write: Op = Delete(self._key) if data is None else Put(self._key, data)
        before = self.view.data
        await point("lock to be written")
        try:
            changes = [write, *self._vouching(change, lock), *also]
            result = await self._txn([*compared, *more], changes, [Get(self._key)])
        except Ambiguous:
            await self.look()
            if self.view.data == data and data != before:
                return None
            raise SwapFailed("a reply was lost, and the change was not made") from None
        await point("lock written")
        if result.succeeded:
            revision = 0 if data is None else result.revision
            self.view = LockView(
                known=True, data=data, mod_revision=revision, as_of=result.revision, era=self._era, lock=lock
            )
            return result
        self._read(next(iter(result.reads[0]), None), result.revision)
        if self.view.data == before:
            raise SwapFailed("a session, the key `host` or the placement changed meanwhile")
        raise SwapFailed("the lock changed meanwhile")

    async def _txn(self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """Run a transaction. Its result counts only in the history in which it was sent.

        Raises:
            SwapFailed: etcd has another history since; the informer tells what is there now.
        """
        return await self._in_this_era(self._store.txn(compare, success, failure))

    async def _in_this_era(self, asked: Coroutine[Any, Any, T]) -> T:
        era = self._era
        result = await asked
        if self._era != era:
            raise SwapFailed("etcd has another history since that was asked")
        return result

    async def _look(self) -> tuple[KeyValue | None, Status | None]:
        """Read lock and status at one revision, also when etcd has no space; return the status, raw and parsed.

        Raises:
            SwapFailed: see `_txn`.
        """
        reading = await self._in_this_era(self._store.read(self._key, self._status_key))
        lock, found = reading.kvs
        self._read(lock, reading.revision)
        return found, None if found is None else Status.from_json(found.value)

    def _read(self, found: KeyValue | None, revision: int) -> None:
        if found is None:
            self.seen(data=None, mod_revision=0, as_of=revision)
        else:
            self.seen(data=found.value, mod_revision=found.mod_revision, as_of=revision)
