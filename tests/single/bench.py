"""One container in single mode in virtual time: real loop, lock, session and machine; fake etcd, storage and QEMU."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvmsupervisor.adapters.etcd import Compare, Op
from kvmsupervisor.adapters.process import pid_namespace
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.single import holder_of
from kvmsupervisor.domain.status import Status
from kvmsupervisor.instance.assembly import Outside
from kvmsupervisor.single.command import SingleCommand
from kvmsupervisor.single.instance import Single
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemu, FakeQemus
from tests.fakes.storage import FakeDisks, FakeStorage
from tests.support.host import LAYOUT, LockStore
from tests.support.outside import outside

KEY, STATUS_KEY = "/kvm/1/lock", "/kvmsupervisor/instances/1"
ME = holder_of(HostName("a"), "1", pid_namespace=pid_namespace())


class OneLock(LockStore):
    """Only what writes the lock counts: session and statuses are written as ever."""

    def begin_txn(self, compare: Sequence[Compare], success: Sequence[Op]) -> None:
        if any(op.key == KEY for op in success):
            super().begin_txn(compare, success)


class Bench:
    """Containers of the host `a`, one after the other; `options` and `instance` begin one, `ends` tells its end."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.etcd = FakeEtcd(self.clock.now)
        self.qemus = FakeQemus(self.clock)
        self.storage = FakeStorage()
        self.stores = [OneLock(self.etcd)]
        self.path = Path(tempfile.mkdtemp(prefix="kvs"))
        self.more: dict[str, str] = {}
        self.container: SingleCommand | Single
        self._task: asyncio.Task[int] | None = None

    @property
    def store(self) -> OneLock:
        """The client of etcd that the present container has, or the next one will have."""
        return self.stores[-1]

    @property
    def outside(self) -> Outside:
        """The world."""
        return outside(self.qemus, lambda: self.store, fencing=self.storage, disks=FakeDisks())

    def settings(self) -> Settings:
        """Of the host."""
        environ = {
            "ETCD_ENDPOINTS": "http://127.0.0.1:1",
            "KVM_HOSTNAME": "a",
            "KVM_RUN_DIR": str(self.path),
            "KVM_ACCEL": "tcg",
        }
        return load_settings(environ | self.more, default_config=self.path / "none.toml")

    async def options(
        self, *options: str, lock_key: str | None = KEY, wait: bool = True, virtual_s: float = 5.0
    ) -> None:
        """Begin a container with QEMU's own options."""
        self.container = SingleCommand(self.settings(), options, self.outside, lock_key=lock_key, wait=wait)
        await self._begin(virtual_s)

    async def instance(self, *, virtual_s: float = 5.0, lock_key: str = KEY, **overrides: str) -> None:
        """Begin a container of the instance `1`, from its keys."""
        self.container = Single(self.settings(), InstanceId("1"), self.outside, lock_key=lock_key, overrides=overrides)
        await self._begin(virtual_s)

    async def _begin(self, virtual_s: float) -> None:
        self._task = asyncio.create_task(self.container.run())
        await self.clock.advance(virtual_s)

    def told(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal."""
        self.container.signalled(number)

    @property
    def ended(self) -> bool:
        """Whether the container has."""
        return self._task is None or self._task.done()

    async def ends(self, limit_s: float = 60.0) -> int:
        """Wait for its end; return its exit status, or raise what it raises."""
        task = self._task
        assert task is not None
        await self.clock.advance_until(task.done, limit_s)
        self._task = None
        self.stores.append(OneLock(self.etcd))
        return await task

    async def crash(self) -> None:
        """The container is gone; its QEMU is not."""
        task, self._task = self._task, None
        if task is not None:
            self.stores.append(OneLock(self.etcd))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            # Its connections are gone with it.
            for qemu in self.qemus.alive:
                qemu.forsake()

    async def close(self) -> None:
        """End what is left."""
        await self.crash()
        shutil.rmtree(self.path)

    def keys(self, **keys: str) -> None:
        """What people write."""
        for name, value in keys.items():
            self.etcd.write(f"/kvm/1/{name}", value)

    def there(self, host: str) -> None:
        """Another host has a session."""
        self.etcd.write(LAYOUT.session_key(HostName(host)), "{}")

    @property
    def qemu(self) -> FakeQemu:
        """The only one that lives."""
        (one,) = self.qemus.alive
        return one

    @property
    def lock(self) -> Lock | None:
        """As etcd has it."""
        data = self.etcd.data.get(KEY)
        return None if data is None else Lock.from_json(data)

    @property
    def status(self) -> Status | None:
        """Likewise."""
        data = self.etcd.data.get(STATUS_KEY)
        return None if data is None else Status.from_json(data)
