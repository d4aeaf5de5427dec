"""One instance's loop: observe → decide → act, until nothing of it is ours any more.

Level-triggered: whatever happens only sets one event, and the loop looks at all there is to see. The decision is
`domain.lifecycle.decide`; here is what it sees and what its actions do.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import assert_never
from uuid import uuid4

from structlog.typing import FilteringBoundLogger

from kvmsupervisor.adapters.etcd import EtcdError, Unavailable
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.argv import Identity, Unbuildable, build_argv, instance_uuid
from kvmsupervisor.domain.incarnation import Incarnation, Memory
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lifecycle import LOCK_POLL_S, decide
from kvmsupervisor.domain.lock import Claim, Lock, LockState, take
from kvmsupervisor.domain.restart import after
from kvmsupervisor.domain.spec import Problem, Spec, Wish, spec_to_object
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.storage import storage_of
from kvmsupervisor.domain.view import Action, Decision, View
from kvmsupervisor.fencing import NotFenced
from kvmsupervisor.locking import InstanceLock, SwapFailed
from kvmsupervisor.machine import Machine
from kvmsupervisor.report import Report
from kvmsupervisor.surroundings import Surroundings

ETCD_RETRY_S = 1.0
"""Pause after etcd failed or a compare did not hold. A watch event or a won session wakes the loop earlier; this is
what bounds a disagreement that no event ends."""

REFUSED_RETRY_S = 10.0
"""The same after etcd refused: an operator has to mend something first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """The part of a runnable wish that starting needs."""

    spec: Spec
    host_revision: int
    restart_request: str | None
    revision: int


def _wanted(wish: Wish | None) -> _Wanted:
    # Invariant of the decision: it starts nothing without a machine that can be built.
    assert wish is not None
    assert wish.spec is not None
    return _Wanted(
        spec=wish.spec,
        host_revision=wish.host_revision,
        restart_request=wish.restart_request,
        revision=wish.revision,
    )


class Instance:
    """One instance on this host.

    Attributes:
        id: which.
        report: what is said of it.
        wish: as last told; None before that.
    """

    def __init__(
        self,
        instance: InstanceId,
        *,
        around: Surroundings,
        directory: InstanceDir,
        memory: Memory,
        log: FilteringBoundLogger,
    ) -> None:
        self.id = instance
        self.wish: Wish | None = None
        self._around = around
        self._problems: tuple[Problem, ...] = ()
        self._held = False
        self._memory = memory
        self._wake = asyncio.Event()
        self._machine = Machine(
            prefix=around.layout.prefix,
            directory=directory,
            clock=around.clock,
            notify=self._wake.set,
            on_reset=lambda: self.report.tell("instance.guest_reset"),
            log=log.bind(instance=instance),
        )
        self.report = Report(instance, around=around, machine=self._machine, log=log)
        self._lock = InstanceLock(
            store=around.store, layout=around.layout, instance=instance, session=around.session.compare
        )
        self._planned: str | None = None
        self._claimed_by: HostName | None = None
        self._etcd_at = 0.0
        self._etcd_trouble: str | None = None
        self._quiet_at = 0.0
        self._wanted_at: float | None = None
        self._adopting = False

    # --- what it is told --------------------------------------------------------------------------------------

    def update(self, wish: Wish, *, held: bool, fresh: bool) -> None:
        """Take the latest wish.

        Args:
            wish: the keys as they are.
            held: they are gone, and that waits for an operator's word: the instance goes on as it is.
            fresh: somebody has just written them, so that more may follow.
        """
        if fresh and (self.wish is None or wish.spec != self.wish.spec):
            self._quiet_at = self._around.clock.now() + self._around.settle_s
        self.wish = wish
        self._problems = self._problems_of(wish)
        self._held = held
        memory = replace(self._memory, held=held)
        # The time that people gave the guest holds for the shutdown that follows the removal of all keys, too.
        if wish.keys > 0 and not any(problem.key == "shutdown_timeout" for problem in wish.problems):
            memory = replace(memory, shutdown_timeout_s=wish.shutdown_timeout_s)
        self._remember(memory)
        self._wake.set()

    def saw_lock(self, *, data: bytes | None, mod_revision: int, as_of: int) -> None:
        """Take the lock as a watch shows it."""
        self._lock.seen(data=data, mod_revision=mod_revision, as_of=as_of)
        self._wake.set()

    def notify(self) -> None:
        """Something around changed (session, hosts): look again."""
        self._wake.set()

    def adopt(self, record: Incarnation) -> None:
        """Take over what an earlier supervisor left, before the loop runs."""
        self._adopting = self._machine.adopt(record, boot_id=self._around.boot_id)

    @property
    def was_held(self) -> bool:
        """Whether the removal of its keys was held when it was last told of them, by an earlier supervisor maybe."""
        return self._memory.held

    @property
    def pid(self) -> int | None:
        """Of the living QEMU."""
        return self._machine.pid

    @property
    def starttime(self) -> int | None:
        """Of the QEMU on record, clock ticks since boot."""
        return None if self._machine.record is None else self._machine.record.starttime

    # --- the loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Observe, decide, act; returns when nothing of the instance is ours any more.

        Cancelling it leaves QEMU as it is.
        """
        while True:
            self._wake.clear()
            view = self._observe()
            decision = decide(view)
            self._note_progress(view, decision)
            self.report.say(view, decision)
            if not decision.slot:
                self._around.slots.release(self.id)
            if decision.action is Action.FORGET:
                return
            if decision.action is None:
                await self._around.clock.wait(self._wake, decision.wake_at)
                continue
            try:
                await self._act(decision, view)
            except SwapFailed as error:
                self._pause(ETCD_RETRY_S, str(error))
            except Unavailable as error:
                self._pause(ETCD_RETRY_S, f"etcd does not answer: {error}")
            except (EtcdError, NotFenced) as error:
                self._pause(REFUSED_RETRY_S, str(error))
            else:
                self._etcd_trouble = None

    async def detach(self) -> None:
        """Let go of QEMU without touching it: the next supervisor adopts it."""
        self._around.slots.release(self.id)
        await self._machine.detach()

    def _pause(self, seconds: float, why: str) -> None:
        self._etcd_at = self._around.clock.now() + seconds
        if self._etcd_trouble != why:
            self.report.tell("instance.etcd_trouble", reason=why)
        self._etcd_trouble = why

    def _observe(self) -> View:
        around = self._around
        process = self._machine.view()
        lock = self._lock.view.lock
        now = around.clock.now()
        view = View(
            now=now,
            me=around.me,
            boot_id=around.boot_id,
            wish=self.wish,
            problems=self._problems,
            held=self._held,
            session_held=around.session.held,
            etcd_at=self._etcd_at,
            etcd_trouble=self._etcd_trouble,
            lock=self._lock.view,
            planned=self._planned,
            holder_has_session=None if lock is None else around.host_has_session(lock.host),
            holdover=self._holdover(lock) if process is None else None,
            claimed_by=self._claimed_by,
            process=process,
            memory=self._memory,
            slot=around.slots.state(self.id),
            quiet_at=self._quiet_at,
            start_timeout_s=around.start_timeout_s,
            shutdown_timeout_s=(
                around.shutdown_timeout_s
                if self._memory.shutdown_timeout_s is None
                else self._memory.shutdown_timeout_s
            ),
        )
        if self._adopting and process is not None and process.connected and view.claim is Claim.MINE:
            self._adopting = False
            around.metrics.adopted()
            self.report.tell("instance.adopted", pid=self._machine.pid)
        return view

    def _note_progress(self, view: View, decision: Decision) -> None:
        """Note when a stop began, and since when a start is wanted: what later decisions and figures count from."""
        if decision.phase is not Phase.STOPPING:
            self._machine.stop_is_off()
        elif view.process is not None:
            self._machine.stop_begins()
        starting = view.process is None and decision.phase in {Phase.STARTING, Phase.WAITING} and not view.problems
        if starting and self._wanted_at is None:
            self._wanted_at = view.now

    def _problems_of(self, wish: Wish) -> tuple[Problem, ...]:
        """The wish's problems, and what this host lacks for it."""
        if wish.spec is None or wish.host != self._around.me:
            return wish.problems
        try:
            self._argv(wish.spec, (0, 0))
        except Unbuildable as error:
            return (*wish.problems, error.problem)
        return wish.problems

    def _holdover(self, lock: Lock | None) -> int | None:
        """The pid of a QEMU that the lock says is ours, that lives, and of which there is no record."""
        if lock is None or (lock.host, lock.boot_id) != (self._around.me, self._around.boot_id):
            return None
        if lock.incarnation == self._planned:
            # Written a moment ago, for a process to come. Looking for it would mean to read all of /proc.
            return None
        return self._machine.holdover(lock)

    # --- acting -----------------------------------------------------------------------------------------------

    async def _act(self, decision: Decision, view: View) -> None:  # noqa: C901, PLR0912 - a table: one line per action
        """Do one action on what `view` showed: the wish may change meanwhile, the lock's compare tells."""
        machine, action, wish = self._machine, decision.action, view.wish
        match action:
            case None | Action.FORGET:
                raise AssertionError("the loop does these")
            case Action.QUEUE:
                self._around.slots.request(self.id, self._wake.set)
            case Action.LOOK:
                await self._look()
                self._etcd_at = self._around.clock.now() + LOCK_POLL_S
            case Action.TAKE:
                await self._take(_wanted(wish))
            case Action.FENCE:
                await self._fence(_wanted(wish))
            case Action.SPAWN:
                self._spawn(_wanted(wish))
            case Action.CONNECT:
                await machine.connect()
            case Action.RECORD:
                await self._record(_wanted(wish))
            case Action.CONTINUE:
                await self._continue()
            case Action.PROBE:
                await machine.probe()
            case Action.POWERDOWN:
                await machine.press_power_button()
            case Action.QUIT:
                await machine.quit()
            case Action.KILL:
                await machine.kill(decision.reason)
            case Action.GIVE_UP:
                await machine.give_up(decision.reason)
            case Action.REASSERT:
                await self._reassert()
            case Action.BURY:
                await self._bury()
            case Action.RELEASE:
                await self._release()
            case _:
                assert_never(action)

    async def _look(self) -> int:
        """Read lock and status; return the last epoch that the status tells of."""
        status = await self._lock.look()
        around = self._around
        claims = status is not None and status.host != around.me and status.tells_of_a_process
        self._claimed_by = HostName(status.host) if status is not None and claims else None
        self.report.key_was_read()
        return status.epoch if status is not None else 0

    async def _take(self, wish: _Wanted) -> None:
        around = self._around
        floor = 0
        if self._lock.view.data is None:
            # A lock that was deleted by hand must not let two machines run: its holder's status still tells of it.
            if self.report.status.epoch == 0 and await self._take_if_new(wish):
                return
            floor = await self._look()
            if self._claimed_by is not None or self._lock.view.data is not None:
                # Somebody has it: the next decision is made on what was read.
                return
        previous = self._lock.view.lock
        await self._lock.write(self._plan(wish, floor), wish.host_revision)
        if previous is not None and previous.host != around.me:
            around.metrics.took_over()
        self._tell_taken(previous)

    async def _take_if_new(self, wish: _Wanted) -> bool:
        """Take a lock that nobody ever had, in one step; False when there is a status, or the lock is not free."""
        try:
            await self._lock.write(self._plan(wish, 0), wish.host_revision, if_new=True)
        except SwapFailed:
            return False
        self.report.key_was_read()
        self._tell_taken(None)
        return True

    def _plan(self, wish: _Wanted, epoch_floor: int) -> Lock:
        """The lock for a new incarnation."""
        lock = take(
            self._lock.view.lock,
            host=self._around.me,
            boot_id=self._around.boot_id,
            incarnation=str(uuid4()),
            storage=storage_of(wish.spec),
            epoch_floor=epoch_floor,
        )
        # Noted before it is written: a write whose reply is lost is recognised by it when the watch shows it.
        self._planned = lock.incarnation
        return lock

    def _tell_taken(self, previous: Lock | None) -> None:
        lock = self._lock.view.lock
        assert lock is not None
        holder = None if previous is None else previous.host
        self.report.tell("lock.taken", epoch=lock.epoch, incarnation=lock.incarnation, previous=holder)

    async def _fence(self, wish: _Wanted) -> None:
        lock = self._lock.view.lock
        assert lock is not None
        await self._around.fencing.fence(lock.fence)
        self._around.metrics.fenced()
        await self._lock.write(replace(lock, state=LockState.STARTING), wish.host_revision)

    def _spawn(self, wish: _Wanted) -> None:
        around = self._around
        lock = self._lock.view.lock
        assert lock is not None
        record = Incarnation(
            instance=self.id,
            incarnation=lock.incarnation,
            epoch=lock.epoch,
            boot_id=around.boot_id,
            argv=(),
            spec=spec_to_object(wish.spec),
            storage=storage_of(wish.spec),
            accelerator=around.host_side.accel,
            restart_request=wish.restart_request,
            revision=wish.revision,
            log_offset=0,
            spawned_at=around.clock.now(),
        )
        self._machine.spawn(record, lambda *qmp: self._argv(wish.spec, qmp))
        self._machine.directory.write_memory(self._memory)
        self._planned = None
        around.metrics.started(self.id)
        self.report.tell("instance.spawned", pid=self._machine.pid)

    def _argv(self, spec: Spec, qmp_fds: tuple[int, int]) -> tuple[str, ...]:
        identity = Identity(instance=self.id, uuid=instance_uuid(self._around.layout.prefix, self.id))
        side = replace(self._around.host_side, run_dir=str(self._machine.directory.path), qmp_fds=qmp_fds)
        return build_argv(spec, identity=identity, host=side)

    async def _record(self, wish: _Wanted) -> None:
        lock, record = self._lock.view.lock, self._machine.record
        assert lock is not None
        assert record is not None
        assert record.pid is not None
        assert record.starttime is not None
        clients = await self._around.fencing.clients(record, known=lock.fence)
        self._machine.note_clients(clients)
        recorded = lock.recorded(pid=record.pid, starttime=record.starttime, clients=clients)
        # The keys may have changed since the lock was taken: what counts is the machine that was started.
        await self._lock.write(replace(recorded, storage=record.storage), wish.host_revision)

    async def _continue(self) -> None:
        if await self._machine.resume():
            now = self._around.clock.now()
            if self._wanted_at is not None:
                self._around.metrics.observed_start(now - self._wanted_at)
                self._wanted_at = None
            self.report.tell("instance.started", pid=self._machine.pid)

    async def _reassert(self) -> None:
        record = self._machine.record
        assert record is not None
        lock = Lock(
            host=self._around.me,
            boot_id=record.boot_id,
            epoch=record.epoch,
            state=LockState.STARTING if self._machine.never_ran else LockState.RUNNING,
            incarnation=record.incarnation,
            pid=record.pid,
            starttime=record.starttime,
            clients=record.clients,
            storage=record.storage,
        )
        await self._lock.reassert(lock)
        self.report.tell("lock.reasserted", level="warning", epoch=record.epoch)

    async def _bury(self) -> None:
        process = self._machine.view()
        assert process is not None
        assert process.exit is not None
        now = self._around.clock.now()
        # Remembered before the record goes: cut off between the two, the end is taken to the books again.
        self._remember(
            after(
                self._memory,
                process.exit,
                self.wish,
                asked=process.asked,
                ran=not process.never_ran,
                spawned_at=process.incarnation.spawned_at,
                now=now,
                jitter=self._around.jitter(),
            )
        )
        self._around.metrics.exited(self.id, process.exit.kind)
        self.report.tell(
            "instance.ended",
            level="info" if process.asked else "warning",
            reason=process.exit.text,
            pause_s=self._memory.pause_s,
        )
        await self._machine.bury()

    def _remember(self, memory: Memory) -> None:
        """Keep what outlives a process, also for a successor while there is a process to adopt."""
        if memory != self._memory:
            self._memory = memory
            if self._machine.record is not None:
                self._machine.directory.write_memory(memory)

    async def _release(self) -> None:
        publisher = self._around.publisher
        if self.wish is not None and self.wish.keys > 0:
            last = replace(self.report.status, pid=None, incarnation=None)
            publisher.wrote(self.id, last.to_json(), await self._lock.release(last))
        else:
            await self._lock.release(None)
            publisher.forget(self.id)
        self._planned = None
        self.report.tell("lock.released")
