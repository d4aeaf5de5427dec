"""Gets what a QEMU needs from its host before it starts: taps, boot media, files, a free port, a machine type.

In two steps. `prepare` takes its time (fetching, making images); it comes before the lock and before a start slot.
`open` takes milliseconds (descriptors); the start follows at once. `NotReady` says what is missing on the host: the
instance waits, shows the reason and tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from uuid import UUID

from kvmsupervisor.adapters import devices, resources
from kvmsupervisor.adapters.apart import Walls
from kvmsupervisor.adapters.cgroup import CgroupFailed, CgroupManager
from kvmsupervisor.adapters.devices import DeviceTrouble
from kvmsupervisor.adapters.machines import MachineTypes
from kvmsupervisor.adapters.network import NetworkTrouble, Tap
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.adapters.users import QemuUsers
from kvmsupervisor.aio import both
from kvmsupervisor.domain.argv import Channels, HostSide, Provision
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.hardware import Handed, TapFds
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import limits_of
from kvmsupervisor.domain.sight import Sight, sight_of
from kvmsupervisor.domain.spec import Firmware, RbdDisk, Secret, Spec
from kvmsupervisor.domain.storage import Unmade, nvram_of
from kvmsupervisor.machine import boot_media
from kvmsupervisor.machine.cdrom import Media
from kvmsupervisor.machine.contents import Contents, Lacking
from kvmsupervisor.machine.guest_users import GuestUsers, NoUser
from kvmsupervisor.machine.handover import HandedFiles, HostFiles, Prepared, copy_variables, file_of_variables, hand
from kvmsupervisor.machine.images import Disks, DiskTrouble
from kvmsupervisor.machine.jobs import Underway
from kvmsupervisor.machine.listening import Listening, Taken
from kvmsupervisor.machine.local_disks import LocalDisks
from kvmsupervisor.machine.spawn import Quarters
from kvmsupervisor.machine.system import System

HOST_RETRY_S = 5.0
"""Pause before the next attempt, and so how late a new bridge is noticed. An attempt costs one short program."""

MEDIA_RETRY_S = 10.0
"""The same for boot media. Arbitrary; an operator fixing the server should not wait long."""

START_FILES = 16
"""How many files one start opens at most, without taps: four sockets, logs, cgroup, pipes of its helper programs."""

SPARE_FILES = 16
"""How many more must stay free, so that etcd, HTTP and QMP can reconnect. Arbitrary; each needs one or two."""


class NotReady(Exception):
    """Something is missing on this host. The message says what, and what would be right.

    Attributes:
        retry_s: seconds until the next attempt.
        underway: whether it is being made, which nobody needs to mend.
    """

    def __init__(self, reason: str, retry_s: float, *, underway: bool = False) -> None:
        super().__init__(reason)
        self.retry_s = retry_s
        self.underway = underway


@frozen(kw_only=True)
class Opened:
    """What was opened for one start.

    Attributes:
        ready: the result of `prepare`.
        machine: the versioned machine type.
        taps: one for each NIC on a bridge.
        files: descriptors of the disks that are files.
        cdrom: the medium in its CD-ROM drive.
        handed: descriptors of what `ready` names, and of the SPICE password.
        tap_names: the names of the taps on the host.
        bridges: the bridge of each tap.
        quarters: where the process is to live.
        new: the images in Ceph that were made for it, by name.
        closing: closes our descriptors; QEMU has inherited its own by then.
    """

    ready: Prepared
    machine: str
    taps: tuple[Tap, ...]
    files: tuple[int, ...]
    cdrom: Handed | None
    handed: HandedFiles
    tap_names: tuple[str, ...]
    bridges: tuple[str, ...]
    quarters: Quarters
    closing: contextlib.ExitStack
    new: tuple[str, ...] = ()

    def provision(self, directory: InstanceDir, channels: Channels) -> Provision:
        """Everything that the command line needs."""
        return Provision(
            run_dir=str(directory.path),
            channels=channels,
            machine=self.machine,
            taps=tuple(TapFds(fd=tap.fd, vhost_fd=tap.vhost_fd) for tap in self.taps),
            files=self.files,
            media=self.handed.media,
            cdrom=self.cdrom,
            ignition=self.handed.ignition,
            nvram=self.handed.nvram,
            spice_password=self.handed.spice_password,
            ceph_key=self.handed.ceph_key,
        )


class Provisioner:
    """Gets what the QEMUs of this host need.

    Args:
        system: where taps and device nodes come from.
        host: the host's part of the command line.
        files: paths and choices of this host.
        users: who QEMUs run as.
        walls: what keeps them apart.
        types: the machine types that QEMU knows.
        cgroups: makes cgroups for QEMU processes.
        disks: images in Ceph.
        local_disks: files of this host.
        contents: what new disks begin with.
        media: what CD-ROM drives hold.
    """

    def __init__(
        self,
        *,
        system: System,
        host: HostSide,
        files: HostFiles,
        users: QemuUsers,
        walls: Walls,
        types: MachineTypes,
        cgroups: CgroupManager,
        disks: Disks,
        local_disks: LocalDisks,
        contents: Contents,
        media: Media,
    ) -> None:
        self._system = system
        self._host = host
        self._files = files
        self._users = GuestUsers(users)
        self._walls = walls
        self._types = types
        self._cgroups = cgroups
        self._disks = disks
        self._local_disks = local_disks
        self._contents = contents
        self._cdroms = media
        self._listening = Listening(system.port_trouble, spice_addr=host.spice_addr)

    # --- what takes its time ----------------------------------------------------------------------------------

    @staticmethod
    def needs_time(spec: Spec) -> bool:
        """Whether `prepare` has anything to do for such a machine."""
        has_more = spec.firmware is Firmware.UEFI or spec.cdrom is not None
        return spec.has_user_data or has_more or bool(spec.all_disks)

    async def prepare(
        self,
        instance: InstanceId,
        *,
        uuid: UUID,
        spec: Spec,
        directory: InstanceDir,
        files: Mapping[str, str],
        images: Collection[str],
        is_first: bool,
    ) -> Prepared:
        """Check the disks, make boot media and UEFI variables. Crash-safe: it can be repeated at any point.

        Args:
            instance: which.
            uuid: of the machine.
            spec: likewise.
            directory: its run directory.
            files: the host that has each of its disks that are files, as far as it has run with them.
            images: its images in Ceph that may be made, as far as it has run with them.
            is_first: whether it has never run: only then is its medium waited for.

        Raises:
            NotReady: an image is unsuitable, the user data cannot be fetched, or a file cannot be written.
            EtcdError: it is not known what a disk is to begin with.
        """
        try:
            directory.create()
        except OSError as error:
            raise NotReady(f"its folder cannot be made: {explain(error, directory.path)}", HOST_RETRY_S) from error
        variables = None
        remarks, lacking, ceph_key = await self._look_at_disks(instance, spec, files, images)
        try:
            if spec.firmware is Firmware.UEFI:
                variables = await self._variables(instance, spec)
        except OSError as error:
            said = explain(error, file_of_variables(self._files.state_dir, instance))
            raise NotReady(f"its UEFI variables cannot be made: {said}", HOST_RETRY_S) from error
        medium, lacks = await self._look_at_medium(instance, spec, is_first=is_first)
        made = await self._media(instance, uuid, spec, directory)
        return Prepared(
            spec=spec,
            media=tuple(map(str, made.cdroms)),
            ignition=None if made.ignition is None else str(made.ignition),
            variables=variables,
            variables_image=nvram_of(spec),
            ceph_key=ceph_key,
            lacking=lacking,
            medium=medium,
            notice="; ".join(filter(None, [made.notice, *remarks, lacks])) or None,
        )

    async def prepare_arrival(
        self, instance: InstanceId, *, spec: Spec, directory: InstanceDir, media: Mapping[str, bytes]
    ) -> Prepared:
        """As `prepare`, for a guest that comes from another host with its media: QEMU compares none.

        Args:
            instance: which.
            spec: the machine.
            directory: its run directory.
            media: boot media and Ignition file, by name.

        Raises:
            NotReady: an image is unsuitable, or a file cannot be written.
        """
        try:
            directory.create()
            for name, data in media.items():
                boot_media.put(directory.path, name, data)
            key = Secret.of(await self._disks.check(instance, spec)) if spec.images else None
        except DiskTrouble as error:
            raise NotReady(str(error), error.retry_s) from error
        except OSError as error:
            raise NotReady(f"its media cannot be written: {explain(error, directory.path)}", HOST_RETRY_S) from error
        at = {name: str(directory.path / name) for name in media}
        return Prepared(
            spec=spec,
            media=tuple(at[name] for name in (boot_media.SEED, boot_media.CONFIG_DRIVE) if name in at),
            ignition=at.get(boot_media.IGNITION),
            variables_image=nvram_of(spec) if spec.firmware is Firmware.UEFI else None,
            ceph_key=key,
        )

    async def _media(self, instance: InstanceId, uuid: UUID, spec: Spec, directory: InstanceDir) -> boot_media.Media:
        """The media with its user data; none without any."""
        try:
            if spec.user_data is not None:
                assert spec.user_data.text is not None
                data = spec.user_data.text.encode()
                return await boot_media.keep(data, directory=directory.path, instance=instance, uuid=uuid)
            if spec.cloud_config is None:
                boot_media.discard(directory.path)
                return boot_media.NONE
            return await boot_media.furnish(
                spec.cloud_config,
                directory=directory.path,
                instance=instance,
                uuid=uuid,
                file_root=self._files.media_root,
                ca_file=self._files.media_cacert,
                follow_inward=self._files.media_inward,
            )
        except boot_media.MediaTrouble as error:
            raise NotReady(str(error), MEDIA_RETRY_S) from error

    async def _look_at_disks(
        self,
        instance: InstanceId,
        spec: Spec,
        files: Mapping[str, str],
        images: Collection[str],
    ) -> tuple[tuple[str, ...], tuple[Unmade, ...], Secret | None]:
        """Check the disks.

        Returns:
            What a person should know, the images that are to be made, and the key to Ceph, None without an image.
        """
        try:
            remarks = await self._local_disks.check(instance, spec, files, self._contents)
            if not spec.images:
                return remarks, (), None
            lacking, key = await self._look_at_images(instance, spec, images)
            return (*remarks, *lacking.remarks), lacking.disks, Secret.of(key)
        except DiskTrouble as error:
            raise NotReady(str(error), error.retry_s, underway=isinstance(error, Underway)) from error

    async def _look_at_medium(
        self, instance: InstanceId, spec: Spec, *, is_first: bool
    ) -> tuple[str | None, str | None]:
        """Which medium it starts with, and what a person should know.

        A machine that has run before does without: it most likely was installed from it. It follows once it is there.
        """
        if spec.cdrom is None or spec.cdrom.medium is None:
            return None, None
        try:
            medium = await self._cdroms.open(instance, spec.cdrom)
        except DiskTrouble as error:
            if is_first:
                raise NotReady(str(error), error.retry_s, underway=isinstance(error, Underway)) from error
            return None, f"it has started with an empty CD-ROM drive: {error}"
        assert medium is not None
        os.close(medium.fd)
        return medium.path, None

    async def _medium(self, instance: InstanceId, ready: Prepared, stack: contextlib.ExitStack) -> Handed | None:
        """The medium that it starts with, open; `stack` closes it.

        Raises:
            DiskTrouble, EtcdError: see `Media.open`.
        """
        if ready.spec.cdrom is None or ready.medium is None:
            return None
        medium = await self._cdroms.open(instance, ready.spec.cdrom)
        if medium is not None:
            stack.callback(os.close, medium.fd)
        return medium

    async def _look_at_images(self, instance: InstanceId, spec: Spec, images: Collection[str]) -> tuple[Lacking, str]:
        """What of its images in Ceph is to be made, and the guest's key."""
        check, look = self._disks.check(instance, spec, but_made=True), self._contents.look
        if self._disks.guests_apart:
            # In turn: nothing is asked for, such as an import, for a guest that may not open it.
            key = await check
            return await look(instance, spec, images), key
        return await both(look(instance, spec, images), check)

    async def _variables(self, instance: InstanceId, spec: Spec) -> str | None:
        """Path of the file with the UEFI variables, copied from the firmware's template where it is missing."""
        assert self._host.ovmf is not None
        if nvram_of(spec) is not None:
            return None
        file = file_of_variables(self._files.state_dir, instance)
        if not file.exists():
            await asyncio.to_thread(copy_variables, Path(self._host.ovmf.variables), file)
        return str(file)

    async def _furnish_variables(self, instance: InstanceId, image: RbdDisk) -> None:
        """Make the image of UEFI variables: from this host's file of them, or else from the firmware's template."""
        assert self._host.ovmf is not None
        file = file_of_variables(self._files.state_dir, instance)
        template = file if file.exists() else Path(self._host.ovmf.variables)
        try:
            await self._disks.furnish_variables(image, template)
        except DiskTrouble as error:
            raise NotReady(f"its UEFI variables cannot be made: {error}", error.retry_s) from error

    # --- what a start follows at once -------------------------------------------------------------------------

    async def open(
        self, instance: InstanceId, incarnation: str, *, ready: Prepared, machine: str | None, directory: InstanceDir
    ) -> Opened:
        """Open what the start needs that follows at once. The caller closes it.

        Args:
            instance: the instance's id.
            incarnation: the name of the incarnation to start.
            ready: the result of `prepare`.
            machine: the versioned machine type of the instance's first start; None to ask QEMU.
            directory: the instance's folder in the run directory.

        Raises:
            NotReady: a bridge is missing or not allowed, a port is in use, or a file or image cannot be made or opened.
        """
        spec = ready.spec
        lack = resources.lack_of_files(START_FILES + SPARE_FILES + 2 * len(spec.bridged_nics) + len(spec.files))
        if lack is not None:
            raise NotReady(f"it cannot be started: {lack}", HOST_RETRY_S)
        try:
            self._listening.check(instance, spec)
        except Taken as error:
            raise NotReady(str(error), HOST_RETRY_S) from error
        machine = machine or await self._types.versioned(spec.machine)
        try:
            await self._make_images(instance, spec, ready.lacking)
        except DiskTrouble as error:
            raise NotReady(str(error), error.retry_s) from error
        if ready.variables_image is not None and spec.firmware is Firmware.UEFI:
            await self._furnish_variables(instance, ready.variables_image)
        with contextlib.ExitStack() as stack:
            try:
                files = await self._local_disks.open(instance, spec)
                for fd in files:
                    stack.callback(os.close, fd)
                cdrom = await self._medium(instance, ready, stack)
                handed = hand(ready, stack)
                user, entry = self._users.take(instance), self._walls.entry(self._sight(spec))
                if entry is not None:
                    stack.callback(entry.close)
                taps = [stack.enter_context(contextlib.closing(tap)) async for tap in self.taps(spec)]
                cgroup = await self._cgroups.prepare(instance, incarnation, limits_of(spec))
                stack.callback(cgroup.close)
            except (NetworkTrouble, CgroupFailed, DiskTrouble, NoUser) as error:
                raise NotReady(str(error), HOST_RETRY_S) from error
            except OSError as error:
                said = explain(error, directory.path)
                raise NotReady(f"a file for QEMU cannot be opened: {said}", HOST_RETRY_S) from error
            return Opened(
                ready=ready,
                machine=machine,
                taps=tuple(taps),
                files=files,
                cdrom=cdrom,
                handed=handed,
                tap_names=tuple(self._system.network.tap_name(tap.fd) for tap in taps),
                bridges=self.bridges(spec),
                quarters=Quarters(user=user, entry=entry, cgroup=cgroup),
                new=tuple(unmade.image.name for unmade in ready.lacking if unmade.has is None),
                closing=stack.pop_all(),
            )

    async def _make_images(self, instance: InstanceId, spec: Spec, lacking: Collection[Unmade]) -> None:
        """Make them. Not in `prepare`: only the holder of the lock may.

        Raises:
            DiskTrouble: one cannot be made.
        """
        for unmade in lacking:
            await self._contents.make(instance, unmade)
        if lacking:
            await self._disks.admit(instance, spec)

    # --- what a machine gets while it runs --------------------------------------------------------------------

    async def disk(
        self, instance: InstanceId, alone: Spec, *, files: Mapping[str, str], images: Collection[str]
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Make a disk ready for a machine that runs, under its lock.

        Args:
            instance: whose.
            alone: a machine with that disk alone.
            files: as for `prepare`.
            images: likewise.

        Returns:
            A descriptor where it is a file, to be closed by the caller; and what a person should know.

        Raises:
            NotReady, DiskTrouble: it cannot be had, or is being made.
            EtcdError: it is not known what it is to begin with.
        """
        remarks, lacking, _ = await self._look_at_disks(instance, alone, files, images)
        await self._make_images(instance, alone, lacking)
        return await self._local_disks.open(instance, alone), remarks

    def _sight(self, spec: Spec) -> Sight:
        """What its QEMU needs to see."""
        host = self._host
        return sight_of(spec, accel=host.accel, ceph_conf=host.ceph.conf, ovmf=host.ovmf)

    async def taps(self, spec: Spec) -> AsyncIterator[Tap]:
        """A tap for each NIC on a bridge, one after the other: each takes milliseconds."""
        if not spec.bridged_nics:
            return
        for device in (devices.TUN, devices.VHOST_NET):
            with contextlib.suppress(DeviceTrouble):
                # A missing device makes the helper fail, with a message that names the bridge, too.
                self._system.ensure_device(device)
        wanted = self.bridges(spec)
        self._system.network.allow_bridges(wanted, owner=self._files.bridge_owner)
        for bridge in wanted:
            yield await self._system.network.open_tap(bridge, helper=self._files.bridge_helper)

    def bridges(self, spec: Spec) -> tuple[str, ...]:
        """The bridge of each NIC that is on one."""
        bridges = (nic.bridge or self._host.bridge_if for nic in spec.bridged_nics)
        return tuple(bridge for bridge in bridges if bridge is not None)

    # --- who is here ------------------------------------------------------------------------------------------

    def arrived(self, instance: InstanceId, spec: Spec, uid: int | None) -> None:
        """Note that a QEMU of this machine lives on this host, or is being started, as a user of its own or not."""
        self._users.arrived(instance, uid)
        self._local_disks.arrived(instance, spec)
        self._listening.arrived(instance, spec)

    async def left(self, instance: InstanceId) -> None:
        """Note that the QEMU is proven gone."""
        self._listening.left(instance)
        self._users.left(instance)
        self._local_disks.left(instance)
        self._contents.left(instance)
        await self._cgroups.remove(instance)
