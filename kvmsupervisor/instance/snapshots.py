"""The snapshots of one instance: what is to be done next about them, and doing it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from kvmsupervisor.adapters.metrics import SnapshotResult
from kvmsupervisor.cluster.lock import InstanceLock, SwapFailed
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.snapshots import Errand, Kind, Rollback, Snap, errands, waits
from kvmsupervisor.domain.spec import Spec, Wish
from kvmsupervisor.failpoints import point
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine import snapshots as disks
from kvmsupervisor.machine.images import DiskTrouble
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.snapshots import SnapshotDisks, Standing

GIVE_UP_S = 600.0
"""How long a guest is thawed again and again whose agent does not answer: by then it has booted anew, or never will."""

PUBLISH_S, PUBLISH_EVERY_S = 10.0, 0.05
"""How long it is waited for a status to be in etcd, and how often that is looked at: they are gathered for a while."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 1800.0
"""The pause between two attempts at what fails, the first and the longest: with the machine off each of them takes its
lock and releases it. A change of any of its keys has it tried at once."""

TOLD = 3
"""Failures that the reason of a machine names at most."""

TAKEN, DELETED, ROLLED_BACK = "snapshot.taken", "snapshot.deleted", "snapshot.rolled_back"


@frozen(kw_only=True)
class _Failure:
    """Why an errand failed, when it is worth the next attempt, and how long that is after the last one."""

    said: str
    at: float
    pause_s: float


class Snapshots:
    """The snapshots of one instance.

    Args:
        instance: which.
        context: of all instances.
        machine: its QEMU.
        lock: its lock.
        report: what is said of it; its status has the snapshots that are known.
    """

    def __init__(
        self, instance: InstanceId, context: InstanceContext, machine: Machine, lock: InstanceLock, report: Report
    ) -> None:
        self._id = instance
        self._context = context
        self._machine = machine
        self._lock = lock
        self._report = report
        self._stale = False
        # What has failed, and when each is worth the next attempt.
        self._failed: dict[Errand, _Failure] = {}
        self._released_since: float | None = None

    def look(self, wish: Wish) -> None:
        """People have changed a key: perhaps to have it looked at, and what failed is tried at once."""
        self._failed.clear()
        self._stale = bool(wish.snapshots or self._report.status.snapshots)

    def errand(self, wish: Wish | None) -> Errand | None:
        """What is to be done next; None for nothing, and while its keys are not known, or not sound."""
        return min(self._errands(wish), key=lambda one: max(one.at, self._context.clock.now()), default=None)

    def _errands(self, wish: Wish | None) -> list[Errand]:
        record, status = self._machine.record, self._report.status
        # Asked at every turn, and most machines have none of it.
        is_plain = wish is None or not (wish.snapshots or wish.rollback or status.rollback or self._stale)
        if record is not None and record.standing:
            found = [Errand(kind=Kind.RELEASE)]
        elif wish is None or wish.spec is None or is_plain:
            return []
        else:
            found = errands(
                wish.snapshots,
                wish.rollback,
                known={snap.name for snap in status.snapshots},
                last=status.rollback,
                stale=self._stale,
                runs=record is not None,
                since=self._since,
            )
        return [replace(one, at=self._failed[one].at) if one in self._failed else one for one in found]

    def trouble(self, wish: Wish | None) -> str | None:
        """What people should know: why errands failed, and that a rollback waits; None for nothing."""
        if not self._failed and (wish is None or wish.rollback is None):
            return None
        there = {replace(one, at=0.0) for one in self._errands(wish)}
        said = [failure.said for one, failure in self._failed.items() if one in there]
        if wish is not None and self._machine.record is not None:
            said += filter(None, [waits(wish.rollback, self._report.status.rollback, since=self._since)])
        return "; ".join(said[:TOLD]) or None

    @property
    def _since(self) -> int:
        era = self._context.era()
        return era.since if era.has_changed else 0

    def storage(self, errand: Errand | None) -> Storage | None:
        """What a lock says that is taken for an errand: None for what the machine itself has."""
        return Storage.UNFENCEABLE if errand is not None and errand.kind is Kind.ROLL_BACK else None

    # --- doing --------------------------------------------------------------------------------------------------

    async def act(self, wish: Wish | None) -> None:
        """Do what is next. Failing is observed: why, and when it is tried again.

        Raises:
            SwapFailed, EtcdError: it is not known whether the lock is still this host's.
        """
        errand = self.errand(wish)
        if errand is None:
            return
        errand = replace(errand, at=0.0)
        try:
            if errand.kind is Kind.RELEASE:
                await self._release()
            else:
                assert wish is not None
                assert wish.spec is not None
                async with self._disks(wish.spec) as (disks_of, standing):
                    await self._do(errand, disks_of, standing)
        except DiskTrouble as error:
            self._fails(errand, error)
        else:
            self._failed.pop(errand, None)
            self._stale = self._stale and errand.kind is not Kind.LOOK

    def _fails(self, errand: Errand, error: DiskTrouble) -> None:
        before, said = self._failed.get(errand), str(error)
        self._context.metrics.snapshot(SnapshotResult.FAILED)
        pause_s = max(error.retry_s, FIRST_PAUSE_S) if before is None else min(2 * before.pause_s, LONGEST_PAUSE_S)
        self._failed[errand] = _Failure(said=said, at=self._context.clock.now() + pause_s, pause_s=pause_s)
        if before is None or before.said != said:
            self._report.tell("snapshot.failed", level="warning", reason=said)

    @contextlib.asynccontextmanager
    async def _disks(self, wanted: Spec) -> AsyncIterator[tuple[SnapshotDisks, Standing]]:
        """The disks of the machine that runs, or is wanted; and what has its guest stand still."""
        context, machine = self._context, self._machine
        # With the guest's own rights, where it has a client: its keys reach no other one's images.
        ceph = context.snapshots.of_guest(self._id)
        if machine.record is None:
            async with disks.resting(ceph, context.local_disks, self._id, wanted) as found:
                yield found, disks.off
        elif machine.spec is None:
            raise DiskTrouble("a newer release started its QEMU, whose disks are not known", disks.RETRY_S)
        else:
            yield disks.live(ceph, machine.spec, machine.standstill.ask), machine.standstill.instant

    async def _do(self, errand: Errand, disks_of: SnapshotDisks, standing: Standing) -> None:
        name = errand.name
        match errand.kind:
            case Kind.TAKE:
                instant = await disks_of.take(name, standing, self._still_ours)
                found = (await disks_of.look()).snaps(self._known())
                if instant is not None and name in found:
                    at = self._context.clock.wall()
                    found[name] = replace(found[name], at=at, how=instant.how.value, why=instant.why)
                    said = f"the snapshot {name} was taken ({instant.how.value})"
                    self._context.metrics.snapshot(SnapshotResult.TAKEN, standstill_s=self._machine.standstill.lasted_s)
                    self._report.tell(TAKEN, reason=said if instant.why is None else f"{said}: {instant.why}")
                self._keep(found)
            case Kind.DELETE:
                await disks_of.delete(name)
                self._keep((await disks_of.look()).snaps(self._known()))
                self._context.metrics.snapshot(SnapshotResult.DELETED)
                self._report.tell(DELETED, reason=f"the snapshot {name} was taken away")
            case Kind.ROLL_BACK:
                await self._roll_back(errand, disks_of)
            case _:
                self._keep((await disks_of.tidied()).snaps(self._known()))

    async def _roll_back(self, errand: Errand, disks_of: SnapshotDisks) -> None:
        begun = Rollback(request=errand.request, name=errand.name)
        if not errand.begun:
            if not await disks_of.may_roll_back(errand.name, errand.request):
                self._report.status = replace(self._report.status, rollback=replace(begun, done=True))
                return
            # In etcd before any disk is touched: until it is done, the machine does not start, here or elsewhere.
            await self._publish(begun)
        await self._still_ours()
        await point("to be rolled back")
        await disks_of.roll_back(errand.name, errand.request)
        self._report.status = replace(self._report.status, rollback=replace(begun, done=True))
        self._keep((await disks_of.look()).snaps(self._known()))
        self._context.metrics.snapshot(SnapshotResult.ROLLED_BACK)
        self._report.tell(ROLLED_BACK, reason=f"its disks are as in the snapshot {errand.name}")

    async def _publish(self, begun: Rollback) -> None:
        writer, before = self._context.status_writer, self._report.status
        status = replace(before, rollback=begun)
        writer.set(self._id, status)
        deadline = self._context.clock.now() + PUBLISH_S
        while writer.publishes(self._id):
            written = writer.written(self._id)
            if written is not None and written[0].rollback == begun:
                break
            if self._context.clock.now() >= deadline:
                writer.set(self._id, before)
                raise DiskTrouble("that a rollback begins could not be written into etcd, so it does not begin")
            await self._context.clock.sleep(PUBLISH_EVERY_S)
        self._report.status = status

    async def _release(self) -> None:
        now = self._context.clock.now()
        self._released_since = self._released_since or now
        said = await self._machine.standstill.release(give_up=now >= self._released_since + GIVE_UP_S)
        if said is not None:
            raise DiskTrouble(said, disks.RETRY_S)
        self._released_since = None
        self._report.tell(
            "snapshot.released", level="warning", reason="its guest, which a snapshot had stopped, goes on"
        )

    async def _still_ours(self) -> None:
        """Make sure that nobody else had the machine meanwhile: what was done would be of no one instant.

        Raises:
            SwapFailed: the lock has changed.
            EtcdError: it is not known.
        """
        before = self._lock.view.data
        await self._lock.look()
        if self._lock.view.data != before or not self._context.session.held:
            raise SwapFailed("its lock has changed meanwhile")

    def _known(self) -> dict[str, Snap]:
        return {snap.name: snap for snap in self._report.status.snapshots}

    def _keep(self, found: dict[str, Snap]) -> None:
        self._report.status = replace(self._report.status, snapshots=tuple(found.values()))
