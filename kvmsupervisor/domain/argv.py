"""The command line of QEMU, made of a machine's wishes and the host's choices (DESIGN §5).

Source: qemu-system-x86_64(1). Disks are in `disk.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID, uuid5

from kvmsupervisor.domain.disk import CephSide, rbd_disk, secret
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import Problem, RbdImage, Spec

UUID_NAMESPACE = UUID("b108c36d-2985-4a5f-9c7a-3d69497d770a")
"""Drawn once. It must never change: guests, and licences in them, know the machine by its uuid."""

QMP_SOCKET = "qmp.sock"
QMP_SPARE_SOCKET = "qmp-spare.sock"
CONSOLE_SOCKET = "console.sock"
CONSOLE_LOG = "console.log"
AGENT_SOCKET = "agent.sock"
"""Names in an instance's run directory. Settings make sure that the longest makes a valid socket address."""

# PCI slots are fixed, so that a display or disk that comes later does not rename the guest's NIC. They begin
# above those that QEMU gives out by itself, from the lowest, to `-vga` and to the devices of extra_flags.
_NIC_SLOT = 0x10
_DISK_SLOT = 0x11
_SERIAL_SLOT = 0x12
_RNG_SLOT = 0x13
_BALLOON_SLOT = 0x14
_USB_SLOT = 0x15


class Unbuildable(Exception):
    """The wishes are sound, but not on this host. Wait for another wish or setting.

    Attributes:
        problem: what is missing.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who the machine is.

    Attributes:
        instance: its id.
        uuid: `instance_uuid` of it.
    """

    instance: InstanceId
    uuid: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSide:
    """What the host chooses, not the wishes.

    Attributes:
        qemu: QEMU's program, a name or a path.
        accel: the accelerator to use.
        run_dir: the instance's own run directory, an absolute path without a slash at its end.
        qmp_fds: descriptors of the listening sockets of QMP, which QEMU inherits under the same numbers:
            the supervisor's own, and the spare one for its successor and for people.
        bridge_if: bridge of NICs whose `bridge` is not given, or None.
        spice_addr: address on which SPICE servers listen.
        ceph: how QEMU reaches Ceph.
    """

    qemu: str
    accel: Literal["kvm", "tcg"]
    run_dir: str
    qmp_fds: tuple[int, int]
    bridge_if: str | None = None
    spice_addr: str = "127.0.0.1"
    ceph: CephSide = field(default_factory=CephSide)


def instance_uuid(prefix: str, instance: InstanceId) -> UUID:
    """The machine's uuid: the same for the same prefix and id, on every host, for ever."""
    return uuid5(UUID_NAMESPACE, f"{prefix}/{instance}")


def build_argv(spec: Spec, *, identity: Identity, host: HostSide) -> tuple[str, ...]:
    """The whole command line, the program first.

    QEMU starts paused (`-S`): the guest runs when the supervisor says `cont`.

    Raises:
        Unbuildable: the host lacks something that the wishes leave to it.
    """
    return (
        host.qemu,
        *("-nodefaults", "-no-user-config", "-S"),
        *("-name", f"guest={_escaped(identity.instance)},debug-threads=on"),
        *("-uuid", str(identity.uuid)),
        *("-machine", f"{_escaped(spec.machine)},accel={host.accel}"),
        # A CPU's features are separated by commas, so these are not doubled.
        *("-cpu", spec.cpu or ("host" if host.accel == "kvm" else "max")),
        *("-m", f"size={spec.ram_mib}M"),
        *("-smp", f"cpus={spec.cpus}"),
        *_monitors(host),
        *_channels(host),
        *("-device", f"virtio-rng-pci,id=rng0,addr={_RNG_SLOT:#x}"),
        *("-device", f"virtio-balloon-pci,id=balloon0,addr={_BALLOON_SLOT:#x}"),
        *("-device", "pvpanic"),
        *_nic(spec, host),
        *_disk(spec.rbd, host.ceph),
        *_display(spec.spice_port, host.spice_addr),
        *spec.extra_flags,
    )


def _escaped(value: str) -> str:
    """`value` as part of an option: QEMU reads two commas as one that does not separate."""
    return value.replace(",", ",,")


def _monitors(host: HostSide) -> Iterator[str]:
    """Two QMP monitors on sockets that listen already, so that connecting needs no waiting for QEMU."""
    for number, fd in enumerate(host.qmp_fds):
        yield from ("-chardev", f"socket,id=qmp{number},fd={fd},server=on,wait=off")
        yield from ("-mon", f"chardev=qmp{number},mode=control")


def _channels(host: HostSide) -> Iterator[str]:
    """The serial console, which is also logged, and the channel of the guest agent."""
    folder = _escaped(host.run_dir)
    log = f"logfile={folder}/{CONSOLE_LOG},logappend=on"
    yield from ("-chardev", f"socket,id=serial0,path={folder}/{CONSOLE_SOCKET},server=on,wait=off,{log}")
    yield from ("-serial", "chardev:serial0")
    yield from ("-device", f"virtio-serial-pci,id=virtio-serial0,addr={_SERIAL_SLOT:#x}")
    yield from ("-chardev", f"socket,id=agent0,path={folder}/{AGENT_SOCKET},server=on,wait=off")
    yield from ("-device", "virtserialport,bus=virtio-serial0.0,chardev=agent0,name=org.qemu.guest_agent.0")


def _nic(spec: Spec, host: HostSide) -> Iterator[str]:
    """The first NIC. QEMU itself calls its bridge helper."""
    if spec.mac is None:
        return
    bridge = spec.bridge or host.bridge_if
    if bridge is None:
        wanted = "say which bridge its NIC is on, here or in this host's BRIDGE_IF, or delete the key mac"
        raise Unbuildable(Problem("bridge", "nothing", wanted))
    yield from ("-netdev", f"bridge,id=net0,br={_escaped(bridge)}")
    yield from ("-device", f"virtio-net-pci,id=nic0,netdev=net0,mac={spec.mac},addr={_NIC_SLOT:#x}")


def _disk(rbd: RbdImage | None, ceph: CephSide) -> Iterator[str]:
    """The first disk."""
    if rbd is not None:
        yield from secret(ceph)
        yield from rbd_disk(rbd, ceph, name="disk0", slot=_DISK_SLOT)


def _display(spice_port: int | None, spice_addr: str) -> Iterator[str]:
    """A SPICE server with a pointer that follows the viewer's, or no display at all."""
    if spice_port is None:
        yield from ("-vga", "none", "-display", "none")
        return
    yield from ("-vga", "qxl")
    yield from ("-spice", f"port={spice_port},addr={_escaped(spice_addr)},disable-ticketing=on")
    yield from ("-k", "en-us")
    yield from ("-device", f"qemu-xhci,id=usb0,addr={_USB_SLOT:#x}", "-device", "usb-tablet,bus=usb0.0")
