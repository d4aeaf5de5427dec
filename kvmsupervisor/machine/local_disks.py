"""Disks of machines that are files of this host: looked at, opened, locked; how much room their file system has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvmsupervisor.adapters import disk_files
from kvmsupervisor.adapters.disk_files import DiskFile, FileTrouble, Threads
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import FileDisk, too_small
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.machine.images import DiskTrouble

RETRY_S = 5.0
"""Pause before a file is looked at again that is not as it must be: how late one is noticed that was put there."""


@frozen(kw_only=True)
class FileAccess:
    """How files are reached; tests have another one.

    Attributes:
        make_folder: makes the folder of all disks; raises OSError.
        open_disk: opens, locks and checks one, and makes it where that is wanted; raises FileTrouble, OSError.
        room: bytes left on the file system of a folder, and whether for root; raises OSError.
        threads: makes what runs those of one host, as `disk_files.Threads` does.
    """

    make_folder: Callable[[Path], None] = disk_files.make_folder
    open_disk: Callable[[Path, FileDisk], DiskFile] = disk_files.open_disk
    room: Callable[[Path, bool], int] = lambda folder, as_root: disk_files.room(folder, as_root=as_root)
    threads: Callable[[], Threads] = Threads


class LocalDisks:
    """The files of one host's machines.

    Args:
        folder: where all of them are (`KVM_DISK_DIR`).
        is_own: whether the folder is made when it is missing. One that people named is not: where it is a mount point
            and its file system is not mounted, empty disks would be made in place of those that are there.
        as_root: whether QEMU runs as root, for which file systems keep some room.
        access: how they are reached.
    """

    def __init__(self, folder: Path, *, is_own: bool, as_root: bool, access: FileAccess | None = None) -> None:
        self.folder = folder
        self._is_own = is_own
        self._as_root = as_root
        self._access = access or FileAccess()
        self._threads = self._access.threads()
        # Invariant: the files of the machines that live here, or are being started.
        self._users: dict[InstanceId, Spec] = {}

    async def check(self, instance: InstanceId, spec: Spec) -> None:
        """Look whether all files of `spec` can be had; make those that are missing and have a size.

        Raises:
            DiskTrouble: one is missing, in use or refused.
        """
        for fd in await self.open(instance, spec):
            os.close(fd)

    async def open(self, instance: InstanceId, spec: Spec) -> tuple[int, ...]:
        """Descriptors of all files of `spec`, locked, in their order, to be closed by who gets them.

        Raises:
            DiskTrouble: see `check`.
        """
        if not spec.files:
            return ()
        self._look_for_users(instance, spec)
        with contextlib.ExitStack() as undo:
            found: list[int] = []
            for disk, file in spec.files:
                try:
                    opened = await self._threads.call(
                        instance, partial(self._open, file), undo=lambda late: os.close(late.fd)
                    )
                except FileTrouble as error:
                    raise DiskTrouble(f"{disk.key}: {error}", RETRY_S) from error
                except OSError as error:
                    said = explain(error, self.folder / file.name)
                    raise DiskTrouble(f"{disk.key}: its file cannot be opened, or made: {said}", RETRY_S) from error
                undo.callback(os.close, opened.fd)
                if (trouble := too_small(disk.key, file, opened.size)) is not None:
                    raise DiskTrouble(trouble, RETRY_S)
                found.append(opened.fd)
            undo.pop_all()
        return tuple(found)

    def _open(self, file: FileDisk) -> DiskFile:
        if self._is_own:
            self._access.make_folder(self.folder)
        return self._access.open_disk(self.folder, file)

    async def room(self, instance: InstanceId) -> int:
        """Bytes left on the file system.

        Raises:
            FileTrouble: it cannot be told.
        """
        try:
            return await self._threads.call(instance, partial(self._access.room, self.folder, self._as_root))
        except OSError as error:
            raise FileTrouble(explain(error, self.folder)) from error

    # --- who is here ------------------------------------------------------------------------------------------

    def arrived(self, instance: InstanceId, spec: Spec) -> None:
        """A QEMU of this machine lives here, or is started now."""
        if spec.files:
            self._users[instance] = spec

    def left(self, instance: InstanceId) -> None:
        """It is proven gone."""
        self._users.pop(instance, None)

    def _look_for_users(self, instance: InstanceId, spec: Spec) -> None:
        """Whether another machine of this host has one of the files open; those that only read get on.

        Raises:
            DiskTrouble: one has.
        """
        for other, its in self._users.items():
            if other == instance:
                continue
            theirs = {file.name: (disk.key, file.ro) for disk, file in its.files}
            for disk, file in spec.files:
                key, ro = theirs.get(file.name, ("", True))
                if key and not (ro and file.ro):
                    raise DiskTrouble(
                        f"{disk.key}: {file.title} is instance {other}'s ({key}): no two instances can have one disk; "
                        f"{instance} waits until {other} has ended, or until the keys of {instance} or of {other} name "
                        "another one",
                        RETRY_S,
                    )
