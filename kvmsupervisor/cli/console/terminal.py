"""The terminal of a person at a console: raw during the session, and restored at any end of it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STDIN, STDOUT, STDERR = 0, 1, 2


class Signalled(Exception):
    """A signal ends the session; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def is_terminal() -> bool:
    """Whether a person types here."""
    return sys.stdin is not None and os.isatty(STDIN)


@contextmanager
def raw_terminal() -> Iterator[None]:
    """Make the terminal pass every key on, and restore it at the end.

    Raises:
        Signalled: by SIGTERM or SIGHUP, once the terminal is restored.
    """
    before = termios.tcgetattr(STDIN)

    def set_raw() -> None:
        tty.setraw(STDIN, termios.TCSANOW)

    with signals_as_exceptions(set_raw):
        try:
            set_raw()
            yield
        finally:
            # An error here means that the terminal is gone.
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(STDIN, termios.TCSANOW, before)
                # Keys for the guest must not reach the shell.
                termios.tcflush(STDIN, termios.TCIFLUSH)
                # The guest may have left colours on, or the cursor off.
                os.write(STDERR, b"\x1b[m\x1b[?25h\n" if os.isatty(STDERR) else b"")


@contextmanager
def signals_as_exceptions(on_continued: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn signals that end the process into exceptions; after a stop `on_continued` is called.

    Raises:
        Signalled: by SIGTERM or SIGHUP.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Signalled(number)

    def go_on(number: int, frame: FrameType | None) -> None:
        on_continued()

    handlers = {signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGCONT: go_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, also to a descriptor that another process has made non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
