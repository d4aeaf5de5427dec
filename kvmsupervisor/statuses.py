"""What this host's status keys hold: learnt at the start and after each change of history, then kept up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Never

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import EtcdError, KeyValue, Store
from kvmsupervisor.concurrently import start_part
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.status import Status
from kvmsupervisor.domain.timing import retry_delay
from kvmsupervisor.instance import Instance
from kvmsupervisor.mirror import Wishes
from kvmsupervisor.publisher import Publisher

log = structlog.get_logger(__name__)


class Statuses:
    """Keeps the publisher in step with what is there already.

    Args:
        store: etcd.
        clock: the machine's.
        layout: of the keys.
        me: this host.
        publisher: writes them.
        wishes: the keys of all instances.
        instances: those of this host; a live mapping.
        drops: whether those of instances that are gone are taken away.
        rand: random numbers, 0 ≤ x < 1.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        layout: Layout,
        me: HostName,
        publisher: Publisher,
        wishes: Wishes,
        instances: Mapping[InstanceId, Instance],
        drops: bool,
        rand: Callable[[], float],
    ) -> None:
        self._store = store
        self._clock = clock
        self._prefix = layout.statuses_prefix
        self._me = me
        self._publisher = publisher
        self._wishes = wishes
        self._instances = instances
        self._drops = drops
        self._rand = rand
        self._unread = asyncio.Event()

    def begin_anew(self) -> None:
        """Etcd has another history: what was known of the keys is worth nothing."""
        self._publisher.begin_anew()
        self._unread.set()

    async def run(self) -> Never:
        """Learn what our status keys hold, take away those of instances that are gone, then keep them up."""
        for kv in await self._read():
            instance = self._instances.get(InstanceId(kv.key.decode(errors="replace").rpartition("/")[2]))
            written = None if instance is None else Status.from_json(kv.value)
            if instance is not None and written is not None and written.host == self._me:
                instance.report.recall(written)
        await self._wishes.wait_synced()
        self._drop()
        async with asyncio.TaskGroup() as tasks:
            start_part(tasks, self._read_again())
            await self._publisher.run()

    async def _read_again(self) -> Never:
        while True:
            await self._unread.wait()
            self._unread.clear()
            await self._read()
            self._drop()

    async def _read(self) -> Sequence[KeyValue]:
        failures = 0
        while True:
            try:
                listing = await self._store.list(self._prefix)
            except EtcdError as error:
                failures += 1
                log.warning("statuses.unread", reason=str(error))
                await self._clock.sleep(retry_delay(failures, self._rand()))
            else:
                self._publisher.prime(listing.kvs)
                return listing.kvs

    def _drop(self) -> None:
        """Take away those of instances that are gone."""
        for name in self._publisher.ids() - self._instances.keys() if self._drops else ():
            if not self._wishes.keys_of(name):
                self._publisher.forget(name)
