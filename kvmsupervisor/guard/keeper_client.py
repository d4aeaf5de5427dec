"""Starts a keeper (`keeper.py`), tells it what is done to a guest, and dismisses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvmsupervisor.adapters import process as kernel

PROGRAM = Path(__file__).with_name("keeper.py")

START_S = 10.0
"""How long a keeper may take until it listens: it takes 30 ms, or seconds on a loaded host."""

FROZEN, PAUSED, DONE = b"f", b"p", b"d"
"""What it is told; see there."""


class KeeperTrouble(Exception):
    """There is no keeper: nothing is frozen or paused. The message says why."""


class Keeper(Protocol):
    """A keeper that listens."""

    def tell(self, what: bytes) -> None:
        """Tell it what is done next; raises KeeperTrouble where it has ended."""
        ...

    def dismiss(self, *, done: bool) -> None:
        """Let go of it: it ends where all is `done`, and otherwise does what is left to do."""
        ...


class _Keeper:
    """A keeper that is a process; `pipe` is the end of its input that this program holds, and the kernel closes."""

    def __init__(self, process: kernel.Process, pipe: int) -> None:
        self._process = process
        self._pipe = pipe

    def tell(self, what: bytes) -> None:
        try:
            if self._process.ended.is_set():
                raise BrokenPipeError
            os.write(self._pipe, what)
        except OSError as error:
            raise KeeperTrouble("the keeper, which would let the guest go on, has ended") from error

    def dismiss(self, *, done: bool) -> None:
        if done:
            with contextlib.suppress(KeeperTrouble):
                self.tell(DONE)
        os.close(self._pipe)


async def keep(*, monitors: Sequence[Path], agent: Path, limit_s: float) -> Keeper:
    """Start a keeper for one QEMU; it listens on return. Cancelling leaves none behind.

    Args:
        monitors: QEMU's sockets for QMP, in the order in which they are tried.
        agent: the socket of the guest's agent.
        limit_s: when it acts although this supervisor lives, seconds from now.

    Raises:
        KeeperTrouble: it cannot be started.
    """
    with contextlib.ExitStack() as always, contextlib.ExitStack() as on_error:
        try:
            source, pipe = os.pipe()
            on_error.callback(os.close, pipe)
            always.callback(os.close, source)
            heard, ready = os.pipe()
            always.callback(os.close, heard)
            nowhere = os.open(os.devnull, os.O_RDWR)
            always.callback(os.close, nowhere)
            words = (sys.executable, "-I", "-S", str(PROGRAM), f"{limit_s:g}", str(ready), str(agent))
            try:
                process = kernel.spawn(
                    [*words, *map(str, monitors)],
                    environment={"PATH": os.environ.get("PATH", os.defpath)},
                    log_fd=nowhere,
                    pass_fds=[ready],
                    on_end=lambda: None,
                    stdin=source,
                )
            finally:
                os.close(ready)
        except (kernel.SpawnFailed, OSError) as error:
            raise KeeperTrouble(f"a keeper cannot be started: {error}") from error
        # Without a word of what was done it just ends once its input does.
        if not await _says(heard):
            raise KeeperTrouble("a keeper was started and does not answer")
        on_error.pop_all()
        return _Keeper(process, pipe)


async def _says(heard: int) -> bool:
    """Whether something is written to a pipe in time, before its other end is closed."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()

    def listen() -> None:
        if not done.done():
            done.set_result(bool(os.read(heard, 1)))

    loop.add_reader(heard, listen)
    try:
        async with asyncio.timeout(START_S):
            return await done
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(heard)
