"""One person, or one program, at a serial console: output, input, and the escape key.

No event loop: one wait for the keyboard, the connection and a wake-up pipe. The log has no wake-up, so the session
looks at it again and again.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable

from kvmsupervisor.adapters.console import ConsoleLog, Keyboard
from kvmsupervisor.cli.console.terminal import raw_terminal, signals_as_exceptions, write_all
from kvmsupervisor.cli.output import printable
from kvmsupervisor.domain.control_sequences import printed
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import InstanceId

ESCAPE = 0x1D
"""Ctrl-], as in telnet and `virsh console`."""

HELP = "q (or Ctrl-] again): detach; s: send Ctrl-] to the guest; t: take the keyboard; anything else: go on"

BUSY_S = 0.02
REST_S = 0.1
"""How often to look at the log: shortly after input or output, and otherwise. Arbitrary: people notice no delay, and it
costs 0.5 % of a core."""

BUSY_FOR_S = 2.0

LOOK_EVERY_S = 0.3
"""How often to look at QEMU's process, its record, and requests for the keyboard."""

TAKE_S = 3.0
"""How long the holder of the keyboard may take to release it: ten times what a living one needs (`LOOK_EVERY_S`)."""

NOTED_S = 2.0
"""How long the supervisor may take to note QEMU's end. Arbitrary: without a supervisor a person waits for so long."""

WRITTEN_S = 0.1
"""How long the supervisor's thread may take to write the log after that. Arbitrary."""


class Lacking(Exception):
    """A program has input for the guest and cannot send it. The message says why, and what would help."""


@frozen(kw_only=True)
class Mode:
    """How to use the console.

    Attributes:
        read_only: never send input.
        take: take the keyboard from its holder.
        lines: of scroll-back.
        terminal: whether a person types on a terminal; otherwise standard input is sent as it comes.
    """

    read_only: bool
    take: bool
    lines: int
    terminal: bool


class Session:
    """A console in use.

    Args:
        instance: of the console.
        record: of its QEMU.
        recorded: reads the record of the instance's QEMU; None when there is none. The supervisor drops it after it
            has seen QEMU's end, and has passed on its last output.
        lives: tells whether the QEMU of a record lives.
        is_here: tells whether this host still runs the instance.
        log: of the console, to show.
        keyboard: makes a keyboard, from a function that wakes this session.
        mode: see `Mode`.
    """

    def __init__(
        self,
        instance: InstanceId,
        record: Incarnation,
        *,
        recorded: Callable[[], Incarnation | None],
        lives: Callable[[Incarnation], bool],
        is_here: Callable[[], bool],
        log: ConsoleLog,
        keyboard: Callable[[Callable[[], None]], Keyboard],
        mode: Mode,
    ) -> None:
        self._instance = instance
        self._record: Incarnation | None = record
        self._recorded = recorded
        self._lives = lives
        self._is_here = is_here
        self._log = log
        self._mode = mode
        self._wake_out, self._wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._keyboard = keyboard(self._wake)
        self._stdin, self._stdout, self._stderr = (0, 1, 2)
        self._input_open = not mode.read_only or mode.terminal
        self._escaped = False
        self._taking_until = 0.0
        self._told_holder = ""
        self._busy_until = 0.0
        self._look_at = 0.0
        self._done = False

    def run(self) -> None:
        """Run until the person detaches, or (without a terminal) until QEMU ends.

        Raises:
            Lacking: without a terminal, and another session has the keyboard.
            Signalled: by SIGTERM or SIGHUP.
            BrokenPipeError: the reader of the output has closed it.
        """
        try:
            with raw_terminal() if self._mode.terminal else signals_as_exceptions():
                self._greet()
                self._begin_typing()
                while not self._done:
                    self._step()
        finally:
            if self._taking_until:
                self._keyboard.want_no_more()
            self._keyboard.release()
            self._log.close()
            # The pipe stays open: the thread that drains the connection may be about to write into it.

    # --- beginning and end ------------------------------------------------------------------------------------

    def _greet(self) -> None:
        assert self._record is not None
        how = "Ctrl-] is the escape: " + HELP if self._mode.terminal else "Ctrl-C detaches"
        self._say(f"console of {self._instance}, QEMU {self._record.pid}, epoch {self._record.epoch}. {how}")
        shown = self._log.begin(self._mode.lines)
        if os.isatty(self._stdout):
            shown = printed(shown)
        self._print(shown)

    def _begin_typing(self) -> None:
        if self._mode.read_only:
            self._say("read-only, as asked for")
        elif self._keyboard.take():
            self._keyboard.connect()
        elif self._mode.take:
            self._begin_taking()
        elif self._mode.terminal:
            self._tell_holder()
        else:
            raise Lacking(
                f"the keyboard of {self._instance} is in use: {printable(self._keyboard.holder())}; "
                "--take takes it, --read-only does without"
            )

    # --- the loop ---------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Show new output, look at QEMU and the keyboard, wait for the next event."""
        data = self._log.read()
        if data:
            self._print(data)
            self._be_busy()
        now = time.monotonic()
        if now >= self._look_at or (self._keyboard.ours and not self._keyboard.connected):
            self._look_at = now + LOOK_EVERY_S
            self._look_around(now)
        if self._done:
            return
        reading = [self._wake_out]
        if self._input_open and (self._mode.terminal or self._can_send):
            reading.append(self._stdin)
        writing = [self._keyboard] if self._keyboard.connected and self._keyboard.pending else []
        pause = 0.0 if data else BUSY_S if now < self._busy_until else REST_S
        readable, writable, _ = select.select(reading, writing, [], pause)
        if self._wake_out in readable:
            os.read(self._wake_out, 4096)
            self._be_busy()
        if writable:
            self._keyboard.flush()
        if self._stdin in readable:
            self._hear()

    @property
    def _can_send(self) -> bool:
        return self._keyboard.connected and self._keyboard.pending == 0

    def _hear(self) -> None:
        try:
            data = os.read(self._stdin, 4096)
        except OSError:
            data = b""
        self._be_busy()
        if not data:
            self._input_open = False
            # A terminal that is gone takes its person along.
            self._done = self._mode.terminal
        elif self._mode.terminal:
            self._type(self._without_escapes(data))
        else:
            self._keyboard.type(data)

    def _without_escapes(self, data: bytes) -> bytes:
        """Handle the key after an escape; return the input for the guest."""
        kept = bytearray()
        for key in data:
            if self._escaped:
                self._escaped = False
                if chr(key).lower() == "s":
                    kept.append(ESCAPE)
                else:
                    self._obey(chr(key).lower())
            elif key == ESCAPE:
                self._escaped = True
                self._say(HELP)
            else:
                kept.append(key)
            if self._done:
                break
        return bytes(kept)

    def _obey(self, key: str) -> None:
        match key:
            case "q" | "\x1d" | ".":
                self._done = True
            case "t" if self._mode.read_only:
                self._say("this is a --read-only session")
            case "t" if not self._keyboard.ours:
                self._begin_taking()
            case "?":
                self._say(HELP)

    def _type(self, data: bytes) -> None:
        if not data:
            return
        if self._mode.read_only:
            self._say("read-only: nothing is sent")
        elif not self._keyboard.ours:
            self._tell_holder()
        elif not self._keyboard.connected:
            self._say("QEMU does not run: nothing is sent")
        elif not self._keyboard.type(data):
            self._say("the guest does not read its console: nothing more is sent")

    # --- the keyboard -----------------------------------------------------------------------------------------

    def _begin_taking(self) -> None:
        self._taking_until = time.monotonic() + TAKE_S
        self._look_at = 0.0
        if not self._keyboard.take():
            self._keyboard.want()

    def _tell_holder(self) -> None:
        holder = self._told_holder = self._keyboard.holder()
        if holder:
            self._say(f"read-only: {holder} has the keyboard; Ctrl-] t takes it")
        else:
            self._say("the keyboard is free; Ctrl-] t takes it")

    def _look_around(self, now: float) -> None:
        self._look_at_qemu()
        if self._mode.read_only or self._done:
            return
        if self._taking_until:
            self._go_on_taking(now)
        elif self._keyboard.ours:
            wanted_by = self._keyboard.wanted_by()
            if wanted_by:
                self._keyboard.want_no_more()
                self._keyboard.release()
                self._told_holder = wanted_by
                self._say(f"{wanted_by} has taken the keyboard; you go on reading; Ctrl-] t takes it back")
                if not self._mode.terminal and self._input_open:
                    raise Lacking(f"the keyboard of {self._instance} was taken by {printable(wanted_by)}")
        elif self._mode.terminal and self._keyboard.holder() != self._told_holder:
            self._tell_holder()

    def _go_on_taking(self, now: float) -> None:
        if self._keyboard.take():
            self._taking_until = 0.0
            self._keyboard.want_no_more()
            self._keyboard.connect()
            self._say("the keyboard is yours")
        elif now >= self._taking_until:
            self._taking_until = 0.0
            self._keyboard.want_no_more()
            holder = printable(self._keyboard.holder())
            if not self._mode.terminal:
                raise Lacking(f"{holder} has the keyboard of {self._instance} and does not let go; end that process")
            self._say(f"{holder} has the keyboard and does not let go; end that process")
        else:
            # Written again, in case somebody who got it in between took the file for an old one.
            self._keyboard.want()
            self._look_at = now + BUSY_S

    # --- QEMU -------------------------------------------------------------------------------------------------

    def _look_at_qemu(self) -> None:
        """Notice the end of QEMU, its next start, and that this host does not run the instance any more."""
        found = self._recorded()
        if found is not None and not self._lives(found):
            found = None
        if self._record is not None and (found is None or found.incarnation != self._record.incarnation):
            self._keyboard.disconnect()
            self._print_rest(self._record)
            self._record = None
            self._say("QEMU has ended" + (", waiting for the next one" if self._mode.terminal else ""))
            self._done = not self._mode.terminal
        if self._record is None and not self._done:
            if found is not None:
                self._record = found
                self._say(f"QEMU was started again: process {found.pid}, epoch {found.epoch}")
            elif not self._is_here():
                self._say(f"{self._instance} is not on this host any more")
                self._done = True
        if self._record is not None and self._keyboard.ours and not self._keyboard.connected:
            # A QEMU that has just been started does not listen yet: the next look tries again.
            self._keyboard.connect()

    def _print_rest(self, ended: Incarnation) -> None:
        """Print the last output of a QEMU that has ended: its supervisor, if there is one, passes it on a bit later."""
        until = time.monotonic() + NOTED_S
        while (found := self._recorded()) and found.incarnation == ended.incarnation and time.monotonic() < until:
            self._print_log()
            time.sleep(BUSY_S)
        # What the next QEMU writes is told behind its start: it is not waited for once that is on record.
        until = time.monotonic() + WRITTEN_S
        while found is None and time.monotonic() < until:
            self._print_log()
            time.sleep(BUSY_S)
            found = self._recorded()
        self._print_log()

    def _print_log(self) -> None:
        while data := self._log.read():
            self._print(data)

    # --- output -----------------------------------------------------------------------------------------------

    def _say(self, words: str) -> None:
        """Tell the person something, apart from the guest's output."""
        line = printable(words).encode(errors="replace")
        write_all(self._stderr, b"\r\n[" + line + b"]\r\n" if self._mode.terminal else line + b"\n")

    def _print(self, data: bytes) -> None:
        write_all(self._stdout, data)

    def _be_busy(self) -> None:
        self._busy_until = time.monotonic() + BUSY_FOR_S

    def _wake(self) -> None:
        # Full: it will wake all the same.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_in, b"\0")
