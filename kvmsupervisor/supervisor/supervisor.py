"""One host's supervisor: joins session, mirrors, publisher, HTTP and one task per instance.

It runs until it is told to stop, and leaves every QEMU running then, for its successor to adopt.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Callable, Set
from dataclasses import replace

import structlog

from kvmsupervisor import __version__
from kvmsupervisor.adapters import cgroup, resources
from kvmsupervisor.adapters.ceph import Ceph
from kvmsupervisor.adapters.clock import Clock, boot_id, machine_id
from kvmsupervisor.adapters.etcd import Etcd
from kvmsupervisor.adapters.links import Links
from kvmsupervisor.adapters.machines import MachineTypes
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.aio import start_part
from kvmsupervisor.cluster.fencing import CephFencing
from kvmsupervisor.cluster.history import History
from kvmsupervisor.cluster.hosts import Neighbours
from kvmsupervisor.cluster.informer import Wishes
from kvmsupervisor.cluster.owners import instance_of_client
from kvmsupervisor.cluster.removal_approval import Confirmations
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.cluster.status_writer import GATHER_S, SPREAD_S, Publisher
from kvmsupervisor.config.etcd import etcd_config
from kvmsupervisor.config.settings import Settings, Unfenced
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.identity import HostIdentity, Mismatch
from kvmsupervisor.domain.incarnation import Incarnation, Memory
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.removal import RemovalGuard
from kvmsupervisor.guard.client import GuardPost
from kvmsupervisor.instance.bridges import Bridges
from kvmsupervisor.instance.containment import keep_going
from kvmsupervisor.instance.context import Surroundings
from kvmsupervisor.instance.sharing import Namesakes
from kvmsupervisor.instance.worker import Instance
from kvmsupervisor.machine.guest_logs import GuestLogs
from kvmsupervisor.machine.host import Equipment, look_around, look_at_files
from kvmsupervisor.machine.images import Disks
from kvmsupervisor.machine.provisioning import Provisioner
from kvmsupervisor.supervisor.dispatch import Dispatch
from kvmsupervisor.supervisor.drain import DrainMark
from kvmsupervisor.supervisor.failover import Failover
from kvmsupervisor.supervisor.http import serve
from kvmsupervisor.supervisor.http_view import Face
from kvmsupervisor.supervisor.identity import Standing
from kvmsupervisor.supervisor.statuses import Statuses

log = structlog.get_logger(__name__)

WORD_POLL_S = 2.0
"""How often it is looked for a person's word on a mismatch of identity. Arbitrary: who has given it waits for that."""

FLUSH_S = 2.0
"""How long a stopping supervisor tries to write its last statuses."""


class Supervisor:
    """Everything of one host. `run` does the work.

    Args:
        settings: of this host.
        etcd: its client, which `run` closes; None: `run` makes one.

    Attributes:
        again: whether `run` returned because another supervisor is to go on in its place: the host's identity changed.
    """

    def __init__(self, settings: Settings, etcd: Etcd | None = None) -> None:
        self._settings = settings
        self._given = etcd
        # What the settings say, until the run directory is ours and says otherwise (law 12).
        self._identity = HostIdentity.of(settings.hostname, settings.layout)
        self._mismatch: Mismatch | None = None
        self.again = False
        self._clock = Clock()
        self._boot_id = boot_id()
        self._run_dir = RunDir(settings.run_dir)
        self._standing = Standing(self._run_dir, wanted=self._identity, boot_id=self._boot_id)
        self._instances: dict[InstanceId, Instance] = {}
        self._guard = RemovalGuard(settings.mass_removal_window_s)
        self._drain = DrainMark(self._run_dir, boot_id=self._boot_id, clock=self._clock, on_change=self._notify_all)
        self._logs = GuestLogs(clock=self._clock, max_bytes=settings.log_max_bytes, keep=settings.log_keep)
        self._most_files = 0
        # Invariant: every instance has a task exactly while `_tasks` is set.
        self._tasks: asyncio.TaskGroup | None = None
        self._running: dict[InstanceId, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()

    # --- life -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Have `run` return soon. Machines run on."""
        self._stop.set()

    def heed_draining(self) -> None:
        """Look whether this host is to stop all its guests: the mark in the run directory came or went."""
        self._drain.heed()

    async def run(self, on_started: Callable[[], None] = lambda: None) -> None:
        """Supervise until `stop`.

        Args:
            on_started: called once the run directory is ours, what ran is adopted and HTTP is served.

        Raises:
            AlreadyRunning: another supervisor has the run directory.
            ListenError: `KVM_LISTEN` cannot be listened on.
            Impossible: the homes that are asked for cannot be had.
            ValueError: KVM cannot be used, or QEMU not run as the user that was named, for want of rights maybe.
            HostnameTaken: another supervisor lives under this host's name; inside an exception group, as it comes
                from one of the parts.
        """
        settings = self._settings
        self._most_files = resources.raise_limit()
        equipment = look_around(settings)
        self._run_dir.acquire()
        self.heed_draining()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._run_dir.release)
            stack.callback(self._logs.close)
            self._identity, self._mismatch = self._standing.settle()
            if self._mismatch is not None:
                log.error("identity.mismatch", reason=str(self._mismatch), instances=list(self._mismatch.living))
            self._etcd = self._given or Etcd(etcd_config(settings))
            stack.push_async_callback(self._etcd.close)
            chosen = await cgroup.choose(settings.cgroup.value, run_dir=settings.run_dir)
            stack.push_async_callback(chosen.homes.close)
            self._wire(equipment, chosen)
            stack.callback(self._post.close)
            if self._around.guard is None:
                await self._post.dismiss()
            self._adopt()
            url = await serve(self.face, settings, stack)
            self._session.value = replace(self._session.value, url=url, draining=self._drain.on)
            stack.callback(self._session.listen(self._notify_all))
            log.info(
                "supervisor.started",
                version=__version__,
                host=self._identity.host,
                etcd=list(settings.etcd_endpoints),
                prefix=self._identity.prefix,
                run_dir=str(settings.run_dir),
                accelerator=equipment.accelerator.name,
                why_no_kvm=equipment.accelerator.fallback,
                qemu_user=None if equipment.user is None else equipment.user.name,
                memory_mib=equipment.memory_mib,
                homes=chosen.homes.name,
                homes_rejected=dict(chosen.rejected),
                url=self._session.value.url,
                adopting=len(self._instances),
            )
            if chosen.warning is not None:
                log.error("homes.lost_with_container", reason=chosen.warning)
            if equipment.privileged:
                log.warning("qemu.privileged", reason="QEMU runs as root: create a user qemu, or set KVM_QEMU_USER")
            on_started()
            await self._supervise()
        log.info("supervisor.stopped")

    def _wire(self, equipment: Equipment, chosen: cgroup.Chosen) -> None:
        """Make the parts that need etcd, none of which does anything yet."""
        settings, layout, clock, store = self._settings, self._identity.layout, self._clock, self._etcd
        mismatch = None if self._mismatch is None else str(self._mismatch)
        self._admission = Admission(settings.start_parallel, equipment.memory_mib)
        memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        self._me, self._layout = self._identity.host, layout
        me = HostSession(
            host=self._me,
            version=__version__,
            url="",
            boot_id=self._boot_id,
            machine=machine_id(),
            started=clock.wall(),
            cpus=os.cpu_count() or 0,
            memory_mib=memory_mib,
            notice=mismatch or "",
            lock=layout.lock,
        )
        self._history = History(
            store=store,
            clock=clock,
            layout=layout,
            me=self._me,
            run_dir=settings.run_dir,
            patience_s=settings.takeover_wait_s,
        )
        me = replace(me, history=self._history.spoken_name)
        self._session = Session(
            store=store,
            clock=clock,
            layout=layout,
            value=me,
            run_dir=settings.run_dir,
            ttl_s=settings.session_ttl_s,
            # Somebody else may have this host's former name by now. What lives here is to be seen all the same.
            yields=mismatch is not None,
        )
        self._publisher = Publisher(
            store=store,
            clock=clock,
            layout=layout,
            host=self._me,
            session=self._session,
            gather_s=GATHER_S,
            spread_s=SPREAD_S,
        )
        self._wishes = Wishes(
            store=store,
            clock=clock,
            layout=layout,
            history=self._history,
            on_change=self._on_keys,
            on_anew=self._on_anew,
        )
        self._confirmations = Confirmations(
            store=store,
            clock=clock,
            key=layout.confirmation_key(self._me),
            guard=self._guard,
            on_freed=self._let_go,
        )
        self._post = GuardPost(
            run_dir=self._run_dir,
            clock=clock,
            homes=chosen.homes,
            ttl_s=settings.session_ttl_s,
            notify=self._notify_all,
        )
        self._session.follow(self._post.renewed)
        self._neighbours = Neighbours(
            store=store, clock=clock, layout=layout, me=self._me, history=self._history, on_change=self._on_hosts
        )
        self._statuses = Statuses(
            publisher=self._publisher,
            wishes=self._wishes,
            instances=self._instances,
            # Whether a status without keys is the last word on an instance is known under one's own settings only.
            drops=mismatch is None,
        )
        self.face = Face(
            host=self._me,
            instances=self._instances,
            hosts=self._neighbours.table,
            alive=self._neighbours.names,
            session=self._session,
            history=self._history,
            wishes=self._wishes,
            removals_held=lambda: len(self._guard.held),
            qemu_privileged=equipment.privileged,
            guests_survive=chosen.warning is None,
            guard_unlocked=lambda: self._post.unlocked,
            mismatch=mismatch,
        )
        self._metrics = self.face.counters
        ceph = Ceph(equipment.ceph_access)
        self._links = Links(lambda changed: self._dispatch.links_differ(changed))  # noqa: PLW0108 - it is made below
        namesakes = Namesakes(self._wishes)
        disks = Disks(ceph, allow_unfenced=settings.allow_unfenced)
        self._around = Surroundings(
            me=self._me,
            boot_id=self._boot_id,
            layout=layout,
            store=store,
            session=self._session,
            publisher=self._publisher,
            admission=self._admission,
            provisioner=Provisioner(
                host=equipment.host_side,
                files=equipment.files,
                user=equipment.user,
                types=MachineTypes(settings.qemu),
                homes=chosen.homes,
                disks=disks,
            ),
            disks=disks,
            logs=self._logs,
            links=self._links,
            user=equipment.user,
            clock=clock,
            jitter=random.random,
            metrics=self._metrics,
            fencing=CephFencing(ceph, allow_unfenced=settings.allow_unfenced),
            host_has_session=self._neighbours.has_session,
            sessions=self._neighbours.names,
            host_drains=self._neighbours.drains,
            host_side=equipment.host_side,
            shutdown_timeout_s=settings.shutdown_timeout_s,
            start_timeout_s=settings.start_timeout_s,
            settle_s=settings.settle_s,
            guard=self._post if settings.unfenced is Unfenced.GUARD else None,
            takeover_wait_s=settings.takeover_wait_s,
            era=lambda: self._history.present,
            recorded_for=self._recorded_for,
            holders=namesakes.holders,
            namesakes=namesakes.of,
            mismatch=mismatch,
            dissent=self._neighbours.dissent,
            objection=self._objection,
            draining=lambda: self._drain.on,
            leaving=lambda: None,
            ended=lambda end, status: None,
        )
        self._failover = Failover(self._around, self._wishes)
        self._bridges = Bridges(
            me=self._me,
            owner=equipment.files.bridge_owner,
            bridge_if=equipment.host_side.bridge_if,
            instances=self._instances,
            clock=clock,
        )
        self._dispatch = Dispatch(
            me=self._me,
            clock=clock,
            wishes=self._wishes,
            instances=self._instances,
            namesakes=namesakes,
            guard=self._guard,
            admit=self._admit,
            start=self._start,
            on_candidates=self._failover.look,
            on_held=self._confirmations.look,
            on_told=self._bridges.heed,
        )

    async def _supervise(self) -> None:
        """Run all parts until `stop`, then end them in order: decisions, statuses, connections."""
        async with asyncio.TaskGroup() as parts:
            serving = [
                start_part(parts, part)
                for part in (
                    self._wishes.run(),  # first: reading a large cluster takes longest
                    self._neighbours.run(),
                    self._history.run(),
                    self._history.run_speaking(self._may_speak, self._speak),
                    self._session.run(),
                    self._drain.run_telling(self._session),
                    self._statuses.run(),
                    self._look_first(),
                    self._confirmations.run(),
                    self._around.logs.run(),
                    self._links.run(),
                    *(() if self._mismatch is not None else (self._bridges.run(),)),
                    *(() if self._around.guard is None else (self._around.guard.run(),)),
                    self._failover.run(self._wishes.wait_synced, self._neighbours.synced.wait)
                    if self._mismatch is None
                    else self._await_word(),
                )
            ]
            await self._run_instances()
            if self._session.held:
                await self._publisher.flush(FLUSH_S)
            self._history.save()
            for task in serving:
                task.cancel()

    async def _run_instances(self) -> None:
        """Run every instance's loop until `stop`; then let go of each QEMU without touching it."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for instance in self._instances.values():
                self._start(instance)
            await self._stop.wait()
            log.info("supervisor.stopping", running=sum(one.pid is not None for one in self._instances.values()))
            self._tasks = None
            for task in self._running.values():
                task.cancel()
        for instance in self._instances.values():
            await instance.detach()

    # --- instances --------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Find what an earlier supervisor left running. Needs no etcd; what it means is decided once etcd is read."""
        for name in self._run_dir.instances():
            if self._run_dir.instance(name).has_record:
                self._instance(name)

    def _instance(self, name: InstanceId) -> Instance:
        """The instance of that name, made if there is none yet, with what an earlier supervisor left of it."""
        if name not in self._instances:
            directory = self._run_dir.instance(name)
            fresh = Memory(boot_id=self._boot_id)
            self._instances[name] = Instance(name, around=self._around, directory=directory, memory=fresh, log=log)
            self._instances[name].inherit()
        return self._instances[name]

    def _objection(self, record: Incarnation) -> str | None:
        """Why a QEMU on record is not ours to touch: it lives, and was started under another identity."""
        pid = self._standing.pid_of(record)
        under = self._identity if pid is None else self._standing.under(record, pid)
        if under == self._identity:
            return None
        return (
            f"QEMU {pid} of this instance was started under {under.unlike(self._identity)}, and this supervisor works "
            f"under {self._identity.unlike(under)}: it is left alone; a supervisor under its own settings takes it over"
        )

    async def _await_word(self) -> None:
        """Go on under what the settings say once a person has said so, or nothing lives that says otherwise."""
        while True:
            await self._clock.sleep(WORD_POLL_S)
            note = self._standing.note()
            if (note is not None and note.confirmed) or self._standing.judge()[1] is None:
                self.again = True
                self.stop()

    def _admit(self, name: InstanceId, *, fresh: bool) -> Instance:
        """Take on an instance that was not known here; with fresh keys, its status key may be older than they are."""
        if fresh:
            self._publisher.doubt(name)
        return self._instance(name)

    def _start(self, instance: Instance) -> None:
        if self._tasks is not None:
            self._running[instance.id] = self._tasks.create_task(self._keep_going(instance), name=instance.id)

    async def _keep_going(self, instance: Instance) -> None:
        """Run one instance's loop to its end. An error of ours in it stays with this instance, and is not the end."""
        await keep_going(instance, clock=self._clock, on_error=lambda: self._metrics.internal_error(instance.id))
        self._forget(instance)

    def _forget(self, instance: Instance) -> None:
        """Nothing of it is ours any more: let go of all that was kept of it here."""
        name = instance.id
        del self._instances[name]
        del self._running[name]
        self._dispatch.forget(name)
        self._metrics.forget(name)
        self._admission.release(name)
        self._admission.take_back(name)
        if instance.wish is not None and instance.wish.keys == 0:
            self._publisher.forget(name)
            directory = self._run_dir.instance(name)
            self._logs.writer.drop(directory.path)
            directory.remove()
        else:
            if instance.wish is None or instance.wish.host is not None:
                self._publisher.abandon(name)
            self._run_dir.instance(name).drop_memory()
        instance.report.tell("instance.forgotten", reason=instance.report.status.reason)
        # Its keys may have come back between its last decision and now. Its lock is no sign of that: what the watch
        # has shown of it may be older than our own deletion.
        if self._dispatch.is_wanted_here(name):
            self._dispatch.tell({name})

    async def _look_first(self) -> None:
        """Once all is listed, look at all of it."""
        await self._wishes.wait_synced()
        self._dispatch.begin()
        look_at_files(self._most_files, len(self._instances))

    def _on_keys(self, changed: Set[InstanceId], revision: int) -> None:
        """Keys or locks of these instances differ."""
        self._dispatch.tell(changed)

    def _on_anew(self) -> None:
        """Keys and locks are those of another history of etcd."""
        self._dispatch.begin_anew()
        self._statuses.begin_anew()

    def _may_speak(self) -> bool:
        """Whether everything that runs here has its lock in the history that etcd has now."""
        known = self._wishes.synced and self._wishes.era == self._history.era
        return known and self._session.held and all(one.has_spoken for one in self._instances.values())

    async def _speak(self, history: str) -> bool:
        return await self._session.restate(replace(self._session.value, history=history))

    def _let_go(self, freed: Set[InstanceId]) -> None:
        """An operator has confirmed these removals."""
        self._dispatch.let_go(freed)

    # --- around -----------------------------------------------------------------------------------------------

    def _on_hosts(self) -> None:
        """A host came or went, or has spoken: whoever waits looks again."""
        self._notify_all()
        self._failover.look()

    async def _recorded_for(self, client: str) -> InstanceId | None:
        return instance_of_client(self._wishes, client)

    def _notify_all(self) -> None:
        for instance in self._instances.values():
            instance.notify()
