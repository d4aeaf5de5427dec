"""Disks that are whole copies of other disks: a file of a file of the same host, an image in Ceph of a snapshot.

A copy gets its name last, and a note for whom it was made, as in `contents.py`, which asks for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from kvmsupervisor.adapters import disk_files, image_files, image_tools
from kvmsupervisor.adapters.ceph import CephImages
from kvmsupervisor.adapters.disk_files import FileLocked, FileTrouble, Threads
from kvmsupervisor.adapters.image_tools import ToolFailed
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.domain.images import Snapshot, local_file_of, note_of
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import FileDisk, Sized, size_text
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.failpoints import point
from kvmsupervisor.machine.images import DiskTrouble
from kvmsupervisor.machine.jobs import Say
from kvmsupervisor.machine.library import FLUSH_S, STEP, Library

RETRY_S = 5.0
"""Pause before it is looked again for what people have to mend."""


async def make_file(  # noqa: PLR0917 - what, for whom, where
    instance: InstanceId,
    key: str,
    file: FileDisk,
    say: Say,
    folder: Path,
    threads: Threads,
    library: Library,
    *,
    before_it_is_there: Callable[[], None],
) -> None:
    """Make a file of what another one holds now; snapshots within that are left out.

    Args:
        instance: whose the new one is.
        key: of the disk.
        file: the new one.
        say: is told how far it is.
        folder: of both.
        threads: runs calls that may block.
        library: knows how much room there is to be.
        before_it_is_there: called before it has its name, by which it may be found at once.

    Raises:
        DiskTrouble: it cannot be made, or not yet: the other one is in use.
    """
    assert file.origin is not None
    source = FileDisk(local_file_of(file.origin) or "", ro=True)
    name, path = f"{file.name} of {instance}", folder / source.name
    try:
        opened = await threads.call(
            name, partial(disk_files.open_disk, folder, source), undo=lambda late: os.close(late.fd)
        )
    except FileLocked as error:
        raise DiskTrouble(f"{path} is in use: it is copied while the machine that has it is off", RETRY_S) from error
    except FileTrouble as error:
        raise DiskTrouble(f"{error}; a disk of another host cannot be copied from here", RETRY_S) from error
    except OSError as error:
        raise DiskTrouble(explain(error, path), RETRY_S) from error
    try:
        fits(key, file, opened.size)
        await library.need_room(folder, image_files.allocated(opened.fd), f"a copy of {source.title}")
        new = await threads.call(
            name,
            partial(disk_files.begin, folder, file, note_of(instance, file.origin)),
            undo=disk_files.NewFile.close,
        )
        with contextlib.closing(new):
            # The file may not be larger than the source when it is filled; a greater `size=` is grown to at the start.
            await threads.call(name, partial(disk_files.fill, new.fd, replace(file, size=opened.size)))
            progress = steps(say, f"{size_text(opened.size)} of {source.title} are being copied")
            progress(0)
            fds = opened.fd, source.format, new.fd, file.format
            await library.with_room(folder, image_tools.convert(*fds, size=opened.size, become=(), progress=progress))
            await point("file duplicated")
            before_it_is_there()
            await threads.call(name, new.finish, deadline_s=FLUSH_S)
    except (ToolFailed, FileTrouble) as error:
        raise DiskTrouble(str(error), RETRY_S) from error
    except OSError as error:
        raise DiskTrouble(explain(error, folder / file.name), RETRY_S) from error
    finally:
        os.close(opened.fd)


async def make_image(ceph: CephImages, parent: Snapshot, aside: RbdDisk, note: str, say: Say) -> None:
    """Make an image of a snapshot that depends on nothing.

    Args:
        ceph: the cluster.
        parent: the snapshot.
        aside: the image, under a name that nobody uses.
        note: is left with it.
        say: is told how far it is.

    Raises:
        CephError: it is not made.
    """
    await ceph.clone(parent, aside)
    await ceph.flatten(aside, hear=steps(say, f"{parent} is being copied"))
    await point("image duplicated")
    await ceph.set_note(aside, note)


def steps(say: Say, what: str) -> Callable[[int], None]:
    """Tell of some steps only: each is a write of a status key."""
    said = -1

    def hear(percent: int) -> None:
        nonlocal said
        if percent // STEP > said:
            said = percent // STEP
            say(f"{what}, {said * STEP} %")

    return hear


def fits(key: str, disk: Sized, size: int) -> None:
    """Make sure that a disk is to be as large as what it begins with.

    Raises:
        DiskTrouble: it is to be smaller.
    """
    if disk.size is not None and disk.size < size:
        right = f"write size={size_text(size)}, or leave size= out" if size % (1 << 20) == 0 else "leave size= out"
        raise DiskTrouble(
            f"size={size_text(disk.size)} is less than the {size_text(size)} of the image: {right}", RETRY_S
        )
