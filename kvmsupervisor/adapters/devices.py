"""Device nodes that QEMU and its helper open: makes those that a container lacks, and opens them to QEMU's user.

Sources: /proc/misc, where drivers of major number 10 are listed with their minor (proc(5)); mknod(2).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.folders import make_folder

PROC_MISC = Path("/proc/misc")

MISC_MAJOR = 10
"""The major number of all devices in /proc/misc (MISC_MAJOR in include/uapi/linux/major.h)."""

MADE_MODE = 0o600
"""The mode of a new node, which belongs to root. `grant` opens it further where that is needed."""

GRANTED_MODE = 0o660

_READ_WRITE = 0o6


class DeviceTrouble(Exception):
    """A device cannot be used; the message says which one and what would help. An operator has to change the host."""


@frozen(kw_only=True)
class Device:
    """A device of /proc/misc.

    Attributes:
        path: the path of its node.
        name: its name in /proc/misc.
        module: the kernel module that provides it, for people.
    """

    path: Path
    name: str
    module: str


KVM = Device(path=Path("/dev/kvm"), name="kvm", module="kvm_intel or kvm_amd")
TUN = Device(path=Path("/dev/net/tun"), name="tun", module="tun")
VHOST_NET = Device(path=Path("/dev/vhost-net"), name="vhost-net", module="vhost_net")


@frozen(kw_only=True)
class Grant:
    """How QEMU's user can open a node.

    Attributes:
        gid: the group that QEMU must be in; None when it needs none.
        changed: whether the node was changed for that.
    """

    gid: int | None
    changed: bool = False


def ensure(device: Device, *, misc: Path = PROC_MISC) -> bool:
    """Make the node if it is missing; return whether it was made.

    An existing node stays as it is, even when /proc/misc does not list the device: opening it may load the module.

    Raises:
        DeviceTrouble: the kernel has no such device, the node cannot be made, or something else has its path.
    """
    minor = _minor(device, misc)
    if device.path.exists() or device.path.is_symlink():
        _check(device, minor)
        return False
    if minor is None:
        raise DeviceTrouble(
            f"{device.path} is missing, and {misc} lists no {device.name}: the module {device.module} is not loaded; "
            f"modprobe {device.module.split(' or ')[0]} on the host"
        )
    try:
        make_folder(device.path.parent)
        os.mknod(device.path, stat.S_IFCHR | MADE_MODE, os.makedev(MISC_MAJOR, minor))
    except FileExistsError:
        # Another program, such as udev, was faster.
        _check(device, minor)
        return False
    except OSError as error:
        raise DeviceTrouble(
            f"{device.path} is missing and cannot be made: {error.strerror}; run as root with CAP_MKNOD, or give the "
            f"container the device (--device {device.path})"
        ) from error
    return True


def grant(node: Path, groups: Collection[int], gid: int) -> Grant:
    """Find or make a way for an unprivileged process to open the node for reading and writing.

    A node that belongs to a group which may use it (`kvm`) stays with that group: its gid is returned, and QEMU joins
    the group. QEMU never joins root's group.

    Args:
        node: the device node.
        groups: the groups that QEMU's user is in, its primary group included.
        gid: the group that gets the node when no group can use it; needs root.

    Raises:
        DeviceTrouble: the node does not exist, or it would have to be changed and cannot be.
    """
    try:
        found = node.stat()
    except OSError as error:
        raise DeviceTrouble(f"{node} cannot be looked at: {error.strerror}") from error
    mode = stat.S_IMODE(found.st_mode)
    is_member = found.st_gid in groups
    by_group = mode >> 3 & _READ_WRITE == _READ_WRITE
    # A member of the group has the rights of the group, even when all others have more (path_resolution(7)).
    if not is_member and mode & _READ_WRITE == _READ_WRITE:
        return Grant(gid=None)
    if by_group and (is_member or found.st_gid != 0):
        return Grant(gid=found.st_gid)
    problem = f"{node} belongs to {found.st_uid}:{found.st_gid} with mode {mode:04o}, so QEMU's user cannot open it"
    remedy = f"chgrp {gid} {node} && chmod {GRANTED_MODE:04o} {node}"
    if os.geteuid() != 0:
        raise DeviceTrouble(f"{problem}; {remedy}")
    try:
        os.chown(node, -1, gid)
        node.chmod(GRANTED_MODE)
    except OSError as error:
        raise DeviceTrouble(
            f"{problem}, and that cannot be changed: {error.strerror}; on the host: {remedy}"
        ) from error
    return Grant(gid=gid, changed=True)


def _check(device: Device, minor: int | None) -> None:
    """Raise DeviceTrouble unless the node is the device."""
    try:
        found = device.path.stat()
    except OSError as error:
        raise DeviceTrouble(f"{device.path} cannot be looked at: {error.strerror}") from error
    if not stat.S_ISCHR(found.st_mode):
        # Docker makes a folder when `-v` names a path that does not exist on the host.
        raise DeviceTrouble(f"{device.path} is no device node; remove what is there, and do not mount it with -v")
    numbers = (os.major(found.st_rdev), os.minor(found.st_rdev))
    if minor is not None and numbers != (MISC_MAJOR, minor):
        raise DeviceTrouble(
            f"{device.path} has the numbers {numbers[0]}, {numbers[1]}, and {device.name} has {MISC_MAJOR}, {minor} "
            "now; remove it, and it is made anew"
        )


def _minor(device: Device, misc: Path) -> int | None:
    try:
        lines = misc.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise DeviceTrouble(f"{misc} cannot be read: {error.strerror}") from error
    pairs = (line.split() for line in lines)
    return next((int(pair[0]) for pair in pairs if len(pair) == 2 and pair[1] == device.name), None)
