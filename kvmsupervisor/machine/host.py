"""What this host brings to the machines on it: found once, when a supervisor starts, and told in its log."""

from __future__ import annotations

import grp
import os

import structlog

from kvmsupervisor.adapters import accelerator, devices, firmware, resources, users
from kvmsupervisor.adapters.ceph import CephAccess
from kvmsupervisor.adapters.devices import DeviceTrouble
from kvmsupervisor.adapters.usage import memory_for_guests_mib
from kvmsupervisor.adapters.users import QemuUser
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.argv import HostSide
from kvmsupervisor.domain.capabilities import NET_ADMIN, lacking, what_is_lacking
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.hardware import Ceph
from kvmsupervisor.machine.provisioning import HostFiles

log = structlog.get_logger(__name__)

CEPH_USER = "admin"
"""What Ceph's tools and librbd call themselves when nothing else is said."""

SUPERVISOR_FILES, MACHINE_FILES = 80, 5
"""Files that a supervisor has open by itself, those that a start needs included, and for each machine: its pidfd, QMP,
both its logs, and its agent while that is asked. Counted in /proc/PID/fd (docs/reliability.md)."""

KVM_GROUP = "kvm"
"""The group that distributions give /dev/kvm to."""


@frozen(kw_only=True)
class Equipment:
    """What the host brings.

    Attributes:
        accelerator: what guests run with, and why not KVM.
        user: that QEMU runs as; None for the supervisor's own.
        host_side: what every command line is made with.
        files: where things are.
        memory_mib: for all guests together.
        ceph_access: how Ceph's tools reach it.
    """

    accelerator: accelerator.Choice
    user: QemuUser | None
    host_side: HostSide
    files: HostFiles
    memory_mib: int
    ceph_access: CephAccess

    @property
    def privileged(self) -> bool:
        """Whether QEMU runs as root: every fault of its devices is then a fault of the host."""
        return self.user is None and os.geteuid() == 0


def look_around(settings: Settings) -> Equipment:
    """Find out what the host brings; make KVM's device where it is missing, and let QEMU's user open it.

    Raises:
        ValueError: KVM is demanded and cannot be used, or QEMU cannot run as the user that was named, or root lacks
            capabilities for that.
    """
    look_at_bridge(settings)
    user = users.qemu_user(settings.qemu_user)
    trouble = None
    if settings.accel.value != "tcg":
        try:
            devices.ensure(devices.KVM)
            if user is not None:
                granted = devices.grant(devices.KVM.path, user.groups, _kvm_group(user))
                user = user.joining(granted.gid)
                if granted.changed:
                    log.warning("device.granted", device=str(devices.KVM.path), gid=granted.gid)
        except DeviceTrouble as error:
            trouble = str(error)
    choice = accelerator.choose(settings.accel.value, trouble=trouble)
    return Equipment(
        accelerator=choice,
        user=user,
        host_side=host_side(settings, choice),
        files=HostFiles(
            state_dir=settings.state_dir,
            bridge_helper=settings.bridge_helper,
            bridge_owner=settings.layout.session_key(settings.hostname),
            media_root=settings.media_root,
            media_cacert=settings.media_cacert,
            media_inward=settings.media_inward_redirects,
        ),
        memory_mib=max(0, memory_for_guests_mib() - settings.memory_reserve_mib),
        ceph_access=ceph_access(settings),
    )


def look_at_bridge(settings: Settings) -> None:
    """Tell of a bridge that nothing can be plugged into. No more: it may be that no guest has a NIC."""
    missing = lacking(users.effective_capabilities(), (NET_ADMIN,))
    if settings.bridge_if is not None and os.geteuid() == 0 and missing:
        log.warning("bridge.out_of_reach", bridge=settings.bridge_if, reason=what_is_lacking(missing))


def look_at_files(limit: int, machines: int) -> None:
    """Tell of a limit of open files that does not do for so many machines."""
    needed = SUPERVISOR_FILES + MACHINE_FILES * machines
    if needed > limit:
        log.warning(
            "files.too_few",
            limit=limit,
            needed=needed,
            machines=machines,
            reason=f"some machines will wait for files that can be opened: {resources.RAISE_IT}",
        )


def ceph_access(settings: Settings) -> CephAccess:
    """How Ceph's tools reach it."""
    conf = None if settings.ceph_conf is None else str(settings.ceph_conf)
    return CephAccess(user=settings.ceph_id or CEPH_USER, conf=conf)


def host_side(settings: Settings, choice: accelerator.Choice) -> HostSide:
    """What every command line of this host is made with. Changes nothing."""
    return HostSide(
        qemu=settings.qemu,
        accel=choice.name,
        # Empty, the setting means that QEMU shall not be confined.
        sandbox=settings.qemu_user != "",
        bridge_if=settings.bridge_if,
        spice_addr=settings.spice_addr,
        flags=settings.extra_flags,
        ovmf=firmware.find(settings.ovmf_code, settings.ovmf_vars),
        ceph=Ceph(conf=None if settings.ceph_conf is None else str(settings.ceph_conf), user=settings.ceph_id),
    )


def _kvm_group(user: QemuUser) -> int:
    try:
        return grp.getgrnam(KVM_GROUP).gr_gid
    except KeyError:
        return user.gid
