"""Gets what a QEMU needs from its host before it starts: taps, boot media, files, a free port, a machine type.

In two steps. `prepare` takes its time (fetching, making images); it comes before the lock and before a start slot.
`open` takes milliseconds (descriptors); the start follows at once. `NotReady` says what is missing on the host: the
instance waits, shows the reason and tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from uuid import UUID

from kvmsupervisor.adapters import devices, ports, resources
from kvmsupervisor.adapters.cgroup import Cgroup, CgroupFailed, CgroupManager
from kvmsupervisor.adapters.devices import DeviceTrouble
from kvmsupervisor.adapters.machines import MachineTypes
from kvmsupervisor.adapters.network import NetworkTrouble, Tap
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.adapters.rundir import InstanceDir, make_folder
from kvmsupervisor.adapters.users import QemuUser
from kvmsupervisor.aio import both
from kvmsupervisor.domain.argv import Channels, HostSide, Provision
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.hardware import Nvram, TapFds
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import Limits
from kvmsupervisor.domain.spec import Disk, Firmware, RbdDisk, Spec
from kvmsupervisor.domain.storage import nvram_of
from kvmsupervisor.machine import boot_media as media
from kvmsupervisor.machine.contents import Contents
from kvmsupervisor.machine.images import Disks, DiskTrouble
from kvmsupervisor.machine.jobs import Underway
from kvmsupervisor.machine.local_disks import LocalDisks
from kvmsupervisor.machine.system import System

HOST_RETRY_S = 5.0
"""Pause before the next attempt, and so how late a new bridge is noticed. An attempt costs one short program."""

MEDIA_RETRY_S = 10.0
"""The same for boot media. Arbitrary; an operator fixing the server should not wait long."""

START_FILES = 16
"""How many files one start opens at most, without taps: four sockets, logs, cgroup, pipes of its helper programs."""

SPARE_FILES = 16
"""How many more must stay free, so that etcd, HTTP and QMP can reconnect. Arbitrary; each needs one or two."""

ANYWHERE = frozenset({"0.0.0.0", "::"})
"""Addresses that mean all addresses of the host."""


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
class Prepared:
    """What `prepare` made for one start.

    Attributes:
        spec: the spec that it was made for.
        ceph_key: path of the file with the Ceph key; None without an RBD disk.
        lacking: images in Ceph that are to be made, or to be made larger.
        notice: what a person should know about it; None for nothing.
    """

    spec: Spec
    lacking: tuple[Disk, ...] = ()
    media: tuple[str, ...] = ()
    ignition: str | None = None
    nvram: Nvram | None = None
    ceph_key: str | None = None
    notice: str | None = None


def foresee(instance: InstanceId, spec: Spec, *, directory: InstanceDir, state_dir: Path) -> Prepared:
    """What `prepare` would make, as far as that is known without making it.

    Whether user data is Ignition is known only after a fetch on this host; until then it is taken for another kind.
    """
    ignition = directory.path / media.IGNITION
    is_ignition = spec.cloud_config is not None and ignition.exists()
    drives = () if spec.cloud_config is None or is_ignition else (media.SEED, media.CONFIG_DRIVE)
    image = nvram_of(spec)
    nvram = Nvram(rbd=image) if image is not None else Nvram(file=str(_file_of_variables(state_dir, instance)))
    return Prepared(
        spec=spec,
        media=tuple(str(directory.path / name) for name in drives),
        ignition=str(ignition) if is_ignition else None,
        nvram=nvram if spec.firmware is Firmware.UEFI else None,
        ceph_key=str(directory.ceph_key) if spec.images else None,
    )


def _file_of_variables(state_dir: Path, instance: InstanceId) -> Path:
    return state_dir / instance / "nvram.fd"


@frozen(kw_only=True)
class HostFiles:
    """Paths and choices of this host.

    Attributes:
        state_dir: folder of files that outlive a boot.
        bridge_helper: QEMU's bridge helper; None to look for it.
        bridge_owner: the owner in bridge.conf of the lines that allow bridges; no other supervisor has that name.
        media_root: folder below which `file:` URLs of user data are allowed; None for nowhere.
        media_cacert: CA certificates, in addition to the system's, for servers of user data.
        media_inward: whether a redirect of user data may lead to an address of this host.
    """

    state_dir: Path
    bridge_owner: str
    bridge_helper: Path | None = None
    media_root: Path | None = None
    media_cacert: Path | None = None
    media_inward: bool = False


@frozen(kw_only=True)
class Opened:
    """What was opened for one start.

    Attributes:
        ready: the result of `prepare`.
        machine: the versioned machine type.
        taps: one for each NIC.
        files: descriptors of the disks that are files.
        tap_names: the names of the taps on the host.
        bridges: the bridge of each tap.
        spice_password: path of the file with the SPICE password; None without one.
        cgroup: the cgroup that the process enters.
        closing: closes our descriptors; QEMU has inherited its own by then.
    """

    ready: Prepared
    machine: str
    taps: tuple[Tap, ...]
    files: tuple[int, ...]
    tap_names: tuple[str, ...]
    bridges: tuple[str, ...]
    spice_password: str | None
    cgroup: Cgroup
    closing: contextlib.ExitStack

    def provision(self, directory: InstanceDir, channels: Channels) -> Provision:
        """Everything that the command line needs."""
        return Provision(
            run_dir=str(directory.path),
            channels=channels,
            machine=self.machine,
            taps=tuple(TapFds(fd=tap.fd, vhost_fd=tap.vhost_fd) for tap in self.taps),
            files=self.files,
            media=self.ready.media,
            ignition=self.ready.ignition,
            nvram=self.ready.nvram,
            spice_password=self.spice_password,
            ceph_key=self.ready.ceph_key,
        )


class Provisioner:
    """Gets what the QEMUs of this host need.

    Args:
        system: where taps and device nodes come from.
        host: the host's part of the command line.
        files: paths and choices of this host.
        user: the user that QEMU runs as, and owner of its files; None for the supervisor's own.
        types: the machine types that QEMU knows.
        cgroups: makes cgroups for QEMU processes.
        disks: images in Ceph.
        local_disks: files of this host.
        contents: what new disks begin with.
    """

    def __init__(
        self,
        *,
        system: System,
        host: HostSide,
        files: HostFiles,
        user: QemuUser | None,
        types: MachineTypes,
        cgroups: CgroupManager,
        disks: Disks,
        local_disks: LocalDisks,
        contents: Contents,
    ) -> None:
        self._system = system
        self._host = host
        self._files = files
        self._user = user
        self._types = types
        self._cgroups = cgroups
        self._disks = disks
        self._local_disks = local_disks
        self._contents = contents
        # Invariant: the SPICE servers of all QEMUs that live on this host or are being started.
        self._displays: dict[InstanceId, tuple[str, int]] = {}

    # --- what takes its time ----------------------------------------------------------------------------------

    @staticmethod
    def needs_time(spec: Spec) -> bool:
        """Whether `prepare` has anything to do for such a machine."""
        return spec.cloud_config is not None or spec.firmware is Firmware.UEFI or bool(spec.all_disks)

    async def prepare(
        self,
        instance: InstanceId,
        *,
        uuid: UUID,
        spec: Spec,
        directory: InstanceDir,
        files: Mapping[str, str],
        images: Collection[str],
    ) -> Prepared:
        """Check the disks, make boot media and UEFI variables. Crash-safe: it can be repeated at any point.

        Args:
            instance: which.
            uuid: of the machine.
            spec: likewise.
            directory: its run directory.
            files: the host that has each of its disks that are files, as far as it has run with them.
            images: its images in Ceph that may be made, as far as it has run with them.

        Raises:
            NotReady: an image is unsuitable, the user data cannot be fetched, or a file cannot be written.
            EtcdError: it is not known what a disk is to begin with.
        """
        try:
            directory.create()
        except OSError as error:
            raise NotReady(f"its folder cannot be made: {explain(error, directory.path)}", HOST_RETRY_S) from error
        nvram = None
        remarks, lacking, ceph_key = await self._look_at_disks(instance, spec, directory, files, images)
        try:
            if spec.firmware is Firmware.UEFI:
                nvram = await self._nvram(instance, spec)
        except OSError as error:
            said = explain(error, _file_of_variables(self._files.state_dir, instance))
            raise NotReady(f"its UEFI variables cannot be made: {said}", HOST_RETRY_S) from error
        if spec.cloud_config is None:
            media.discard(directory.path)
            return Prepared(
                spec=spec, nvram=nvram, ceph_key=ceph_key, lacking=lacking, notice="; ".join(remarks) or None
            )
        try:
            made = await media.furnish(
                spec.cloud_config,
                directory=directory.path,
                instance=instance,
                uuid=uuid,
                file_root=self._files.media_root,
                ca_file=self._files.media_cacert,
                follow_inward=self._files.media_inward,
                gid=None if self._user is None else self._user.gid,
            )
        except media.MediaTrouble as error:
            raise NotReady(str(error), MEDIA_RETRY_S) from error
        return Prepared(
            spec=spec,
            media=tuple(map(str, made.cdroms)),
            ignition=None if made.ignition is None else str(made.ignition),
            nvram=nvram,
            ceph_key=ceph_key,
            lacking=lacking,
            notice="; ".join(filter(None, [made.notice, *remarks])) or None,
        )

    async def _look_at_disks(
        self,
        instance: InstanceId,
        spec: Spec,
        directory: InstanceDir,
        files: Mapping[str, str],
        images: Collection[str],
    ) -> tuple[tuple[str, ...], tuple[Disk, ...], str | None]:
        """Check the disks, and write the Ceph key where QEMU reads it.

        Returns:
            What a person should know, the images that are to be made, and the key's path, None without an image.
        """
        try:
            remarks = await self._local_disks.check(instance, spec, files, self._contents)
            if not spec.images:
                return remarks, (), None
            lacking, key = await both(self._contents.look(instance, spec, images), self._disks.check(spec))
            path = directory.write_ceph_key(key, group=None if self._user is None else self._user.gid)
            return (*remarks, *lacking.remarks), lacking.disks, str(path)
        except DiskTrouble as error:
            raise NotReady(str(error), error.retry_s, underway=isinstance(error, Underway)) from error
        except OSError as error:
            said = explain(error, directory.ceph_key)
            raise NotReady(f"the key to Ceph cannot be kept for QEMU: {said}", HOST_RETRY_S) from error

    async def _nvram(self, instance: InstanceId, spec: Spec) -> Nvram:
        """Where the UEFI variables are. Without a file, one is copied from the firmware's template."""
        assert self._host.ovmf is not None
        image = nvram_of(spec)
        if image is not None:
            return Nvram(rbd=image)
        file = _file_of_variables(self._files.state_dir, instance)
        if not file.exists():
            await asyncio.to_thread(self._copy_variables, Path(self._host.ovmf.variables), file)
        else:
            self._give(file)
        return Nvram(file=str(file))

    async def _furnish_variables(self, instance: InstanceId, image: RbdDisk) -> None:
        """Make the image of UEFI variables: from this host's file of them, or else from the firmware's template."""
        assert self._host.ovmf is not None
        file = _file_of_variables(self._files.state_dir, instance)
        template = file if file.exists() else Path(self._host.ovmf.variables)
        try:
            await self._disks.furnish_variables(image, template)
        except DiskTrouble as error:
            raise NotReady(f"its UEFI variables cannot be made: {error}", error.retry_s) from error

    def _copy_variables(self, template: Path, file: Path) -> None:
        make_folder(file.parent)
        aside = file.with_name(file.name + ".new")
        aside.unlink(missing_ok=True)
        # The mode is set while the file is empty, so that no other user can open it meanwhile.
        aside.touch(mode=0o600, exist_ok=False)
        shutil.copyfile(template, aside)
        self._give(aside)
        aside.replace(file)

    def _give(self, file: Path) -> None:
        """Give the file to QEMU's user; after an upgrade the user may be new, or have another uid."""
        if self._user is not None:
            os.chown(file, self._user.uid, self._user.gid)

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
        lack = resources.lack_of_files(START_FILES + SPARE_FILES + 2 * len(spec.all_nics) + len(spec.files))
        if lack is not None:
            raise NotReady(f"it cannot be started: {lack}", HOST_RETRY_S)
        self._check_display(instance, spec)
        machine = machine or await self._types.versioned(spec.machine)
        # Not in `prepare`: only the holder of the lock may make an image.
        try:
            for disk in ready.lacking:
                await self._contents.make(instance, disk)
            if ready.lacking:
                await self._disks.check(spec)  # a pool may have its own mind of what is made there
        except DiskTrouble as error:
            raise NotReady(str(error), error.retry_s) from error
        if ready.nvram is not None and ready.nvram.rbd is not None:
            await self._furnish_variables(instance, ready.nvram.rbd)
        with contextlib.ExitStack() as stack:
            try:
                files = await self._local_disks.open(instance, spec)
                for fd in files:
                    stack.callback(os.close, fd)
                password = self._write_password(spec, directory)
                taps = [stack.enter_context(contextlib.closing(tap)) async for tap in self._taps(spec)]
                cgroup = await self._cgroups.prepare(instance, incarnation, _limits(spec))
                stack.callback(cgroup.close)
            except (NetworkTrouble, CgroupFailed, DiskTrouble) as error:
                raise NotReady(str(error), HOST_RETRY_S) from error
            except OSError as error:
                said = explain(error, directory.path)
                raise NotReady(f"a file for QEMU cannot be written: {said}", HOST_RETRY_S) from error
            return Opened(
                ready=ready,
                machine=machine,
                taps=tuple(taps),
                files=files,
                tap_names=tuple(self._system.network.tap_name(tap.fd) for tap in taps),
                bridges=self._bridges(spec),
                spice_password=password,
                cgroup=cgroup,
                closing=stack.pop_all(),
            )

    async def _taps(self, spec: Spec) -> AsyncIterator[Tap]:
        """A tap for each NIC, one after the other: each takes milliseconds."""
        if not spec.all_nics:
            return
        for device in (devices.TUN, devices.VHOST_NET):
            with contextlib.suppress(DeviceTrouble):
                # A missing device makes the helper fail, with a message that names the bridge, too.
                self._system.ensure_device(device)
        wanted = self._bridges(spec)
        self._system.network.allow_bridges(wanted, owner=self._files.bridge_owner)
        for bridge in wanted:
            yield await self._system.network.open_tap(bridge, helper=self._files.bridge_helper)

    def _bridges(self, spec: Spec) -> tuple[str, ...]:
        """The bridge of each NIC."""
        bridges = (nic.bridge or self._host.bridge_if for nic in spec.all_nics)
        return tuple(bridge for bridge in bridges if bridge is not None)

    def _write_password(self, spec: Spec, directory: InstanceDir) -> str | None:
        """Write the SPICE password where only QEMU reads it; return the path, None without a password."""
        if spec.spice_port is None or spec.spice_password is None:
            return None
        assert spec.spice_password.text is not None
        directory.create()
        path = directory.spice_password
        path.unlink(missing_ok=True)
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(spec.spice_password.text.encode())
        if self._user is not None:
            os.chown(path, self._user.uid, self._user.gid)
        return str(path)

    # --- who is here ------------------------------------------------------------------------------------------

    def arrived(self, instance: InstanceId, spec: Spec) -> None:
        """Note that a QEMU of this machine lives on this host or is being started."""
        self._local_disks.arrived(instance, spec)
        if spec.spice_port is not None:
            self._displays[instance] = (spec.spice_addr or self._host.spice_addr, spec.spice_port)

    async def left(self, instance: InstanceId) -> None:
        """Note that the QEMU is proven gone."""
        self._displays.pop(instance, None)
        self._local_disks.left(instance)
        await self._cgroups.remove(instance)

    def _check_display(self, instance: InstanceId, spec: Spec) -> None:
        if spec.spice_port is None:
            return
        address = spec.spice_addr or self._host.spice_addr
        for other, (its_address, its_port) in self._displays.items():
            overlap = address == its_address or not ANYWHERE.isdisjoint({address, its_address})
            if other != instance and spec.spice_port == its_port and overlap:
                raise NotReady(
                    f"spice_port: port {its_port} on {its_address} belongs to instance {other}; give one of the two "
                    "another port",
                    HOST_RETRY_S,
                )
        trouble = self._system.port_trouble(address, spec.spice_port)
        if trouble is None:
            return
        if trouble == ports.TAKEN:
            raise NotReady(
                f"spice_port: port {spec.spice_port} on {address} cannot be used: {trouble}; "
                "give the instance another port, or end that program",
                HOST_RETRY_S,
            )
        key = "spice_addr" if spec.spice_addr is not None else "SPICE_ADDR"
        raise NotReady(
            f"{key}: {address} cannot be listened on ({trouble}): use an address of this host, such as 127.0.0.1, or "
            "0.0.0.0 for all addresses",
            HOST_RETRY_S,
        )


def _limits(spec: Spec) -> Limits:
    memory = None if spec.memory_limit_mib is None else spec.memory_limit_mib << 20
    return Limits(cpu_shares=spec.cpu_shares, memory_limit=memory)
