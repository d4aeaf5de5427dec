"""The door to the consoles of this host's instances, for a process without privileges: `kvmsupervisor web`.

It asks, and gets a descriptor or a refusal in words (`supervisor/console_call.py`). QMP, the run directory and the
supervisor's memory stay out of its reach. Who may connect is a matter of the socket's mode (`KVM_CONSOLE_GROUP`); the
users of QEMUs may not, whatever group they are in.

At rest this costs nothing: one more descriptor that the event loop waits for.
"""

from __future__ import annotations

import asyncio
import grp
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.descriptors import Carrier, Door
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.aio import ended
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.names import CONSOLES_FOLDER, CONSOLES_SOCKET

if TYPE_CHECKING:
    from kvmsupervisor.supervisor.serial import Guest

log = structlog.get_logger(__name__)

MOST = 200
"""Open connections. Arbitrary: a team has fewer consoles open on one host."""

MESSAGE_LIMIT = 4096
"""Bytes of what a client says. Arbitrary: the longest request has a name of 120 characters in it."""

DEFAULT_GROUP = "kvmsupervisor-consoles"
"""Without `KVM_CONSOLE_GROUP`: the group of that name may ask, where there is one."""


class NoSuchGroup(ValueError):
    """The group that may ask for consoles does not exist. The message says what would be right."""


def group_id(name: str | None) -> int | None:
    """The group that may ask; None for nobody but our own user.

    Args:
        name: `KVM_CONSOLE_GROUP`, a name or a number; empty for nobody; None without it.

    Raises:
        NoSuchGroup: it names one that does not exist.
    """
    if name == "":
        return None
    if name is not None and name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(DEFAULT_GROUP if name is None else name).gr_gid
    except KeyError:
        if name is None:
            return None
        raise NoSuchGroup(
            f"KVM_CONSOLE_GROUP is {name}, and there is no such group: create it (groupadd --system {name}), give its "
            "number, or leave the setting out"
        ) from None


class Consoles:
    """Lets clients in.

    Args:
        run_dir: of this host.
        group: `KVM_CONSOLE_GROUP`.
        instances: of this host.
        is_guests: tells whether a user is one that QEMUs run as.
        clock: the machine's.

    Raises:
        NoSuchGroup: that group does not exist.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        group: str | None,
        instances: Mapping[InstanceId, Guest],
        is_guests: Callable[[int], bool],
        clock: Clock,
    ) -> None:
        folder = run_dir.path / CONSOLES_FOLDER
        self._door = Door(folder, CONSOLES_SOCKET, gid=group_id(group), limit=MESSAGE_LIMIT, on_call=self._called)
        self._run_dir = run_dir
        self._instances = instances
        self._is_guests = is_guests
        self._clock = clock
        self._open: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Let clients in. Without a place for the socket the supervisor goes on without."""
        try:
            self._door.open()
        except OSError as error:
            log.warning("consoles.unavailable", path=str(self._door.path), reason=error.strerror or str(error))

    async def close(self) -> None:
        """Let nobody in, and end what is open. Displays go on: they are QEMU's."""
        self._door.close()
        if self._open:
            await ended(*self._open)

    def _called(self, carrier: Carrier) -> None:
        if len(self._open) >= MOST:
            carrier.close()
            return
        task = asyncio.get_running_loop().create_task(self._serve(carrier))
        self._open.add(task)
        task.add_done_callback(self._served)

    async def _serve(self, carrier: Carrier) -> None:
        # Imported by the first call: no start should wait for it.
        from kvmsupervisor.supervisor.console_call import answer  # noqa: PLC0415

        await answer(
            carrier,
            instances=self._instances,
            run_dir=self._run_dir,
            is_guests=self._is_guests,
            clock=self._clock,
        )

    def _served(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A bug in one of them is no matter of the others, nor of the instances.
            log.error("console.failed", exc_info=error)
