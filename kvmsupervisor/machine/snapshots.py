"""Snapshots on the disks of machines: found, taken, taken away, rolled back to; on images in Ceph and in qcow2 files.

A snapshot is whole or it is none, and the disks themselves say which (`domain/snapshots.py`): on an image in Ceph it
has another name until all disks have theirs; the files of one machine get theirs last and in one step. Each step may be
cut off: what is found afterwards says what is left to do. While QEMU lives its files are its own, so it is asked to do
that; a file that nobody has open is opened, locked, and given to `qemu-img`. See docs/decisions/0041-snapshots.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from kvmsupervisor.adapters import disk_files, image_tools
from kvmsupervisor.adapters.ceph import CephError, CephSnapshots, SnapshotInUse
from kvmsupervisor.adapters.ceph.snapshots import made_at
from kvmsupervisor.adapters.disk_files import FileTrouble
from kvmsupervisor.adapters.image_tools import ToolFailed
from kvmsupervisor.adapters.qmp import Command, MonitorRefused
from kvmsupervisor.aio import all_of
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk
from kvmsupervisor.domain.qmp_answers import number_in, object_in, objects_in, text_in
from kvmsupervisor.domain.snapshots import How, Piece, Sight, Snap, lacking, stored, unfinished
from kvmsupervisor.domain.spec import RbdDisk, Spec
from kvmsupervisor.domain.storage import node_of, nvram_of
from kvmsupervisor.failpoints import point
from kvmsupervisor.machine.images import DiskTrouble, trouble_of
from kvmsupervisor.machine.local_disks import LocalDisks
from kvmsupervisor.machine.standstill import HOLD_S, Instant, NotHeld

RETRY_S = 10.0
"""Pause before what people have to mend is tried again."""

NAME_LENGTH = 128
"""Characters of a snapshot's name that are read. Arbitrary: ours have 68 at most."""

FIRMWARE = "firmware"
"""The key of the image of UEFI variables: of a machine that is rolled back they are part."""

Standing = Callable[[bool], AbstractAsyncContextManager[Instant]]
"""Has the guest stand still; told whether its processors are to be paused. See `Standstill.instant`."""


class Files(Protocol):
    """The qcow2 files of one machine, by key."""

    async def look(self) -> Mapping[str, Mapping[str, Piece]]:
        """The snapshots of each."""
        ...

    async def take(self, snap: str) -> None:
        """Take one of each, of one instant."""
        ...

    async def remove(self, key: str, snap: str) -> None:
        """Take one away."""
        ...


class LiveFiles:
    """Files that a QEMU has open.

    Args:
        nodes: the names of their block nodes, by key.
        ask: runs a QMP command.
    """

    def __init__(self, nodes: Mapping[str, str], ask: Command) -> None:
        self._nodes = nodes
        self._ask_monitor = ask

    async def look(self) -> Mapping[str, Mapping[str, Piece]]:
        """Ask QEMU; see `Files`."""
        if not self._nodes:
            return {}
        keys = {node: key for key, node in self._nodes.items()}
        found: dict[str, Mapping[str, Piece]] = {}
        for device in objects_in(await self._ask("query-block")):
            inserted = object_in(device, "inserted")
            image, key = object_in(inserted, "image"), keys.get(text_in(inserted, "node-name") or "")
            if key is not None:
                size = number_in(image, "virtual-size") or 0
                held = objects_in(image.get("snapshots"))
                found[key] = {_name(one): Piece(size=size, at=_at(number_in(one, "date-sec"))) for one in held}
        if missing := self._nodes.keys() - found.keys():
            raise DiskTrouble(f"QEMU does not tell of {', '.join(sorted(missing))}", RETRY_S)
        return found

    async def take(self, snap: str) -> None:
        """All in one transaction: of one instant, and all or none."""
        kind = "blockdev-snapshot-internal-sync"
        actions = [{"type": kind, "data": {"device": node, "name": snap}} for node in self._nodes.values()]
        await self._ask("transaction", {"actions": actions})

    async def remove(self, key: str, snap: str) -> None:
        """Have QEMU take it away."""
        await self._ask("blockdev-snapshot-delete-internal-sync", {"device": self._nodes[key], "name": snap})

    async def _ask(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        try:
            answer = await self._ask_monitor(command, arguments)
        except MonitorRefused as error:
            raise DiskTrouble(str(error), RETRY_S) from error
        if answer is None:
            raise DiskTrouble(f"QEMU did not answer {command}")
        return answer


class RestingFiles:
    """Files that nobody has open.

    Args:
        fds: descriptors of them, locked, by key.
        threads: runs calls that may block.
        name: for whom.
    """

    def __init__(self, fds: Mapping[str, int], threads: disk_files.Threads, name: str) -> None:
        self._fds = fds
        self._threads = threads
        self._name = name

    async def look(self) -> Mapping[str, Mapping[str, Piece]]:
        """Read the tables of the images; see `Files`."""
        found: dict[str, Mapping[str, Piece]] = {}
        for key, fd in self._fds.items():
            try:
                size, held = await self._threads.call(self._name, partial(disk_files.snapshots_of, fd))
            except (FileTrouble, OSError) as error:
                raise DiskTrouble(f"{key}: {error}", RETRY_S) from error
            found[key] = {one.name: Piece(size=one.size or size, at=_at(one.at)) for one in held}
        return found

    async def take(self, snap: str) -> None:
        """One after the other: nothing writes to them."""
        for key in self._fds:
            await self.run(key, "-c", snap)

    async def remove(self, key: str, snap: str) -> None:
        """Take it away; see `Files`."""
        await self.run(key, "-d", snap)

    async def run(self, key: str, what: str, snap: str) -> None:
        """Run `qemu-img snapshot`; see `image_tools.snapshot`."""
        fd = self._fds[key]
        try:
            await image_tools.snapshot(fd, what, snap, size=os.fstat(fd).st_size)
        except ToolFailed as error:
            raise DiskTrouble(f"{key}: {error}", RETRY_S) from error

    async def rolled_back(self, key: str) -> str | None:
        """The last request for which a file was rolled back; None without one."""
        return await self._threads.call(self._name, partial(disk_files.rolled_back, self._fds[key]))

    async def note_rolled_back(self, key: str, request: str) -> None:
        """Keep with a file the request for which it was rolled back."""
        try:
            await self._threads.call(self._name, partial(disk_files.note_rolled_back, self._fds[key], request))
        except OSError as error:
            raise DiskTrouble(f"{key}: {error.strerror or error}", RETRY_S) from error


class SnapshotDisks:
    """The disks of one machine, as far as they are written to.

    Args:
        ceph: the snapshots of the cluster.
        spec: of the machine.
        files: its qcow2 files.
    """

    def __init__(self, ceph: CephSnapshots, spec: Spec, files: Files) -> None:
        self._ceph = ceph
        self._images = images_of(spec)
        self._files = files
        self._raw = tuple(disk.key for disk, file in spec.files if not file.ro and file.format is not DiskFormat.QCOW2)
        self._qcow2 = tuple(qcow2_of(spec))

    async def look(self) -> Sight:
        """What is on each disk.

        Raises:
            DiskTrouble: it is not known.
        """
        with _told():
            held = await all_of([self._of(image) for image in self._images.values()])
        return Sight(dict(zip(self._images, held, strict=True)) | dict(await self._files.look()))

    async def _of(self, image: RbdDisk) -> Mapping[str, Piece]:
        return {
            name: Piece(size=one.size, at=made_at(one), is_protected=one.is_protected)
            for name, one in (await self._ceph.of(image)).items()
        }

    async def take(self, name: str, standing: Standing, still_ours: Callable[[], Awaitable[None]]) -> Instant | None:
        """Take a snapshot, unless it is there; what was cut off is taken away, or finished.

        Args:
            name: of it.
            standing: has the guest stand still.
            still_ours: makes sure, before it counts, that nobody else has run the machine meanwhile.

        Returns:
            How the guest stood still; None where the snapshot was there.

        Raises:
            DiskTrouble: it is not taken. What it has left is taken away with the next attempt.
        """
        if self._raw:
            raise DiskTrouble(
                f"no snapshot of {', '.join(self._raw)}: a .raw file keeps none; with the machine off "
                "`qemu-img convert -O qcow2` makes one of it that does",
                RETRY_S,
            )
        if not self._images and not self._qcow2:
            raise DiskTrouble("it has no disk that it writes to, so there is nothing to snapshot", RETRY_S)
        sight = await self.tidied()
        if name in sight.begun:
            await self._finish(sight, name)
            return None
        several = len(self._images) + bool(self._qcow2) > 1
        async with standing(several) as instant:
            try:
                async with asyncio.timeout(HOLD_S):
                    with _told():
                        await all_of([self._ceph.create(image, unfinished(name)) for image in self._images.values()])
                    await point("images snapshot")
                    instant.check()
                    if self._qcow2:
                        await still_ours()
                        await self._files.take(stored(name))
                        await self._undo_unless(instant, name)
            except TimeoutError:
                said = f"the snapshot {name} was not taken within {HOLD_S:g} s, in which its guest stands still"
                raise DiskTrouble(f"{said}: is Ceph full, or away?", RETRY_S) from None
        await point("snapshot taken")
        await still_ours()
        await self._finish(await self.look(), name)
        return instant

    async def _undo_unless(self, instant: Instant, name: str) -> None:
        """Take it away from the files again where the guest does not stand still any more."""
        try:
            instant.check()
        except NotHeld:
            for key in self._qcow2:
                await self._files.remove(key, stored(name))
            raise

    async def tidied(self) -> Sight:
        """What is on each disk, once what was cut off is taken away."""
        sight = await self.look()
        for name in sight.unfinished - sight.begun:
            await self._drop_unfinished(sight, name)
        return sight

    async def _finish(self, sight: Sight, name: str) -> None:
        """Give a snapshot that is on all disks its name, and keep it from being removed."""
        with _told():
            for key, image in self._images.items():
                held = sight.pieces[key]
                if unfinished(name) in held:
                    await self._ceph.rename(image, unfinished(name), stored(name))
                elif stored(name) not in held:
                    continue
                if stored(name) not in held or not held[stored(name)].is_protected:
                    await self._ceph.protect(image, stored(name))

    async def _drop_unfinished(self, sight: Sight, name: str) -> None:
        with _told():
            for key, image in self._images.items():
                if (piece := sight.pieces[key].get(unfinished(name))) is not None:
                    await self._ceph.remove(image, unfinished(name), is_protected=piece.is_protected)

    async def delete(self, name: str) -> None:
        """Take a snapshot away from all disks.

        Raises:
            DiskTrouble: it has clones, or that is not done on all.
        """
        sight = await self.look()
        await self._drop_unfinished(sight, name)
        having = {key: held[stored(name)] for key, held in sight.pieces.items() if stored(name) in held}
        with _told():
            for key in having.keys() & self._images.keys():
                if clones := await self._ceph.clones(self._images[key], stored(name)):
                    are = "are clones" if clones[1:] else "is a clone"
                    raise DiskTrouble(
                        f"the snapshot {name} stays, as {', '.join(clones)} {are} of it ({key}): `rbd flatten` makes a "
                        "clone a disk of its own",
                        RETRY_S,
                    )
            for key, piece in having.items():
                if key in self._images:
                    await self._ceph.remove(self._images[key], stored(name), is_protected=piece.is_protected)
                else:
                    await self._files.remove(key, stored(name))
                await point("taken away from one disk")

    # --- rollback -----------------------------------------------------------------------------------------------

    async def may_roll_back(self, name: str, request: str) -> bool:
        """Make sure that a rollback can be done; False where it was done for this request before.

        Raises:
            DiskTrouble: it cannot be.
        """
        sight = await self.look()
        if not sight.pieces or self._raw:
            raise DiskTrouble(f"it is not rolled back: {', '.join(self._raw) or 'no disk'} has no snapshots", RETRY_S)
        having = [key for key, held in sight.pieces.items() if stored(name) in held]
        if not having:
            known = ", ".join(sorted(sight.begun)) or "none"
            raise DiskTrouble(f"it is not rolled back: there is no snapshot {name} (there is {known})", RETRY_S)
        if missing := lacking(tuple(sight.pieces), having):
            raise DiskTrouble(
                f"it is not rolled back: the snapshot {name} is not on {', '.join(missing)}, which came later, or was "
                "taken away there: leave that disk out of the keys, or roll back to another one",
                RETRY_S,
            )
        await self._nobody_has_it_open()
        return any([await self._was_for(key) != request for key in having])

    async def _nobody_has_it_open(self) -> None:
        with _told():
            for image in self._images.values():
                if users := await self._ceph.users(image):
                    raise DiskTrouble(
                        f"{image.name} is open ({', '.join(users)}), or was until 30 s ago: it is rolled back once "
                        "nobody has it open"
                    )

    async def _was_for(self, key: str) -> str | None:
        with _told():
            if key in self._images:
                return await self._ceph.rolled_back(self._images[key])
        assert isinstance(self._files, RestingFiles)
        return await self._files.rolled_back(key)

    async def roll_back(self, name: str, request: str) -> None:
        """Give all disks the content and the size that they had. One that has it for this request is left as it is.

        Raises:
            DiskTrouble: that is not done on all.
        """
        sight = await self.look()
        for key, held in sight.pieces.items():
            if stored(name) not in held:
                raise DiskTrouble(f"the snapshot {name} is not on {key} any more", RETRY_S)
            if await self._was_for(key) == request:
                continue
            if key in self._images:
                image = self._images[key]
                with _told():
                    await self._ceph.roll_back(image, stored(name), size=held[stored(name)].size)
                    await self._ceph.note_rolled_back(image, request)
            else:
                assert isinstance(self._files, RestingFiles)
                await self._files.run(key, "-a", stored(name))
                await self._files.note_rolled_back(key, request)
            await point("one disk rolled back")


def images_of(spec: Spec) -> dict[str, RbdDisk]:
    """The images in Ceph that a machine writes to, by key."""
    found = {disk.key: image for disk, image in spec.images if not image.ro}
    variables = nvram_of(spec)
    return found if variables is None else {**found, FIRMWARE: variables}


def qcow2_of(spec: Spec) -> dict[str, FileDisk]:
    """The qcow2 files that it writes to, by key."""
    return {disk.key: file for disk, file in spec.files if not file.ro and file.format is DiskFormat.QCOW2}


def live(ceph: CephSnapshots, spec: Spec, ask: Command) -> SnapshotDisks:
    """The disks of a machine whose QEMU lives."""
    nodes = {disk.key: node_of(disk) for disk, _ in spec.files if disk.key in qcow2_of(spec)}
    return SnapshotDisks(ceph, spec, LiveFiles(nodes, ask))


@contextlib.asynccontextmanager
async def resting(
    ceph: CephSnapshots, local_disks: LocalDisks, instance: InstanceId, spec: Spec
) -> AsyncIterator[SnapshotDisks]:
    """The disks of a machine that is off, whose lock the caller holds. Its files are open, and locked, so long.

    Raises:
        DiskTrouble: a file cannot be had, or an image may not be opened.
    """
    fds = await local_disks.open(instance, spec)
    try:
        wanted = qcow2_of(spec)
        ours = {disk.key: fd for (disk, _), fd in zip(spec.files, fds, strict=True) if disk.key in wanted}
        with _told():
            await all_of(map(ceph.free, images_of(spec).values()))
        yield SnapshotDisks(ceph, spec, RestingFiles(ours, local_disks.threads, instance))
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.asynccontextmanager
async def off(_pause: bool) -> AsyncIterator[Instant]:
    """The instant of a machine that is off."""
    yield Instant(how=How.OFF, why=None, check=lambda: None)


def snap_of(name: str, sight: Sight, instant: Instant | None, at: str) -> Snap | None:
    """What there is to say of a snapshot that was just taken, or found; None where it is on no disk."""
    found = sight.snaps({}).get(name)
    if found is None or instant is None:
        return found
    return Snap(name=name, at=at, size=found.size, how=instant.how, disks=found.disks, why=instant.why)


def _at(seconds: int | None) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else ""
    except (ValueError, OverflowError, OSError):
        return ""  # whoever has taken over a QEMU may say what it likes


def _name(held: Mapping[str, Any]) -> str:
    found = held.get("name")
    return found[:NAME_LENGTH] if isinstance(found, str) else ""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except SnapshotInUse as error:
        raise DiskTrouble(str(error), RETRY_S) from error
    except CephError as error:
        raise trouble_of(error) from error
