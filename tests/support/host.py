"""One host's worker in virtual time: real machine, lock, informer and status writer; fake etcd and QEMU."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import structlog

from kvmsupervisor.adapters.apart import NO_WALLS
from kvmsupervisor.adapters.cgroup import NoCgroups
from kvmsupervisor.adapters.etcd import Compare, EtcdError, Op, Put, Target, Unavailable
from kvmsupervisor.adapters.event_files import EventFiles
from kvmsupervisor.adapters.links import Links
from kvmsupervisor.adapters.machines import MachineTypes
from kvmsupervisor.adapters.metrics import Metrics, Snapshot
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.adapters.users import QemuUsers
from kvmsupervisor.cluster.history import History
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.cluster.status_writer import StatusWriter
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.argv import HostSide
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.nics import Link
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.guard.client import GuardClient
from kvmsupervisor.instance.context import HostsLife, InstanceContext
from kvmsupervisor.instance.sharing import Namesakes
from kvmsupervisor.instance.worker import Worker
from kvmsupervisor.machine.cdrom import Media
from kvmsupervisor.machine.guest_logs import GuestLogs
from kvmsupervisor.machine.handover import HostFiles
from kvmsupervisor.machine.provisioning import Provisioner
from kvmsupervisor.machine.spawn import BEHIND
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd
from tests.fakes.guard import FakeGuard
from tests.fakes.images import Stock
from tests.fakes.qemu import FakeQemu, FakeQemus
from tests.fakes.snapshots import FakeSnapshots
from tests.fakes.storage import FakeDisks, FakeStorage, local_disks

ONE = InstanceId("1")
LAYOUT = Layout()
SETTLE_S = 0.25


class FakeSession:
    """Held or not, by the test's word; its key in etcd is another matter."""

    def __init__(self, etcd: FakeEtcd, host: str) -> None:
        self.key = LAYOUT.session_key(HostName(host))
        etcd.write(self.key, "{}")
        self._revision = etcd.revision
        self.held = True
        self.lease = 1
        self._listeners: list[Callable[[], None]] = []

    def compare(self) -> Compare:
        return Compare(self.key, Target.CREATE_REVISION, self._revision)

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def turn(self, held: bool) -> None:
        self.held = held
        for listener in tuple(self._listeners):
            listener()


class KnownTypes(MachineTypes):
    """Asks no QEMU."""

    def __init__(self) -> None:
        super().__init__("qemu")
        self._aliases = {"q35": "pc-q35-7.2"}


class FakeLinks(Links):
    """Network interfaces that a test makes up.

    Attributes:
        refuses: what the kernel says to who wants to plug one in; None: it does it, and tells.
        plugged: what was plugged in, in order: the index of the tap, the name of the bridge.
    """

    def __init__(self, on_change: Callable[[Set[int]], None]) -> None:
        super().__init__(on_change)
        self.refuses: OSError | None = None
        self.plugged: list[tuple[int, str]] = []

    def set(self, *links: Link) -> None:
        """These are there now, and no others."""
        before = self.all or {}
        self.all = {link.index: link for link in links}
        self._on_change(before.keys() | self.all.keys())

    async def plug(self, tap: int, bridge: str) -> None:
        await asyncio.sleep(0)
        if self.refuses is not None:
            raise self.refuses
        self.plugged.append((tap, bridge))
        assert self.all is not None
        (master,) = [link.index for link in self.all.values() if link.name == bridge]
        self.set(*(replace(link, master=master) if link.index == tap else link for link in self.all.values()))

    async def move(self, tap: int, bridge: str) -> None:
        await self.plug(tap, bridge)


class LockStore(FakeEtcd):
    """A client whose transactions on locks can be made to fail.

    Attributes:
        before: called before each transaction that writes, with its number (from 0); may interfere.
        faults: by that number: `lost reply`, `lost request` or an error.
        writes_begun: how many such transactions there were.
    """

    def __init__(self, server: FakeEtcd) -> None:
        super().__init__(server=server._server)
        self.before: Callable[[int], None] = lambda number: None
        self.faults: dict[int, str | EtcdError] = {}
        self.writes_begun = 0

    def begin_txn(self, compare: Sequence[Compare], success: Sequence[Op]) -> None:
        if compare:
            number, self.writes_begun = self.writes_begun, self.writes_begun + 1
            self.before(number)
            match self.faults.pop(number, None):
                case "lost reply":
                    self.lose_next_reply()
                case "lost request":
                    self.lose_next_request()
                case EtcdError() as error:
                    self.fail_next(error, "txn")


class Host:
    """A host with one instance's loop, which `begin` starts and `die` ends as SIGKILL would.

    Several hosts share `etcd`, `clock` and `qemus`. Keys and locks are followed by `keys`, which may be cut off alone.
    """

    def __init__(self, etcd: FakeEtcd, clock: FakeClock, qemus: FakeQemus, *, name: str = "a") -> None:
        self.me = HostName(name)
        self.etcd, self.clock, self.qemus = etcd, clock, qemus
        self.boot_id = f"boot-{name}"
        self.path = Path(tempfile.mkdtemp(prefix="kvs"))
        self.run_dir = RunDir(self.path)
        self.store = LockStore(etcd)
        self.keys = etcd.peer()
        self.session = FakeSession(etcd, name)
        self.jitters: list[float] = []
        self.sessions: set[str] | None = {name}
        self.gone_since = 0.0
        self.dissent: str | None = None
        self.side: dict[str, Any] = {}
        self.fencing = FakeStorage()
        self.disks = FakeDisks()
        self.snapshots = FakeSnapshots()
        self.gather_s = 0.0
        self.room_bytes = 1 << 40
        self.local_disks = local_disks(self.path / "_disks", lambda: self.room_bytes)
        self.links = FakeLinks(self._on_links)
        self.guard: FakeGuard | None = None
        self.recorded_for: Callable[[str], InstanceId | None] = lambda client: None
        self.phases: list[Phase] = []
        self.errors: list[BaseException] = []
        self._tasks: list[asyncio.Task[Any]] = []

    # What people do.

    def put(self, **keys: str | bytes) -> None:
        for name, value in keys.items():
            self.etcd.write(LAYOUT.wish_key(ONE, name), value)

    def drop(self, *names: str) -> None:
        self.etcd.erase(*(LAYOUT.wish_key(ONE, name) for name in names))

    def wish(self, **more: str) -> None:
        """A small machine on this host."""
        self.put(host=self.me, ram="64", **more)

    # The supervisor's life.

    def begin(self) -> None:
        """Start a supervisor of this one instance; it adopts what is there."""
        self.history = History(
            store=self.etcd.peer(), clock=self.clock, layout=LAYOUT, me=self.me, run_dir=self.path, patience_s=60.0
        )
        self.wishes = Wishes(
            store=self.keys,
            clock=self.clock,
            layout=LAYOUT,
            history=self.history,
            me=self.me,
            concerns=lambda name: True,
            on_change=self._on_change,
            on_anew=self._on_anew,
            rand=lambda: 0.5,
        )
        self.namesakes = Namesakes(self.wishes, self.me)
        self.context = self._make_context()
        directory = self.run_dir.instance(ONE)
        record = directory.read_incarnation()
        self.instance = Worker(
            ONE,
            context=self.context,
            directory=directory,
            saved=directory.read_state(self.boot_id),
            log=structlog.get_logger(),
        )
        if record is not None:
            self.instance.adopt(record)
        self.end_listening = self.session.listen(self.instance.notify)
        publishing = asyncio.create_task(self._keep_statuses())
        self.loop = asyncio.create_task(self._run())
        self._tasks = [
            self.loop,
            asyncio.create_task(self.wishes.run()),
            publishing,
            asyncio.create_task(self._first_look()),
        ]

    async def _run(self) -> None:
        await self.instance.run()

    async def _keep_statuses(self) -> None:
        """As `supervisor.statuses`: what an earlier supervisor said is learnt before anything is written over it."""
        written = (await self.context.status_writer.learn()).get(ONE)
        if written is not None:
            self.instance.report.recall(written)
        self.instance.notify()
        await self.context.status_writer.run()

    async def _first_look(self) -> None:
        await self.wishes.wait_synced()
        self._tell(fresh=False)

    def _on_change(self, changed: Set[InstanceId], revision: int) -> None:
        if self.namesakes.heard(changed):
            self.instance.notify()
        if self.wishes.synced:
            self._tell(fresh=True)

    def _on_anew(self) -> None:
        self.instance.begin_anew(parse_wish(ONE, self.wishes.keys_of(ONE)))
        self.context.status_writer.begin_anew()
        self.namesakes.heard_anew()
        self._on_change(set(), 0)
        self.history.applied(self.wishes.era)

    def _tell(self, *, fresh: bool) -> None:
        lock = self.wishes.lock_of(ONE)
        self.instance.saw_lock(
            data=None if lock is None else lock.value,
            mod_revision=0 if lock is None else lock.mod_revision,
            as_of=self.wishes.locks_revision,
        )
        wish = parse_wish(ONE, self.wishes.keys_of(ONE), self.wishes.placed(ONE))
        self.instance.update(wish, held=False, fresh=fresh)

    def _on_links(self, changed: Set[int]) -> None:
        if not self.dead and self.instance.plugs.concern(changed):
            self.instance.notify()

    async def die(self) -> None:
        """End the supervisor between two steps; its QEMU goes on."""
        self.end_listening()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self.instance.detach()
        failed = [one for one in results if isinstance(one, Exception)]
        if failed:
            raise failed[0]

    @property
    def dead(self) -> bool:
        """Whether no supervisor lives here."""
        return not self._tasks

    async def close(self) -> None:
        if not self.dead:
            await self.die()
        if hasattr(self, "context"):  # otherwise it never began
            self.context.event_files.close()
            self.context.logs.close()  # its thread writes below the path
        shutil.rmtree(self.path)

    async def _recorded_for(
        self, clients: Collection[str], *, besides: InstanceId, proven: bool = False, everywhere: bool = True
    ) -> Mapping[str, InstanceId]:
        found = {client: self.recorded_for(client) for client in clients}
        return {client: other for client, other in found.items() if other not in {None, besides}}

    @cached_property
    def event_files(self) -> EventFiles:
        """What happened here, in files that outlive each supervisor."""
        return EventFiles(self.path / "_state" / "_events")

    def _make_context(self) -> InstanceContext:
        session = cast("Session", self.session)
        host_side = HostSide(qemu="qemu", accel="tcg", **self.side)
        contents = Stock(self.path).contents
        media = Media(self.local_disks, contents)
        return InstanceContext(
            me=self.me,
            boot_id=self.boot_id,
            machine=f"machine-{self.me}",
            layout=LAYOUT,
            store=self.store,
            session=session,
            status_writer=StatusWriter(
                store=self.etcd.peer(),
                clock=self.clock,
                layout=LAYOUT,
                host=self.me,
                session=session,
                gather_s=self.gather_s,
                rand=lambda: 0.5,
            ),
            admission=Admission(4),
            system=self.qemus.system,
            provisioner=Provisioner(
                system=self.qemus.system,
                host=host_side,
                files=HostFiles(state_dir=self.path / "_state", bridge_owner=LAYOUT.session_key(self.me)),
                users=QemuUsers(),
                walls=NO_WALLS,
                types=KnownTypes(),
                cgroups=NoCgroups(survives_container=True),
                disks=self.disks,
                local_disks=self.local_disks,
                contents=contents,
                media=media,
            ),
            disks=self.disks,
            local_disks=self.local_disks,
            contents=contents,
            snapshots=self.snapshots,
            media=media,
            logs=GuestLogs(clock=self.clock),
            event_files=self.event_files,
            links=self.links,
            clock=self.clock,
            jitter=lambda: self.jitters.pop(0) if self.jitters else 0.5,
            metrics=Metrics(
                lambda: Snapshot(etcd_up=True, session_remaining_s=1, watch_revision=1), host=self.me, version="0"
            ),
            fencing=self.fencing,
            host_has_session=lambda host: None if self.sessions is None else host in self.sessions,
            host_gone_since=lambda host: self.gone_since,
            host_drains=lambda host: False,
            sessions=lambda: self.sessions or (),
            host_side=host_side,
            shutdown_timeout_s=120.0,
            start_timeout_s=60.0,
            settle_s=SETTLE_S,
            moving=None,
            era=lambda: self.history.present,
            recorded_for=self._recorded_for,
            holders=self.namesakes.holders,
            namesakes=self.namesakes.of,
            mismatch=None,
            dissent=lambda: self.dissent,
            objection=lambda record: None,
            draining=lambda: False,
            life=HostsLife(),
            launch=BEHIND,
            takeover_wait_s=60.0,
            guard=cast("GuardClient | None", self.guard),
        )

    # What is seen.

    @property
    def lock(self) -> Lock | None:
        data = self.etcd.data.get(LAYOUT.lock_key(ONE))
        return None if data is None else Lock.from_json(data)

    @property
    def status(self) -> Status:
        """As this supervisor has it."""
        return self.instance.report.status

    @property
    def published(self) -> Status | None:
        """As the key has it."""
        data = self.etcd.data.get(LAYOUT.status_key(ONE))
        return None if data is None else Status.from_json(data)

    @property
    def gone(self) -> bool:
        """Whether the loop has ended: nothing of the instance is this host's any more."""
        return self.loop.done() and self.loop.exception() is None

    @property
    def running(self) -> FakeQemu | None:
        """The QEMU whose guest runs, if this supervisor says so too."""
        running = [qemu for qemu in self.qemus.running if qemu.pid == self.instance.pid]
        return running[0] if running and self.status.phase is Phase.RUNNING else None

    async def until(self, true: Callable[[], object], limit_s: float = 30.0) -> None:
        """Let virtual time pass until it is so."""
        await self.clock.advance_until(true, limit_s)

    async def told(self) -> None:
        """Let the status writer write what there is to tell."""
        await self.clock.advance(1.0)

    async def runs(self, limit_s: float = 30.0) -> FakeQemu:
        """Let virtual time pass until the guest runs."""
        await self.until(lambda: self.running, limit_s)
        assert self.running is not None
        return self.running

    def is_on_record(self, qemu: FakeQemu) -> bool:
        """Law 3: whether the lock names this very process, and says that its guest may run."""
        lock = self.lock
        if lock is None or lock.state not in {LockState.RUNNING, LockState.GIVEN}:
            return False
        named = (lock.incarnation, lock.pid, lock.starttime)
        return named == (qemu.environment["KVMSUPERVISOR_INCARNATION"], qemu.pid, qemu.starttime)


def as_written(etcd: FakeEtcd, key: str) -> list[dict[str, Any]]:
    """Every JSON value that a client wrote into `key`, in order."""
    return [json.loads(op.value) for op in etcd.writes if isinstance(op, Put) and op.key == key]


__all__ = ["LAYOUT", "ONE", "SETTLE_S", "Host", "LockStore", "Unavailable", "as_written", "settle"]
