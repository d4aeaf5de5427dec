"""People at terminals: the real program on a pseudo terminal of its own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.support.readable import readable

DEADLINE_S = 30.0
"""For one look at the screen. Nothing is measured: what goes well is there in a second."""


class Person:
    """Somebody at a terminal in which the program runs.

    Attributes:
        process: the program.
        seen: all that was on the screen.
        before: how the terminal was set when the program began.
    """

    def __init__(self, process: subprocess.Popen[bytes], master: int, slave: int) -> None:
        self.process = process
        self.seen = ""
        self.before = termios.tcgetattr(slave)
        self._master = master
        self._slave = slave

    def sees(self, words: str) -> str:
        """Read until `words` are on the screen; return all that is."""
        while words not in self.seen:
            assert self.looks(), f"it ended without {words!r}: {self.seen!r}"
        return self.seen

    def types(self, text: str) -> None:
        """Type."""
        os.write(self._master, text.encode())

    def ends(self) -> int:
        """Read on until the program ends; return its exit code."""
        while self.process.poll() is None:
            self.looks(0.05)
        return self.process.wait()

    @property
    def is_raw(self) -> bool:
        """Whether every key is passed on."""
        return not termios.tcgetattr(self._slave)[3] & (termios.ICANON | termios.ECHO)

    @property
    def is_as_before(self) -> bool:
        """Whether the terminal is set as it was when the program began."""
        return termios.tcgetattr(self._slave) == self.before

    def looks(self, timeout_s: float = DEADLINE_S) -> bool:
        """Look at the screen once; False when the program has closed its side."""
        if not readable(self._master, timeout_s):
            assert timeout_s < DEADLINE_S, self.seen
            return True
        data = os.read(self._master, 65536)
        self.seen += data.decode(errors="replace")
        return bool(data)


@contextmanager
def at_terminal(*args: str, environ: Mapping[str, str]) -> Iterator[Person]:
    """Somebody starts `kvmsupervisor` with these arguments; it is ended in the end, if it has not."""
    master, slave = pty.openpty()
    argv = [sys.executable, "-m", "kvmsupervisor", *args]
    process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True)
    try:
        yield Person(process, master, slave)
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
