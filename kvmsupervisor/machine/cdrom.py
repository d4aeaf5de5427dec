"""The CD-ROM drive of a machine: its media opened on the host, and changed while QEMU runs.

QEMU gets a medium as an open file, over QMP, so it needs no right to any (`add-fd`). Sources: `blockdev-open-tray`,
`blockdev-remove-medium`, `blockdev-insert-medium`, `blockdev-close-tray` and `DEVICE_TRAY_MOVED` of QEMU's QMP
reference (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.qmp import MonitorRefused
from kvmsupervisor.domain.cdrom import DEVICE, EMPTY, Cdrom
from kvmsupervisor.domain.hardware import CDROM_SETS, CDROM_TURNS, Handed, cdrom_node
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.machine.contents import Contents
from kvmsupervisor.machine.local_disks import LocalDisks
from kvmsupervisor.machine.monitor import Ask

KEY = "cdrom"

RETRY_S = 5.0
"""Pause before it is tried again to change a medium, where no event tells that something is different."""

MOVED_S = 1.0
"""The least pause after an attempt, however often the guest moves its tray."""


class Media:
    """The media of one host.

    Args:
        local_disks: those that are files of this host.
        contents: those that are images of the library.
    """

    def __init__(self, local_disks: LocalDisks, contents: Contents) -> None:
        self._local_disks = local_disks
        self._contents = contents

    async def open(self, instance: InstanceId, drive: Cdrom) -> Handed | None:
        """The medium that a key names, open for reading, to be closed by the caller; None for an empty drive.

        Raises:
            DiskTrouble: it is missing or refused, or is being fetched.
            EtcdError: it is not known what it is.
        """
        if drive.file is not None:
            return Handed(await self._local_disks.open_medium(instance, KEY, drive.file), drive.title)
        if drive.image is not None:
            return Handed(await self._contents.open_medium(KEY, drive.image), drive.title)
        return None


class Drive:
    """The drive of one QEMU.

    Attributes:
        at: when the next attempt to change its medium is due, CLOCK_BOOTTIME; the past: now.
        trouble: why the last one came to nothing, for people; None for no reason.
    """

    def __init__(self, clock: Clock, ask: Ask) -> None:
        self.at = 0.0
        self.trouble: str | None = None
        self._clock = clock
        self._ask = ask
        self._tried_at = -math.inf

    def look(self) -> None:
        """Try now: people have changed a key."""
        self.at = 0.0

    def moved(self) -> bool:
        """The guest has opened its tray, or closed it; False where nothing waits for that."""
        if self.trouble is None:
            return False
        self.at = min(self.at, self._tried_at + MOVED_S)
        return True

    def wait(self, trouble: str, after_s: float) -> None:
        """Note why it cannot be changed now, and when to try again."""
        self.trouble = trouble
        self.at = self._clock.now() + after_s

    async def change(
        self, instance: InstanceId, drive: Cdrom, medium: Handed | None, *, begins: Callable[[], None]
    ) -> bool:
        """Take out what is in the drive and put in `medium`; True once QEMU has done it.

        Cut off anywhere, it can be repeated. The tray is opened first: while its guest does not let it, nothing has
        happened. What is in the drive stays until QEMU has opened the next one.

        Args:
            instance: whose.
            drive: as its key wants it.
            medium: the medium, open; None for none.
            begins: called right before what is in the drive is taken out.
        """
        self._tried_at = self._clock.now()
        name = "nothing" if drive.title == EMPTY else drive.title
        try:
            await self._change(drive, medium, begins)
        except _NoAnswer:
            self.wait(f"{KEY}: {name} is not in its drive yet, as QEMU has not answered", RETRY_S)
        except MonitorRefused as error:
            self.wait(f"{KEY}: QEMU does not put {name} into its drive: {error}", RETRY_S)
        except _TrayShut as shut:
            said = f"{KEY}: the guest has shut its tray before {name} was in it; it is tried again"
            if shut.is_locked:
                said = (
                    f"{KEY}: the guest has locked the tray of its CD-ROM drive, as it uses what is in it; it was asked "
                    f"to let go, and {name} follows once it does (`umount`, `eject`); without its consent: "
                    f"`kvmsupervisor set {instance} {KEY}='{drive.title} force'`"
                )
            self.wait(said, RETRY_S)
        else:
            self.trouble = None
            self.at = 0.0
            return True
        return False

    async def _change(self, drive: Cdrom, medium: Handed | None, begins: Callable[[], None]) -> None:
        await self._do("blockdev-open-tray", id=DEVICE, force=drive.force)
        found = await self._look()
        if not found.get("tray_open"):
            # Of a tray that is locked QEMU only asks the guest, and says no more than that it has.
            raise _TrayShut(is_locked=bool(found.get("locked")))
        turn = await self._free_turn()
        if medium is not None:
            await self._hand_over(turn, medium)
        begins()
        await self._do("blockdev-remove-medium", id=DEVICE)
        if medium is not None:
            await self._do("blockdev-insert-medium", {"id": DEVICE, "node-name": _node_of(turn)})
        await self._do("blockdev-close-tray", id=DEVICE)
        await self._free_turn()

    async def _hand_over(self, turn: int, medium: Handed) -> None:
        """Have QEMU open a medium. When it cannot, the tray is closed again, with what is in it."""
        await self._do("add-fd", {"fdset-id": CDROM_SETS + turn, "opaque": medium.path}, fd=medium.fd)
        try:
            await self._do("blockdev-add", cdrom_node(turn))
        except MonitorRefused:
            await self._do("blockdev-close-tray", id=DEVICE)
            raise

    async def _look(self) -> Mapping[str, Any]:
        """What QEMU says of the drive."""
        return next((one for one in await self._do("query-block") if one.get("qdev") == DEVICE), {})

    async def _free_turn(self) -> int:
        """Take away all media that are not in the drive; a turn that no medium has."""
        inside = ((await self._look()).get("inserted") or {}).get("node-name")
        names = {one.get("node-name") for one in await self._do("query-named-block-nodes", flat=True)}
        numbers = {one.get("fdset-id") for one in await self._do("query-fdsets")}
        free = [turn for turn in range(CDROM_TURNS) if _node_of(turn) != inside]
        for turn in free:
            if _node_of(turn) in names:
                await self._do("blockdev-del", {"node-name": _node_of(turn)})
            if CDROM_SETS + turn in numbers:
                await self._do("remove-fd", {"fdset-id": CDROM_SETS + turn})
        return next((turn for turn in free if CDROM_SETS + turn not in numbers), free[0])

    async def _do(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None, **more: object
    ) -> Any:
        """Run a QMP command.

        Raises:
            _NoAnswer: QEMU did not answer.
            MonitorRefused: it refuses.
        """
        answer = await self._ask(command, {**(arguments or {}), **more} or None, fd=fd)
        if answer is None:
            raise _NoAnswer(command)
        return answer


class _NoAnswer(Exception):
    """QEMU did not answer a command, so it may have done it."""


class _TrayShut(Exception):
    """The tray is not open, although it was to be."""

    def __init__(self, *, is_locked: bool) -> None:
        super().__init__(is_locked)
        self.is_locked = is_locked


def _node_of(turn: int) -> str:
    return str(cdrom_node(turn)["node-name"])


def holds(medium: str | None) -> str:
    """What a drive holds, for people."""
    return EMPTY if medium is None else medium
