"""What this host's status keys hold: learnt at the start and after each change of history, then kept up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Never

from kvmsupervisor.aio import start_part
from kvmsupervisor.cluster.informer import Wishes
from kvmsupervisor.cluster.status_writer import StatusWriter
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.instance.worker import Worker


class Statuses:
    """Keeps the status writer in step with what is there already.

    Args:
        status_writer: reads and writes them.
        wishes: the keys of all instances.
        instances: those of this host; a live mapping.
        drops: whether those of instances that are gone are taken away.
    """

    def __init__(
        self, *, status_writer: StatusWriter, wishes: Wishes, instances: Mapping[InstanceId, Worker], drops: bool
    ) -> None:
        self._status_writer = status_writer
        self._wishes = wishes
        self._instances = instances
        self._drops = drops
        self._unread = asyncio.Event()

    def begin_anew(self) -> None:
        """Etcd has another history: what was known of the keys is worth nothing."""
        self._status_writer.begin_anew()
        self._unread.set()

    async def run(self) -> Never:
        """Learn what our status keys hold, take away those of instances that are gone, then keep them up."""
        for name, written in (await self._status_writer.learn()).items():
            if name in self._instances:
                self._instances[name].report.recall(written)
        await self._wishes.wait_synced()
        self._drop()
        async with asyncio.TaskGroup() as tasks:
            start_part(tasks, self._read_again)
            await self._status_writer.run()

    async def _read_again(self) -> Never:
        while True:
            await self._unread.wait()
            self._unread.clear()
            await self._status_writer.learn()
            self._drop()

    def _drop(self) -> None:
        """Take away those of instances that are gone."""
        for name in sorted(self._status_writer.ids() - self._instances.keys()) if self._drops else ():
            if not self._wishes.keys_of(name):
                self._status_writer.forget(name)
