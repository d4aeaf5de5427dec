"""`exec -- OPTIONS`: one QEMU with these options, on our standard streams, under a lock where one is given.

Under a lock it is an instance like any other, but for its wish, which no key says, and for its QEMU, which has our own
streams. Without one the same decisions are made about the process alone. What is not said by the options is done as the
original image did: device nodes, and the bridge that QEMU's helper may use. See docs/decisions/0013-single-mode.md.
"""

from __future__ import annotations

import asyncio
import math
import signal
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Never
from uuid import uuid4

import structlog

from kvmsupervisor.adapters import accelerator, devices, network
from kvmsupervisor.adapters.apart import NO_WALLS
from kvmsupervisor.adapters.devices import DeviceTrouble
from kvmsupervisor.adapters.machines import MachineTypes
from kvmsupervisor.adapters.network import NetworkTrouble
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.adapters.users import QemuUsers
from kvmsupervisor.cluster.fencing import Admit, Fencing, NotFenced
from kvmsupervisor.config.etcd import etcd_config
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.argv import HostSide
from kvmsupervisor.domain.decision import Decision
from kvmsupervisor.domain.grouping import Flat
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Claim, Lock
from kvmsupervisor.domain.removal import Hold
from kvmsupervisor.domain.spec import RbdDisk, RestartPolicy, Spec, Wish, spec_to_object
from kvmsupervisor.domain.storage import storage_of
from kvmsupervisor.domain.view import Action, Process, View
from kvmsupervisor.instance.alone import see_to_its_end
from kvmsupervisor.instance.assembly import Outside
from kvmsupervisor.machine.guest_logs import GuestLogs
from kvmsupervisor.machine.handover import HostFiles
from kvmsupervisor.machine.host import HostFacts, ceph_access, look_at_bridge
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.spawn import Quarters
from kvmsupervisor.machine.system import System
from kvmsupervisor.single.container import Container, Manner
from kvmsupervisor.single.front import in_front
from kvmsupervisor.single.identity import ContainerIdentity
from kvmsupervisor.single.life import ContainersLife, NotHere

log = structlog.get_logger(__name__)

NAMELESS = InstanceId("-")
"""What a QEMU without a lock is called in its record, which nobody else reads."""


def furnish(settings: Settings, system: System) -> None:
    """Make what a container lacks: device nodes, and the permission for QEMU's bridge helper.

    What cannot be made is told, and no more: the options may need none of it, and QEMU says what it misses.
    """
    for device in (devices.KVM, devices.TUN):
        try:
            system.ensure_device(device)
        except DeviceTrouble as error:
            log.warning("device.missing", reason=str(error))
    if settings.bridge_if is not None:
        look_at_bridge(settings)
        try:
            # Without an owner: nobody here knows what of the options needs it, and until when.
            system.network.allow_bridges([settings.bridge_if])
        except NetworkTrouble as error:
            log.warning("bridge.not_allowed", reason=str(error))
        if (lack := network.lack_of(settings.bridge_if)) is not None:
            log.warning("bridge.not_allowed", reason=lack)


class Command:
    """What a command line wants: this one QEMU, here, and nothing else. Implements `container.Desire`."""

    def __init__(self, name: InstanceId, *, holder: HostName, options: Sequence[str]) -> None:
        # What it may write to is told by its options; that is all that its machine is known by.
        spec = Spec(ram_mib=1, extra_flags=tuple(options))
        self._wish = Wish(instance=name, host=holder, spec=spec, keys=1, by_keys=False, restart=RestartPolicy.NEVER)

    @property
    def tables(self) -> Mapping[str, Flat]:
        """No key of etcd says anything of it."""
        return {}

    def wish(self) -> Wish:
        """It is always the same."""
        return self._wish

    def hold(self, wish: Wish, *, former: Wish | None, runs: bool, anew: bool) -> Hold | None:
        """Nothing of etcd can end it but its lock."""
        return None


class UnknownImages:
    """The storage of a QEMU of which nobody knows the images that it opens. Implements `Fencing`."""

    def __init__(self, storage: Fencing) -> None:
        self._storage = storage

    async def clients(
        self,
        record: Incarnation,
        known: Collection[str] = (),
        *,
        new: Collection[str] = (),
        admit: Admit | None = None,
    ) -> tuple[str, ...]:
        """None that are known: so they are never fenced, and a person has to say when it may be taken over (law 7)."""
        return ()

    async def fence(self, addresses: Collection[str]) -> None:
        """Shut out what is on record."""
        await self._storage.fence(addresses)

    async def shut_out(self, addresses: Collection[str]) -> tuple[str, ...]:
        """Those of what is on record that are shut out."""
        return await self._storage.shut_out(addresses)

    async def users(self, images: Collection[RbdDisk]) -> tuple[str, ...]:
        """Of the images that are known: there are none."""
        return ()

    async def watchers(self, images: Collection[RbdDisk], lock: Lock | None = None) -> tuple[str, ...]:
        """Nobody can be asked.

        Raises:
            NotFenced: always.
        """
        raise NotFenced("a QEMU of options alone takes no disks in Ceph from a host that is gone")


class _Unasked(MachineTypes):
    """QEMU is not asked for machine types: its options say which it is."""

    async def versioned(self, machine: str) -> str:
        return machine


class SingleCommand:
    """The QEMU of these options.

    Args:
        settings: of this host.
        options: of QEMU, as they are.
        outside: the world.
        lock_key: under which it runs, with nothing left to be filled in; None for none.
        wait: whether a lock that somebody else holds is waited for.
    """

    def __init__(
        self, settings: Settings, options: Sequence[str], outside: Outside, *, lock_key: str | None, wait: bool
    ) -> None:
        self._settings = settings
        self._options = tuple(options)
        self._outside = outside
        self._lock_key = lock_key
        self._wait = wait
        self._life = ContainersLife(None, self._tell)
        # What was said last, so that nothing is said twice.
        self._said: tuple[str, str] = ("", "")

    def signalled(self, number: signal.Signals) -> None:
        """Shut the guest down; a second signal ends QEMU without its guest's consent, a third kills it."""
        self._life.signalled(number)

    async def run(self) -> int:
        """Run it to its end; return what to exit with: QEMU's status, or 128 and the signal that came before QEMU.

        Raises:
            NotHere: QEMU cannot be started at all, or somebody else holds the lock, and it is not waited for.
            AlreadyRunning, HostnameTaken: another container of this host does (the latter in an exception group).
        """
        furnish(self._settings, self._outside.system)
        with tempfile.TemporaryDirectory(prefix="kvmsupervisor-", ignore_cleanup_errors=True) as folder:
            directory = InstanceDir(Path(folder))
            if self._lock_key is None:
                await self._alone(directory)
            else:
                await self._under_lock(directory, self._lock_key)
        status = self._life.outcome()
        if status is None:
            raise NotHere("QEMU was not started")
        return status

    # --- under a lock -----------------------------------------------------------------------------------------

    async def _under_lock(self, directory: InstanceDir, lock_key: str) -> None:
        settings, outside = self._settings, self._outside
        identity = ContainerIdentity.of(settings, lock_key, outside, instance=None)
        async with AsyncExitStack() as stack:
            identity.run_dir.acquire()
            stack.callback(identity.run_dir.release)
            store = outside.connect(etcd_config(settings))
            stack.push_async_callback(store.close)
            container = Container(
                identity,
                self._life,
                settings=settings,
                outside=replace(
                    outside,
                    machine_types=_Unasked,
                    fencing=lambda access, allow_unfenced: UnknownImages(outside.fencing(access, allow_unfenced)),
                ),
                store=store,
                manner=Manner(
                    desire=Command(identity.name, holder=identity.holder.name, options=self._options),
                    host_facts=_bare(settings),
                    directory=directory,
                    admission=Admission(1),
                    launch=in_front(
                        settings.qemu, self._options, marked_as=identity.run_dir.instance(identity.name).path
                    ),
                    bridge_owner="",
                    # Whoever started it sees what it does, and may stop it.
                    start_timeout_s=math.inf,
                    # Storage cannot be asked, so silence of a host is never long enough.
                    takeover_wait_s=math.inf,
                ),
            )
            await container.run()

    def _tell(self, view: View, decision: Decision) -> None:
        """Say what whoever sits at the terminal has to know; give up where a lock is not to be waited for."""
        if view.process is None:
            if view.leaving is None and view.wish is not None:
                self._tell_wait(view, decision)
        elif decision.action is Action.QUIT and not view.haste:
            log.warning("qemu.forced", reason="its guest did not shut down in time, QEMU is told to end")
        elif decision.action is Action.KILL and view.leaving is None:
            # Whatever kills a QEMU that is wanted was read in its lock.
            self._tell_once("error", "lock.lost", decision.reason)
        elif view.etcd_trouble is not None:
            event = "lock.not_recorded" if view.process.never_ran else "lock.not_reasserted"
            self._tell_once("warning", event, view.etcd_trouble)

    def _tell_wait(self, view: View, decision: Decision) -> None:
        if decision.action is Action.SPAWN:
            return
        self._tell_once("warning" if decision.action is None else "info", "lock.waiting", decision.reason)
        if not self._wait and decision.action is None and _is_elsewhere(view):
            self._life.refuse(decision.reason)

    def _tell_once(self, level: str, event: str, reason: str) -> None:
        if (event, reason) != self._said:
            self._said = event, reason
            getattr(log, level)(event, key=self._lock_key, reason=reason)

    # --- without one ------------------------------------------------------------------------------------------

    async def _alone(self, directory: InstanceDir) -> None:
        settings, clock = self._settings, self._outside.clock
        boot_id, wake = self._outside.boot_id(), asyncio.Event()
        wish = Command(NAMELESS, holder=settings.hostname, options=self._options).wish()
        logs = GuestLogs(clock=clock)
        machine = Machine(
            system=self._outside.system,
            prefix=settings.prefix,
            directory=directory,
            clock=clock,
            notify=wake.set,
            on_reset=lambda: None,
            logs=logs.of(directory),
            log=log,
            launch=in_front(settings.qemu, self._options, marked_as=None),
        )
        self._life.listen(wake.set)

        def view(process: Process) -> View:
            return View(
                now=clock.now(),
                me=settings.hostname,
                facts=settings.facts_prefix,
                boot_id=boot_id,
                wish=wish,
                leaving=self._life.leaving(),
                haste=self._life.haste(),
                # There is no lock, and no etcd to ask for one.
                session_held=False,
                process=process,
                saved=InstanceState(boot_id=boot_id),
                shutdown_timeout_s=settings.shutdown_timeout_s,
            )

        try:
            if not self._life.left.is_set():
                assert wish.spec is not None
                machine.spawn(_record(wish, boot_id, clock.now()), wish.spec, _built, _built, Quarters())
            ended = await see_to_its_end(machine, wake=wake, clock=clock, view=view, decided=self._life.decided)
            if ended is not None and ended.exit is not None:
                self._life.ended(ended.exit, machine.wait_status)
        finally:
            await self._never_left(machine)
            await machine.detach()
            logs.close()

    @staticmethod
    async def _never_left(machine: Machine) -> None:
        """Whatever goes wrong here: a QEMU that nobody watches is not left behind."""
        if machine.pid is not None:
            await machine.kill("its container ends")


def _is_elsewhere(view: View) -> bool:
    """Whether somebody else has it."""
    if view.claim is Claim.STRANGER:
        # Before the sessions are read, a holder that is gone looks like one that lives.
        return view.holder_has_session is not None
    return view.claim in {Claim.UNREADABLE, Claim.NEWER} or view.claimed_by is not None or view.holdover is not None


def _bare(settings: Settings) -> HostFacts:
    """What options need of a host: nothing that is known of them."""
    return HostFacts(
        accelerator=accelerator.Choice(name="tcg"),
        users=QemuUsers(),
        walls=NO_WALLS,
        host_side=HostSide(qemu=settings.qemu, accel="tcg"),
        files=HostFiles(state_dir=settings.state_dir, bridge_owner=""),
        memory_mib=0,
        ceph_access=ceph_access(settings),
    )


def _record(wish: Wish, boot_id: str, now: float) -> Incarnation:
    assert wish.spec is not None
    return Incarnation(
        instance=wish.instance,
        incarnation=str(uuid4()),
        epoch=0,
        boot_id=boot_id,
        argv=(),
        spec=spec_to_object(wish.spec),
        storage=storage_of(wish.spec),
        accelerator="",
        restart_request=None,
        revision=0,
        log_offset=0,
        spawned_at=now,
    )


def _built(_: object) -> Never:
    raise AssertionError("nothing is built for a QEMU with options of its own")
