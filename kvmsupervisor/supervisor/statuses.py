"""What this host's status keys hold: learnt at the start and after each change of history, then kept up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Never

from kvmsupervisor.aio import start_part
from kvmsupervisor.cluster.status_writer import StatusWriter
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.instance.worker import Worker
from kvmsupervisor.machine.identity import pid_of
from kvmsupervisor.machine.system import Processes


class Statuses:
    """Keeps the status writer in step with what is there already.

    Args:
        status_writer: reads and writes them.
        wishes: the keys of all instances.
        instances: those of this host; a live mapping.
        concerns: whether an instance is one of them, or will be.
        processes: of this host.
        drops: whether those of instances that are gone are taken away.
    """

    def __init__(
        self,
        *,
        status_writer: StatusWriter,
        wishes: Wishes,
        instances: Mapping[InstanceId, Worker],
        concerns: Callable[[InstanceId], bool],
        processes: Processes,
        drops: bool,
    ) -> None:
        self._status_writer = status_writer
        self._wishes = wishes
        self._instances = instances
        self._concerns = concerns
        self._processes = processes
        self._drops = drops
        self._unread = asyncio.Event()

    def begin_anew(self) -> None:
        """Etcd has another history: what was known of the keys is worth nothing."""
        self._status_writer.begin_anew()
        self._unread.set()

    async def run(self) -> Never:
        """Learn what our status keys hold, take away those of instances that are gone, then keep them up."""
        found = await self._status_writer.learn()
        for name, worker in self._instances.items():
            written = found.get(name)
            if written is not None:
                worker.report.recall(written)
        await self._wishes.wait_synced()
        self._drop(found)
        for name, worker in self._instances.items():
            if name not in found and not self._unread.is_set():
                # Whoever writes the key from now on makes the compare of our first write fail.
                worker.report.key_was_read(None)
            # What happened to it meanwhile could not be told yet.
            worker.notify()
        async with asyncio.TaskGroup() as tasks:
            start_part(tasks, self._read_again)
            await self._status_writer.run()

    async def _read_again(self) -> Never:
        while True:
            await self._unread.wait()
            self._unread.clear()
            self._drop(await self._status_writer.learn())

    def _drop(self, found: Mapping[InstanceId, Status | None]) -> None:
        """Take away those of instances that are gone, and correct what tells of a QEMU that is gone.

        Args:
            found: the statuses, as read: ours, and None for others.
        """
        for name in sorted(self._status_writer.ids() - self._instances.keys()) if self._drops else ():
            if not self._wishes.keys_of(name):
                self._status_writer.forget(name)
                continue
            written = found.get(name)
            if written is not None and not self._concerns(name) and not self._may_live(written):
                last = replace(written, phase=Phase.STOPPED, reason="no QEMU of it runs here any more", pid=None)
                last = replace(last, incarnation=None, run_state=None, held=False, stood=None)
                self._status_writer.leave(name, last)

    def _may_live(self, status: Status) -> bool:
        """Whether a status that tells of a QEMU here may be right: a record of it may be in another run directory."""
        if not status.tells_of_a_process:
            return True
        # Without an incarnation its record could not be read: then it may be any QEMU of that instance.
        return pid_of(self._processes, status.id, status.incarnation, pid=None, starttime=None) is not None
