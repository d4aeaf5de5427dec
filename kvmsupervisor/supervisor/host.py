"""One host, whole: session, keys, statuses, HTTP view, and one task per instance.

`Supervisor` makes it once etcd and the host facts are known; everything that it has is there from then on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Set
from dataclasses import replace
from functools import partial

import structlog

from kvmsupervisor.aio import Part, start_part
from kvmsupervisor.cluster.batches import GATHER_S, SPREAD_S
from kvmsupervisor.cluster.owners import LockOwners
from kvmsupervisor.cluster.removal_approval import RemovalApprovals
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.config.values import ReturnKind, Unfenced
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.removal import MassRemovalHold
from kvmsupervisor.failpoints import cut
from kvmsupervisor.guard.client import GuardClient
from kvmsupervisor.instance.assembly import Holder, Membership, Outside, assemble_context
from kvmsupervisor.instance.bridges import Bridges
from kvmsupervisor.instance.containment import keep_going
from kvmsupervisor.instance.context import HostsLife
from kvmsupervisor.instance.sharing import Namesakes
from kvmsupervisor.instance.worker import Worker
from kvmsupervisor.machine.etcd_wall import etcd_wall
from kvmsupervisor.machine.host import look_at_files
from kvmsupervisor.machine.spawn import BEHIND
from kvmsupervisor.supervisor.consoles import Consoles
from kvmsupervisor.supervisor.dispatch import Dispatch
from kvmsupervisor.supervisor.evacuation import Evacuation
from kvmsupervisor.supervisor.failover import Failover
from kvmsupervisor.supervisor.gate import Gate, open_gate
from kvmsupervisor.supervisor.http_view import HttpView
from kvmsupervisor.supervisor.premises import Premises
from kvmsupervisor.supervisor.statuses import Statuses
from kvmsupervisor.supervisor.telling import Telling

log = structlog.get_logger(__name__)

PAUSE_PER_HOST_S = 0.001
MOST_PAUSE_S = 0.5
LEAST_PAUSE_S = 0.05
"""How long the news that a host came or went waits for more such news: 1 ms for each host that is there, from 50 hosts
on. Arbitrary: a session's end was waited for thirty times as long."""

WORD_POLL_S = 2.0
"""How often it is looked for a person's word on a mismatch of identity. Arbitrary: who has given it waits for that."""


class Host:
    """Everything of one host. Made inside the event loop; nothing of it does anything before `take_over`.

    Args:
        settings: of this host.
        outside: the world.
        premises: what is known of the host.

    Attributes:
        http_view: what HTTP and the metrics show of it.
        consoles: of its instances, for who is let in.
    """

    def __init__(self, settings: Settings, outside: Outside, premises: Premises) -> None:
        identity, host_facts, clock = premises.identity, premises.host_facts, outside.clock
        mismatch = None if premises.mismatch is None else str(premises.mismatch)
        layout, me = identity.layout, identity.host
        self._premises = premises
        self._clock = clock
        self._mismatch = mismatch
        self._instances: dict[InstanceId, Worker] = {}
        # Invariant: every instance has a task exactly while `_tasks` is set.
        self._tasks: asyncio.TaskGroup | None = None
        self._running: dict[InstanceId, asyncio.Task[None]] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._guard = MassRemovalHold(settings.mass_removal_window_s)
        self._admission = Admission(settings.start_parallel, host_facts.memory_mib)

        # In etcd.
        holder = Holder(
            name=me,
            boot_id=premises.boot_id,
            machine=outside.machine_id(),
            layout=layout,
            run_dir=settings.run_dir,
        )
        member = Membership(
            holder,
            settings=settings,
            outside=outside,
            store=premises.store,
            says=replace(
                holder.introduction(outside),
                cpus=os.cpu_count() or 0,
                memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
                guests_mib=host_facts.memory_mib,
                drain_any=settings.drain_any,
                web=settings.web_url or "",
                notice=mismatch or "",
                lock=layout.lock,
            ),
            # Somebody else may have this host's former name by now. What lives here is to be seen all the same.
            yields=mismatch is not None,
            gather_s=GATHER_S,
            spread_s=SPREAD_S,
            on_hosts=self._on_hosts,
        )
        self._history, self._session = member.history, member.session
        self._session.listen(self.notify_all)
        self._neighbours, self._status_writer = member.neighbours, member.status_writer
        self._speak = member.speak
        self._wishes = Wishes(
            store=premises.store,
            clock=clock,
            layout=layout,
            history=self._history,
            me=me,
            concerns=self._concerns,
            on_change=self._on_keys,
            on_anew=self._on_anew,
            rand=outside.jitter,
        )
        self._confirmations = RemovalApprovals(
            store=premises.store,
            clock=clock,
            key=layout.confirmation_key(me),
            guard=self._guard,
            on_freed=self._let_go,
        )

        # On the host.
        self._post = GuardClient(
            run_dir=premises.run_dir,
            clock=clock,
            cgroups=premises.cgroups.cgroups,
            ttl_s=settings.session_ttl_s,
            notify=self.notify_all,
        )
        self._session.follow(self._post.renewed)
        self._links = outside.links(self._on_links)
        self._etcd_wall = etcd_wall(settings, host_facts.users, outside.packet_rule, clock)
        self.consoles = Consoles(
            premises.run_dir,
            group=settings.console_group,
            instances=self._instances,
            is_guests=host_facts.users.has,
            clock=clock,
        )
        self._telling = Telling(self._session, clock, premises.drain, self._etcd_wall, host_facts.gaps)
        self.http_view = HttpView(
            host=me,
            instances=self._instances,
            hosts=self._neighbours.table,
            alive=self._neighbours.names,
            session=self._session,
            history=self._history,
            wishes=self._wishes,
            progress=lambda: self._evacuation.progress,
            room=self._admission.room,
            durations=premises.store.durations,
            ceph_up=lambda: host_facts.ceph_access.slots.answered,
            removals_held=lambda: len(self._guard.held),
            qemu_privileged=host_facts.privileged,
            walls=lambda: (*host_facts.wall_states, ("etcd", self._etcd_wall.stands)),
            guests_survive=premises.cgroups.warning is None,
            guard_unlocked=lambda: self._post.unlocked,
            mismatch=mismatch,
        )
        self._metrics = self.http_view.counters

        # For the instances.
        self._gate: Gate | None = None
        if mismatch is None:
            self._gate = open_gate(
                settings,
                host_facts.host_side,
                self._neighbours,
                self._instances,
                transfers=outside.system.transfers,
                version_of=outside.qemu_version,
            )
        life = HostsLife()
        namesakes = self._namesakes = Namesakes(self._wishes, me)
        self._context = assemble_context(
            member,
            settings=settings,
            outside=outside,
            host_facts=host_facts,
            cgroups=premises.cgroups.cgroups,
            admission=self._admission,
            links=self._links,
            metrics=self._metrics,
            bridge_owner=host_facts.files.bridge_owner,
            settle_s=settings.settle_s,
            guard=self._post if settings.unfenced is Unfenced.GUARD else None,
            recorded_for=LockOwners(self._wishes, premises.store, layout).recorded_for,
            holders=namesakes.holders,
            namesakes=namesakes.of,
            mismatch=mismatch,
            dissent=self._neighbours.dissent,
            objection=premises.standing.objection(identity),
            draining=lambda: premises.drain.on,
            host_drains=self._takes_nobody,
            life=life,
            launch=BEHIND,
            moving=None if self._gate is None else self._gate.moving,
        )
        self._failover = Failover(self._context, self._wishes)
        self._evacuation = Evacuation(
            self._context,
            wishes=self._wishes,
            neighbours=self._neighbours,
            instances=self._instances,
            life=life,
            any_host=settings.drain_any,
            most=settings.migration_parallel,
            by_itself=settings.return_ is ReturnKind.AUTO,
            notify_all=self.notify_all,
        )
        self._bridges = Bridges(
            network=outside.system.network,
            me=me,
            owner=host_facts.files.bridge_owner,
            bridge_if=host_facts.host_side.bridge_if,
            instances=self._instances,
            clock=clock,
        )
        self._dispatch = Dispatch(
            me=me,
            clock=clock,
            wishes=self._wishes,
            instances=self._instances,
            namesakes=namesakes,
            guard=self._guard,
            admit=self._admit,
            start=self._start,
            on_heard=self._failover.heard,
            on_held=self._confirmations.look,
            on_told=self._bridges.heed,
        )
        self._statuses = Statuses(
            status_writer=self._status_writer,
            wishes=self._wishes,
            instances=self._instances,
            concerns=self._dispatch.concerns,
            processes=outside.system.processes,
            # Whether a status without keys is the last word on an instance is known under one's own settings only.
            drops=mismatch is None,
        )

    # --- life -------------------------------------------------------------------------------------------------

    async def take_over(self, records: Mapping[InstanceId, Incarnation]) -> int:
        """Find what an earlier supervisor left running; return of how many instances.

        It needs no etcd; what it means is decided once etcd is read.

        Args:
            records: of QEMUs, as far as they were read already.
        """
        if self._context.guard is None:
            await self._post.dismiss()
        run_dir = self._premises.run_dir
        for name in run_dir.instances():
            if run_dir.instance(name).has_record:
                self._instance(name, records.get(name))
        self._wishes.heed(self._instances)
        return len(self._instances)

    def served_at(self, url: str) -> None:
        """Have the session say where HTTP is served. Before `run`."""
        moves = None if self._gate is None else self._gate.moving.facts
        self._session.value = self._telling.said(replace(self._session.value, url=url, moves=moves))

    async def run(self, stop: asyncio.Event) -> bool:
        """Run all parts until `stop`, then end them in order: decisions, statuses, connections.

        Returns:
            Whether another supervisor is to go on in its place: the host's identity has changed.

        Raises:
            HostnameTaken: another supervisor lives under this host's name; inside an exception group.
        """
        again = asyncio.Event()
        work: tuple[Part, ...] = (
            self._wishes.run,  # first: reading a large cluster takes longest
            self._neighbours.run,
            self._history.run,
            partial(self._history.run_speaking, self._may_speak, self._speak),
            self._session.run,
            self._telling.run,
            self._statuses.run,
            self._look_first,
            self._confirmations.run,
            self._context.logs.run,
            self._links.run,
            *(() if self._mismatch is not None else (self._bridges.run, *self._etcd_wall.parts)),
            *(() if self._context.guard is None else (self._context.guard.run,)),
            *(() if self._gate is None else (self._gate.run,)),
            *((partial(self._await_word, stop, again),) if self._mismatch is not None else self._between_hosts),
        )
        async with asyncio.TaskGroup() as parts:
            serving = [start_part(parts, part) for part in work]
            await self._run_instances(stop)
            if self._session.held:
                await self._status_writer.flush()
            self._history.save()
            for task in serving:
                task.cancel()
        return again.is_set()

    @property
    def _between_hosts(self) -> tuple[Part, ...]:
        """The parts by which instances come from other hosts, and go there, unasked."""
        known = (self._wishes.wait_synced, self._neighbours.synced.wait)
        return partial(self._failover.run, *known), partial(self._evacuation.run, *known)

    def close(self) -> None:
        """Let go of what `run` has opened. Guests and their guard go on."""
        if self._looking is not None:
            self._looking.cancel()
        self._post.close()
        if self._gate is not None:
            self._gate.close()
        self._context.logs.close()
        self._context.event_files.close()

    async def _run_instances(self, stop: asyncio.Event) -> None:
        """Run every instance's loop until `stop`; then let go of each QEMU without touching it."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for instance in self._instances.values():
                self._start(instance)
            await stop.wait()
            log.info("supervisor.stopping", running=sum(one.pid is not None for one in self._instances.values()))
            self._tasks = None
            for task in self._running.values():
                task.cancel()
        await self._context.contents.close()
        for instance in self._instances.values():
            await instance.detach()

    # --- instances --------------------------------------------------------------------------------------------

    def _instance(self, name: InstanceId, record: Incarnation | None = None) -> Worker:
        """The instance of that name, made if there is none yet, with what an earlier supervisor left of it.

        Args:
            name: the instance's id.
            record: of its QEMU, where it was read already.
        """
        if name not in self._instances:
            directory = self._premises.run_dir.instance(name)
            fresh = InstanceState(boot_id=self._premises.boot_id)
            self._instances[name] = Worker(name, context=self._context, directory=directory, saved=fresh, log=log)
            self._instances[name].inherit(record)
        return self._instances[name]

    async def _await_word(self, stop: asyncio.Event, again: asyncio.Event) -> None:
        """Go on under what the settings say once a person has said so, or nothing lives that says otherwise."""
        standing = self._premises.standing
        while True:
            await self._clock.sleep(WORD_POLL_S)
            note = standing.note()
            if (note is not None and note.confirmed) or standing.judge()[1] is None:
                again.set()
                stop.set()

    def _admit(self, name: InstanceId, *, fresh: bool) -> Worker:
        """Take on an instance that was not known here; with fresh keys, its status key may be older than they are."""
        if fresh:
            self._status_writer.doubt(name)
        return self._instance(name)

    def _start(self, instance: Worker) -> None:
        if self._tasks is not None:
            self._running[instance.id] = self._tasks.create_task(self._keep_going(instance), name=instance.id)

    async def _keep_going(self, instance: Worker) -> None:
        """Run one instance's loop to its end. An error of ours in it stays with this instance, and is not the end."""
        await keep_going(instance, clock=self._clock, on_error=lambda: self._metrics.internal_error(instance.id))
        self._forget(instance)

    def _forget(self, instance: Worker) -> None:
        """Nothing of it is ours any more: let go of all that was kept of it here."""
        name, directory = instance.id, self._premises.run_dir.instance(instance.id)
        del self._instances[name]
        del self._running[name]
        self._dispatch.forget(name)
        self._metrics.forget(name)
        self._admission.release(name)
        self._admission.take_back(name)
        if instance.wish is not None and instance.wish.keys == 0:
            self._status_writer.forget(name)
            self._context.logs.writer.drop(directory.path)
            directory.remove()
        else:
            self._status_writer.leave(name, instance.report.status)
            directory.drop_state()
        instance.report.tell("instance.forgotten", reason=instance.report.status.reason)
        self._context.event_files.set_aside(name)
        # Its keys may have come back between its last decision and now. Its lock is no sign of that: what the watch
        # has shown of it may be older than our own deletion.
        if self._dispatch.is_wanted_here(name):
            self._dispatch.tell({name})

    async def _look_first(self) -> None:
        """Once all is listed, look at all of it."""
        await self._wishes.wait_synced()
        self._evacuation.heed()
        self._dispatch.begin()
        self._context.event_files.begin(self._instances)
        self._history.applied(self._wishes.era)
        look_at_files(self._premises.most_files, len(self._instances))

    # --- what it is told --------------------------------------------------------------------------------------

    def notify_all(self) -> None:
        """Something changed that concerns all instances: each looks again."""
        for instance in self._instances.values():
            instance.notify()

    def _on_keys(self, changed: Set[InstanceId], revision: int) -> None:
        """Keys or locks of these instances differ; of none: what people want of hosts."""
        if not changed:
            self._evacuation.heed()
        self._dispatch.tell(changed)
        self._evacuation.heard(changed)
        self._heed(changed)

    def _heed(self, changed: Set[InstanceId]) -> None:
        """Follow the locks that concern this host by now."""
        if self._wishes.locks_apart:
            self._wishes.heed(changed | self._namesakes.beside(changed))

    def _concerns(self, name: InstanceId) -> bool:
        """Whether a lock concerns this host: its instance is here, may be taken over, or shares an image with one."""
        if self._dispatch.concerns(name) or self._failover.may_take(name):
            return True
        return not self._instances.keys().isdisjoint(self._namesakes.beside({name}))

    def _on_anew(self) -> None:
        """Keys and locks are those of another history of etcd."""
        self._failover.heard_anew()
        self._evacuation.heed()
        self._dispatch.begin_anew()
        self._heed(self._wishes.ids() | self._instances.keys())
        self._statuses.begin_anew()
        if self._dispatch.has_begun:
            cut("orders held, history not on record")
            self._history.applied(self._wishes.era)

    def _on_hosts(self) -> None:
        """A host came or went, or has spoken: whoever waits looks again.

        In a large cluster hosts come in crowds, and each look costs: then one look serves for many.
        """
        pause_s = min(self._history.hosts * PAUSE_PER_HOST_S, MOST_PAUSE_S)
        if pause_s < LEAST_PAUSE_S:
            self._look_at_hosts()
        elif self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(pause_s, self._look_at_hosts)

    def _look_at_hosts(self) -> None:
        self._looking = None
        self.notify_all()
        self._failover.look()
        self._evacuation.look()

    def _on_links(self, changed: Set[int]) -> None:
        """Network interfaces of this host differ."""
        self._dispatch.links_differ(changed)

    def _let_go(self, freed: Set[InstanceId]) -> None:
        """An operator has confirmed these removals."""
        self._dispatch.let_go(freed)

    # --- what the instances ask ----------------------------------------------------------------------------------

    def _takes_nobody(self, host: HostName) -> bool:
        """Whether a host takes no guest in: it drains, or says that it stops all its guests."""
        return self._wishes.host_wish(host).drain is not None or self._neighbours.drains(host)

    def _may_speak(self) -> bool:
        """Whether everything that runs here has its lock in the history that etcd has now."""
        known = self._wishes.synced and self._wishes.era == self._history.era
        return known and self._session.held and all(one.has_spoken for one in self._instances.values())
