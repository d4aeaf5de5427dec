"""A history that never changes, for tests in which nothing is restored."""

from __future__ import annotations


class SameHistory:
    """Implements `informer.Proof`."""

    era = 0

    async def prove(self) -> None:
        pass

    def saw(self, key: bytes, revision: int, value: bytes | None) -> None:
        pass
