"""`exec -- OPTIONS`: one QEMU with these options, on our standard streams, under a lock where one is given.

What is not said by the options is done as the original image did: device nodes, and the bridge that QEMU's helper may
use. See docs/decisions/0013-single-mode.md.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

import structlog

from kvmsupervisor.adapters import devices, network
from kvmsupervisor.adapters.devices import DeviceTrouble
from kvmsupervisor.adapters.network import NetworkTrouble
from kvmsupervisor.aio import start_part
from kvmsupervisor.config.etcd import etcd_config
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.instance.assembly import REAL, Outside
from kvmsupervisor.machine.host import ceph_access, look_at_bridge
from kvmsupervisor.single.identity import Stand, end_session
from kvmsupervisor.single.lock import Lost, SingleLock
from kvmsupervisor.single.process import Foreground

log = structlog.get_logger(__name__)


def furnish(settings: Settings) -> None:
    """Make what a container lacks: device nodes, and the permission for QEMU's bridge helper.

    What cannot be made is told, and no more: the options may need none of it, and QEMU says what it misses.
    """
    for device in (devices.KVM, devices.TUN):
        try:
            devices.ensure(device)
        except DeviceTrouble as error:
            log.warning("device.missing", reason=str(error))
    if settings.bridge_if is not None:
        look_at_bridge(settings)
        try:
            # Without an owner: nobody here knows what of the options needs it, and until when.
            network.allow_bridges([settings.bridge_if])
        except NetworkTrouble as error:
            log.warning("bridge.not_allowed", reason=str(error))
        if (lack := network.lack_of(settings.bridge_if)) is not None:
            log.warning("bridge.not_allowed", reason=lack)


class SingleCommand:
    """The QEMU of these options.

    Args:
        settings: of this host.
        options: of QEMU, as they are.
        lock_key: under which it runs, with nothing left to be filled in; None for none.
        wait: whether a lock that somebody else holds is waited for.
        outside: the world.
    """

    def __init__(
        self,
        settings: Settings,
        options: Sequence[str],
        *,
        lock_key: str | None,
        wait: bool = True,
        outside: Outside = REAL,
    ) -> None:
        self._settings = settings
        self._outside = outside
        self._lock_key = lock_key
        self._options = tuple(options)
        self._wait = wait
        self._clock = outside.clock
        self._qemu = Foreground(
            program=settings.qemu,
            options=options,
            clock=self._clock,
            shutdown_timeout_s=settings.shutdown_timeout_s,
        )
        self._stop = asyncio.Event()
        self._told = 0
        # Whether the guest runs, or may have run.
        self._may_run = False

    def signalled(self, number: signal.Signals) -> None:
        """Shut the guest down; a second signal ends QEMU without its guest's consent, a third kills it."""
        if self._stop.is_set():
            self._qemu.hurry()
        self._told = self._told or number
        self._stop.set()

    async def run(self) -> int:
        """Run it to its end; return what to exit with: QEMU's status, or 128 and the signal that came before QEMU.

        Raises:
            SpawnFailed: QEMU cannot be started at all.
            Held: somebody else holds the lock, and it is not waited for.
            AlreadyRunning, HostnameTaken: another container of this host does (the latter in an exception group).
        """
        furnish(self._settings)
        if self._lock_key is not None:
            return await self._under_lock(self._lock_key)
        try:
            self._qemu.start({}, paused=False)
            self._may_run = True
            await self._unless_stopped(self._to_its_end())
        finally:
            await self._end()
            await self._qemu.close()
        return self._qemu.status

    async def _under_lock(self, lock_key: str) -> int:
        settings = self._settings
        outside = self._outside
        stand = Stand.of(settings, lock_key, outside)
        async with AsyncExitStack() as stack:
            stand.run_dir.acquire()
            stack.callback(stand.run_dir.release)
            store = outside.connect(etcd_config(settings))
            stack.push_async_callback(store.close)
            wake = asyncio.Event()
            member = stand.join(settings, outside, store=store, on_hosts=wake.set)
            session = member.session
            lock = SingleLock(
                stand=stand,
                member=member,
                clock=self._clock,
                options=self._options,
                fencing=outside.fencing(ceph_access(settings), settings.allow_unfenced),
                processes=outside.system.processes,
                wake=wake,
            )
            async with asyncio.TaskGroup() as parts:
                serving = [start_part(parts, session.run()), start_part(parts, lock.run())]
                try:
                    status = await self._locked(lock)
                finally:
                    for task in serving:
                        task.cancel()
            await end_session(session)
        return status

    async def _locked(self, lock: SingleLock) -> int:
        qemu = self._qemu
        try:
            if not await self._unless_stopped(lock.take(wait=self._wait)):
                return 128 + self._told
            qemu.start(lock.marks.environment(), paused=True)
            try:
                await self._unless_stopped(self._begin(lock))
                guard = asyncio.create_task(self._guard(lock))
                try:
                    await self._unless_stopped(self._to_its_end())
                    await self._end()
                finally:
                    guard.cancel()
                    await asyncio.wait([guard])
            except Lost as error:
                log.error("lock.lost", reason=str(error))  # noqa: TRY400 - no bug, and no traceback
        finally:
            await self._end()
            await lock.let_go()
            await qemu.close()
        return qemu.status

    async def _begin(self, lock: SingleLock) -> None:
        """Let the guest run once it is on record (law 3)."""
        qemu = self._qemu
        if not await qemu.answers():
            return
        await lock.record(pid=qemu.pid, starttime=qemu.starttime)
        self._may_run = True
        if not qemu.wants_to_wait:
            await qemu.go_on()

    async def _guard(self, lock: SingleLock) -> None:
        """Kill it when the lock is read to be another's (law 6)."""
        if not self._may_run:
            return
        try:
            await lock.guard(pid=self._qemu.pid, starttime=self._qemu.starttime)
        except Lost as error:
            log.error("lock.lost", reason=f"{error}: QEMU here is killed")  # noqa: TRY400 - as above
            self._qemu.kill()

    async def _to_its_end(self) -> None:
        """Wait for QEMU's end; be connected meanwhile, so that the power button can be pressed at once."""
        await self._qemu.answers()
        await self._qemu.ended.wait()

    async def _end(self) -> None:
        """See it gone: shut down when its guest may run, otherwise at once."""
        if not self._qemu.started:
            return
        if self._may_run:
            await self._qemu.shut_down()
        else:
            self._qemu.kill()
            await self._qemu.ended.wait()

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do it to its end, unless we are told to stop; False then, and it was cut off."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            return False
        finally:
            for one in (task, stop):
                one.cancel()
                # Not awaited itself: its cancellation is not ours.
                await asyncio.wait([one])
