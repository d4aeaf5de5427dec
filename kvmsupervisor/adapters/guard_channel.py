"""The socket to the guard. The docstring of `kvmsupervisor/guard/program.py` describes the protocol."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Self

PROTOCOL = 1
"""Version of the protocol. A test compares it with the guard's own."""

LONGEST_ANSWER = 1 << 20
"""Bytes. The longest answer names every machine of a host, 37 bytes each."""


class ChannelLost(Exception):
    """The guard does not answer, or not in time: the connection is closed. The message says which."""


class ChannelRefused(Exception):
    """The guard refuses the request. The message is the guard's own."""


class Channel:
    """A connection to the guard. The guard answers one request after the other.

    Args:
        end: our end of it; closed with the channel.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end

    @classmethod
    def pair(cls) -> tuple[Self, socket.socket]:
        """A channel, and its other end, for a guard to inherit."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    @classmethod
    def connect(cls, path: Path) -> Self:
        """Connect to the listening guard. Does not wait.

        Raises:
            ChannelLost: no guard listens.
        """
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.setblocking(False)
        try:
            end.connect(str(path))
        except OSError as error:
            end.close()
            raise ChannelLost(f"cannot connect to {path}: {error.strerror}") from error
        return cls(end)

    async def ask(self, request: str, descriptor: int | None = None, *, timeout_s: float) -> str:
        """Send one request, with a descriptor to hand over, and return the answer.

        On cancellation, or without an answer in time, the channel is closed: a late answer would be taken for the
        answer to the next request.

        Raises:
            ChannelRefused: the guard refuses the request.
            ChannelLost: there is no answer.
        """
        word = request.partition(" ")[0]
        try:
            socket.send_fds(self._end, [request.encode()], [] if descriptor is None else [descriptor])
            async with asyncio.timeout(timeout_s):
                data = await asyncio.get_running_loop().sock_recv(self._end, LONGEST_ANSWER)
        except TimeoutError as error:
            self.close()
            raise ChannelLost(f"no answer to {word!r} within {timeout_s:g} s") from error
        except OSError as error:
            self.close()
            raise ChannelLost(f"no answer to {word!r}: {error.strerror}") from error
        except asyncio.CancelledError:
            self.close()
            raise
        if not data:
            self.close()
            raise ChannelLost(f"no answer to {word!r}: the connection was closed")
        answer = data.decode(errors="replace")
        if answer.startswith("no "):
            raise ChannelRefused(answer.removeprefix("no "))
        return answer

    def close(self) -> None:
        """Close the channel. Closing twice is no error."""
        self._end.close()
