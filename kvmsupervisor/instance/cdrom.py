"""The CD-ROM drive of a machine that runs: what is in it becomes what its key says."""

from __future__ import annotations

import contextlib
import os
from functools import partial

from kvmsupervisor.domain.cdrom import CHANGING, EMPTY, Cdrom
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.instance.status import Report
from kvmsupervisor.machine.cdrom import holds
from kvmsupervisor.machine.images import DiskTrouble
from kvmsupervisor.machine.machine import Machine


async def change(
    instance: InstanceId, wanted: Spec, *, machine: Machine, report: Report, context: InstanceContext
) -> None:
    """Change the medium, if its guest lets that happen. Failing is observed: why, and when to try again.

    Raises:
        EtcdError: it is not known what the medium is.
    """
    drive = wanted.cdrom or Cdrom(EMPTY)
    try:
        medium = await context.media.open(instance, drive)
    except DiskTrouble as error:
        machine.drive.wait(str(error), error.retry_s)
        return
    try:
        if not await machine.drive.change(instance, drive, medium, begins=partial(_note, machine, CHANGING)):
            return
    finally:
        if medium is not None:
            os.close(medium.fd)
    _note(machine, drive.medium)
    report.tell("instance.medium_changed", medium=holds(drive.medium))


def _note(machine: Machine, medium: str | None) -> None:
    """Keep what is in the drive. Where the file cannot be written this supervisor knows it all the same."""
    with contextlib.suppress(OSError):
        machine.note(medium=medium)
