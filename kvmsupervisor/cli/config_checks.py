"""`check-config`: looks whether this host has what the settings name: programs, users, folders, bridges.

Changes nothing, and needs no root. Certificates and keys are looked for whenever settings are read, see
`config.values.file`.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvmsupervisor.config.load import SettingProblem
from kvmsupervisor.config.settings import DISK_DIR, Settings

NETWORK = Path("/sys/class/net")


def problems_here(settings: Settings, *, network: Path = NETWORK) -> list[SettingProblem]:
    """Problems with things that the settings name and this host does not have.

    Args:
        settings: without a problem of their own.
        network: where the kernel shows its network interfaces.
    """
    return [
        *_program("KVM_QEMU", settings.qemu, "install QEMU, or name its program by an absolute path"),
        *_user(settings.qemu_user),
        *_program("KVM_BRIDGE_HELPER", settings.bridge_helper, "install it, or leave the setting out"),
        *_bridge(settings.bridge_if, network),
        *_folder("KVM_RUN_DIR", settings.run_dir),
        *_folder("KVM_STATE_DIR", settings.state_dir),
        *_disk_dir(settings.disk_dir),
        *_media_root(settings.media_root),
        *_ceph_conf(settings.ceph_conf),
    ]


def web_problems(settings: Settings) -> list[str]:
    """Problems of the files that say who may use `kvmsupervisor web`, as this user can read them."""
    if settings.web_config is None and settings.web_people is None and settings.web_etcd_username is None:
        return []
    from kvmsupervisor.web.access import AccessError, read_access  # noqa: PLC0415 - most hosts have no such files

    try:
        read_access(settings)
    except AccessError as error:
        return error.problems
    return []


def _program(name: str, value: str | Path | None, wanted: str) -> Iterator[SettingProblem]:
    if value is None or shutil.which(value) is not None:
        return
    path = Path(value)
    if path.is_dir():
        found = "a folder"
    elif path.exists():
        found = "a file that is not executable"
    else:
        found = "no such program" if path.is_absolute() else f"no such program in PATH ({os.environ.get('PATH', '')})"
    yield SettingProblem(name, f"{str(value)!r}, {found}", wanted)


def _user(name: str | None) -> Iterator[SettingProblem]:
    if not name:
        return
    try:
        pwd.getpwnam(name)
    except KeyError:
        yield SettingProblem(
            "KVM_QEMU_USER",
            f"{name!r}, and there is no such user",
            f"create it (useradd --system --no-create-home {name}), or leave the setting empty",
        )


def _bridge(name: str | None, network: Path) -> Iterator[SettingProblem]:
    if name is None or (network / name / "bridge").is_dir():
        return
    found = "an interface that is no bridge" if (network / name).exists() else "no such interface"
    yield SettingProblem(
        "BRIDGE_IF", f"{name!r}, {found}", f"a bridge of this host, as made by `ip link add {name} type bridge`"
    )


def _folder(name: str, path: Path) -> Iterator[SettingProblem]:
    """A problem that keeps a missing folder from being made."""
    for above in (path, *path.parents):
        if above.is_dir():
            return
        if os.path.lexists(above):
            yield SettingProblem(name, f"{str(path)!r}, and {above} is no folder", "a folder, or a path for one")
            return


def _media_root(path: Path | None) -> Iterator[SettingProblem]:
    if path is not None and not path.is_dir():
        found = "which is no folder" if os.path.lexists(path) else "which does not exist"
        yield SettingProblem("KVM_MEDIA_ROOT", f"{str(path)!r}, {found}", "a folder that holds user data")


def _disk_dir(path: Path) -> Iterator[SettingProblem]:
    # The default one is made when a machine needs it; one that was named has to be there.
    if path != DISK_DIR and not path.is_dir():
        found = "which is no folder" if os.path.lexists(path) else "which does not exist"
        yield SettingProblem("KVM_DISK_DIR", f"{str(path)!r}, {found}", "a folder for disks, its file system mounted")


def _ceph_conf(path: Path | None) -> Iterator[SettingProblem]:
    # The default file may be missing where no instance has an image in Ceph; a file that was named may not.
    if path is not None and not path.is_file():
        yield SettingProblem("CEPH_CONF", f"{str(path)!r}, which is no file", "Ceph's configuration file")
