"""One instance's loop: observe → decide → act, until nothing of it is ours any more.

Level-triggered: whatever happens only sets one event, and the loop looks at all there is to see. The decision is
`domain.lifecycle.decide`; here is what it sees and what its actions do.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from structlog.typing import FilteringBoundLogger

from kvmsupervisor.adapters.etcd import EtcdError, Unavailable
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.cluster.fencing import InUse, NotFenced, StorageAway
from kvmsupervisor.cluster.lock import InstanceLock, SwapFailed
from kvmsupervisor.domain.argv import host_problems
from kvmsupervisor.domain.counters import GuestCounts
from kvmsupervisor.domain.decision import Decision
from kvmsupervisor.domain.identity import HostIdentity
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.lock import Claim
from kvmsupervisor.domain.ownership import LOCK_POLL_S
from kvmsupervisor.domain.placement import NOT_PLACED
from kvmsupervisor.domain.quiet import Quiet
from kvmsupervisor.domain.removal import Hold, hold_of, noting
from kvmsupervisor.domain.restart import in_another_history
from kvmsupervisor.domain.run_state import NEVER_RAN
from kvmsupervisor.domain.spec import Problem, Wish
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Action, View
from kvmsupervisor.failpoints import point
from kvmsupervisor.instance import upkeep as keeping
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.ending import Ending
from kvmsupervisor.instance.moves import Moves
from kvmsupervisor.instance.plugs import Plugs
from kvmsupervisor.instance.saved_state import SavedState
from kvmsupervisor.instance.snapshots import Snapshots
from kvmsupervisor.instance.start import Start
from kvmsupervisor.instance.status import Report
from kvmsupervisor.instance.target import target_of
from kvmsupervisor.instance.wanted import wanted
from kvmsupervisor.machine import actions as ladder
from kvmsupervisor.machine.adoption import Inheritance
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.provisioning import NotReady

ETCD_RETRY_S = 1.0
"""Pause after etcd failed, or a compare did not hold. A watch event or a won session wakes the loop earlier."""

REFUSED_RETRY_S = 10.0
"""The same after etcd refused: an operator has to mend something first."""

PREPARATIONS = frozenset({Action.QUEUE, Action.PREPARE, Action.LOOK, Action.READ})
"""What can be done also while etcd takes no writes, so that it tells nothing of that."""

STORAGE_RETRY_S = 2.0
"""The same after storage did not answer: an outage that ends should end for all soon; an attempt takes seconds."""


class Worker:
    """One instance on this host.

    Attributes:
        id: which.
        report: what is said of it.
        plugs, viewers: its NICs, and who looks at its display.
        wish: as last told; None before that.
    """

    def __init__(
        self,
        instance: InstanceId,
        *,
        context: InstanceContext,
        directory: InstanceDir,
        saved: InstanceState,
        log: FilteringBoundLogger,
    ) -> None:
        self.id = instance
        self.wish: Wish | None = None
        self._context = context
        self._problems: tuple[Problem, ...] = ()
        self._held = False
        self._wake = asyncio.Event()
        self._machine = Machine(
            system=context.system,
            prefix=context.layout.prefix,
            directory=directory,
            clock=context.clock,
            notify=self._wake.set,
            on_reset=self._saw_reset,
            on_event=lambda: context.metrics.heard_event(instance),
            on_connect=lambda: context.metrics.connected(instance),
            logs=context.logs.of(directory),
            log=log.bind(instance=instance),
            caught_up=None if context.guard is None else context.guard.caught_up,
            launch=context.launch,
        )
        self.report = Report(instance, context=context, machine=self._machine, wake=self._wake.set, log=log)
        self.plugs, self.viewers = Plugs(self._machine, context=context, tell=self.report.tell), self._machine.viewers
        self._lock = InstanceLock(
            store=context.store, layout=context.layout, instance=instance, session=context.session.compare
        )
        self._lock.begin_anew(context.era().count)
        self._start = Start(
            instance, context=context, machine=self._machine, lock=self._lock, report=self.report, wake=self._wake.set
        )
        self.moves = Moves(
            instance, context=context, machine=self._machine, lock=self._lock, start=self._start, report=self.report,
            wake=self._wake.set,
        )  # fmt: skip
        self._snapshots = Snapshots(instance, context, self._machine, self._lock, self.report)
        self._etcd_at = 0.0
        self._etcd_trouble: str | None = None
        self._quiet = Quiet(context.settle_s)
        self._adopting = False
        processes, objection = context.system.processes, context.objection
        self._inheritance = Inheritance(
            processes, directory, boot_id=context.boot_id, clock=context.clock, objection=objection
        )
        self._saved = SavedState(saved, machine=self._machine, report=self.report)
        self._ending = Ending(
            instance, context=context, machine=self._machine, start=self._start, moves=self.moves, saved=self._saved,
            report=self.report,
        )  # fmt: skip

    # --- what it is told --------------------------------------------------------------------------------------

    def update(self, wish: Wish, *, held: bool, fresh: bool, hold: Hold | None = None) -> None:
        """Take the latest wish.

        Args:
            wish: the keys as they are.
            held: what they come to waits for an operator's word: the instance goes on as it is.
            fresh: somebody has just written them, so that more may follow.
            hold: more of what is held.
        """
        if self.wish is None or (wish.revision, wish.spec) != (self.wish.revision, self.wish.spec):
            # People who have grown an image touch a key to have it seen at once.
            self._machine.growth.look(self._machine.spec, 0.0)
            self._machine.drive.look()
            self._snapshots.look(wish)
            self._machine.changes.look()
        if fresh:
            self._quiet.heard(self.wish, wish, self._context.clock.now())
        if self.wish is None or wish.spec != self.wish.spec or wish.priority != self.wish.priority:
            self._start.begin_anew()
        if wish is not self.wish:
            self._problems = self._problems_of(wish)
        self.wish = wish
        self._held = held
        saved = noting(self._saved.state, wish, held=held, hold=hold)
        # The time that people gave the guest holds for the shutdown that follows the removal of all keys, too.
        asked_s = wish.shutdown_timeout_s
        is_sound = wish.keys > 0 and not any(problem.key == "shutdown_timeout" for problem in wish.problems)
        if is_sound and asked_s != saved.shutdown_timeout_s:
            saved = replace(saved, shutdown_timeout_s=asked_s)
        self._saved.keep(saved)
        self._wake.set()

    def begin_anew(self, wish: Wish) -> None:
        """Etcd has another history, in which these are the keys: nothing that they had before tells a new order.

        Called right before the lock and the keys of that history are told.
        """
        self._lock.begin_anew(self._context.era().count)
        self.report.begin_anew()
        self._start.claimed_by = None
        self._saved.keep(in_another_history(self._saved.state, wish))

    def saw_lock(self, *, data: bytes | None, mod_revision: int, as_of: int) -> None:
        """Take the lock as a watch shows it."""
        before = self._lock.view
        self._lock.seen(data=data, mod_revision=mod_revision, as_of=as_of)
        if not self._lock.view.says_the_same_as(before):
            self._wake.set()

    def notify(self) -> None:
        """The session or the hosts changed: look again."""
        self._wake.set()

    def adopt(self, record: Incarnation) -> None:
        """Take over what an earlier supervisor left, before the loop runs."""
        context = self._context
        under = HostIdentity.of(context.me, context.layout)
        self._lock.vouch(record.clients)
        self._adopting = self._machine.adopt(record, boot_id=context.boot_id, under=under)
        if (spec := self._machine.spec) is not None:
            self._start.lives(spec, record.uid)

    def inherit(self, record: Incarnation | None = None) -> None:
        """Take over what an earlier supervisor left, as far as possible: `record`, or what is read where it is None."""
        # As its file holds it: that is not written again.
        self._saved.state = self._inheritance.take(self.adopt, record)
        if self._inheritance.news is not None:
            self.report.tell("instance.unreadable", level="error", reason=self._inheritance.news)
        if self._inheritance.alone is None and self.wish is not None:
            self.update(self.wish, held=self._held, fresh=False)

    @property
    def was_held(self) -> bool:
        """Whether the removal of its keys was held when it was last told of them, by an earlier supervisor maybe."""
        return self._saved.state.held

    @property
    def hold(self) -> Hold | None:
        """What is held, where it was told more of it than that."""
        return hold_of(self._saved.state)

    @property
    def has_spoken(self) -> bool:
        """Whether its lock says what runs here, in the history that etcd has now: only a QEMU has to be told of."""
        if self._machine.pid is None:
            return True
        view = self._observe()
        is_another_clusters = view.claim is Claim.STRANGER and view.is_strange
        return view.claim in {Claim.MINE, Claim.UNREADABLE, Claim.NEWER} or is_another_clusters

    @property
    def pid(self) -> int | None:
        """Of the living QEMU, ours or left alone."""
        alone = self._inheritance.alone
        return self._machine.pid if alone is None else alone.pid

    @property
    def has_guest(self) -> bool:
        """Whether there is a QEMU whose guest may have run, or to which a guest is on its way."""
        return self.pid is not None and self._machine.run_state != NEVER_RAN

    @property
    def starttime(self) -> int | None:
        """Of the QEMU on record, clock ticks since boot."""
        known = self._inheritance.alone or self._machine.record
        return None if known is None else known.starttime

    @property
    def counts(self) -> GuestCounts:
        """What QEMU counted of the guest when it was asked last."""
        return self._machine.counts

    @property
    def agent_seen(self) -> str | None:
        """When the guest's agent last answered, RFC 3339 in UTC. Not in the status: it changes every minute."""
        return self._machine.agent.seen

    # --- the loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Observe, decide, act; returns when nothing of it is ours any more. Cancelling it leaves QEMU as it is."""
        while True:
            self._wake.clear()
            self._saved.write_again()
            self.report.begin_turn()
            view = self._observe()
            decision = decide(view)
            self._note_progress(view, decision)
            if decision.action is not Action.QUEUE:  # done at once, and the next view tells whether it is its turn
                self.report.say(view, decision)
            self._context.life.decided(view, decision)
            self._admit(view, decision)
            if decision.action is Action.FORGET:
                return
            if decision.action is None:
                await self._context.clock.wait(self._wake, decision.wake_at)
                continue
            try:
                await point(f"before {decision.action.name}")
                await self._act(decision, view)
            except SwapFailed as error:
                self._pause(ETCD_RETRY_S, str(error))
            except Unavailable as error:
                self._pause(ETCD_RETRY_S, f"etcd does not answer: {error}")
            except NotReady as error:
                if self._machine.record is None:
                    self._start.wait_for_host(error)
                else:
                    # QEMU is there, paused, and waits for it.
                    self._pause(error.retry_s, str(error))
            except (StorageAway, InUse) as error:
                self._pause(STORAGE_RETRY_S, str(error))
            except (EtcdError, NotFenced) as error:
                self._pause(REFUSED_RETRY_S, str(error))
            else:
                self._etcd_trouble = self._etcd_trouble if decision.action in PREPARATIONS else None

    async def detach(self) -> None:
        """Let go of QEMU without touching it: the next supervisor adopts it."""
        self._context.admission.release(self.id)
        self.moves.close()
        await self._machine.detach()

    def _pause(self, seconds: float, why: str) -> None:
        self._etcd_at = self._context.clock.now() + seconds
        self.report.tell_trouble(why)
        self._etcd_trouble = why

    def _admit(self, view: View, decision: Decision) -> None:
        """Give away what this instance does not need for what was decided: its start slot, its memory."""
        admission = self._context.admission
        if not decision.slot:
            admission.release(self.id)
        # Who is about to start again keeps its memory; who waits, for a bridge maybe, may wait for days.
        again = decision.slot or decision.phase in {Phase.STARTING, Phase.BACKOFF}
        if view.process is None and not again:
            admission.take_back(self.id)

    def _observe(self) -> View:
        context, saved, era = self._context, self._saved.state, self._context.era()
        keeping.follow_epoch(self._machine, self._lock.view, era)
        process = self._machine.view()
        lock = self._lock.view.lock
        has_session = None if lock is None else context.host_has_session(lock.host)
        if lock is not None and lock.is_namesakes(context.me, boot_id=context.boot_id, machine=context.machine):
            # One name has one session, and this host has it.
            has_session = False if context.session.held else None
        target = target_of(self.id, self.wish, context)
        view = View(
            now=context.clock.now(),
            me=context.me,
            facts=context.layout.facts,
            locks_are_open=context.layout.locks_are_open,
            boot_id=context.boot_id,
            machine=context.machine,
            wish=self.wish,
            problems=self._problems if self.wish is None or not target.receives else self.wish.problems,
            left_alone=self._inheritance.alone,
            mismatch=context.mismatch,
            dissent=context.dissent(),
            held=self._held,
            held_why=saved.held_why,
            era=era,
            draining=context.draining(),
            clearing=context.life.clearing(self.id),
            leaving=context.life.leaving(),
            haste=context.life.haste(),
            session_held=context.session.held,
            etcd_at=self._etcd_at,
            etcd_trouble=self._etcd_trouble,
            lock=self._lock.view,
            planned=self._start.planned,
            last_ended=self._start.last_ended,
            holder_has_session=has_session,
            deferral=self._start.takeover_wait.so_far(lock, holder_has_session=has_session),
            target=target,
            course=self.moves.course(self.wish, lock),
            holdover=self._start.holdover(lock) if process is None else None,
            claimed_by=self._start.claimed_by,
            looked=self.report.looked,
            statuses_known=context.status_writer.has_begun,
            process=None if process is None else self.plugs.look(process),
            saved=saved,
            slot=context.admission.state(self.id),
            shortage=context.admission.shortage(self.id),
            prepared=self._start.is_prepared(self.wish),
            start_at=self._start.at,
            obstacle=self._start.obstacle,
            rival=self._start.sharing.rival,
            ask_at=self._start.sharing.ask_at,
            shared=self._start.sharing.shared(self._machine.spec),
            guarded=self._start.is_guarded(),
            guard_at=self._start.guard_at,
            guard_trouble=self._start.guard_trouble,
            quiet_at=self._quiet.at,
            start_timeout_s=context.start_timeout_s,
            errand=self._snapshots.errand(self.wish),
            errand_trouble=self._snapshots.trouble(self.wish),
            shutdown_timeout_s=(
                context.shutdown_timeout_s if saved.shutdown_timeout_s is None else saved.shutdown_timeout_s
            ),
        )
        if self._adopting and process is not None and process.connected and view.claim is Claim.MINE:
            self._adopting = False
            context.metrics.adopted()
            self.report.tell("instance.adopted", pid=self._machine.pid)
        return view

    def _note_progress(self, view: View, decision: Decision) -> None:
        """Note when a stop began, and since when a start is wanted: what later decisions and figures count from."""
        if decision.phase is not Phase.STOPPING:
            self._machine.stop_is_off()
        elif view.process is not None:
            self._machine.stop_begins()
        if view.process is None and decision.phase in {Phase.STARTING, Phase.WAITING} and not view.problems:
            self._start.note_wanted(view.now)

    def _problems_of(self, wish: Wish) -> tuple[Problem, ...]:
        """The wish's problems, and what this host lacks for it."""
        if wish.spec is None:
            return wish.problems
        return (*wish.problems, *host_problems(wish.spec, self._context.host_side))

    # --- acting -----------------------------------------------------------------------------------------------

    async def _act(self, decision: Decision, view: View) -> None:  # noqa: C901, PLR0912, PLR0915 - a table of actions
        """Do one action on what `view` showed: the wish may change meanwhile, the lock's compare tells."""
        machine, start, action, wish = self._machine, self._start, decision.action, view.wish
        match action:
            case None | Action.FORGET:
                raise AssertionError("the loop does these")
            case Action.QUEUE:
                start.queue(wanted(wish))
            case Action.PREPARE:
                await start.prepare(wanted(wish))
            case Action.READ:
                self.inherit()
            case Action.LOOK:
                await start.look()
                if start.claimed_by is not None:
                    self._etcd_at = self._context.clock.now() + LOCK_POLL_S
            case Action.ASK_WATCHERS:
                await start.takeover_wait.ask_watchers(view.lock.lock, wanted(wish).spec)
            case Action.ASK:
                await start.sharing.ask(wanted(wish).spec)
            case Action.SNAPSHOT:
                await self._snapshots.act(wish)
            case Action.TAKE:
                await start.take(wanted(wish), storage=self._snapshots.storage(view.errand))
                await self.moves.arrival.withdraw()
            case Action.FENCE:
                assert wish is not None
                await start.fence(wish)
            case Action.SPAWN:
                await start.spawn(wanted(wish))
                self._saved.write()
            case Action.RECORD:
                await start.record(wanted(wish))
            case Action.GUARD:
                await start.guard()
            case Action.CONTINUE:
                await start.go_on(wish)
            case Action.RESET:
                await machine.reset(wanted(wish).restart_request)
            case Action.PLUG:
                await self.plugs.plug()
            case Action.GROW | Action.ROOM | Action.MEDIUM | Action.CHANGE:
                await start.tend(action, wish, takes=view.takes)
            case Action.REASSERT | Action.RENAME | Action.VOUCH:
                await keeping.keep(action, machine, self._lock, self.report, self._context, seen=view.lock)
            case Action.TIDY:
                assert wish is not None
                await self._lock.tidy(wish.stale_placement)
                if self.wish is wish:
                    self.wish = replace(wish, placed=NOT_PLACED)
            case Action.RECORD_EXIT:
                await self._ending.record(self.wish)
            case Action.RELEASE:
                await self._release()
            case _ if action in ladder.STEPS:
                await ladder.step(machine, decision)
            case _:
                await self.moves.act(action, wish)

    def _saw_reset(self) -> None:
        self._context.metrics.guest_reset(self.id)
        self.report.tell_sparingly("instance.guest_reset")

    async def _release(self) -> None:
        await self._start.shut_out_the_dead()
        stale = 0 if self.wish is None or self._held else self.wish.stale_placement
        there = self.wish is not None and self.wish.keys > 0
        await keeping.release(self._lock, self.report, self._context, there=there, stale_placement=stale)
        if stale and self.wish is not None:
            self.wish = replace(self.wish, placed=NOT_PLACED)
        self._start.planned = None
        self.report.tell("lock.released")
