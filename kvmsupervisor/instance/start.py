"""From a wish to a guest that runs: the steps of one start, each of which may fail, or be cut off half way.

What is to be done is decided in `domain.lifecycle`; here are the steps, and what of them is remembered between two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from uuid import uuid4

from kvmsupervisor.cluster.fencing import NEW_S, InUse, NotFenced
from kvmsupervisor.cluster.lock import InstanceLock, SwapFailed
from kvmsupervisor.domain.admission import need_mib
from kvmsupervisor.domain.argv import Identity, Provision, build_argv, instance_uuid
from kvmsupervisor.domain.doubt import is_doubted
from kvmsupervisor.domain.events import TAKEN, why_taken
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Change, Lock, Storage, take
from kvmsupervisor.domain.spec import Spec, Wish, spec_to_object
from kvmsupervisor.domain.storage import images_of, made, storage_of
from kvmsupervisor.domain.view import Action, Holdover
from kvmsupervisor.failpoints import point
from kvmsupervisor.guard.client import Unguarded
from kvmsupervisor.instance import cdrom, disks
from kvmsupervisor.instance.changes import Changing, cables_before_it_runs
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.new_qemu import launch, must_note, new_record
from kvmsupervisor.instance.sharing import Sharing
from kvmsupervisor.instance.shutting_out import admit, may_be_shut_out, shut_out
from kvmsupervisor.instance.status import Report
from kvmsupervisor.instance.takeover_wait import TakeoverWait
from kvmsupervisor.instance.wanted import Wanted, wanted
from kvmsupervisor.machine import identity as process_identity
from kvmsupervisor.machine.handover import Prepared
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.provisioning import NotReady, Opened

GUARD_EVERY_S = 1.0
"""How often a machine asks to be put under guard. Cheap: the guard is sought for all of them at once."""


@frozen(kw_only=True)
class New:
    """The images in Ceph that were made for one incarnation, and since when they may be there (CLOCK_BOOTTIME)."""

    incarnation: str | None = None
    images: tuple[str, ...] = ()
    since: float = 0.0


class Start:
    """The start of one instance, over and over.

    Attributes:
        sharing: of its images with other instances, a mistake of the keys.
        takeover_wait: while the host that holds its lock has no session.
        planned: incarnation that the lock was taken for and that has no process yet.
        claimed_by: host whose status says that it runs this although the lock is absent, None when none does.
        at: when the host is worth the next attempt, after something was missing on it.
        obstacle: what was missing, None when nothing was.
        guard_at: when the guard is worth the next attempt.
        guard_trouble: what the last attempt said, None when it went well.
        last_ended: incarnation of the last process whose exit was recorded.
        closed: incarnation whose process is proven gone, and nothing of it is to be fenced: it closed its disks in
            order, or its clients were shut out since.
    """

    def __init__(
        self,
        instance: InstanceId,
        *,
        context: InstanceContext,
        machine: Machine,
        lock: InstanceLock,
        report: Report,
        wake: Callable[[], None],
    ) -> None:
        self.sharing = Sharing(instance, context=context)
        self.takeover_wait = TakeoverWait(context=context, report=report)
        self.planned: str | None = None
        self.claimed_by: HostName | None = None
        self.at = 0.0
        self.obstacle: str | None = None
        self.guard_at = 0.0
        self.guard_trouble: str | None = None
        self.last_ended: str | None = None
        self.closed: str | None = None
        self._id = instance
        self._context = context
        self._machine = machine
        self._lock = lock
        self._report = report
        self._wake = wake
        self._changing = Changing(instance, context, machine, lock, report, lives=self.lives, guarded=self._guarded)
        self._prepared: Prepared | None = None
        self._wanted_at: float | None = None
        self._new = New()
        # Addresses of processes that are proven gone: fenced once, so that their watch is not waited for, then dropped.
        self._gone: set[str] = set()
        self._unrecorded: Holdover | None = None

    # --- what is observed -------------------------------------------------------------------------------------

    def is_prepared(self, wish: Wish | None) -> bool:
        """Whether what takes its time is there for the wish as it stands."""
        if wish is None or wish.spec is None or not self._context.provisioner.needs_time(wish.spec):
            return True
        return self._prepared is not None and self._prepared.spec == wish.spec

    def holdover(self, lock: Lock | None) -> Holdover | None:
        """A QEMU that lives without a record: the lock says that it is ours, or said so until it was deleted."""
        seen = self._unrecorded
        if lock is not None:
            seen = self._look_for_unrecorded(lock)
        elif seen is not None and not self._context.system.processes.is_alive(seen.pid, seen.starttime):
            seen = None
        self._unrecorded = seen
        return seen

    def _look_for_unrecorded(self, lock: Lock) -> Holdover | None:
        if lock.boot_id != self._context.boot_id:
            return None
        is_ours = lock.host == self._context.me
        if lock.incarnation == self.planned or (lock.pid is None and not is_ours):
            # Written a moment ago, for a process to come. Looking for it would mean to read all of /proc.
            return None
        pid = process_identity.pid_of(
            self._context.system.processes, self._id, lock.incarnation, pid=lock.pid, starttime=lock.starttime
        )
        if pid is None:
            return None
        folder = process_identity.folder_of(self._context.system.processes, pid, self._id)
        # Under another name of this host, which has lost its records as well (law 12). Hosts may share a kernel.
        is_ours = is_ours or (folder is not None and process_identity.is_same(folder, self._machine.directory.path))
        starttime = self._context.system.processes.starttime_of(pid)
        if starttime is None or not is_ours:
            return None
        return Holdover(pid=pid, starttime=starttime, folder=None if folder is None else str(folder))

    def is_guarded(self) -> bool | None:
        """Whether the guard watches the living QEMU; None when it need not."""
        guard, record = self._context.guard, self._machine.record
        # Without a pidfd it has ended, and nothing is left to watch while its end is being named.
        if guard is None or record is None or record.storage is not Storage.UNFENCEABLE or self._machine.pidfd is None:
            return None
        return guard.holds(record.incarnation)

    def note_wanted(self, now: float) -> None:
        """Count the time to a running guest from now, unless it is being counted."""
        if self._wanted_at is None:
            self._wanted_at = now

    def begin_anew(self) -> None:
        """Another machine is wanted: what was missing, and the place in the line, were the former one's."""
        self.obstacle = None
        self.sharing.begin_anew()
        if self._machine.record is None:
            self._context.admission.release(self._id)

    def wait_for_host(self, error: NotReady) -> None:
        """Note what is missing on the host, and tell it once."""
        self.at = self._context.clock.now() + error.retry_s
        if self.obstacle != str(error) and not error.underway:
            self._report.tell("instance.not_ready", level="warning", reason=str(error))
        self.obstacle = str(error)

    def lives(self, spec: Spec, uid: int | None) -> None:
        """A QEMU of this machine lives here, or is started now, as a user of its own or not."""
        self._context.admission.promise(self._id, need_mib(spec))
        self._context.provisioner.arrived(self._id, spec, uid)

    # --- the steps --------------------------------------------------------------------------------------------

    def queue(self, wish: Wanted) -> None:
        """Stand in line for a start slot."""
        self._context.admission.request(self._id, self._wake, need_mib=need_mib(wish.spec), priority=wish.priority)

    async def prepare(self, wish: Wanted) -> None:
        """Make ready what takes its time.

        Raises:
            NotReady: something is missing on this host.
            EtcdError: it is not known which host has its files.
        """
        context = self._context
        if (wish.spec.files or made(wish.spec) or wish.spec.cdrom) and not self._report.looked:
            await self.look()  # a disk that it ran with is never made anew, a medium no longer waited for
        self._prepared = await context.provisioner.prepare(
            self._id,
            uuid=instance_uuid(context.layout.prefix, self._id),
            spec=wish.spec,
            directory=self._machine.directory,
            files=self._report.status.files or {},
            images=self._report.status.images,
            is_first=self._report.status.machine is None,
        )
        if self._prepared.notice is not None:
            self._report.tell("instance.notice", level="warning", reason=self._prepared.notice)

    async def look(self) -> int:
        """Read lock and status; return the last epoch that the status tells of."""
        status = await self._lock.look()
        context = self._context
        claims = status is not None and status.host != context.me and status.tells_of_a_process
        self.claimed_by = HostName(status.host) if status is not None and claims else None
        self._report.key_was_read(status)
        return status.epoch if status is not None else 0

    async def take(self, wish: Wanted, *, storage: Storage | None = None) -> None:
        """Take the lock for a new incarnation.

        Args:
            wish: what is to run, or to be worked on.
            storage: what that may write to; None for what the machine may.

        Raises:
            SwapFailed: somebody was first, or our session or the wish changed.
            EtcdError: etcd did not do it.
        """
        context = self._context
        floor = 0
        if self._lock.view.data is None:
            if self.sharing.has_to_wait(wish.spec):
                return
            # A lock that was deleted by hand must not let two machines run: its holder's status still tells of it.
            is_new = storage is None and self._report.status.epoch == 0
            if is_new and await self._take_if_new(wish):
                return
            floor = await self.look()
            if self.claimed_by is not None or self._lock.view.data is not None:
                # Somebody has it: the next decision is made on what was read.
                return
        elif not self._report.looked:
            before = self._lock.view.data
            # The machine type that the guest was installed on is in the status, whoever wrote it, and whether its disks
            # are in the midst of a rollback.
            await self.look()
            if self._lock.view.data != before:
                # Let go of meanwhile, maybe: then the status alone knows the last epoch.
                return
        previous = self._lock.view.lock
        # A lock with a former name of this host is no other host's: its exit was recorded here.
        ours = previous is None or previous.host == context.me or previous.incarnation == self.last_ended
        foreign = None if previous is None or ours else previous.host
        change = Change.TAKE if foreign is None else Change.TAKE_OVER
        await self._lock.write(change, self._plan(wish, floor, storage), wish.ground, holder=foreign)
        if previous is not None and (previous.host, previous.boot_id) == (context.me, context.boot_id):
            # Whoever takes its own lock has seen that no process of it lives.
            self._gone.update(previous.clients)
        if foreign is not None:
            context.metrics.took_over()
        self._tell_taken(previous)

    async def _take_if_new(self, wish: Wanted) -> bool:
        """Take a lock that nobody ever had, in one step; False when a status says otherwise, or it is not free."""
        written = self._context.status_writer.written(self._id)
        if written is not None and written[0].epoch > 0:
            return False
        try:
            status_at = 0 if written is None else written[1]
            events = await self._lock.take_new(self._plan(wish, 0), wish.ground, status_at=status_at)
        except SwapFailed:
            return False
        if events is not None:
            self._context.status_writer.events.was_read(self._id, events.kvs[0], events.revision)
        self._report.key_was_read(None)
        self._tell_taken(None)
        return True

    def _plan(self, wish: Wanted, epoch_floor: int, storage: Storage | None = None) -> Lock:
        """The lock for a new incarnation."""
        context, seen = self._context, self._lock.view
        era, previous = context.era(), seen.lock
        lock = take(
            previous,
            host=context.me,
            boot_id=context.boot_id,
            facts=context.layout.facts,
            incarnation=str(uuid4()),
            storage=storage_of(wish.spec) if storage is None else storage,
            epoch_floor=max(epoch_floor, era.epoch_floor),
            closed=previous is not None and previous.incarnation == self.closed,
            doubted=is_doubted(
                era, previous, lock_revision=seen.mod_revision, spec=wish.spec, wish_revision=wish.revision
            ),
            mark=era.mark,
            machine=context.machine,
        )
        # Noted before it is written: a write whose reply is lost is recognised by it when the watch shows it.
        self.planned = lock.incarnation
        return lock

    def _tell_taken(self, previous: Lock | None) -> None:
        lock = self._lock.view.lock
        assert lock is not None
        holder = None if previous is None else previous.host
        why = why_taken(previous, me=self._context.me, boot_id=self._context.boot_id)
        known = {} if why is None else {"reason": why}
        self._report.tell(TAKEN, epoch=lock.epoch, incarnation=lock.incarnation, previous=holder, **known)

    async def fence(self, wish: Wish) -> None:
        """Shut out the storage clients of earlier incarnations, and whoever else has its disks open after a takeover.

        Raises:
            NotFenced: one of them could not be, or must not be without a person's word (law 11).
            SwapFailed, EtcdError: see `take`.
        """
        context, lock = self._context, self._lock.view.lock
        assert lock is not None
        everyone = await shut_out(
            lock, wish, instance=self._id, context=context, own=self._lock, seen=self.takeover_wait.seen
        )
        context.metrics.fenced(len(everyone))
        fenced = lock.fenced(address for address in everyone if address not in self._gone)
        await self._lock.write(Change.FENCE, fenced, wish.ground)
        self._gone.clear()
        if everyone:
            self._report.tell("lock.fenced", addresses=list(everyone), taken_from=lock.taken_from)

    async def shut_out_the_dead(self) -> None:
        """Before the lock is let go of: shut out the storage clients of its process, unless that closed its disks.

        The process is proven gone, so nothing of it writes any more, and without storage it is let go of all the same.
        But for another 30 s Ceph would name it as having the disks open, and the next start would wait for that.

        Raises:
            SwapFailed: another host may have the lock by now, which is not ours to delete then.
        """
        seen = self._lock.view
        lock = seen.lock
        if lock is None or not lock.clients or lock.incarnation == self.closed:
            return
        clients = await may_be_shut_out(lock.clients, instance=self._id, context=self._context, own=self._lock)
        try:
            await self._context.fencing.fence(clients)
            await point("dead shut out")
        except NotFenced as error:
            self._report.tell("lock.left_unfenced", level="warning", addresses=list(lock.clients), reason=str(error))
        else:
            self.closed = lock.incarnation
            self._context.metrics.fenced(len(clients))
            self._report.tell("lock.fenced", addresses=list(clients), taken_from=None)
        if self._lock.view.mod_revision != seen.mod_revision:
            raise SwapFailed("the lock changed meanwhile")

    async def spawn(self, wish: Wanted) -> None:
        """Start QEMU, paused.

        Raises:
            NotReady: something is missing on this host.
        """
        context, directory = self._context, self._machine.directory
        ready, self._prepared = self._prepared, None
        if ready is None or ready.spec != wish.spec:
            # What was made ready was another machine's, and this one needs nothing of it (`is_prepared`).
            ready = Prepared(spec=wish.spec)
        lock = self._lock.view.lock
        assert lock is not None
        begun = context.clock.now()
        opened = await context.provisioner.open(
            self._id,
            lock.incarnation,
            ready=ready,
            machine=self._report.machine_of(wish.spec),
            directory=directory,
        )
        self._new = New(incarnation=lock.incarnation, images=opened.new, since=begun)
        with opened.closing:
            self.obstacle = None
            record = self._record_of(wish, lock, opened)
            self.lives(wish.spec, record.uid)
            await launch(self._machine, record, wish.spec, opened, partial(self._argv, wish.spec))
        self._report.notice = ready.notice
        if opened.quarters.entry is not None and (hidden := opened.quarters.entry.kept_out):
            self._report.tell("instance.paths_hidden", level="warning", paths=list(hidden))
        self.planned = None
        context.metrics.started(self._id)
        told = self._machine.record or record
        self._report.tell("instance.spawned", pid=self._machine.pid, accelerator=told.accelerator, machine=told.machine)

    def _record_of(self, wish: Wanted, lock: Lock, opened: Opened) -> Incarnation:
        begun = new_record(
            self._id,
            lock.incarnation,
            wish.spec,
            opened,
            self._context,
            spec=spec_to_object(wish.spec),
            restart_request=wish.restart_request,
            revision=wish.revision,
        )
        return replace(begun, epoch=lock.epoch, medium=opened.ready.medium, history=lock.history)

    def _argv(self, spec: Spec, provision: Provision) -> tuple[str, ...]:
        identity = Identity(instance=self._id, uuid=instance_uuid(self._context.layout.prefix, self._id))
        return build_argv(spec, identity=identity, host=self._context.host_side, provision=provision)

    async def record(self, wish: Wanted) -> None:
        """Put the paused QEMU into the lock (law 3).

        Raises:
            SwapFailed, EtcdError: see `take`.
            NotReady: our own record of it cannot be kept.
        """
        lock, record = self._lock.view.lock, self._machine.record
        assert lock is not None
        assert record is not None
        assert record.pid is not None
        assert record.starttime is not None
        try:
            clients = await self._context.fencing.clients(
                record,
                known=lock.fence,
                new=self._new_images(record),
                admit=partial(admit, self._id, self._context),
            )
        except InUse as conflict:
            if await self.sharing.gives_way(wish.spec, conflict):
                return
            raise
        self._lock.vouch(clients)
        await point("clients known")
        must_note(self._machine, clients=clients)
        spec = self._machine.spec
        images = () if spec is None else tuple(image.name for image in images_of(spec))
        recorded = lock.recorded(pid=record.pid, starttime=record.starttime, clients=clients, images=images)
        # The keys may have changed since the lock was taken: what counts is the machine that was started.
        await self._lock.write(Change.RECORD, replace(recorded, storage=record.storage), wish.ground)

    def _new_images(self, record: Incarnation) -> tuple[str, ...]:
        new = self._new
        is_new = new.incarnation == record.incarnation and self._context.clock.now() - new.since < NEW_S
        return new.images if is_new else ()

    async def guard(self) -> None:
        """Put the process under guard (law 7). Failing is observed: when to try again, and why."""
        context, machine = self._context, self._machine
        assert context.guard is not None
        if machine.record is None or machine.pidfd is None:
            return
        try:
            await context.guard.watch(
                machine.record.incarnation, pidfd=machine.pidfd, note=machine.directory.guard_note
            )
        except Unguarded as error:
            self.guard_at = context.clock.now() + GUARD_EVERY_S
            self.guard_trouble = str(error)
        else:
            self.guard_trouble = None

    async def _guarded(self) -> bool:
        if self.is_guarded() is False:
            await self.guard()
        return self.is_guarded() is not False

    async def tend(self, action: Action, wish: Wish | None, *, takes: bool) -> None:
        """Do what `action` says of the devices of a running machine; `takes`: see `View.takes`."""
        context, machine, report = self._context, self._machine, self._report
        if action is Action.CHANGE:
            await self._changing.act(wish, takes=takes)
        elif action is Action.MEDIUM:
            await cdrom.change(self._id, wanted(wish).spec, machine=machine, report=report, context=context)
        else:
            await disks.tend(action, self._id, wish, machine=machine, report=report, context=context)

    async def go_on(self, wish: Wish | None) -> None:
        """Let the guest run, once its disks have the size that they shall have."""
        await disks.size_before_it_runs(self._machine, wish)
        await cables_before_it_runs(self._machine)
        if await self._machine.resume():
            now = self._context.clock.now()
            if self._wanted_at is not None:
                self._context.metrics.observed_start(now - self._wanted_at)
                self._wanted_at = None
            self._machine.growth.look(self._machine.spec, disks.GROWTH_EVERY_S)
            self._report.tell("instance.started", pid=self._machine.pid)
