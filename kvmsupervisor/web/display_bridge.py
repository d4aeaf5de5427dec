"""A display in a browser: bytes between a WebSocket and QEMU, which speaks VNC on a connection that it was handed.

Nothing of VNC is understood here but one byte. A viewer may ask to be the only one, and QEMU then throws the others
out; so nobody asks for that. Each direction goes on when the other side has taken what came.

Source: RFC 6143, 7.1 (the beginning) and 7.3.1 (ClientInit, the shared flag).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from kvmsupervisor.adapters.web.websocket import WebSocket
from kvmsupervisor.aio import until_one_ends

PIECE = 1 << 16

VERSION = b"RFB 003.008\n"
"""The version that QEMU offers, and viewers answer with. In older ones the flag is elsewhere."""

SHARED_AT = len(VERSION) + 1
"""Where the flag is in what a viewer says: behind the version, and one byte that chooses how to prove who it is."""


class Unfit(Exception):
    """The viewer speaks another version. The message says so."""


class Sharing:
    """What a viewer says, with the wish to be alone taken out of it."""

    def __init__(self) -> None:
        self._at = 0

    def passed(self, piece: bytes) -> bytes:
        """A piece, as QEMU is to get it.

        Raises:
            Unfit: it begins with another version.
        """
        begin, self._at = self._at, self._at + len(piece)
        if begin > SHARED_AT:
            return piece
        expected = VERSION[begin : begin + len(piece)]
        if not piece.startswith(expected):
            raise Unfit("the viewer speaks another version of VNC than 3.8")
        if begin + len(piece) <= SHARED_AT:
            return piece
        place = SHARED_AT - begin
        return piece[:place] + b"\x01" + piece[place + 1 :]


async def bridge(browser: WebSocket, qemu: socket.socket) -> str:
    """Pass on what comes until one side ends; return why, for people.

    Raises:
        Closed: the browser has left.
    """
    loop = asyncio.get_running_loop()
    qemu.setblocking(False)
    why = "its QEMU has ended this connection"

    async def shown() -> None:
        while data := await loop.sock_recv(qemu, PIECE):
            await browser.send(data)

    async def typed() -> None:
        nonlocal why
        sharing = Sharing()
        while True:
            piece = await browser.receive()
            if isinstance(piece, str):
                why = "a display takes bytes, and no text"
                return
            try:
                await loop.sock_sendall(qemu, sharing.passed(piece))
            except Unfit as unfit:
                why = str(unfit)
                return

    with contextlib.suppress(OSError):
        await until_one_ends(shown(), typed())
    return why
