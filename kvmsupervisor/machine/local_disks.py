"""Disks of machines that are files of this host: looked at, opened, locked; how much room their file system has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from kvmsupervisor.adapters import disk_files
from kvmsupervisor.adapters.disk_files import DiskFile, FileTrouble, NoFile, Threads
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.images import leftover, refusal, remark
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import FileDisk, too_small
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.machine.images import DiskTrouble

RETRY_S = 5.0
"""Pause before a file is looked at again that is not as it must be: how late one is noticed that was put there."""


class Filling(Protocol):
    """Makes files of what they are to begin with."""

    async def fill(self, instance: InstanceId, key: str, file: FileDisk) -> None:
        """Make a file that is missing, in the background: once it is there this returns.

        Raises:
            DiskTrouble: it is not there yet, or cannot be made.
            EtcdError: it is not known what it is to begin with.
        """
        ...

    def is_fresh(self, instance: InstanceId, name: str) -> bool:
        """Whether it was made a moment ago, for the start that goes on."""
        ...


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

    Attributes:
        threads: runs what may block.

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
        self.threads = self._access.threads()
        # Invariant: the files of the machines that live here, or are being started.
        self._users: dict[InstanceId, Spec] = {}

    async def check(
        self, instance: InstanceId, spec: Spec, known: Mapping[str, str], filling: Filling
    ) -> tuple[str, ...]:
        """Look whether all files of `spec` can be had; make those that are missing and have a size, or a beginning.

        A file that the instance has run with is not new. Where it is missing, it lies on another host, or its file
        system is not mounted: an empty disk in its place would look as if all were lost.

        Args:
            instance: whose.
            spec: of the machine.
            known: the host that has each file, by its name, as far as the instance has run with it.
            filling: makes those that begin with an image.

        Returns:
            What a person should know of them.

        Raises:
            DiskTrouble: one is missing, in use or refused, or is being made.
            EtcdError: it is not known what one is to begin with.
        """
        remarks: list[str] = []
        for fd in await self._open_all(instance, spec, known, filling, remarks):
            os.close(fd)
        return tuple(remarks)

    async def open(self, instance: InstanceId, spec: Spec) -> tuple[int, ...]:
        """Descriptors of all files of `spec`, locked, in their order, to be closed by the caller. None is made.

        Raises:
            DiskTrouble: see `check`.
        """
        return await self._open_all(instance, spec, {}, None, [])

    async def open_medium(self, instance: InstanceId, key: str, name: str) -> int:
        """A descriptor of a medium, for reading, to be closed by the caller.

        Raises:
            DiskTrouble: it is missing, empty, in use by who writes to it, or refused.
        """
        file = FileDisk(name, ro=True)
        try:
            opened = await self._open_one(instance, key, file)
        except NoFile as error:
            raise DiskTrouble(
                f"{key}: there is no file {self.folder / name} on this host: put it there, or give {key} another "
                "medium",
                RETRY_S,
            ) from error
        if not opened.size:
            os.close(opened.fd)
            raise DiskTrouble(f"{key}: {self.folder / name} is empty: is it still to be copied there?", RETRY_S)
        return opened.fd

    async def _open_all(
        self,
        instance: InstanceId,
        spec: Spec,
        known: Mapping[str, str],
        filling: Filling | None,
        remarks: list[str],
    ) -> tuple[int, ...]:
        """Open all; without `filling` none is made."""
        if not spec.files:
            return ()
        self._look_for_users(instance, spec)
        with contextlib.ExitStack() as undo:
            found: list[int] = []
            for disk, file in spec.files:
                is_new = filling is not None and file.title not in known
                try:
                    opened = await self._open_one(instance, disk.key, file if is_new else replace(file, size=None))
                except NoFile as error:
                    if not is_new or file.origin is None:
                        raise DiskTrouble(f"{disk.key}: {self._missing(file, known, str(error))}", RETRY_S) from error
                    assert filling is not None
                    await filling.fill(instance, disk.key, file)
                    opened = await self._open_one(instance, disk.key, file)
                undo.callback(os.close, opened.fd)
                if (trouble := too_small(disk.key, file, opened.size)) is not None:
                    raise DiskTrouble(trouble, RETRY_S)
                if is_new and file.origin is not None:
                    said = refusal(disk.key, file.title, file.origin, instance, opened.note)
                    if said is not None:
                        raise DiskTrouble(said, RETRY_S)
                    assert filling is not None
                    if not filling.is_fresh(instance, file.title):
                        remarks += filter(None, [leftover(disk.key, file.title, instance, opened.note)])
                if filling is not None and file.origin is not None:
                    remarks += filter(None, [remark(disk.key, file.title, file.origin, opened.note)])
                found.append(opened.fd)
            undo.pop_all()
        return tuple(found)

    async def _open_one(self, instance: InstanceId, key: str, file: FileDisk) -> DiskFile:
        """Open one; it is made, empty, where it is missing, has a size, and begins with nothing.

        Raises:
            NoFile: it is missing, and not made.
            DiskTrouble: it cannot be had.
        """
        try:
            return await self.threads.call(instance, partial(self._open, file), undo=lambda late: os.close(late.fd))
        except NoFile:
            raise
        except FileTrouble as error:
            raise DiskTrouble(f"{key}: {error}", RETRY_S) from error
        except OSError as error:
            said = explain(error, self.folder / file.name)
            raise DiskTrouble(f"{key}: its file cannot be opened, or made: {said}", RETRY_S) from error

    def _missing(self, file: FileDisk, known: Mapping[str, str], said: str) -> str:
        host = known.get(file.title)
        if host is None:
            return said
        return (
            f"there is no file {self.folder / file.name} on this host, and the disk is not new: the machine ran "
            f"with it on {host}. Copy it from there, or mount its file system; for an empty disk give it another name"
        )

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
            return await self.threads.call(instance, partial(self._access.room, self.folder, self._as_root))
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
