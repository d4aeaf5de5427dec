"""What `run` does once etcd has been asked: all that this imports takes longer than etcd's answer."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# Before all others that import structlog: it keeps rich out.
from kvmsupervisor.config.logs import Rotation, configure

# isort: split
from kvmsupervisor.adapters.cgroup import Impossible
from kvmsupervisor.adapters.etcd import Etcd
from kvmsupervisor.adapters.rundir import DRAIN_SIGNAL, AlreadyRunning
from kvmsupervisor.adapters.web import ListenError
from kvmsupervisor.aio import leaves
from kvmsupervisor.cluster.session import HostnameTaken
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.instance.assembly import REAL
from kvmsupervisor.supervisor.host import Host
from kvmsupervisor.supervisor.supervisor import Supervisor


async def supervise(
    settings: Settings, etcd: Etcd, started: Callable[[], None], *, log_file: Path | None
) -> list[BaseException]:
    """Supervise until a signal says to end; return what was in the way, if anything was.

    Args:
        settings: of this host.
        etcd: its client, which may have been asked for the wishes already.
        started: called once the supervisor has started.
        log_file: of standard error, when that is a file of ours, which has to be kept short.
    """
    log = configure(
        level=settings.log_level,
        format=settings.log_format,
        rotation=None if log_file is None else Rotation(path=log_file),
    )
    refused: list[BaseException] = []
    try:
        await _supervise(settings, etcd, started)
    except* (AlreadyRunning, Impossible, ListenError, HostnameTaken, ValueError, OSError) as group:
        refused = leaves(group)
    finally:
        log.close()
    return refused


async def _supervise(settings: Settings, etcd: Etcd, started: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    supervisor = Supervisor(settings, replace(REAL, connect=lambda config: etcd))
    tell: Callable[[Host], None] = lambda host: started()  # noqa: E731 - two that are told apart by a name
    while True:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, supervisor.stop)
        # Before we lock the run directory: a process that finds our pid in it may signal at once.
        loop.add_signal_handler(DRAIN_SIGNAL, supervisor.heed_draining)
        if not await supervisor.run(tell):
            return
        supervisor = Supervisor(settings, REAL)
        tell = lambda host: None  # noqa: E731 - it has been told
