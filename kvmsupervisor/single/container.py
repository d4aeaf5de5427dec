"""One container in single mode: an instance, and all the parts that it needs, of this container alone.

The instance's loop is the supervisor's (`instance/worker.py`), with a session, a folder and a name of its own.
See docs/decisions/0013-single-mode.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Set
from dataclasses import replace
from functools import partial
from typing import Protocol

import structlog

from kvmsupervisor import __version__
from kvmsupervisor.adapters.cgroup import NoCgroups
from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.adapters.metrics import Metrics, Snapshot
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.aio import Part, start_part
from kvmsupervisor.cluster.informer import Informer
from kvmsupervisor.cluster.owners import OwnersInEtcd
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.grouping import Flat
from kvmsupervisor.domain.removal import Hold
from kvmsupervisor.domain.spec import Power, Wish
from kvmsupervisor.instance.assembly import Outside, assemble_context
from kvmsupervisor.instance.containment import keep_going
from kvmsupervisor.instance.worker import Worker
from kvmsupervisor.machine.etcd_wall import etcd_wall
from kvmsupervisor.machine.host import HostFacts
from kvmsupervisor.machine.spawn import Launch
from kvmsupervisor.single.identity import LET_GO_S, ContainerIdentity, end_session
from kvmsupervisor.single.life import ContainersLife

log = structlog.get_logger(__name__)

LOOK_S = 0.2
"""How often a stop looks whether QEMU is gone, to give up on etcd `LET_GO_S` later."""


class Desire(Protocol):
    """What is to be run: keys of etcd say so, or a command line."""

    @property
    def tables(self) -> Mapping[str, Flat]:
        """What is to be followed of etcd, beside the lock: prefix → live table."""
        ...

    def wish(self) -> Wish:
        """What is wanted, once all tables are in step."""
        ...

    def hold(self, wish: Wish, *, former: Wish | None, runs: bool, anew: bool) -> Hold | None:
        """Why what the wish comes to waits for a person; None when it does not.

        Args:
            wish: the present one.
            former: the one before; None without.
            runs: whether a QEMU lives.
            anew: whether etcd has another history since.
        """
        ...


@frozen(kw_only=True)
class Manner:
    """What differs between an instance from its keys and a QEMU of options.

    Attributes:
        desire: what is to be run.
        host_facts: what the host brings for it.
        directory: the folder of its sockets and records.
        admission: the memory that it has to fit into.
        launch: how its QEMU is started.
        bridge_owner: as whom lines of bridge.conf are written.
        start_timeout_s: within which a new QEMU must answer.
        takeover_wait_s: how long a takeover waits for a host whose machine still has its disks open.
    """

    desire: Desire
    host_facts: HostFacts
    directory: InstanceDir
    admission: Admission
    launch: Launch
    bridge_owner: str
    start_timeout_s: float
    takeover_wait_s: float


class Container:
    """One container. Made inside the event loop, its folder being its own; `run` does the rest.

    Args:
        identity: who the container is.
        life: what it is told.
        settings: of this host.
        outside: the world.
        store: etcd.
        manner: what it runs, and how.

    Attributes:
        instance: its one.
    """

    def __init__(
        self,
        identity: ContainerIdentity,
        life: ContainersLife,
        *,
        settings: Settings,
        outside: Outside,
        store: Store,
        manner: Manner,
    ) -> None:
        self._identity = identity
        self._life = life
        self._settings = settings
        self._clock = outside.clock
        self._store = store
        self._desire = manner.desire
        self._hold: Hold | None = None
        self._era = 0
        self._member = identity.join(settings, outside, store=store, on_hosts=self._notify)
        session = self._member.session
        self._links = outside.links(self._on_links)
        self._etcd_wall = etcd_wall(settings, manner.host_facts.users, outside.packet_rule, outside.clock)
        context = assemble_context(
            self._member,
            settings=settings,
            outside=outside,
            host_facts=manner.host_facts,
            # It ends with its container, which has the cgroup that the operator gave it.
            cgroups=NoCgroups(survives_container=False),
            admission=manner.admission,
            links=self._links,
            # Counted for nobody: nothing listens.
            metrics=Metrics(
                lambda: Snapshot(etcd_up=session.held, session_remaining_s=session.remaining_s, watch_revision=0),
                host=identity.holder.name,
                version=__version__,
            ),
            bridge_owner=manner.bridge_owner,
            settle_s=0.0,
            guard=None,
            recorded_for=OwnersInEtcd(store, settings.layout, own=identity.lock_key).recorded_for,
            # It follows its own keys only: of others it knows what etcd says of a client.
            holders=lambda instance, images: (),
            namesakes=lambda instance, images: (),
            mismatch=None,
            # Its lock is a literal key, which its unit names.
            dissent=lambda: None,
            objection=lambda record: None,
            draining=lambda: False,
            host_drains=self._member.neighbours.drains,
            life=life,
            launch=manner.launch,
        )
        self._context = replace(context, start_timeout_s=manner.start_timeout_s, takeover_wait_s=manner.takeover_wait_s)
        self.instance = self._begin(manner.directory)
        layout = identity.holder.layout
        self._locks = Flat()
        self._informers = {
            prefix: Informer(
                store=store,
                clock=self._clock,
                history=self._member.history,
                prefix=prefix,
                table=table,
                on_change=lambda changed, revision: self._tell(),
                rand=outside.jitter,
            )
            for prefix, table in {**self._desire.tables, layout.lock_key(identity.name): self._locks}.items()
        }
        session.listen(self.instance.notify)
        life.listen(self.instance.notify)

    def _begin(self, directory: InstanceDir) -> Worker:
        """The instance, with the QEMU that an earlier container has left, if it lives.

        One that has ended is not this container's end: nothing is known of it but what its lock says.
        """
        name = self._identity.name

        def make() -> Worker:
            # A container begins anew: what an earlier one's QEMU came to is told, and no reason to rest.
            saved = replace(directory.read_state(self._identity.holder.boot_id), ended=None, held=False)
            return Worker(name, context=self._context, directory=directory, saved=saved, log=log)

        instance, record = make(), directory.read_incarnation()
        if record is not None:
            instance.adopt(record)
            if instance.pid is None:
                log.info("single.leftover_buried", instance=name, pid=record.pid, epoch=record.epoch)
                directory.drop_incarnation()
                instance = make()
        return instance

    # --- life -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run it to its end, and let go of what it has in etcd, as far as etcd is there.

        Raises:
            HostnameTaken: another container of this host runs it; inside an exception group.
        """
        context, instance, history = self._context, self.instance, self._member.history
        work: tuple[Part, ...] = (
            context.session.run,
            self._links.run,
            *(informer.run for informer in self._informers.values()),
            self._member.neighbours.run,
            history.run,
            partial(history.run_speaking, self._may_speak, self._member.speak),
            self._publish,
            self._first_look,
            context.logs.run,
            *self._etcd_wall.parts,
        )
        async with asyncio.TaskGroup() as parts:
            serving = [start_part(parts, part) for part in work]
            loop = start_part(parts, partial(keep_going, instance, clock=self._clock, on_error=lambda: None))
            impatient = start_part(parts, partial(self._give_up_on_etcd, loop))
            await asyncio.wait([loop])
            if context.session.held:
                await context.status_writer.flush()
            for task in (impatient, *serving):
                task.cancel()
        await context.contents.close()
        await instance.detach()
        context.logs.close()
        context.event_files.close()
        await end_session(context.session)

    async def _give_up_on_etcd(self, loop: asyncio.Task[None]) -> None:
        """Once QEMU is gone and the lock cannot be released, end all the same: the next container takes it."""
        await self._life.left.wait()
        while self.instance.pid is not None:
            await self._clock.sleep(LOOK_S)
        await self._clock.sleep(LET_GO_S)
        log.warning("lock.not_released", instance=self._identity.name, reason="etcd did not do it in time")
        loop.cancel()

    async def _publish(self) -> None:
        """Learn what the status key holds, then keep it up."""
        name = self._identity.name
        written = (await self._context.status_writer.learn(name)).get(name)
        if written is not None:
            self.instance.report.recall(written)
        self.instance.notify()
        await self._context.status_writer.run()

    # --- what it is told --------------------------------------------------------------------------------------

    async def _first_look(self) -> None:
        for informer in self._informers.values():
            await informer.synced.wait()
        self._tell()

    def _tell(self) -> None:
        """Tell the instance what its wish and its lock are now."""
        instance, life = self.instance, self._life
        key = self._identity.lock_key
        informers = self._informers.values()
        if not self._in_step or len({informer.era for informer in informers}) > 1:
            instance.notify()
            return
        era = self._informers[key].era
        anew, self._era = era != self._era, era
        wish = self._desire.wish()
        if anew:
            instance.begin_anew(wish)
            self._context.status_writer.begin_anew()
        self._hold = self._desire.hold(wish, former=instance.wish, runs=instance.has_guest, anew=anew)
        lock = self._locks.get(key.encode())
        instance.saw_lock(
            data=None if lock is None else lock.value,
            mod_revision=0 if lock is None else lock.mod_revision,
            as_of=self._informers[key].revision,
        )
        instance.update(wish, held=self._hold is not None, fresh=False, hold=self._hold)
        if anew:
            self._member.history.applied(era)
        if wish.power is Power.OFF and life.leaving() is None and self._hold is None:
            life.go("`power` is off")

    @property
    def _in_step(self) -> bool:
        return all(informer.synced.is_set() for informer in self._informers.values())

    def _notify(self) -> None:
        self.instance.notify()

    def _on_links(self, changed: Set[int]) -> None:
        if self.instance.plugs.concern(changed):
            self.instance.notify()

    def _may_speak(self) -> bool:
        """Whether the lock says what runs here, in the history that etcd has now."""
        known = self._era == self._member.history.era and self._in_step
        return known and self._context.session.held and self.instance.has_spoken
