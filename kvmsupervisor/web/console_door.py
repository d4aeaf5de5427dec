"""Asks this host's supervisor for a console, at the socket of `supervisor/consoles.py`."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from kvmsupervisor.adapters.descriptors import Carrier, Lost
from kvmsupervisor.domain.consoles import ConsoleRequest, Unfit, decoded
from kvmsupervisor.domain.names import CONSOLES_FOLDER, CONSOLES_SOCKET

MESSAGE_LIMIT = 4096
"""Bytes of a message; the supervisor's are short."""

ANSWER_S = 10.0
"""How long the supervisor may take: twice as long as QEMU may take to answer it."""


class NoConsole(Exception):
    """There is no console. The message says why, for people, the most important first: browsers get 123 bytes of it."""


class Door:
    """Where consoles are asked for.

    Args:
        run_dir: of the supervisor.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / CONSOLES_FOLDER / CONSOLES_SOCKET

    async def ask(self, request: ConsoleRequest) -> Carrier:
        """Ask; what is answered comes on the connection, which is the caller's to close.

        Raises:
            NoConsole: there is no supervisor to ask, or this process may not.
        """
        try:
            carrier = Carrier.connect(self._path, limit=MESSAGE_LIMIT)
        except PermissionError as error:
            raise NoConsole(
                "this page's user may not ask for consoles: the supervisor's KVM_CONSOLE_GROUP names the group that "
                f"may ({self._path})"
            ) from error
        except OSError as error:
            raise NoConsole(
                "this host's supervisor gives out no consoles: it does not run, is older, or has another KVM_RUN_DIR "
                f"({self._path}: {error.strerror or error})"
            ) from error
        try:
            await carrier.send(request.to_json(), timeout_s=ANSWER_S)
        except Lost as error:
            carrier.close()
            raise NoConsole(f"the supervisor does not answer: {error}") from error
        except asyncio.CancelledError:
            carrier.close()
            raise
        return carrier

    async def display(self, request: ConsoleRequest) -> socket.socket:
        """Ask for a display: a connection with its QEMU.

        Raises:
            NoConsole: there is none.
        """
        carrier = await self.ask(request)
        try:
            async with asyncio.timeout(ANSWER_S):
                data, fd = await carrier.receive(takes_fd=True)
        except (Lost, TimeoutError) as error:
            raise NoConsole(f"the supervisor does not answer: {error or 'it takes too long'}") from error
        finally:
            carrier.close()
        told = _told(data)
        if fd is not None and told.get("is") == "display":
            return socket.socket(fileno=fd)
        if fd is not None:
            os.close(fd)
        raise NoConsole(str(told.get("refused") or "the supervisor answers in a way that this page does not know"))


def _told(data: bytes) -> dict[str, object]:
    try:
        return decoded(data)
    except Unfit:
        return {}
