"""Identity of a container in single mode: its holder name, run directory and session. No supervisor shares them.

See docs/decisions/0013-single-mode.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import structlog

from kvmsupervisor.adapters.etcd import EtcdError, Store
from kvmsupervisor.adapters.process import pid_namespace
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.single import holder_of, name_of
from kvmsupervisor.instance.assembly import Holder, Membership, Outside

log = structlog.get_logger(__name__)

LET_GO_S = 10.0
"""How long the lock's release may take once QEMU is gone. Arbitrary: etcd takes milliseconds, and whoever stopped the
container waits. What is not released is a leftover, which the next container takes."""


@frozen(kw_only=True)
class ContainerIdentity:
    """Who one container in single mode is.

    Attributes:
        name: the instance's id; without an instance, the name of the lock.
        holder: the holder of the lock. The lock's key is a literal one.
        run_dir: the container's own run directory.
    """

    name: InstanceId
    holder: Holder
    run_dir: RunDir

    @classmethod
    def of(cls, settings: Settings, lock_key: str, outside: Outside, *, instance: InstanceId | None) -> Self:
        """Who holds `lock_key` on this host, for `instance` if it has one. The key may lie anywhere."""
        name = name_of(lock_key, prefix=settings.prefix)
        # Eight characters, so that the sockets of the longest id fit below the longest KVM_RUN_DIR that is common.
        digest = hashlib.sha256(f"{settings.prefix}\n{lock_key}".encode()).hexdigest()[:8]
        run_dir = RunDir(settings.run_dir / f"_{digest}")
        holder = Holder(
            name=holder_of(settings.hostname, name, pid_namespace=pid_namespace()),
            boot_id=outside.boot_id(),
            machine=outside.machine_id(),
            layout=replace(settings.layout, lock=lock_key),
            run_dir=run_dir.path,
        )
        return cls(name=instance or InstanceId(name), holder=holder, run_dir=run_dir)

    @property
    def lock_key(self) -> str:
        """The key of its lock."""
        return self.holder.layout.lock_key(self.name)

    def join(self, settings: Settings, outside: Outside, *, store: Store, on_hosts: Callable[[], None]) -> Membership:
        """What it is in etcd; see `Membership`."""
        return Membership(
            self.holder,
            settings=settings,
            outside=outside,
            store=store,
            says=self.holder.introduction(outside),
            # Two containers of one name cannot both go on; and one status waits for no others.
            yields=False,
            gather_s=0.0,
            spread_s=0.0,
            on_hosts=on_hosts,
        )


async def end_session(session: Session) -> None:
    """Give the session up; while etcd is away it runs out by itself."""
    if not session.held:
        return
    try:
        await session.end()
    except EtcdError as error:
        log.warning("session.not_ended", key=session.key, error=str(error))
