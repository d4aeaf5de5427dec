"""The keeper: lets a guest go on that was frozen or paused for a snapshot, should its supervisor not come to it.

A program of its own for one snapshot, started by `guard/keeper_client.py` as
`python -I -S keeper.py LIMIT READY AGENT QMP…`, before the guest's agent is asked to freeze anything.
It outlives the supervisor, so it imports nothing of ours. It reads what is done from its standard input, one letter
each:

    f    the agent is asked to freeze the guest's file systems
    p    QEMU is told to pause the guest
    d    all is over, the guest goes on: the keeper ends

When the input ends without a `d`, or after LIMIT seconds, it undoes what it was told of: `cont`, then a thaw. It says
`cont` to a guest that is `paused` only, and that no live move is about (law 13). It writes to READY once it listens.
Sources: the QEMU Machine Protocol specification, the QEMU Guest Agent Protocol Reference.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time

PATIENCE_S = 600.0
"""How long it tries. The agent of a guest that is short of memory may take minutes."""

PAUSE_S = 0.5
"""Between two tries."""

ANSWER_S = 5.0
"""How long one answer may take."""

LONGEST = 1 << 20
"""Bytes that are read from a guest or a QEMU for one answer."""

AT_REST = frozenset({"none", "cancelled", "failed"})
"""What QEMU says of its migration where none is under way and no guest was sent."""


class Failed(Exception):
    """It did not work: try again. The message says why."""


class Gone(Exception):
    """QEMU has ended."""


def main(limit: str, ready: str, agent: str, *monitors: str) -> int:
    """Wait for the end, or bring it about; returns the exit status."""
    os.write(int(ready), b"\n")
    os.close(int(ready))
    told = listen(0, time.monotonic() + float(limit))
    if "d" in told:
        return 0
    until = time.monotonic() + PATIENCE_S
    steps = [(go_on, monitors)] if "p" in told else []
    steps += [(thaw, (agent,))] if "f" in told else []
    for step, where in steps:
        if not repeat(step, where, until):
            return 1
    return 0


def listen(source: int, until: float) -> str:
    """What is told until the input ends, a `d` comes, or the time is up. The clock stands still while the host does."""
    told = ""
    while "d" not in told and (left := until - time.monotonic()) > 0:
        if not select.select([source], [], [], left)[0]:
            break
        data = os.read(source, 64)
        if not data:
            break
        told += data.decode(errors="replace")
    return told


def repeat(step, where, until) -> bool:  # type: ignore[no-untyped-def]
    """Try a step at each of these sockets in turn until it works; False when it did not in time."""
    while time.monotonic() < until:
        gone = 0
        for path in where:
            try:
                step(path)
            except Gone:
                gone += 1
            except (Failed, OSError, ValueError):
                continue
            return True
        if gone == len(where):
            return True
        time.sleep(PAUSE_S)
    return False


def go_on(path: str) -> None:
    """Let a guest that is paused go on; one in another state is left alone."""
    with connected(path) as line:
        line.next()
        line.ask("qmp_capabilities")
        if line.ask("query-status").get("status") != "paused":
            return
        if line.ask("query-migrate").get("status", "none") in AT_REST:
            line.ask("cont")


def thaw(path: str) -> None:
    """Have the agent thaw the guest's file systems; none that is frozen is no error."""
    with connected(path) as line:
        token = time.monotonic_ns() & 0x7FFFFFFF
        # The first byte makes the agent drop half a command of an earlier client.
        line.send(b"\xff" + line.command("guest-sync-delimited", {"id": token}))
        while line.next(b"\xff").get("return") != token:
            pass
        line.send(line.command("guest-fsfreeze-thaw"))
        if "return" not in (answer := line.next()):
            raise Failed(f"the agent refuses: {answer}")


class connected:  # noqa: N801 - reads as what it is in a `with`
    """A connection to a socket that speaks JSON, a line each."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_S)
        self._heard = b""
        try:
            self._socket.connect(path)
        except (ConnectionRefusedError, FileNotFoundError) as error:
            self._socket.close()
            raise Gone from error
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> connected:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @staticmethod
    def command(name: str, arguments: dict[str, object] | None = None) -> bytes:
        """A command as it is sent."""
        more = {"arguments": arguments} if arguments else {}
        return json.dumps({"execute": name, **more}).encode() + b"\n"

    def send(self, data: bytes) -> None:
        """Send it."""
        self._socket.sendall(data)

    def ask(self, name: str) -> dict[str, object]:
        """Run a command of QMP."""
        self.send(self.command(name))
        while True:
            answer = self.next()
            if "error" in answer:
                raise Failed(f"QEMU refuses {name}: {answer['error']}")
            if "return" in answer:
                found = answer["return"]
                return found if isinstance(found, dict) else {}

    def next(self, behind: bytes = b"") -> dict[str, object]:
        """The next line, or what is behind a byte in it; what is no object counts as an empty one."""
        while b"\n" not in self._heard:
            data = self._socket.recv(4096)
            self._heard += data
            if not data or len(self._heard) > LONGEST:
                raise Failed("it ended the connection" if not data else "it talks without end")
        line, _, self._heard = self._heard.partition(b"\n")
        try:
            found = json.loads(line.rpartition(behind)[2] if behind else line)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
