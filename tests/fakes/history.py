"""A history that never changes, for tests in which nothing is restored."""

from __future__ import annotations

import asyncio


class SameHistory:
    """Implements `informer.Proof`."""

    era = 0
    hosts = 1

    async def turned(self, era: int) -> None:
        await asyncio.Event().wait()

    async def prove(self) -> None:
        pass

    def saw(self, key: bytes, revision: int, value: bytes | None) -> None:
        pass
