"""An operator's approval of removals that are held: looked for while removals are held, never otherwise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Set

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import Delete, EtcdError, Store
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.removal import MassRemovalHold

log = structlog.get_logger(__name__)

CONFIRMATION_POLL_S = 2.0
"""How often to look for the operator's approval while removals are held."""


class RemovalApprovals:
    """Heeds `confirm-removal`.

    Args:
        store: etcd.
        clock: the machine's.
        key: of the approval: a JSON list of instance ids.
        guard: knows which removals are held.
        on_freed: called with the instances whose removal was confirmed.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        key: str,
        guard: MassRemovalHold,
        on_freed: Callable[[Set[InstanceId]], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._key = key
        self._guard = guard
        self._on_freed = on_freed
        self._begun = asyncio.Event()

    def look(self) -> None:
        """A removal is held: look for an approval from now on."""
        self._begun.set()

    async def run(self) -> None:
        """Look for an approval while a removal is held, until cancelled."""
        while True:
            await self._begun.wait()
            # An earlier approval is not about this removal.
            stale = True
            while self._guard.held:
                try:
                    found = await self._store.get(self._key)
                    if found is not None and not stale:
                        self._heed(found.value)
                    if found is not None:
                        await self._store.txn([], [Delete(self._key)])
                    stale = False
                except EtcdError as error:
                    log.warning("removal.unreadable", key=self._key, reason=str(error))
                await self._clock.sleep(CONFIRMATION_POLL_S)
            self._begun.clear()

    def _heed(self, word: bytes) -> None:
        try:
            named = {InstanceId(str(name)) for name in json.loads(word)}
        except (ValueError, TypeError, RecursionError):
            log.warning("removal.unreadable", reason=f"{word[:80]!r} is no JSON list of instance ids")
            return
        freed = self._guard.release(named)
        log.info("removal.confirmed", instances=sorted(freed))
        self._on_freed(freed)
