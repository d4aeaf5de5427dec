"""A machine that runs becomes what its keys want, one step after the other (decision 0042).

What a step may leave behind when it is cut off is on record before it begins: a device that is `coming`, or `going`.
Whoever goes on with it asks QEMU what became of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from kvmsupervisor.adapters.etcd import EtcdError
from kvmsupervisor.adapters.network import NetworkTrouble, Tap
from kvmsupervisor.adapters.qmp import MonitorRefused, MonitorSilent
from kvmsupervisor.cluster.fencing import NotFenced
from kvmsupervisor.cluster.lock import InstanceLock, SwapFailed
from kvmsupervisor.domain import hardware, live
from kvmsupervisor.domain.admission import need_mib
from kvmsupervisor.domain.argv import ceph_of
from kvmsupervisor.domain.hardware import TapFds
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.live import Kind, Step
from kvmsupervisor.domain.lock import Change, Storage
from kvmsupervisor.domain.nics import ELSEWHERE
from kvmsupervisor.domain.spec import Disk, Nic, Spec, Wish, spec_to_object
from kvmsupervisor.domain.storage import images_of, names_of, node_of, storage_of
from kvmsupervisor.failpoints import point
from kvmsupervisor.guard.client import Unguarded
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.new_qemu import must_note
from kvmsupervisor.instance.shutting_out import admit
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine.changes import SILENT_S, Changes
from kvmsupervisor.machine.images import RETRY_S, DiskTrouble
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.provisioning import HOST_RETRY_S, NotReady

Ports = Sequence[tuple[str, int, str]]
"""Of each NIC on a bridge: its tap's name and number, and the bridge."""


class Changing:
    """The changes of one instance's machine.

    Args:
        lives: note that a QEMU of such a machine lives here.
        guarded: put QEMU under guard where it has to be; False while it is not.
    """

    def __init__(
        self,
        instance: InstanceId,
        context: InstanceContext,
        machine: Machine,
        lock: InstanceLock,
        report: Report,
        *,
        lives: Callable[[Spec, int | None], None],
        guarded: Callable[[], Awaitable[bool]],
    ) -> None:
        self._id = instance
        self._context = context
        self._machine = machine
        self._lock = lock
        self._report = report
        self._lives = lives
        self._guarded = guarded

    async def act(self, wish: Wish | None, *, takes: bool) -> None:
        """Do what is due first.

        Args:
            wish: the keys. Of a machine that is to run elsewhere, what has begun is brought to an end, no more.
            takes: see `View.takes`.

        Raises:
            SwapFailed, EtcdError: etcd did not do it.
            NotReady: our own record of it cannot be kept.
        """
        record, now = self._record, self._context.clock.now()
        wanted = None if wish is None or wish.is_elsewhere(self._context.me) else wish.spec
        due = () if wanted is None else self._steps(wanted, takes=takes)
        for device in (*record.coming, *record.going):
            if self._at(device) <= now:
                leaves = any(step.kind is Kind.UNPLUG and step.device == device for step in due)
                await self._held(device, live.key_of(device), self._settle(device, wish, leaves=leaves))
                return
        step = next((step for step in due if self._at(step.device) <= now), None)
        if step is not None:
            assert wanted is not None
            await self._held(step.device, step.key, self._do(step, wish, wanted))

    def _steps(self, wanted: Spec, *, takes: bool = True) -> Sequence[Step]:
        spec = self._machine.spec
        assert spec is not None
        return live.steps(spec, wanted, argv=self._record.argv, takes=takes)

    def _at(self, device: str) -> float:
        attempt = self._changes.attempts.get(device)
        return 0.0 if attempt is None else attempt.at

    async def _held(self, device: str, key: str, step: Awaitable[None]) -> None:
        """Do a step. What keeps it from being done is noted, for people."""
        changes = self._changes
        try:
            await step
        except MonitorSilent:
            changes.wait(device, f"{key}: QEMU has not answered", SILENT_S)
        except MonitorRefused as error:
            changes.wait(device, f"{key}: it is not changed while it runs: {error}")
        except (DiskTrouble, NotReady) as error:
            said = str(error) if str(error).startswith(key) else f"{key}: {error}"
            changes.wait(device, said, error.retry_s)
        except NetworkTrouble as error:
            changes.wait(device, f"{key}: {error}", HOST_RETRY_S)
        except NotFenced as error:
            changes.wait(device, f"{key}: its guest does not get it yet: {error}", RETRY_S)

    async def _do(self, step: Step, wish: Wish | None, wanted: Spec) -> None:
        machine, changes = self._machine, self._changes
        spec = machine.spec
        assert spec is not None
        match step.kind:
            case Kind.UNPLUG:
                await self._unplug(step)
                return
            case Kind.PLUG if step.disk is not None:
                await self._plug_disk(step.disk, wish)
                return
            case Kind.PLUG:
                assert step.nic is not None
                await self._plug_nic(step.nic)
                return
            case Kind.LIMIT:
                assert step.disk is not None
                await changes.limit(step.disk)
                became = live.with_limit(spec, step.disk)
            case Kind.BRIDGE:
                assert step.nic is not None
                await self._other_bridge(step.nic)
                return
            case Kind.LINK:
                assert step.nic is not None
                await changes.set_link(step.nic)
                now = next(nic for nic in spec.all_nics if nic.number == step.nic.number)
                became = live.with_nic(spec, replace(now, down=step.nic.down))
            case Kind.PROCESSORS:
                became = live.with_processors(spec, await changes.give_processors(wanted.cpus))
            case Kind.MEMORY:
                await self._memory(spec, wanted.ram_mib)
                return
        changes.done(step.device)
        self._became(became)
        self._tell_done("instance.changed", key=step.key)
        if any(again.kind is step.kind and again.device == step.device for again in self._steps(wanted)):
            changes.wait(step.device, f"{step.key}: QEMU has not done all of it")

    # --- memory -----------------------------------------------------------------------------------------------

    async def _memory(self, spec: Spec, ram_mib: int) -> None:
        """Have the guest take more memory, or give some back: what it has not taken yet is promised to it."""
        context, changes, became = self._context, self._changes, live.with_memory(spec, ram_mib)
        if ram_mib > spec.ram_mib:
            if not context.admission.has_room(self._id, need_mib(became)):
                said = f"ram: {context.me} has not {need_mib(became)} MiB of memory free for it"
                changes.wait(live.MEMORY, said, HOST_RETRY_S)
                return
            context.admission.promise(self._id, need_mib(became))
        wanted, first = hardware.plugged(became), spec.ram_mib - spec.plugged_mib
        attempt = changes.attempts.get(live.MEMORY)
        is_late = attempt is not None and attempt.asked
        if not is_late:
            changes.wait_for_guest(live.MEMORY, f"ram: its guest is asked to have {ram_mib} MiB")
        has = await changes.ask_for_memory(wanted)
        said = f"ram: its guest has {first + (has >> 20)} of {ram_mib} MiB"
        if has == wanted:
            changes.done(live.MEMORY)
            self._became(became)
            self._tell_done("instance.changed", key=live.MEMORY)
        elif is_late:
            changes.wait(live.MEMORY, f"{said}: it has no driver for more, or does not get rid of what it has")
        else:
            changes.say(live.MEMORY, said)

    # --- what leaves ------------------------------------------------------------------------------------------

    async def _unplug(self, step: Step) -> None:
        record = self._record
        must_note(self._machine, going=(*record.going, step.device))
        await point("going, not asked for")
        name = step.device if step.disk is None else hardware.disk_name(step.disk)
        await self._changes.ask_for(step.device, name)
        self._report.tell("instance.unplugging", device=step.device)

    async def _settle(self, device: str, wish: Wish | None, *, leaves: bool) -> None:
        """Find out what became of a device that is coming or going, and bring that to an end."""
        record, changes, spec = self._record, self._changes, self._machine.spec
        assert spec is not None
        disk, nic = live.disk_of(spec, device), live.nic_of(spec, device)
        if not await changes.has(device):
            if disk is not None:
                await self._closed(disk, wish)
            elif nic is not None:
                await changes.close_nic(nic)
                await self._without(nic)
            else:
                must_note(self._machine, **_no_more(record, device))
            changes.done(device)
            if device in record.going:
                self._tell_done("instance.unplugged", device=device)
            return
        if device in record.coming:
            # It was given, and only the word of it is missing.
            must_note(self._machine, **_no_more(record, device))
            changes.done(device)
            return
        attempt = changes.attempts.get(device)
        if not leaves:
            # Its key is there again. What the guest was asked for it may still do: that is noticed then.
            changes.wait(device, None)
        elif attempt is None or not attempt.asked:
            name = device if disk is None else hardware.disk_name(disk)
            await changes.ask_for(device, name)
        else:
            key = live.key_of(device)
            changes.wait(
                device,
                f"{key}: its guest was asked to let go of {device} and has not: it has no driver for that, or uses it; "
                "it is taken away once it does, or at the next start",
            )

    async def _closed(self, disk: Disk, wish: Wish | None) -> None:
        """Have QEMU close a disk that its guest does not have, and the lock say so."""
        record, spec, changes = self._record, self._machine.spec, self._changes
        assert spec is not None
        image = None if disk.rbd is None or disk.rbd.ro else disk.rbd
        known = set(record.clients)
        before = set() if image is None else known.intersection(await self._watchers(disk))
        await changes.close_disk(disk)
        await point("closed, still on record")
        # Whoever closes an image has ceased to watch it. One of which that is not known stays on record.
        gone = before.difference(await self._watchers(disk)) if before else set()
        became = live.without_disk(spec, disk.number)
        clients = tuple(one for one in record.clients if one not in gone)
        more = {**_no_more(record, node_of(disk)), "clients": clients, "storage": storage_of(became)}
        if record.storage is Storage.UNFENCEABLE and more["storage"] is not Storage.UNFENCEABLE:
            await self._be_forgotten(record.incarnation)
        self._became(became, **more)
        if not disk.ro:
            await self._write_lock(wish)

    async def _watchers(self, disk: Disk) -> tuple[str, ...]:
        """Who has an image open; everybody, as it were, where Ceph does not say."""
        assert disk.rbd is not None
        try:
            return await self._context.fencing.watchers([disk.rbd])
        except NotFenced:
            return self._record.clients

    # --- disks that come --------------------------------------------------------------------------------------

    async def _plug_disk(self, disk: Disk, wish: Wish | None) -> None:
        """Give the guest a disk: its client is on record before it sees the disk (law 3)."""
        machine, changes = self._machine, self._changes
        spec, record = machine.spec, self._record
        assert spec is not None
        alone = live.only_disk(spec, disk)
        self._give_way(disk, alone)
        async with self._opened(disk, alone) as fd:
            became = live.with_disk(spec, disk)
            stronger = storage_of(became)
            self._became(became, coming=(*record.coming, node_of(disk)), storage=stronger)
            await point("coming, not open")
            try:
                await self._be_guarded(stronger)
                await changes.open_disk(disk, self._ceph(record), fd)
                await point("open, not on record")
                if not disk.ro:
                    await self._record_client(disk, alone, wish)
                await point("on record, not given")
                await changes.give_disk(disk, became)
            except (MonitorRefused, NotFenced, NotReady, SwapFailed, EtcdError):
                # Nothing was given. Where QEMU does not answer, it is asked later what became of it.
                await self._closed_again(disk, wish)
                raise
        must_note(machine, **_no_more(self._record, node_of(disk)))
        changes.done(node_of(disk))
        machine.growth.look(machine.spec, 0.0)
        self._tell_done("instance.plugged", device=node_of(disk), disk=disk.name)

    async def _be_guarded(self, storage: Storage) -> None:
        """Raise NotReady where the guard is to watch a QEMU with such disks, and does not (law 7)."""
        if storage is Storage.UNFENCEABLE and not await self._guarded():
            raise NotReady("no guard watches it yet, which is to do so with such a disk", HOST_RETRY_S)

    async def _be_forgotten(self, incarnation: str) -> None:
        """Raise NotReady where the guard goes on watching a QEMU that can be fenced by now."""
        if (guard := self._context.guard) is not None:
            try:
                await guard.forget(incarnation)
            except Unguarded as error:
                raise NotReady(str(error), HOST_RETRY_S) from error

    def _give_way(self, disk: Disk, alone: Spec) -> None:
        """Raise DiskTrouble where another instance with a lock names it and goes first: two must not try for ever."""
        names = () if disk.ro else names_of(alone)
        other = min(self._context.holders(self._id, names), default=None)
        if other is not None and other < self._id:
            raise DiskTrouble(
                f"{disk.key}: {disk.name} is named by the keys of {other}, too, which goes first", RETRY_S
            )

    @asynccontextmanager
    async def _opened(self, disk: Disk, alone: Spec) -> AsyncIterator[int | None]:
        """Make a disk where it is to be made; a descriptor of it where it is a file."""
        context, status = self._context, self._report.status
        fds, remarks = await context.provisioner.disk(self._id, alone, files=status.files or {}, images=status.images)
        if remarks:
            self._report.tell("instance.notice", level="warning", reason="; ".join(remarks))
        with contextlib.ExitStack() as closing:
            for fd in fds:
                closing.callback(os.close, fd)
            yield fds[0] if fds else None

    async def _record_client(self, disk: Disk, alone: Spec, wish: Wish | None) -> None:
        record, context = self._record, self._context
        clients: tuple[str, ...] = ()
        if disk.rbd is not None:
            one = replace(record, spec=spec_to_object(alone), storage=Storage.RBD)
            lock = self._lock.view.lock
            known = (*(() if lock is None else lock.fence), *record.clients)
            clients = await context.fencing.clients(one, known, admit=partial(admit, self._id, context))
            self._lock.vouch(clients)
        must_note(self._machine, clients=tuple(dict.fromkeys((*record.clients, *clients))))
        await self._write_lock(wish)

    async def _write_lock(self, wish: Wish | None) -> None:
        """Have the lock say which clients QEMU has, which images, and what it may write to.

        Raises:
            SwapFailed, EtcdError: it does not.
        """
        record, lock, spec = self._record, self._lock.view.lock, self._machine.spec
        assert lock is not None
        assert spec is not None
        assert record.pid is not None
        assert record.starttime is not None
        names = tuple(image.name for image in images_of(spec))
        now = lock.recorded(pid=record.pid, starttime=record.starttime, clients=record.clients, images=names)
        now = replace(now, storage=record.storage)
        if now != lock:
            await self._lock.write(Change.RECORD, now, None if wish is None else wish.ground)

    async def _closed_again(self, disk: Disk, wish: Wish | None) -> None:
        """Take back what was begun; where that fails it is done later, as it is on record."""
        with contextlib.suppress(MonitorSilent, MonitorRefused, NotReady, SwapFailed, EtcdError):
            await self._closed(disk, wish)

    def _ceph(self, record: Incarnation) -> hardware.Ceph:
        return ceph_of(self._context.host_side, self._id, 0 if live.has_ceph_key(record.argv) else None)

    # --- NICs -------------------------------------------------------------------------------------------------

    async def _plug_nic(self, nic: Nic) -> None:
        machine, spec, record = self._machine, self._machine.spec, self._record
        assert spec is not None
        provisioner, system = self._context.provisioner, self._context.system
        alone = Spec(ram_mib=spec.ram_mib, nics=(nic,))
        async with contextlib.AsyncExitStack() as closing:
            taps: list[Tap] = []
            async for tap in provisioner.taps(alone):
                closing.callback(tap.close)
                taps.append(tap)
            (tap,), (bridge,) = taps, provisioner.bridges(alone)
            name = system.network.tap_name(tap.fd)
            ports = {**self._ports(), nic.number: (name, system.index_of(name) or ELSEWHERE, bridge)}
            coming = (*record.coming, hardware.nic_name(nic))
            self._became(live.with_nic(spec, nic), coming=coming, **_in_order(live.with_nic(spec, nic), ports))
            await point("NIC coming")
            try:
                await self._changes.give_nic(nic, TapFds(fd=tap.fd, vhost_fd=tap.vhost_fd))
            except MonitorRefused:
                await self._changes.close_nic(nic)
                await self._without(nic)
                raise
        must_note(machine, **_no_more(self._record, hardware.nic_name(nic)))
        self._changes.done(hardware.nic_name(nic))
        self._tell_done("instance.plugged", device=hardware.nic_name(nic), bridge=bridge)

    async def _without(self, nic: Nic) -> None:
        """Its record without a NIC that QEMU does not have."""
        spec, record = self._machine.spec, self._record
        assert spec is not None
        ports, became = self._ports(), live.without_nic(spec, nic.number)
        ports.pop(nic.number, None)
        self._became(became, **_no_more(record, hardware.nic_name(nic)), **_in_order(became, ports))

    async def _other_bridge(self, nic: Nic) -> None:
        """Put a NIC's tap into another bridge. Its guest does not notice."""
        spec, context = self._machine.spec, self._context
        assert spec is not None
        alone = Spec(ram_mib=spec.ram_mib, nics=(replace(nic, number=1),))
        ports = self._ports()
        (bridge,), (name, index, _) = context.provisioner.bridges(alone), ports[nic.number]
        device = hardware.nic_name(nic)
        if (denial := context.system.network.denial_of(bridge)) is not None:
            raise NetworkTrouble(denial)
        try:
            await context.links.move(index, bridge)
        except OSError as error:
            raise NetworkTrouble(f"{name} cannot be put into {bridge}: {error.strerror or error}") from error
        ports[nic.number] = (name, index, bridge)
        became = live.with_nic(spec, nic)
        self._changes.done(device)
        self._became(became, **_in_order(became, ports))
        self._tell_done("instance.changed", key=f"{nic.key}bridge")

    def _ports(self) -> dict[int, tuple[str, int, str]]:
        """The taps, by the number of their NIC."""
        spec, record = self._machine.spec, self._record
        assert spec is not None
        found = {}
        for place, (nic, name) in enumerate(zip(spec.bridged_nics, record.taps, strict=False)):
            known = place < len(record.tap_indexes)
            index = record.tap_indexes[place] if known else self._context.system.index_of(name) or ELSEWHERE
            default = nic.bridge or self._context.host_side.bridge_if or ""
            found[nic.number] = (name, index, record.bridges[place] if place < len(record.bridges) else default)
        return found

    # --- what is known ----------------------------------------------------------------------------------------

    @property
    def _changes(self) -> Changes:
        return self._machine.changes

    @property
    def _record(self) -> Incarnation:
        record = self._machine.record
        assert record is not None
        return record

    def _tell_done(self, event: str, **details: Any) -> None:
        self._context.metrics.changed(self._id)
        self._report.tell(event, **details)

    def _became(self, spec: Spec, **more: Any) -> None:
        """Have the record say what the machine is.

        Raises:
            NotReady: it cannot be written.
        """
        spec = replace(spec, pluggable=spec.has_bus)
        self._machine.spec = spec
        must_note(self._machine, spec=spec_to_object(spec), **more)
        self._lives(spec, self._record.uid)


async def cables_before_it_runs(machine: Machine) -> None:
    """Pull out the cables of a QEMU whose guest has not run. One that stays plugged in is pulled out later."""
    spec = machine.spec
    for nic in () if spec is None else spec.all_nics:
        if nic.down:
            try:
                await machine.changes.set_link(nic)
            except (MonitorRefused, MonitorSilent):
                assert machine.spec is not None
                machine.spec = live.with_nic(machine.spec, replace(nic, down=False))
                with contextlib.suppress(OSError):
                    machine.note(spec=spec_to_object(machine.spec))


def _no_more(record: Incarnation, device: str) -> dict[str, tuple[str, ...]]:
    """What a record says of a device that is neither coming nor going any more."""
    return {
        "coming": tuple(one for one in record.coming if one != device),
        "going": tuple(one for one in record.going if one != device),
    }


def _in_order(spec: Spec, ports: dict[int, tuple[str, int, str]]) -> dict[str, Any]:
    """The taps as a record holds them: those of the NICs on a bridge, in their order."""
    of = [ports[nic.number] for nic in spec.bridged_nics if nic.number in ports]
    names = ("taps", "tap_indexes", "bridges")
    return {name: tuple(port[place] for port in of) for place, name in enumerate(names)}
