"""Whether etcd still has the history that was read, for a process that only reads (law 11).

It acts on nothing, so it names nothing and remembers nothing: whatever is not proven is read anew.
"""

from __future__ import annotations

import asyncio

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cluster.proof import judge_by
from kvmsupervisor.domain.history import Verdict, Witnesses


class ReadHistory:
    """Implements `informer.Proof`.

    Args:
        store: etcd.

    Attributes:
        era: how many times the history has changed, or could not be proven.
        hosts: one: it does not list in turn with others.
    """

    hosts = 1

    def __init__(self, store: Store) -> None:
        self.era = 0
        self._store = store
        self._witnesses = Witnesses()
        self._proving = asyncio.Lock()
        self._turn = asyncio.Event()

    async def prove(self) -> None:
        """Prove that etcd has the history that was read, or begin another era."""
        async with self._proving:
            if not self._witnesses:
                return
            verdict = await judge_by(self._store, self._witnesses.newest())
            if verdict in {Verdict.OTHER, Verdict.UNPROVEN}:
                self.era += 1
                self._witnesses = Witnesses()
                self._turn.set()
                self._turn = asyncio.Event()

    async def turned(self, era: int) -> None:
        """Return once the history is another one than in `era`."""
        while self.era == era:
            await self._turn.wait()

    def saw(self, key: bytes, revision: int, value: bytes | None) -> None:
        """A key was observed: written, or deleted (None)."""
        self._witnesses.saw(key, revision, value)
