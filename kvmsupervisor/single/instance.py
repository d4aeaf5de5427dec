"""`exec` with `INSTANCE`: one instance from its keys, its container's life its own.

The instance's loop is the supervisor's (`instance/worker.py`), with a session, a run directory and a name of its own.
See docs/decisions/0013-single-mode.md.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Set
from contextlib import AsyncExitStack
from dataclasses import replace

import structlog

from kvmsupervisor import __version__
from kvmsupervisor.adapters.cgroup import Nowhere
from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.adapters.metrics import Metrics, Snapshot
from kvmsupervisor.aio import start_part
from kvmsupervisor.cluster.informer import Mirror
from kvmsupervisor.cluster.owners import other_of_client
from kvmsupervisor.config.etcd import etcd_config
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.config.values import SOCKET_PATH_LIMIT
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.argv import host_problems
from kvmsupervisor.domain.exits import Exit, WaitStatus
from kvmsupervisor.domain.grouping import Flat
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.names import QMP_SPARE_SOCKET
from kvmsupervisor.domain.placement import NOT_PLACED, Placed
from kvmsupervisor.domain.removal import Hold, ends_it, order_of, why_held
from kvmsupervisor.domain.single import refusal, single_wish
from kvmsupervisor.domain.spec import Power, RawValue, Wish
from kvmsupervisor.instance.assembly import REAL, Outside, surround
from kvmsupervisor.instance.bridges import withdraw
from kvmsupervisor.instance.containment import keep_going
from kvmsupervisor.instance.context import Surroundings
from kvmsupervisor.instance.worker import Instance
from kvmsupervisor.machine.host import Equipment
from kvmsupervisor.single.identity import LET_GO_S, Stand, end_session
from kvmsupervisor.single.process import exit_status

log = structlog.get_logger(__name__)

LOOK_S = 0.2
"""How often a stop looks whether QEMU is gone, to give up on etcd `LET_GO_S` later."""


class NotHere(Exception):
    """The instance is not begun here. The message says why; whoever started the container may try again."""


class Single:
    """One instance.

    Args:
        settings: of this host.
        instance: which.
        lock_key: its lock, with nothing left to be filled in.
        overrides: values that win over its keys.
        outside: the world.

    Made inside an event loop.
    """

    def __init__(
        self,
        settings: Settings,
        instance: InstanceId,
        *,
        lock_key: str,
        overrides: Mapping[str, str],
        outside: Outside = REAL,
    ) -> None:
        self._settings = settings
        self._outside = outside
        self._id = instance
        self._overrides = dict(overrides)
        self._stand = Stand.of(settings, lock_key, outside)
        # Not the holder: in a PID namespace the next container has another one, and takes away what this one left.
        self._bridge_owner = f"{lock_key}@{settings.hostname}"
        self._clock = outside.clock
        self._keys = Flat()
        self._locks = Flat()
        self._placements = Flat()
        self._mirrors: list[Mirror[bytes]] = []
        self._era = 0
        self._hold: Hold | None = None
        self._instance: Instance | None = None
        self._links = outside.links(self._on_links)
        self._told: int | None = None
        self._hurried = False
        self._leaving: str | None = None
        self._leave = asyncio.Event()
        self._status: int | None = None

    # --- what it is told --------------------------------------------------------------------------------------

    def signalled(self, number: signal.Signals) -> None:
        """Shut the guest down; a second signal ends QEMU without its guest's consent."""
        self._hurried = self._told is not None
        self._told = number
        self._go(f"its container was told to stop ({number.name})")

    def _go(self, why: str) -> None:
        """Stop the instance and let go of it."""
        if self._leaving is None:
            self._leaving = why
            log.info("single.leaving", instance=self._id, reason=why)
        self._leave.set()
        if self._instance is not None:
            self._tell(self._instance)

    def _ended(self, end: Exit, status: WaitStatus) -> None:
        """QEMU has ended, whether it was asked to or not: so does the container."""
        self._status = exit_status(status)
        self._go(f"its QEMU {end.text}")

    # --- life -------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Run it to its end; return what to exit with: QEMU's status, or 128 and the signal that came before QEMU.

        Raises:
            NotHere: its keys do not allow it; no QEMU has run.
            EtcdError: etcd did not say what its keys are.
            AlreadyRunning, HostnameTaken: another container of this host runs it (the latter in an exception group).
            ValueError: KVM is demanded and cannot be used, QEMU cannot run as the user that was named, root lacks
                capabilities for that, or a path would be too long.
            Hidden: an earlier container's QEMU may live, and that cannot be seen.
        """
        settings = self._settings
        directory = self._stand.run_dir.instance(self._id)
        too_long = len(os.fsencode(directory.path / QMP_SPARE_SOCKET)) - SOCKET_PATH_LIMIT
        if too_long > 0:
            raise ValueError(f"KVM_RUN_DIR: {settings.run_dir} is {too_long} bytes too long for the sockets below it")
        equipment = self._outside.look_around(settings)
        async with AsyncExitStack() as stack:
            store = self._outside.connect(etcd_config(settings))
            stack.push_async_callback(store.close)
            await self._check(store, equipment)
            self._stand.run_dir.acquire()
            stack.callback(self._stand.run_dir.release)
            instance = await self._run(store, equipment)
        if self._status is not None:
            return self._status
        if self._told is not None:
            return 128 + self._told
        raise NotHere(f"{self._id}: {instance.report.status.reason}")

    async def _check(self, store: Store, equipment: Equipment) -> None:
        """Look at the keys once, before anything is done.

        Raises:
            NotHere: they do not allow it.
            EtcdError: etcd did not say what they are.
        """
        prefix = self._stand.holder.layout.instance_prefix(self._id)
        found = await store.list(prefix)
        placement = await store.get(self._stand.holder.layout.placement_key(self._id))
        wish = self._wish_of(
            {kv.key.decode(errors="replace"): (kv.value, kv.mod_revision) for kv in found.kvs},
            NOT_PLACED if placement is None else Placed.read(placement.value, placement.mod_revision),
        )
        problems = wish.problems
        if wish.spec is not None:
            problems = (*problems, *host_problems(wish.spec, equipment.host_side))
        why = refusal(
            wish,
            holder=self._stand.holder.name,
            host=self._settings.hostname,
            problems=problems,
            prefix=self._settings.prefix,
        )
        if why is not None:
            raise NotHere(why)

    def _begin(self, around: Surroundings) -> Instance:
        """The instance, with the QEMU that an earlier container has left, if it lives.

        One that has ended is not this container's end: nothing is known of it but what its lock says.
        """
        directory = self._stand.run_dir.instance(self._id)

        def make() -> Instance:
            # A container begins anew: what an earlier one's QEMU came to is told, and no reason to rest.
            memory = replace(directory.read_memory(self._stand.holder.boot_id), ended=None, held=False)
            return Instance(self._id, around=around, directory=directory, memory=memory, log=log)

        instance, record = make(), directory.read_incarnation()
        if record is not None:
            instance.adopt(record)
            if instance.pid is None:
                log.info("single.leftover_buried", instance=self._id, pid=record.pid, epoch=record.epoch)
                directory.drop_incarnation()
                instance = make()
        return instance

    async def _run(self, store: Store, equipment: Equipment) -> Instance:
        around = self._around = self._surroundings(store, equipment)
        directory = self._stand.run_dir.instance(self._id)
        instance = self._instance = self._begin(around)
        self._follow(store, instance)
        end_listening = around.session.listen(instance.notify)
        log.info(
            "single.started",
            version=__version__,
            instance=self._id,
            holder=self._stand.holder.name,
            lock=self._stand.lock_key,
            overrides=sorted(self._overrides),
            run_dir=str(directory.path),
            qemu_user=None if equipment.user is None else equipment.user.name,
        )
        async with asyncio.TaskGroup() as parts:
            serving = [
                start_part(parts, part)
                for part in (
                    around.session.run(),
                    self._links.run(),
                    *(mirror.run() for mirror in self._mirrors),
                    self._member.neighbours.run(),
                    self._member.history.run(),
                    self._member.history.run_speaking(self._may_speak, self._member.speak),
                    self._publish(instance),
                    self._first_look(instance),
                    around.logs.run(),
                )
            ]
            loop = start_part(parts, keep_going(instance, clock=self._clock, on_error=lambda: None))
            impatient = start_part(parts, self._give_up_on_etcd(instance, loop))
            await asyncio.wait([loop])
            if around.session.held:
                await around.publisher.flush()
            for task in (impatient, *serving):
                task.cancel()
        end_listening()
        await instance.detach()
        await withdraw(self._outside.system.network, self._bridge_owner)
        around.logs.close()
        await end_session(around.session)
        return instance

    async def _give_up_on_etcd(self, instance: Instance, loop: asyncio.Task[None]) -> None:
        """Once QEMU is gone and the lock cannot be released, end all the same: the next container takes it."""
        await self._leave.wait()
        while instance.pid is not None:
            await self._clock.sleep(LOOK_S)
        await self._clock.sleep(LET_GO_S)
        log.warning("lock.not_released", instance=self._id, reason="etcd did not do it in time")
        loop.cancel()

    async def _recorded_for(self, client: str) -> InstanceId | None:
        """The instance, other than this one, whose lock has a storage client on record; asked of etcd, for a takeover.

        Raises:
            EtcdError: etcd does not say.
        """
        return await other_of_client(self._around.store, self._settings.layout, client, own=self._stand.lock_key)

    def _surroundings(self, store: Store, equipment: Equipment) -> Surroundings:
        member = self._member = self._stand.join(self._settings, self._outside, store=store, on_hosts=self._notify)
        session = member.session
        return surround(
            member,
            settings=self._settings,
            outside=self._outside,
            equipment=equipment,
            # It ends with its container, which has the cgroup that the operator gave it.
            homes=Nowhere(survives_container=False),
            admission=Admission(1, equipment.memory_mib),
            links=self._links,
            # Counted for nobody: nothing listens.
            metrics=Metrics(
                lambda: Snapshot(etcd_up=session.held, session_remaining_s=session.remaining_s, watch_revision=0),
                host=self._stand.holder.name,
                version=__version__,
            ),
            bridge_owner=self._bridge_owner,
            settle_s=0.0,
            guard=None,
            recorded_for=self._recorded_for,
            # It follows its own keys only: of others it knows what etcd says of a client.
            holders=lambda instance, images: (),
            namesakes=lambda instance, images: (),
            mismatch=None,
            # Its lock is a literal key, which its unit names.
            dissent=lambda: None,
            objection=lambda record: None,
            draining=lambda: False,
            leaving=lambda: self._leaving,
            ended=self._ended,
        )

    # --- keys -------------------------------------------------------------------------------------------------

    def _follow(self, store: Store, instance: Instance) -> None:
        layout = self._stand.holder.layout
        tables = {
            layout.instance_prefix(self._id): self._keys,
            self._stand.lock_key: self._locks,
            layout.placement_key(self._id): self._placements,
        }
        self._mirrors = [
            Mirror(
                store=store,
                clock=self._clock,
                history=self._member.history,
                prefix=prefix,
                table=table,
                on_change=lambda changed, revision: self._tell(instance),
            )
            for prefix, table in tables.items()
        ]

    async def _first_look(self, instance: Instance) -> None:
        for mirror in self._mirrors:
            await mirror.synced.wait()
        self._tell(instance)

    def _tell(self, instance: Instance) -> None:
        """Tell the instance what its keys and its lock are now."""
        wishes, locks, _ = self._mirrors
        listed = all(mirror.synced.is_set() for mirror in self._mirrors)
        if not listed or len({mirror.era for mirror in self._mirrors}) > 1:
            instance.notify()
            return
        anew, self._era = wishes.era != self._era, wishes.era
        entries = self._keys.entries.items()
        placement = self._placements.get(self._stand.holder.layout.placement_key(self._id).encode())
        wish = self._wish_of(
            {key.decode(errors="replace"): (one.value, one.mod_revision) for key, one in entries},
            NOT_PLACED if placement is None else Placed.read(placement.value, placement.mod_revision),
        )
        if anew:
            instance.begin_anew(wish)
            self._around.publisher.begin_anew()
        self._judge(instance, wish, anew=anew)
        lock = self._locks.get(self._stand.lock_key.encode())
        instance.saw_lock(
            data=None if lock is None else lock.value,
            mod_revision=0 if lock is None else lock.mod_revision,
            as_of=locks.revision,
        )
        if self._hurried:
            wish = replace(wish, shutdown_timeout_s=0.0)
        instance.update(wish, held=self._hold is not None, fresh=False, hold=self._hold)
        if wish.power is Power.OFF and self._leaving is None and self._hold is None:
            self._go("`power` is off")

    def _judge(self, instance: Instance, wish: Wish, *, anew: bool) -> None:
        """What would end it is held when it came with another history of etcd, until somebody writes it again."""
        ends = instance.pid is not None and ends_it(wish, self._stand.holder.name)
        former = instance.wish
        if anew and ends and (self._hold is not None or former is None or not ends_it(former, self._stand.holder.name)):
            why = why_held(wish, "what is written since then is heeded, and so is the end of its container")
            self._hold = Hold(order=order_of(wish), why=why, stood={})
            log.error("removal.held", instance=self._id, reason=why)
        elif not ends or (self._hold is not None and order_of(wish) != self._hold.order):
            self._hold = None

    def _notify(self) -> None:
        if self._instance is not None:
            self._instance.notify()

    def _may_speak(self) -> bool:
        """Whether the lock says what runs here, in the history that etcd has now."""
        known = self._era == self._member.history.era and all(mirror.synced.is_set() for mirror in self._mirrors)
        return known and self._around.session.held and self._instance is not None and self._instance.has_spoken

    def _wish_of(self, found: Mapping[str, tuple[bytes, int]], placed: Placed) -> Wish:
        """The wish, of keys by their full names, and of the placement."""
        layout = self._stand.holder.layout
        lock, prefix = self._stand.lock_key, layout.instance_prefix(self._id)
        keys = {
            key.removeprefix(prefix).encode(errors="replace"): RawValue(value, revision)
            for key, (value, revision) in found.items()
            # Beside a lock of its own the usual one is no wish either.
            if key not in {lock, f"{prefix}lock"}
        }
        return single_wish(
            self._id,
            keys,
            overrides=self._overrides,
            host=self._settings.hostname,
            holder=self._stand.holder.name,
            placed=placed,
        )

    def _on_links(self, changed: Set[int]) -> None:
        if self._instance is not None and self._instance.plugs.concern(changed):
            self._instance.notify()

    # --- around -----------------------------------------------------------------------------------------------

    async def _publish(self, instance: Instance) -> None:
        """Learn what the status key holds, then keep it up."""
        written = (await self._around.publisher.learn(self._id)).get(self._id)
        if written is not None:
            instance.report.recall(written)
        await self._around.publisher.run()
