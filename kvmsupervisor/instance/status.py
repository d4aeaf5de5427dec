"""What is said of one instance: its status, for etcd and HTTP, and its lines in the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from structlog.typing import FilteringBoundLogger

from kvmsupervisor.domain.changes import underway
from kvmsupervisor.domain.decision import Decision
from kvmsupervisor.domain.events import RESET, RESET_SAYS, said
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.live import key_of
from kvmsupervisor.domain.lock import Claim, Lock, Storage
from kvmsupervisor.domain.pending import pending
from kvmsupervisor.domain.run_state import POSTMIGRATE
from kvmsupervisor.domain.sparing import Sparing
from kvmsupervisor.domain.spec import Spec, Wish
from kvmsupervisor.domain.status import Phase, Status, Transfer
from kvmsupervisor.domain.storage import made, pinning
from kvmsupervisor.domain.view import Action, Process, View
from kvmsupervisor.instance.chronicle import Chronicle
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.machine.cdrom import holds
from kvmsupervisor.machine.machine import Machine

CHANGED = "instance.changes_untold"
CHANGES_A_MINUTE = 20
"""How often a changed reason is logged within a minute. Arbitrary: more than a person brings about, or a start."""


def is_away(process: Process) -> bool:
    """Whether its guest was sent to another host: the status is that host's to write."""
    return process.run_state == POSTMIGRATE


class Report:
    """One instance's status and log.

    Attributes:
        status: as it is here; the status key holds it where it is this host's to write.
        notice: what else a person should know of the QEMU that lives.
        looked: whether the status key was read since another host could last write it.
    """

    def __init__(
        self,
        instance: InstanceId,
        *,
        context: InstanceContext,
        machine: Machine,
        wake: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self.status = Status(
            id=instance,
            host=context.me,
            phase=Phase.WAITING,
            reason="not looked at yet",
            since=context.clock.wall(),
        )
        self._instance = instance
        self._context = context
        self._machine = machine
        self._wake = wake
        self._log = log.bind(instance=instance)
        self.notice: str | None = None
        self.looked = False
        # Of the last turn: the lock where it is this host's, and what was decided.
        self._lock: Lock | None = None
        self._decision: Decision | None = None
        self._published: Status | None = None
        self._came: tuple[str, Transfer] | None = None
        # What keeps a step from being made, and how often that is told.
        self._chronicle = Chronicle(instance, context=context, at_first=self.status)
        self._trouble: tuple[str, Sparing] = "", Sparing()
        self._sparing: dict[str, Sparing] = {RESET: Sparing(), CHANGED: Sparing(CHANGES_A_MINUTE)}
        if (written := context.status_writer.written(instance)) is not None:
            # Before it is written over: a rollback that an earlier supervisor has begun is finished before a start.
            self.inherit(written[0])

    def recall(self, written: Status) -> None:
        """Take from the status key of an earlier supervisor since when it has been so, and what the guest said."""
        self._save(written)
        now = self.status
        if written.incarnation is not None and written.incarnation == now.incarnation:
            self._machine.agent.recall(written.agent)
            self.notice = written.notice
            now = replace(now, agent=self._machine.agent.facts, notice=written.notice)
        if (written.phase, written.incarnation) == (now.phase, now.incarnation):
            now = replace(now, since=written.since)
            self._context.status_writer.set(self._instance, now, overtaken=self._was_overtaken)
        self.status = now

    def key_was_read(self, written: Status | None) -> None:
        """What another host may have said in the status key was taken note of."""
        self.looked = True
        if written is not None:
            self._save(written)

    def begin_anew(self) -> None:
        """Etcd has another history: what was read of the status key, or written into it, was in the former one."""
        self.looked = False
        self._published = None

    def _was_overtaken(self) -> None:
        """Another host has had the instance since the status key was read: what was read of it is worth nothing."""
        self.begin_anew()
        self._wake()

    @property
    def pinned(self) -> bool:
        """Whether only this host may start it, because its disks cannot be fenced (law 7)."""
        return self._lock is not None and self._lock.storage is Storage.UNFENCEABLE

    @property
    def fences_pending(self) -> int:
        """How many addresses are to be shut out before it may start."""
        return len(self._lock.fence) if self._lock is not None and self._lock.is_unfenced else 0

    @property
    def next_start_in_s(self) -> float | None:
        """Seconds until it is started again after an end; None when it does not wait for that."""
        decision = self._decision
        if decision is None or decision.phase is not Phase.BACKOFF or decision.wake_at is None:
            return None
        return decision.wake_at - self._context.clock.now()

    @property
    def runs_as(self) -> Spec | None:
        """What lives was started with; None without a process."""
        return self._machine.spec if self._machine.pid is not None else None

    @property
    def knows_machine(self) -> bool:
        """Whether the machine type that the guest was installed on is known, or certainly nowhere on record."""
        return self.looked or self.status.machine is not None

    def machine_of(self, spec: Spec) -> str | None:
        """The versioned machine type on record for what `spec` asks for; None to look it up."""
        known = self.status.machine
        # A plain name is on record when QEMU could not be asked: it is no version.
        return known if self.status.machine_key == spec.machine and known != spec.machine else None

    def _save(self, written: Status) -> None:
        """Take over what goes on from host to host: the machine that the guest knows, and how many there were."""
        self.status = self.status.inheriting(written)
        self.inherit(written)
        if self.status.epoch < written.epoch:
            self.status = replace(self.status, epoch=written.epoch)

    def inherit(self, written: Status) -> None:
        """Take over what a status says of the machine's snapshots: another host's knows more than this one."""
        if written.host != self._context.me:
            self.status = replace(self.status, snapshots=written.snapshots, rollback=written.rollback)
        else:
            self.status = self.status.inheriting(written)

    def say(self, view: View, decision: Decision) -> None:
        """Take what is decided into the status; publish and log it where it differs from what was said."""
        context, before, wish = self._context, self.status, view.wish
        record = self._machine.record
        lock = view.lock.lock
        running = view.process.spec if view.process is not None else None
        self._lock, self._decision = (lock if lock is not None and lock.host == context.me else None), decision
        status = Status(
            id=self._instance,
            host=context.me,
            phase=decision.phase,
            reason=decision.reason,
            since=before.since if before.phase is decision.phase else context.clock.wall(),
            pid=self._machine.pid or view.unadopted_pid,
            epoch=record.epoch if record else (lock.epoch if lock else before.epoch),
            restarts=view.saved.restarts,
            # Asked at every turn, and hardly ever different.
            pending=self._pending(view, running),
            problems=tuple(str(problem) for problem in view.problems),
            revision=wish.revision if wish else before.revision,
            incarnation=record.incarnation if record else None,
            last_exit=view.saved.last_exit,
            # Nobody knows what options of a person's own chose.
            accelerator=(record.accelerator or None) if record else None,
            machine=record.machine if record and record.machine else before.machine,
            machine_key=running.machine if record and record.machine and running else before.machine_key,
            notice=self.notice if record else None,
            held=view.held,
            stood=view.saved.stood if view.held else None,
            agent=self._machine.agent.facts,
            guarded=view.guarded,
            run_state=self._machine.run_state,
            unplugged=() if view.process is None else view.process.unplugged,
            placed_for=None if wish is None or wish.runs_on != context.me or wish.host == context.me else wish.host,
            move=self._transfer(view),
            awaited_host=wish.runs_on if wish is not None and view.stays else None,
            files=self._files(wish, running),
            cdrom=holds(record.medium) if record and view.process and view.process.has_drive else None,
            images=self._images(wish, running),
            snapshots=before.snapshots,
            rollback=before.rollback,
            changing=() if view.process is None else underway(view, view.process),
        )
        if decision.action is Action.FORGET and (wish is None or wish.keys == 0 or wish.host is not None):
            # Nobody's status any more, or the next host's.
            self.status = status
            return
        if status == before:
            status = before  # the same object: that is compared at once
        else:
            self.status = status
            self._tell_change(before, status)
        if view.claim is not Claim.UNKNOWN:
            self._chronicle.see(status)
        if status == self._published:
            return
        if self._may_publish(view):
            self._published = status
            context.status_writer.set(self._instance, status, overtaken=self._was_overtaken)
        else:
            # What was said before is not written over what another host says.
            self._published = None
            context.status_writer.cede(self._instance)

    def arrived(self, lock: Lock, incarnation: str) -> None:
        """Its QEMU of that name came here by a live move, under this lock."""
        came = Transfer(source=lock.taken_from or "", target=self._context.me, stopped_ms=lock.stopped_ms)
        self._came = incarnation, came

    def _transfer(self, view: View) -> Transfer | None:
        """Its live move, under way from here, or that by which it came."""
        lock, record, process = view.lock.lock, self._machine.record, view.process
        if lock is None or record is None or process is None:
            return None
        if lock.to is None or lock.host != self._context.me:
            return self._came[1] if self._came is not None and self._came[0] == record.incarnation else None
        figures = self._machine.migration.figures
        return Transfer(
            source=lock.host,
            target=lock.to.host,
            sent_bytes=figures.sent,
            left_bytes=figures.left,
            bytes_per_s=int(figures.rate),
        )

    def _pending(self, view: View, running: Spec | None) -> tuple[str, ...]:
        """The keys of which QEMU, as it runs, does not know the present value."""
        wanted = None if view.wish is None else view.wish.spec
        if running is None or wanted is None or view.process is None:
            return ()
        names = pending(running, wanted) if running != wanted else ()
        # What it is being given it may not have yet.
        names = tuple(dict.fromkeys((*names, *map(key_of, view.process.incarnation.coming))))
        return (*names, "cdrom") if view.process.holds_another(wanted) and "cdrom" not in names else names

    def _files(self, wish: Wish | None, running: Spec | None) -> Mapping[str, str] | None:
        """Which host has its files: this one those that its QEMU writes to, others those that they had."""
        files = dict(self.status.files or {})
        if running is not None:
            files |= dict.fromkeys((file.title for file in pinning(running).values()), self._context.me)
        if files and wish is not None and wish.spec is not None:
            named = {file.title for spec in (wish.spec, running) if spec is not None for _, file in spec.files}
            files = {title: host for title, host in files.items() if title in named}
        return files or None

    def _images(self, wish: Wish | None, running: Spec | None) -> tuple[str, ...]:
        """Which of its images that may be made it has run with."""
        known = {*self.status.images, *(() if running is None else made(running))}
        if known and wish is not None and wish.spec is not None:
            known &= {image.name for spec in (wish.spec, running) if spec is not None for _, image in spec.images}
        return tuple(sorted(known))

    def _may_publish(self, view: View) -> bool:
        """Whether the status key is ours to write.

        What another host says of itself there is evidence: of the machine that it runs, and, once its lock is gone, of
        the epoch up to which it came. It is not written over before it was read.
        """
        if view.claim is Claim.STRANGER and view.is_strange:
            # Another cluster's instance of that name.
            return False
        if view.process is not None and view.claim is Claim.STRANGER and is_away(view.process):
            return False
        if view.process is not None and not view.process.never_ran:
            # The lock may be older than this QEMU: whoever holds it, and lives, speaks until it is written again.
            return view.claim is not Claim.STRANGER or not view.holder_has_session
        match view.claim:
            case Claim.UNKNOWN:
                return False
            case Claim.STRANGER:
                self.looked = False
                return view.holder_has_session is False
            case Claim.ABSENT:
                return self.looked and view.claimed_by is None
            case _:
                return True

    def _tell_change(self, before: Status, now: Status) -> None:
        """Log what a person would want to know: phases, and why it is in one; the steps of a start are details."""
        untold: dict[str, int] = {}
        if now.phase is not before.phase or now.problems != before.problems or now.pending != before.pending:
            level = "info"
        elif now.reason != before.reason:
            level = "debug" if now.phase is Phase.STARTING else "info"
            more = self._sparing[CHANGED].note(self._context.clock.now())
            if more is None:
                return
            untold = {"untold": more} if more else {}
        else:
            return
        lists = {"problems": list(now.problems), "pending": list(now.pending)}
        said = {name: values for name, values in lists.items() if values}
        self.tell(f"instance.{now.phase}", level=level, reason=now.reason, **said, **untold)

    def tell_sparingly(self, event: str) -> None:
        """Log what a guest can bring about as often as it likes: at most once a minute, and how often it was untold."""
        more = self._sparing[event].note(self._context.clock.now())
        if more is not None:
            self._tell_with(event, untold=more)
            if event == RESET:
                self._chronicle.note(event, self.status, reason=RESET_SAYS, times=more + 1)

    def tell_trouble(self, why: str) -> None:
        """Log what keeps a step from being made: when it begins, and while it lasts once a minute, with a count."""
        if why != self._trouble[0]:
            self._trouble = why, Sparing()
        more = self._trouble[1].note(self._context.clock.now())
        if more is not None:
            self._tell_with("instance.etcd_trouble", untold=more, reason=why)

    def begin_turn(self) -> None:
        """Take in what the status writer has found in the key, and tell what is left to be told, before a decision."""
        if (theirs := self._context.status_writer.inherited.pop(self._instance, None)) is not None:
            self._save(theirs)
        self._tell_rest()

    def _tell_rest(self) -> None:
        """Tell how often something has happened that was not told each time, once it is over."""
        for event, kind in self._sparing.items():
            if untold := kind.rest(self._context.clock.now()):
                self._tell_with(event, untold=untold)
                if event == RESET:
                    self._chronicle.note(event, self.status, reason=RESET_SAYS, times=untold)

    def _tell_with(self, event: str, *, untold: int, **details: Any) -> None:
        if untold:
            details["untold"] = untold
        self.tell(event, **details)

    def tell(self, event: str, *, level: str = "info", **details: Any) -> None:
        """Log an event of this instance; every such line names its present epoch and incarnation."""
        record = self._machine.record
        known = {} if record is None else {"epoch": record.epoch, "incarnation": record.incarnation}
        getattr(self._log, level)(event, **{**known, **details})
        if (reason := said(event, details)) is not None:
            epoch = details.get("epoch", known.get("epoch"))
            self._chronicle.note(event, self.status, reason=reason, epoch=epoch, end=details.get("end", ""))
