"""What was made ready for one start of a QEMU, and the files of it that QEMU inherits open.

QEMU opens none of these by name: they are the supervisor's alone, and belong to no user of a guest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kvmsupervisor.adapters import handed
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.cdrom import medium_of
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.hardware import Handed, Nvram
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.media import MediumKind, detect
from kvmsupervisor.domain.spec import Firmware, RbdDisk, Secret, Spec
from kvmsupervisor.domain.storage import Unmade, nvram_of
from kvmsupervisor.folders import make_folder
from kvmsupervisor.machine import boot_media as media


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
class Prepared:
    """What `prepare` made for one start.

    Attributes:
        spec: the spec that it was made for.
        media: paths of its boot media; `ignition` that of its Ignition configuration, instead.
        variables: path of the file with its UEFI variables; None without, and where they are in `variables_image`.
        ceph_key: the key to Ceph; None without an RBD disk.
        lacking: images in Ceph that are to be made, or to be made larger.
        medium: what is in its CD-ROM drive when it starts; None for nothing, as far as it has a drive.
        notice: what a person should know about it; None for nothing.
    """

    spec: Spec
    lacking: tuple[Unmade, ...] = ()
    media: tuple[str, ...] = ()
    ignition: str | None = None
    variables: str | None = None
    variables_image: RbdDisk | None = None
    ceph_key: Secret | None = None
    medium: str | None = None
    notice: str | None = None


def foresee(instance: InstanceId, spec: Spec, *, directory: InstanceDir, state_dir: Path) -> Prepared:
    """What `prepare` would make, as far as that is known without making it.

    Whether the user data of a URL is Ignition is known only after a fetch on this host; until then it is taken for
    another kind.
    """
    ignition = directory.path / media.IGNITION
    is_ignition = spec.has_user_data and ignition.exists()
    if spec.user_data is not None and spec.user_data.text is not None:
        is_ignition = detect(spec.user_data.text.encode()) is MediumKind.IGNITION
    drives = (media.SEED, media.CONFIG_DRIVE) if spec.has_user_data and not is_ignition else ()
    is_uefi, image = spec.firmware is Firmware.UEFI, nvram_of(spec)
    return Prepared(
        spec=spec,
        media=tuple(str(directory.path / name) for name in drives),
        ignition=str(ignition) if is_ignition else None,
        variables=str(file_of_variables(state_dir, instance)) if is_uefi and image is None else None,
        variables_image=image if is_uefi else None,
        ceph_key=Secret.of("") if spec.images else None,
        medium=medium_of(spec.cdrom),
    )


def file_of_variables(state_dir: Path, instance: InstanceId) -> Path:
    """Path of an instance's UEFI variables, where they are a file of this host."""
    return state_dir / instance / "nvram.fd"


def copy_variables(template: Path, file: Path) -> None:
    """Make the file of an instance's UEFI variables; it has its name once it is whole.

    Raises:
        OSError: it cannot be made.
    """
    make_folder(file.parent)
    aside = file.with_name(file.name + ".new")
    aside.unlink(missing_ok=True)
    # The mode is set while the file is empty, so that no other user can open it meanwhile.
    aside.touch(mode=0o600, exist_ok=False)
    shutil.copyfile(template, aside)
    aside.replace(file)


@frozen(kw_only=True)
class HandedFiles:
    """Descriptors that QEMU inherits, as in `Provision`."""

    media: tuple[Handed, ...] = ()
    ignition: int | None = None
    nvram: Nvram | None = None
    spice_password: int | None = None
    ceph_key: int | None = None


def hand(ready: Prepared, stack: contextlib.ExitStack) -> HandedFiles:
    """Open the files for QEMU that `prepare` made; `stack` closes them.

    Raises:
        OSError: one cannot be opened.
    """
    spec = ready.spec

    def opened(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    def own(path: str, *, writable: bool = False) -> Handed:
        return Handed(opened(handed.open_own(Path(path), writable=writable)), path)

    def secret(name: str, value: Secret | None) -> int | None:
        return None if value is None else opened(handed.sealed(name, (value.text or "").encode()))

    ignition = None if ready.ignition is None else Path(ready.ignition).read_bytes()
    return HandedFiles(
        media=tuple(map(own, ready.media)),
        ignition=None if ignition is None else opened(handed.sealed("ignition", ignition)),
        nvram=_nvram(ready, own),
        spice_password=None if spec.spice_port is None else secret("spice-password", spec.spice_password),
        ceph_key=secret("ceph-key", ready.ceph_key),
    )


def _nvram(ready: Prepared, own: Callable[..., Handed]) -> Nvram | None:
    if ready.spec.firmware is not Firmware.UEFI:
        return None
    if ready.variables is None:
        return Nvram(rbd=ready.variables_image)
    return Nvram(file=own(ready.variables, writable=True))
