"""A serial console that a process without privileges shows to a person: what the command `console` does, told to it.

The client reads the log itself, by descriptors, and types into QEMU's socket itself. What stays here is what needs the
run directory: who has the keyboard, when the log is another file, and when QEMU is another one. The files are those of
`adapters/console.py`, so browsers and terminals give way to each other.

Told, each a JSON object:

    {"is": "older"}, {"is": "log"}         with a descriptor: the log before this one; the log, and each next one
    {"is": "qemu", "pid": 1}               a QEMU runs; null: it has ended
    {"is": "keyboard", "yours": true}      with a descriptor, the connection to QEMU: the client types, and reads what
                                           comes, which it drops
    {"is": "keyboard", "holder": "bob"}    it is somebody else's; empty: it is free
    {"is": "keyboard", "lost": "bob"}      somebody has taken it; empty: nothing was read from QEMU for too long
    {"is": "keyboard", "stuck": "bob"}     its holder does not let go
    {"is": "gone"}                         the instance is not on this host any more; the last word

Heard: {"take": true} and {"release": true}.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Never, Protocol

from structlog.typing import FilteringBoundLogger

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.console import KeyboardLock, connect, open_log, unread
from kvmsupervisor.adapters.descriptors import Carrier, Lost
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.aio import until_one_ends
from kvmsupervisor.domain.consoles import Unfit, decoded, encoded
from kvmsupervisor.machine.viewers import Viewers

LOOK_S = 0.3
"""How often to look at the log's name, at QEMU and at requests for the keyboard, as the command `console` does. Each
look takes some 30 microseconds."""

TAKE_S = 3.0
"""How long the holder of the keyboard may take to release it: ten times what a living one needs."""

UNREAD_S = 5.0
"""How long output of the guest may wait in a connection that nobody reads before that is ended: the guest waits, too.
Arbitrary; who lives reads at once."""

SEND_S = 5.0
"""How long the client may read nothing. Arbitrary."""


class Guest(Protocol):
    """An instance, as a console needs it: a `Worker`.

    Attributes:
        viewers: of its display.
    """

    viewers: Viewers

    @property
    def pid(self) -> int | None:
        """Of the living QEMU."""

    @property
    def starttime(self) -> int | None:
        """Of the QEMU on record."""


class SerialConsole:
    """One of them.

    Args:
        carrier: the client.
        folder: of the instance.
        guest: the instance; None once it is not here any more.
        who: types, for others to read.
        clock: the machine's.
        told: the log.
    """

    def __init__(
        self,
        carrier: Carrier,
        folder: InstanceDir,
        *,
        guest: Callable[[], Guest | None],
        who: str,
        clock: Clock,
        told: FilteringBoundLogger,
    ) -> None:
        self._carrier = carrier
        self._folder = folder
        self._guest = guest
        self._keyboard = KeyboardLock(folder.path, who=who)
        self._clock = clock
        self._log = told
        self._shown: os.stat_result | None = None
        # Pid and start time; None before the first look.
        self._qemu: tuple[int | None, int | None] | None = None
        self._line: socket.socket | None = None
        self._unread_since: float | None = None
        self._taking_until = 0.0
        self._holder: str | None = None

    async def run(self) -> None:
        """Until the client leaves, or the instance. The keyboard is theirs where it is free."""
        self._log.info("console.opened")
        try:
            await self._begin()
            await until_one_ends(self._look(), self._hear())
        finally:
            self._hang_up()
            if self._taking_until:
                self._keyboard.want_no_more()
            self._keyboard.release()
            self._log.info("console.closed")

    async def _begin(self) -> None:
        older = self._folder.console_log.with_name(f"{self._folder.console_log.name}.1")
        with contextlib.suppress(OSError):
            await self._hand(open_log(older), {"is": "older"})
        self._keyboard.take()

    async def _look(self) -> None:
        while (guest := self._guest()) is not None:
            await self._look_at_log()
            await self._look_at_qemu(guest)
            await self._look_at_keyboard()
            await self._clock.sleep(LOOK_S)
        await self._tell({"is": "gone"})

    async def _hear(self) -> Never:
        while True:
            data, _ = await self._carrier.receive()
            try:
                said = decoded(data)
            except Unfit as unfit:
                raise Lost(str(unfit)) from unfit
            if said.get("take") is True and not self._keyboard.ours:
                self._begin_taking()
                await self._look_at_keyboard()
            elif said.get("release") is True:
                self._hang_up()
                self._keyboard.release()
                self._holder = None

    # --- the log, and QEMU ------------------------------------------------------------------------------------

    async def _look_at_log(self) -> None:
        """Hand out the log, each time when it is another file."""
        with contextlib.suppress(OSError):
            now = self._folder.console_log.stat()
            if self._shown is None or not os.path.samestat(now, self._shown):
                fd = open_log(self._folder.console_log)
                if fd is not None:
                    self._shown = os.fstat(fd)
                await self._hand(fd, {"is": "log"})

    async def _look_at_qemu(self, guest: Guest) -> None:
        now = (guest.pid, guest.starttime if guest.pid is not None else None)
        if now != self._qemu:
            self._qemu = now
            self._hang_up()
            await self._tell({"is": "qemu", "pid": guest.pid})

    # --- the keyboard -----------------------------------------------------------------------------------------

    def _begin_taking(self) -> None:
        self._taking_until = self._clock.now() + TAKE_S
        if not self._keyboard.take():
            self._keyboard.want()

    async def _look_at_keyboard(self) -> None:
        if self._taking_until:
            await self._go_on_taking()
        elif self._keyboard.ours and (by := self._keyboard.wanted_by()):
            self._keyboard.want_no_more()
            await self._lose(by)
        elif self._keyboard.ours and self._is_unread():
            await self._lose("")
        elif not self._keyboard.ours and (holder := self._keyboard.holder()) != self._holder:
            self._hang_up()
            self._holder = holder
            await self._tell({"is": "keyboard", "holder": holder})
        if self._keyboard.ours and self._line is None and self._qemu is not None and self._qemu[0] is not None:
            await self._plug_in()

    async def _go_on_taking(self) -> None:
        if self._keyboard.take():
            self._taking_until = 0.0
            self._log.info("console.taken")
        elif self._clock.now() >= self._taking_until:
            self._taking_until = 0.0
            self._keyboard.want_no_more()
            self._holder = self._keyboard.holder()
            await self._tell({"is": "keyboard", "stuck": self._holder})
        else:
            # Written again, in case somebody who got it in between took the file for an old one.
            self._keyboard.want()

    async def _lose(self, by: str) -> None:
        self._hang_up()
        self._keyboard.release()
        self._holder = by
        await self._tell({"is": "keyboard", "lost": by})

    async def _plug_in(self) -> None:
        """Connect to QEMU, and hand that out. A QEMU that was just started may not listen yet."""
        try:
            line = connect(self._folder.console_socket)
        except OSError:
            return
        self._line, self._unread_since, self._holder = line, None, None
        await self._carrier.send(encoded({"is": "keyboard", "yours": True}), fd=line.fileno(), timeout_s=SEND_S)

    def _is_unread(self) -> bool:
        """Whether output of the guest waits where nobody reads it."""
        if self._line is None or unread(self._line) == 0:
            self._unread_since = None
            return False
        if self._unread_since is None:
            self._unread_since = self._clock.now()
        return self._clock.now() - self._unread_since >= UNREAD_S

    def _hang_up(self) -> None:
        """End the connection to QEMU, for the client as well."""
        line, self._line = self._line, None
        if line is not None:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    # --- what is told -----------------------------------------------------------------------------------------

    async def _tell(self, message: dict[str, object]) -> None:
        await self._carrier.send(encoded(message), timeout_s=SEND_S)

    async def _hand(self, fd: int | None, message: dict[str, object]) -> None:
        """Tell it with a descriptor, which is closed here."""
        if fd is None:
            return
        try:
            await self._carrier.send(encoded(message), fd=fd, timeout_s=SEND_S)
        finally:
            os.close(fd)
