"""A live move of one instance: the steps of both sides, and what is remembered between two (law 13).

When which step is due is decided in `domain.move`. Nothing that is kept here is needed to be safe: a supervisor that
has forgotten it calls the move off, or hands the guest over, by what lock and QEMU say.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence

from kvmsupervisor.adapters.etcd import EtcdError
from kvmsupervisor.adapters.metrics import MigrationResult
from kvmsupervisor.adapters.transfer import TransferFailed
from kvmsupervisor.cluster.lock import InstanceLock, SwapFailed
from kvmsupervisor.domain.handover import announced, arrived, called_off, given
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Change, Destination, Lock, LockState
from kvmsupervisor.domain.move_checks import SWITCHES, Guest, refusals
from kvmsupervisor.domain.offer import Offer
from kvmsupervisor.domain.spec import Power, Spec, Wish, spec_from_object
from kvmsupervisor.domain.storage import images_of
from kvmsupervisor.domain.transfer import NO_COURSE, Course, Link
from kvmsupervisor.domain.view import Action
from kvmsupervisor.failpoints import point
from kvmsupervisor.instance.arrival import Arrival, Unwelcome
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.shutting_out import may_be_shut_out, see_off
from kvmsupervisor.instance.start import Start
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.migration import MoveRefused
from kvmsupervisor.machine.system import Connection, Relay

CONNECT_S = 10.0
"""How long the target may take to answer the source's call. Arbitrary; it takes milliseconds."""

READY_S = 120.0
"""How long the target may take until its QEMU waits: media are copied, QEMU opens its disks."""

OFFER_POLL_S = 0.5
"""How often to look for the target's offer, which comes when it has seen the new `host`."""

SWITCH_S = 1.0
"""How long etcd may take to answer while the guest is stopped, before it goes on at the source."""

REST_S = 30.0
"""How long the rest may be under way before the connection is cut. Arbitrary: a hundred times the downtime."""

LEAST_S, PER_GIB_S = 120.0, 150.0
"""How long memory may be sent: a guest that writes faster than that is never done (KubeVirt's figure)."""

DOWNTIME_MS = 300
"""QEMU's own default."""

FAILURES = 2
"""After so many attempts a target counts as one that does not get it. One fails also by an upgrade of a supervisor."""

PAUSE_S, LONGEST_PAUSE_S = 5.0, 1800.0
"""Pause after an attempt that came to nothing; each further one is twice as long."""


class Moves:
    """The live moves of one instance, away from this host and to it."""

    def __init__(
        self,
        instance: InstanceId,
        *,
        context: InstanceContext,
        machine: Machine,
        lock: InstanceLock,
        start: Start,
        report: Report,
        wake: Callable[[], None],
    ) -> None:
        self._id = instance
        self._context = context
        self._machine = machine
        self._lock = lock
        self._report = report
        self._wake = wake
        self.arrival = Arrival(
            instance, context=context, machine=machine, lock=lock, start=start, report=report, wake=wake
        )
        self._connection: Connection | None = None
        self._relay: Relay | None = None
        self._calling: asyncio.Task[None] | None = None
        self._ready: Destination | None = None
        self._offer = 0
        self._refused = False
        self._cold: tuple[str, str, str] | None = None
        self._failures = 0
        self._target: str | None = None
        self._again_at = 0.0
        self._trouble: str | None = None
        self._give_up_at = math.inf
        self._why_give_up = ""
        self._began = 0.0

    # --- what is observed -------------------------------------------------------------------------------------

    def course(self, wish: Wish | None, lock: Lock | None) -> Course:
        """What is known of a move beside lock and QEMU."""
        moving, record = self._context.moving, self._machine.record
        if moving is None:
            return NO_COURSE
        if wish is not None and wish.runs_on == self._context.me and (record is None or record.incoming):
            return self.arrival.course(wish, lock, moving)
        is_calling = self._calling is not None
        target = None if wish is None else wish.runs_on
        if target != self._target and self._link is Link.NONE and not is_calling:
            # What another target said, or the same one before somebody had second thoughts, is of no account.
            self._target, self._failures, self._again_at, self._trouble = target, 0, 0.0, None
        return Course(
            cold=None if record is None or wish is None else self._why_cold(wish),
            only_live=moving.only_live,
            link=self._link,
            ready=self._ready,
            refused=self._refused,
            again_at=math.inf if is_calling else self._again_at,
            trouble=self._trouble,
            give_up_at=self._give_up_at,
            why_give_up=self._why_give_up,
        )

    def setback(self, target: str) -> str | None:
        """Why a guest that runs here cannot be moved live to `target`, by the last attempts; None without a reason."""
        if self._target != target or self._link is not Link.NONE or self._calling is not None:
            return None
        record, cold = self._machine.record, self._cold
        if record is not None and cold is not None and cold[:2] == (record.incarnation, target):
            return cold[2]
        return self._trouble if self._failures >= FAILURES else None

    @property
    def _link(self) -> Link:
        if self._relay is not None:
            return Link.NONE if self._relay.is_over else Link.IN_USE
        return Link.OPEN if self._connection is not None and self._connection.is_alive else Link.NONE

    def _why_cold(self, wish: Wish) -> str | None:
        moving, target = self._context.moving, wish.runs_on
        assert moving is not None
        if moving.only_cold or target is None or not wish.is_elsewhere(self._context.me):
            return ""
        return self.why_cold(target)

    def why_cold(self, target: str) -> str | None:
        """Why the guest that runs here can be moved to `target` only cold; None when it can be moved live."""
        moving, record = self._context.moving, self._machine.record
        if moving is None:
            return f"this host moves no guest live ({SWITCHES})"
        if moving.only_cold:
            return "KVM_MIGRATION is cold here"
        if record is None:
            return None
        if self._cold is not None and self._cold[:2] == (record.incarnation, target):
            return self._cold[2]
        spec = spec_from_object(record.spec)
        if spec is None:
            return "it was started by another release"
        guest = Guest(spec=spec, machine=record.machine, accel=record.accelerator)
        found = refusals(guest, target, moving.facts, moving.facts_of(HostName(target)))
        return "; ".join(map(str, found)) or None

    @property
    def running(self) -> Spec | None:
        """The machine that was started here; None where none lives, or another release has started it."""
        return self._machine.spec

    # --- the steps --------------------------------------------------------------------------------------------

    async def act(self, action: Action, wish: Wish | None) -> None:  # noqa: C901, PLR0912 - a table of actions
        """Do one of them.

        Raises:
            SwapFailed, EtcdError: etcd did not do it.
            NotFenced: storage did not.
        """
        match action:
            case Action.CALL:
                assert wish is not None
                self._call(wish)
            case Action.ANNOUNCE:
                await self._announce(wish)
            case Action.SEND:
                await self._send()
            case Action.CANCEL:
                await self._machine.migration.cancel()
                self._hang_up()
            case Action.SWITCH:
                await self._switch(wish)
            case Action.CUT:
                self._fails(f"the rest was under way for more than {REST_S:g} s")
                self._hang_up()
                self._give_up_at = math.inf
            case Action.GIVE:
                await self._give(wish)
            case Action.CALL_OFF:
                await self._call_off(wish)
            case Action.GO_BACK:
                await self._go_back()
            case Action.OFFER:
                assert wish is not None
                await self.arrival.offer(wish)
            case Action.RECEIVE:
                assert wish is not None
                await self.arrival.receive(wish)
            case Action.TELL:
                await self.arrival.tell(wish)
            case Action.ARRIVE:
                await self._arrive()
            case Action.SETTLE:
                await self._settle()
            case _:
                raise AssertionError(action)

    # --- at the source ----------------------------------------------------------------------------------------

    def _call(self, wish: Wish) -> None:
        """Ask the target to make ready; it takes seconds, in which the guest is looked after as ever."""
        moving = self._context.moving
        assert moving is not None
        if not moving.leaving.take(self._id):
            self._trouble = "others are on their way from here, one at a time"
            self._again_at = self._context.clock.now() + OFFER_POLL_S
            return
        # What kept the last attempt from it is said until this one has come to something.
        self._trouble = self._trouble or f"{wish.runs_on} makes ready for it"
        since = 0 if wish.ground is None else wish.ground.revision
        self._calling = asyncio.get_running_loop().create_task(self._calling_for(HostName(str(wish.runs_on)), since))

    async def _calling_for(self, target: HostName, since: int) -> None:
        try:
            await self._talk_to(target, since)
        except (TransferFailed, EtcdError) as error:
            self._fails(f"{target} does not make ready: {error}")
            self._hang_up()
        except Unwelcome as error:
            self._trouble = f"{target} does not take it: {error}"
            self._hang_up()
            if error.for_good and self._machine.record is not None:
                self._cold = (self._machine.record.incarnation, target, str(error))
            else:
                self._fails(self._trouble)
        finally:
            self._calling = None
            self._wake()

    async def _talk_to(self, target: HostName, since: int) -> None:
        context = self._context
        key = context.layout.offer_key(self._id)
        found = (await context.store.read(key)).kvs[0]
        offer = None if found is None else Offer.from_json(found.value)
        # One from before it was to go there is of an earlier move: nobody answers to its key any more.
        if found is None or offer is None or offer.host != target or found.mod_revision < since:
            self._trouble = f"waits until {target} has said that it takes it"
            self._again_at = context.clock.now() + OFFER_POLL_S
            self._leave_line()
            return
        host, _, port = offer.address.rpartition(":")
        self._connection = connection = await context.system.transfers.call(
            host.strip("[]"), int(port), instance=self._id, key=bytes.fromhex(offer.key), timeout_s=CONNECT_S
        )
        await point("connected to the target")
        await connection.send(self.arrival.manifest(), timeout_s=READY_S)
        answer = await connection.receive(timeout_s=READY_S)
        if "refused" in answer:
            raise Unwelcome(str(answer["refused"]), for_good=bool(answer.get("for_good")))
        now = (await context.store.read(key)).kvs[0]
        offer = None if now is None else Offer.from_json(now.value)
        if now is None or offer is None or offer.waits is None or offer.waits.host != target:
            raise TransferFailed("its offer is gone")
        self._ready, self._offer, self._refused, self._trouble = offer.waits, now.mod_revision, False, None

    async def _announce(self, wish: Wish | None) -> None:
        assert wish is not None
        assert self._ready is not None
        lock = self._lock.view.lock
        assert lock is not None
        try:
            self._lock.vouch(self._ready.clients)
            await self._lock.write(Change.ANNOUNCE, announced(lock, self._ready), wish.ground, offer=self._offer)
        except SwapFailed:
            self._fails("etcd has refused to put the target on record")
            self._hang_up()
            raise
        self._report.tell("move.announced", to=self._ready.host)

    async def _send(self) -> None:
        moving, connection, record = self._context.moving, self._connection, self._machine.record
        assert moving is not None
        assert connection is not None
        assert record is not None
        self._relay, self._connection = connection.carry(self._wake), None
        spec = spec_from_object(record.spec)
        gib = 1.0 if spec is None else spec.ram_mib / 1024
        now = self._began = self._context.clock.now()
        lasts_s = max(LEAST_S, PER_GIB_S * gib)
        self._give_up_at = now + lasts_s
        self._why_give_up = f"its memory is not there after {lasts_s:g} s: it writes faster than it can be sent"
        try:
            await self._machine.migration.send(
                self._relay.qemus_end.fileno(), bandwidth=moving.bandwidth, downtime_ms=DOWNTIME_MS, told=self._wake
            )
        except MoveRefused as error:
            self._fails(str(error))
            self._relay.cut()
        finally:
            self._relay.qemus_end.close()
        await point("sending")

    async def _switch(self, wish: Wish | None) -> None:
        """Ask etcd once more, as its answer will be needed in a moment; then let QEMU send the rest."""
        assert wish is not None
        migration = self._machine.migration
        try:
            async with asyncio.timeout(SWITCH_S):
                holds = await self._lock.would_hold(Change.GIVE, wish.ground, offer=self._offer)
        except (TimeoutError, EtcdError) as error:
            holds, why = False, f"etcd did not answer while its guest was stopped ({error or 'in time'})"
        else:
            why = "the target's offer, the lock or `host` has changed"
        await point("switching")
        try:
            if holds:
                self._give_up_at = self._context.clock.now() + REST_S
                self._why_give_up = f"that has lasted for {REST_S:g} s"
                await migration.switch()
                return
        except MoveRefused as error:
            why = str(error)
        self._fails(why)
        await migration.cancel()
        self._hang_up()

    async def _give(self, wish: Wish | None) -> None:
        """Hand over: the one write that says whose the guest is."""
        assert wish is not None
        lock, record = self._lock.view.lock, self._machine.record
        assert lock is not None
        assert record is not None
        if not self._offer:
            await self._find_offer(lock)
        if self._offer:
            stopped_ms = await self._machine.migration.stopped_ms()
            now = given(lock, paused=record.paused, mark=self._context.era().mark, stopped_ms=stopped_ms)
            await point("handing over")
            try:
                await self._lock.write(Change.GIVE, now, wish.ground, offer=self._offer)
            except SwapFailed:
                self._refused = True
                raise
            await point("handed over")
        else:
            self._refused = True
            return
        figures = self._machine.migration.figures
        self._report.tell(
            "move.given", to=now.host, epoch=now.epoch, bytes=figures.sent, downtime_s=figures.downtime_s,
            seconds=round(self._context.clock.now() - self._began, 3) if self._began else None,
        )  # fmt: skip
        self._context.metrics.migrated(
            MigrationResult.COMPLETED, sent=figures.sent, downtime_s=figures.downtime_s or 0.0
        )
        self._end()

    async def _find_offer(self, lock: Lock) -> None:
        """A successor does not know it: the offer of the very QEMU that the lock names."""
        found = (await self._context.store.read(self._context.layout.offer_key(self._id))).kvs[0]
        offer = None if found is None else Offer.from_json(found.value)
        if found is not None and offer is not None and offer.waits == lock.to:
            self._offer = found.mod_revision

    async def _call_off(self, wish: Wish | None) -> None:
        lock = self._lock.view.lock
        assert lock is not None
        target = None if lock.to is None else lock.to.host
        is_wanted = wish is not None and wish.runs_on == target and wish.power is Power.ON
        await self._lock.write(Change.CALL_OFF, called_off(lock), None)
        if self._again_at <= self._context.clock.now():
            self._fails(self._trouble or "the connection was lost")
        self._report.tell("move.called_off", level="warning", reason=self._trouble)
        result = MigrationResult.FAILED if is_wanted else MigrationResult.CANCELLED
        self._context.metrics.migrated(result, sent=self._machine.migration.figures.sent)
        self._hang_up()

    async def _go_back(self) -> None:
        try:
            await self._machine.migration.go_on()
        except MoveRefused as error:
            # Another host has taken it over, and shut this QEMU out.
            await self._machine.give_up(f"it cannot go on: {error}")
        else:
            self._report.tell("move.went_back")

    def _fails(self, why: str) -> None:
        pause_s = min(PAUSE_S * 2.0**self._failures, LONGEST_PAUSE_S)
        self._failures += 1
        self._again_at = self._context.clock.now() + pause_s
        self._trouble = f"{why}; that is tried again after {pause_s:g} s"
        self._report.tell("move.failed", level="warning", reason=why, pause_s=pause_s)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._relay is not None:
            self._relay.cut()
        self._connection = self._relay = self._ready = None
        self._offer, self._refused, self._give_up_at = 0, False, math.inf
        self._leave_line()

    def _end(self) -> None:
        self._failures, self._again_at, self._trouble = 0, 0.0, None
        self._hang_up()

    def _leave_line(self) -> None:
        if self._context.moving is not None:
            self._context.moving.leaving.give_back(self._id)

    def ended(self, record: Incarnation) -> None:
        """Its QEMU has ended: what was on its way from it, or to it, is not any more."""
        if self._calling is not None:
            self._calling.cancel()
        self._hang_up()
        if record.incoming:
            self.arrival.ended()

    def close(self) -> None:
        """Let go of everything: what is under way fails, and is called off by a successor."""
        self._machine.migration.close()
        if self._calling is not None:
            self._calling.cancel()
        self._hang_up()
        self.arrival.close()

    # --- at the target, once it is given ----------------------------------------------------------------------

    async def _arrive(self) -> None:
        """Let the guest go on that the lock gives to this very QEMU."""
        context, machine = self._context, self._machine
        lock, record = self._lock.view.lock, machine.record
        assert lock is not None
        assert record is not None
        if lock.fence and lock.taken_from is not None and context.host_has_session(HostName(lock.taken_from)) is False:
            # Nobody there closes the disks: Ceph would wait for half a minute.
            await context.fencing.fence(await self._may_be_shut_out(lock.fence))
        await point("arriving")
        # On record first: a successor takes it for its own by the lock.
        self._record_arrival(lock, paused=lock.paused)
        await point("arrival on record")
        if not lock.paused:
            try:
                await machine.migration.go_on()
            except MoveRefused as error:
                await machine.give_up(f"it cannot go on: {error}")
                return
        self.arrival.settle_from = context.clock.now()
        self._report.arrived(lock, record.incarnation)
        self._report.tell("move.arrived", of=lock.taken_from, paused=lock.paused or None)

    async def _may_be_shut_out(self, addresses: Sequence[str]) -> Sequence[str]:
        """Those of whom that is known at once: the guest stands still meanwhile, and does not for want of etcd."""
        with contextlib.suppress(TimeoutError, SwapFailed, EtcdError):
            async with asyncio.timeout(SWITCH_S):
                return await may_be_shut_out(addresses, instance=self._id, context=self._context, own=self._lock)
        return ()

    def _record_arrival(self, lock: Lock, **known: bool) -> None:
        """Note that the QEMU is this host's own. On a full disk that is known in memory, and by the lock."""
        with contextlib.suppress(OSError):
            self._machine.note(incoming=False, epoch=lock.epoch, **known)

    async def _settle(self) -> None:
        """Write that it runs here, once the source's QEMU has closed the disks, or was shut out."""
        lock = self._lock.view.lock
        assert lock is not None
        if lock.state is LockState.RUNNING:
            # Its arrival could not be recorded.
            self._record_arrival(lock)
            return
        record = self._machine.record
        spec = None if record is None else spec_from_object(record.spec)
        if spec is not None and (left := await see_off(lock, images_of(spec), self._id, self._context)):
            self._report.tell("lock.fenced", addresses=list(left), taken_from=lock.taken_from)
        await self._lock.write(Change.ARRIVE, arrived(lock), None)
        await self.arrival.take_back()
        self.arrival.end()
