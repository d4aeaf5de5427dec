"""What this host offers to its guests: accelerator, QEMU's user, firmware, memory. Found when a supervisor starts."""

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
"""The user name of Ceph's tools and of librbd by default."""

SUPERVISOR_FILES, MACHINE_FILES = 80, 5
"""Open files of a supervisor: 80 of its own, with those that a start needs, and five for each machine (pidfd, QMP, two
logs, the agent while it is asked). Counted in /proc/PID/fd (docs/reliability.md)."""

KVM_GROUP = "kvm"
"""The group that owns /dev/kvm in most distributions."""


@frozen(kw_only=True)
class HostFacts:
    """What the host offers.

    Attributes:
        accelerator: the accelerator of all guests, and why it is not KVM.
        user: the user that QEMU runs as; None for the supervisor's own.
        host_side: the host's part of every command line.
        files: paths on this host.
        memory_mib: memory for all guests together.
        ceph_access: how Ceph's tools reach the cluster.
    """

    accelerator: accelerator.Choice
    user: QemuUser | None
    host_side: HostSide
    files: HostFiles
    memory_mib: int
    ceph_access: CephAccess

    @property
    def privileged(self) -> bool:
        """Whether QEMU runs as root: a guest that breaks out of QEMU is then root on the host."""
        return self.user is None and os.geteuid() == 0


def gather_host_facts(settings: Settings) -> HostFacts:
    """Find out what the host offers. Makes /dev/kvm when it is missing, and lets QEMU's user open it.

    Raises:
        ValueError: KVM is required and cannot be used; or QEMU cannot run as the configured user, or root lacks the
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
    return HostFacts(
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
    """Warn when no tap can be attached to the bridge. Only a warning: perhaps no guest has a NIC."""
    missing = lacking(users.effective_capabilities(), (NET_ADMIN,))
    if settings.bridge_if is not None and os.geteuid() == 0 and missing:
        log.warning("bridge.out_of_reach", bridge=settings.bridge_if, reason=what_is_lacking(missing))


def look_at_files(limit: int, machines: int) -> None:
    """Warn when the limit of open files is too low for that many machines."""
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
    """How Ceph's tools reach the cluster."""
    conf = None if settings.ceph_conf is None else str(settings.ceph_conf)
    return CephAccess(user=settings.ceph_id or CEPH_USER, conf=conf)


def host_side(settings: Settings, choice: accelerator.Choice) -> HostSide:
    """The host's part of every command line. Changes nothing on the host."""
    return HostSide(
        qemu=settings.qemu,
        accel=choice.name,
        # An empty setting turns the confinement of QEMU off.
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
