"""What this host offers to its guests: accelerator, QEMU's user, firmware, memory. Found when a supervisor starts."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
from pathlib import Path

import structlog

from kvmsupervisor.adapters import accelerator, devices, firmware, resources, users
from kvmsupervisor.adapters.apart import LANDLOCK, NO_WALLS, VIEW, HostView, Walls, raise_walls
from kvmsupervisor.adapters.ceph import CephAccess
from kvmsupervisor.adapters.devices import DeviceTrouble
from kvmsupervisor.adapters.usage import memory_for_guests_mib
from kvmsupervisor.adapters.users import QemuUsers
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.argv import HostSide
from kvmsupervisor.domain.capabilities import NET_ADMIN, lacking, what_is_lacking
from kvmsupervisor.domain.flags import ANY_FLAGS, NONE_AS_ROOT
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.hardware import Ceph
from kvmsupervisor.machine.handover import HostFiles

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
        users: who QEMUs run as.
        walls: what keeps them apart.
        host_side: the host's part of every command line.
        files: paths on this host.
        memory_mib: memory for all guests together.
        ceph_access: how Ceph's tools reach the cluster.
    """

    accelerator: accelerator.Choice
    users: QemuUsers
    walls: Walls
    host_side: HostSide
    files: HostFiles
    memory_mib: int
    ceph_access: CephAccess

    @property
    def wall_states(self) -> tuple[tuple[str, bool], ...]:
        """What keeps guests apart, and whether it does here."""
        walls = self.walls
        return (
            ("user", self.users.uids is not None),
            (VIEW, walls.base is not None and not walls.view.shows_all),
            (LANDLOCK, walls.landlock > 0),
        )

    @property
    def gaps(self) -> tuple[str, ...]:
        """The walls between guests that cannot be had, and why; nothing where an operator wants none."""
        return () if self.users.is_own else tuple(f"{name}: {why}" for name, why in self.walls.lacking.items())

    @property
    def privileged(self) -> bool:
        """Whether QEMU runs as root: a guest that breaks out of QEMU is then root on the host."""
        return self.users.is_own and os.geteuid() == 0


def gather_host_facts(settings: Settings) -> HostFacts:
    """Find out what the host offers. Makes /dev/kvm when it is missing, and lets QEMU's user open it.

    Raises:
        ValueError: KVM is required and cannot be used; or QEMU cannot run as the configured user, or root lacks the
            capabilities for that.
    """
    look_at_bridge(settings)
    who = users.qemu_users(settings.qemu_user, settings.qemu_uids)
    look_at_users(who)
    trouble = None
    if settings.accel.value != "tcg":
        try:
            devices.ensure(devices.KVM)
            if not who.is_own:
                own_groups = who.groups if who.one is None else who.one.groups
                granted = devices.grant(devices.KVM.path, own_groups, _kvm_group(who))
                who = who.joining(granted.gid)
                if granted.changed:
                    log.warning("device.granted", device=str(devices.KVM.path), gid=granted.gid)
        except DeviceTrouble as error:
            trouble = str(error)
    choice = accelerator.choose(settings.accel.value, trouble=trouble)
    return HostFacts(
        accelerator=choice,
        users=who,
        walls=walls_for(who, settings),
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
    guests = settings.ceph_id or CEPH_USER
    return CephAccess(user=settings.supervisor_ceph_id or guests, conf=conf, guests=guests)


def host_side(settings: Settings, choice: accelerator.Choice) -> HostSide:
    """The host's part of every command line. Changes nothing on the host."""
    return HostSide(
        qemu=settings.qemu,
        accel=choice.name,
        # An empty setting turns the confinement of QEMU off.
        sandbox=settings.qemu_user != "",
        bridge_if=settings.bridge_if,
        spice_addr=settings.spice_addr,
        flags=settings.extra_flags or (NONE_AS_ROOT if is_qemu_root(settings) else ANY_FLAGS),
        ovmf=firmware.find(settings.ovmf_code, settings.ovmf_vars),
        memory_mib=memory_for_guests_mib(),
        ceph=Ceph(conf=None if settings.ceph_conf is None else str(settings.ceph_conf), user=settings.ceph_id),
    )


def is_qemu_root(settings: Settings) -> bool:
    """Whether these settings have QEMU run as root, so that nothing bounds what its options reach."""
    name = settings.qemu_user
    if os.geteuid() != 0 or name is None:
        return False
    with contextlib.suppress(KeyError):
        return name == "" or pwd.getpwnam(name).pw_uid == 0
    return False


def walls_for(who: QemuUsers, settings: Settings) -> Walls:
    """What keeps QEMUs apart on this host; what cannot be had is told."""
    if who.is_own:
        return NO_WALLS
    found = shutil.which(settings.qemu)
    folders, files = programs_around(None if found is None else os.path.realpath(found))
    seen = (*(settings.qemu_sees or ()), *files)
    hidden = (settings.run_dir, settings.state_dir, settings.disk_dir, settings.image_dir, "/proc", "/run/dbus")
    walls = raise_walls(HostView(seen=seen, hidden=tuple(map(str, hidden))), programs=folders)
    for name, why in walls.lacking.items():
        log.warning("qemu.wall_missing", wall=name, reason=why)
    return walls


def programs_around(qemu: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a QEMU needs that is in no usual place: the folders that it was installed into, and single files."""
    if qemu is None or qemu.startswith("/usr/"):
        return (), ()
    place = Path(qemu).parent
    if place.name == "bin" and len(place.parts) > len(Path("/bin").parts):
        return (str(place.parent),), ()
    return (), (qemu,)


def look_at_users(who: QemuUsers) -> None:
    """Warn of QEMUs that are not strangers to each other, and of others who may have their numbers."""
    if who.why_not_apart is not None and not who.is_own:
        log.warning("qemu.one_user", user=who.title, reason=who.why_not_apart)
    if who.uids is not None and (lines := users.subordinates_in(who.uids)):
        log.warning(
            "qemu.users_shared",
            uids=str(who.uids),
            reason=f"containers may have the same users ({'; '.join(lines)}): set KVM_QEMU_UIDS to another range",
        )


def _kvm_group(who: QemuUsers) -> int:
    with contextlib.suppress(KeyError):
        return grp.getgrnam(KVM_GROUP).gr_gid
    if who.uids is not None:
        return who.uids.of_kvm
    assert who.one is not None
    return who.one.gid
