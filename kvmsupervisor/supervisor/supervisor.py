"""One host's supervisor: its life around the host's parts.

It runs until it is told to stop, and leaves every QEMU running then, for its successor to adopt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from kvmsupervisor import __version__
from kvmsupervisor.adapters import resources
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.config.etcd import etcd_config
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.identity import HostIdentity
from kvmsupervisor.instance.assembly import Outside
from kvmsupervisor.supervisor.drain import DrainMark
from kvmsupervisor.supervisor.host import Host
from kvmsupervisor.supervisor.http import serve
from kvmsupervisor.supervisor.identity import Standing
from kvmsupervisor.supervisor.premises import Premises

log = structlog.get_logger(__name__)


class Supervisor:
    """Takes the run directory, finds out who this host is and what it brings, and runs it.

    Made outside of any event loop; `run` does the rest.

    Args:
        settings: of this host.
        outside: the world.
    """

    def __init__(self, settings: Settings, outside: Outside) -> None:
        self._settings = settings
        self._outside = outside
        self._boot_id = outside.boot_id()
        self._run_dir = RunDir(settings.run_dir)
        self._drain = DrainMark(self._run_dir, boot_id=self._boot_id)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Have `run` return soon. Machines run on."""
        self._stop.set()

    def heed_draining(self) -> None:
        """Look whether this host is to stop all its guests: the mark in the run directory came or went."""
        self._drain.heed()

    async def run(self, on_started: Callable[[Host], None] = lambda host: None) -> bool:
        """Supervise until `stop`.

        Args:
            on_started: called once the run directory is ours, what ran is adopted and HTTP is served.

        Returns:
            Whether another supervisor is to go on in its place: the host's identity has changed.

        Raises:
            AlreadyRunning: another supervisor has the run directory.
            ListenError: `KVM_LISTEN` cannot be listened on.
            Impossible: the cgroups that KVM_CGROUP asks for cannot be had.
            ValueError: KVM cannot be used, or QEMU not run as the user that was named, for want of rights maybe.
            HostnameTaken: another supervisor lives under this host's name; inside an exception group, as it comes
                from one of the parts.
        """
        settings, outside = self._settings, self._outside
        most_files = resources.raise_limit()
        host_facts = outside.gather_host_facts(settings)
        if host_facts.users.uids is not None:
            resources.bound_guests()
        self._run_dir.acquire()
        self.heed_draining()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._run_dir.release)
            # What the settings say is this host's identity, unless what lives in its run directory says otherwise.
            wanted = HostIdentity.of(settings.hostname, settings.layout)
            standing = Standing(outside.system.processes, self._run_dir, wanted=wanted, boot_id=self._boot_id)
            identity, mismatch, records = standing.settle()
            if mismatch is not None:
                log.error("identity.mismatch", reason=str(mismatch), instances=list(mismatch.living))
            store = outside.connect(etcd_config(settings))
            stack.push_async_callback(store.close)
            chosen = await outside.cgroups(settings.cgroup.value, run_dir=settings.run_dir)
            stack.push_async_callback(chosen.cgroups.close)
            host = Host(
                settings,
                outside,
                Premises(
                    run_dir=self._run_dir,
                    boot_id=self._boot_id,
                    standing=standing,
                    identity=identity,
                    mismatch=mismatch,
                    store=store,
                    host_facts=host_facts,
                    cgroups=chosen,
                    drain=self._drain,
                    most_files=most_files,
                ),
            )
            stack.callback(host.close)
            stack.callback(self._drain.listen(host.notify_all))
            adopting = await host.take_over(records)
            stack.push_async_callback(host.consoles.close)
            host.consoles.open()
            url = await serve(host.http_view, settings, stack)
            host.served_at(url)
            log.info(
                "supervisor.started",
                version=__version__,
                host=identity.host,
                etcd=list(settings.etcd_endpoints),
                prefix=identity.prefix,
                run_dir=str(settings.run_dir),
                accelerator=host_facts.accelerator.name,
                why_no_kvm=host_facts.accelerator.fallback,
                qemu_user=host_facts.users.title,
                memory_mib=host_facts.memory_mib,
                homes=chosen.cgroups.name,
                homes_rejected=dict(chosen.rejected),
                url=url,
                adopting=adopting,
            )
            if chosen.warning is not None:
                log.error("homes.lost_with_container", reason=chosen.warning)
            if host_facts.privileged:
                flags = host_facts.host_side.flags
                log.warning(
                    "qemu.privileged", reason="QEMU runs as root: leave KVM_QEMU_USER out", extra_flags=str(flags)
                )
            on_started(host)
            again = await host.run(self._stop)
        log.info("supervisor.stopped")
        return again
