"""The lock of one QEMU that was started with its user's own options: taken, recorded, guarded, released.

The table of `domain.lifecycle` decides what may be done with it, as for any instance; here is what is observed for
that, and the steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Never
from uuid import uuid4

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import EtcdError
from kvmsupervisor.aio import start_part
from kvmsupervisor.cluster.fencing import Fencing, NotFenced
from kvmsupervisor.cluster.informer import Mirror
from kvmsupervisor.cluster.lock import InstanceLock, SwapFailed
from kvmsupervisor.domain.grouping import Flat
from kvmsupervisor.domain.history import is_older
from kvmsupervisor.domain.incarnation import Memory
from kvmsupervisor.domain.keys import HostName, parse_id
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.lock import Change, Claim, Lock, LockState, take
from kvmsupervisor.domain.ownership import LOCK_POLL_S
from kvmsupervisor.domain.spec import Spec, Wish
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.domain.storage import storage_of
from kvmsupervisor.domain.view import Action, Holdover, View
from kvmsupervisor.instance.assembly import Membership
from kvmsupervisor.machine.identity import Marks, pid_of
from kvmsupervisor.machine.system import Processes
from kvmsupervisor.single.identity import LET_GO_S, Stand

log = structlog.get_logger(__name__)

RETRY_S = 1.0
"""Pause after etcd failed or a compare did not hold."""


class Held(Exception):
    """Somebody else holds the lock. The message says who."""


class Lost(Exception):
    """The lock names another incarnation: ours must not run. The message says whose."""


class SingleLock:
    """The lock.

    Args:
        stand: who takes it.
        member: what the holder is in etcd.
        clock: the machine's.
        options: of QEMU, to tell what it may write to.
        fencing: of the storage, for a lock whose last holder has left clients there.
        processes: of this host.
        wake: set whenever sessions of hosts differ.
    """

    def __init__(
        self,
        *,
        stand: Stand,
        member: Membership,
        clock: Clock,
        options: Sequence[str],
        fencing: Fencing,
        processes: Processes,
        wake: asyncio.Event,
    ) -> None:
        store, layout = member.store, stand.holder.layout
        self.incarnation = str(uuid4())
        self._stand = stand
        self._clock = clock
        self._member = member
        self._session = member.session
        self._history = member.history
        self._fencing = fencing
        self._processes = processes
        self._spec = Spec(ram_mib=1, extra_flags=tuple(options))
        self._lock = InstanceLock(store=store, layout=layout, instance=stand.name, session=member.session.compare)
        self._key = stand.lock_key
        self._taken, self._epoch = False, 0
        self._recorded: Lock | None = None
        # The instance's status as last read. None: there is none, or this lock is no instance's.
        self._status: Status | None = None
        self._claimed_by: HostName | None = None
        self._etcd_at = 0.0
        self._trouble: str | None = None
        self._wake = wake
        self._own = Flat()
        self._mirror = Mirror(
            store=store,
            clock=clock,
            history=member.history,
            prefix=self._key,
            table=self._own,
            on_change=self._on_change,
        )
        self._era = self._mirror.era
        self._neighbours = member.neighbours

    @property
    def marks(self) -> Marks:
        """What tells of the process to come that it is this one."""
        stand = self._stand
        folder = stand.run_dir.instance(stand.name).path
        return Marks(
            prefix=stand.holder.layout.prefix, instance=stand.name, incarnation=self.incarnation, folder=folder
        )

    async def run(self) -> None:
        """Follow the lock and the hosts' sessions, for ever."""
        end_listening = self._session.listen(self._wake.set)
        try:
            async with asyncio.TaskGroup() as tasks:
                start_part(tasks, self._mirror.run())
                start_part(tasks, self._neighbours.run())
                start_part(tasks, self._history.run())
                start_part(tasks, self._history.run_speaking(self._may_speak, self._member.speak))
                await self._mirror.synced.wait()
                self._on_change(frozenset(), self._mirror.revision)
        finally:
            end_listening()

    def _on_change(self, changed: Set[bytes], revision: int) -> None:
        entry = self._own.get(self._key.encode())
        if self._era != self._mirror.era:
            self._era = self._mirror.era
            self._lock.begin_anew()
        self._lock.seen(
            data=None if entry is None else entry.value,
            mod_revision=0 if entry is None else entry.mod_revision,
            as_of=revision,
        )
        self._wake.set()

    def _may_speak(self) -> bool:
        """Whether the lock says what runs here, in the history that etcd has now."""
        known = self._mirror.synced.is_set() and self._era == self._history.era and self._session.held
        return known and (not self._taken or self._claim() is Claim.MINE)

    # --- before QEMU ------------------------------------------------------------------------------------------

    async def take(self, *, wait: bool) -> None:
        """Return once QEMU may be started, paused.

        Args:
            wait: whether to wait while somebody else holds it.

        Raises:
            Held: somebody else does, and it shall not be waited for.
        """
        said = ""
        while True:
            self._wake.clear()
            view = self._observe()
            decision = decide(view)
            if decision.action is Action.SPAWN:
                return
            if decision.reason != said:
                said = decision.reason
                tell = log.warning if decision.action is None else log.info
                tell("lock.waiting", key=self._key, holder=self._stand.holder.name, reason=said)
            if not wait and decision.action is None and self._is_elsewhere(view):
                raise Held(said)
            if decision.action is None:
                await self._clock.wait(self._wake, decision.wake_at)
            else:
                await self._try(decision.action)

    def _is_elsewhere(self, view: View) -> bool:
        if view.claim is Claim.STRANGER:
            # Before the sessions are read, a holder that is gone looks like one that lives.
            return view.holder_has_session is not None
        return view.claim is Claim.UNREADABLE or view.claimed_by is not None or view.holdover is not None

    def _observe(self) -> View:
        lock = self._lock.view.lock
        holder = self._stand.holder.name
        return View(
            now=self._clock.now(),
            me=holder,
            boot_id=self._stand.holder.boot_id,
            # What a wish comes to that asks for this QEMU, and for nothing else.
            wish=Wish(instance=self._stand.name, host=holder, spec=self._spec, keys=1),
            session_held=self._session.held,
            etcd_at=self._etcd_at,
            etcd_trouble=self._trouble or self._session.problem or None,
            lock=self._lock.view,
            planned=self.incarnation if self._taken else None,
            holder_has_session=None if lock is None else self._neighbours.has_session(lock.host),
            era=self._history.present,
            holdover=None if (pid := self._holdover(lock)) is None else Holdover(pid=pid),
            claimed_by=self._claimed_by,
            memory=Memory(boot_id=self._stand.holder.boot_id),
            slot=True,
        )

    def _holdover(self, lock: Lock | None) -> int | None:
        """The pid of an earlier container's QEMU that lives. The holder's name sees to it that pids mean something."""
        if lock is None or (lock.host, lock.boot_id) != (self._stand.holder.name, self._stand.holder.boot_id):
            return None
        if lock.incarnation == self.incarnation:
            return None
        name = self._stand.name
        return pid_of(self._processes, name, lock.incarnation, pid=lock.pid, starttime=lock.starttime)

    async def _try(self, action: Action) -> None:
        """Make one step; what it came to is observed."""
        try:
            match action:
                case Action.TAKE:
                    await self._take()
                case Action.LOOK:
                    await self._look()
                    self._etcd_at = self._clock.now() + LOCK_POLL_S
                case Action.FENCE:
                    lock = self._lock.view.lock
                    assert lock is not None
                    await self._fencing.fence(lock.fence)
                    await self._lock.write(Change.FENCE, lock.fenced(lock.fence), None)
                case Action.WATCH:
                    # Which images these options open is not known here, so nobody is asked, and nothing taken.
                    self._etcd_at = self._clock.now() + RETRY_S
                    self._trouble = "a QEMU of options alone takes no disks in Ceph from a host that is gone"
                    return
                case _:
                    raise AssertionError(f"nothing asks for {action} before there is a process")
        except (SwapFailed, EtcdError, NotFenced) as error:
            self._etcd_at = self._clock.now() + RETRY_S
            self._trouble = str(error)
        else:
            self._trouble = None

    async def _take(self) -> None:
        floor = 0
        was_free = self._lock.view.data is None
        floor = await self._look()
        if (self._lock.view.data is None) is not was_free or (was_free and self._claimed_by is not None):
            return
        previous = self._lock.view.lock
        lock = take(
            previous,
            host=self._stand.holder.name,
            boot_id=self._stand.holder.boot_id,
            incarnation=self.incarnation,
            storage=storage_of(self._spec),
            epoch_floor=max(floor, self._history.present.epoch_floor),
        )
        # Before it is written: a write whose reply is lost is recognised by it.
        self._taken, self._epoch = True, lock.epoch
        foreign = previous is not None and previous.host != lock.host
        await (
            self._lock.write(Change.TAKE_OVER, lock, None, holder=previous.host)
            if foreign and previous is not None
            else self._lock.write(Change.TAKE, lock, None)
        )
        log.info("lock.taken", key=self._key, holder=lock.host, epoch=lock.epoch, incarnation=lock.incarnation)

    async def _look(self) -> int:
        """Read lock and status; a status may tell of a process although the lock was deleted."""
        status = self._status = await self._lock.look()
        claims = status is not None and status.host != self._stand.holder.name and status.tells_of_a_process
        self._claimed_by = HostName(status.host) if status is not None and claims else None
        return status.epoch if status is not None else 0

    # --- with QEMU --------------------------------------------------------------------------------------------

    async def record(self, *, pid: int, starttime: int) -> None:
        """Put the paused QEMU on record (law 3); returns once its guest may run, which etcd may delay.

        Its storage clients are not known: nothing says which images its options open. So they are never fenced, and
        without an operator's word nobody takes over what it may write to (law 7).

        Raises:
            Lost: the lock names another one.
        """
        while True:
            lock = self._still_ours()
            if lock is None:
                raise Lost(f"{self._key} was deleted, or overwritten, before the guest ran")
            if lock.state is LockState.RUNNING:
                self._recorded = lock
                return
            try:
                recorded = lock.recorded(pid=pid, starttime=starttime, clients=())
                said = self._said(recorded, Phase.RUNNING, "runs in single mode, with options of its own")
                await self._lock.write(Change.RECORD, recorded, None, status=said)
                self._recorded = recorded
            except (SwapFailed, EtcdError) as error:
                log.warning("lock.not_recorded", key=self._key, reason=str(error))
                await self._clock.sleep(RETRY_S)
            else:
                return

    async def guard(self, *, pid: int, starttime: int) -> Never:
        """Watch over it while QEMU lives; write it again when somebody has deleted it.

        Raises:
            Lost: it was *read* to name another one (law 6). Nothing else ends a guest.
        """
        ours = self._recorded
        while True:
            self._wake.clear()
            lock = self._still_ours()
            until = None
            if lock is not None:
                ours = lock
            elif ours is not None and self._may_write_again():
                try:
                    again = ours.recorded(pid=pid, starttime=starttime, clients=())
                    await self._lock.reassert(again, self._history.present)
                    log.warning("lock.reasserted", key=self._key, epoch=ours.epoch)
                except (SwapFailed, EtcdError) as error:
                    log.warning("lock.not_reasserted", key=self._key, reason=str(error))
                    until = self._clock.now() + RETRY_S
            await self._clock.wait(self._wake, until)

    def _may_write_again(self) -> bool:
        """Whether the lock, which is not ours, is absent, or older than our QEMU."""
        lock = self._lock.view.lock
        return self._lock.view.data is None or (lock is not None and not self._is_strange(lock))

    def _said(self, lock: Lock, phase: Phase, reason: str) -> Status | None:
        """What the status key is to say, which keeps the epoch beyond the lock; None where this is no instance's lock.

        What earlier hosts found out of the machine stays there.
        """
        if parse_id(self._stand.name) is None:
            return None
        holder, since = self._stand.holder.name, self._clock.wall()
        running = phase is Phase.RUNNING
        before = self._status or Status(id=self._stand.name, host=holder, phase=phase, reason=reason, since=since)
        return replace(
            before,
            host=holder,
            phase=phase,
            reason=reason,
            since=since,
            pid=lock.pid if running else None,
            incarnation=lock.incarnation if running else None,
            epoch=lock.epoch,
            pending=(),
            problems=(),
            accelerator=None,
            notice=None,
            held=False,
            agent=None,
        )

    def _still_ours(self) -> Lock | None:
        """The lock when it is ours; None when it is absent or cannot be read, is older, or another cluster's.

        Raises:
            Lost: it is somebody else's, or an operator has broken it (docs/decisions/0012-a-broken-lock.md).
        """
        lock = self._lock.view.lock
        if self._claim() is Claim.BROKEN:
            raise Lost(f"{self._key} was broken by an operator (`break-lock`), so that another may run it")
        if self._claim() in {Claim.STRANGER, Claim.LEFTOVER}:
            assert lock is not None
            if self._is_strange(lock) or is_older(lock, epoch=self._epoch, incarnation=self.incarnation):
                return None
            raise Lost(f"{self._key} has gone to {lock.host}, epoch {lock.epoch}, incarnation {lock.incarnation}")
        return lock

    def _claim(self) -> Claim:
        stand = self._stand
        return self._lock.view.claim(host=stand.holder.name, boot_id=stand.holder.boot_id, incarnation=self.incarnation)

    def _is_strange(self, lock: Lock) -> bool:
        return self._history.present.is_strange(lock.host, self._lock.view.mod_revision)

    async def let_go(self) -> None:
        """Release it, if it is ours, its QEMU proven gone or never started (law 9)."""
        give_up_at = self._clock.now() + LET_GO_S
        while self._taken and self._clock.now() < give_up_at:
            try:
                # A write of ours may have been cut off: what is known here may be older than it.
                await self._lock.look()
                lock = self._lock.view.lock
                if self._claim() is not Claim.MINE or lock is None:
                    return
                if lock.is_unfenced:
                    reason = "clients of earlier QEMUs may not be fenced yet; whoever takes the lock next fences them"
                    log.warning("lock.not_released", key=self._key, reason=reason)
                    return
                said = self._said(lock, Phase.STOPPED, "its QEMU in single mode has ended")
                await (self._lock.drop() if said is None else self._lock.release(said))
            except (SwapFailed, EtcdError) as error:
                log.warning("lock.not_released", key=self._key, reason=str(error))
                await self._clock.sleep(RETRY_S)
            else:
                log.info("lock.released", key=self._key)
                return
