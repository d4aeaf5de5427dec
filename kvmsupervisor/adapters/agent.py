"""Asks a guest's agent for facts, and to freeze its file systems, over the socket of its channel: connect, ask, close.

Source: the QEMU Guest Agent Protocol Reference (qemu.org, docs/interop/qemu-ga-ref), above all `guest-sync-delimited`:
the channel outlives its clients, so the first bytes may be answers to an earlier client. QEMU serves one client at a
time; while another client is connected (a person's, or a backup's), we wait in line until the deadline.

Everything read here was written by a guest: its length is limited, and none of it is trusted.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from kvmsupervisor.domain.agent import GuestFacts, facts_of

REPLY_LIMIT = 256 * 1024
"""The most bytes of one exchange. QEMU's own agent answers with about 12 KB, most of it `guest-info`."""

LINE_LIMIT = 128 * 1024
"""The most bytes of one answer: parsing JSON of this size blocks the event loop for milliseconds."""

TIMEOUT_S = 5.0
"""How long one exchange may take. The agent answers in milliseconds; a busy or swapped-out guest needs seconds."""

COMMANDS = ("guest-get-host-name", "guest-network-get-interfaces", "guest-get-osinfo", "guest-info")
"""All are asked every time: leaving out those that hardly change would save 0.2 ms a minute."""

_SENTINEL = b"\xff"


class AgentSilent(Exception):
    """There was no usable answer: no agent, a busy one, or one that talks nonsense. Ask again later."""


async def ask(path: Path, *, timeout_s: float = TIMEOUT_S) -> GuestFacts:
    """Ask the agent at the socket `path`; `timeout_s` covers everything, connecting included.

    Raises:
        AgentSilent: no usable answer came in time. The connection is closed.
    """
    try:
        async with asyncio.timeout(timeout_s):
            answers = await _exchange(path)
    except TimeoutError as error:
        raise AgentSilent(f"the guest's agent did not answer on {path} within {timeout_s:g} s") from error
    except OSError as error:
        raise AgentSilent(f"the guest's agent cannot be asked on {path}: {error}") from error
    return facts_of(
        info=answers["guest-info"],
        osinfo=answers["guest-get-osinfo"],
        hostname=answers["guest-get-host-name"],
        interfaces=answers["guest-network-get-interfaces"],
    )


async def freeze(path: Path, *, timeout_s: float) -> int:
    """Have the agent freeze the guest's file systems; return how many. `thaw` follows whatever comes of it.

    Raises:
        AgentSilent: it did not answer in time, and may do it later; or it refuses. The message says which.
    """
    return await _count(path, "guest-fsfreeze-freeze", timeout_s)


async def thaw(path: Path, *, timeout_s: float = TIMEOUT_S) -> int:
    """Have the agent thaw them; return how many were frozen. None is no error.

    Raises:
        AgentSilent: it did not answer in time, and may do it later; or it refuses.
    """
    return await _count(path, "guest-fsfreeze-thaw", timeout_s)


async def _count(path: Path, command: str, timeout_s: float) -> int:
    try:
        async with asyncio.timeout(timeout_s):
            (answer,) = (await _exchange(path, (command,))).values()
    except TimeoutError as error:
        raise AgentSilent(f"the guest's agent did not answer {command} within {timeout_s:g} s") from error
    except OSError as error:
        raise AgentSilent(f"the guest's agent cannot be asked on {path}: {error}") from error
    if type(answer) is not int:
        raise AgentSilent(f"the guest's agent refuses {command}")
    return answer


async def _exchange(path: Path, commands: Sequence[str] = COMMANDS) -> dict[str, object]:
    """Send all commands at once and read the answers in order: the agent runs one command after the other."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=LINE_LIMIT)
    try:
        token = secrets.randbits(31)
        sync = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        # The first byte, which never occurs in JSON, makes the agent drop half a command of an earlier client.
        writer.write(_SENTINEL + _lines(sync, *({"execute": command} for command in commands)))
        await writer.drain()
        replies = _Replies(reader)
        await replies.skip_to(token)
        return {command: await replies.next() for command in commands}
    finally:
        # Aborted, not closed: a guest that reads nothing would keep us waiting.
        writer.transport.abort()


def _lines(*objects: object) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in objects)


class _Replies:
    """Reads the guest's answers, line by line, at most `REPLY_LIMIT` bytes."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._left = REPLY_LIMIT

    async def skip_to(self, token: int) -> None:
        """Read until the answer to our own `guest-sync-delimited`; earlier bytes were for an earlier client."""
        while True:
            line = await self._line()
            _, sentinel, text = line.rpartition(_SENTINEL)
            if sentinel and _parsed(text) == {"return": token}:
                return

    async def next(self) -> object:
        """The `return` of the next answer; None for an error: an agent may refuse single commands."""
        found = _parsed(await self._line())
        if not isinstance(found, dict) or not ("return" in found or "error" in found):
            raise AgentSilent("the guest's agent talks nonsense: an answer is no JSON object with a return or an error")
        return found.get("return")

    async def _line(self) -> bytes:
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.LimitOverrunError as error:
            raise AgentSilent(f"the guest's agent sends a line of more than {LINE_LIMIT} bytes") from error
        except asyncio.IncompleteReadError as error:
            raise AgentSilent("the guest's agent ended the connection, or QEMU did") from error
        self._left -= len(line)
        if self._left < 0:
            raise AgentSilent(f"the guest's agent sends more than {REPLY_LIMIT} bytes")
        return line


def _parsed(text: bytes) -> object:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found
