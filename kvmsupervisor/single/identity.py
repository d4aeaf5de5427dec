"""Who a container in single mode is: its name, its folder, and its session, none of which a supervisor shares.

See docs/decisions/0013-single-mode.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import structlog

from kvmsupervisor import __version__
from kvmsupervisor.adapters.clock import Clock, boot_id, machine_id
from kvmsupervisor.adapters.etcd import EtcdError, Store
from kvmsupervisor.adapters.process import pid_namespace
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.cluster.history import History
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.single import holder_of, name_of

log = structlog.get_logger(__name__)

LET_GO_S = 10.0
"""How long the lock's release may take once QEMU is gone. Arbitrary: etcd takes milliseconds, and whoever stopped the
container waits. What is not released is a leftover, which the next container takes."""


@frozen(kw_only=True)
class Stand:
    """One container in single mode.

    Attributes:
        name: of the instance, or of the lock.
        holder: as whom it holds the lock.
        boot_id: of this boot.
        layout: of the keys; its lock is a literal key.
        run_dir: its own.
    """

    name: InstanceId
    holder: HostName
    boot_id: str
    layout: Layout
    run_dir: RunDir

    @classmethod
    def of(cls, settings: Settings, lock_key: str) -> Stand:
        """Who holds `lock_key` on this host."""
        name = name_of(lock_key, prefix=settings.prefix)
        # Eight characters, so that the sockets of the longest id fit below the longest KVM_RUN_DIR that is common.
        digest = hashlib.sha256(f"{settings.prefix}\n{lock_key}".encode()).hexdigest()[:8]
        return cls(
            name=InstanceId(name),
            holder=holder_of(settings.hostname, name, pid_namespace=pid_namespace()),
            boot_id=boot_id(),
            layout=replace(settings.layout, lock=lock_key),
            run_dir=RunDir(settings.run_dir / f"_{digest}"),
        )

    def history(self, *, store: Store, clock: Clock, patience_s: float) -> History:
        """The history of etcd that it acts on; see `History`."""
        return History(
            store=store,
            clock=clock,
            layout=self.layout,
            me=self.holder,
            run_dir=self.run_dir.path,
            patience_s=patience_s,
        )

    def session(self, *, store: Store, clock: Clock, ttl_s: int) -> Session:
        """The session under the holder's name."""
        value = HostSession(
            host=self.holder,
            version=__version__,
            url="",
            boot_id=self.boot_id,
            machine=machine_id(),
            started=clock.wall(),
        )
        return Session(
            store=store, clock=clock, layout=self.layout, value=value, run_dir=self.run_dir.path, ttl_s=ttl_s
        )


async def end_session(session: Session) -> None:
    """Give the session up; while etcd is away it runs out by itself."""
    if not session.held:
        return
    try:
        await session.end()
    except EtcdError as error:
        log.warning("session.not_ended", key=session.key, error=str(error))
