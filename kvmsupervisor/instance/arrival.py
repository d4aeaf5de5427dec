"""The target's part of a live move before the guest is its own: an offer, what comes, a QEMU that waits for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

from kvmsupervisor.adapters.etcd import Compare, Delete, EtcdError, Put, Target
from kvmsupervisor.adapters.transfer import KEY_BYTES, TransferFailed
from kvmsupervisor.cluster.lock import InstanceLock, SwapFailed
from kvmsupervisor.domain.admission import need_mib
from kvmsupervisor.domain.argv import Identity, Provision, build_argv, host_problems, instance_uuid
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.live import seen_now
from kvmsupervisor.domain.lock import Destination, Lock
from kvmsupervisor.domain.move_checks import Guest, differing, refusals, seen_by_guest
from kvmsupervisor.domain.offer import Offer
from kvmsupervisor.domain.records import Unfit, build, plain
from kvmsupervisor.domain.spec import Spec, Wish, spec_from_object
from kvmsupervisor.domain.transfer import Course, Link
from kvmsupervisor.failpoints import point
from kvmsupervisor.instance.context import InstanceContext, Moving
from kvmsupervisor.instance.new_qemu import launch, must_note, new_record
from kvmsupervisor.instance.shutting_out import admit
from kvmsupervisor.instance.start import Start
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine import boot_media as media
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.migration import MoveRefused
from kvmsupervisor.machine.provisioning import NotReady
from kvmsupervisor.machine.system import Connection, Relay

HEAR_S = 60.0
"""How long the source may take to say what comes."""

WAIT_S = 300.0
"""How long a QEMU waits here before the lock names it: the source does that at once, if ever."""

AGAIN_S = 5.0
"""Pause after this host could not take a guest."""

MEDIA = (media.SEED, media.CONFIG_DRIVE)


class Unwelcome(Exception):
    """The target does not take the guest. The message says why.

    Attributes:
        for_good: whether that stays so, so that it has to be moved cold.
    """

    def __init__(self, reason: str, *, for_good: bool) -> None:
        super().__init__(reason)
        self.for_good = for_good


@frozen(kw_only=True)
class Manifest:
    """What the source says of the guest that comes. Only the two supervisors see it: media may hold secrets.

    Attributes:
        protocol: see `MoveFacts`.
        spec: the machine that was started.
        machine: its versioned machine type.
        accel: `kvm` or `tcg`.
        seen: what of its command line the guest sees.
        clients: addresses of the source that have the disks open.
        restart_request: the value of that key at its start.
        revision: of the wish that it was started from.
        restarts: unasked ones, so far.
        media: its boot media and Ignition file by name, base64.
        history: of etcd, in which it was started; None from an earlier release.
    """

    protocol: int
    spec: Mapping[str, Any]
    machine: str | None
    accel: str
    seen: tuple[str, ...]
    clients: tuple[str, ...]
    restart_request: str | None
    revision: int
    restarts: int
    media: Mapping[str, Any]
    history: str | None = None


class Arrival:
    """A guest that may come to this host, again and again.

    Attributes:
        settle_from: when it went on here, CLOCK_BOOTTIME.
    """

    def __init__(
        self,
        instance: InstanceId,
        *,
        context: InstanceContext,
        machine: Machine,
        lock: InstanceLock,
        start: Start,
        report: Report,
        wake: Callable[[], None],
    ) -> None:
        self.settle_from = 0.0
        self._id = instance
        self._context = context
        self._machine = machine
        self._lock = lock
        self._start = start
        self._report = report
        self._wake = wake
        self._key: bytes | None = None
        # In which history, session and state of the keys the offer was written.
        self._said_in = 0, 0, 0
        self._connection: Connection | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._manifest: Manifest | None = None
        self._relay: Relay | None = None
        self._told = False
        self._again_at = 0.0
        self._trouble: str | None = None
        self._give_up_at = math.inf

    # --- the source's side of the conversation ----------------------------------------------------------------

    def manifest(self) -> Mapping[str, Any]:
        """What the target is told of the guest that runs here."""
        record, moving = self._machine.record, self._context.moving
        assert record is not None
        assert moving is not None
        spec = spec_from_object(record.spec)
        folder = self._machine.directory.path
        files = {name: folder / name for name in (*MEDIA, media.IGNITION)} if spec and spec.has_user_data else {}
        lock = self._lock.view.lock
        seen = seen_by_guest(record.argv, () if spec is None else spec.extra_flags)
        return plain(
            Manifest(
                protocol=moving.facts.protocol,
                spec=record.spec,
                machine=record.machine,
                accel=record.accelerator,
                seen=seen if spec is None else seen_now(seen, spec),
                clients=() if lock is None else lock.addresses,
                restart_request=record.restart_request,
                revision=record.revision,
                history=record.history,
                restarts=self._report.status.restarts,
                media={n: base64.b64encode(p.read_bytes()).decode() for n, p in files.items() if p.exists()},
            )
        )

    # --- what is observed -------------------------------------------------------------------------------------

    def course(self, wish: Wish, lock: Lock | None, moving: Moving) -> Course:
        """What is known of a guest that may come."""
        source = None if lock is None else moving.facts_of(HostName(lock.host))
        if self._key is not None and self._said_in != self._present(wish):
            # It has gone with the session, or is older than the keys that the source sees: it is said again.
            self._key = None
        link = Link.NONE
        if self._relay is not None:
            link = Link.NONE if self._relay.is_over else Link.IN_USE
        elif self._connection is not None and self._connection.is_alive:
            link = Link.OPEN
        return Course(
            cold="",
            receives=source is not None and not moving.only_cold,
            offered=self._key is not None,
            called=self._manifest is not None and link is Link.OPEN and self._machine.record is None,
            told=self._told,
            link=link,
            again_at=self._again_at,
            trouble=self._trouble,
            give_up_at=self._give_up_at,
            why_give_up="the source has not put it on record in time",
        )

    def _present(self, wish: Wish) -> tuple[int, int, int]:
        """The history, the session, and the keys that have the guest come here; an offer of others is worth nothing."""
        ground = 0 if wish.ground is None else wish.ground.revision
        return self._context.era().count, self._context.session.lease, ground

    @property
    def key(self) -> bytes | None:
        """Of the offer that stands; None without one."""
        return self._key

    @property
    def is_open(self) -> bool:
        """Whether a guest is expected here, or its way to here is kept."""
        return self._key is not None or self._connection is not None or self._relay is not None

    # --- the steps --------------------------------------------------------------------------------------------

    async def offer(self, wish: Wish) -> None:
        """Say that this host takes the guest, and where it is to be sent.

        Raises:
            SwapFailed, EtcdError: etcd does not say so.
        """
        key, present = secrets.token_bytes(KEY_BYTES), self._present(wish)
        await self._write(wish, key, None)
        self._key, self._said_in = key, present
        if (status := await self._lock.look()) is not None:
            # Once the guest is here this host's status takes the place of that one.
            self._report.inherit(status)
        self._report.tell("move.offered")

    async def _write(self, wish: Wish, key: bytes, waits: Destination | None) -> None:
        """Write the offer: while `host`, the placement and the lock are those that were seen."""
        context = self._context
        moving, layout, ground = context.moving, context.layout, wish.ground
        assert moving is not None
        assert ground is not None
        offer = Offer(
            host=context.me, boot_id=context.boot_id, address=moving.facts.address, key=key.hex(), waits=waits
        )
        compared = [
            context.session.compare(),
            Compare(layout.wish_key(self._id, "host"), Target.MOD_REVISION, ground.host_revision),
            Compare(layout.placement_key(self._id), Target.MOD_REVISION, ground.placement_revision),
            Compare(layout.lock_key(self._id), Target.MOD_REVISION, self._lock.view.mod_revision),
        ]
        put = Put(layout.offer_key(self._id), offer.to_json(), context.session.lease)
        if not (await context.store.txn(compared, [put])).succeeded:
            raise SwapFailed("a session, the key `host`, the placement or the lock changed meanwhile")

    def called(self, connection: Connection) -> None:
        """The source has called. A new call ends an older one, unless a QEMU waits already."""
        if self._machine.record is not None or self._hearing is not None:
            connection.close()
            return
        self._hang_up()
        self._connection = connection
        self._hearing = asyncio.get_running_loop().create_task(self._hear(connection))

    async def _hear(self, connection: Connection) -> None:
        try:
            told = await connection.receive(timeout_s=HEAR_S)
            self._manifest = build(Manifest, told)
        except (TransferFailed, Unfit) as error:
            self._trouble = f"what the source says cannot be read: {error}"
            self._hang_up()
        finally:
            self._hearing = None
            self._wake()

    async def receive(self, wish: Wish) -> None:
        """Start a QEMU for what comes, or tell the source why not."""
        manifest, connection, moving = self._manifest, self._connection, self._context.moving
        assert manifest is not None
        assert connection is not None
        assert moving is not None
        self._manifest = None
        try:
            spec = self._judge(manifest)
            await self._spawn(manifest, spec)
        except (Unwelcome, NotReady) as error:
            for_good = isinstance(error, Unwelcome) and error.for_good
            self._trouble = f"it cannot come live: {error}"
            self._again_at = self._context.clock.now() + AGAIN_S
            self._report.tell("move.unwelcome", level="warning", reason=str(error))
            with contextlib.suppress(TransferFailed):
                await connection.send({"refused": str(error), "for_good": for_good}, timeout_s=AGAIN_S)
            self._hang_up()
        else:
            self._trouble = None
            self._give_up_at = self._context.clock.now() + WAIT_S

    def _judge(self, manifest: Manifest) -> Spec:
        context, moving = self._context, self._context.moving
        assert moving is not None
        if not moving.coming.take(self._id):
            raise Unwelcome(f"{context.me} takes others in just now", for_good=False)
        spec = spec_from_object(manifest.spec)
        if spec is None or manifest.protocol != moving.facts.protocol:
            raise Unwelcome(f"{context.me} has a release that does not know such a machine", for_good=True)
        holder = self._lock.view.lock
        there = None if holder is None else moving.facts_of(HostName(holder.host))
        guest = Guest(spec=spec, machine=manifest.machine, accel=manifest.accel)
        if found := refusals(guest, context.me, there, moving.facts):
            raise Unwelcome("; ".join(map(str, found)), for_good=True)
        if problems := host_problems(spec, context.host_side):
            raise Unwelcome("; ".join(map(str, problems)), for_good=True)
        if not context.admission.has_room(self._id, need_mib(spec)):
            raise Unwelcome(f"{context.me} has not {need_mib(spec)} MiB of memory free for it", for_good=False)
        return spec

    async def _spawn(self, manifest: Manifest, spec: Spec) -> None:
        context, directory = self._context, self._machine.directory
        contents = {name: base64.b64decode(str(text)) for name, text in manifest.media.items()}
        ready = await context.provisioner.prepare_arrival(self._id, spec=spec, directory=directory, media=contents)
        incarnation = str(uuid4())
        opened = await context.provisioner.open(
            self._id, incarnation, ready=ready, machine=manifest.machine, directory=directory
        )
        with opened.closing:
            begun = new_record(
                self._id,
                incarnation,
                spec,
                opened,
                context,
                spec=manifest.spec,
                restart_request=manifest.restart_request,
                revision=manifest.revision,
            )
            build_argv = partial(self._argv, spec, manifest.seen)
            self._start.lives(spec, begun.uid)
            begun = replace(begun, incoming=True, history=manifest.history)
            await launch(self._machine, begun, spec, opened, build_argv)
        self._report.tell("move.waits", pid=self._machine.pid)

    def _argv(self, spec: Spec, seen: Sequence[str], provision: Provision) -> tuple[str, ...]:
        identity = Identity(instance=self._id, uuid=instance_uuid(self._context.layout.prefix, self._id))
        argv = build_argv(spec, identity=identity, host=self._context.host_side, provision=provision)
        if (other := differing(seen, seen_by_guest(argv, spec.extra_flags))) is not None:
            raise Unwelcome(str(other), for_good=True)
        return (*argv, "-incoming", "defer")

    async def tell(self, wish: Wish | None) -> None:
        """Put the waiting QEMU's addresses into the offer, have QEMU listen to the connection, and tell the source.

        Raises:
            SwapFailed, EtcdError: etcd does not have it.
            NotFenced: its addresses cannot be found out.
            NotReady: its record cannot be written.
        """
        context, record, lock = self._context, self._machine.record, self._lock.view.lock
        connection, key = self._connection, self._key
        assert wish is not None
        assert record is not None
        assert record.pid is not None
        assert record.starttime is not None
        if connection is None or key is None or lock is None:
            self._hang_up()
            return
        clients = await context.fencing.clients(record, lock.addresses, admit=partial(admit, self._id, context))
        self._lock.vouch(clients)
        await point("clients of the arrival known")
        must_note(self._machine, clients=clients)
        waits = Destination(
            host=context.me,
            boot_id=context.boot_id,
            incarnation=record.incarnation,
            pid=record.pid,
            starttime=record.starttime,
            clients=clients,
            facts=context.layout.facts,
            machine=context.machine or None,
        )
        await self._write(wish, key, waits)
        try:
            await connection.send({"ready": True}, timeout_s=AGAIN_S)
            self._relay, self._connection = connection.carry(self._wake), None
            try:
                await self._machine.migration.receive(self._relay.qemus_end.fileno())
            finally:
                self._relay.qemus_end.close()
        except (TransferFailed, MoveRefused) as error:
            self._trouble = str(error)
            self._hang_up()
        self._told = True

    # --- ends -------------------------------------------------------------------------------------------------

    def ended(self) -> None:
        """The QEMU that waited, or whose guest has come, has ended: the offer that names it is worth nothing."""
        self.end()

    def end(self) -> None:
        """The guest is this host's own, or will not come: forget what was said of it."""
        self._key, self._told, self._give_up_at = None, False, math.inf
        self._hang_up()

    async def withdraw(self) -> None:
        """Take the offer away, as far as etcd is there; it ends with the session otherwise."""
        if self._key is not None:
            self.end()
            await self.take_back()

    async def take_back(self) -> None:
        """Delete this host's offer, as far as etcd is there: the next target may have written its own by now."""
        key = self._context.layout.offer_key(self._id)
        own = Compare(key, Target.LEASE, self._context.session.lease)
        with contextlib.suppress(EtcdError):
            await self._context.store.txn([own], [Delete(key)])

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._relay is not None:
            self._relay.cut()
        self._connection = self._relay = self._manifest = None
        if self._context.moving is not None:
            self._context.moving.coming.give_back(self._id)

    def close(self) -> None:
        """Let go of everything; a QEMU that waits is found by a successor."""
        if self._hearing is not None:
            self._hearing.cancel()
        self._hang_up()
