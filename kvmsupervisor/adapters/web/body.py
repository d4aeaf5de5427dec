"""The body of a request, as a handler reads it: only when it is asked for, and never more than was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class Unreadable(Exception):
    """The body is not to be had. The message is for the client."""


class TooLarge(Unreadable):
    """It has more bytes than the handler takes."""


class Body(Protocol):
    """What a handler sees of it."""

    async def read(self, limit: int) -> bytes:
        """All of it. Waits for the client, at most as long as a connection lives.

        Args:
            limit: the most bytes.

        Raises:
            TooLarge: there are more.
            Unreadable: the client broke off, or wrote what is no HTTP.
        """
        ...


class NoBody:
    """A body of nothing."""

    async def read(self, limit: int) -> bytes:
        """Nothing."""
        return b""


class Arriving:
    """A body that comes in pieces from a connection.

    Args:
        length: as the client announced it; None where it did not.
        wanted: called when a handler begins to wait for it: until then nothing more need be received.
    """

    def __init__(self, length: int | None, wanted: Callable[[], None]) -> None:
        self._length = length
        self._wanted = wanted
        self._got = bytearray()
        self._limit: int | None = None
        self._done: asyncio.Future[None] | None = None
        self._ended = False
        self._error: Unreadable | None = None

    async def read(self, limit: int) -> bytes:
        """Implements `Body`; one reader, once."""
        self._limit = limit
        # All of it may be here already.
        self._look()
        if self._error is None and not self._ended:
            self._done = asyncio.get_running_loop().create_future()
            self._wanted()
            await self._done
        if self._error is not None:
            raise self._error
        return bytes(self._got)

    @property
    def ended(self) -> bool:
        """Whether all of it has come, or no more will."""
        return self._ended or self._error is not None

    def more(self, piece: bytes) -> None:
        """A piece has come. Beyond the limit nothing is kept."""
        if self._error is None:
            self._got += piece
            self._look()

    def end(self) -> None:
        """That was all."""
        self._ended = True
        self._wake()

    def fail(self, error: Unreadable) -> None:
        """No more will come."""
        if not self._ended and self._error is None:
            self._error = error
            self._wake()

    def _look(self) -> None:
        if self._limit is not None and max(len(self._got), self._length or 0) > self._limit:
            self._got.clear()
            self._error = TooLarge(f"the request has more than {self._limit} bytes")
            self._wake()

    def _wake(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
